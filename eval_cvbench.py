"""Evaluation: CV-Bench, its relatives and their embedded twin, scored by the rules of training.

Each response is appended to `responses.jsonl` as it comes, so a run that was stopped, be it by
kill -9, goes on when the same command is given again. Questions are sorted by length and cut into
batches before they are shared out: neither an interruption nor the number of processes changes a
response, and the batch size changes only the rounding. Two scores, both by `rewards.py`:
- strict: the last `<answer>…</answer>` states the right option and no other, as in training;
- lenient: without a tag, what the text states counts if that is exactly one option.

Unlike upstream, free text is not searched for letters ("I see a dog and a cat." was option (A)),
prompts are padded on the left, and CV-Bench's official score stands beside the micro-average.

    accelerate launch eval_cvbench.py                       # the toy model, any CPU, minutes
    accelerate launch eval_cvbench.py --model outputs/grpo-sat/final      # CV-Bench on one GPU
    accelerate launch --config_file configs/ddp.yaml eval_cvbench.py --model Qwen/Qwen2-VL-2B
    accelerate launch eval_cvbench.py --samples 8 --temperature 1         # pass@8, majority vote
    python eval_cvbench.py --rescore outputs/eval-toy-toy/responses.jsonl
    python eval_cvbench.py --compare outputs/eval-*         # several evaluations as one table
"""

import json
import math
import sys
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import fmean, mode, stdev
from typing import ClassVar, Literal

import torch
from accelerate.utils import gather_object, send_to_device
from tqdm import tqdm

from data import BENCHMARKS, BadRow, load_rows
from model import load_policy
from rewards import extract_answer, is_correct, lenient_answer, reflects, stated_number
from rollout import sample
from run import _Parser, complain, flag, prefetched, start_accelerator, user_errors, write_whole


@dataclass
class EvalConfig:
    model: str = flag("toy", "toy, toy-scratch (random weights), a hub id or a folder")
    benchmark: Literal["auto", "toy", *BENCHMARKS] = flag("auto", "auto: toy for toy, else cvbench")
    data_path: list[str] = flag([], "the benchmark's files or their folder, instead of the hub")
    image_folder: str | None = flag(None, "where images are that the data only names (vsr)")
    output_dir: str | None = flag(None, "default outputs/eval-<benchmark>-<model>")
    seed: int = flag(0, "fixes the options' order, the toy questions and every sampled token")
    prompt_style: Literal["auto", "base", "base-direct", "instruct"] = flag(
        "auto", "auto: as the model's run was trained if its folder says, else by its end token"
    )
    batch_size: int = flag(8, "questions that each process decodes together")
    max_completion_length: int | None = flag(None, "tokens; default 1024, toy 96")
    max_pixels: int = flag(401_408, "an image is scaled down to this")
    limit: int | None = flag(None, "only the first so many questions; default all, toy 500")
    samples: int = flag(1, "responses to each question, for pass@k and the majority vote")
    temperature: float = flag(0.0, "0 takes the most likely token")
    rescore: str | None = flag(None, "score this responses.jsonl again, without a model")
    compare: list[str] = flag([], "print these folders or scores.json files as one table")
    log_with: ClassVar[None] = None  # there is no curve to track


NO_MATTER = ("output_dir", "batch_size", "image_folder", "rescore", "compare")  # to the responses
KEY = itemgetter("id", "question", "answer")  # another data's namesake is another question
ROW = ("id", "type", "task", "source", "question", "options", "answer")
SOURCES = ("ADE20K", "COCO", "Omni3D")
# Qwen2-VL-2B in arXiv 2503.05132, table 3, in %; the 10.16 is printed 0.16, which cannot give 31.38
CVBENCH = {
    "base": {"Count": 54.69, "Relation": 22.46, "Depth": 10.16, "Distance": 31.66, "all": 31.38},
    "SFT": {"Count": 60.02, "Relation": 68.92, "Depth": 55.00, "Distance": 45.83, "all": 57.84},
    "GRPO": {"Count": 59.64, "Relation": 66.76, "Depth": 54.16, "Distance": 56.66, "all": 59.47},
}
PAPER = {
    "+".join(SOURCES): CVBENCH,
    "blink-depth": {"base": {"all": 13.70}, "SFT": {"all": 58.06}, "GRPO": {"all": 50.80}},
    "blink-spatial": {"base": {"all": 0.69}, "SFT": {"all": 47.55}, "GRPO": {"all": 55.94}},
    "vsr": {"base": {"all": 0.0}, "SFT": {"all": 35.80}, "GRPO": {"all": 62.32}},
}


