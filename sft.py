"""Supervised fine-tuning: the baseline to beat, the cold start, and where the toy model comes from.

Cross-entropy on the answer's tokens and its end token, never on prompt, padding or image; the mean
is over the answer tokens of the whole update, whatever the micro-batches and processes.

How this departs from the paper's run and from upstream:

1. Upstream trains on the prompt's tokens too; here only on the answer's.
2. Rows of like length share a micro-batch, so little is spent on padding (logged as `padding`).
3. It is `model.group_logps` with one completion per prompt: what GRPO differentiates, with the
   dataset's answer in place of a sample and 1 in place of the advantage.

    accelerate launch sft.py                                   # toy baseline, any CPU, minutes
    accelerate launch sft.py --dataset sat                     # the paper's SFT run on one GPU
    accelerate launch --config_file configs/ddp.yaml sft.py --dataset sat
    accelerate launch sft.py --dataset clevr-cot --target trace  # cold start

The shipped base model, from random weights (some 35 minutes on 2 CPU cores):

    accelerate launch sft.py --model toy-scratch --target habits --max_steps 3000 \
        --learning_rate 2e-3 --lr_schedule cosine --eval_steps 300
"""

import contextlib
import math
import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from model import Policy, Replica
from rewards import accuracy_reward, is_correct, lenient_answer
from run import (
    CommonConfig,
    Run,
    flag,
    load_data,
    open_rows,
    parse_config,
    per_process,
    start_accelerator,
    to_device,
    user_errors,
)
from toy import habit_text


@dataclass
class SFTConfig(CommonConfig):
    target: Literal["answer", "trace", "habits"] = flag(
        "answer",
        "the bare answer, a reasoning trace and the answer, or the toy world's pretraining text",
    )
    learning_rate: float = flag(3e-4, "peak learning rate of AdamW")
    epochs: float | None = flag(None, "passes over the data, in place of max_steps")
    rows_per_update: int = flag(64, "over all processes")
    rows_per_forward: int = flag(64, "micro-batch of each process: changes memory, not the result")
    max_completion_length: int = flag(96, "tokens of a held-out answer")
    look: float = flag(0.2, "habits: share that looks first, once looking has been learned")

    counts: ClassVar[str] = CommonConfig.counts + (
        " rows_per_update rows_per_forward max_completion_length"
    )


# FACTS of the paper's SFT run: lr 2e-5 linear, 2 epochs, batches of 8
PAPER = dict(
    model="Qwen/Qwen2-VL-2B",
    epochs=2.0,
    rows_per_update=8,
    rows_per_forward=1,
    learning_rate=2e-5,
    warmup_ratio=0.0,
    gradient_checkpointing=True,
    seed=42,
    save_steps=500,
    eval_steps=500,
)
LOOK_ALWAYS = 0.8  # of the pretraining: looking is learned first, the habit of guessing after it


def target_text(row: dict, target: str, look: float = 1.0) -> str:
    """What follows the prompt. Raises ValueError when a trace is wanted and the row has none."""
    if target == "answer":
        return row["answer"]
    if target == "habits":
        thinking, answer = habit_text(row, look)
    else:
        thinking, answer = row.get("thinking"), row["answer"]
    if not thinking:
        raise ValueError(f"{row['id']} has no reasoning to train on; --target answer needs none")
    opening = "" if row["prompt_text"].endswith("<think>") else "<think>"
    return f"{opening}{thinking}</think><answer>{answer}</answer>"


def sft_loss(per_token_logps: Tensor, completion_mask: Tensor, num_tokens: int | Tensor) -> Tensor:
    """-sum log pi(token) / num_tokens over the answers; `num_tokens` is the whole update's."""
    return -(per_token_logps * completion_mask).sum() / num_tokens


def stated_accuracy(completion: str, row: dict) -> float:
    """Accuracy of a bare answer: a model trained on those writes no tags."""
    stated = lenient_answer(completion, row)
    return float(stated is not None and is_correct(stated, row))


