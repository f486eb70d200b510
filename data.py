"""Load every dataset as the same rows, and build every prompt.

    rows = load_rows("sat")          # or toy, another of DATASETS, a hub id, a local path
    build_prompt(rows[17], "base")   # reading a row may raise BadRow

A row is a dict: `place` (its number in the data, which identifies it), `id` (from the file, or made
from the place), `images` (PIL, RGB, decoded when the row is read; none in a text-only row),
`question`, `options` (list of str, may be empty), `answer` (with options, the text of the right
one), `task`, `source`, maybe `thinking` (a reasoning trace) or `wording` (a published prompt that
replaces the question), and every other column of the file, unchanged.
"""

import ast
import contextlib
import random
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from core import files
from core.errors import UserError
from rewards import is_correct, stated_option
from toy.world import ToyRows


class BadRow(ValueError):
    """A row that cannot be used, printed as "id: reason"."""

    def __init__(self, row_id: str, reason: str):
        super().__init__(f"{row_id}: {reason}")


# --- prompts -------------------------------------------------------------------------------------

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
CONVERSATION = (
    "{image}A conversation between User and Assistant. "
    "The user asks a question about the image, and the Assistant solves it."
)
TEMPLATES = {  # upstream's words; it never asks a base model for <answer> tags
    "base": CONVERSATION + " The assistant first thinks about the reasoning process in the mind "
    "and then provides the user with the answer.\nUser: {question} \n"
    "Assistant: Let me solve this step by step.\n<think>",
    "base-direct": CONVERSATION + "\nUser: {question} \nAssistant: ",
    "instruct": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{image}{question}  Output the thinking process in <think> </think> and "
    "final answer (option) in <answer> </answer> tags.<|im_end|>\n<|im_start|>assistant\n",
}
STYLES = tuple(TEMPLATES)
MARK = re.compile(r"<image(?:[ _-]?(\d+))?>", re.IGNORECASE)


def build_prompt(row: dict, style: str) -> str:
    """The text of a prompt, with one `IMAGE` per image.

    The images replace the question's marks, `<image>` or `<image 1>`, if there is one mark for
    each image, in order. Otherwise the images come first, marks are removed, and a numbered mark
    becomes "image 1".
    """
    question, options = row.get("wording") or row["question"], row.get("options")
    if options and not row.get("wording"):
        choices = " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))
        question = f"Answer in natural language. {question} Choose between the following options: "
        question += choices
    marks, images = MARK.findall(question), [IMAGE] * len(row.get("images") or ())
    in_order = [str(number) for number in range(1, len(images) + 1)]
    if images and marks in ([""] * len(images), in_order):
        pieces = MARK.sub("<image>", question).split("<image>")
        return TEMPLATES[style].format(image="", question=IMAGE.join(map(clean, pieces)))
    question = MARK.sub(lambda mark: f"image {mark[1]}" if mark[1] else "", question)
    return TEMPLATES[style].format(image="".join(images), question=clean(question.lstrip("\n")))


def clean(text: str) -> str:
    """Text without `<|special tokens|>`: a dataset may not end a turn or announce an image."""
    # A space keeps the neighbours from forming a new token. A lone surrogate cannot be encoded.
    return re.sub(r"<\|[^<>|]*\|>", " ", text).encode(errors="replace").decode()


# --- rows ----------------------------------------------------------------------------------------

FIELDS = ("question", "options", "answer", "task", "source", "thinking")
SAT = {"answers", "correct_answer"}
LAYOUTS = (  # the columns that identify a published layout; field of a row -> its column there
    (SAT, {"options": "answers", "answer": "correct_answer", "task": "question_type"}),
    ({"choices", "prompt", "sub_task"}, {"wording": "prompt", "task": "sub_task"}),  # BLINK
    ({"choices", "prompt", "idx"}, {"wording": "prompt"}),  # CV-Bench
    ({"choices"}, {"options": "choices"}),
    ({"problem", "answer"}, {"answer": "answer"}),  # geometry3k; a `solution` is reasoning
    ({"problem"}, {"question": "problem", "answer": "solution"}),  # CLEVR, GeoQA
)
OPTION_COLUMN = re.compile("[A-J]|(?:option|choice)[ _]?[A-J0-9]", re.IGNORECASE)
LIKELY_OPTIONS = r"(?i)(answer_)?(option|choice|candidate)s?([ _]?(\w|\d+|list))?"


