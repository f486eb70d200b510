"""From a dataset to the prompts of a run: usable rows, in order, encoded ahead of time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from accelerate import Accelerator
from accelerate.utils import gather_object

from core.options import TrainingOptions, UserError
from core.qwen import Processor, Prompt
from data import BadRow, Feed, find_bad_rows, load_rows, skipped_report
from toy.world import ToyRows


def open_rows(options: TrainingOptions) -> tuple[Sequence[dict], Sequence[dict]]:
    """The training rows, and the held-out rows unless the run never evaluates."""
    chosen = dict(
        seed=options.seed,
        max_images=options.max_images,
        subset=options.subset,
        image_folder=options.image_folder,
        revision=options.data_revision,
    )
    train = load_rows(options.dataset, "train", **chosen)
    if not options.eval_steps:
        return train, []
    return train, load_rows(options.dataset, "eval", limit=options.eval_rows, **chosen)


class Prompts:
    """The prompts of a run, and the rows that cannot be used."""

    def __init__(
        self, feed: Feed, size: int, held_out: list[Prompt], style: str, skipped: str | None
    ):
        self.feed = feed  # feed[position] is the prompt at this position of the run
        self.size = size  # prompts of a rollout, over all processes
        self.held_out = held_out  # this process's share
        self.style = style
        self.skipped = skipped  # one line, or None
        self.thread, self.ahead = ThreadPoolExecutor(1), {}

    def of_rollout(self, number: int, places: Sequence[int]) -> list[Prompt]:
        """The prompts at these places of a rollout. A thread prepares those of the next one."""

        def make(number: int) -> list[Prompt]:
            return [self.feed[number * self.size + place] for place in places]

        now = self.ahead.pop(number, None) or self.thread.submit(make, number)
        self.ahead = {number + 1: self.thread.submit(make, number + 1)}
        return now.result()


def load_prompts(
    rows: tuple[Sequence[dict], Sequence[dict]],
    options: TrainingOptions,
    processor: Processor,
    accelerator: Accelerator,
    size: int,
    style: str | None = None,
    check: Callable[[dict], None] = lambda row: None,
) -> Prompts:
    """Check every row, then encode the held-out ones. `size` is the prompts of a rollout.

    `style` is what `--prompt_style auto` means here; default: the model's. `check(row)` may raise
    BadRow for what a stage cannot use. Raises UserError if no row is left.
    """
    style = style or processor.default_style
    if options.prompt_style != "auto":
        style = options.prompt_style

    def check_row(row: dict) -> None:
        length, most = processor.prompt_length(row, style), options.max_prompt_length
        if length > most:
            raise BadRow(row["id"], f"its prompt has {length} tokens, the limit is {most}")
        check(row)

    def prepare(row: dict) -> Prompt:
        return processor.prompt(row, style)

    train, held_out = rows
    bad = [gather_bad_rows(part, check_row, accelerator) for part in rows]
    usable = [i for i in range(len(held_out)) if i not in bad[1]]
    if held_out and not usable:
        raise UserError(f"no held-out row can be used: {skipped_report(bad[1])}")
    own = usable[accelerator.process_index :: accelerator.num_processes]

    feed = Feed(train, options.seed, prepare, bad[0])
    both = bad[0] | {len(train) + place: reason for place, reason in bad[1].items()}
    encoded = [prepare(held_out[i]) for i in own]
    return Prompts(feed, size, encoded, style, skipped_report(both))


def gather_bad_rows(rows: Sequence[dict], check, accelerator: Accelerator) -> dict[int, str]:
    """Index -> reason of the rows that cannot be used. Each process checks a share of them."""
    if isinstance(rows, ToyRows):
        return {}
    own = range(accelerator.process_index, len(rows), accelerator.num_processes)
    bad = {}
    for part in gather_object([find_bad_rows(rows, check, own)]):
        bad |= part
    return bad
