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
LEARNED = dict.fromkeys(FLAGS, "")  # two sentences for each, written when the numbers are there


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


def evaluations(name: str) -> list[list[dict]]:
    """Of each seed the metrics of its evaluations."""
    runs = [(RUNS / f"{name}-{s}" / "metrics.jsonl").read_text().splitlines() for s in SEEDS]
    return [[m for m in map(json.loads, run) if "eval/accuracy" in m] for run in runs]


def spread(values: list[float], digits: int) -> str:
    std = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{std}" if values else "never"


def row(name: str) -> str:
    """The run's row in the table: name, command, accuracy, length, updates to GOAL."""
    seeds = evaluations(name)
    steps = [[m["step"] for m in evals if m["eval/accuracy"] >= GOAL] for evals in seeds]
    reached = [min(s) for s in steps if s]
    few = f" ({len(reached)} of {len(SEEDS)} seeds)" if 0 < len(reached) < len(SEEDS) else ""
    accuracy = spread([evals[-1]["eval/accuracy"] for evals in seeds], 3)
    length = spread([evals[-1]["eval/completion_length"] for evals in seeds], 1)
    command = f"`grpo.py {FLAGS[name]}`".replace(" `", "`") + " with the diff" * (name in CHANGES)
    return f"| {name} | {command} | {accuracy} | {length} | {spread(reached, 0)}{few} |"


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
    text = f"""# Ablations

Written by `make ablations`: one thing about the toy run is changed, and the rest left as it is. Every
command has `{COMMON}` beside what the table says; `{{sft}}` is a run of `sft.py {SFT}`. Accuracy and
length (tokens) are those of greedy answers to held-out questions after the last update, mean ± sample
standard deviation over {len(SEEDS)} seeds. The last column is the first evaluation, one in five updates, at
{GOAL:.0%} or above. The last {len(CHANGES)} rows are the diffs under "Change this line" in [grpo.md](grpo.md), with
their pictures there.

| run | command | accuracy | length | updates to {GOAL:.0%} |
|---|---|---|---|---|
"""  # noqa: E501
    text += "\n".join(map(row, FLAGS)) + "\n"
    (DOCS / "ablations").mkdir(parents=True, exist_ok=True)
    for name, (_, other) in CHANGES.items():
        picture([other, name], DOCS / f"ablations/{name}.png")
    for title, names in ABLATIONS.items():
        file = f"ablations/{next(iter(names))}.png"
        picture(list(dict.fromkeys(["default", *names])), DOCS / file)
        text += f"\n## {title}\n\n![{title}]({file})\n"
        text += "".join(f"\n**{name}.** {LEARNED[name]}\n" for name in names if LEARNED[name])
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
