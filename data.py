"""Every dataset as the same rows; every prompt.

A row is a dict: `id, images (PIL, RGB), question, options (may be empty), answer, task, source`;
some also have `thinking` (a reasoning trace) or `prompt` (a benchmark's published wording).

    rows = load_rows("sat")                   # or toy, another of NAMES, a hub id, a local path
    prompt = build_prompt(rows[0], "base")    # rows[0] decodes its images now, not before
    row = Feed(rows, seed=42)[1234]           # what the run's prompt number 1234 asks about

Unlike upstream's, parquet is read without a detour through CSV text (answers keep their commas,
JPEGs with a thumbnail stay whole), options are shuffled with a seed, no image is opened before its
turn, and a row that cannot be used is a `BadRow` with its id, not a crash.
"""

import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from rewards import stated_option


class BadRow(ValueError):
    """A row that cannot be used, printed as "id: reason"."""

    def __init__(self, row_id: str, reason: str):
        super().__init__(f"{row_id}: {reason}")
        self.id, self.reason = row_id, reason


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- prompts -------------------------------------------------------------------------------------

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_ASK = (
    "{image}A conversation between User and Assistant. "
    "The user asks a question about the image, and the Assistant solves it."
)
TEMPLATES = {  # upstream's words; it never asks a base model for <answer> tags
    "base": _ASK + " The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer.\nUser: {question} \n"
    "Assistant: Let me solve this step by step.\n<think>",
    "base-direct": _ASK + "\nUser: {question} \nAssistant: ",
    "instruct": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{image}{question}  Output the thinking process in <think> </think> and "
    "final answer (option) in <answer> </answer> tags.<|im_end|>\n<|im_start|>assistant\n",
}
STYLES = tuple(TEMPLATES)


def build_prompt(row: dict, style: str) -> str:
    """The text a model sees: one `IMAGE` per image, and the question in one of `STYLES`."""
    if style not in TEMPLATES:
        raise ValueError(f"unknown prompt style {style!r}; valid styles: {', '.join(STYLES)}")
    question, options = row.get("prompt") or row["question"], row.get("options")
    if options and not row.get("prompt"):
        choices = " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))
        question = f"Answer in natural language. {question} Choose between the following options: "
        question += choices
    image = IMAGE * len(row.get("images") or ())
    return TEMPLATES[style].format(image=image, question=clean(question))


def clean(text: str) -> str:
    """Text without `<|special tokens|>`: a dataset may not end a turn or announce an image."""
    # a space keeps the neighbours from joining; half a surrogate pair becomes a question mark
    return re.sub(r"<\|[^<>|]*\|>", " ", text).encode(errors="replace").decode()


# --- images --------------------------------------------------------------------------------------

warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on large images and odd EXIF
Image.MAX_IMAGE_PIXELS = 25_000_000  # Pillow refuses twice as many before it decodes anything
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # for EPS Pillow runs a program


def to_image(value: Any, folder: Path = Path()) -> Image.Image:
    """Encoded bytes, `{bytes, path}`, a path inside `folder` or a PIL image, as an RGB image.

    Upright by its EXIF, on white where transparent, the first frame where animated, 16 bits
    scaled to 8. Raises ValueError with the reason where that cannot be had.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, str):
            path = (folder / value).resolve()
            if not path.is_relative_to(folder.resolve()):  # by `..`, as absolute path or by a link
                raise ValueError(f"path leads out of the dataset's folder: {value!r:.100}")
            value = path.read_bytes()
        if not isinstance(value, Image.Image):
            value = Image.open(io.BytesIO(value), formats=FORMATS)
        if max(value.size) >= 200 * min(value.size):  # Qwen's image processor refuses these
            raise ValueError(f"empty or too thin, {value.width}x{value.height}")
        image = ImageOps.exif_transpose(value)
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"missing, damaged or none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile input
        raise ValueError(_line(error)) from error


# --- rows ----------------------------------------------------------------------------------------

LETTERED = re.compile(r"\(A\)|(?<!\w)A[.)]\s.*(?<!\w)B[.)]\s", re.DOTALL)
IMAGES, NUMBERED = ("images", "image_bytes", "image"), ("image_1", "image_2", "image_3", "image_4")
OPTIONAL = ("task", "source", "type", "prompt", "thinking")


def _unified(record: dict) -> dict:
    """A record of any published layout (column -> value) with a row's names."""
    if "correct_answer" in record:  # SAT
        row = {"options": record["answers"], "answer": record["correct_answer"]}
        return record | row | {"task": record.get("question_type"), "source": "SAT"}
    if "choices" in record:  # CV-Bench and BLINK
        task = record.get("task") or record.get("sub_task")
        return record | {"options": record["choices"], "task": task}
    if "image_link" in record:  # VSR, published without its images
        ask = "Is the following statement about the image true or false? "
        row = {"question": ask + _text(record["caption"]), "options": ["True", "False"]}
        row |= {"answer": "True" if int(record["label"]) else "False"}
        return row | {"images": [record["image_link"].split("/")[-1]]}
    if "problem" in record:  # CLEVR and GeoQA; the cold start has `thinking` too
        row = {"question": record["problem"], "answer": _tagged("answer", record["solution"])}
        return record | row | {"thinking": _tagged("think", record.get("thinking") or "")}
    return record


