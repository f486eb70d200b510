"""Measure the demo over seeds, and write the README's tables and picture from the runs.

    python benchmarks/readme.py                # trains what is missing (a few minutes each), writes
    python benchmarks/readme.py --write        # writes from assets/demo/, without training

The runs are `accelerate launch grpo.py --seed S` in outputs/demo-<S>. A finished run is not
repeated. outputs/demo-remade-0 is a run with seed 0 on the base model that `make base-model` makes.
What the tables need is kept in assets/demo/, so that a test can hold the README to it.
"""

import argparse
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import report  # noqa: E402
from core.options import show  # noqa: E402
from grpo import GRPOOptions  # noqa: E402

KEPT = ROOT / "assets" / "demo"
SEEDS = (0, 1, 2, 5, 6, 7)  # the recipe was tuned in an earlier version of the world
WINDOW = 10  # updates that a sampled metric is averaged over
PRECISION = {  # metric -> heading; means over the last ten updates
    "eval/accuracy": "held-out accuracy",
    "rewards/accuracy": "sampled accuracy",
    "completions/reflection": "looks again",
    "sampling/logp_difference": "`sampling/logp_difference`",
    "sampling/kl": "`sampling/kl`",
}
KEPT_KEYS = (
    "step eval/accuracy eval/completion_length eval/reflection rewards/accuracy rewards/format "
    "completions/mean_length completions/reflection seconds/rollout seconds/train"
).split()


def train(seed: int) -> None:
    """Train what is missing, and keep it."""
    folder = ROOT / "outputs" / f"demo-{seed}"
    if not (folder / "final").exists():
        launch = ["accelerate", "launch", "--quiet", "--config_file", "configs/single.yaml"]
        flags = ["--seed", str(seed), "--output_dir", str(folder), "--overwrite"]
        subprocess.run([*launch, "grpo.py", *flags], cwd=ROOT, check=True)
    keep(folder, KEPT / folder.name)


