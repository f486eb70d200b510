"""Options: flags with ranges, recipes, config files, and the one kind of error a user can cause.

A stage declares a dataclass of `flag(...)` fields. The command line wins over the run's config.json
(with `--resume`), which wins over the `--config` file, which wins over the recipe.
"""

import argparse
import dataclasses
import difflib
import json
import math
import operator
import os
import re
import signal
import sys
import time
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import yaml


class UserError(Exception):
    """A mistake that a user can make. The message says what is wrong, where, and what to do."""


def complain(line: str) -> None:
    """Print a one-line error. Other ranks wait, so that rank 0's message comes first."""
    if rank := int(os.environ.get("RANK", 0)):
        line = f"rank {rank}: {line}"
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher ends them while they wait
        time.sleep(5)
    print(" ".join(line.split()), file=sys.stderr, flush=True)


# --- flags ---------------------------------------------------------------------------------------


def flag(default, help: str, *, paper=..., group: str | None = None, **limits: float):
    """A field of an options dataclass.

    `default` is the toy recipe's value and `paper` the paper recipe's, where it differs. `limits`
    are any of `ge`, `gt`, `le`, `lt`. `group` is the heading in `--help` from this flag on.
    """
    paper = default if paper is ... else paper
    about = {"help": help, "paper": paper, "group": group, "limits": limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=about)
    return field(default=default, metadata=about)


@dataclass
class StageOptions:
    """What every stage understands."""

    model: str = flag(
        "toy", "`toy`, a hub id or a folder", paper="Qwen/Qwen2-VL-2B", group="model and data"
    )
    dataset: str = flag("toy", "toy, sat, clevr, clevr-cot, geoqa, a hub id, a folder or a file")
    image_folder: str | None = flag(None, "Folder that image paths in the data start from")
    revision: str | None = flag(None, "Branch, tag or commit of the model on the hub")
    data_revision: str | None = flag(None, "Branch, tag or commit of the dataset on the hub")
    prompt_style: Literal["auto", "base", "base-direct", "instruct"] = flag(
        "auto", "auto: instruct for a model that ends its turn with <|im_end|>, else base"
    )
    max_pixels: int | None = flag(
        None, "Largest image; default: the model's, at most 401408", ge=784
    )

    recipe: Literal["auto", "toy", "paper"] = flag(
        "auto", "Defaults of all flags; auto: toy for a toy model or dataset", group="run"
    )
    config: str | None = flag(None, "YAML file of flags, or the config.json of an earlier run")
    output_dir: str | None = flag(None, "Folder of the run; default outputs/<stage>-<dataset>")
    resume: bool = flag(False, "Continue from the newest checkpoint in the run's folder")
    overwrite: bool = flag(False, "Delete the run that the folder holds and start again")
    seed: int = flag(0, "Determines the order of the data and every sample", paper=42, ge=0)
    precision: Literal["auto", "bf16", "fp32"] = flag(
        "auto", "Compute precision over fp32 weights; auto: bf16 on a GPU, fp32 on a CPU"
    )

    def check(self) -> None:
        """Raise UserError for values that do not fit together."""


@dataclass
class TrainingOptions(StageOptions):
    """What both training stages understand."""

    max_prompt_length: int = flag(1024, "Skip rows whose prompt has more tokens", ge=1)
    max_images: int | None = flag(None, "Skip rows with more images; default 1 for sat", ge=1)
    subset: int | None = flag(None, "Use only the first rows; default 15000 for sat, 0: all", ge=0)

    max_steps: int = flag(320, "Updates", paper=1500, group="optimization", ge=1)
    learning_rate: float = flag(6e-5, "Peak learning rate of AdamW", paper=1e-6, ge=0)
    lr_schedule: Literal["linear", "cosine", "constant"] = flag(
        "constant", "Learning rate after the warm-up", paper="linear"
    )
    warmup_ratio: float = flag(
        0.55, "Share of the updates with a rising learning rate", paper=0.0, ge=0, le=1
    )
    weight_decay: float = flag(0.0, "Weight decay of AdamW", ge=0)
    max_grad_norm: float = flag(1.0, "Clip the gradient to this norm; 0 does not clip", ge=0)
    freeze: Literal["none", "vision", "language"] = flag("none", "Part that is not trained")
    lora_rank: int = flag(0, "Train adapters of the language model; 0: all weights", ge=0)
    gradient_checkpointing: bool = flag(False, "Compute layers twice to save memory", paper=True)

    eval_rows: int = flag(200, "Held-out questions", ge=1, group="evaluation and checkpoints")
    eval_steps: int = flag(10, "Updates between evaluations; 0: never evaluate", paper=100, ge=0)
    save_steps: int = flag(40, "Updates between checkpoints; 0: only at the end", paper=100, ge=0)
    save_total_limit: int = flag(2, "Checkpoints to keep; 0 keeps all", ge=0)
    log_with: str | None = flag(None, "Tracker known to accelerate: tensorboard, wandb, …")

    def check(self) -> None:
        if self.lora_rank and self.freeze == "language":
            raise UserError(
                "argument --lora_rank: trains the language model, which --freeze language freezes"
            )


# --- from the command line to values -------------------------------------------------------------

