"""The files of a dataset: find them on disk or on the hub, read their rows, decode their images."""

import difflib
import io
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.features import check as pillow_reads

from core.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ALL = ("*.parquet", "*.jsonl")
HELD_OUT = re.compile(  # a word in a path that says that the file is held out
    "(?:mini)?(?:val(?:id(?:at(?:ion|e))?)?|dev(?:elopment)?|eval(?:uat(?:ion|e))?|test(?:ing)?"
    "|(?:hold|held)(?:out)?)(?:mini|dev|test|std|set|data|dataset|cases|split|[a-z])?"
)
TRAIN = re.compile("train(?:ing)?(?:set|data|dataset|split)?")


def locate(
    name: str, known: dict[str, tuple], data_path: Any = None
) -> tuple[list[Path], str, Sequence[str]]:
    """A dataset's local paths, its hub repository if there are none, and the patterns of its files.

    `known` has the hub repository and the files of each dataset that has a short name.
    """
    repo, patterns = known.get(name, (name, ALL))
    paths = [data_path] if isinstance(data_path, str | Path) else data_path or []
    if not paths and repo == name and (os.path.exists(name) or any(map(Path(name).match, ALL))):
        paths = [name]
    for path in paths:
        if not Path(path).exists():
            raise UserError(f"{path} does not exist")
    if not paths and not HUB_ID.fullmatch(repo):
        near = difflib.get_close_matches(name, ["toy", *known], 1) or ["toy", *known]
        raise UserError(
            f"{name or repr(name)} is no dataset, folder or file; did you mean {', '.join(near)}?"
        )
    return [Path(path) for path in paths], repo, patterns


def download(repo: str, kind: str, patterns: Sequence[str], revision: str | None) -> Path:
    """The files of a `model` or `dataset` on the hub. The folder's name is the commit."""
    chosen = {"repo_type": kind, "allow_patterns": list(patterns), "revision": revision}
    try:
        return Path(huggingface_hub.snapshot_download(repo, **chosen))
    except Exception as error:  # the hub's client raises the errors of several HTTP libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = f"pass a local copy: --{kind} path/to/folder"
        hint += " (for a benchmark, --data_path)" if kind == "dataset" else ""
        raise UserError(f"cannot get {kind} {repo} from the hub ({reason}); {hint}") from error


def split_files(
    sources: Sequence[Path], patterns: Sequence[str], split: str
) -> tuple[list[Path], bool]:
    """The files of a split, and whether they also have to serve the other split.

    A word in a path below its source says the split: one of `HELD_OUT`, else `train`. Files
    without such a word are for training if there is no train file, and are not read otherwise. Of
    several held-out words one is read: validation before test, a small part before the whole.
    Hidden folders are skipped. Only the least deep folder with files of a split is read: a deeper
    one may hold an old copy. A file that is itself a source counts as a file without a word.
    """
    # kind -> [(depth, file)]; a kind is "train", "" or the rank of a held-out word
    found: dict[Any, list[tuple[int, Path]]] = {}
    for source in sources:
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            name = "" if file == source else f"/{file.relative_to(source)}".lower()
            if "/." not in name and any(map(file.match, patterns if name else ALL)):
                words = re.findall("[a-z]+", name)
                said = filter(HELD_OUT.fullmatch, words)
                ranks = [("test" in w, w[:3] == "dev", "mini" not in w, w) for w in said]
                train = "train" if any(map(TRAIN.fullmatch, words)) else ""
                found.setdefault(min(ranks, default=train), []).append((name.count("/"), file))
    for kind, files in found.items():
        found[kind] = [file for depth, file in files if depth == min(files)[0]]
    train = found.pop("train", found.get(""))
    found.pop("", None)
    held_out = found[min(found)] if found else None
    files = held_out if held_out and split == "eval" else train
    if not files:
        only = f", only {held_out[0]}" if held_out else ""
        raise UserError(f"no {' or '.join(patterns)} for {split} in {sources[0]}{only}")
    return files, not held_out


# --- rows ----------------------------------------------------------------------------------------


