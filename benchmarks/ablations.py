"""Ablations on the toy world: change one thing about a run and measure what changes.

    python benchmarks/ablations.py                             # the rows, then docs/ablations.md
    python benchmarks/ablations.py --only dapo g-16 --seeds 0
    python benchmarks/ablations.py --write                     # only the page, from kept results

The rows are in benchmarks/ablations.yaml: `grpo.py` with some flags or with a diff of docs/diffs/.
All train at half of the default learning rate, so that every stage takes many updates.
Runs go to outputs/ablations/<row>-<seed>, side by side, one thread each. A finished run is not
repeated. What the page needs is kept in docs/ablations/results.json. After a change of the
defaults, delete the runs, write {} into that file, and measure again.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import report  # noqa: E402
from benchmarks.readme import WINDOW, windows  # noqa: E402
from grpo import GRPOOptions  # noqa: E402

RUNS = ROOT / "outputs" / "ablations"
DOCS = ROOT / "docs"
KEPT = DOCS / "ablations"  # results.json and the pictures
RATE = GRPOOptions.learning_rate / 2
SLOW = f"--learning_rate {RATE:g} --max_steps 280 --warmup_ratio 0.63"
COMMON = f"{SLOW} --eval_steps 100 --save_steps 0 --log_groups 0"
SECTIONS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
ROWS = {name: row for rows in SECTIONS.values() for name, row in rows.items()}
RATES = {"half_rate": RATE / 2, "double_rate": RATE * 2}
COLUMNS = {  # key in results.json -> heading, digits
    "half": ("updates to half looking again", 0),
    "accuracy": ("sampled accuracy", 2),
    "shortest": ("shortest length", 1),
    "shortest_update": ("at update", 0),
    "length": ("final length", 1),
    "again": ("looking again", 2),
    "greedy": ("greedy accuracy", 2),
}


def flags_of(name: str) -> str:
    return ROWS[name].get("flags", "").format(**RATES)


# --- runs ----------------------------------------------------------------------------------------


def train(name: str, seed: int) -> str:
    """Train unless that was done. Returns a line on how it went."""
    out, began = RUNS / f"{name}-{seed}", time.perf_counter()
    if (out / "final").exists():
        return f"{out.name}: kept"
    with tempfile.TemporaryDirectory() as copy:
        argv = [sys.executable, "grpo.py", *COMMON.split(), *flags_of(name).split()]
        argv += ["--seed", str(seed), "--output_dir", str(out), "--overwrite"]
        source = changed_source(name, Path(copy)) if "diff" in ROWS[name] else ROOT
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(argv, cwd=source, env=env, capture_output=True, text=True)
    if done.returncode:
        return f"{out.name}: FAILED\n{done.stderr[-2000:]}"
    return f"{out.name}: {time.perf_counter() - began:.0f} seconds"


def changed_source(name: str, folder: Path) -> Path:
    """Copy what `grpo.py` needs into the folder and apply the row's diff."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for package in ("core", "toy"):
        shutil.copytree(ROOT / package, folder / package)
    diff = DOCS / "diffs" / ROWS[name]["diff"]
    subprocess.run(["git", "apply", str(diff)], cwd=folder, check=True)
    return folder


def measure(folder: Path) -> dict[str, float]:
    """The columns of a finished run. `half` is missing if the run never reached it."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    length = windows(metrics, "completions/mean_length")
    again = windows(metrics, "completions/reflection")
    reached = [i + WINDOW for i, share in enumerate(again) if share >= 0.5]
    return dict(zip(["half"], reached, strict=False)) | {
        "accuracy": windows(metrics, "rewards/accuracy")[-1],
        "shortest": min(length),
        "shortest_update": length.index(min(length)) + WINDOW,
        "length": length[-1],
        "again": again[-1],
        "greedy": metrics[-1]["eval/accuracy"],
        "updates": metrics[-1]["step"],
    }


def finished(name: str) -> dict[str, Path]:
    """The folders of a row's finished runs, by seed."""
    folders = sorted(final.parent for final in RUNS.glob(f"{name}-[0-9]/final"))
    return {folder.name[-1]: folder for folder in folders}