class Rows(Sequence):
    """`rows[i]` reads a row and decodes its images, or raises `BadRow`."""

    def __init__(self, records, kept: range, name: str, split: str, seed: int, folder, commit):
        self.records, self.kept = records, kept  # of `files.read_rows`; this split's indices
        self.name, self.split, self.seed, self.image_folder = name, split, seed, folder
        self.commit = commit  # of a dataset from the hub, otherwise None

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> dict:
        place, path, record = self.records[self.kept[i]].values()
        folders = [Path(folder) for folder in (self.image_folder, Path(path).parent) if folder]
        named = not _is_empty(record.get("id"))
        row_id = str(record["id"]) if named else f"{self.name}-{self.split}-{place}"
        try:
            row = _unify(record, self.name)
            if SAT <= record.keys():  # its right answer comes first, and it has no letters
                random.Random(f"{self.seed} {place}").shuffle(row["options"])
            row["images"] = [files.to_image(image, folders) for image in row["images"]]
        except ValueError as error:
            raise BadRow(row_id, " ".join(str(error).split())[:300]) from error
        return row | {"id": row_id, "place": place}


def _unify(record: dict, name: str) -> dict:
    """A record (column -> value) in any layout as a row whose images are still encoded."""
    if {"image_link", "caption", "label"} <= record.keys():  # VSR
        ask = "Is the following statement about the image true or false? "
        record = record | {"question": ask + _text(record, "caption"), "options": ["True", "False"]}
        label = str(record["label"]).removesuffix(".0")
        record["answer"] = {"0": "False", "1": "True"}.get(label, label)
    choices, at = record.get("choices") or (), record.get("answer")
    if type(at) is int and str in map(type, choices):  # it counts from 0: ScienceQA, MMLU
        if "lecture" not in record and str(at) in choices and choices.index(str(at)) != at:
            raise ValueError(f"its answer {at} may be a place or a text among its choices")
        record = record | {"answer": dict(enumerate(choices)).get(at)}
    columns = {field: field for field in FIELDS} | _layout(record.keys())
    numbered = filter(files.NUMBERED_IMAGE.fullmatch, record)
    hidden = {*FIELDS, *files.IMAGE_COLUMNS, *numbered, "wording"}
    row = {column: value for column, value in record.items() if column not in hidden}
    unread = [c for c, v in row.items() if v and v == v and re.fullmatch(files.LIKELY_IMAGE, c)]
    row |= {"images": files.encoded_images(record), "task": name, "source": name}
    if unread and not row["images"]:
        raise ValueError(f"its column {unread[0]} is not read: call it `image`")
    row["options"] = options = _options(record, columns.pop("options"))
    unread = [c for c, v in row.items() if v and v == v and re.fullmatch(LIKELY_OPTIONS, c)]
    if unread and not options:
        raise ValueError(f"its column {unread[0]} is not read: call it `options`")
    for field, column in columns.items():
        if field in ("question", "answer") or not _is_empty(record.get(column)):
            row[field] = _text(record, column, {"answer": "answer", "thinking": "think"}.get(field))
    if options:
        right = stated_option(row["answer"], options)
        letters = [chr(65 + i) for i in range(len(options)) if i != right]  # of other options
        if right is None or options.count(options[right]) > 1 or options[right].upper() in letters:
            raise ValueError(f"its answer {row['answer']!r:.80} does not name one of its options")
        row["answer"] = options[right]
    elif row["answer"].startswith(("['", '["')) or not is_correct(row["answer"], row):
        raise ValueError(f"its answer {row['answer']!r:.80} can never be right")
    return row


def _layout(columns: Set[str]) -> dict[str, str]:
    """Field of a row -> its column in the published layout that has these columns."""
    return {f: c for key, layout in LAYOUTS[::-1] if key <= columns for f, c in layout.items()}


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or str(value).strip().lower() in ("", "nan")


def _text(record: Mapping, column: str, tag: str | None = None) -> str:
    """A column's text, or the part inside `<tag>` if it has one."""
    value = record.get(column)
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"its {column} has type {type(value).__name__} instead of text")
    text = "" if _is_empty(value) else clean(str(value))
    if tag:
        tagged = re.findall(f"<{tag}>(.*?)(?:</{tag}>|$)", text, re.DOTALL | re.IGNORECASE)
        text = (tagged[-1] if tagged else text).strip()
    if _is_empty(text):
        raise ValueError(f"its {column} is missing or empty")
    return text


