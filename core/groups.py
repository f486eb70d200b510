"""A rollout's groups: sample them, measure them, split them into training forwards.

Letters: b prompts of this process, G completions per prompt, C completion length, R reward
functions. Rows are prompt-major: completion g of prompt i is row i * G + g.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from core.packing import Packed, group_logps, pack_groups
from core.qwen import Processor, Prompt
from core.rollout import sample
from rewards import reflects


@dataclass
class Rollout:
    """This process's prompts and the completions sampled for them, on the CPU."""

    prompts: list[Prompt]  # b
    completion_ids: Tensor  # (b*G, C), padded on the right
    completion_mask: Tensor  # (b*G, C), 1 up to and including the end token
    sampling_logps: Tensor  # (b*G, C), the sampler's log-probability of each drawn token
    truncated: Tensor  # (b*G,), cut at the limit before an end token
    completions: list[str]  # b*G


def sample_rollout(
    model: nn.Module,
    processor: Processor,
    prompts: list[Prompt],
    places: Sequence[int],
    number: int,
    options,
) -> Rollout:
    """Sample G completions of each prompt.

    The seed, the `number` of the rollout and the prompts' `places` in it determine every draw, so
    the number of processes changes nothing.
    """
    ids, mask, logps = sample(
        model,
        processor.collate([prompt.inputs for prompt in prompts]),
        options.num_generations,
        options.max_completion_length,
        options.temperature,
        seed=options.seed,
        step=number,
        prompts=list(places),
        decoding=options.decoding,
    )
    ids, mask, logps = ids.cpu(), mask.cpu(), logps.cpu()
    last = ids.gather(-1, mask.sum(-1, keepdim=True) - 1).squeeze(-1)
    truncated = ~torch.isin(last, torch.tensor(processor.end_ids))
    return Rollout(prompts, ids, mask, logps, truncated, processor.decode(ids, mask))


def rollout_metrics(
    rollout: Rollout, rewards: Tensor, totals: Tensor, options, accelerator: Accelerator
) -> dict[str, float]:
    """Means over all processes. `rewards` (B, G, R) and `totals` (B, G) are of all processes."""
    own = {
        "completions/mean_length": rollout.completion_mask.sum(-1),
        "completions/clipped_ratio": rollout.truncated,
        "completions/reflection": torch.tensor([reflects(text) for text in rollout.completions]),
    }
    means = torch.stack([values.float().mean() for values in own.values()])
    means = accelerator.reduce(means.to(accelerator.device), "mean")
    equal = (totals == totals[:, :1]).all(1)
    of_all = {
        "reward": totals,
        "reward_std": totals.std(1),
        "frac_reward_zero_std": equal,
        **{f"rewards/{name}": rewards[..., i] for i, name in enumerate(options.rewards)},
    }
    if "accuracy" in options.rewards:
        right = of_all["rewards/accuracy"] == 1  # (B, G)
        of_all |= {"groups/all_right": right.all(1), "groups/all_wrong": (~right).all(1)}
    metrics = {name: values.float().mean().item() for name, values in of_all.items()}
    return metrics | dict(zip(own, means.tolist(), strict=True))


def trained_tokens(rollout: Rollout, options, accelerator: Accelerator) -> tuple[Tensor, dict]:
    """The mask of the tokens to train on, (b*G, C), and the update's counts over all processes."""
    mask = rollout.completion_mask
    if options.mask_truncated_completions:
        mask = mask * ~rollout.truncated[:, None]
    num_tokens = accelerator.reduce(mask.sum().to(accelerator.device), "sum")
    return mask, {
        "num_completions": options.prompts_per_update * options.num_generations,
        "num_tokens": int(num_tokens),
        "max_completion_length": options.max_completion_length,
    }


def rollout_records(rollout: Rollout, rewards: Tensor, advantages: Tensor, options) -> list[dict]:
    """The first groups, for `Logs.rollouts`. `rewards` (b, G, R), `advantages` (b, G)."""
    G = options.num_generations
    return [
        {
            "prompt": prompt,
            "completions": rollout.completions[i * G : (i + 1) * G],
            "rewards": dict(zip(options.rewards, rewards[i].T.tolist(), strict=True)),
            "advantages": advantages[i].tolist(),
        }
        for i, prompt in enumerate(rollout.prompts[: options.log_groups])
    ]


@dataclass
class MicroBatch:
    """The n groups of one training forward. Token tensors are (n*G, C)."""

    packed: Packed
    weights: Tensor  # zero where a token is not trained
    advantages: Tensor  # (n*G,)
    sampling_logps: Tensor
    ref_per_token_logps: Tensor | None = None
    old_per_token_logps: Tensor | None = None  # known after the rollout's first update


def make_micro_batches(
    model: nn.Module,
    reference: nn.Module | None,
    processor: Processor,
    options,
    accelerator: Accelerator,
    rollout: Rollout,
    advantages: Tensor,
    weights: Tensor,
) -> list[MicroBatch]:
    """Pack `options.prompts_per_forward` groups at a time and compute the reference's logps.

    `advantages` (b, G), `weights` (b*G, C). Without KL a group without advantage changes nothing,
    so it is left out. All processes make the same number of micro-batches, because they meet in
    every backward pass: a process with fewer repeats its last one with weights of 0.
    """
    G, device = options.num_generations, accelerator.device
    used = torch.arange(len(advantages))
    if not options.beta:
        used = advantages.any(1).nonzero().squeeze(-1) if advantages.any() else used[:1]
    batches = []
    for chosen in used.split(options.prompts_per_forward):
        rows = (chosen[:, None] * G + torch.arange(G)).flatten()
        inputs = processor.collate([rollout.prompts[i].inputs for i in chosen])
        ids, mask = rollout.completion_ids[rows], rollout.completion_mask[rows]
        batch = MicroBatch(
            packed=pack_groups(model, inputs, ids, mask),
            weights=weights[rows].to(device),
            advantages=advantages.flatten()[rows].to(device),
            sampling_logps=rollout.sampling_logps[rows].to(device),
        )
        if reference is not None:
            with torch.no_grad(), accelerator.autocast():
                ref_logps = group_logps(reference, batch.packed, temperature=options.temperature)
            batch.ref_per_token_logps = ref_logps.flatten(0, 1)
        batches.append(batch)
    most = int(accelerator.gather(torch.tensor([len(batches)], device=device)).max())
    unused = dataclasses.replace(batches[-1], weights=torch.zeros_like(batches[-1].weights))
    return batches + [unused] * (most - len(batches))
