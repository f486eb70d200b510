"""Reward functions by name, the user's own among them."""

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from core.options import UserError
from rewards import REWARDS


def load_rewards(names: Sequence[str]) -> dict[str, Callable[[str, dict], float]]:
    """Reward functions by name. `path/to/file.py:function` is a user's own."""
    functions = {}
    for name in names:
        if name in functions:
            raise UserError(f"argument --rewards: {name} is given twice; see --reward_weights")
        path, _, function = name.rpartition(":")
        if name in REWARDS:
            functions[name] = REWARDS[name]
            continue
        if not path.endswith(".py"):
            valid = f"{', '.join(REWARDS)} or path/to/file.py:function"
            raise UserError(f"argument --rewards: unknown reward {name}. Valid: {valid}")
        if not Path(path).exists():
            raise UserError(f"argument --rewards: there is no file {path}")
        sys.path.append(str(Path(path).parent.absolute()))  # it may import a file beside it
        functions[name] = runpy.run_path(path).get(function)
        if not callable(functions[name]):
            raise UserError(f"argument --rewards: {path} has no function {function}")
    return functions
