"""Options: flags with ranges, recipes and config files.

A stage declares a dataclass of `flag(...)` fields. The command line wins over the run's config.json
(with `--resume`), which wins over the `--config` file, which wins over the recipe.
"""

import argparse
import dataclasses
import difflib
import json
import math
import operator
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import yaml

from core.errors import UserError, complain
from data import STYLES

# --- flags ---------------------------------------------------------------------------------------


def flag(default, help: str, *, paper=..., group: str | None = None, **limits: float):
    """A field of an options dataclass.

    `default` is the toy recipe's value and `paper` the paper recipe's, where it differs. `limits`
    are any of `ge`, `gt`, `le`. `group` is the heading in `--help` from this flag on.
    """
    paper = default if paper is ... else paper
    about = {"help": help, "toy": default, "paper": paper, "group": group, "limits": limits}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


@dataclass
class StageOptions:
    """What every stage understands."""

    model: str = flag(
        "toy", "`toy`, a hub id or a folder", paper="Qwen/Qwen2-VL-2B", group="model and data"
    )
    dataset: str = flag("toy", "toy, sat, clevr, clevr-cot, geoqa, geometry3k, a hub id or a path")
    image_folder: str | None = flag(None, "Folder that image paths in the data start from")
    revision: str | None = flag(None, "Branch, tag or commit of the model on the hub")
    data_revision: str | None = flag(None, "Branch, tag or commit of the dataset on the hub")
    prompt_style: Literal[("auto", *STYLES)] = flag(
        "auto", "auto: instruct for a model that ends its turn with <|im_end|>, else base"
    )
    max_pixels: int | None = flag(
        None, "Most pixels of an image; default: the model's, at most 401408", ge=784
    )

    recipe: Literal["auto", "toy", "paper"] = flag(
        "auto",
        "Defaults of all flags; auto: that of the model's run, else toy for toy model or data",
        group="run",
    )
    config: str | None = flag(None, "YAML file of flags, or the config.json of an earlier run")
    output_dir: str | None = flag(None, "Run folder; default outputs/<stage>-<dataset>[-<model>]")
    resume: bool = flag(False, "Continue from the newest checkpoint; evaluations always continue")
    overwrite: bool = flag(False, "Delete the run that the folder holds and start again")
    seed: int = flag(0, "Seed of the data order and of sampling", paper=42, ge=0, le=2**63 - 1)
    precision: Literal["auto", "bf16", "fp32"] = flag(
        "auto", "Compute precision over fp32 weights; auto: bf16 on a GPU, fp32 on a CPU"
    )


@dataclass
class TrainingOptions(StageOptions):
    """What both training stages understand."""

    max_prompt_length: int = flag(1024, "Skip rows whose prompt has more tokens", ge=1)
    max_images: int | None = flag(None, "Skip rows with more images; default 1 for sat", ge=1)
    subset: int | None = flag(None, "Use only this many rows; default 15000 for sat, 0: all", ge=0)

    max_steps: int = flag(230, "Updates", paper=1500, group="optimization", ge=1)
    learning_rate: float = flag(1.2e-4, "Peak learning rate of AdamW", paper=1e-6, ge=0)
    lr_schedule: Literal["linear", "cosine", "constant"] = flag(
        "constant", "Schedule after warm-up", paper="linear"
    )
    warmup_ratio: float = flag(0.75, "Share of updates that warm up", paper=0.0, ge=0, le=1)
    weight_decay: float = flag(0.0, "Weight decay of AdamW", ge=0)
    max_grad_norm: float = flag(1.0, "Clip the gradient to this norm; 0 does not clip", ge=0)
    freeze: Literal["none", "vision", "language"] = flag("none", "Part that is not trained")
    lora_rank: int = flag(0, "Rank of the language model's adapters; 0 trains all weights", ge=0)
    gradient_checkpointing: bool = flag(False, "Compute layers twice to save memory", paper=True)

    eval_rows: int = flag(200, "Held-out questions", ge=1, le=10**6, group="evaluation, saving")
    eval_steps: int = flag(10, "Updates between evaluations; 0: never evaluate", paper=100, ge=0)
    save_steps: int = flag(40, "Updates between checkpoints; 0: none, only final/", paper=100, ge=0)
    save_total_limit: int = flag(2, "Checkpoints to keep; 0 keeps all", ge=0)
    log_with: str | None = flag(None, "Tracker known to accelerate: tensorboard, wandb, …")

    def settle(self) -> None:
        """Fill in what depends on other flags. Raises UserError for what does not fit together."""
        if self.lora_rank and self.freeze == "language":
            raise UserError("argument --lora_rank: it trains what --freeze language freezes")


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
    "torch_dtype": "--precision",
    "max_new_tokens": "--max_completion_length",
    "resume_from_checkpoint": "--resume",
}


