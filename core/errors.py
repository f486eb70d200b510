"""The one kind of error that a user can cause, and how it is printed."""

import os
import signal
import sys
import time


class UserError(Exception):
    """A mistake that a user can make. The message says what is wrong, where, and what to do."""


def complain(line: str) -> None:
    """Print a one-line error. Other ranks wait, so that rank 0's message comes first."""
    if rank := int(os.environ.get("RANK", 0)):
        line = f"rank {rank}: {line}"
        wait_for_launcher(5)
    print(" ".join(line.split()), file=sys.stderr, flush=True)


def wait_for_launcher(seconds: float) -> None:
    """Give the launcher time to end this process because another one has failed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)
