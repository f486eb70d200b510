"""What a run writes down: config.json, metrics.jsonl, rollouts.jsonl, images, trackers, and a bar.

Only rank 0 writes.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from core.checkpoint import list_checkpoints, remove
from core.options import TrainingOptions
from core.prompts import Prompts
from core.qwen import count_parameters

ROOT = Path(__file__).parent.parent
STUCK = "accuracy stays near 0 while format rises: see docs/grpo.md, 'Why is my accuracy near 0'"


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step, so that a crash leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.new")
    partial.write_text(text)
    os.replace(partial, path)


def read_lines(path: Path) -> list[dict]:
    """The lines of a log, without one that was cut short."""
    lines = []
    for line in path.open() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


class Logs:
    """The files of a run's folder.

    Opening them writes config.json and removes what a killed process left, what `--overwrite`
    deletes, and, on resuming, the lines after the checkpoint.
    """

    def __init__(
        self,
        options: TrainingOptions,
        accelerator: Accelerator,
        model: torch.nn.Module,
        prompts: Prompts,
        start_step: int,
    ):
        self.folder, self.accelerator = Path(options.output_dir), accelerator
        self.main, self.start_step = accelerator.is_main_process, start_step
        config = describe_run(options, accelerator, model, prompts)
        self.recent, self.warned = [], False  # see `is_stuck`
        self.best = (-1.0, 0)  # held-out accuracy, update
        accelerator.wait_for_everyone()  # every process has looked at the folder
        if self.main:
            self.open_folder(config)
            announce(config, model)
        self.best = broadcast_object_list([self.best])[0]
        if options.log_with:
            flat = {name: str(value) for name, value in config.items()}
            here = {"wandb": {"dir": str(self.folder)}}  # the others read project_dir
            accelerator.init_trackers(self.folder.name, config=flat, init_kwargs=here)
        bar = dict(total=options.max_steps, initial=start_step, disable=not self.main)
        self.bar = tqdm(unit="update", **bar)

    def open_folder(self, config: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        doomed = [*self.folder.glob(".*.partial")]
        if config["overwrite"] and not config["resume"]:
            doomed += list_checkpoints(self.folder)
            doomed += [self.folder / name for name in ("final", "best", "images")]
            for events in self.folder.rglob("events.out.tfevents*"):  # of tensorboard
                events.unlink()
        for metrics in read_lines(self.folder / "metrics.jsonl"):
            self.note_best(metrics)
        if self.best[1] > self.start_step:  # best/ is of updates that are repeated
            doomed, self.best = [*doomed, self.folder / "best"], (-1.0, 0)
        for path in filter(Path.exists, doomed):
            remove(path)
        write_whole(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        for path in (self.folder / "metrics.jsonl", self.folder / "rollouts.jsonl"):
            kept = read_lines(path) if self.start_step else []
            kept = [json.dumps(line) + "\n" for line in kept if line["step"] <= self.start_step]
            write_whole(path, "".join(kept))

    def metrics(self, metrics: dict) -> None:
        """Append one update's metrics, already averaged over all processes."""
        numbers = {name: value for name, value in metrics.items() if math.isfinite(value)}
        metrics = dict.fromkeys(metrics) | numbers  # JSON has no infinity and no NaN
        if self.main:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\n")
        self.accelerator.log(numbers, step=metrics["step"])  # to the trackers
        names = ("loss", "reward", "rewards/accuracy", "completions/mean_length")
        shown = {name: f"{numbers[name]:.3g}" for name in names if name in numbers}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(metrics["step"] - self.bar.n)
        self.recent = [*self.recent, metrics][-20:]
        if self.main and not self.warned and is_stuck(self.recent):
            self.warned = True
            self.bar.write(STUCK)

    def rollouts(self, records: list[dict], step: int, split: str = "train") -> None:
        """Append sampled groups.

        Each record has a `prompt` (core.qwen.Prompt), `completions`, `rewards` and perhaps more.
        Images are written once and referred to by file name.
        """
        if not self.main:
            return
        (self.folder / "images").mkdir(exist_ok=True)
        with open(self.folder / "rollouts.jsonl", "a") as file:
            for record in records:
                row = record["prompt"].row
                line = dict(step=step, split=split, images=save_images(self.folder, row, split))
                line |= {k: row[k] for k in ("id", "task", "question", "options", "answer")}
                line |= record | {"prompt": record["prompt"].text}
                file.write(json.dumps(line) + "\n")

    def note_best(self, metrics: dict) -> bool:
        """Remember this update, and return True, if its held-out accuracy is the highest so far."""
        accuracy = metrics.get("eval/accuracy")
        if not metrics["step"] or accuracy is None or accuracy <= self.best[0]:
            return False
        self.best = (accuracy, metrics["step"])
        return True

    def say_stopped(self, step: int) -> None:
        self.close()
        if self.main:
            again = f"{Path(sys.argv[0]).name} --resume --output_dir {self.folder}"
            print(f"stopped after update {step}; {again} continues from checkpoint-{step}")

    def conclude(self, skipped: str | None) -> None:
        self.close()
        if self.main:
            print_summary(self.folder, self.best)
            print("\n".join(filter(None, [skipped, f"saved in {self.folder}"])), flush=True)

    def close(self) -> None:
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()  # not end_training, which also destroys the process group


