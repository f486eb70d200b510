"""AdamW, its learning rate, and one guarded step."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from core.checkpoint import restore
from core.options import TrainingOptions, UserError

PATIENCE = 5  # updates in a row with a non-finite loss or gradient before the run stops


def prepare(
    policy: nn.Module, options: TrainingOptions, accelerator: Accelerator, checkpoint: Path | None
):
    """Make AdamW, wrap it and the policy, and on resuming load the checkpoint's state."""
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad],
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        fused=True,
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    if checkpoint:
        restore(checkpoint, policy, optimizer)
    return policy, optimizer


def learning_rate(options: TrainingOptions, step: int) -> float:
    """The learning rate of update `step`, counted from 1."""
    warmup = int(options.warmup_ratio * options.max_steps)
    if step <= warmup:
        return options.learning_rate * step / warmup
    done = (step - 1 - warmup) / max(1, options.max_steps - warmup)
    decay = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    return options.learning_rate * decay[options.lr_schedule]


class GuardedStep:
    """Clip the gradient and step, unless loss or gradient are not finite.

    Such an update leaves the weights as they are and counts as skipped. Several in a row raise a
    UserError.
    """

    def __init__(self, policy: nn.Module, optimizer, options: TrainingOptions, accelerator):
        self.policy, self.optimizer = policy, optimizer
        self.options, self.accelerator = options, accelerator
        self.skipped_in_a_row = 0

    def __call__(self, loss: float, step: int) -> dict[str, float]:
        """`loss` is the update's, over all processes. Returns metrics."""
        rate = learning_rate(self.options, step)
        for group in self.optimizer.param_groups:
            group |= {"lr": rate, "weight_decay": self.options.weight_decay}
        limit = self.options.max_grad_norm or math.inf  # inf: measure the norm, clip nothing
        grad_norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), limit))
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == PATIENCE:
            raise UserError(
                f"loss or gradient were not finite in {PATIENCE} updates in a row (last: update "
                f"{step}, loss {loss}, gradient norm {grad_norm}). Lower --learning_rate, or "
                "look at the rows of these updates."
            )
        return {"grad_norm": grad_norm, "learning_rate": rate, "skipped_updates": int(not finite)}
