"""The commands of the README, as a user types them."""

import json
import subprocess
import sys

from launch import ENV, ROOT, launch, metrics


def python(*words) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=ENV, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_model_is_trained_shown_and_evaluated_by_three_commands(tmp_path):
    run, short = tmp_path / "demo", "--max_steps 2 --prompts_per_update 2 --eval_rows 4"
    output = launch(*short.split(), "--output_dir", run, config="single")
    assert "recipe toy: the dataset is toy" in output
    assert "held-out accuracy" in output and f"saved in {run}" in output
    assert [m["step"] for m in metrics(run)] == [0, 1, 2]

    python("report.py", run, "--out", tmp_path / "page.html", "--png", tmp_path / "page.png")
    assert "demo" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")

    words = ["--model", run / "final", "--limit", 4, "--output_dir", tmp_path / "scores"]
    launch(*words, config="single", script="eval_cvbench.py")
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["n"] == 4