def keep(results: dict) -> dict:
    """Add every finished run to results.json, in the order of the rows, and draw the pictures."""
    for name in ROWS:
        for seed, folder in finished(name).items():
            columns = {key: round(value, 4) for key, value in measure(folder).items()}
            results.setdefault(name, {})[seed] = columns
    results = {name: results[name] for name in ROWS if name in results}
    (KEPT / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for title, rows in SECTIONS.items():
        names = [name for name in dict.fromkeys(["baseline", *rows]) if finished(name)]
        if rows.keys() & names:
            runs = {name: [*map(report.read_run, finished(name).values())] for name in names}
            report.figure(runs).savefig(picture(title), dpi=80, metadata={"Software": None})
    return results


# --- the page ------------------------------------------------------------------------------------


def picture(title: str) -> Path:
    return KEPT / f"{title.lower().replace(' ', '-')}.png"


def values(runs: dict[str, dict], key: str) -> list[float]:
    """A column, by seed. A run that never reached half counts with its number of updates."""
    return [run.get(key, run["updates"]) for run in runs.values()]


def differs(results: dict, name: str) -> list[str]:
    """The columns in which a row is more than two pooled standard deviations from the baseline."""
    rows = results.get(name, {}), results.get("baseline", {})
    if min(map(len, rows)) < 2:
        return []
    columns = []
    for key in COLUMNS:
        a, b = (values(runs, key) for runs in rows)
        pooled = math.sqrt((stdev(a) ** 2 + stdev(b) ** 2) / 2)
        columns += [key] * (abs(fmean(a) - fmean(b)) > 2 * pooled)
    return columns


def cell(runs: dict, key: str) -> str:
    """Mean ± sample standard deviation over the seeds."""
    digits, column = COLUMNS[key][1], values(runs, key)
    spread = f" ± {stdev(column):.{digits}f}" if len(column) > 1 else ""
    reached = sum(key in run for run in runs.values())
    few = f" ({reached} of {len(runs)})" if reached < len(runs) else ""
    return f"{fmean(column):.{digits}f}{spread}{few}" if reached else "never"


def table(results: dict) -> str:
    """One line per measured row. Cells that differ from the baseline are bold."""
    if not results:
        return "No row has been measured yet."
    lines = [f"| row | {' | '.join(heading for heading, _ in COLUMNS.values())} |"]
    lines += ["|---" * (len(COLUMNS) + 1) + "|"]
    for name, runs in results.items():
        cells = [cell(runs, key) for key in COLUMNS]
        apart = differs(results, name)
        cells = [f"**{c}**" if k in apart else c for k, c in zip(COLUMNS, cells, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    count, rows = sum(bool(differs(results, name)) for name in results), len(results) - 1
    lines += ["", f"{count} of {rows} measured rows differ from the baseline."]
    if missing := [name for name in ROWS if name not in results]:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return "\n".join(lines)


def sections(results: dict) -> str:
    """For each measured row: its flags, the columns in which it differs, what one learns."""
    paragraphs = []
    for title, rows in SECTIONS.items():
        measured = [name for name in rows if name in results]
        paragraphs += [f"## {title}"] * bool(measured)
        if measured and picture(title).exists():
            paragraphs.append(f"![{title}](ablations/{picture(title).name})")
        for name in measured:
            command = f"`grpo.py {flags_of(name)}".rstrip() + "`"
            if diff := rows[name].get("diff"):
                command += f" with [{diff}](diffs/{diff})"
            apart = [COLUMNS[key][0] for key in differs(results, name)]
            verdict = f" Differs in: {', '.join(apart)}." if apart else ""
            lesson = f" {rows[name].get('lesson', '')}".rstrip()
            paragraphs.append(f"**{name}**: {command}.{verdict}{lesson}")
    return "\n\n".join(paragraphs)


def insert_results(page: str, results: dict) -> str:
    """The page with the table and the sections between their markers."""
    for name, text in (("rows", table(results)), ("sections", sections(results))):
        before, marker, rest = page.partition(f"<!-- {name} -->\n")
        page = before + marker + text + "\n<!-- end -->" + rest.partition("<!-- end -->")[2]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = [name for name, row in ROWS.items() if not row.get("later")]
    parser.add_argument("--only", nargs="+", choices=ROWS, default=usual, metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, choices=range(10), default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="Runs side by side")
    parser.add_argument("--write", action="store_true", help="Write the page without training")
    options = parser.parse_args()
    results, failed = json.loads((KEPT / "results.json").read_text()), False
    if not options.write:
        jobs = [(name, seed) for seed in options.seeds for name in options.only]
        with ThreadPoolExecutor(options.jobs) as pool:
            for line in pool.map(train, *zip(*jobs, strict=True)):
                print(line, flush=True)
                failed |= "FAILED" in line
        results = keep(results)
    page = DOCS / "ablations.md"
    page.write_text(insert_results(page.read_text(), results))
    sys.exit(failed)


if __name__ == "__main__":
    main()
