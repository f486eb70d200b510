"""Resident memory and open files of a long `grpo.py` run, watched from outside.

    python benchmarks/soak.py    # 2000 toy updates with evaluations and checkpoints

It passes if resident memory grows by less than 1 MB per 100 updates after the first 100, and if the
number of open files does not grow. Needs Linux, because it reads /proc.
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
SETTLED = 100  # updates until caches and buffers have reached their size
LIMIT = 1.0  # MB per 100 updates


def updates_of(folder: Path) -> int:
    """Updates that the run has logged, without its step 0."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") - 1 if file.exists() else -1


def watch(process: subprocess.Popen, folder: Path) -> list[tuple[int, float, int]]:
    """(update, resident MB, open files) of the updates that polling notices."""
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
    parser.add_argument("--write", action="store_true", help="Write the table into README.md")
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
    # Medians, because a checkpoint or a log may be open at the moment of looking.
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
    raw = [{"update": s, "MB": round(r, 1), "files": f} for s, r, f in seen[::20]]
    report("soak", [row], raw, options.write)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