def save_images(folder: Path, row: dict, split: str) -> list[str]:
    names = []
    for number, image in enumerate(row["images"]):
        # by its place in the data, as ids may repeat
        names.append(f"images/{split}-{row['place']}-{number}.png")
        if not (folder / names[-1]).exists():
            small = image.copy()
            small.thumbnail((448, 448))
            small.save(folder / names[-1])
    return names


def print_summary(folder: Path, best: tuple[float, int]) -> None:
    """What was learned: before and after, the same three questions, the best update."""
    scores = [m for m in read_lines(folder / "metrics.jsonl") if "eval/accuracy" in m]
    for when, m in zip(("before", "after"), (scores[:1] + scores[-1:]), strict=False):
        print(
            f"{when:>6}: held-out accuracy {m['eval/accuracy']:.3f}, "
            f"mean completion length {m['eval/completion_length']:.1f} tokens"
        )
    answers = {}  # to each held-out question, by update
    for line in read_lines(folder / "rollouts.jsonl"):
        if line["split"] == "eval":
            answers.setdefault((line["question"], *line["images"]), []).append(line)
    for lines in list(answers.values())[:3]:
        options = f"({' | '.join(lines[0]['options'])})" if lines[0]["options"] else ""
        print(f"\n{lines[0]['question']} {options}  [right: {lines[0]['answer']}]")
        for when, line in zip(("before", "after"), (lines[0], lines[-1]), strict=True):
            print(f"  {when:>6}: {line['completions'][0]}")
    if scores:
        print(f"\nbest held-out accuracy {best[0]:.3f} after update {best[1]}: best/")


def is_stuck(recent: Sequence[dict]) -> bool:
    """Whether the last 20 updates had the right format, but hardly a right answer."""
    accuracy = fmean(m.get("rewards/accuracy", 1.0) for m in recent)
    form = fmean(m.get("rewards/format", 0.0) for m in recent)
    return len(recent) == 20 and accuracy < 0.02 and form > 0.5


def describe_run(options, accelerator, model, prompts) -> dict:
    """config.json: every option as resolved, and the facts that explain the numbers."""
    libraries = {lib.__name__: lib.__version__ for lib in (torch, transformers, accelerate)}
    return dataclasses.asdict(options) | {
        "stage": Path(sys.argv[0]).stem,
        "recipe_reason": options.recipe_reason,
        "style_used": prompts.style,
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "source": source_hash(getattr(options, "rewards", [])),
        "model_commit": getattr(model, "hub_commit", None),
        "data_commit": getattr(prompts.rows, "commit", None),
        "versions": {"python": platform.python_version()} | libraries,
    }


def source_hash(rewards: list[str]) -> str:
    """A hash of the code that trains, the user's own rewards included.

    It tells runs before and after an edit apart.
    """
    code = {path for folder in (ROOT, ROOT / "core", ROOT / "toy") for path in folder.glob("*.py")}
    code = sorted(code - {ROOT / "report.py", ROOT / "eval_cvbench.py"})
    code += [Path(name.rpartition(":")[0]) for name in rewards if ":" in name]
    return f"{zlib.crc32(b''.join(path.read_bytes() for path in code)):08x}"


def announce(config: dict, model: torch.nn.Module) -> None:
    """Print the resolved config and what is trained."""
    width = max(map(len, config))
    for name, value in config.items():
        print(f"  {name:<{width}}  {value}")
    if "num_generations" in config:
        completions = config["prompts_per_update"] * config["num_generations"]
        print(f"{completions} completions per update")
    for part, (trainable, frozen) in count_parameters(model).items():
        print(f"{part}: {trainable:,} parameters trained, {frozen:,} frozen")
    print(f"recipe {config['recipe']}: {config['recipe_reason']}", flush=True)


def throughput(about: dict, num_completions: int, began: float, sampled: float) -> dict[str, float]:
    """Seconds of an update's two halves, and its completion tokens per second."""
    ended, tokens = time.perf_counter(), about["completions/mean_length"] * num_completions
    seconds = {"seconds/rollout": sampled - began, "seconds/train": ended - sampled}
    return seconds | {"tokens_per_second": tokens / (ended - began)}
