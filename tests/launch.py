"""Starting the stages as a user does, in processes of their own, on a tiny random model."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
MANY_ENDS = list(range(100, 130))  # of 640 tokens: completions of very different lengths
NOT_REPEATED = ("seconds/", "tokens_per_second")
# rewards that a random model gets, a few updates that take no time
FLAGS = (
    "--rewards length --num_generations 4 --prompts_per_update 4 --max_completion_length 12 "
    "--learning_rate 1e-3 --eval_rows 4 --max_steps 6 --save_steps 2"
).split()


def tiny_checkpoint(folder: Path) -> str:
    from tiny import tiny_model

    model, processor = tiny_model("qwen2_vl")
    model.generation_config.eos_token_id = MANY_ENDS
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def metrics(folder: Path) -> list[dict]:
    """The run's metrics, without those that no two runs share."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in m.items() if not k.startswith(NOT_REPEATED)} for m in lines]


def launch(*words, processes: int = 1, config: str = "ddp", script="grpo.py", **env) -> str:
    """`accelerate launch` with a file of configs/; returns what it printed, and it must succeed."""
    done = subprocess.run(
        launch_command(*words, processes=processes, config=config, script=script),
        cwd=ROOT, env=ENV | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def launch_command(*words, processes=1, config="ddp", script="grpo.py", more=()) -> list[str]:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    file = ["--config_file", f"configs/{config}.yaml", "--num_processes", str(processes), *more]
    return [*accelerate, *file, script, *map(str, words)]


# --- single processes, forked from one that has done the imports ---------------------------------


def _stage(name: str, words: list[str], log: str, patch) -> None:
    """What `python <name>.py <words>` does, after `patch(stage)`."""
    import importlib

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = [f"{name}.py", *words]
    stage = importlib.import_module(name)
    try:
        if patch:
            patch(stage)
        stage.main()
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


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
    """`python grpo.py …` to its end; returns what it printed, and it must succeed."""
    code, output = Stage(*words, output_dir=output_dir, **more).wait()
    assert code == 0, output
    return output