def _tagged(tag: str, text: str) -> str:
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return (found[1] if found else text).strip()


def _text(value: Any) -> str:
    if value is None or isinstance(value, dict | list | bytes):
        raise ValueError("its question, its answer or an option is missing or no text")
    return clean(str(value))


def _images(record: dict) -> list:
    found = next((record[name] for name in IMAGES if record.get(name) is not None), [])
    found = list(found) if isinstance(found, list) else [found]
    return found + [record[name] for name in NUMBERED if record.get(name) is not None]


class Rows(Sequence):
    """`rows[i]` decodes the images of row i; `rows.record(i)` is the row with them encoded."""

    def __init__(self, name: str, label: str, index: list[tuple], seed: int):
        self.name, self.label, self.seed = name, label, seed
        self.index = index  # of each row: its number, file, place there, image folder, image count

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict:
        row, folder = self.record(i), self.index[i][3]
        for n, value in enumerate(row["images"]):
            try:
                row["images"][n] = to_image(value, folder)
            except ValueError as error:
                raise BadRow(row["id"], f"image {n + 1}: {error}") from error
        return row

    def record(self, i: int) -> dict:
        number, file, place, *_ = self.index[i]
        record = file[place] if isinstance(file, list) else file.slice(place, 1).to_pylist()[0]
        row_id = str(record.get("id") or f"{self.label}-{number}")
        row = {"id": row_id, "task": self.name, "source": self.name}
        try:
            record = _unified(record)
            options = [_text(option) for option in record.get("options") or ()]
            row |= {"images": _images(record), "question": _text(record["question"])}
            row |= {"options": options, "answer": _text(record.get("answer"))}
            row |= {name: _text(record[name]) for name in OPTIONAL if record.get(name)}
            if not row["images"]:
                raise ValueError("it has no image")
            if options:
                right = stated_option(row["answer"], options)  # as a completion would be read
                if right is None:
                    raise ValueError(f"its answer {row['answer']!r:.80} is none of its options")
                row["answer"] = options[right]
                # Where a prompt, a question or the options are lettered, their order stays.
                asked = " ".join([row["question"], *options])
                if not row.get("prompt") and not LETTERED.search(asked):
                    random.Random(f"{self.seed} {number}").shuffle(options)
        except (ValueError, TypeError, KeyError) as error:
            raise BadRow(row_id, _line(error)) from error
        return row


def _read_lines(path: Path, most: int | None) -> list[dict]:
    records = []
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for line in itertools.islice(filter(str.strip, lines), most):
                records.append(dict(json.loads(line)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"cannot read {path}, row {len(records)}: {_line(error)}") from error
    return records


def _read_parquet(path: Path, most: int | None) -> pa.Table:
    """The first `most` rows, memory-mapped.

    Parquet is compressed by row group, and SAT's is one group of 5 GB: to reach one row, all of it
    must be read. So it is streamed once into the datasets cache in Arrow's own format, where any
    row is read without the others.
    """
    from datasets.config import HF_DATASETS_CACHE  # takes a second, which the toy can save
    from filelock import FileLock

    stat, cache = path.stat(), Path(HF_DATASETS_CACHE) / "rows"
    key = repr((str(path.resolve()), stat.st_size, stat.st_mtime_ns, most))
    copy = cache / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{copy}.lock"):  # one process writes it, the others wait
            if not copy.exists():
                _convert(path, copy, most)
        return pa.ipc.open_stream(pa.memory_map(str(copy))).read_all().slice(0, most)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"cannot read {path} (cached in {cache}): {_line(error)}") from error


