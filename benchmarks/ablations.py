"""Ablations on the toy world: change one thing, three seeds, and see what becomes of the run.

    python benchmarks/ablations.py                  # all, then docs/ablations.md and its pictures
    python benchmarks/ablations.py beta-0.2 g-2     # some of the runs

Every run is `grpo.py` with the flags below, in `outputs/ablations/<name>-<seed>`; those of CHANGES
run a copy of the source with one of the diffs of docs/grpo.md applied. A finished run is not
repeated, so an interrupted series goes on where it was. Runs go side by side, one thread each.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import report  # noqa: E402

RUNS, DOCS = Path("outputs/ablations"), Path("docs")  # under ROOT, where everything runs
SEEDS = (0, 1, 2)
COMMON = "--max_steps 60 --eval_steps 5 --eval_rows 100 --save_steps 0"
SFT = "--max_steps 30 --eval_steps 0 --save_steps 0"  # of the run that {sft} stands for
GOAL = 0.9  # held-out accuracy whose first update is counted
ABLATIONS = {  # what is changed: the runs that change it, and their flags
    "Default": {"default": ""},
    "Loss type": {kind: f"--loss_type {kind}" for kind in ("bnpo", "dr_grpo", "dapo")},
    "Scaling of the advantages": {
        f"scale-{kind}": f"--scale_rewards {kind}" for kind in ("batch", "none")
    },
    "KL to the reference": {f"beta-{beta}": f"--beta {beta}" for beta in (0.04, 0.2)},
    "Completions per prompt": {f"g-{g}": f"--num_generations {g}" for g in (2, 4, 16)},
    "Updates per rollout": {
        "iterations-4": "--num_iterations 4",
        "clip-higher": "--num_iterations 4 --epsilon_high 0.28",
    },
    "Rewards": {
        "accuracy-only": "--rewards accuracy",
        "length-reward": "--rewards accuracy format length",
    },
    "What is trained": {f"frozen-{part}": f"--freeze {part}" for part in ("vision", "language")},
    "Start": {"sft-first": "--model {sft}"},
}
CHANGES = {  # the diffs under "Change this line", in their order: flags, the run to compare with
    "no-clip": ("--num_iterations 4", "iterations-4"),
    "no-baseline": ("", "default"),
    "kl-k2": ("--beta 0.04", "beta-0.04"),
    "pay-for-brevity": ("--rewards accuracy format short", "default"),
    "crowded-world": ("", "default"),
}
FLAGS = {name: flags for runs in ABLATIONS.values() for name, flags in runs.items()}
FLAGS |= {name: flags for name, (flags, _) in CHANGES.items()}
# Two sentences for each, without numbers: those are the table's.
LEARNED = """\
default: Greedy answers guess until looking first has become the likelier habit, then nearly all
of them look at once: accuracy and length jump together. Sampled answers change gradually all
along, which is where the learning happens.

bnpo: A mean over all tokens, where `grpo` takes a mean within each completion first, gives the
tokens of a long completion the weight of those of a short one. Looking is long, so it is learned
sooner.

dr_grpo: A constant divisor weighs long completions in the same way, and the jump comes sooner
than with `grpo` too. Its gradient is several times smaller, which AdamW does not notice.

dapo: In one process this is `bnpo`: both divide by the same tokens, and the runs are the same.
They part where several processes hold different numbers of tokens.

scale-batch: The curves of the default: all questions here are about equally hard, so the batch's
spread is the groups'. That this makes no difference would not carry over to a mixture of trivial
and hopeless questions.

scale-none: Not dividing at all, as Dr. GRPO advises, halves the gradient and costs nothing here.
With AdamW the scale of the advantages is mostly a matter of taste.

beta-0.04: The paper's weight gives the same curves as none at all. It costs a reference model and
a forward pass with it.

beta-0.2: Five times that weight delays the jump a little and does not prevent it. The base model
knows how to look, so choosing to do so is a small step in KL.

g-2: Two completions mostly score the same, and then their group teaches nothing; looking spreads
among the samples, but within these updates it seldom becomes the likeliest. It is also given a
quarter of the default's completions, so this compares updates and not samples.

g-4: Half the completions for nearly the same curve. It is the cheapest setting that works here.

g-16: Twice the completions, and no gain at the same learning rate. The mean of eight is a good
enough baseline.

iterations-4: Four updates per rollout learn as much from a quarter of the sampling. The ratio
moves away from one now, and the clip has something to do.

clip-higher: A higher upper clip (DAPO) makes no difference where so few tokens reach even the
usual one. It is meant for runs whose entropy collapses, and these are too short for that.

accuracy-only: The base model is nearly always well formed, so the format reward tells completions
apart only now and then. Without it looking is learned as fast or faster.

length-reward: Paying for words speeds up looking, which here is the only way to write more. The
paper found such a reward ineffective: a 2B model can fill the space with anything, the toy model
cannot, so the toy world cannot test this.

frozen-vision: The tower sees what matters before GRPO begins, so freezing it changes nothing. The
paper's Instruct model did best with it frozen.

frozen-language: Without the language model there is no way to change a habit, and the model goes
on guessing. The paper's Instruct model gained this way as well: real images leave more to see
than these.