def encode_targets(rows: list[dict], processor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """The texts and their end token as `completion_ids` and `completion_mask`, (B, C)."""
    ids = [
        torch.tensor(
            processor.tokenizer(text, add_special_tokens=False)["input_ids"] + processor.end_ids[:1]
        )
        for text in texts
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, True, processor.pad_id), pad([torch.ones_like(i) for i in ids], True, 0)


def micro_batches(rows: list[dict], processor, texts: list[str], size: int) -> list[tuple]:
    """(prompt inputs, completion_ids, completion_mask) of `size` rows, like lengths together."""
    ids, mask = encode_targets(rows, processor, texts)
    lengths = mask.sum(-1) + torch.tensor([len(row["encoded"]["input_ids"]) for row in rows])
    batches = []
    for chosen in lengths.argsort(descending=True, stable=True).split(size):
        longest = int(mask[chosen].sum(-1).max())
        inputs = processor.collate([rows[i]["encoded"] for i in chosen])
        batches.append((inputs, ids[chosen, :longest], mask[chosen, :longest]))
    return batches


def padding_share(batches: list[tuple]) -> tuple[int, int]:
    """(padding, all) positions of the forwards: rows are packed tight up to the longest."""
    padding = total = 0
    for inputs, _, mask in batches:
        lengths = inputs["attention_mask"].sum(-1) + mask.sum(-1)
        padding += int((lengths.max() - lengths).sum())
        total += int(lengths.max()) * len(lengths)
    return padding, total


def update(policy, optimizer, batches, num_tokens: float, config, accelerator) -> dict:
    """One optimizer step; `num_tokens` are the answer tokens of all processes."""
    policy.train()
    total = torch.zeros((), device=accelerator.device)
    for number, (inputs, ids, mask) in enumerate(batches):
        last = number == len(batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(policy):
            inputs = to_device(inputs, accelerator.device)
            ids, mask = ids.to(accelerator.device), mask.to(accelerator.device)
            logps, _ = policy(inputs, ids, mask)  # (b, 1, C)
            loss = sft_loss(logps.squeeze(1), mask, num_tokens)
            accelerator.backward(loss * accelerator.num_processes)  # undo the mean over processes
        total += loss.detach()
    grad_norm = accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    loss = accelerator.reduce(total, "sum").item()
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
    if not skipped:
        optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss, "grad_norm": float(grad_norm), "skipped_updates": int(skipped)}


def main() -> None:
    with user_errors():
        config = parse_config(SFTConfig, PAPER)
        accelerator = start_accelerator(config)
        run = Run(config, accelerator)
        rows = open_rows(config)  # before the model: a wrong path is found at once
        model, processor = run.load_policy()
        style = config.prompt_style
        if style == "auto":
            style = processor.default_style
            if style == "base" and config.target == "answer":
                style = "base-direct"
        feed, held_out = load_data(rows, config, processor, style, accelerator)
        target_text(feed[0], config.target)  # the rows have what is to be learned, or this says so
        if config.epochs:
            config.max_steps = math.ceil(config.epochs * len(feed.rows) / config.rows_per_update)
        b = per_process(config, "rows_per_update", accelerator)

    run.announce(model, style_used=style)
    sampler = Replica(model, accelerator)
    policy, optimizer = run.prepare(Policy(model))

    def next_batches(step: int) -> list[tuple]:
        first = step * config.rows_per_update + accelerator.process_index * b
        rows = [feed[first + i] for i in range(b)]
        look = 1.0 if step < LOOK_ALWAYS * config.max_steps else config.look
        texts = [target_text(row, config.target, look) for row in rows]
        return micro_batches(rows, processor, texts, config.rows_per_forward)

    def evaluate(step: int) -> dict:
        score = stated_accuracy if config.target == "answer" else accuracy_reward
        sampler.refresh(policy)
        C = config.max_completion_length
        return run.evaluate(sampler.model, processor, held_out, step, C, score)

    if run.start_step == 0 and config.eval_steps:
        run.log({"step": 0, **evaluate(0)})
    for step, batches in run.steps(next_batches):
        began = time.perf_counter()
        sums = [sum(int(mask.sum()) for *_, mask in batches), *padding_share(batches)]
        sums = accelerator.reduce(torch.tensor(sums, device=accelerator.device), "sum")
        num_tokens, padding, positions = sums.tolist()
        rate = run.set_learning_rate(optimizer, step)
        metrics = update(policy, optimizer, batches, num_tokens, config, accelerator)
        seconds = time.perf_counter() - began
        metrics |= {
            "learning_rate": rate,
            "padding": padding / positions,
            "seconds/train": seconds,
            "tokens_per_second": num_tokens / seconds,
        }
        run.end_update({"step": step + 1, **metrics}, policy, processor, optimizer, evaluate)
    run.finish(policy, processor, feed)


if __name__ == "__main__":
    main()
