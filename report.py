"""See a run, or compare several: one HTML page that needs no network, and the README's picture.

    python report.py outputs/grpo-toy                    # writes report.html
    python report.py outputs/a outputs/b --out ab.html   # overlaid, with what they differ in
    python report.py outputs/grpo-toy --png report.png   # and a picture

Runs that differ only in their seed become one line: mean and standard deviation. A run still going
is read as far as it has come. The page stays small whatever the run's size: it holds an evenly
spaced selection. What a model wrote is only ever shown as text. Layout, charts and captions stand
in `assets/report.html`; this file reads, draws and fills it in.
"""

import argparse
import base64
import functools
import hashlib
import html
import io
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from rewards import REFLECTION_PHRASES

TEMPLATE = (Path(__file__).parent / "assets" / "report.html").read_text(encoding="utf-8")
CHART = re.compile(r"\{\{chart: ([^|]+?) *\| *(\S*) *\| *([^}]+)\}\}")  # title, unit, metrics
PHRASE = re.compile(rf"\b(?:{'|'.join(REFLECTION_PHRASES)})(?!\w)", re.IGNORECASE)

POINTS = 500  # of a curve
STEPS, EVAL_GROUPS, TRAIN_GROUPS = 40, 12, 2  # shown: steps of a split, groups of a step
EXAMPLES, MAX_TEXT, IMAGE_SIDE = 12, 4_000, 256  # of reflection; characters; pixels

# Settings that change nothing that is learned, and the seed, over which runs are averaged
NOT_COMPARED = "seed output_dir resume overwrite log_with save_steps save_total_limit log_groups"

COLOURS = "#3b7dd8 #e07b2a #2fa36b #c2559d #8a6fd1 #b58a1b #229aa8 #d04f4f".split()
DASHES = ["-", (0, (3, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1))]
INK = "#000000"  # becomes currentColor in the page, so that a chart follows the theme
STYLE = {
    "font.size": 9, "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "report",
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "legend.frameon": False,
    "axes.titlelocation": "left", "axes.titleweight": "bold",
}  # fmt: skip

NAMES = {"eval": "held-out", "train": "training"}  # of the splits
Series = tuple[np.ndarray, np.ndarray]  # steps, values


@dataclass
class RunData:
    """What the page needs to know of one run; its size does not depend on the run's."""

    folder: Path
    name: str
    config: dict[str, str] = field(default_factory=dict)  # flat, values as text
    series: dict[str, Series] = field(default_factory=dict)
    groups: list[dict] = field(default_factory=list)  # the selection of rollouts.jsonl
    examples: list[dict] = field(default_factory=list)  # completions that reflect

    @property
    def last_step(self) -> int:
        return max((int(steps[-1]) for steps, _ in self.series.values()), default=0)


# --- what others wrote ---------------------------------------------------------------------------

# control and direction-changing characters, invisible ones, halves of surrogate pairs
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text) -> str:
    """Text with its control characters spelled out: ⟨U+202E⟩ for one that turns a line round."""
    return HIDDEN.sub(lambda c: f"⟨U+{ord(c[0]):04X}⟩", str(text).replace("\r\n", "\n"))


def shown(text, limit: int = MAX_TEXT) -> str:
    """`visible(text)`; of a long text its beginning, its end, and how much was left out."""
    text = "" if text is None else str(text)
    if len(text) <= limit and len(visible(text)) <= 2 * limit:
        return visible(text)
    head, tail = limit * 3 // 4, limit // 4
    note = f"\n[… {max(0, len(text) - head - tail):,} characters left out …]\n"
    return visible(text[:head])[:head] + note + visible(text[-tail:])[-tail:]


def number(value) -> float | None:
    """A finite float, or None: a file may hold anything."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e100 else None


def listed(value) -> list:
    return value if isinstance(value, list) else []


@functools.cache
def thumbnail(folder: Path, name: str) -> str | None:
    """A run's image as a small data URI; None where it is missing, broken or outside the folder."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            return None
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            kind = "png" if max(image.size) <= 128 else "jpeg"
            image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
            image.convert("RGB").save(buffer := io.BytesIO(), kind, quality=80)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- reading a run -------------------------------------------------------------------------------


