"""Greedy answers to held-out questions, during training."""

from collections.abc import Callable
from statistics import fmean

import torch
from accelerate.utils import gather_object

from core.logs import Logs
from core.options import TrainingOptions
from core.prompts import Prompts
from core.qwen import Processor
from core.rollout import sample
from rewards import reflects

BATCH = 64  # prompts decoded together
LOGGED = 8  # answers that go to rollouts.jsonl


def evaluate(
    model: torch.nn.Module,
    processor: Processor,
    prompts: Prompts,
    score: Callable[[str, dict], float],
    options: TrainingOptions,
    logs: Logs,
    step: int,
) -> dict[str, float]:
    """Answer this process's held-out prompts greedily, score the answers and log the first ones.

    Returns means over all processes: `eval/accuracy`, `eval/<task>`, `eval/completion_length` in
    tokens and `eval/reflection`.
    """
    answers, records = [], []
    how = {"temperature": 0.0, "decoding": getattr(options, "decoding", "eager")}
    for start in range(0, len(prompts.held_out), BATCH):
        batch = prompts.held_out[start : start + BATCH]
        inputs = processor.collate([prompt.inputs for prompt in batch])
        ids, mask, _ = sample(model, inputs, 1, options.max_completion_length, **how)
        texts, lengths = processor.decode(ids, mask), mask.sum(-1).tolist()
        for prompt, text, length in zip(batch, texts, lengths, strict=True):
            right = score(prompt.opening + text, prompt.row)
            scores = {"accuracy": right, prompt.row["task"]: right}
            answers.append(scores | {"completion_length": length, "reflection": reflects(text)})
            rewards = {"accuracy": [right]}
            records.append({"prompt": prompt, "completions": [text], "rewards": rewards})
    logs.rollouts(records[:LOGGED], step, "eval")
    answers = gather_object(answers)
    names = sorted(set().union(*answers))
    return {f"eval/{name}": fmean(a[name] for a in answers if name in a) for name in names}