def _convert(path: Path, copy: Path, most: int | None) -> None:
    part = copy.with_suffix(".part")
    try:
        # With a buffer and without pre-buffering, or a whole column is fetched at once.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            batches = itertools.islice(file.iter_batches(32), most and math.ceil(most / 32))
            with pa.ipc.new_stream(str(part), file.schema_arrow) as stream:
                for batch in batches:
                    stream.write_batch(batch)
        os.replace(part, copy)
    finally:
        part.unlink(missing_ok=True)


def _image_counts(file: list[dict] | pa.Table) -> list[int]:
    """The images of each record; of a table's list column, without reading them."""
    if isinstance(file, list):
        return [len(_images(record)) for record in file]
    for name in set(IMAGES).intersection(file.column_names):
        if pa.types.is_list(kind := file[name].type) or pa.types.is_large_list(kind):
            return pc.list_value_length(file[name]).fill_null(0).to_pylist()
    return [1] * len(file)


# --- datasets ------------------------------------------------------------------------------------

ALL = ("*.parquet", "*.jsonl")
NAMES = {  # name -> its repository on the hub, and which of the files there
    "sat": ("array/SAT", ("SAT_train.parquet", "SAT_val.parquet")),
    "clevr": ("leonardPKU/clevr_cogen_a_train", ALL),
    "clevr-cot": ("MMInstruction/Clevr_CoGenT_TrainA_R1", ALL),
    "geoqa": ("leonardPKU/GEOQA_R1V_Train_8K", ALL),
    "cvbench": ("nyu-visionx/CV-Bench", ("test*.parquet",)),
    "blink-depth": ("BLINK-Benchmark/BLINK", ("Relative_Depth/val*.parquet",)),
    "blink-spatial": ("BLINK-Benchmark/BLINK", ("Spatial_Relation/val*.parquet",)),
    "vsr": ("cambridgeltl/vsr_random", ("test.jsonl",)),
    "sat-val": ("array/SAT", ("SAT_val.parquet",)),
}
BENCHMARKS = ("cvbench", "blink-depth", "blink-spatial", "vsr", "sat-val")  # one split each
EVAL_WORDS = ("val", "valid", "validation", "dev", "eval", "test")


