"""Do two-process runs end? Starts one after the other and counts exit codes and hangs.

    python benchmarks/runs_end.py               # 40 runs, about 20 minutes on two cores
    python benchmarks/runs_end.py --runs 3

Every run is `accelerate launch --config_file configs/ddp.yaml --num_processes 2 grpo.py` with two
updates of the toy model on the CPU. Another job keeps the machine busy, because a hang at the end
depends on timing. A run that is not over after --timeout seconds counts as hung and is killed.
Exits with code 0 if every run did.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--max_steps 2 --prompts_per_update 2 --num_generations 2 --max_completion_length 8 "
    "--eval_steps 0 --save_steps 0 --overwrite"
).split()
ENV = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",  # seconds that the launcher waits for hung workers
}
LOAD = "while True: sum(range(10**6))"


def run_once(folder: Path, timeout: float) -> tuple[str, float, str]:
    """The exit code or `hung`, the seconds, and the end of the output of one run."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", "configs/ddp.yaml", "--num_processes", "2", "grpo.py", *FLAGS]
    log, began = folder / "log", time.monotonic()
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*launch, "--output_dir", str(folder / "run")],
            cwd=ROOT,
            env=os.environ | ENV,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            result = f"exit code {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            result = "hung"
            process.terminate()  # the launcher then kills its workers
            process.wait()
    return result, time.monotonic() - began, log.read_text()[-1000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--timeout", type=float, default=180, help="Seconds before a run is hung")
    parser.add_argument("--load", type=int, default=2, help="Processes that keep the machine busy")
    options = parser.parse_args()
    results: Counter[str] = Counter()
    load = [subprocess.Popen([sys.executable, "-c", LOAD]) for _ in range(options.load)]
    try:
        for number in range(1, options.runs + 1):
            with tempfile.TemporaryDirectory() as folder:
                result, seconds, output = run_once(Path(folder), options.timeout)
            results[result] += 1
            print(f"run {number}: {result}, {seconds:.0f} s", flush=True)
            if result != "exit code 0":
                print(output, flush=True)
    finally:
        for process in load:
            process.kill()
    print(", ".join(f"{count} x {result}" for result, count in results.items()))
    sys.exit(results["exit code 0"] != options.runs)


if __name__ == "__main__":
    main()