def read_rows(paths: Sequence[Path], most: int | None, max_images: int | None) -> Sequence[dict]:
    """The first `most` rows, without those of more than `max_images`, as {place, path, record}.

    Parquet is compressed by row group, and SAT's is one group of 5 GB: to read one row, all of it
    must be read. So it is streamed once into the cache of `datasets`, which reads single rows.
    """
    # Tuples, because `datasets` splits lists into shards. Its cache compares all arguments, so that
    # a file that changed is read again.
    versions = tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    arguments = {"paths": tuple(str(path.absolute()) for path in paths), "versions": versions}
    arguments |= {"most": most, "max_images": max_images}
    names = ", ".join(arguments["paths"])
    if next(_stream(**arguments), None) is None:
        raise UserError(f"no rows in {names}")
    if all(path.suffix == ".jsonl" for path in paths):
        return list(_stream(**arguments))
    from datasets import Dataset, Features, Value  # takes a second, which the toy can save
    from datasets.exceptions import DatasetGenerationError

    try:
        schema = pa.unify_schemas(map(pq.read_schema, paths), promote_options="permissive")
        columns = Features.from_arrow_schema(schema.remove_metadata())  # images stay bytes
        features = Features(place=Value("int64"), path=Value("string"), record=columns)
        return Dataset.from_generator(_stream, features, gen_kwargs=arguments, writer_batch_size=32)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"cannot read {names}: {error}") from error
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _stream(paths: tuple, most: int | None, max_images: int | None, versions: tuple) -> Iterator:
    place = 0
    for path in paths:
        start = place
        try:
            for record in itertools.islice(_records(path), most and most - place):
                if max_images is None or len(encoded_images(record)) <= max_images:
                    yield {"place": place, "path": path, "record": record}
                place += 1
        except (OSError, ValueError, TypeError, RecursionError, pa.ArrowException) as error:
            raise UserError(f"cannot read {path}, row {place - start}: {error}") from error


def _records(path: str) -> Iterator[dict]:
    if path.endswith(".parquet"):
        # With a buffer and without pre-buffering, or a whole column is fetched at once.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            for batch in file.iter_batches(32):
                yield from batch.to_pylist()
    else:
        with open(path, encoding="utf-8-sig") as lines:
            yield from ({**json.loads(line)} for line in lines if line.strip())


# --- images --------------------------------------------------------------------------------------

IMAGE_COLUMNS = "images image_bytes decoded_image image image_path image_paths img".split()
IMAGE_COLUMNS += ["file_name"]  # of an image folder's metadata.jsonl
NUMBERED_IMAGE = re.compile(r"im(?:age|g)_?\d+", re.IGNORECASE)
LIKELY_IMAGE = r"(?i)(\w+_)?(image|img|picture|photo|jpg)s?(\w*(path|url|link|list|id|name|file))?"
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]  # not EPS, which runs a program
FORMATS += ["AVIF"] if pillow_reads("avif") else []
Image.MAX_IMAGE_PIXELS = 25_000_000  # Pillow refuses twice as many before it decodes anything
warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on large images and odd EXIF


def encoded_images(record: dict) -> list:
    """The images of the first column that has any, or of image_1, image_2, …"""
    for column in IMAGE_COLUMNS:
        if (value := record.get(column)) not in (None, []):
            return value if isinstance(value, list) else [value]
    names = filter(NUMBERED_IMAGE.fullmatch, sorted(sorted(record), key=len))  # image_10 is last
    return [record[name] for name in names if record[name]]


def to_image(value: Any, folders: Sequence[Path] = ()) -> Image.Image:
    """Encoded bytes, `{bytes, path}`, a path inside `folders` or a PIL image, as an RGB image.

    Rotated as its EXIF says, on white where it was transparent, the first frame of an animation.
    Raises ValueError with the reason if it cannot be used.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, bytes | str | Image.Image):
        raise ValueError(f"an image has type {type(value).__name__} instead of bytes or a path")
    try:
        if isinstance(value, str):
            value = _path_inside(value, folders).read_bytes()
        if isinstance(value, bytes):
            value = Image.open(io.BytesIO(value), formats=FORMATS)
        if not min(value.size) or max(value.size) > 200 * min(value.size):  # Qwen's limit
            raise ValueError(f"empty or too thin, {value.width}x{value.height}")
        image = ImageOps.exif_transpose(value)
        if image.mode[0] in "IF":  # 16 bits, 32 bits or floats, which convert() would clip at 255
            # The file does not say which value is white, so the largest value has to: 1, or the
            # end of as many bits as it needs (12 in many sensors).
            pixels = np.nan_to_num(np.asarray(image, np.float64), posinf=0).clip(0, 65535)
            bits = max(8, int(pixels.max()).bit_length()) if pixels.max() >= 2 else 1
            image = Image.fromarray((pixels * 255 / (2**bits - 1)).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"an image is damaged or none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
        raise ValueError(f"an image cannot be read: {error!s}") from error


def _path_inside(value: str, folders: Sequence[Path]) -> Path:
    """The path in the first of `folders` that has it. The data must not lead out of the folders.

    Links inside them are followed: the files of a hub snapshot are links to another folder.
    """
    paths = [Path(os.path.abspath(folder / value)) for folder in folders]  # follows no link
    roots = [root for folder in folders for root in (folder.absolute(), folder.resolve())]
    inside = [p for p in paths if any(q.is_relative_to(r) for q in (p, p.resolve()) for r in roots)]
    if not inside:
        raise ValueError(f"path leads out of the dataset's folders: {value!r:.100}")
    return next(filter(Path.exists, inside), inside[0])
