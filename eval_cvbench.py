"""Evaluate a model on CV-Bench, its relatives, the toy benchmark or questions of your own.

How this differs from the paper's code:

1. Strict score, as in training: the last `<answer>` tag states the right option and no other.
2. Lenient score: without a tag, the text after `</think>`, or else the whole text, counts if it
   states exactly one option or value. (Upstream searches for letters: "I see a dog and a cat." is
   option A.) Compare this one with the paper's total, which is a mean over all questions.
3. `official` is CV-Bench's own: the mean of 2D (the mean of ADE20K and COCO) and 3D (Omni3D).

Run the same command again to continue. The number of processes does not change a response.

    accelerate launch eval_cvbench.py                                  # toy model, any CPU
    accelerate launch eval_cvbench.py --model outputs/grpo-sat/final   # CV-Bench, one GPU
    accelerate launch --config_file configs/ddp.yaml eval_cvbench.py --model Qwen/Qwen2-VL-2B
    python eval_cvbench.py --rescore outputs/eval-toy-toy/responses.jsonl
    python eval_cvbench.py --compare outputs/eval-*                    # one table
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from core.logs import write_whole
from core.options import StageOptions, UserError, flag, parse_options, run_config
from core.processes import launch, start_accelerator
from core.prompts import check_sources, find_bad_rows
from core.qwen import load_policy
from core.rollout import sample
from data import BENCHMARKS, load_rows
from rewards import extract_answer, is_correct, open_value, reflects, stated_option, stated_value


@dataclass
class EvalOptions(StageOptions):
    dataset: str = flag("auto", f"toy, {', '.join(BENCHMARKS)}, or your own file or folder")
    data_path: list[str] = flag([], "Local copy of the benchmark", group="evaluation")
    limit: int | None = flag(None, "Use only this many questions", ge=1)
    batch_size: int = flag(64, "Questions decoded together; changes only rounding", paper=8, ge=1)
    max_completion_length: int = flag(96, "Longest response in tokens", paper=1024, ge=1)
    samples: int = flag(1, "Responses per question, for pass@k", ge=1)
    temperature: float = flag(0.0, "Sampling temperature; 0 is greedy", ge=0)
    rescore: str | None = flag(None, "Score this responses.jsonl again, without a model")
    compare: list[str] = flag([], "Print these folders or scores.json files as one table")

    def settle(self) -> None:
        if self.samples > 1 and self.temperature == 0:
            raise UserError("--samples needs --temperature 1: greedy responses are all alike")
        if self.dataset == "auto":
            self.dataset = "toy" if self.recipe == "toy" else "cvbench"
        name = "-".join([Path(self.dataset).stem, *Path(self.model).parts[-2:]])
        self.output_dir = self.output_dir or f"outputs/eval-{name}"


NEUTRAL = "batch_size config output_dir overwrite recipe recipe_reason resume".split()
ROW = ("id", "type", "task", "source", "question", "options", "answer")
SOURCES = ("ADE20K", "COCO", "Omni3D")  # of CV-Bench


def judge(row: dict, response: str) -> dict:
    """Whether a response is right, from `options`, `answer` and `response` alone."""
    extracted = lenient = extract_answer(response)
    if extracted is None:
        text = response.rpartition("</think>")[2].strip() or response.removeprefix("<think>")
        lenient = (open_value(row["answer"]) and stated_value(text)) or text
        if row["options"]:
            index = stated_option(text, row["options"])
            lenient = None if index is None else row["options"][index]
    correct = extracted is not None and is_correct(extracted, row)
    correct_lenient = lenient is not None and is_correct(lenient, row)
    return {"extracted": extracted, "correct": correct, "correct_lenient": correct_lenient}


def score(records: list[dict]) -> dict:
    """The content of scores.json. Shares are fractions of 1, `completion_length` is in words."""

    def accuracies(part: list[dict]) -> dict:
        strict, lenient = (fmean(r[key] for r in part) for key in ("correct", "correct_lenient"))
        return {"n": len(part), "accuracy": strict, "accuracy_lenient": lenient}

    scores = accuracies(records) | {"official": None, "official_lenient": None}
    scores["unparsed"] = sum(record["extracted"] is None for record in records)
    scores["completion_length"] = fmean(len(record["response"].split()) for record in records)
    scores["reflection"] = fmean(reflects(record["response"]) for record in records)
    for key in ("task", "source"):
        parts: dict[str, list[dict]] = {}
        for record in records:
            parts.setdefault(record.get(key) or "unknown", []).append(record)
        scores[key + "s"] = {name: accuracies(part) for name, part in parts.items()}
    samples = [[r, *(judge(r, s) for s in r.get("more_samples", ()))] for r in records]
    n = min(map(len, samples))
    for suffix in ("", "_lenient"):
        scores["interval" + suffix] = wilson(scores["accuracy" + suffix], len(records))
        if set(scores["sources"]) == set(SOURCES):
            ade, coco, omni = (scores["sources"][name]["accuracy" + suffix] for name in SOURCES)
            scores["official" + suffix] = ((ade + coco) / 2 + omni) / 2
        for k in [2**i for i in range(n.bit_length()) if n > 1]:
            right = [sum(one["correct" + suffix] for one in each[:n]) for each in samples]
            scores[f"pass@{k}{suffix}"] = fmean(pass_at_k(n, c, k) for c in right)
    return scores


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them right, include a right one (arXiv 2107.03374)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share of n (Wilson 1927)."""
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def evaluate(options: EvalOptions) -> None:
    accelerator = start_accelerator(options)
    rank, world = accelerator.process_index, accelerator.num_processes
    path = Path(options.output_dir) / "responses.jsonl"
    settings = {name: value for name, value in vars(options).items() if name not in NEUTRAL}
    refuse_other(path, settings, options.overwrite)  # errors that need no download come first
    check_sources(options, options.model, options.data_path)
    trained, given = run_config(options.model), {"revision": options.data_revision}
    given |= {"data_path": options.data_path, "image_folder": options.image_folder}
    known = {Path(name).absolute() for name in ("toy", trained.get("dataset", "toy"))}
    split = "eval" if Path(options.dataset).absolute() in known else "all"
    rows = load_rows(options.dataset, split, options.seed, options.limit, **given)
    bad = find_bad_rows(rows)
    skipped = [f"row {i + 1}, {reason}" for i, reason in bad.items()]
    if len(bad) == len(rows):
        raise UserError(f"{options.dataset} has no usable question: {'; '.join(skipped[:3])}")

    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    model, processor = load_policy(
        options.model, dtype=dtype, max_pixels=options.max_pixels, revision=options.revision
    )
    model.to(accelerator.device).eval().requires_grad_(False)
    style = options.prompt_style
    if style == "auto":
        style = trained.get("style_used", processor.default_style)
    settings["style_used"] = style
    # a checksum, as any type of 16 or 32 bits can be viewed as int16
    settings["weights"] = sum(int(p.view(torch.int16).sum()) for p in model.parameters())
    done = open_responses(path, settings, options.overwrite, rows) if rank == 0 else []
    done, size, k = set(gather_object(done)), options.batch_size, options.samples
    limits = (options.max_completion_length, options.temperature)
    order = [i for i in range(len(rows)) if i not in bad]  # not ids, which may repeat
    for first in tqdm(range(0, len(order), size * world), disable=rank > 0):
        places = [place for place in order[first + rank * size :][:size] if place not in done]
        prompts = [processor.prompt(rows[place], style) for place in places]
        records, texts = [], []
        if prompts:
            inputs = processor.collate([prompt.inputs for prompt in prompts])
            ids, mask, _ = sample(model, inputs, k, *limits, seed=options.seed, prompts=places)
            texts = processor.decode(ids, mask)  # B * k
        for b, prompt in enumerate(prompts):
            response, *more = (prompt.opening + text for text in texts[b * k : (b + 1) * k])
            record = {name: prompt.row.get(name) for name in ROW} | {"response": response}
            record |= judge(record, response) | {"place": places[b], "more_samples": more}
            records.append(record)
        records = gather_object(records)
        if rank == 0:
            with open(path, "a") as file:
                file.writelines(json.dumps(record, default=str) + "\n" for record in records)
    if rank == 0:
        publish(path, read_responses(path), skipped)


