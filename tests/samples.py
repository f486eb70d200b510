"""Small datasets on disk, for the tests of data.py and core/files.py."""

import io
import json

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


@pytest.fixture
def home(tmp_path_factory, monkeypatch):
    """The hub is offline and empty. Converted files go to a folder of the test's own."""
    import datasets.config

    home = tmp_path_factory.mktemp("hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return home


def encode(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(color="red", size=(30, 20)):
    return encode(Image.new("RGB", size, color))


def write(path, rows):
    """Rows as .parquet, or as .jsonl for a path that ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def plain(n, **more):
    return {"question": f"Question {n}?", "answer": "yes", "image": png()} | more


def sat(n, images=1, answers=("left", "right")):
    row = {"image_bytes": [png()] * images, "question": f"Question {n}?", "answers": list(answers)}
    return row | {"question_type": "other", "correct_answer": answers[0]}