def json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(offset, object) of each whole line with a step; the last line may be half written."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield offset, record
            offset += len(line)


def evenly(items: Sequence, n: int) -> list:
    """At most n of the items, evenly spaced, the first and the last among them."""
    n = min(n, len(items))
    return [items[round(i * (len(items) - 1) / max(1, n - 1))] for i in range(n)]


def read_run(folder, sharing: int = 1) -> RunData:
    """The run in `folder`, for a page that shows `sharing` runs.

    Raises ValueError when there is no run in the folder, or no metrics yet.
    """
    run = RunData(Path(folder), visible(Path(folder).resolve().name))
    metrics, rollouts = run.folder / "metrics.jsonl", run.folder / "rollouts.jsonl"
    by_step: dict[int, dict[str, float]] = {}
    for _, line in json_lines(metrics) if metrics.exists() else ():
        values = {key: number(value) for key, value in line.items() if key != "step"}
        row = by_step.setdefault(line["step"], {})  # of two lines the later wins: a resumed run
        row |= {key: value for key, value in values.items() if value is not None}
    if not any(by_step.values()):
        if metrics.exists() or (run.folder / "config.json").exists():
            raise ValueError(f"{folder} has no metrics yet; try again after the first update")
        inside = " ".join(str(path.parent) for path in sorted(run.folder.glob("*/metrics.jsonl")))
        hint = f"there are runs inside: {inside}" if inside else "name a run's folder"
        raise ValueError(f"there is no run in {folder} (no metrics.jsonl); {hint}")
    for key in dict.fromkeys(key for row in by_step.values() for key in row):
        steps = sorted(step for step, row in by_step.items() if key in row)
        run.series[key] = np.array(steps), np.array([by_step[step][key] for step in steps])
    try:
        config = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
        for key, value in config.items():
            for name, v in (value if isinstance(value, dict) else {"": value}).items():
                text = v if isinstance(v, str) else json.dumps(v)
                run.config[shown(f"{key}.{name}".rstrip("."), 100)] = shown(text, 400)
    except (OSError, ValueError, AttributeError):
        run.config = {}  # the curves can be shown without it
    if rollouts.exists():
        read_rollouts(run, rollouts, sharing)
    return run


