"""A long run watched from outside: resident memory and open files of `grpo.py` over its updates.

    python benchmarks/soak.py    # 2000 toy updates, with evaluations and checkpoints: minutes

Passes when resident memory grows by less than 1 MB per 100 updates after the first 100, and the
number of open files, at the same point of an update, does not grow. Needs Linux (it reads /proc).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, report

FLAGS = (
    "--prompts_per_update 4 --num_generations 4 --max_completion_length 48 --eval_rows 16 "
    "--eval_steps 100 --save_steps 100 --learning_rate 1e-5"
).split()
SETTLED = 100  # updates until caches and buffers have their size
LIMIT = 1.0  # MB per 100 updates


def updates_of(folder: Path) -> int:
    """Updates that the run has logged; its step 0 is none."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") - 1 if file.exists() else -1


def watch(process: subprocess.Popen, folder: Path) -> list[tuple[int, float, int]]:
    """(update, resident MB, open files), for every update that can be caught."""
    seen, proc = [], Path(f"/proc/{process.pid}")
    while process.poll() is None:
        update = updates_of(folder)
        if update > (seen[-1][0] if seen else 0):
            try:
                status = (proc / "status").read_text()
                files = len(list((proc / "fd").iterdir()))
            except OSError:
                break
            resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
            seen.append((update, int(resident.split()[1]) / 1024, files))
        time.sleep(0.05)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--model", default="toy")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = ["--model", options.model, "--max_steps", str(options.updates)]
        command = [sys.executable, "grpo.py", *words, *FLAGS, "--output_dir", f"{folder}/run"]
        with open(f"{folder}/log", "w") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            seen = watch(process, Path(folder) / "run")
        if process.returncode:
            sys.exit(Path(f"{folder}/log").read_text()[-2000:])

    settled = [s for s in seen if s[0] > SETTLED]
    steps, resident, files = zip(*settled, strict=True)
    slope = 100 * statistics.linear_regression(steps, resident).slope
    # a checkpoint or a log that happens to be open while we look makes a moment, not a trend
    tenth = max(1, len(files) // 10)
    first, last = (statistics.median(part) for part in (files[:tenth], files[-tenth:]))
    passed = slope < LIMIT and last <= first
    row = {
        "updates": options.updates,
        "resident after 100, MB": f"{resident[0]:.0f}",
        "at the end, MB": f"{resident[-1]:.0f}",
        "MB per 100 updates": f"{slope:.2f}",
        "open files, start": int(first),
        "open files, end": int(last),
        "passed": passed,
    }
    report("soak", [row], [{"update": s, "MB": round(r, 1), "files": f} for s, r, f in seen[::20]])
    sys.exit(not passed)


if __name__ == "__main__":
    main()