HUGGING_FACE = {  # what people who know transformers and TRL type first
    "lr": "--learning_rate",
    "lr_scheduler_type": "--lr_schedule",
    "num_train_epochs": "--max_steps, in sft.py --epochs",
    "per_device_train_batch_size": "--prompts_per_update, in sft.py --rows_per_update",
    "gradient_accumulation_steps": "--prompts_per_forward, in sft.py --rows_per_forward",
    "report_to": "--log_with",
    "model_name_or_path": "--model",
    "dataset_name": "--dataset",
    "bf16": "--precision bf16",
}
OF_ONE_RUN = ("output_dir", "resume", "overwrite", "config")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2. An unknown option is answered with valid ones."""
        valid = sorted({o for action in self._actions for o in action.option_strings} - {"-h"})
        if "unrecognized" in message:
            words = [word for word in message.split() if word.startswith("--")]
            name = words[0].lstrip("-").split("=")[0] if words else ""
            near = difflib.get_close_matches("--" + name, valid, 3)
            hint = HUGGING_FACE.get(name) or " or ".join(near)
            message += f". Did you mean {hint}?" if hint else ""
            message += f" Valid: {' '.join(valid)}"
        complain(f"{self.prog}: error: {message}")
        sys.exit(2)


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def build_parser(options_class: type, description: str | None) -> Parser:
    """A parser of the dataclass's flags that reports only the flags that were given."""
    parser = Parser(
        usage="%(prog)s [--flag value …]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    hints = typing.get_type_hints(options_class)
    group = parser
    for f in dataclasses.fields(options_class):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        kind, settings = hints[f.name], {"metavar": "VALUE"}
        if isinstance(kind, types.UnionType):  # X | None
            kind = typing.get_args(kind)[0]
            settings["type"] = lambda text, kind=kind: None if text == "none" else kind(text)
            settings["type"].__name__ = kind.__name__
        elif typing.get_origin(kind) is Literal:
            settings = {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is list:
            settings |= {"nargs": "+", "type": typing.get_args(kind)[0]}
        elif kind is bool:
            settings = {"nargs": "?", "const": True, "type": boolean, "metavar": "BOOL"}
        else:
            settings["type"] = kind
        group.add_argument(f"--{f.name}", help=help_text(f), **settings)
    return parser


def help_text(f: dataclasses.Field) -> str:
    toy, paper = default_of(f, "toy"), f.metadata["paper"]
    values = f" [toy {show(toy)}, paper {show(paper)}]"
    if toy == paper:
        values = "" if toy in (None, []) else f" [default {show(toy)}]"
    return (f.metadata["help"] + values).replace("%", "%%")


def show(value) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if value in (None, True, False) else str(value)


def default_of(f: dataclasses.Field, recipe: str):
    if recipe == "paper":
        return f.metadata["paper"]
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()


def parse_options(options_class: type, description: str | None = None, argv=None):
    """The options of a stage. Exits with code 2 and one line if something is wrong with them.

    The result also has `recipe_reason`, why its recipe was chosen.
    """
    argv = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = build_parser(options_class, description)
    fields = dataclasses.fields(options_class)
    names = [f.name for f in fields]
    try:
        given = vars(parser.parse_args(argv))
        if given.get("config"):
            given = vars(parser.parse_args(flags_of(given["config"], names) + argv))
        name = f"{Path(parser.prog).stem}-{Path(given.get('dataset', 'toy')).stem}"
        folder = given.get("output_dir") or f"outputs/{name}"
        if given.get("resume") and (own := Path(folder) / "config.json").exists():
            given |= vars(parser.parse_args(flags_of(own, names) + argv))
        recipe, reason = choose_recipe(given, given.get("dataset", options_class.dataset))
        values = {f.name: given.get(f.name, default_of(f, recipe)) for f in fields}
        options = options_class(**values | {"recipe": recipe})
        options.recipe_reason = reason
        for f in fields:
            value = getattr(options, f.name)
            for number in value if isinstance(value, list) else [value]:
                check_range(f.name, number, f.metadata["limits"])
        options.check()
        options.output_dir = options.output_dir or folder
    except UserError as error:
        parser.error(str(error))
    return options


def underscored(word: str) -> str:
    """`--max-steps=3` as `--max_steps=3`."""
    return re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word)


def flags_of(path: str | Path, known: Sequence[str]) -> list[str]:
    """The content of a config file as command line flags."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the config file {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold `flag: value` lines")
    of_a_run = "versions" in values  # a config.json, which also holds facts and another folder
    words = []
    for name, value in values.items():
        name = str(name).replace("-", "_")
        if (of_a_run and (name in OF_ONE_RUN or name not in known)) or value == []:
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            raise UserError(f"{path}: unknown option {name}; nearest valid: {' '.join(near)}")
        words.append(f"--{name}")
        words += map(show, value if isinstance(value, list) else [value])
    return words


def choose_recipe(given: dict, dataset: str) -> tuple[str, str]:
    """The recipe, and why. `dataset` is the one that holds, given or not."""
    recipe, model = given.get("recipe", "auto"), given.get("model")
    if recipe != "auto":
        return recipe, "given by hand"
    if model == "toy" or (model is None and dataset == "auto"):
        return "toy", "the model is the toy model"
    if model and (made_by := run_config(model)).get("recipe"):
        return made_by["recipe"], f"{model} was made with it"
    if dataset == "toy":
        return "toy", "the dataset is toy"
    return "paper", "neither model nor dataset is the toy's"


def run_config(model: str) -> dict:
    """What the run that saved this model folder was told, or nothing."""
    path = Path(model) / "run_config.json"
    return json.loads(path.read_text()) if path.exists() else {}


def check_range(name: str, value, limits: dict) -> None:
    if not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise UserError(f"argument --{name}: must be a finite number, not {value}")
    for limit, bound in limits.items():
        if not getattr(operator, limit)(value, bound):
            words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}[limit]
            raise UserError(f"argument --{name}: must be {words} {bound}, not {value}")
