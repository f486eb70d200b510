"""GRPO on a Qwen-VL, from top to bottom: options, advantages, loss, rollout, training loop.

For every question the model writes G answers. Rules score them. An answer that scores above its
group's mean becomes more likely, one below it less likely. There is no value network and no
learned reward model. `docs/minimal.py` has the same algorithm in 130 lines; this file adds packing,
prefill once per group, micro-batches, several processes, evaluation and checkpoints.

How this differs from GRPO as published (arXiv 2402.03300) and from VisualThinker-R1-Zero's code:

1. A group is one sequence, [ prompt | c1 | … | cG ]: its image is encoded once, not G times.
2. Tokens are drawn from the policy's full softmax, without top-k or top-p. (Upstream left the
   library's top-k of 50 on, and trained on the full softmax.)
3. Any number of prompts per device gives the same result. (Upstream mixes up the groups.)
4. The ratio is clipped. (Upstream does not clip. It matters when --num_iterations is above 1.)
5. The loss is a weighted sum over tokens. Every weight is known before the first forward pass, so
   micro-batches and processes add up.
6. With --beta 0 there is no reference model, and a group without signal costs no training forward.

    accelerate launch grpo.py                         # the toy world, any CPU, minutes
    accelerate launch grpo.py --dataset sat           # the paper's run; we estimate one 80 GB GPU
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # several processes: seconds to save after Ctrl-C
    accelerate launch --config_file configs/ddp.yaml grpo.py --dataset sat     # several GPUs
    accelerate launch --config_file configs/fsdp.yaml grpo.py --dataset sat    # several, sharded

Letters: B prompts, b of them in this process, G completions of each, N completions, C completion
length, R reward functions. Rows are prompt-major: completion g of prompt b is row b * G + g.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from core.checkpoint import find_checkpoint, save_model, step_of
from core.evaluation import evaluate
from core.groups import (
    MicroBatch,
    Rollout,
    make_micro_batches,
    rollout_metrics,
    rollout_records,
    sample_rollout,
    trained_tokens,
)
from core.logs import Logs, throughput
from core.lora import add_adapters
from core.optimizer import GuardedStep, prepare
from core.options import TrainingOptions, UserError, flag, parse_options
from core.packing import Policy
from core.processes import Replica, StopSignal, launch, share_of, start_accelerator
from core.prompts import Prompts, open_rows
from core.qwen import load_for_training, load_reference
from core.user_rewards import load_rewards
from rewards import accuracy_reward


@dataclass
class GRPOOptions(TrainingOptions):
    rewards: list[str] = flag(
        ["accuracy", "format"], "Added up: accuracy, format, length, path/to/file.py:function",
        group="rollout",
    )  # fmt: skip
    reward_weights: list[float] = flag([], "A weight per reward; default 1", ge=-1e6, le=1e6)
    num_generations: int = flag(8, "G, completions per prompt", ge=2)
    prompts_per_update: int = flag(8, "B, prompts per update over all processes", ge=1)
    max_completion_length: int = flag(96, "C, maximum tokens per completion", paper=700, ge=1)
    temperature: float = flag(1.0, "Temperature of sampling and of the trained policy", ge=0.01)
    decoding: Literal["eager", "captured"] = flag("eager", "captured replays CUDA graphs")
    log_groups: int = flag(2, "Groups per rollout written to rollouts.jsonl", ge=0)

    num_iterations: int = flag(1, "Updates per rollout", ge=1, group="GRPO")
    prompts_per_forward: int = flag(8, "Groups per training forward, for memory", paper=1, ge=1)
    beta: float = flag(0.0, "Weight of the KL; 0 loads no reference", paper=0.04, ge=0, le=100)
    epsilon: float | None = flag(
        None, "Lower clip bound is 1 - epsilon; default 0.2, with sequence 3e-4", ge=0, le=1
    )
    epsilon_high: float | None = flag(None, "Upper clip bound - 1; default epsilon", ge=0, le=1e6)
    loss_type: Literal["grpo", "dapo", "dr_grpo", "cispo"] = flag(
        "grpo", "Token losses are averaged per completion (grpo), over all tokens (dapo, arXiv "
        "2503.14476) or by a constant (dr_grpo, arXiv 2503.20783); cispo (arXiv 2506.13585) clips "
        "the weights of the tokens instead and averages like dapo",
    )  # fmt: skip
    importance_sampling_level: Literal["token", "sequence"] = flag(
        "token", "One ratio per token, or per completion (GSPO, arXiv 2507.18071)"
    )
    scale_rewards: Literal["group", "batch", "none"] = flag(
        "group", "Divide advantages by the group's std, the batch's, or 1 (arXiv 2503.20783)"
    )
    mask_truncated_completions: bool = flag(
        False, "Do not train on completions that were cut at the limit (DAPO, arXiv 2503.14476)"
    )

    def settle(self) -> None:
        super().settle()
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise UserError("argument --reward_weights: needs one weight for each of --rewards")
        self.functions = load_rewards(self.rewards)
        if self.epsilon is None:
            self.epsilon = 3e-4 if self.importance_sampling_level == "sequence" else 0.2


# --- the algorithm -------------------------------------------------------------------------------


def compute_advantages(rewards: Tensor, scale_rewards: str = "group") -> Tensor:
    """How much better a completion is than its group: (B, G) -> (B, G).

        A[b, g] = (R[b, g] - mean(R[b])) / (std + 1e-4)

    The std is the group's (GRPO, arXiv 2402.03300, section 4.1.2), the whole batch's (`batch`), or
    absent (`none`, Dr. GRPO, arXiv 2503.20783: dividing favours questions that are almost always or
    almost never solved). Equal rewards give zeros. G must be at least 2.

    >>> compute_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 0.8659, -0.8659, -0.8659,  0.8659],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    rewards = rewards + 0.0  # integers have no mean
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    centred = centred.masked_fill(equal, 0.0)  # exactly 0, not a rounding error
    if scale_rewards == "group":
        return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)
    if scale_rewards == "batch":
        return centred / (rewards.std() + 1e-4)
    if scale_rewards == "none":
        return centred
    raise ValueError(f"scale_rewards must be group, batch or none, not {scale_rewards!r}")


