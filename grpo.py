"""GRPO on a Qwen-VL, from top to bottom: config, advantages, loss, rollout, update, loop.

For every question the model writes G answers; rules score them; an answer better than its group's
mean becomes likelier, a worse one less likely. That is all: no value network, no reward model.

    1. take B prompts                                       data.Feed
    2. sample G completions of each                         rollout.sample
    3. score them with rules                                rewards.REWARDS
    4. compare each with its group                          compute_advantages
    5. log-probability of every token                       model.group_logps
    6. clipped policy loss + KL to the reference            grpo_loss
    7. one optimizer step                                   update

How this departs from GRPO as published (arXiv 2402.03300) and from VisualThinker-R1-Zero's code:

1. A group is one sequence, [ prompt | c1 | … | cG ]: its image is encoded once, not G times.
2. Tokens are drawn from the policy's full softmax: no top-k, no top-p (upstream's
   sampling silently used top-k 50).
3. Any number of prompts per device gives what one at a time gives (upstream mixes up the groups).
4. The ratio is clipped (upstream does not; it matters as soon as --num_iterations is above 1).
5. With beta 0 no reference model exists, and a group without signal costs no training forward.

    accelerate launch grpo.py                          # the embedded world, any CPU, minutes
    accelerate launch grpo.py --dataset sat            # the paper's run, one GPU of 80 GB
    accelerate launch --config_file configs/ddp.yaml grpo.py --dataset sat     # several GPUs
    accelerate launch --config_file configs/fsdp.yaml grpo.py --dataset sat    # several, sharded

Letters: B prompts, G completions per prompt, P prompt length, C completion length, V vocabulary.
Rows are prompt-major: completion g of prompt b is row b * G + g.
"""

import contextlib
import math
import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from model import Policy, Replica, group_logps, load_policy
from rewards import REWARDS, accuracy_reward
from rollout import sample
from run import (
    CommonConfig,
    Run,
    flag,
    load_data,
    open_rows,
    parse_config,
    per_process,
    rollout_record,
    start_accelerator,
    to_device,
    user_errors,
)


@dataclass
class GRPOConfig(CommonConfig):
    rewards: list[str] = flag(["accuracy", "format"], f"summed; of: {', '.join(REWARDS)}")
    num_generations: int = flag(8, "G, completions per prompt")
    prompts_per_update: int = flag(8, "B, over all processes")
    prompts_per_forward: int = flag(
        8, "groups in a training forward: changes memory, not the result"
    )
    num_iterations: int = flag(1, "updates per rollout")
    max_completion_length: int = flag(96, "C, tokens")
    temperature: float = flag(1.0, "of sampling, and of the policy that is trained")
    beta: float = flag(0.0, "weight of the KL to the reference; 0 loads none")
    epsilon: float = flag(0.2, "the ratio is clipped below 1 - epsilon …")
    epsilon_high: float | None = flag(None, "… and above 1 + epsilon_high; default epsilon")
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = flag(
        "grpo", "how token losses are averaged"
    )
    scale_rewards: Literal["group", "batch", "none"] = flag("group", "advantages / this std")
    dynamic_sampling: bool = flag(
        False, "sample other prompts in place of groups without signal (DAPO)"
    )
    log_groups: int = flag(2, "groups per rollout written to rollouts.jsonl")

    counts: ClassVar[str] = CommonConfig.counts + (
        " prompts_per_update prompts_per_forward num_iterations max_completion_length"
    )

    def problem(self) -> str | None:
        unknown = [name for name in self.rewards if name not in REWARDS]
        if unknown or not self.rewards:
            return f"argument --rewards: unknown {unknown}; valid: {', '.join(REWARDS)}"
        if self.num_generations < 2:
            return (
                "argument --num_generations: a group of 1 has nothing to compare with; at least 2"
            )
        if self.temperature <= 0:
            return "argument --temperature: must be above 0: a greedy group has no spread"
        return super().problem()