def keep(folder: Path, kept: Path) -> None:
    """Copy what the tables and the picture need from a finished run."""
    kept.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    lines = [{key: line[key] for key in KEPT_KEYS if key in line} for line in lines]
    (kept / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = json.loads((folder / "config.json").read_text())
    del config["output_dir"]
    (kept / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read(run: str) -> list[dict]:
    return [json.loads(line) for line in open(KEPT / run / "metrics.jsonl")]


def windows(metrics: list[dict], key: str) -> list[float]:
    """Means over each window of ten updates in a row."""
    values = [line[key] for line in metrics if key in line]
    return [fmean(values[i : i + WINDOW]) for i in range(len(values) - WINDOW + 1)]


def demo_table() -> str:
    """A row per seed: before and after, and the shortest ten updates of the first half."""
    lines = [
        "| seed | held-out accuracy, greedy | length, sampled: first → shortest → last "
        "| looks again, sampled | well formed, sampled | seconds in updates |",
        "|---|---|---|---|---|---|",
    ]
    runs = {str(seed): read(f"demo-{seed}") for seed in SEEDS}
    runs["0, base model made again"] = read("demo-remade-0")
    for name, metrics in runs.items():
        scores = [line["eval/accuracy"] for line in metrics if "eval/accuracy" in line]
        length, again, well = (
            windows(metrics, key)
            for key in ("completions/mean_length", "completions/reflection", "rewards/format")
        )
        shortest = min(length[: len(length) // 2])
        seconds = sum(line.get(f"seconds/{x}", 0) for line in metrics for x in ("rollout", "train"))
        lines.append(
            f"| {name} | {scores[0]:.3f} → {scores[-1]:.3f} "
            f"| {length[0]:.1f} → {shortest:.1f} → {length[-1]:.1f} "
            f"| {again[0]:.2f} → {again[-1]:.2f} | {well[0]:.2f} → {well[-1]:.2f} "
            f"| {seconds:.0f} |"
        )
    return "\n".join(lines)


def loss_type_table() -> str:
    """How soon looking again spreads, by loss type: mean ± std over seeds, from the ablations."""
    results = json.loads((ROOT / "docs" / "ablations" / "results.json").read_text())
    lines = [
        "| `--loss_type` | updates until half of the completions look again | ratio to `grpo` "
        "| final share | held-out accuracy |",
        "|---|---|---|---|---|",
    ]
    base = fmean(run["half"] for run in results["baseline"].values())
    for loss_type, row in {"grpo": "baseline", "dapo": "dapo", "dr_grpo": "dr_grpo"}.items():
        keys = "half", "again", "greedy"
        half, share, accuracy = ([run[key] for run in results[row].values()] for key in keys)
        cells = (f"{fmean(x):.2f} ± {stdev(x):.2f}" for x in (share, accuracy))
        lines.append(
            f"| `{loss_type}` | {fmean(half):.0f} ± {stdev(half):.0f} "
            f"| {fmean(half) / base:.2f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def roads_table() -> str:
    """The four roads from the scores that `make paper-toy` left, mean ± std over seeds, in %."""
    roads = json.loads((KEPT / "roads.json").read_text())
    names = {"base": "base", "sft": "+ SFT on answers", "grpo": "+ GRPO"}
    names["cold"] = "+ cold start + GRPO"
    columns = ["Count", "Relation", "Depth", "Distance", "all", "all, strict"]
    lines = [f"| training | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for road, name in names.items():
        cells = []
        for column in columns:
            values = [100 * scores[column] for scores in roads[road]]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.1f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def keep_roads() -> None:
    """Copy the scores of the four roads to assets/demo/roads.json."""
    roads: dict[str, list[dict]] = {}
    for path in sorted((ROOT / "outputs" / "paper-toy").glob("*/scores.json")):
        scores = json.loads(path.read_text())
        row = {task: tally["accuracy_lenient"] for task, tally in scores["tasks"].items()}
        row |= {"all": scores["accuracy_lenient"], "all, strict": scores["accuracy"]}
        roads.setdefault(path.parent.name.partition("-")[0], []).append(row)
    if roads:
        (KEPT / "roads.json").write_text(json.dumps(roads, indent=1) + "\n")


def easy_vqa_table() -> str:
    """Held-out greedy accuracy before and after GRPO, from the runs of docs/data.md."""
    lines = [
        "| seed | held-out accuracy, greedy | length | seconds in updates: cold start, GRPO |",
        "|---|---|---|---|",
    ]
    for seed, run in json.loads((KEPT / "easy-vqa.json").read_text()).items():
        accuracy, length = (f"{a:.2f} → {b:.2f}" for a, b in (run["accuracy"], run["length"]))
        seconds = ", ".join(f"{s:.0f}" for s in run["seconds"])
        lines.append(f"| {seed} | {accuracy} | {length} | {seconds} |")
    return "\n".join(lines)


def keep_easy_vqa() -> None:
    """Copy what the table needs from outputs/easy-vqa-<seed>-{sft,grpo} to assets/demo/."""
    kept = {}
    for seed in (0, 1):
        folders = [ROOT / "outputs" / f"easy-vqa-{seed}-{stage}" for stage in ("sft", "grpo")]
        if all((folder / "final").exists() for folder in folders):
            sft, grpo = (list(map(json.loads, open(f / "metrics.jsonl"))) for f in folders)
            scores = [line for line in grpo if "eval/accuracy" in line]
            kept[seed] = {
                "accuracy": [line["eval/accuracy"] for line in (scores[0], scores[-1])],
                "length": [line["eval/completion_length"] for line in (scores[0], scores[-1])],
                "seconds": [
                    sum(v for line in run for k, v in line.items() if k.startswith("seconds/"))
                    for run in (sft, grpo)
                ],
            }
    if kept:
        (KEPT / "easy-vqa.json").write_text(json.dumps(kept, indent=1) + "\n")


def precision_table() -> str:
    """bf16 against fp32, mean ± std over seeds 0, 1, 2."""
    kept = json.loads((KEPT / "precision.json").read_text())
    lines = [f"| `--precision` | {' | '.join(PRECISION.values())} |"]
    lines += ["|---" * (len(PRECISION) + 1) + "|"]
    for precision, seeds in kept.items():
        columns = [[seed[key] for seed in seeds] for key in PRECISION]
        cells = [f"{fmean(column):.2g} ± {stdev(column):.1g}" for column in columns]
        lines.append(f"| `{precision}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def keep_precision() -> None:
    """Copy what the table needs from outputs/precision-<precision>-<seed> to assets/demo/."""
    kept: dict[str, list[dict]] = {}
    for folder in sorted((ROOT / "outputs").glob("precision-*-[0-9]")):
        lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
        last = [line for line in lines if line["step"] > len(lines) - WINDOW]
        row = {key: fmean(x[key] for x in last if key in x) for key in PRECISION}
        kept.setdefault(folder.name.split("-")[1], []).append(row)
    if kept:
        (KEPT / "precision.json").write_text(json.dumps(kept, indent=1) + "\n")


def flag_table() -> str:
    """Every flag of grpo.py, with the values of both recipes."""
    lines = ["| flag | toy | paper | what it does |", "|---|---|---|---|"]
    for f in dataclasses.fields(GRPOOptions):
        values = (f.metadata[recipe] for recipe in ("toy", "paper"))
        toy, paper = (f"`{show(v)}`" if v not in (None, []) else "" for v in values)
        text = f.metadata["help"].replace("|", "\\|")
        lines.append(f"| `--{f.name}` | {toy} | {paper} | {text} |")
    return "\n".join(lines)


TABLES = {
    "demo": demo_table,
    "loss types": loss_type_table,
    "roads": roads_table,
    "easy-vqa": easy_vqa_table,
    "precision": precision_table,
    "flags": flag_table,
}


def insert_tables(page: str) -> str:
    """The page with every table between its markers, `<!-- name -->` and `<!-- end -->`."""
    for name, table in TABLES.items():
        block = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        with contextlib.suppress(FileNotFoundError):  # not measured yet
            text = table() + "\n" if block.search(page) else ""
            page = block.sub(lambda found, text=text: found[1] + text + found[2], page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="Do not train")
    if not parser.parse_args().write:
        for seed in SEEDS:
            train(seed)
        if (remade := ROOT / "outputs" / "demo-remade-0").exists():
            keep(remade, KEPT / remade.name)
        keep_roads()
        keep_easy_vqa()
        keep_precision()
    runs = [report.read_run(KEPT / f"demo-{seed}") for seed in SEEDS[:3]]
    report.figure({"grpo": runs}).savefig(ROOT / "assets" / "demo.png", dpi=120)
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        page.write_text(insert_tables(page.read_text()))


if __name__ == "__main__":
    main()
