"""Start the stages as a user does, in processes of their own, on a tiny random model."""

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tiny import tiny_model

from core.processes import launch as launch_stage
from core.qwen import save_policy

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
MANY_ENDS = list(range(100, 130))  # of 640 tokens: completions of very different lengths
NOT_REPEATED = ("seconds/", "tokens_per_second")
# A reward that a random model earns, and a few updates that take no time.
FLAGS = (
    "--rewards length --num_generations 4 --prompts_per_update 4 --max_completion_length 12 "
    "--learning_rate 1e-3 --eval_rows 4 --max_steps 6 --save_steps 2"
).split()


def tiny_checkpoint(folder: Path) -> str:
    model, processor = tiny_model("qwen2_vl")
    model.generation_config.eos_token_id = MANY_ENDS
    save_policy(model, processor, folder)
    return str(folder)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder: Path) -> list[dict]:
    """The run's metrics, without those that measure time and differ in every run."""
    lines = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in m.items() if not k.startswith(NOT_REPEATED)} for m in lines]


# --- several processes, by the launcher ----------------------------------------------------------


def launch_command(*words, processes=1, config="ddp", script="grpo.py", more=()) -> list[str]:
    """`accelerate launch` with a file of configs/."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    file = ["--config_file", f"configs/{config}.yaml", "--num_processes", str(processes), *more]
    return [*accelerate, *file, script, *map(str, words)]


def start(*words, env: dict | None = None, **more) -> subprocess.Popen:
    """A launched command in a session of its own, so that a test can send it Ctrl-C."""
    return subprocess.Popen(
        launch_command(*words, **more), cwd=ROOT, env=ENV | (env or {}), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen, timeout: float = 180) -> tuple[int, str, str]:
    """Wait for a launched command: its exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def launch(*words, **more) -> str:
    """Launch a command that must succeed. Returns what it printed on stdout."""
    code, out, err = end(start(*words, **more))
    assert code == 0, out + err
    return out


# --- single processes, forked from one that has imported the stages ------------------------------


def _stage(name: str, words: list[str], log: str, patch) -> None:
    """What `python <name>.py <words>` does, after `patch(stage)`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = [f"{name}.py", *words]
    stage = importlib.import_module(name)
    if patch:
        patch(stage)
    launch_stage(stage.main)


class Stage:
    """A running `python grpo.py …`: `.wait()` for its exit code and output, `.kill(signal)`."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grpo", "sft"])

    def __init__(self, *words, output_dir: Path, stage: str = "grpo", patch=None):
        words = [*map(str, words), "--output_dir", str(output_dir)]
        self.log = Path(f"{output_dir}.log")
        self.log.touch()
        os.environ.update(ENV)
        arguments = (stage, words, str(self.log), patch)
        self.process = self.context.Process(target=_stage, args=arguments)
        self.process.start()

    def wait(self, timeout: float = 120) -> tuple[int, str]:
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running: {self.log.read_text()}")
        return self.process.exitcode, self.log.read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid, number)

    def wait_until(self, condition, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.is_alive() and time.monotonic() < end, self.log.read_text()
            time.sleep(0.002)


def run(*words, output_dir: Path, **more) -> str:
    """`python grpo.py …`, which must succeed. Returns what it printed."""
    code, output = Stage(*words, output_dir=output_dir, **more).wait()
    assert code == 0, output
    return output