def _options(record: dict, column: str) -> list[str]:
    """The options of a list, of a list written as text, or of columns A, B, … or option_a, …"""
    options = record.get(column) or record.get("options")
    columns = {name[-1].upper(): name for name in record if OPTION_COLUMN.fullmatch(name)}
    if _is_empty(options) and len(columns) > 1:
        places = "0123456789"["0" not in columns :] if "1" in columns else "ABCDEFGHIJ"
        options = [record.get(columns.get(place)) for place in places]
    if isinstance(options, str):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            # numpy prints a list without commas
            options = ast.literal_eval(re.sub(r"(?<=['\"])\s+(?=['\"])", ", ", options))
    if not isinstance(options, list | tuple | None):
        raise ValueError(f"its {column} has type {type(options).__name__} instead of a list")
    options = list(options or ())
    while len(options) > 1 and _is_empty(options[-1]):  # a table pads short lists with NaN
        options.pop()
    return [_text({"option": option}, "option") for option in options]


# --- datasets ------------------------------------------------------------------------------------

DATASETS = {  # name -> its repository on the hub, and the files to read
    "sat": ("array/SAT", ("SAT_train.parquet", "SAT_val.parquet")),
    "clevr": ("leonardPKU/clevr_cogen_a_train", files.ALL),
    "clevr-cot": ("MMInstruction/Clevr_CoGenT_TrainA_R1", files.ALL),
    "geoqa": ("leonardPKU/GEOQA_R1V_Train_8K", files.ALL),
    "geometry3k": ("hiyouga/geometry3k", files.ALL),
    "cvbench": ("nyu-visionx/CV-Bench", ("test*.parquet",)),
    "blink-depth": ("BLINK-Benchmark/BLINK", ("Relative_Depth/val*.parquet",)),
    "blink-spatial": ("BLINK-Benchmark/BLINK", ("Spatial_Relation/val*.parquet",)),
    "vsr": ("cambridgeltl/vsr_random", ("test.jsonl",)),
    "sat-val": ("array/SAT", ("SAT_val.parquet",)),
}
BENCHMARKS = ("cvbench", "blink-depth", "blink-spatial", "vsr", "sat-val")  # only for evaluation


def load_rows(
    name: str,
    split: str = "train",
    seed: int = 0,
    limit: int | None = None,
    *,
    subset: int | None = None,
    max_images: int | None = None,
    image_folder: str | Path | None = None,
    revision: str | None = None,
    data_path: str | Path | Sequence[str | Path] | None = None,
) -> Sequence[dict]:
    """The rows of `toy`, one of `DATASETS`, a hub id, a folder, a .parquet or a .jsonl file.

    split: train or eval, see `files.split_files`. Without files for eval the last 5 % of the rows,
        at most 200, are held out; fewer than 20 rows serve both. `all` is eval without that cut.
    seed: shuffles SAT's options, draws the toy world.
    limit: at most this many rows, applied last.
    subset: read only this many rows of the files. Default: 15 000 for `sat`, else 0 for all.
    max_images: leave out rows with more images. Default: 1 for `sat`, else no limit.
    image_folder: where image paths start; if a file is not there, beside the data file.
    revision: branch, tag or commit on the hub.
    data_path: files or a folder to read a dataset of `DATASETS` from, instead of the hub.
    """
    if split not in ("train", "all") and not files.HELD_OUT.fullmatch(split):
        raise UserError(f"unknown split {split!r}; valid: train, eval, all")
    name, whole = str(name), split == "all" or name in BENCHMARKS
    split = "train" if split == "train" and name not in BENCHMARKS else "eval"
    if name == "toy":
        return ToyRows(split, seed, limit or subset or (100_000 if split == "train" else 1_000))
    if name == "sat":  # upstream's recipe
        subset, max_images = 15_000 if subset is None else subset, max_images or 1
    sources, repo, patterns = files.locate(name, DATASETS, data_path)
    folder = None if sources else files.download(repo, "dataset", patterns, revision)
    sources, commit = (sources, None) if sources else ([folder], folder.name)
    paths, hold_out = files.split_files(sources, patterns, split)
    records = files.read_rows(paths, subset or None, max_images)
    columns = set().union(*(records[i]["record"] for i in range(len(records))[:9]))
    if columns.isdisjoint({_layout(columns).get("question", "question"), "caption"}):  # VSR's
        raise UserError(f"{paths[0]} has no column `question`, only {', '.join(sorted(columns))}")
    kept = range(len(records))
    if hold_out and not whole and len(kept) >= 20:
        cut = len(kept) - min(200, len(kept) // 20)
        kept = kept[:cut] if split == "train" else kept[cut:]
    title = Path(name).absolute().stem
    return Rows(records, kept[:limit], title, split, seed, image_folder, commit)
