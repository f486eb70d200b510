"""The prompts of a run: its usable rows, in order, encoded ahead of time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from core import files
from core.options import StageOptions, TrainingOptions, UserError
from core.qwen import Processor, Prompt, locate_model
from data import DATASETS, BadRow, load_rows
from toy.world import ToyRows


def check_sources(options: StageOptions, model: str, data_path: Any = None) -> None:
    """Raise UserError if there is no such data or model, before either is downloaded."""
    if options.image_folder and not Path(options.image_folder).is_dir():
        raise UserError(f"argument --image_folder: there is no folder {options.image_folder}")
    if options.dataset != "toy":
        files.locate(options.dataset, DATASETS, data_path)
    locate_model(model, options.revision, ["config.json"])


def open_rows(
    options: TrainingOptions, checkpoint: Path | None = None
) -> tuple[Sequence[dict], Sequence[dict]]:
    """The training rows, and the held-out rows unless the run never evaluates."""
    check_sources(options, str(checkpoint or options.model))
    names = ("seed", "max_images", "subset", "image_folder")
    chosen = {name: getattr(options, name) for name in names} | {"revision": options.data_revision}
    train = load_rows(options.dataset, "train", **chosen)
    if not options.eval_steps:
        return train, []
    return train, load_rows(options.dataset, "eval", limit=options.eval_rows, **chosen)


def find_bad_rows(
    rows: Sequence[dict], check: Callable[[dict], Any] = lambda row: None
) -> dict[int, str]:
    """Read and check every row: index -> "id: reason" of each `BadRow`.

    Each process reads a share of the rows. The rows of the toy world need no check.
    """

    def reason(i: int) -> str | None:
        try:
            check(rows[i])
        except BadRow as bad:
            return str(bad)

    state, size = PartialState(), 0 if isinstance(rows, ToyRows) else len(rows)
    own = range(state.process_index, size, state.num_processes)
    with ThreadPoolExecutor() as pool:
        reasons = tqdm(pool.map(reason, own), "checking rows", len(own), delay=2)
        bad = [(i, why) for i, why in zip(own, reasons, strict=True) if why]
    return dict(sorted(gather_object(bad)))


def skipped_report(reasons: Sequence[str]) -> str | None:
    """One line on the rows that a run leaves out, or None."""
    shown = "; ".join([*reasons[:3]] + ["..."] * (len(reasons) > 3))
    return f"{len(reasons)} unusable rows skipped: {shown}" if reasons else None


class Prompts:
    """The prompts of a run: `of_rollout` in training, and this process's share of `held_out`.

    Each epoch is a permutation of the usable rows, fixed by (seed, epoch) alone: it is the same in
    a resumed run and in every process.
    """

    def __init__(
        self,
        rows: tuple[Sequence[dict], Sequence[dict]],
        options: TrainingOptions,
        processor: Processor,
        size: int,
        style: str | None = None,
        check: Callable[[dict], Any] = lambda row: None,
    ):
        """Check every row, then encode the held-out ones. `size` is the prompts of a rollout.

        `style` is what `--prompt_style auto` means here; default: the model's. `check(row)` may
        raise BadRow for what a stage cannot use. Raises UserError if no row is left.
        """
        (self.rows, held_out), self.processor = rows, processor
        self.seed, self.size, most = options.seed, size, options.max_prompt_length
        self.style = style or processor.default_style
        if options.prompt_style != "auto":
            self.style = options.prompt_style

        def check_row(row: dict) -> None:
            if (length := processor.prompt_length(row, self.style)) > most:
                raise BadRow(row["id"], f"its prompt has {length} tokens, the limit is {most}")
            check(row)

        bad, unfit = find_bad_rows(self.rows, check_row), find_bad_rows(held_out, check_row)
        self.usable = [i for i in range(len(self.rows)) if i not in bad]
        if not self.usable:
            raise UserError(f"no usable row in {len(self.rows)}: {skipped_report([*bad.values()])}")
        self.skipped = skipped_report([*bad.values(), *unfit.values()])  # one line, or None
        usable, state = [i for i in range(len(held_out)) if i not in unfit], PartialState()
        if held_out and not usable:
            raise UserError(f"no held-out row can be used: {skipped_report([*unfit.values()])}")
        own = usable[state.process_index :: state.num_processes]
        self.held_out = [processor.prompt(held_out[i], self.style) for i in own]
        # One OpenMP thread: a second team would slow down every operation of the main thread.
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.ahead = {}

    def __getitem__(self, position: int) -> Prompt:
        """The run's prompt at this position."""
        epoch, place = divmod(position, len(self.usable))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.usable), generator=generator)
        return self.processor.prompt(self.rows[self.usable[order[place]]], self.style)

    def of_rollout(self, number: int, places: Sequence[int]) -> list[Prompt]:
        """The prompts at these places of a rollout. A thread prepares those of the next one."""

        def make(number: int) -> list[Prompt]:
            return [self[number * self.size + place] for place in places]

        now = self.ahead.pop(number, None) or self.thread.submit(make, number)
        self.ahead = {number + 1: self.thread.submit(make, number + 1)}
        return now.result()
