"""Show a training run, or compare several, as one HTML page that needs no network.

    python report.py outputs/grpo-toy                    # writes report.html
    python report.py outputs/a outputs/b --out ab.html   # overlays the curves of two runs
    python report.py outputs/grpo-toy --png report.png   # also writes a picture

Runs that differ only in their seed become one curve: their mean, in a band of one standard
deviation. A run may still be training. `assets/report.html` draws the page. It inserts what a run
contains as text, never as HTML.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from core.options import UserError
from rewards import REFLECTION_PHRASES

MAX_POINTS = 1_000  # per curve
SHOWN_STEPS = 40  # per split
SHOWN_GROUPS = {"eval": 12, "train": 2}  # per step
REFLECTION = re.compile(rf"\b(?:{'|'.join(REFLECTION_PHRASES)})(?!\w)", re.IGNORECASE)

# Runs that differ only in these settings are averaged.
NOT_COMPARED = set("seed output_dir resume overwrite config log_with log_groups".split())
NOT_COMPARED |= {"save_steps", "save_total_limit"}
# The palette of Okabe and Ito, which colour-blind readers can tell apart
COLOURS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #8b6a3e #7f7f7f".split()
PANELS = (  # title, scale, greedy metric, sampled metric
    ("Accuracy (%)", 100, "eval/accuracy", "rewards/accuracy"),
    ("Response length (tokens)", 1, "eval/completion_length", "completions/mean_length"),
    ("Completions that look again (%)", 100, "eval/reflection", "completions/reflection"),
)


@dataclass
class Run:
    folder: Path
    name: str  # the last two parts of the path
    config: dict[str, str] = field(default_factory=dict)  # values as text
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)  # name -> step -> value
    groups: list[dict] = field(default_factory=list)  # selected lines of rollouts.jsonl


def read_run(folder: str | Path) -> Run:
    """Read the folder of a run. Raises UserError if it holds no metrics."""
    run = Run(Path(folder), "/".join(Path(folder).resolve().parts[-2:]))
    if not (run.folder / "metrics.jsonl").exists():
        raise UserError(f"{folder} has no metrics.jsonl; give the folder of a run")
    for line in json_lines(run.folder / "metrics.jsonl"):
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                run.metrics.setdefault(key, {})[line["step"]] = value
    if not run.metrics:
        raise UserError(f"{folder} has no metrics yet; try again after the first update")
    if (run.folder / "config.json").exists():
        config = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
        run.config = {k: v if isinstance(v, str) else json.dumps(v) for k, v in config.items()}
    if (run.folder / "rollouts.jsonl").exists():
        last_step = max(max(values) for values in run.metrics.values())
        run.groups = read_rollouts(run.folder / "rollouts.jsonl", last_step)
    return run


def json_lines(path: Path) -> Iterator[dict]:
    """Yield the records of a log. Skip lines that are cut. NaN becomes None."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line, parse_constant=lambda name: None)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def read_rollouts(path: Path, last_step: int) -> list[dict]:
    """Select groups of evenly spaced steps in one pass. The first and the last step are kept."""
    first_step: dict[str, int] = {}
    kept: dict[tuple[str, int], list[dict]] = {}
    for group in json_lines(path):
        first = first_step.setdefault(group["split"], group["step"])
        # The first step has a span of its own. In a later span, the last step replaces the others.
        span = math.ceil((group["step"] - first) * SHOWN_STEPS / max(1, last_step - first))
        groups = kept.setdefault((group["split"], span), [])
        if groups and groups[-1]["step"] != group["step"]:
            groups.clear()
        if len(groups) < SHOWN_GROUPS[group["split"]]:
            groups.append(group | {"completions": [split_text(t) for t in group["completions"]]})
    return [group for groups in kept.values() for group in groups]


def split_text(completion: str) -> list[str]:
    """Cut a completion around its first reflection phrase: before, phrase, after."""
    found = REFLECTION.search(completion)
    cuts = [0, *(found.span() if found else ()), len(completion)]
    return [completion[start:end] for start, end in pairwise(cuts)]


def thumbnails(run: Run) -> dict[str, str]:
    """The run's images as small data URIs. An image that cannot be read is left out."""
    uris = {}
    for name in dict.fromkeys(name for group in run.groups for name in group["images"]):
        path = run.folder / "images" / Path(name).name  # never a file of another folder
        with suppress(OSError, ValueError, SyntaxError), Image.open(path, formats=["PNG"]) as image:
            image.thumbnail((256, 256))
            image.convert("RGB").save(buffer := io.BytesIO(), "WEBP", quality=90)
            uris[name] = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return uris


def seed_groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Put runs together that differ only in settings that are not compared."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        compared = sorted(pair for pair in run.config.items() if pair[0] not in NOT_COMPARED)
        groups.setdefault(tuple(compared) or (run.folder,), []).append(run)
    return list(groups.values())