def parse_config(argv: list[str] | None = None) -> EvalConfig:
    parser = _Parser(EvalConfig, allow_abbrev=False)
    parser.parse_args(argv)  # refuses an unknown option in one line
    (config,) = parser.parse_args_into_dataclasses(argv)
    if config.benchmark == "auto":
        config.benchmark = "toy" if config.model in ("toy", "toy-scratch") else "cvbench"
    for name in ("batch_size", "max_completion_length", "max_pixels", "limit", "samples"):
        if (value := getattr(config, name)) is not None and value < 1:
            parser.error(f"argument --{name}: must be at least 1, not {value}")
    if config.seed < 0:
        parser.error(f"argument --seed: must be at least 0, not {config.seed}")
    if not 0 <= config.temperature < math.inf:
        parser.error(f"argument --temperature: must be 0 or more, not {config.temperature}")
    if config.samples > 1 and config.temperature == 0:
        parser.error("argument --samples: greedy samples are all alike; add --temperature 1")
    toy = config.benchmark == "toy"
    config.max_completion_length = config.max_completion_length or (96 if toy else 1024)
    config.limit = config.limit or (500 if toy else None)
    if config.output_dir is None:
        name = "-".join([config.benchmark, *Path(config.model).parts[-2:]])
        samples = f"-samples{config.samples}" if config.samples > 1 else ""
        config.output_dir = f"outputs/eval-{name}{samples}"
    return config


# --- scoring: from `options, answer, response` alone ---------------------------------------------


def judge(row: dict, response: str) -> dict:
    """`extracted` (what stands in the answer tag, or None), `correct` and `correct_lenient`."""
    extracted, lenient = extract_answer(response), lenient_answer(response, row)
    correct, correct_lenient = (a is not None and is_correct(a, row) for a in (extracted, lenient))
    return {"extracted": extracted, "correct": correct, "correct_lenient": correct_lenient}


def score(records: list[dict]) -> dict:
    """What scores.json holds, from judged responses.

    `unparsed` counts those without an answer tag, `completion_length` is the mean number of words,
    `reflection` the share that turns back on itself; of several samples, the first one's.
    """
    texts, sources = [record["response"] for record in records], by(records, "source")
    scores = tally(records) | {"official": None, "official_lenient": None}
    if set(sources) == set(SOURCES):
        for suffix in ("", "_lenient"):
            ade, coco, omni = (sources[name]["accuracy" + suffix] for name in SOURCES)
            scores["official" + suffix] = ((ade + coco) / 2 + omni) / 2
    return scores | {
        "unparsed": sum(record["extracted"] is None for record in records),
        "completion_length": sum(len(text.split()) for text in texts) / len(texts),
        "reflection": sum(map(reflects, texts)) / len(texts),
        "tasks": by(records, "task"),
        "sources": sources,
        **score_samples(records),
    }


def tally(records: list[dict]) -> dict:
    n = len(records)
    strict, lenient = (sum(r[key] for r in records) / n for key in ("correct", "correct_lenient"))
    return {"n": n, "accuracy": strict, "accuracy_lenient": lenient}


