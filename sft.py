"""Supervised fine-tuning: the baseline that GRPO has to beat, and the cold start.

Cross-entropy on the tokens of the answer and its end token, averaged over the answer tokens of the
whole update.

How this differs from the paper's run and from its code:

1. Upstream also trains on the prompt's tokens. Here only the answer's tokens count.
2. The forward pass is that of GRPO with one completion per prompt: the dataset's answer replaces
   the sample, and every advantage is 1.
3. Rows of similar length share a forward pass, so that little is spent on padding.

    accelerate launch sft.py                                     # toy baseline, any CPU, minutes
    accelerate launch sft.py --dataset sat                       # the paper's SFT run on one GPU
    accelerate launch sft.py --dataset clevr-cot --target trace  # cold start
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # several processes: seconds to save after Ctrl-C
    accelerate launch --config_file configs/ddp.yaml sft.py --dataset sat
"""

import contextlib
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from core.checkpoint import find_checkpoint, save_model, step_of
from core.evaluation import evaluate
from core.logs import Logs
from core.lora import add_adapters
from core.optimizer import GuardedStep, prepare
from core.options import TrainingOptions, flag, parse_options
from core.packing import Packed, Policy, pack_groups
from core.processes import Replica, StopSignal, launch, share_of, start_accelerator
from core.prompts import Prompts, open_rows
from core.qwen import Processor, Prompt, load_for_training
from data import BadRow
from rewards import accuracy_reward, is_correct


@dataclass
class SFTOptions(TrainingOptions):
    max_steps: int = flag(120, "Updates", paper=3750, group="optimization", ge=1)  # 2 * 15000 / 8
    learning_rate: float = flag(3e-4, "Peak learning rate of AdamW", paper=2e-5, ge=0)
    lr_schedule: Literal["linear", "cosine", "constant"] = flag("linear", "Schedule after warm-up")
    warmup_ratio: float = flag(0.1, "Share of updates that warm up", paper=0.0, ge=0, le=1)
    target: Literal["answer", "trace"] = flag(
        "answer", "The bare answer, or the row's `thinking` and the answer in tags", group="SFT"
    )
    epochs: float | None = flag(None, "Passes over the data, in place of --max_steps", gt=0)
    rows_per_update: int = flag(64, "Rows per update over all processes", paper=8, ge=1)
    rows_per_forward: int = flag(
        64, "Rows in one training forward; changes memory, not the result", paper=1, ge=1
    )
    max_completion_length: int = flag(96, "Most tokens of a held-out answer", paper=700, ge=1)


def target_text(row: dict, target: str, opening: str = "") -> str:
    """What follows the prompt. Raises BadRow if a trace is wanted and the row has none."""
    if target == "answer":
        return row["answer"]
    if not row.get("thinking"):
        raise BadRow(row["id"], "it has no `thinking` to train on (--target answer needs none)")
    think = "" if opening == "<think>" else "<think>"
    return f"{think}{row['thinking']}</think><answer>{row['answer']}</answer>"


def bare_accuracy(completion: str, row: dict) -> float:
    """Accuracy of an answer without tags, which is what `--target answer` teaches."""
    return float(is_correct(completion.removeprefix("<think>"), row))


def make_micro_batches(
    prompts: list[Prompt], model, processor: Processor, options: SFTOptions
) -> list[tuple[Packed, Tensor]]:
    """Packed rows and the mask of their answers' tokens (n, C), similar lengths together."""
    texts = [target_text(prompt.row, options.target, prompt.opening) for prompt in prompts]
    ids, mask = processor.encode_targets(texts)  # (b, C)
    lengths = mask.sum(-1) + torch.tensor([len(prompt.inputs["input_ids"]) for prompt in prompts])
    batches = []
    for chosen in lengths.argsort(descending=True, stable=True).split(options.rows_per_forward):
        inputs = processor.collate([prompts[i].inputs for i in chosen])
        packed = pack_groups(model, inputs, ids[chosen], mask[chosen])
        batches.append((packed, mask[chosen].to(model.device)))
    return batches


def compute_gradients(policy, batches, num_tokens: int, accelerator) -> dict[str, float]:
    """Forward and backward of every micro-batch. `num_tokens` are the update's answer tokens."""
    policy.train()
    total = torch.zeros((), device=accelerator.device)
    for number, (packed, mask) in enumerate(batches):
        last = number == len(batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(policy):
            logps, _ = policy(packed)  # (n, 1, C)
            loss = -(logps.squeeze(1) * mask / num_tokens).sum()
            accelerator.backward(loss * accelerator.num_processes)  # DDP and FSDP take the mean
        total += loss.detach()
    return {"loss": accelerator.reduce(total, "sum").item()}


def main() -> int | None:
    options = parse_options(SFTOptions, __doc__)
    accelerator = start_accelerator(options)
    own = share_of(options, "rows_per_update", accelerator)  # this process's places in an update
    checkpoint = find_checkpoint(options, accelerator)
    rows = open_rows(options, checkpoint)  # before the weights, which may have to be downloaded
    model, processor = load_for_training(options, checkpoint)
    sampler = Replica(model, accelerator, lora=options.lora_rank > 0)
    add_adapters(model, options.lora_rank, options.seed, sampler.model.dtype)
    bare = options.target == "answer"
    style = "base-direct" if bare and processor.default_style == "base" else None
    check = partial(target_text, target=options.target)  # raises BadRow
    prompts = Prompts(rows, options, processor, options.rows_per_update, style, check)
    if options.epochs:
        rows_of_run = options.epochs * len(prompts.usable)
        options.max_steps = math.ceil(rows_of_run / options.rows_per_update)
    logs = Logs(options, accelerator, model, prompts, step_of(checkpoint))
    policy, optimizer = prepare(Policy(model), options, accelerator, checkpoint)
    guarded_step = GuardedStep(policy, optimizer, options, accelerator)
    stop = StopSignal(accelerator)
    score = bare_accuracy if bare else accuracy_reward
    test = partial(evaluate, sampler.model, processor, prompts, score, options, logs)
    save = partial(save_model, policy, processor, options, accelerator)

    if not checkpoint and options.eval_steps:
        logs.metrics({"step": 0, **test(0)})
    for step in range(logs.start_step + 1, options.max_steps + 1):
        began = time.perf_counter()
        batch = prompts.of_rollout(step - 1, own)
        batches = make_micro_batches(batch, sampler.model, processor, options)
        num_tokens = sum(mask.sum() for _, mask in batches)
        num_tokens = int(accelerator.reduce(num_tokens, "sum"))
        metrics = {"step": step, **compute_gradients(policy, batches, num_tokens, accelerator)}
        metrics |= guarded_step(metrics["loss"], step)
        seconds = time.perf_counter() - began
        metrics |= {"seconds/train": seconds, "tokens_per_second": num_tokens / seconds}

        if options.eval_steps and (step % options.eval_steps == 0 or step == options.max_steps):
            sampler.refresh(policy)
            metrics |= test(step)
        logs.metrics(metrics)
        if logs.note_best(metrics):
            save("best")
        exit_code = stop.received()
        if exit_code or (options.save_steps and step % options.save_steps == 0):
            save(f"checkpoint-{step}", optimizer)
        if exit_code:
            logs.say_stopped(step)
            return exit_code
    save("final")
    logs.conclude(prompts.skipped)


if __name__ == "__main__":
    launch(main)
