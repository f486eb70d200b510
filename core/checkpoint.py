"""Checkpoints: where a run starts, and folders that are written whole or not at all.

Every random draw of a run is a function of the seed and the step. A checkpoint therefore needs no
random state: weights, optimizer and step are enough to continue exactly.
"""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import state_dict as sharded

from core.lora import whole_weights
from core.options import TrainingOptions, UserError, run_config
from core.qwen import save_policy

WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
ADAPTERS = replace(WHOLE, ignore_frozen_params=True, strict=False)


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. An unfinished one has another name."""
    return sorted((p for p in folder.glob("checkpoint-*") if p.name[11:].isdecimal()), key=step_of)


def find_checkpoint(options: TrainingOptions, accelerator: Accelerator) -> Path | None:
    """The checkpoint that the run resumes from, or None to start from the beginning.

    Exits if the run is complete. Raises UserError if the folder holds a run and neither `--resume`
    nor `--overwrite` was given, if a finished run kept no checkpoint, or if an option changed that
    must stay.
    """
    folder = Path(options.output_dir)
    if not options.resume:
        if (folder / "config.json").exists() and not options.overwrite:
            raise UserError(
                f"{folder} already holds a run: --resume continues it, --overwrite deletes it, "
                "--output_dir names another folder"
            )
        return None
    # Rank 0 decides for all, as another machine may see another state of the folder.
    newest = broadcast_object_list([(list_checkpoints(folder) or [None])[-1]])[0]
    if newest and not newest.exists():
        raise UserError(f"{newest} cannot be read here: all machines must share the run's folder")
    final = run_config(folder / "final")
    done, epochs = final.get("max_steps", 0), getattr(options, "epochs", None) or 0
    if done >= options.max_steps and epochs <= (final.get("epochs") or 0):
        if accelerator.is_main_process:
            print(f"{folder} is complete: all {options.max_steps} updates are done")
        sys.exit(0)
    if newest is None and (folder / "final").exists():
        raise UserError(
            f"{folder} is a finished run without a checkpoint: train {folder / 'final'} further "
            "with --model and another --output_dir, or start again with --overwrite, not --resume"
        )
    saved = run_config(newest) if newest else {}
    now = vars(options) | {"stage": Path(sys.argv[0]).stem}
    for name in ("stage", "model", "freeze", "lora_rank", "num_iterations"):
        if name in saved and saved[name] != now.get(name):
            raise UserError(f"{newest} was made with {name} {saved[name]}, which must stay")
    if accelerator.is_main_process:
        print(f"resuming from {newest}" if newest else f"no checkpoint in {folder}: starting anew")
    return newest


def restore(checkpoint: Path, policy: nn.Module, optimizer) -> None:
    """Continue with the checkpoint's optimizer and adapters. Other weights are loaded already."""
    try:  # memory-mapped, so that the processes of a machine share the pages
        state = torch.load(checkpoint / "training_state.pt", weights_only=True, mmap=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint} is damaged ({error}): delete it to resume from the one before"
        ) from error
    if "adapters" in state:
        sharded.set_model_state_dict(policy, state["adapters"], options=ADAPTERS)
    sharded.set_optimizer_state_dict(policy, optimizer.optimizer, state["optimizer"], options=WHOLE)


def save_model(policy, processor, options, accelerator, name: str, optimizer=None) -> None:
    """Write `<output_dir>/<name>`, a complete Hugging Face folder. Every process must call it.

    With an optimizer, the folder also holds what resuming needs. Weights and optimizer state are
    gathered whole, whatever the sharding, so that plain transformers loads the folder and any
    number of processes can resume from it. Raises UserError if the disk is full or a weight is not
    finite.
    """
    weights, state, problem = {}, {}, None
    for parameter, weight in whole_weights(policy):  # gathered by all, kept by rank 0
        if accelerator.is_main_process:
            weights[parameter] = weight.cpu()
    if optimizer is not None:
        optimizer = optimizer.optimizer
        state["optimizer"] = sharded.get_optimizer_state_dict(policy, optimizer, options=WHOLE)
        if options.lora_rank:  # the saved weights are merged and rounded
            trained = sharded.get_model_state_dict(policy, options=ADAPTERS)
            # torch keeps the tied head, because it is frozen under the embedding's name
            state["adapters"] = {name: w for name, w in trained.items() if "lora_" in name}
    if accelerator.is_main_process:
        target = Path(options.output_dir) / name
        try:
            if bad := [name for name, weight in weights.items() if not weight.isfinite().all()]:
                raise OSError(f"{bad[0]} is not finite")
            write_folder(target, accelerator.unwrap_model(policy).model, processor, weights, state)
            if state and options.save_total_limit:
                for old in list_checkpoints(target.parent)[: -options.save_total_limit]:
                    remove(old)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch.save hides the cause behind an error of its own
            problem = f"could not save {target}: {error.__context__ or error}"
    if problem := broadcast_object_list([problem])[0]:
        raise UserError(f"{problem}. --resume continues from the newest checkpoint.")


def write_folder(target: Path, model, processor, weights: dict, state: dict) -> None:
    """Write under a temporary name, then rename."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        save_policy(model, processor, partial, weights)
        shutil.copy(target.parent / "config.json", partial / "run_config.json")
        if state:
            with open(partial / "training_state.pt", "wb") as file:
                torch.save(state, file)
        old = target.with_name(f".{target.name}.old.partial")
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that a crash leaves no half of it."""
    doomed = folder.with_name(f".{folder.name}.old.partial")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