def by(records: list[dict], key: str) -> dict[str, dict]:
    """The tallies of each task or source."""
    parts: dict[str, list[dict]] = {}
    for record in records:
        parts.setdefault(str(record.get(key) or "unknown"), []).append(record)
    return {name: tally(part) for name, part in parts.items()}


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples hold one of the c right ones (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def score_samples(records: list[dict]) -> dict:
    """pass@k for k = 1, 2, 4, … n, and how often the most frequent of the n answers is right."""
    scores, n = {}, min(len(record.get("samples") or ()) for record in records)
    if n < 2:
        return {}
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    for suffix, lenient in (("", False), ("_lenient", True)):
        votes = [[vote(text, row, lenient) for text in row["samples"][:n]] for row in records]
        right = [v.count("right") for v in votes]
        scores["pass@k" + suffix] = {str(k): fmean(pass_at_k(n, c, k) for c in right) for k in ks}
        # of equally frequent answers the first given counts; what holds no answer does not vote
        elected = [mode([answer for answer in v if answer] or ["none"]) for v in votes]
        scores["maj@k" + suffix] = {str(n): elected.count("right") / len(elected)}
    return scores


def vote(text: str, row: dict, lenient: bool) -> str | None:
    """What a response answers, by a name that all spellings of the same answer share."""
    answer = lenient_answer(text, row) if lenient else extract_answer(text)
    if not answer:
        return None
    if is_correct(answer, row):
        return "right"
    same = (o for o in row.get("options") or () if is_correct(answer, row | {"answer": o}))
    return "wrong: " + (next(same, None) or stated_number(answer) or answer.lower())


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share of n (Wilson 1927)."""
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


# --- files and tables ----------------------------------------------------------------------------


def as_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read_responses(path: Path) -> list[dict]:
    """Every response, judged by the rules as they are now; not a last line that was cut short."""
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    record = json.loads(line)
                    records.append(record | judge(record, record["response"]))
                    score_samples(records[-1:])  # raises where the samples are no texts
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if line.endswith(b"\n"):
                    raise ValueError(f"{path}, line {number}: no response ({error!r})") from error
    return records


def open_folder(folder: Path, settings: dict) -> list[dict]:
    """The responses that the folder holds; raises ValueError when other settings gave them."""
    path, saved = folder / "responses.jsonl", folder / "eval_config.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_whole(saved, json.dumps(settings, indent=2) + "\n")
        return []
    theirs = json.loads(saved.read_text())
    if other := [key for key in settings if theirs.get(key) != settings[key]]:
        found = f"{folder} holds the responses of other settings ({', '.join(other)})"
        raise ValueError(f"{found}: delete it, or name another --output_dir")
    records = read_responses(path)
    write_whole(path, as_lines(records))  # without a line that was cut short
    return records


def percent(*shares: float | None) -> str:
    return " / ".join("–" if share is None else f"{100 * share:.1f}" for share in shares)


def print_table(rows: list[dict[str, str]]) -> None:
    """Rows of column -> cell; a cell may be missing."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    print(flush=True)


def over_seeds(evaluations: dict[str, dict]) -> None:
    """Mean ± sample standard deviation of folders whose names differ in a last number: `grpo-0`."""
    roads: dict[str, list[dict[str, float]]] = {}
    for folder, scores in evaluations.items():
        road, dash, seed = Path(folder).name.rpartition("-")
        if dash and seed.isdigit():
            its = {name: task["accuracy_lenient"] for name, task in scores["tasks"].items()}
            its |= {"all": scores["accuracy_lenient"], "all, strict": scores["accuracy"]}
            roads.setdefault(road, []).append(its)
    rows = [
        {"lenient, %, mean ± std over seeds": road, "seeds": str(len(runs))}
        | {
            part: f"{100 * fmean(values):.1f} ± {100 * stdev(values):.1f}"
            for part in runs[0]
            for values in [[run[part] for run in runs]]
        }
        for road, runs in roads.items()
        if len(runs) > 1
    ]
    if rows:
        print_table(rows)


def compare(names: list[str]) -> None:
    """Several evaluations, a row each; the paper's too, where all are of one of its benchmarks.

    Runs that differ in the seed alone get a second table, of their mean and spread.
    """
    rows, benchmarks, evaluations = [], set(), {}
    for name in names:
        path = Path(name) / "scores.json" if Path(name).is_dir() else Path(name)
        try:
            scores = evaluations[str(path.parent)] = json.loads(path.read_text())
            row = {"strict / lenient, %": name, "n": str(scores["n"])}
            for part, its in [*scores["tasks"].items(), ("all", scores)]:
                row[part] = percent(its["accuracy"], its["accuracy_lenient"])
            row["official"] = percent(scores["official"], scores["official_lenient"])
            row["untagged"] = str(scores["unparsed"])
            row["words"] = f"{scores['completion_length']:.1f}"
            row["reflection"] = percent(scores["reflection"])
            for kind in ("pass", "maj"):
                for k, share in scores.get(f"{kind}@k", {}).items():
                    row[f"{kind}@{k}"] = percent(share, scores[f"{kind}@k_lenient"][k])
            benchmarks.add("+".join(sorted(scores["sources"])))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a scores.json ({error!r})") from error
        rows.append(row)
    for model, parts in PAPER.get(benchmarks.pop(), {}).items() if len(benchmarks) == 1 else ():
        row = {"strict / lenient, %": f"paper: {model}"}
        rows.append(row | {part: f"{number:.1f}" for part, number in parts.items()})
    print_table(rows)
    over_seeds(evaluations)


def publish(path: Path) -> None:
    """Judge all responses, in the file and in scores.json beside it; print 95 % intervals."""
    records = read_responses(path)
    if not records:
        raise ValueError(f"{path} holds no responses")
    scores, rows = score(records), []
    write_whole(path, as_lines(records))
    write_whole(path.parent / "scores.json", json.dumps(scores, indent=2) + "\n")
    for name, part in [*scores["tasks"].items(), *scores["sources"].items(), ("all", scores)]:
        rows.append({"accuracy, %": name, "n": str(part["n"])})
        for kind, share in (("strict", part["accuracy"]), ("lenient", part["accuracy_lenient"])):
            low, high = map(percent, wilson(share, part["n"]))
            rows[-1] |= {kind: percent(share), f"{kind}, 95 % interval": f"{low} – {high}"}
    print_table(rows)
    compare([str(path.parent)])


# --- asking --------------------------------------------------------------------------------------


def ask(model, processor, rows: list[dict], config: EvalConfig) -> list[dict]:
    """The judged responses to prepared rows, as they stand in responses.jsonl."""
    inputs = send_to_device(processor.collate([row["encoded"] for row in rows]), model.device)
    k, C, numbers = config.samples, config.max_completion_length, [row["number"] for row in rows]
    ids, mask = sample(model, inputs, k, C, config.temperature, seed=config.seed, prompts=numbers)
    texts, records = processor.decode(ids, mask), []  # B * k
    for b, row in enumerate(rows):
        response, *more = samples = texts[b * k : (b + 1) * k]
        record = {key: row.get(key) for key in ROW} | {"response": response} | judge(row, response)
        records.append(record | {"samples": samples} if more else record)
    return records


def evaluate(config: EvalConfig) -> None:
    with user_errors():
        accelerator = start_accelerator(config)
        rank, world = accelerator.process_index, accelerator.num_processes
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        given = dict(dtype=dtype, max_pixels=config.max_pixels, seed=config.seed)
        try:
            model, processor = load_policy(config.model, **given)
        except Exception as error:  # of whichever library reads the broken part
            raise ValueError(f"--model {config.model} cannot be loaded: {error}") from error
        model.to(accelerator.device).eval().requires_grad_(False)
        files = dict(data_path=config.data_path, image_folder=config.image_folder)
        rows = load_rows(config.benchmark, "eval", config.seed, config.limit, **files)
        style = config.prompt_style
        if style == "auto":  # as the model was trained, where it lies in a run's folder
            run = Path(config.model).resolve().parent / "config.json"
            saved = json.loads(run.read_text()) if run.exists() else {}
            style = saved.get("style_used", processor.default_style)
        settings = {k: v for k, v in vars(config).items() if k not in NO_MATTER} | {
            "prompt_style": style,
            "precision": accelerator.mixed_precision,
            # a folder's name does not say whether its model was trained again
            "weights": sum(int(p.view(torch.int16).sum()) for p in model.parameters()),
        }
        folder, found = Path(config.output_dir), []
        if rank == 0:
            found = open_folder(folder, settings)
            print("\n".join(f"  {name:<22}{value}" for name, value in settings.items()))
            print(f"device {accelerator.device}, {world} process(es)", flush=True)
        done = {KEY(record): record for record in gather_object(found)}

        def prepare(number: int) -> dict:
            return processor.prepare(rows[number], style) | {"number": number}

        # Each process measures its share of the prompts; all images would not fit in memory.
        measured, skipped = [], []
        for number in tqdm(
            range(rank, len(rows), world), "measuring", leave=False, disable=rank > 0
        ):
            try:
                row = prepare(number)
                measured.append((-len(row["encoded"]["input_ids"]), number, KEY(row)))
            except BadRow as bad:
                skipped.append(str(bad))
        measured, skipped = sorted(gather_object(measured)), gather_object(skipped)
        if not measured:
            raise ValueError(f"no usable question in {len(rows)}: {'; '.join(skipped[:3])}")
        if rank == 0 and skipped:
            print(f"{len(skipped)} of {len(rows)} questions are unusable:", *skipped, sep="\n  ")

    size = config.batch_size
    batches = [measured[i : i + size] for i in range(0, len(measured), size)]
    batches = [[number for _, number, key in batch if key not in done] for batch in batches]
    answered = len(measured) - sum(map(len, batches))
    if rank == 0 and answered:
        print(f"{folder}: {answered} of {len(measured)} questions are answered already", flush=True)

    # Rounds of one batch for each process, so that one process alone writes the file.
    batches += [[]] * (-len(batches) % world)
    rounds = range(len(batches) // world)
    with tqdm(total=len(measured), initial=answered, disable=rank > 0, unit="question") as bar:
        for _, batch in prefetched(lambda r: [*map(prepare, batches[r * world + rank])], rounds):
            records = gather_object(ask(model, processor, batch, config) if batch else [])
            done |= {KEY(record): record for record in records}
            if rank == 0:
                with open(folder / "responses.jsonl", "a") as file:
                    file.write(as_lines(records))
            bar.update(len(records))
    if rank == 0:
        in_order = [done[key] for _, _, key in sorted(measured, key=lambda one: one[1])]
        write_whole(folder / "responses.jsonl", as_lines(in_order))
        publish(folder / "responses.jsonl")


def main() -> None:
    with user_errors():
        config = parse_config()
        if config.compare:
            return compare(config.compare)
        if config.rescore:
            return publish(Path(config.rescore))
    try:
        evaluate(config)
    except KeyboardInterrupt:
        complain("stopped; the same command goes on from here")
        sys.exit(130)


if __name__ == "__main__":
    main()