class Parser(argparse.ArgumentParser):
    """The flags of an options dataclass. A mistake raises UserError."""

    def __init__(self, options_class: type, description: str | None):
        super().__init__(
            usage="%(prog)s [--flag value …]",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,  # `read` returns only what was given
        )
        self._negative_number_matcher = re.compile(r"-[\d.]|-inf|-nan")  # -1e-5 is a number, too
        kinds, group = typing.get_type_hints(options_class), self
        self.names = kinds.keys()
        for f in dataclasses.fields(options_class):
            if f.metadata["group"]:
                group = self.add_argument_group(f.metadata["group"])
            settings = settings_of(kinds[f.name], f.metadata["limits"])
            group.add_argument(f"--{f.name}", help=help_text(f), **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def read(self, words: list[str]) -> dict:
        """The flags among command line words: name -> value."""
        words = [re.sub("(?<=^--)[^=]+", lambda m: m[0].replace("-", "_"), w) for w in words]
        given, unknown = self.parse_known_args(words)
        if unknown:
            name = unknown[0].lstrip("-").partition("=")[0]
            near = [f"--{valid}" for valid in difflib.get_close_matches(name, self.names, 3)]
            hint = HUGGING_FACE.get(name) or " or ".join(near)
            hint = f"Did you mean {hint}?" if hint else "See --help for the valid ones."
            raise UserError(f"unknown option {name}. {hint}")
        return vars(given)

    def read_file(self, path: str | Path) -> dict:
        """The flags in a YAML file, or in the config.json of a run."""
        words = []
        try:
            values = yaml.safe_load(Path(path).read_text())
            if not isinstance(values, dict):
                raise UserError("it does not hold `flag: value` lines")
            if "versions" in values:  # of a run, which also holds facts and its own folder
                names = self.names - {"output_dir", "resume", "overwrite", "config"}
                values = {name: value for name, value in values.items() if name in names}
            for name, value in values.items():
                if value != []:
                    words.append(f"--{name}")
                    words += map(show, value if isinstance(value, list) else [value])
            return self.read(words)
        except (OSError, ValueError, TypeError, yaml.YAMLError, UserError) as error:
            raise UserError(f"config file {path}: {error}") from error


def settings_of(kind, limits: dict) -> dict:
    """What argparse needs to read a flag of this type and within these limits."""
    if typing.get_origin(kind) is Literal:
        return {"choices": typing.get_args(kind)}
    if kind is bool:
        return {"nargs": "?", "const": True, "type": boolean, "metavar": "BOOL"}
    optional, several = isinstance(kind, types.UnionType), typing.get_origin(kind) is list
    if optional or several:
        kind = typing.get_args(kind)[0]

    def read(text: str):
        if optional and text.lower() == "none":
            return None
        value = kind(text)
        if kind is not str:
            check_range(value, limits)
        return value

    read.__name__ = kind.__name__  # for "invalid int value: 'many'"
    return {"type": read, "metavar": "VALUE"} | ({"nargs": "+"} if several else {})


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def check_range(value: float, limits: dict) -> None:
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {value}")
    for limit, bound in limits.items():
        if not getattr(operator, limit)(value, bound):
            words = {"ge": "at least", "gt": "above", "le": "at most"}[limit]
            raise argparse.ArgumentTypeError(f"must be {words} {bound}, not {value}")


def help_text(f: dataclasses.Field) -> str:
    toy, paper = f.metadata["toy"], f.metadata["paper"]
    values = f" [toy {show(toy)}, paper {show(paper)}]"
    if toy == paper:
        values = "" if toy in (None, []) else f" [default {show(toy)}]"
    return (f.metadata["help"] + values).replace("%", "%%")


def show(value) -> str:
    """A flag's value as it is typed."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if value in (None, True, False) else str(value)


def parse_options(options_class: type, description: str | None = None, argv=None):
    """The options of a stage. Exits with code 2 and one line if something is wrong with them.

    The result also has `recipe_reason`, why its recipe was chosen.
    """
    parser = Parser(options_class, description)
    try:
        typed = parser.read(sys.argv[1:] if argv is None else list(argv))
        given = typed
        if "config" in typed:
            given = parser.read_file(typed["config"]) | typed
        name = f"{Path(parser.prog).stem}-{Path(given.get('dataset', 'toy')).stem}"
        folder = given.get("output_dir") or f"outputs/{name}"
        if given.get("resume") and (own := Path(folder) / "config.json").exists():
            given = given | parser.read_file(own) | typed
        if "max_steps" in typed and "epochs" not in typed:  # which would win
            given.pop("epochs", None)
        recipe, reason = choose_recipe(given, given.get("dataset", options_class.dataset))
        values = {f.name: f.metadata[recipe] for f in dataclasses.fields(options_class)}
        options = options_class(**values | given | {"recipe": recipe})
        options.recipe_reason = reason
        options.settle()
        options.output_dir = options.output_dir or folder
    except UserError as error:
        complain(f"{parser.prog}: error: {error}")
        sys.exit(2)
    return options


def choose_recipe(given: dict, dataset: str) -> tuple[str, str]:
    """The recipe, and why. `dataset` is the given one or the stage's default."""
    recipe, model = given.get("recipe", "auto"), given.get("model")
    if recipe != "auto":
        return recipe, "given by a flag or a config file"
    if model == "toy" or (model is None and dataset == "auto"):
        return "toy", "the model is the toy model"
    if model and (made_by := run_config(model)).get("recipe"):
        return made_by["recipe"], f"{model} was made with it"
    if dataset == "toy":
        return "toy", "the dataset is toy"
    return "paper", "neither model nor dataset is the toy's"


def run_config(folder: str | Path) -> dict:
    """The options of the run that saved this model folder, or {}."""
    path = Path(folder) / "run_config.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
