"""Does Ctrl-C wait for a slow save? Two processes, with and without time from the launcher.

    python benchmarks/slow_save.py                  # saves that take 40 s, about four minutes
    python benchmarks/slow_save.py --seconds 10

Starts `accelerate launch --config_file configs/ddp.yaml --num_processes 2` with a `grpo.py` on the
CPU whose saves first sleep. Sends SIGINT to all processes, as a terminal does, and looks at what is
left. The launcher kills its processes 30 seconds after the signal, or after
TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds. Exits with code 0 if 600 seconds left a checkpoint that
loads and resumes.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--max_steps 50 --prompts_per_update 2 --num_generations 2 --max_completion_length 8 "
    "--eval_steps 0 --save_steps 0"
).split()
SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import core.checkpoint, core.processes, grpo

def save_policy(*rest, save_policy=core.checkpoint.save_policy):
    time.sleep({seconds})
    save_policy(*rest)

core.checkpoint.save_policy = save_policy
core.processes.launch(grpo.main)
"""
ENV = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def interrupt(folder: Path, seconds: float, timeout: int) -> tuple[int, float]:
    """Start a run, send SIGINT after its first update. Returns exit code and seconds it took."""
    script = folder / "grpo.py"
    script.write_text(SLOW.format(root=str(ROOT), seconds=seconds))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    launch += ["--config_file", "configs/ddp.yaml", "--num_processes", "2"]
    process = subprocess.Popen(
        [*launch, str(script), *FLAGS, "--output_dir", str(folder / "run")],
        cwd=ROOT,
        env=ENV | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(timeout)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log = folder / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_text()):
        if process.poll() is not None:
            sys.exit(f"the run ended before its first update, with code {process.returncode}")
        time.sleep(0.1)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    return process.wait(), time.monotonic() - began


def resumes(run: Path, checkpoint: Path) -> bool:
    """Whether plain transformers loads the checkpoint and one process goes one update further."""
    _, report = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    steps = str(int(checkpoint.name.split("-")[1]) + 1)
    words = ["--resume", "--output_dir", str(run), "--max_steps", steps]
    done = subprocess.run(
        [sys.executable, "grpo.py", *words], cwd=ROOT, env=ENV, text=True, capture_output=True
    )
    resumed = f"resuming from {checkpoint}" in done.stdout and done.returncode == 0
    return not report["missing_keys"] and resumed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40, help="Seconds that a save takes")
    options = parser.parse_args()
    disable_progress_bar()
    complete = {}
    for timeout in (600, 30):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            code, seconds = interrupt(Path(folder), options.seconds, timeout)
            saved = list(run.glob("checkpoint-*"))
            complete[timeout] = len(saved) == 1 and resumes(run, saved[0])
        left = "a complete checkpoint" if complete[timeout] else "no checkpoint"
        print(
            f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={timeout}: ended {seconds:.0f} s after SIGINT with "
            f"exit code {code}, {left}",
            flush=True,
        )
    sys.exit(not complete[600])


if __name__ == "__main__":
    main()