def load_rows(
    name: str,
    split: str = "train",
    seed: int = 0,
    limit: int | None = None,
    *,
    max_images: int | None = None,
    subset: int | None = None,
    data_path: str | Path | Sequence[str | Path] | None = None,
    image_folder: str | Path | None = None,
) -> Sequence[dict]:
    """The rows of `toy`, of a dataset in `NAMES`, a hub id, a folder, a .parquet or .jsonl file.

    split: train or eval (val, test, ... mean eval); where the files' names tell no two apart, the
        last 5 % of the rows, at most 200, are for eval; fewer than 20 rows are for both.
    seed: shuffles the options of each row; draws the toy world.
    limit: only so many rows, counted after everything else.
    max_images: leaves out rows with more images. Default: 1 for `sat`, otherwise all rows.
    subset: only the first so many rows of the files. Default: 15 000 for `sat`, otherwise all (0).
    data_path: local files or a folder to read a dataset of `NAMES` from, instead of the hub.
    image_folder: where image paths (and VSR's file names) start, instead of beside the file.
    """
    if split not in ("train", *EVAL_WORDS):
        raise ValueError(f"unknown split {split!r}; valid splits: train, {', '.join(EVAL_WORDS)}")
    name, split = str(name), "train" if split == "train" else "eval"
    if name == "toy":
        import toy  # which imports this file

        return toy.ToyRows(split, seed, limit or (100_000 if split == "train" else 1_000))
    if name == "sat":  # upstream's recipe
        max_images = 1 if max_images is None else max_images
        subset = 15_000 if subset is None else subset

    paths, hold_out = _find(name, split, data_path)
    found = []
    for path in paths:
        file = (_read_parquet if path.suffix == ".parquet" else _read_lines)(path, subset or None)
        columns = file.column_names if isinstance(file, pa.Table) else sorted(set().union(*file))
        if len(file) and not {"question", "problem", "caption"}.intersection(columns):
            raise ValueError(f"{path}: no question, problem or caption in {', '.join(columns)}")
        folder = Path(image_folder or path.parent)
        found += [(file, place, folder, count) for place, count in enumerate(_image_counts(file))]
    most = max_images or math.inf
    index = [(n, *row) for n, row in enumerate(found[: subset or None]) if row[-1] <= most]
    if hold_out:
        cut = len(index) - min(200, len(index) // 20)
        index = index[:cut] if split == "train" else index[cut:] or index
    if not index:
        raise ValueError(f"empty dataset: no rows for {split} in {', '.join(map(str, paths))}")
    title = Path(name).absolute().stem
    return Rows(title, title if name in BENCHMARKS else f"{title}-{split}", index[:limit], seed)


def _find(name: str, split: str, data_path: Any) -> tuple[list[Path], bool]:
    """The files to read, and whether train and eval are slices of the same files."""
    repo, patterns = NAMES.get(name, (name, ALL))
    if data_path:
        paths = [data_path] if isinstance(data_path, str | Path) else data_path
    elif name not in NAMES and (Path(name).exists() or name.endswith((".parquet", ".jsonl"))):
        paths = [name]
    elif name in NAMES or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        paths = [_download(repo, patterns)]
    else:
        names = ", ".join(["toy", *NAMES])
        raise ValueError(f"unknown dataset {name!r}; valid: {names}, a hub id, a folder or a file")
    words = {}  # of each file's name, below the folder that was given
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        for file in sorted(f for pattern in patterns for f in path.rglob(pattern)) or [path]:
            if file.is_dir() or file.suffix not in (".parquet", ".jsonl"):
                raise ValueError(f"{path} is no .parquet or .jsonl, nor a folder with {patterns}")
            words[file] = re.findall("[a-z]+", str(file.relative_to(path)).lower())
    by_word = {word: [f for f in words if word in words[f]] for word in ("train", *EVAL_WORDS)}
    train = by_word["train"] or [f for f in words if set(EVAL_WORDS).isdisjoint(words[f])]
    held_out = next((by_word[word] for word in EVAL_WORDS if by_word[word]), [])
    if train and held_out and name not in BENCHMARKS:
        return (train if split == "train" else held_out), False
    return list(words), name not in BENCHMARKS


def _download(repo: str, patterns: Sequence[str]) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(repo, repo_type="dataset", allow_patterns=list(patterns))
    except Exception as error:  # of whichever HTTP library the hub's client is built on
        hint = "pass a local copy: --dataset path/to/file.parquet (for a benchmark, --data_path)"
        raise ValueError(f"cannot get {repo} from the hub ({_line(error)}); {hint}") from error


# --- the order of a run --------------------------------------------------------------------------


class Feed:
    """`feed[position]`: the row that a run's prompt number `position` asks about.

    Each epoch is a permutation of the rows, fixed by (seed, epoch) alone: the same in a resumed run
    and in any process. A row that raises `BadRow`, as it is decoded or in `check(row)`, gives its
    place to the next one in the permutation.
    """

    def __init__(self, rows: Sequence[dict], seed: int, check: Callable | None = None):
        self.rows, self.seed, self.check = rows, seed, check
        self.skipped: dict[str, str] = {}  # id -> reason, of the bad rows met so far
        self._bad: set[int] = set()
        self._order: tuple[int, list[int]] = (-1, [])  # of the epoch last asked for

    def __getitem__(self, position: int) -> dict:
        epoch, start = divmod(position, len(self.rows))
        of, order = self._order
        if of != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.rows), generator=generator).tolist()
            self._order = (epoch, order)
        for offset in range(len(order)):
            i = order[(start + offset) % len(order)]
            if i in self._bad:
                continue
            try:
                row = self.rows[i]
                if self.check:
                    self.check(row)
                return row
            except BadRow as bad:
                self._bad.add(i)
                self.skipped[bad.id] = bad.reason
        raise ValueError(f"no usable row in {len(self.rows)}: {self.report()}")

    def report(self) -> str | None:
        """One line on the rows left out so far, or None."""
        if not self.skipped:
            return None
        each = [f"{row_id} ({why})" for row_id, why in self.skipped.items()]
        shown = "; ".join(each[:3] + ["..."] * (len(each) > 3))
        return f"{len(each)} unusable rows skipped: {shown}"