def read_rollouts(run: RunData, path: Path, sharing: int) -> None:
    """One pass over the file for an index; then only the groups that count are read again."""
    index: dict[str, dict[int, list[int]]] = {"eval": {}, "train": {}}  # split, step -> offsets
    for offset, group in json_lines(path):
        if isinstance(group.get("completions"), list):
            of_split = index["eval" if group.get("split") == "eval" else "train"]
            of_split.setdefault(group["step"], []).append(offset)

    examples = []
    with open(path, "rb") as file:

        def group_at(offset: int) -> dict:
            file.seek(offset)
            return json.loads(file.readline())

        for split, offsets in index.items():
            steps, shares = evenly(sorted(offsets), POINTS), []
            for step in steps:
                groups = [group_at(offset) for offset in offsets[step]]
                texts = [(str(text), group) for group in groups for text in group["completions"]]
                reflecting = [pair for pair in texts if PHRASE.search(pair[0][:20_000])]
                shares.append(len(reflecting) / max(1, len(texts)))
                examples += [example(text, group) for text, group in reflecting[:1]]
            if steps:
                run.series[f"reflection/{NAMES[split]}"] = np.array(steps), np.array(shares)
            for step in evenly(steps, max(3, STEPS // sharing)):
                some = offsets[step][: EVAL_GROUPS if split == "eval" else TRAIN_GROUPS]
                run.groups += [page_group(group_at(o) | {"split": split}) for o in some]
    run.examples = evenly(examples, max(3, EXAMPLES // sharing))


def score(group: dict, i: int) -> dict:
    """Of a group's completion i: rewards by function, their sum, the advantage, right or not."""

    def value(column) -> float | None:
        v = number(column[i]) if i < len(listed(column)) else None
        return None if v is None else round(v, 4)

    rewards = group.get("rewards") if isinstance(group.get("rewards"), dict) else {}
    rewards = {shown(name, 60): value(column) for name, column in rewards.items()}
    total = sum(filter(None, rewards.values()))
    right = (rewards.get("accuracy", total) or 0) > 0.5
    return dict(rewards=rewards, total=total, advantage=value(group.get("advantages")), right=right)


def page_group(group: dict) -> dict:
    """A line of rollouts.jsonl as the page shows it; nothing in it is trusted."""
    lengths = {"id": 100, "task": 60, "question": 1500, "answer": 1500, "prompt": 1500}
    texts = enumerate(group["completions"])
    return {
        **{name: shown(group.get(name), length) for name, length in lengths.items()},
        **{name: group[name] for name in ("split", "step")},
        "options": [shown(option, 200) for option in listed(group.get("options"))[:26]],
        "images": [str(name) for name in listed(group.get("images"))[:4]],
        "answers": [{"text": shown(text)} | score(group, i) for i, text in texts],
    }


def example(text: str, group: dict) -> dict:
    """A completion that reflects: what stands before the phrase, the phrase, what follows."""
    start, end = PHRASE.search(text).span()
    before, after = text[max(0, start - 500) : start], text[end : end + 500]
    before, after = "…" * (start > 500) + before, after + "…" * (len(text) > end + 500)
    parts = [visible(part) for part in (before, text[start:end], after)]
    return {"step": group["step"], "question": shown(group.get("question"), 400), "parts": parts}


# --- comparing runs ------------------------------------------------------------------------------


def config_diff(runs: Sequence[RunData]) -> dict[str, list[str | None]]:
    """Settings in which the runs differ: the value of each run, None where it does not have it."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def seed_groups(runs: Sequence[RunData]) -> list[list[RunData]]:
    """Runs that differ in nothing but the seed (and in where they write) stand together."""
    groups: dict[tuple, list[RunData]] = {}
    for run in runs:
        compared = [(k, v) for k, v in run.config.items() if k not in NOT_COMPARED.split()]
        groups.setdefault(tuple(sorted(compared)) or (run.folder,), []).append(run)
    return list(groups.values())


def labels(groups: Sequence[list[RunData]]) -> list[str]:
    """Of each group the settings that set it apart from the others, and how many seeds it has."""
    diff = config_diff([group[0] for group in groups])
    keys = [k for k, v in diff.items() if k not in NOT_COMPARED.split() and len({*v} - {None}) > 1]
    texts = []
    for g, group in enumerate(groups):
        settings = [f"{key}={diff[key][g]}" for key in keys if diff[key][g] is not None]
        name = ", ".join(settings[:4] + ["…"] * (len(settings) > 4)) or group[0].name
        texts.append(name + f" ({len(group)} seeds)" * (len(group) > 1))
    return texts


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over a thirtieth of the curve; shorter windows at its ends."""
    window = np.ones(max(1, len(values) // 30))
    return np.convolve(values, window, "same") / np.convolve(values * 0 + 1, window, "same")


def mean_and_std(series: Sequence[Series], last_step: int) -> np.ndarray:
    """Curves of several seeds as one: rows of steps, mean and sample standard deviation.

    Each curve is averaged over equal spans of steps first, so that at most `POINTS` are left. A
    seed counts wherever it has values; where there is one only, the deviation is 0.
    """
    bins = min(POINTS, last_step + 1)
    x = (np.arange(bins) + 0.5) * (last_step + 1) / bins - 0.5
    y = np.full((len(series), bins), np.nan)
    for row, (steps, values) in zip(y, series, strict=True):
        span = steps * bins // (last_step + 1)
        n = np.bincount(span, minlength=bins)
        row[n > 0] = np.bincount(span, values, bins)[n > 0] / n[n > 0]
    seeds = (~np.isnan(y)).sum(0)
    x, y, seeds = x[seeds > 0], y[:, seeds > 0], seeds[seeds > 0]
    mean = np.nanmean(y, 0)
    std = np.sqrt(np.nansum((y - mean) ** 2, 0) / np.maximum(seeds - 1, 1))
    return np.stack([x, mean, std])


# --- drawing -------------------------------------------------------------------------------------


def present(groups: Sequence[list[RunData]], patterns: str) -> list[str]:
    """The metrics of these runs that the patterns name, in the patterns' order."""
    keys = dict.fromkeys(key for group in groups for run in group for key in run.series)
    own = ("eval/accuracy", "eval/completion_length")  # not meant by eval/*
    named = {p: [k for k in keys if fnmatchcase(k, p) and k not in own] for p in patterns.split()}
    return [key for p in named for key in ([p] if p in keys else named[p])]


def draw(ax, groups: list[list[RunData]], title: str, unit: str, keys: Sequence[str]) -> None:
    """A chart: one run has a colour per metric; several have one each, and dashes per metric."""
    several = len(groups) > 1
    last = max(run.last_step for group in groups for run in group)
    looks = [(None, DASHES[k % 4]) if several else (COLOURS[k % 8], "-") for k in range(len(keys))]
    for g, group in enumerate(groups):
        for key, (colour, dash) in zip(keys, looks, strict=True):
            series = [run.series[key] for run in group if key in run.series]
            if not series:
                continue
            look = {"color": colour or COLOURS[g % 8]}
            x, mean, std = mean_and_std([(steps, smooth(y)) for steps, y in series], last)
            marker = "o" if len(x) <= 40 else None
            ax.plot(x, mean, ls=dash, marker=marker, ms=3.5, lw=1.8, **look)
            if len(series) > 1:
                ax.fill_between(x, mean - std, mean + std, alpha=0.18, lw=0, **look)
            elif not several:
                ax.plot(*mean_and_std(series, last)[:2], alpha=0.25, lw=0.8, zorder=1, **look)
    values = np.concatenate([line.get_ydata() for line in ax.lines])
    ax.set_title(title)
    ax.set_xlim(0, max(1, last))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if values.min() >= 0:
        ax.set_ylim(0, 1.02 if "eval/accuracy" in keys else values.max() * 1.1 or 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1) if unit == "%" else "{x:g}")
    if len(keys) > 1:
        lines = [Line2D([], [], color=colour or INK, ls=dash) for colour, dash in looks]
        ax.legend(lines, map(visible, keys), handlelength=1.8)


def svg(groups: list[list[RunData]], title: str, unit: str, keys: Sequence[str]) -> str:
    """A chart as inline SVG: its ids are its own, its ink is the page's."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((4.6, 2.7), layout="constrained")
        draw(figure.subplots(), groups, title, unit, keys)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file := io.StringIO(), format="svg", transparent=True, metadata=nothing)
    text = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", file.getvalue(), flags=re.S)
    ident = re.sub(r"\W", "-", title)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{ident}-", text).replace(INK, "currentColor")
    box, content = re.search(r'<svg .*?(viewBox="[^"]*").*?>(.*)', text, re.S).groups()
    return f'<svg {box} role="img" aria-label="{html.escape(title)}">{content}'


def png(runs: Sequence, out) -> None:
    """The first charts (accuracy, length, reward) of runs, or of their folders, as a picture."""
    groups = seed_groups([run if isinstance(run, RunData) else read_run(run) for run in runs])
    charts = [(title, unit, present(groups, keys)) for title, unit, keys in CHART.findall(TEMPLATE)]
    charts = [chart for chart in charts if chart[2]][:3]
    if not charts:
        raise ValueError("the run's metrics hold nothing to draw in a picture")
    with matplotlib.rc_context(STYLE | {"font.size": 11}):
        figure = Figure((12, 4.3), layout="constrained", facecolor="white")
        for i, chart in enumerate(charts, start=1):
            draw(ax := figure.add_subplot(1, len(charts), i), groups, *chart)
            ax.set_xlabel("update")
        if len(groups) > 1:
            lines = [Line2D([], [], color=COLOURS[g % 8]) for g in range(len(groups))]
            names = [visible(label) for label in labels(groups)]
            columns = max(1, 150 // max(map(len, names)))
            figure.legend(lines, names, loc="outside lower left", ncols=columns)
        figure.savefig(out, format="png", dpi=150, metadata={"Software": None})


# --- the page ------------------------------------------------------------------------------------


def summary(group: list[RunData], label: str) -> list[str]:
    """A row of the page's first table: last accuracy and length, ± std over seeds."""
    cells = [label, ", ".join(run.name for run in group), str(group[0].last_step)]
    for key in ("eval/accuracy", "eval/completion_length"):
        last = [run.series[key][1][-1] for run in group if key in run.series]
        spread = f" ± {np.std(last, ddof=1):.2g}" if len(last) > 1 else ""
        cells.append(f"{np.mean(last):.3g}{spread}" if last else "–")
    return cells


def page_data(groups: list[list[RunData]]) -> dict:
    """What the page's script needs; it inserts texts as text."""
    runs = [run for group in groups for run in group]
    images, logged = {}, []
    for r, run in enumerate(runs):
        for group in run.groups:
            uris = [thumbnail(run.folder, name) for name in group["images"]]
            places = [images.setdefault(uri, len(images)) if uri else None for uri in uris]
            logged.append(group | {"run": r, "images": places})
    keys, diff = dict.fromkeys(key for run in runs for key in run.config), config_diff(runs)
    return {
        "runs": [run.name for run in runs],
        "colours": [COLOURS[g % 8] for g in range(len(groups))],
        "summary": [summary(*pair) for pair in zip(groups, labels(groups), strict=True)],
        "settings": [[key, [run.config.get(key) for run in runs], key in diff] for key in keys],
        "examples": [example | {"run": run.name} for run in runs for example in run.examples],
        "images": list(images),
        "groups": logged,
    }


def page(runs: Sequence[RunData]) -> str:
    """The whole page as text."""
    groups = seed_groups(runs)
    data = json.dumps(page_data(groups), ensure_ascii=False, allow_nan=False)
    script = re.search(r"<script>(.*?)</script>", TEMPLATE, re.DOTALL)[1]
    values = {
        "{{title}}": html.escape(", ".join(labels(groups))[:120]),
        "{{phrases}}": html.escape("   ".join(REFLECTION_PHRASES)),
        # the three that HTML looks for inside a script element: </script, <!-- and <script
        "{{data}}": re.sub("<(?=[/!s])", r"\\u003c", data, flags=re.IGNORECASE),
        "{{script_hash}}": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    others = present(groups, "*")
    for found in CHART.finditer(TEMPLATE):
        keys = present(groups, found[3])
        values[found[0]] = svg(groups, found[1], found[2], keys) if keys else ""
        others = [key for key in others if key not in keys]
    others = [f"<figure>{svg(groups, visible(key), '', [key])}</figure>" for key in others]
    values["{{other_charts}}"] = "\n".join(others)
    return re.sub(r"\{\{.+?\}\}", lambda found: values[found[0]], TEMPLATE)


# --- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page to write")
    parser.add_argument("--png", metavar="FILE", help="also write a picture of the main curves")
    valid = "valid: RUN [RUN …] --out --png --help"
    parser.error = lambda message: parser.exit(2, f"report.py: error: {message}; {valid}\n")
    args = parser.parse_args(argv)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        folders = {Path(folder).resolve(): folder for folder in args.runs}.values()
        runs = [read_run(folder, len(folders)) for folder in folders]
        Path(args.out).write_text(page(runs), encoding="utf-8", newline="\n")
        print(f"wrote {args.out}")
        if args.png:
            png(runs, args.png)
            print(f"wrote {args.png}")
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
