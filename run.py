"""A run's folder and everything around the algorithm that both training stages share.

Options and recipes, start-up, metrics, held-out evaluation, checkpoints, resuming, interruption.
Every random draw of a run is a function of the seed and the step, so a checkpoint needs no random
state: weights, optimizer and step are enough to go on exactly.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import textwrap
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NoReturn

import accelerate
import huggingface_hub
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import HfArgumentParser

from data import BadRow, Feed, load_rows
from model import Policy, Processor, count_parameters, load_policy, save_policy
from rollout import sample


def flag(default, help: str):
    """A field of a config: its default and the text that `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class CommonConfig:
    model: str = flag("toy", "toy, toy-scratch (random weights), a hub id or a folder")
    dataset: str = flag("toy", "toy, sat, clevr, clevr-cot, geoqa, a hub id, a folder or a file")
    output_dir: str | None = flag(None, "the run's folder; default outputs/<stage>-<dataset>")
    resume: bool = flag(False, "go on from the newest checkpoint in the run's folder")
    overwrite: bool = flag(False, "delete the run that the folder holds and start again")
    seed: int = flag(0, "fixes the data order, the options' order and every sampled token")

    max_steps: int = flag(120, "updates")
    learning_rate: float = flag(3e-5, "peak learning rate of AdamW")
    lr_schedule: Literal["linear", "cosine", "constant"] = flag("linear", "after warm-up, to 0")
    warmup_ratio: float = flag(0.1, "share of the updates with a linearly rising learning rate")
    weight_decay: float = flag(0.0, "of AdamW")
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm")
    freeze: Literal["none", "vision", "language"] = flag("none", "which part is not trained")
    gradient_checkpointing: bool = flag(False, "compute layers twice to save memory")
    precision: Literal["auto", "bf16", "fp32"] = flag(
        "auto", "of computing, over fp32 weights; auto: bf16 on a GPU, fp32 on a CPU"
    )

    prompt_style: Literal["auto", "base", "base-direct", "instruct"] = flag(
        "auto", "auto: instruct for a model that ends its turn with <|im_end|>, else base"
    )
    max_prompt_length: int = flag(1024, "tokens; a longer prompt is skipped and named at the end")
    max_pixels: int = flag(401_408, "an image is scaled down to this; 784 make a visual token")
    max_images: int | None = flag(None, "skip rows with more images; default 1 for sat")
    subset: int | None = flag(None, "use the dataset's first rows only; default 15000 for sat")

    eval_steps: int = flag(10, "updates between held-out evaluations, also at both ends; 0: never")
    eval_rows: int = flag(200, "held-out questions")
    save_steps: int = flag(40, "checkpoint every so many updates; 0: only the final model")
    save_total_limit: int = flag(2, "checkpoints kept; 0 keeps all")
    log_with: str | None = flag(None, "a tracker of accelerate's: tensorboard, wandb, …")

    counts: ClassVar[str] = "max_steps eval_rows max_prompt_length max_pixels"

    def problem(self) -> str | None:
        """What is wrong with the values, if anything, in one line."""
        for name in self.counts.split():
            if getattr(self, name) < 1:
                return f"argument --{name}: must be at least 1, not {getattr(self, name)}"
        if self.seed < 0:
            return f"argument --seed: must be at least 0, not {self.seed}"
        return None


EVAL_BATCH = 64  # held-out rows decoded together
EVAL_LOGGED, EVAL_TRACKED = 8, 4  # those written to rollouts.jsonl; those shown in a tracker
PATIENCE = 5  # updates in a row with a non-finite loss or gradient before the run is stopped
WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)


# --- options -------------------------------------------------------------------------------------


class _Parser(HfArgumentParser):
    def error(self, message: str):
        """One line; an unknown option is answered with the nearest valid ones and all of them."""
        spelled = {o for action in self._actions for o in action.option_strings}
        valid = sorted(o for o in spelled if o.startswith("--") and "-" not in o[2:])
        if "unrecognized" in message:
            unknown = next((w for w in message.split() if w.startswith("--")), "").split("=")[0]
            near = difflib.get_close_matches("--" + unknown[2:].replace("-", "_"), valid, 3)
            message += f"; did you mean {' or '.join(near)}?" if near else ""
            message += f" valid: {' '.join(valid)}"
        complain(f"{self.prog}: error: {message}")
        sys.exit(2)


def parse_config(config_class: type, paper_recipe: dict, argv: list[str] | None = None):
    """The stage's config from the command line.

    With the toy model or the toy dataset the class's own defaults hold; with anything else the
    paper's. With --resume, what the run was started with. A flag given by hand always wins.
    """
    parser = _Parser(config_class, allow_abbrev=False)
    first = parser.parse_args(argv)
    words = {w.split("=")[0].lstrip("-").replace("-", "_") for w in argv or sys.argv[1:]}
    if first.dataset != "toy" and not ("model" in words and first.model.startswith("toy")):
        parser.set_defaults(**{k: v for k, v in paper_recipe.items() if k not in words})
    stage = Path(parser.prog).stem
    default_folder = f"outputs/{stage}-{Path(first.dataset).stem}"
    saved = Path(first.output_dir or default_folder) / "config.json"
    if first.resume and saved.exists():
        known = {f.name for f in dataclasses.fields(config_class)} - {"resume", "overwrite"}
        before = json.loads(saved.read_text())
        parser.set_defaults(**{k: v for k, v in before.items() if k in known})
    (config,) = parser.parse_args_into_dataclasses(argv)
    config.output_dir = config.output_dir or default_folder
    if problem := config.problem():
        parser.error(problem)
    return config


def complain(line: str, wait: bool = False) -> None:
    """An error in one line, said once: the other processes leave it to the first, for a while.

    The launcher ends all processes when one has failed, so what they would say is not heard.
    """
    if rank := int(os.environ.get("RANK", 0)):
        line = f"rank {rank}: {line}"
    if rank or wait:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print(" ".join(line.split()), file=sys.stderr, flush=True)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """What a user can get wrong ends in one line and exit code 1, not in a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        complain(f"{Path(sys.argv[0]).name}: error: {error}")
        sys.exit(1)


def learning_rate(config: CommonConfig, step: int) -> float:
    """The learning rate of update `step`, counted from 0."""
    warmup = int(config.warmup_ratio * config.max_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.max_steps - warmup)
    decay = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    return config.learning_rate * decay[config.lr_schedule]


# --- data on its way to the model ---


def to_device(inputs: dict[str, Tensor], device) -> dict[str, Tensor]:
    return {key: value.to(device, non_blocking=True) for key, value in inputs.items()}


def prefetched(make: Callable[[int], object], steps: range) -> Iterator[tuple[int, object]]:
    """(step, make(step)) for every step, each made in a thread while the step before is used."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for step in steps:
            now = ahead or pool.submit(make, step)
            ahead = pool.submit(make, step + 1) if step + 1 < steps.stop else None
            yield step, now.result()


def open_rows(config: CommonConfig) -> tuple[Sequence[dict], Sequence[dict]]:
    """The training and the held-out rows; raises ValueError where there are none."""
    chosen = dict(max_images=config.max_images, subset=config.subset)
    train = load_rows(config.dataset, "train", config.seed, **chosen)
    if not config.eval_steps:
        return train, []
    return train, load_rows(config.dataset, "eval", config.seed, config.eval_rows, **chosen)


def load_data(rows, config: CommonConfig, processor: Processor, style: str, accelerator):
    """The training feed and this process's share of the held-out rows, encoded."""
    train, held_out = rows

    def encode(row: dict) -> None:
        row.update(processor.prepare(row, style, config.max_prompt_length))

    feed = Feed(train, config.seed, encode)
    feed[0]  # at least one row can be used, or this says why not
    own = []
    for i in range(accelerator.process_index, len(held_out), accelerator.num_processes):
        with contextlib.suppress(BadRow):
            row = held_out[i]
            encode(row)
            own.append(row)
    return feed, own


def per_process(config: CommonConfig, name: str, accelerator: Accelerator) -> int:
    """This process's share of a count over all processes; ValueError when it does not divide."""
    share, rest = divmod(getattr(config, name), accelerator.num_processes)
    if rest:
        raise ValueError(
            f"--{name} must be a multiple of the {accelerator.num_processes} processes"
        )
    return share


def rollout_record(
    row: dict, completions: list[str], rewards: dict, step: int, split: str = "train", **more
) -> dict:
    """A sampled group as a line of rollouts.jsonl; its images become references when written."""
    keys = ("id", "task", "question", "options", "answer", "images", "prompt_text")
    about = {key.removesuffix("_text"): row[key] for key in keys}
    group = {"completions": completions, "rewards": rewards, **more}
    return {"step": step, "split": split, **about, **group}


# --- a run ---------------------------------------------------------------------------------------


def start_accelerator(config: CommonConfig) -> Accelerator:
    """bf16 over fp32 master weights on GPUs and fp32 on a CPU, unless `config.precision` is set.

    (`accelerate launch` always names a precision, "no" by default, so it is not asked.)
    Raises ValueError when the launcher started more processes than accelerate sees, and when the
    tracker asked for is unknown or not installed.
    """
    transformers.utils.logging.disable_progress_bar()  # one bar, the run's, and nothing scrolls
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()  # of its retries; what came of them is said
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*no supported trackers")  # is an error, below
    gpu = torch.accelerator.is_available()
    precision = getattr(config, "precision", "auto")
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" or (precision == "auto" and gpu) else "no",
        cpu=not gpu,
        log_with=config.log_with,
        project_dir=config.output_dir,
    )
    if not gpu and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards on GPUs only; FSDP2 itself runs on CPUs too, which is how it is tested
        state = accelerator.state
        state._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if config.log_with and not accelerator.log_with:  # accelerate leaves it out without a word
        raise ValueError(f"--log_with {config.log_with} is not installed: pip install it first")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched but accelerate runs {accelerator.num_processes}; "
            "the README's section on more than one GPU has the launch lines that work"
        )
    return accelerator


class Run:
    """The folder of a run: config, metrics, rollouts, checkpoints. Only the first process writes.

    Raises ValueError when the folder holds a run and neither --resume nor --overwrite was given.
    Nothing is written before `announce`, so what fails on the way there leaves no trace.
    """

    def __init__(self, config: CommonConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.main = accelerator.is_main_process
        self.folder = Path(config.output_dir)
        self.bar = tqdm(disable=True)
        self.stop_signal: int | None = None
        self.save_due = False
        self.faults = 0  # updates skipped in a row
        if (self.folder / "config.json").exists() and not (config.resume or config.overwrite):
            raise ValueError(
                f"{self.folder} already holds a run: --resume goes on with it, --overwrite "
                "deletes it, --output_dir names another folder"
            )
        # the first process decides for all, who may see another state of the folder
        newest = [self._newest_whole() if config.resume and self.main else None]
        self.checkpoint: Path | None = broadcast_object_list(newest)[0]
        if self.checkpoint and not self.checkpoint.exists():
            raise ValueError(
                f"{self.checkpoint} cannot be read from here: the run's folder must be on storage "
                "that all machines share"
            )
        self.start_step = step_of(self.checkpoint) if self.checkpoint else 0
        self._traceback, sys.excepthook = sys.excepthook, self._last_words

    def announce(self, model, **more) -> None:
        """Open the folder, and print once what is trained, how, where and from what on."""
        config, accelerator = self.config, self.accelerator
        if config.resume and self._is_complete():
            if self.main:
                print(f"{self.folder} is complete: all {config.max_steps} updates are done")
            sys.exit(0)
        accelerator.wait_for_everyone()  # all have looked before the first process changes anything
        if not self.main:
            return
        resolved = dataclasses.asdict(config) | more
        with user_errors():
            self._open_folder(resolved)
        if config.log_with:
            flat = {key: str(value) for key, value in resolved.items()}
            here = {"wandb": {"dir": str(self.folder)}}  # the others are told by project_dir
            accelerator.init_trackers(self.folder.name, config=flat, init_kwargs=here)
        width = max(len(key) for key in resolved)
        for key, value in resolved.items():
            print(f"  {key:<{width}}  {value}")
        for part, (trainable, frozen) in count_parameters(model).items():
            print(f"{part}: {trainable:,} parameters trained, {frozen:,} frozen")
        if self.checkpoint:
            print(f"resuming from {self.checkpoint}")
        elif config.resume:
            print(f"no checkpoint to resume from in {self.folder} yet: starting from the beginning")
        processes, precision = accelerator.num_processes, accelerator.mixed_precision
        device = accelerator.device
        print(f"device {device}, {processes} process(es), mixed precision: {precision}", flush=True)

    def _is_complete(self) -> bool:
        """Whether a run of `max_steps` updates has ended here."""
        if not (self.folder / "final").exists():
            return False
        logged = [logged_step(line) for line in open(self.folder / "metrics.jsonl")]
        return any(self.config.max_steps <= step < math.inf for step in logged)

    def _open_folder(self, resolved: dict) -> None:
        libraries = {lib.__name__: lib.__version__ for lib in (torch, transformers, accelerate)}
        about = {
            "processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "source": source_hash(),
            "versions": {"python": platform.python_version()} | libraries,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        doomed = list(self.folder.glob(".*.partial"))  # left by a process that was killed
        if self.config.overwrite and not self.config.resume:
            doomed += [*self.checkpoints(), *self.folder.glob("final"), *self.folder.glob("images")]
        for path in doomed:
            shutil.rmtree(path)
        write_whole(self.folder / "config.json", json.dumps(resolved | about, indent=2) + "\n")
        for path in (self.folder / "metrics.jsonl", self.folder / "rollouts.jsonl"):
            path.touch()  # a run that goes on forgets what came after the checkpoint
            kept = (line for line in path.open() if logged_step(line) <= self.start_step)
            write_whole(path, "".join(kept if self.checkpoint else []))

    def load_policy(self):
        """Model and processor: of the checkpoint that is resumed, or what was asked for."""
        config = self.config
        return load_policy(
            str(self.checkpoint or config.model),
            freeze=config.freeze,
            gradient_checkpointing=config.gradient_checkpointing,
            max_pixels=config.max_pixels,
            seed=config.seed,
        )

    def prepare(self, policy: Policy) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """Policy and AdamW on this process's device, wrapped and, on resuming, as they were."""
        config = self.config
        optimizer = torch.optim.AdamW(
            [p for p in policy.parameters() if p.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        policy, optimizer = self.accelerator.prepare(policy, optimizer)
        if self.checkpoint:
            state = load_training_state(self.checkpoint)
            sharded.set_optimizer_state_dict(
                policy, optimizer.optimizer, state["optimizer"], options=WHOLE
            )
        return policy, optimizer

    def set_learning_rate(self, optimizer, step: int) -> float:
        rate = learning_rate(self.config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def steps(self, make: Callable[[int], object]) -> Iterator[tuple[int, object]]:
        """(step, make(step)) for the updates still to do, under a progress bar."""
        done, total = self.start_step, self.config.max_steps
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        self.bar = tqdm(total=total, initial=done, disable=not self.main, unit="update")
        with self.bar, user_errors():  # the body of the caller's loop is not within
            yield from prefetched(make, range(done, total))

    # --- what is logged ---

    def log(self, metrics: dict) -> None:
        """Append one update's metrics, already averaged over all processes."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics.items()
        }
        if self.main:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(finite) + "\n")
        if self.config.log_with:
            numbers = {key: value for key, value in finite.items() if value is not None}
            self.accelerator.log(numbers, step=metrics["step"])

    def log_rollouts(self, groups: list[dict]) -> None:
        """Append groups; an image goes to images/ once and is referred to by its file name."""
        if not self.main:
            return
        (self.folder / "images").mkdir(exist_ok=True)
        with open(self.folder / "rollouts.jsonl", "a") as file:
            for group in groups:
                name = re.sub(r"[^\w-]", "_", group["id"], flags=re.ASCII)[:100]
                if name != group["id"]:  # so that no two rows share a file
                    name += f"-{zlib.crc32(group['id'].encode()):08x}"
                names = [f"images/{name}-{number}.png" for number in range(len(group["images"]))]
                for name, image in zip(names, group["images"], strict=True):
                    if not (self.folder / name).exists():
                        small = image.copy()
                        small.thumbnail((448, 448))
                        small.save(self.folder / name)
                file.write(json.dumps(group | {"images": names}) + "\n")

    def track_samples(self, groups: list[dict]) -> None:
        """A question's image and the completions about it, in the trackers that can show them."""
        for tracker in self.accelerator.trackers:
            for number, group in enumerate(groups):
                name, step, texts = f"samples/{number}", group["step"], group["completions"]
                image = np.asarray(group["images"][0])
                if tracker.name == "tensorboard":
                    tracker.log_images({name: image[None]}, step, dataformats="NHWC")
                    code = textwrap.indent("\n\n".join(texts), " " * 4)  # Markdown for: as it is
                    tracker.writer.add_text(name, f"{group['question']}\n\n{code}", step)
                elif tracker.name == "wandb":
                    tracker.log_images({name: [image]}, step)
                    rows = [[group["question"], text] for text in texts]
                    tracker.log_table(f"{name}-text", ["question", "completion"], rows, step=step)

    # --- the end of an update, and of the run ---

    def end_update(self, metrics: dict, policy, processor, optimizer, evaluate, boundary=True):
        """Evaluate, log, save and stop, each when it is due.

        `boundary` says that a checkpoint may be written: between two rollouts, not within one.
        """
        config, step = self.config, metrics["step"]
        last = step == config.max_steps
        if config.eval_steps and (step % config.eval_steps == 0 or last):
            metrics = metrics | evaluate(step)
        self.log(metrics)
        short = {
            "reward": "reward",
            "accuracy": "rewards/accuracy",
            "length": "completions/mean_length",
            "loss": "loss",
        }
        shown = {name: f"{metrics[key]:.3g}" for name, key in short.items() if key in metrics}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        self.faults = self.faults + 1 if metrics.get("skipped_updates") else 0
        if self.faults == PATIENCE:
            bad = first_not_finite(policy.named_parameters())
            why = (
                f"{bad} is not finite: the model is lost"
                if bad
                else ("the weights are finite: lower --learning_rate, or look at this step's data")
            )
            self.fail(
                f"loss or gradient were not finite in {PATIENCE} updates in a row (the last: "
                f"{step}, loss {metrics['loss']}, gradient norm {metrics['grad_norm']}); {why}"
            )
        stop = boundary and self.should_stop()
        self.save_due |= config.save_steps > 0 and step % config.save_steps == 0 and not last
        if boundary and (self.save_due or stop) and not self.faults:  # what is saved is sound
            self.save(policy, processor, optimizer, step)
            self.save_due = False
        if stop:
            self.bar.close()
            if self.main:
                print(f"stopped after update {step}; {self.how_to_go_on()}", flush=True)
            self.accelerator.end_training()
            sys.exit(128 + (self.stop_signal or signal.SIGTERM))

    def how_to_go_on(self) -> str:
        if not self.checkpoints():
            return f"there is no checkpoint in {self.folder} yet"
        script, newest = Path(sys.argv[0]).name, self.checkpoints()[-1].name
        return f"{script} --resume --output_dir {self.folder} goes on from {newest}"

    def finish(self, policy, processor: Processor, feed) -> None:
        """Save `final/`, say what was learned, show three answers, name the rows left out."""
        self.save(policy, processor)
        skipped = {}
        for part in gather_object([feed.skipped]):
            skipped |= part
        self.accelerator.end_training()
        if not self.main:
            return
        metrics = [json.loads(line) for line in open(self.folder / "metrics.jsonl")]
        scores = [m for m in metrics if "eval/accuracy" in m]
        for when, m in zip(("before", "after"), (scores[:1] + scores[-1:]), strict=False):
            print(
                f"{when:>6}: held-out accuracy {m['eval/accuracy']:.3f}, "
                f"mean completion length {m['eval/completion_length']:.1f} tokens"
            )
        groups = [json.loads(line) for line in open(self.folder / "rollouts.jsonl")]
        for group in [g for g in groups if g["split"] == "eval"][-EVAL_LOGGED:][:3]:
            print(f"\n{group['question']} ({' | '.join(group['options'])})")
            print(f"  {group['completions'][0]}   [right: {group['answer']}]")
        feed.skipped = skipped
        print("\n".join(filter(None, [feed.report(), f"\nsaved in {self.folder}"])), flush=True)

    # --- held-out questions ---

    def evaluate(self, model, processor, rows: list[dict], step: int, C: int, score) -> dict:
        """Greedy answers of at most C tokens to this process's held-out rows, scored by `score`.

        Returns `eval/accuracy`, `eval/<task>` and `eval/completion_length` (tokens) over all
        processes, and logs the first few answers as rollouts with split "eval".
        """
        answers, records = [], []
        for start in range(0, len(rows), EVAL_BATCH):
            batch = rows[start : start + EVAL_BATCH]
            inputs = to_device(processor.collate([row["encoded"] for row in batch]), model.device)
            ids, mask = sample(model, inputs, 1, C, temperature=0.0)
            lengths = mask.sum(-1).tolist()
            for row, text, length in zip(batch, processor.decode(ids, mask), lengths, strict=True):
                right = score(row["opening"] + text, row)
                answers.append({"accuracy": right, row["task"]: right, "completion_length": length})
                records.append(rollout_record(row, [text], {"accuracy": [right]}, step, "eval"))
        self.log_rollouts(records[:EVAL_LOGGED])
        self.track_samples(records[:EVAL_TRACKED])
        answers = gather_object(answers)
        means = {}
        for name in sorted({name for answer in answers for name in answer}):
            values = [answer[name] for answer in answers if name in answer]
            means[f"eval/{name}"] = sum(values) / len(values)
        return means

    # --- checkpoints ---

    def save(self, policy, processor: Processor, optimizer=None, step: int | None = None) -> None:
        """Write `checkpoint-<step>/`, or `final/` without an optimizer: whole, or not at all.

        Weights and optimizer state are gathered whole whatever the sharding, so that plain
        transformers loads the folder and any number of processes can go on from it.
        """
        name = "final" if optimizer is None else f"checkpoint-{step}"
        weights = sharded.get_model_state_dict(policy, options=WHOLE)
        if optimizer:
            state = sharded.get_optimizer_state_dict(policy, optimizer.optimizer, options=WHOLE)
        problem = None
        if self.main:
            partial = self.folder / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                if bad := first_not_finite(weights.items()):
                    raise OSError(f"{bad} is not finite")
                partial.mkdir()
                plain = self.accelerator.unwrap_model(policy).model
                # by the names of the parameters, which name tied ones once
                weights = {n: weights[f"model.{n}"] for n, _ in plain.named_parameters()}
                save_policy(plain, processor, partial, weights)
                if optimizer:
                    with open(partial / "training_state.pt", "wb") as file:
                        torch.save({"step": step, "optimizer": state}, file)
                verify(partial, step)
                if (self.folder / name).exists():
                    remove(self.folder / name)
                os.replace(partial, self.folder / name)
                if self.config.save_total_limit:
                    for old in self.checkpoints()[: -self.config.save_total_limit]:
                        remove(old)
            except (OSError, RuntimeError, SafetensorError) as error:
                shutil.rmtree(partial, ignore_errors=True)
                # what went wrong, where torch.save covers it with an error of its own
                problem = f"could not save {name} ({error.__context__ or error})"
        if problem := broadcast_object_list([problem])[0]:
            self.fail(problem)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first: an unfinished one has another name."""
        return sorted(self.folder.glob("checkpoint-*[0-9]"), key=step_of)

    def _newest_whole(self) -> Path | None:
        """The newest checkpoint that can be read; ValueError when none of several can."""
        for path in reversed(self.checkpoints()):
            try:
                verify(path, step_of(path))
                return path
            except (OSError, RuntimeError, SafetensorError, ValueError) as error:
                problem = f"{path} is damaged ({error})"
                complain(f"{problem}; looking at the one before")
        if self.checkpoints():
            raise ValueError(f"{problem}, and no other checkpoint is left; --overwrite starts anew")
        return None

    # --- the ways a run can end early ---

    def fail(self, problem: str) -> NoReturn:
        """End every process with exit code 1; all must call it."""
        self.bar.close()
        if self.main:
            complain(f"error: {problem}; {self.how_to_go_on()}")
        sys.exit(1)

    def _last_words(self, kind: type, error: BaseException, trace) -> None:
        """What is said of an exception that nothing caught: one line where no bug is to blame."""
        self.bar.close()
        text = str(error)
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in text
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text:
            asked = re.search(r"allocate ([\d.]+ \w+)", text)
            flags = ("prompts_per_forward", "rows_per_forward", "max_completion_length")
            now = [f"--{f} {getattr(self.config, f)}" for f in flags if hasattr(self.config, f)]
            problem = f"out of memory: {asked[1] if asked else 'more'} could not be had; "
            problem += f"lower {' or '.join(now)}, or add --gradient_checkpointing"
        elif lost:
            problem = f"lost another process, which may have said why ({text[:200]})"
        elif isinstance(error, OSError):
            problem = text
        elif isinstance(error, KeyboardInterrupt):
            problem = "interrupted"
        else:
            return self._traceback(kind, error, trace)
        complain(f"error: {problem}; {self.how_to_go_on()}", wait=lost)

    def _on_signal(self, number: int, _frame) -> None:
        if self.stop_signal is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.stop_signal = number
        if self.main:  # not print, which the signal may have interrupted
            os.write(2, b"\nfinishing this update, then saving; Ctrl-C once more leaves at once\n")

    def should_stop(self) -> bool:
        """True on every process as soon as one was asked to stop."""
        asked = torch.tensor(float(self.stop_signal is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)


def source_hash() -> str:
    """Of the code that trains: two runs before and after a changed line are told apart by it."""
    code = set(Path(__file__).parent.glob("*.py")) - {Path(__file__).with_name("report.py")}
    text = b"".join(file.read_bytes() for file in sorted(code))
    return f"{zlib.crc32(text):08x}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def logged_step(line: str) -> float:
    """The update a line of a log belongs to; infinity for a line that was cut short."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one go, so that a crash leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.new")
    partial.write_text(text)
    os.replace(partial, path)


def remove(folder: Path) -> None:
    """Delete a folder, renamed first, so that a crash leaves no half of it under its name."""
    doomed = folder.with_name(f".{folder.name}.old.partial")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def load_training_state(folder: Path) -> dict:
    """Optimizer and step; mapped, so that the processes of a machine share its memory."""
    return torch.load(folder / "training_state.pt", weights_only=True, mmap=True)


def verify(folder: Path, step: int | None) -> None:
    """Read a checkpoint, or with step None a final model, back; raises when it is not whole."""
    json.loads((folder / "config.json").read_text())
    files = set(folder.glob("*.safetensors"))
    if (index := folder / "model.safetensors.index.json").exists():
        files = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
    if not files:
        raise OSError("the weights are missing")
    for file in files:
        with safe_open(file, "pt"):  # fails where the file is shorter than its header says
            pass
    if step is not None and load_training_state(folder)["step"] != step:
        raise OSError("the training state is that of another step")


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor whose part on this process holds infinity or NaN."""
    for name, tensor in tensors:
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not tensor.isfinite().all():
            return name
    return None