def token_weights(
    completion_mask: Tensor,
    loss_type: str,
    *,
    num_completions: int,
    num_tokens: int,
    max_completion_length: int,
) -> Tensor:
    """The weight of every token in the update's loss: (N, C) -> (N, C), zero outside the mask.

        grpo         1 / (num_completions * tokens of the completion)    (arXiv 2402.03300, eq. 3)
        dapo, cispo  1 / num_tokens                                      (arXiv 2503.14476)
        dr_grpo      1 / (num_completions * max_completion_length)       (arXiv 2503.20783)

    The counts are the whole update's, over all processes. The weights of an update sum to 1 for
    `grpo`, `dapo` and `cispo` if no completion is empty.
    """
    mask = completion_mask.float()
    if loss_type == "grpo":
        return mask / (num_completions * mask.sum(-1, keepdim=True).clamp(min=1))
    if loss_type in ("dapo", "cispo"):
        return mask / max(num_tokens, 1)
    if loss_type == "dr_grpo":
        return mask / (num_completions * max_completion_length)
    raise ValueError(f"loss_type must be grpo, dapo, dr_grpo or cispo, not {loss_type!r}")


def grpo_loss(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    ref_per_token_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    beta: float,
    epsilon: float,
    epsilon_high: float | None = None,
    loss_type: str = "grpo",
    importance_sampling_level: str = "token",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss with a KL penalty, of each token. Token tensors (N, C), A (N,).

        ratio_t = exp(logp_t - old_logp_t)
        loss_t  = -min(ratio_t * A, clip(ratio_t, 1 - epsilon, 1 + epsilon_high) * A) + beta * KL_t
        KL_t    = exp(ref_logp_t - logp_t) - (ref_logp_t - logp_t) - 1    (k3: unbiased, never < 0)

    With `importance_sampling_level` "sequence" the ratio is one per completion, the exponential of
    the mean of logp_t - old_logp_t (GSPO, arXiv 2507.18071). `cispo` replaces the first term by
    -min(ratio_t, 1 + epsilon_high) * A * logp_t with no gradient through the ratio
    (arXiv 2506.13585). `epsilon_high` None means epsilon.

    Returns the loss of each token, zero outside the mask, and the means over tokens of `kl` and
    `clip_ratio`, the share of tokens whose gradient the clip stops (for cispo: bounds). The first
    update after a rollout has ratio 1: the loss of `grpo` without KL sums to 0, its gradient does
    not.
    """
    mask = completion_mask.bool()
    high = epsilon if epsilon_high is None else epsilon_high
    A = advantages[:, None]  # (N, 1)

    log_ratio = torch.where(mask, per_token_logps - old_per_token_logps, 0.0)
    if importance_sampling_level == "sequence":
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(-1, keepdim=True) / lengths).expand_as(log_ratio)
    ratio = log_ratio.exp()
    if loss_type == "cispo":
        per_token_loss = -ratio.clamp(max=1 + high).detach() * A * per_token_logps
        clipped = ratio > 1 + high
    else:
        per_token_loss = -torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + high) * A)
        clipped = ((ratio < 1 - epsilon) & (A < 0)) | ((ratio > 1 + high) & (A > 0))

    per_token_kl = torch.zeros_like(ratio)
    if beta:
        d = torch.where(mask, ref_per_token_logps - per_token_logps, 0.0)
        per_token_kl = d.exp() - d - 1
        per_token_loss = per_token_loss + beta * per_token_kl

    tokens = mask.sum().clamp(min=1)
    stats = {
        "kl": (per_token_kl.detach() * mask).sum() / tokens,
        "clip_ratio": (clipped & mask).sum() / tokens,
    }
    return torch.where(mask, per_token_loss, 0.0), stats


# --- one update ----------------------------------------------------------------------------------


def score(rollout: Rollout, functions: dict[str, Callable]) -> Tensor:
    """Every reward of every completion: (b, G, R).

    A tag that ends the prompt, such as <think>, is put in front of the completion first.
    """
    G, rewards = len(rollout.completions) // len(rollout.prompts), []
    for row, completion in enumerate(rollout.completions):
        prompt = rollout.prompts[row // G]
        for name, function in functions.items():
            reward = function(prompt.opening + completion, prompt.row)
            if not hasattr(reward, "__float__") or not -1e30 < reward < 1e30:
                where = f"row {prompt.row['id']}"
                raise UserError(f"the reward {name} returned {reward!r} for {where}, not a number")
            rewards.append(float(reward))
    return torch.tensor(rewards).view(-1, G, len(functions))


def compute_gradients(policy, batches: list[MicroBatch], options, accelerator) -> dict[str, float]:
    """Forward and backward of every micro-batch. Returns the loss and means over trained tokens."""
    policy.train()
    sums = torch.zeros(7, device=accelerator.device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(policy):
            logps, entropy = policy(batch.packed, options.temperature)  # (b, G, C) both
            logps, entropy = logps.flatten(0, 1), entropy.flatten(0, 1)
            if batch.old_per_token_logps is None:
                batch.old_per_token_logps = logps.detach()  # in the first update after a rollout
            trained = batch.weights > 0
            per_token_loss, stats = grpo_loss(
                logps,
                batch.old_per_token_logps,
                batch.ref_per_token_logps,
                batch.advantages,
                trained,
                beta=options.beta,
                epsilon=options.epsilon,
                epsilon_high=options.epsilon_high,
                loss_type=options.loss_type,
                importance_sampling_level=options.importance_sampling_level,
            )
            loss = (per_token_loss * batch.weights).sum()
            accelerator.backward(loss * accelerator.num_processes)  # DDP and FSDP take the mean
        tokens = trained.sum()
        # the sampler's log-probabilities against those of the training pass (k3, as in the loss)
        gap = torch.where(trained, batch.old_per_token_logps - batch.sampling_logps, 0.0)
        gap_kl = (gap.exp() - gap - 1).sum()
        of_batch = [loss.detach(), tokens, (entropy * trained).sum(), stats["kl"] * tokens]
        of_batch += [stats["clip_ratio"] * tokens, gap.abs().sum(), gap_kl]
        sums += torch.stack(of_batch)
    loss, tokens, *sums = accelerator.reduce(sums, "sum").tolist()
    names = ("entropy", "kl", "clip_ratio", "sampling/logp_difference", "sampling/kl")
    means = {name: total / max(tokens, 1) for name, total in zip(names, sums, strict=True)}
    return {"loss": loss, **means}


def main() -> int | None:
    options = parse_options(GRPOOptions, __doc__)
    accelerator = start_accelerator(options)
    own = share_of(options, "prompts_per_update", accelerator)  # this process's places in a rollout
    checkpoint = find_checkpoint(options, accelerator)
    functions = options.functions  # name -> reward function, loaded with the options
    reward_weights = torch.tensor(options.reward_weights or [1.0] * len(functions))
    rows = open_rows(options, checkpoint)  # before the weights, which may have to be downloaded
    model, processor = load_for_training(options, checkpoint)
    sampler = Replica(model, accelerator, lora=options.lora_rank > 0)
    add_adapters(model, options.lora_rank, options.seed, sampler.model.dtype)
    reference = load_reference(options, accelerator)
    prompts = Prompts(rows, options, processor, options.prompts_per_update)
    logs = Logs(options, accelerator, model, prompts, step_of(checkpoint))
    policy, optimizer = prepare(Policy(model), options, accelerator, checkpoint)
    sampler.refresh(policy)  # with the adapters of the checkpoint
    guarded_step = GuardedStep(policy, optimizer, options, accelerator)
    stop = StopSignal(accelerator)
    pack = partial(make_micro_batches, sampler.model, reference, processor, options, accelerator)
    test = partial(evaluate, sampler.model, processor, prompts, accuracy_reward, options, logs)
    save = partial(save_model, policy, processor, options, accelerator)

    if not checkpoint and options.eval_steps:
        logs.metrics({"step": 0, **test(0)})
    for step in range(logs.start_step + 1, options.max_steps + 1):
        began = time.perf_counter()
        number, iteration = divmod(step - 1, options.num_iterations)
        if iteration == 0:
            batch = prompts.of_rollout(number, own)  # b prompts
            rollout = sample_rollout(sampler.model, processor, batch, own, number, options)
            rewards = accelerator.gather(score(rollout, functions).to(accelerator.device)).cpu()
            totals = (rewards * reward_weights).sum(-1)  # (B, G), of all processes
            advantages = compute_advantages(totals, options.scale_rewards)[own]  # (b, G)
            trained, counts = trained_tokens(rollout, options, accelerator)  # (b*G, C)
            weights = token_weights(trained, options.loss_type, **counts)  # (b*G, C)
            batches = pack(rollout, advantages, weights)
            about = rollout_metrics(rollout, rewards, totals, options, accelerator)
            logs.rollouts(rollout_records(rollout, rewards[own], advantages, options), step)
        sampled = time.perf_counter()
        metrics = {"step": step, **compute_gradients(policy, batches, options, accelerator)}
        metrics |= guarded_step(metrics["loss"], step)
        sampler.refresh(policy)
        metrics |= about | throughput(about, totals.numel(), began, sampled)

        if options.eval_steps and (step % options.eval_steps == 0 or step == options.max_steps):
            metrics |= test(step)
        logs.metrics(metrics)
        if logs.note_best(metrics):
            save("best")
        if step % options.num_iterations:
            continue  # a run can only resume between two rollouts
        exit_code = stop.received()
        if exit_code or (options.save_steps and step % options.save_steps < options.num_iterations):
            save(f"checkpoint-{step}", optimizer)
        if exit_code:
            logs.say_stopped(step)
            return exit_code
    save("final")
    logs.conclude(prompts.skipped)


if __name__ == "__main__":
    launch(main)
