"""Show a training run, or compare several, as one HTML page that needs no network.

    python report.py outputs/grpo-toy                    # writes report.html
    python report.py outputs/a outputs/b --out ab.html   # overlays the curves of two runs
    python report.py outputs/grpo-toy --png report.png   # also writes a picture

A run may still be training. This file puts the data of the runs into `assets/report.html`, whose
script does all the rest. It inserts what a run contains as text, never as HTML.
"""

import argparse
import base64
import hashlib
import io
import json
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from core.errors import UserError
from rewards import REFLECTION_PHRASES

MAX_STEPS = {"metrics.jsonl": 2_000, "rollouts.jsonl": 40}  # in the page
# The palette of Okabe and Ito, which colour-blind readers can tell apart
COLOURS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #8b6a3e #7f7f7f".split()
PANELS = (  # title, scale, greedy metric, sampled metric
    ("Accuracy (%)", 100, "eval/accuracy", "rewards/accuracy"),
    ("Response length (tokens)", 1, "eval/completion_length", "completions/mean_length"),
    ("Completions that look again (%)", 100, "eval/reflection", "completions/reflection"),
)
KINDS = {"greedy, on held-out questions": "o-", "sampled, in training": "-"}  # and their style


def read_run(folder: str | Path) -> dict:
    """Read a run's name, config, metrics (name -> step -> value), rollouts and images.

    Raises UserError if the folder holds no metrics.
    """
    folder, metrics = Path(folder), {}
    for line in read_log(folder / "metrics.jsonl"):
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                metrics.setdefault(key, {})[line["step"]] = value
    if not metrics:
        raise UserError(f"{folder} has no metrics.jsonl or no metrics yet; is it a run's folder?")
    config, rollouts = folder / "config.json", read_log(folder / "rollouts.jsonl")
    return {
        "name": "/".join(folder.resolve().parts[-2:]),
        "config": json.loads(config.read_text(encoding="utf-8")) if config.exists() else {},
        "metrics": metrics,
        "rollouts": rollouts,
        "images": thumbnails(folder, [name for group in rollouts for name in group["images"]]),
    }


def read_log(path: Path) -> list[dict]:
    """The records of a log, thinned. A line that is cut is skipped. NaN becomes None."""
    lines = []
    for line in path.open(encoding="utf-8", errors="replace") if path.exists() else ():
        with suppress(ValueError):
            lines.append(json.loads(line, parse_constant=lambda name: None))
    lines = [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
    return thin(lines, MAX_STEPS[path.name])


def thin(lines: list[dict], most: int) -> list[dict]:
    """Keep every n-th step and the last. Held-out and training lines are thinned apart."""
    kept = []
    for held_out in (True, False):
        part = [x for x in lines if held_out == (x.get("split") == "eval" or "eval/accuracy" in x)]
        steps = list(dict.fromkeys(line["step"] for line in part))
        # a power of two, so that runs of different lengths have steps in common
        shown = {*steps[:: 1 << ((len(steps) - 1) // most).bit_length()], *steps[-1:]}
        kept += [line for line in part if line["step"] in shown]
    return sorted(kept, key=lambda line: line["step"])


def thumbnails(folder: Path, names: list[str]) -> dict[str, str]:
    """Small images as data URIs, by name. An image that cannot be read is left out."""
    uris = {}
    for name in dict.fromkeys(names):
        path = folder / "images" / Path(name).name  # never a file of another folder
        with suppress(OSError, ValueError, SyntaxError), Image.open(path, formats=["PNG"]) as image:
            image.thumbnail((256, 256))
            image.convert("RGB").save(buffer := io.BytesIO(), "WEBP", quality=90)
            uris[name] = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return uris


def page(runs: list[dict]) -> str:
    """The template, filled with the runs' data."""
    template = (Path(__file__).parent / "assets/report.html").read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps({"runs": runs, "colours": COLOURS, "phrases": REFLECTION_PHRASES})
    data = data.replace("<", "\\u003c")  # "</script>" would end the data
    return template.replace("{{script_hash}}", digest).replace("{{data}}", data)


def figure(groups: dict[str, list[dict]]) -> Figure:
    """Draw PANELS: a line per run, and a colour per named group. One group is not named."""
    lines, several = {}, len(groups) > 1  # lines: what the legend shows
    with matplotlib.rc_context({"font.size": 11, "text.parse_math": False}):
        picture = Figure((12, 4), layout="constrained")
        for ax, (title, scale, *keys) in zip(picture.subplots(1, 3), PANELS, strict=True):
            for (g, name), (k, kind) in product(enumerate(groups), enumerate(KINDS)):
                colour = COLOURS[(g if several else k) % len(COLOURS)]
                for curve in [run["metrics"].get(keys[k], {}) for run in groups[name]]:
                    values, reach = list(curve.values()), len(curve) // 60
                    near = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
                    means = [scale * fmean(window) for window in near]
                    (line,) = ax.plot(list(curve), means, KINDS[kind], color=colour, markersize=4)
                    lines.setdefault(name if several else kind, line)
            ax.set(title=title, xlabel="update", ylim=(0, 102 if scale == 100 else None))
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(alpha=0.3)
        dots = "with dots: {}; without: {}".format(*KINDS) if several else None
        place = {"loc": "outside lower left", "ncols": 3, "alignment": "left", "frameon": False}
        picture.legend(lines.values(), lines, title=dots, **place)
    return picture


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="Page to write")
    parser.add_argument("--png", metavar="FILE", help="Picture to write")
    valid = "valid: RUN [RUN ...] --out --png --help"
    parser.error = lambda message: parser.exit(2, f"report.py: error: {message}; {valid}\n")
    args = parser.parse_args(argv)
    try:
        runs = {folder: read_run(folder) for folder in args.runs}
    except UserError as error:
        sys.exit(f"report.py: error: {error}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(page([*runs.values()]), encoding="utf-8")
    if args.png:
        picture = figure({folder: [run] for folder, run in runs.items()})
        picture.savefig(args.png, format="png", dpi=150, metadata={"Software": None})
    print("wrote", *filter(None, [args.out, args.png]))


if __name__ == "__main__":
    main()