def refuse_other(path: Path, settings: dict, overwrite: bool) -> None:
    """Raise UserError if the responses in `path` were made with other settings or weights."""
    if overwrite or not path.exists() or not path.read_text():
        return
    saved = path.with_name("eval_config.json")
    before = json.loads(saved.read_text()) if saved.exists() else {}
    if other := [name for name in settings if before.get(name) != settings[name]]:
        raise UserError(f"{path}: made with other {', '.join(other)}; --overwrite deletes it")


def open_responses(path: Path, settings: dict, overwrite: bool, rows: Sequence[dict]) -> list[int]:
    """The places already answered. Raises UserError if the answers are to other questions."""
    refuse_other(path, settings, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() and not overwrite else ""
    text = text[: text.rfind("\n") + 1]  # without a line that was cut short
    records = [json.loads(line) for line in text.splitlines()]
    for record in records:
        row = rows[record["place"]] if record["place"] < len(rows) else {}
        if any(row.get(key) != record[key] for key in ("question", "options", "answer")):
            raise UserError(f"{path}: made with other questions; --overwrite deletes it")
    write_whole(path, text)
    write_whole(path.with_name("eval_config.json"), json.dumps(settings, indent=2) + "\n")
    print(*(f"{name}: {value}" for name, value in settings.items()), sep="\n", flush=True)
    return [record["place"] for record in records]


def read_responses(path: Path) -> list[dict]:
    """The records. Raises KeyError if one lacks what a score needs, ValueError if there is none."""
    if not (records := [json.loads(line) for line in open(path) if line.strip()]):
        raise ValueError("it holds no responses")
    for record in records:
        record["options"] = [*map(str, record["options"] or ())]
        record["answer"], record["response"] = str(record["answer"]), str(record["response"])
    return records


def publish(path: Path, records: list[dict], skipped: list[str]) -> None:
    """Judge the responses anew, write them and scores.json, and print the scores."""
    records = [record | judge(record, record["response"]) for record in records]
    records.sort(key=lambda record: record.get("place", 0))
    scores = score(records) | ({"skipped": skipped} if skipped else {})
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
    write_whole(path.with_name("scores.json"), json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


def compare(names: list[str]) -> None:
    """Print lenient accuracies in %, and mean ± standard deviation of folders grpo-0, grpo-1, …"""
    groups, seeds = {}, {}
    for folder in (name.removesuffix("scores.json").rstrip("/") for name in names):
        scores = json.loads(Path(folder, "scores.json").read_text())
        row = {task: part["accuracy_lenient"] for task, part in sorted(scores["tasks"].items())}
        row |= {"all": scores["accuracy_lenient"], "official": scores["official_lenient"]}
        row = {column: 100 * share for column, share in row.items() if share is not None}
        groups[folder] = [row]
        seeds.setdefault(re.sub("(?<!checkpoint)-[0-9]+$", "-*", folder), []).append(row)
    groups |= {name: rows for name, rows in seeds.items() if len(rows) > 1}
    for name, rows in groups.items():
        print(name.ljust(max(map(len, groups))), end="")
        for column in rows[0]:
            values = [row[column] for row in rows if column in row]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            print(f"  {column} {fmean(values):.1f}{spread}".ljust(22), end="")
        print()


def main() -> None:
    # `--benchmark` is another name of `--dataset`, which scripts may still use.
    argv = [re.sub("^--benchmark", "--dataset", word) for word in sys.argv[1:]]
    options = parse_options(EvalOptions, __doc__, argv)
    if not options.rescore and not options.compare:
        return evaluate(options)
    try:
        if options.compare:
            return compare(options.compare)
        records = read_responses(Path(options.rescore))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {options.rescore or options.compare}: {error!r}") from error
    publish(Path(options.rescore), records, [])


if __name__ == "__main__":
    launch(main)