# the paper's table 2 and upstream's run_grpo_SAT.sh
PAPER = dict(
    model="Qwen/Qwen2-VL-2B",
    prompts_per_forward=1,
    max_completion_length=700,
    beta=0.04,
    learning_rate=1e-6,
    warmup_ratio=0.0,
    max_steps=1500,
    save_steps=100,
    eval_steps=100,
    gradient_checkpointing=True,
    seed=42,
)
REFILLS = 4  # with dynamic_sampling, how often a group without signal is replaced at most


# --- the algorithm -------------------------------------------------------------------------------


def without_signal(rewards: Tensor) -> Tensor:
    """Groups whose rewards are all equal teach nothing: (B, G) -> (B,), boolean."""
    return (rewards == rewards[:, :1]).all(dim=1)


def compute_advantages(rewards: Tensor, scale_rewards: str = "group") -> Tensor:
    """How much better a completion is than its group: (B, G) -> (B, G).

        A[b, g] = (R[b, g] - mean(R[b])) / (std + 1e-4)

    The std is the group's (GRPO, arXiv 2402.03300, section 4.1.2), the whole batch's (`batch`), or
    none at all (Dr. GRPO, arXiv 2503.20783: dividing favours questions that are almost always or
    almost never solved). Equal rewards give zeros. G must be at least 2.

    >>> compute_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 0.8659, -0.8659, -0.8659,  0.8659],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    centred = centred.masked_fill(without_signal(rewards)[:, None], 0.0)  # not a rounding error
    if scale_rewards == "group":
        return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)
    if scale_rewards == "batch":
        return centred / (rewards.std() + 1e-4)
    if scale_rewards == "none":
        return centred
    raise ValueError(f"scale_rewards must be group, batch or none, not {scale_rewards!r}")


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
    max_completion_length: int | None = None,
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss with a KL penalty. Token tensors (N, C), advantages (N,).

        ratio  = exp(logp - old_logp)
        loss_t = -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * KL_t
        KL_t   = exp(ref_logp - logp) - (ref_logp - logp) - 1       (k3: unbiased, never negative)

    Averaged over tokens as `loss_type` says: `grpo`, mean over rows of each row's token mean
    (arXiv 2402.03300, eq. 3); `bnpo`, mean over these rows' tokens; `dr_grpo`, sum / (rows *
    `max_completion_length`) (arXiv 2503.20783); `dapo`, sum / `num_tokens`, the tokens of the whole
    update (arXiv 2503.14476), by default of these rows. `epsilon_high` None means epsilon.

    The first update after a rollout has ratio 1, so without KL the loss `grpo` is about 0 and its
    gradient is not. Returns the loss, and the means over tokens of `kl` and `clip_ratio` (1 where
    the clip stops the gradient). Rows without any token count as 0.
    """
    mask = completion_mask.bool()
    high = epsilon if epsilon_high is None else epsilon_high
    A = advantages[:, None]  # (N, 1)

    log_ratio = torch.where(mask, per_token_logps - old_per_token_logps, 0.0)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + high)
    per_token_loss = -torch.minimum(ratio * A, clipped_ratio * A)

    per_token_kl = torch.zeros_like(ratio)
    if beta:
        d = torch.where(mask, ref_per_token_logps - per_token_logps, 0.0)
        per_token_kl = d.exp() - d - 1
        per_token_loss = per_token_loss + beta * per_token_kl

    per_token_loss = per_token_loss * mask
    tokens = mask.sum().clamp(min=1)
    if loss_type == "grpo":
        loss = (per_token_loss.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    elif loss_type == "bnpo":
        loss = per_token_loss.sum() / tokens
    elif loss_type == "dr_grpo":
        loss = per_token_loss.sum() / (len(mask) * (max_completion_length or mask.shape[1]))
    elif loss_type == "dapo":
        loss = per_token_loss.sum() / (tokens if num_tokens is None else num_tokens)
    else:
        raise ValueError(f"loss_type must be grpo, bnpo, dr_grpo or dapo, not {loss_type!r}")

    stopped = ((ratio < 1 - epsilon) & (A < 0)) | ((ratio > 1 + high) & (A > 0))
    stats = {
        "kl": (per_token_kl.detach() * mask).sum() / tokens,
        "clip_ratio": (stopped & mask).sum() / tokens,
    }
    return loss, stats


# --- rollout -------------------------------------------------------------------------------------


@dataclass
class Group:
    """One question and the G answers sampled to it."""

    row: dict
    completion_ids: Tensor  # (G, C), padded on the right
    completion_mask: Tensor  # (G, C), 1 up to and including the end token
    completions: list[str]
    rewards: Tensor  # (G, R), one column per reward function
    advantages: Tensor | None = None  # (G,)

    @property
    def tokens(self) -> int:
        return int(self.completion_mask.sum())

    def record(self, names: list[str], step: int) -> dict:
        """The group as a line of rollouts.jsonl."""
        rewards = {name: self.rewards[:, i].tolist() for i, name in enumerate(names)}
        more = {"advantages": self.advantages.tolist()}
        return rollout_record(self.row, self.completions, rewards, step, **more)


def sample_groups(model, processor, rows: list[dict], slots: list[int], number: int, config):
    """Sample G completions of each row's prompt and score them.

    The seed, the `number` of the rollout and the prompts' `slots` in it fix every draw.
    """
    inputs = to_device(processor.collate([row["encoded"] for row in rows]), model.device)
    G, C = config.num_generations, config.max_completion_length
    sampled = sample(
        model, inputs, G, C, config.temperature, seed=config.seed, step=number, prompts=slots
    )  # ids and mask, (b*G, C) both
    groups = []
    for row, ids, mask in zip(rows, *(tensor.split(G) for tensor in sampled), strict=True):
        texts = processor.decode(ids, mask)
        # where the prompt ends in <think>, the answer's format begins in the prompt
        rewards = [[REWARDS[r](row["opening"] + t, row) for r in config.rewards] for t in texts]
        groups.append(Group(row, ids, mask, texts, torch.tensor(rewards)))
    return groups


def explore(feed, model, processor, config, accelerator, number: int, rows: list[dict]):
    """Rollout `number` of the run: this process's groups, and metrics over all processes."""
    first, b = accelerator.process_index * len(rows), len(rows)
    groups = sample_groups(model, processor, rows, list(range(first, first + b)), number, config)
    sampled = b
    for attempt in range(1, 1 + REFILLS * config.dynamic_sampling):
        flat = [i for i in range(b) if without_signal(groups[i].rewards.sum(-1)[None])]
        if not flat:
            break
        slots = [attempt * config.prompts_per_update + first + i for i in flat]
        others = [feed[data_position(config, number, slot)] for slot in slots]
        fresh = sample_groups(model, processor, others, slots, number, config)
        for i, group in zip(flat, fresh, strict=True):
            groups[i] = group
        sampled += len(flat)

    rewards = torch.stack([group.rewards for group in groups]).to(accelerator.device)
    rewards = accelerator.gather(rewards)  # (B, G, R)
    totals = rewards.sum(-1)  # (B, G)
    advantages = compute_advantages(totals, config.scale_rewards)
    for group, own in zip(groups, advantages[first : first + b].cpu(), strict=True):
        group.advantages = own

    lengths = torch.cat([group.completion_mask.sum(-1) for group in groups])
    last = torch.cat(
        [g.completion_ids.gather(-1, g.completion_mask.sum(-1, True) - 1) for g in groups]
    )
    cut = ~torch.isin(last, torch.tensor(processor.end_ids, device=last.device))
    sums = torch.tensor(
        [lengths.sum(), cut.sum(), len(lengths), sampled], device=accelerator.device
    )
    tokens, cut, completions, sampled = accelerator.reduce(sums, "sum").tolist()
    metrics = {
        "reward": totals.mean().item(),
        "reward_std": totals.std(1).mean().item(),
        "frac_reward_zero_std": without_signal(totals).float().mean().item(),
        **{f"rewards/{r}": rewards[..., i].mean().item() for i, r in enumerate(config.rewards)},
        "completions/mean_length": tokens / completions,
        "completions/clipped_ratio": cut / completions,
    }
    if config.dynamic_sampling:
        metrics["sampled_groups"] = sampled
    return groups, tokens, metrics


def data_position(config, number: int, slot: int) -> int:
    """Where in the data prompt `slot` of rollout `number` stands: nothing to save, a function."""
    return number * config.prompts_per_update * (1 + REFILLS * config.dynamic_sampling) + slot


# --- the update ----------------------------------------------------------------------------------


@dataclass
class MicroBatch:
    """Some whole groups, as one training forward takes them."""

    inputs: dict[str, Tensor]
    completion_ids: Tensor  # (b, G, C)
    completion_mask: Tensor  # (b, G, C)
    advantages: Tensor  # (b, G)
    weight: float  # the loss is the sum of weight * loss, averaged over processes
    ref_per_token_logps: Tensor | None = None  # (b, G, C)
    old_per_token_logps: Tensor | None = None  # (b, G, C), from the first update of the rollout


def micro_batches(
    groups: list[Group], processor, config, accelerator, reference
) -> list[MicroBatch]:
    """Split the groups into training forwards: like lengths together, cut to their longest.

    A group without advantage changes nothing when there is no KL, so it is left out. Every process
    makes equally many and at least one, if need be of weight 0: they meet in every backward pass.
    """
    device = accelerator.device
    order = sorted(groups, key=lambda group: group.tokens, reverse=True)
    used = [group for group in order if config.beta or group.advantages.any()]
    size = config.prompts_per_forward
    parts = [used[i : i + size] for i in range(0, len(used), size)]
    most = max(1, int(accelerator.gather(torch.tensor([len(parts)], device=device)).max()))

    batches = []
    for part in parts + [[]] * (most - len(parts)):
        if config.loss_type == "dapo":  # divided by the tokens of all processes: undo their mean
            weight = accelerator.num_processes * bool(part)
        elif config.loss_type == "bnpo":
            weight = sum(group.tokens for group in part) / sum(group.tokens for group in groups)
        else:
            weight = len(part) / len(groups)
        part = part or order[-1:]
        rows = (zip(g.completion_ids, g.completion_mask.bool(), strict=True) for g in part)
        tight = [ids[mask] for group in rows for ids, mask in group]
        ids, mask = (
            nn.utils.rnn.pad_sequence(tensors, batch_first=True).unflatten(0, (len(part), -1))
            for tensors in (tight, [torch.ones_like(ids) for ids in tight])
        )
        inputs = to_device(processor.collate([group.row["encoded"] for group in part]), device)
        advantages = torch.stack([group.advantages for group in part]).to(device)
        batch = MicroBatch(inputs, ids, mask, advantages, weight)
        if reference is not None:
            with torch.no_grad(), accelerator.autocast():
                batch.ref_per_token_logps = group_logps(
                    reference, inputs, ids, mask, temperature=config.temperature
                )
        batches.append(batch)
    return batches


def update(policy, optimizer, batches: list[MicroBatch], num_tokens, config, accelerator) -> dict:
    """One optimizer step over the micro-batches; `num_tokens` are the update's, over all processes.

    A non-finite loss or gradient leaves the weights as they are (`skipped_updates` 1). Returns
    metrics as means over all processes.
    """
    policy.train()
    totals = torch.zeros(5, device=accelerator.device)  # loss, then sums over tokens, and tokens
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(policy):
            logps, entropy = policy(
                batch.inputs, batch.completion_ids, batch.completion_mask, config.temperature
            )  # (b, G, C) both
            if batch.old_per_token_logps is None:
                batch.old_per_token_logps = logps.detach()
            token_logps = (logps, batch.old_per_token_logps, batch.ref_per_token_logps)
            mask = batch.completion_mask.flatten(0, 1)
            loss, stats = grpo_loss(
                *(None if t is None else t.flatten(0, 1) for t in token_logps),  # (b*G, C)
                batch.advantages.flatten(),
                mask,
                beta=config.beta,
                epsilon=config.epsilon,
                epsilon_high=config.epsilon_high,
                loss_type=config.loss_type,
                max_completion_length=config.max_completion_length,
                num_tokens=num_tokens,
            )
            accelerator.backward(loss * batch.weight)
        tokens = mask.sum()
        sums = torch.stack(
            [entropy.sum(), stats["kl"] * tokens, stats["clip_ratio"] * tokens, tokens]
        )
        totals[0] += loss.detach() * batch.weight
        totals[1:] += sums * (batch.weight > 0)
    grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
    loss = accelerator.reduce(totals[:1], "mean").item()
    entropy, kl, clip_ratio, tokens = accelerator.reduce(totals[1:], "sum").tolist()
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    means = {"kl": kl, "entropy": entropy, "clip_ratio": clip_ratio}
    return {
        "loss": loss,
        **{name: value / max(tokens, 1) for name, value in means.items()},
        "grad_norm": grad_norm,
        "skipped_updates": int(not finite),
    }


def main() -> None:
    with user_errors():
        config = parse_config(GRPOConfig, PAPER)
        accelerator = start_accelerator(config)
        run = Run(config, accelerator)
        rows = open_rows(config)  # before the model: a wrong path is found at once
        model, processor = run.load_policy()
        reference = None
        if config.beta:
            dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
            reference, _ = load_policy(config.model, dtype=dtype, max_pixels=config.max_pixels)
            reference.requires_grad_(False).eval().to(accelerator.device)
        style = processor.default_style if config.prompt_style == "auto" else config.prompt_style
        feed, held_out = load_data(rows, config, processor, style, accelerator)
        b = per_process(config, "prompts_per_update", accelerator)

    completions = config.prompts_per_update * config.num_generations
    run.announce(model, style_used=style, completions_per_update=completions)
    sampler = Replica(model, accelerator)
    policy, optimizer = run.prepare(Policy(model))

    def next_rows(step: int) -> list[dict]:
        """This process's prompts for the rollout that update `step` begins with, if it does."""
        number, within = divmod(step, config.num_iterations)
        first = accelerator.process_index * b
        return [] if within else [feed[data_position(config, number, first + i)] for i in range(b)]

    def evaluate(step: int) -> dict:
        C = config.max_completion_length
        return run.evaluate(sampler.model, processor, held_out, step, C, accuracy_reward)

    if run.start_step == 0 and config.eval_steps:
        run.log({"step": 0, **evaluate(0)})
    for step, rows in run.steps(next_rows):
        began = time.perf_counter()
        if rows:
            number = step // config.num_iterations
            groups, num_tokens, about = explore(
                feed, sampler.model, processor, config, accelerator, number, rows
            )
            logged = groups[: config.log_groups]
            run.log_rollouts([group.record(config.rewards, step + 1) for group in logged])
        sampled = time.perf_counter()
        if rows:
            batches = micro_batches(groups, processor, config, accelerator, reference)
        rate = run.set_learning_rate(optimizer, step)
        metrics = update(policy, optimizer, batches, num_tokens, config, accelerator)
        sampler.refresh(policy)
        ended = time.perf_counter()
        metrics = {"step": step + 1, **metrics, **about, "learning_rate": rate}
        metrics["seconds/rollout"] = sampled - began
        metrics["seconds/train"] = ended - sampled
        metrics["tokens_per_second"] = num_tokens / (ended - began)
        boundary = (step + 1) % config.num_iterations == 0
        run.end_update(metrics, policy, processor, optimizer, evaluate, boundary)
    run.finish(policy, processor, feed)


if __name__ == "__main__":
    main()
