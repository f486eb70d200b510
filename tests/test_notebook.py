"""The notebook runs as it is, and a run whose answers are all wrong says where to read on."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from launch import ENV, read_lines
from PIL import Image

from core.logs import is_stuck

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = "docs/demo.ipynb"


def copy_of_repository(folder: Path) -> Path:
    """The stages and what they need, as somebody has them who cloned the repository."""
    for name in ("core", "toy", "assets", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def code_of(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def test_the_notebook_trains_and_draws_its_picture(tmp_path):
    """Its code cells one after the other, with few updates, from the folder that it lies in."""
    folder = copy_of_repository(tmp_path)
    code = code_of(folder / NOTEBOOK)
    code, changed = re.subn(r"^UPDATES = 230$", "UPDATES = 2", code, flags=re.MULTILINE)
    code, also = re.subn(r"^FLAGS = \[", 'FLAGS = ["--eval_rows", "8", ', code, flags=re.MULTILINE)
    assert changed == also == 1
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder / "docs", env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "outputs/notebook"
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [0, 1, 2]
    assert Image.open(run / "report.png").width > 300
    question = read_lines(run / "rollouts.jsonl")[0]["question"]
    assert re.search(rf"^{re.escape(question)} \[.*right: ", done.stdout, re.MULTILINE)


def test_the_notebook_holds_no_outputs_of_an_earlier_run():
    cells = json.loads((ROOT / NOTEBOOK).read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def updates(number: int, accuracy: float, form: float) -> list[dict]:
    return [{"rewards/accuracy": accuracy, "rewards/format": form}] * number


def test_a_run_is_stuck_if_twenty_updates_have_the_format_and_hardly_a_right_answer():
    assert is_stuck(updates(20, 0.01, 0.6))
    assert not is_stuck(updates(19, 0.01, 0.6))  # too early to say
    assert not is_stuck(updates(20, 0.03, 0.6))  # it learns
    assert not is_stuck(updates(20, 0.01, 0.4))  # the format comes first
    assert not is_stuck(updates(20, 0.01, 0.6)[1:] + [{"eval/accuracy": 0.0}])
    assert not is_stuck([{"loss": 1.0}] * 20)  # sft.py has no rewards