sft-first: After SFT on bare answers the model writes no tags, and GRPO must find the format
before it can find looking: by the last update that has begun in every seed and ended in none. The
paper saw trivial reasoning when it started from Instruct models; here it looks delayed rather than
lost, which so few updates do not prove."""


def train(script: str, flags: str, seed: int, out: Path) -> None:
    """Run a stage to its end, unless that was done; its last words end this script."""
    if (out / "final").exists():
        return
    argv = [sys.executable, script, *flags.split(), "--seed", str(seed)]
    argv += ["--output_dir", str(out), "--overwrite"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=one_thread, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{out.name}: {done.stderr.strip().splitlines()[-1]}")
    print(f"{out.name}: done", flush=True)


def changed_source(name: str) -> Path:
    """A copy of the source with the diff applied."""
    text = (DOCS / "grpo.md").read_text()
    diffs = re.findall(r"^```diff\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    folder = RUNS / f"{name}-source"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree("assets", folder / "assets")
    for path in Path().glob("*.py"):
        shutil.copy(path, folder)
    diff = diffs[list(CHANGES).index(name)]
    # without the repository around it, git would leave out the paths that the repository ignores
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent.resolve())}
    subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, text=True, check=True, env=alone)
    return folder


def run(name: str, seed: int) -> None:
    sft, out = (RUNS / f"{run}-{seed}" for run in ("sft", name))
    if "{sft}" in FLAGS[name]:
        train("sft.py", SFT, seed, sft)
    script = str(RUNS / f"{name}-source" / "grpo.py") if name in CHANGES else "grpo.py"
    train(script, f"{COMMON} {FLAGS[name].format(sft=sft / 'final')}", seed, out)


def metrics(name: str) -> list[list[dict]]:
    """The metrics of each seed."""
    runs = [(RUNS / f"{name}-{s}" / "metrics.jsonl").read_text().splitlines() for s in SEEDS]
    return [[json.loads(line) for line in run] for run in runs]


def spread(values: list[float], digits: int) -> str:
    std = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{std}" if values else "never"


def row(name: str) -> str:
    """The run's row in the table."""
    seeds = [[m for m in run if "eval/accuracy" in m] for run in metrics(name)]
    steps = [[m["step"] for m in evals if m["eval/accuracy"] >= GOAL] for evals in seeds]
    reached = [min(s) for s in steps if s]
    few = f" ({len(reached)} of {len(SEEDS)} seeds)" if 0 < len(reached) < len(SEEDS) else ""
    accuracy = spread([evals[-1]["eval/accuracy"] for evals in seeds], 3)
    rewards = "rewards/accuracy"
    sampled = [np.mean([m[rewards] for m in run[-10:] if rewards in m]) for run in metrics(name)]
    length = spread([evals[-1]["eval/completion_length"] for evals in seeds], 1)
    command = f"`grpo.py {FLAGS[name]}`".replace(" `", "`") + " with the diff" * (name in CHANGES)
    cells = (name, command, accuracy, spread(sampled, 3), length, spread(reached, 0) + few)
    return f"| {' | '.join(cells)} |"


def picture(names: list[str], out: Path) -> None:
    """Held-out accuracy and completion length over updates, mean ± std over the seeds."""
    groups = [[report.read_run(RUNS / f"{name}-{seed}") for seed in SEEDS] for name in names]
    with matplotlib.rc_context(report.STYLE):
        figure = Figure((9, 3.2), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2)
        report.draw(left, groups, "Held-out accuracy", "%", ["eval/accuracy"])
        report.draw(right, groups, "Completion length (tokens)", "", ["eval/completion_length"])
        lines = [Line2D([], [], color=colour) for colour in report.COLOURS[: len(names)]]
        figure.legend(lines, names, loc="outside lower left", ncols=4)
        figure.savefig(out, dpi=110, metadata={"Software": None})


def document() -> str:
    learned = dict(text.split(": ", 1) for text in LEARNED.split("\n\n"))
    text = f"""# Ablations

Written by `make ablations`: one thing about the toy run is changed, and the rest left as it is.
Every command has `{COMMON}` beside what the
table says; `{{sft}}` is a run of `sft.py {SFT}`.

Accuracy and length (tokens) are those of greedy answers to held-out questions after the last
update, sampled accuracy that of the training samples of the last ten updates (of the last three
rollouts where each serves four updates); mean ± sample standard deviation over {len(SEEDS)} seeds.
The last column is the update of the first evaluation at {GOAL:.0%} or above; there is one
every five updates. The last {len(CHANGES)} rows are the diffs under "Change this line" in
[grpo.md](grpo.md), with their pictures there. Of curves that coincide the last one drawn is seen.

| run | command | accuracy | sampled accuracy | length | updates to {GOAL:.0%} |
|---|---|---|---|---|---|
"""
    text += "\n".join(map(row, FLAGS)) + "\n"
    (DOCS / "ablations").mkdir(parents=True, exist_ok=True)
    for name, (_, other) in CHANGES.items():
        picture([other, name], DOCS / f"ablations/{name}.png")
    for title, names in ABLATIONS.items():
        file = f"ablations/{next(iter(names))}.png"
        picture(list(dict.fromkeys(["default", *names])), DOCS / file)
        text += f"\n## {title}\n\n![{title}]({file})\n"
        text += "".join(f"\n**{name}.** {learned[name]}\n" for name in names)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"default all: {' '.join(FLAGS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in FLAGS]:
        parser.error(f"unknown: {' '.join(unknown)}; valid: {' '.join(FLAGS)}")
    os.chdir(ROOT)
    for name in set(CHANGES).intersection(args.names or FLAGS):
        changed_source(name)
    jobs = [(name, seed) for seed in SEEDS for name in args.names or FLAGS]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run(*job), jobs))
    if not args.names:
        (DOCS / "ablations.md").write_text(document())
        print("wrote docs/ablations.md")


if __name__ == "__main__":
    main()