def labels(groups: Sequence[list[Run]]) -> list[str]:
    """Name each group by the settings that set it apart, or by the folder of its first run."""
    configs = [group[0].config for group in groups]
    shared = set.intersection(*map(set, configs)) - NOT_COMPARED
    keys = [key for key in configs[0] if key in shared and len({c[key] for c in configs}) > 1]
    keys.sort(key=lambda key: key != "stage")  # whether it is SFT or GRPO comes first
    names = []
    for group, config in zip(groups, configs, strict=True):
        name = ", ".join(f"{key}={config[key]}" for key in keys[:4]) or group[0].name
        names.append(f"{name} ({len(group)} seeds)" if len(group) > 1 else name)
    return names


def curve(group: Sequence[Run], key: str) -> np.ndarray:
    """Rows: steps, mean and sample std over seeds, and both smoothed. Empty if no run has `key`."""
    curves = [run.metrics[key] for run in group if key in run.metrics]
    if not curves:
        return np.empty((5, 0))
    steps = sorted(set().union(*curves))
    values = np.array([[curve.get(step, np.nan) for step in steps] for curve in curves])
    seeds = (~np.isnan(values)).sum(0)  # that have reached the step; a single one has a std of 0
    mean = np.nanmean(values, 0)
    std = np.sqrt(np.nansum((values - mean) ** 2, 0) / np.maximum(seeds - 1, 1))
    shown = np.unique(np.linspace(0, len(steps) - 1, MAX_POINTS).astype(int))
    return np.stack([steps, mean, std, smooth(mean), smooth(std)])[:, shown].round(10)


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average over a thirtieth of the curve, shorter at its ends."""
    window = np.ones(2 * (len(values) // 60) + 1)
    return np.convolve(values, window, "same") / np.convolve(values * 0 + 1, window, "same")


def figure(groups: Sequence[list[Run]], names: Sequence[str] | None = None) -> Figure:
    """Draw accuracy, length and looking again. `names` replaces the labels of the groups."""
    several = len(groups) > 1
    kinds = (
        {"label": "greedy, on held-out questions", "marker": "o", "markersize": 4},
        {"label": "sampled, in training", "linestyle": "--" if several else "-"},
    )
    with matplotlib.rc_context({"font.size": 11, "text.parse_math": False}):
        picture = Figure((12, 4), layout="constrained")
        for ax, (title, scale, *keys) in zip(picture.subplots(1, 3), PANELS, strict=True):
            for g, group in enumerate(groups):
                for k, key in enumerate(keys):
                    steps, mean, std = curve(group, key)[[0, 3, 4]] * [[1], [scale], [scale]]
                    colour = COLOURS[(g if several else k) % len(COLOURS)]
                    ax.plot(steps, mean, color=colour, linewidth=2, **kinds[k])
                    ax.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.2, lw=0)
            ax.set(title=title, xlabel="update", ylim=(0, 102 if scale == 100 else None))
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(alpha=0.3)
        ink = ["black"] * 2 if several else COLOURS[:2]
        lines = [Line2D([], [], color=c, **kind) for c, kind in zip(ink, kinds, strict=True)]
        if several:
            named = zip(cycle(COLOURS), names or labels(groups), strict=False)
            lines += [Line2D([], [], color=colour, lw=5, label=name) for colour, name in named]
        picture.legend(handles=lines, loc="outside lower left", ncols=3, frameon=False)
    return picture


def page(groups: Sequence[list[Run]]) -> str:
    """Fill the template with data. Each list in `curves` has an entry per group."""
    runs = [run for group in groups for run in group]
    keys = dict.fromkeys(key for run in runs for key in run.metrics)
    data = {
        "curves": {key: [curve(group, key).T.tolist() for group in groups] for key in keys},
        "labels": labels(groups),
        "members": [[run.name for run in group] for group in groups],
        "colours": COLOURS,
        "phrases": REFLECTION_PHRASES,
        "names": [run.name for run in runs],
        "configs": [run.config for run in runs],
        "groups": [run.groups for run in runs],
        "images": [thumbnails(run) for run in runs],
    }
    template = (Path(__file__).parent / "assets/report.html").read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = json.dumps(data).replace("<", "\\u003c")  # "</script>" would end the data
    return template.replace("{{script_hash}}", digest).replace("{{data}}", text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="Page to write")
    parser.add_argument("--png", metavar="FILE", help="Picture to write")
    valid = "valid: RUN [RUN ...] --out --png --help"
    parser.error = lambda message: parser.exit(2, f"report.py: error: {message}; {valid}\n")
    args = parser.parse_args(argv)
    try:
        groups = seed_groups([read_run(folder) for folder in dict.fromkeys(args.runs)])
    except UserError as error:
        sys.exit(f"report.py: error: {error}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(page(groups), encoding="utf-8")
    if args.png:
        figure(groups).savefig(args.png, format="png", dpi=150, metadata={"Software": None})
    print("wrote", *filter(None, [args.out, args.png]))


if __name__ == "__main__":
    main()
