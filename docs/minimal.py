"""GRPO in one short file: a tiny vision-language model learns to answer questions about images.

    python docs/minimal.py        # from the repository root, a few minutes on a CPU

Nobody shows the model how to answer. It answers every question several times, rules score the
answers, and an answer that scores above the mean of its group becomes more likely. One update:

    1. sample      G completions of each of B prompts
    2. score       a reward R for each completion, by rules
    3. compare     advantage A = (R - mean) / std, with the mean and std of its group
    4. evaluate    log pi(token) of every completion token under the current weights
    5. loss        -min(ratio * A, clip(ratio) * A) + beta * KL
    6. step        backward pass and optimizer step

`grpo.py` computes the same loss and gradient. It adds speed, variants, several processes and
checkpoints. `docs/grpo.md` works through one group by hand.

Letters: B prompts, G completions per prompt, N = B * G rows, P prompt length, C completion length,
V vocabulary. Completion g of prompt b is row b * G + g.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root

from core.qwen import load_policy
from data import build_prompt
from rewards import accuracy_reward, format_reward
from toy.world import ToyRows

B, G, MAX_C = 8, 8, 96  # prompts per rollout, completions per prompt, most tokens of a completion
ROLLOUTS, UPDATES_PER_ROLLOUT = 100, 2
LEARNING_RATE = 1e-4
EPSILON = 0.2  # the clip: how far one rollout may move a token's probability
BETA = 0.0  # weight of the KL to the starting model; try 0.04, the paper's value


@torch.no_grad()
def sample(model, inputs: dict, end_id: int) -> tuple[Tensor, Tensor]:
    """Step 1. One completion per row: token ids and their mask, both (N, C).

    `generate` must draw from the distribution that is trained, so its filters are switched off.
    """
    c = model.config  # a sampled vision token would announce an image that does not exist
    vision = [c.vision_start_token_id, c.vision_end_token_id, c.image_token_id, c.video_token_id]
    drawing = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    ids = model.generate(**inputs, **drawing, max_new_tokens=MAX_C, suppress_tokens=vision)
    completion_ids = ids[:, inputs["input_ids"].shape[1] :]  # (N, P + C) -> (N, C)
    is_end = (completion_ids == end_id).long()
    return completion_ids, (is_end.cumsum(1) == is_end).long()  # 1 up to the first end token


def compute_advantages(rewards: Tensor) -> Tensor:
    """Step 3. How much better a completion is than its group, in standard deviations: (B, G).

    The group's mean says how hard the question is, so no value network has to learn it. A group
    whose rewards are all equal gets advantages of 0 and teaches nothing.
    """
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    return (rewards - mean) / (std + 1e-4)


def completion_logps(model, inputs: dict, ids: Tensor, mask: Tensor) -> Tensor:
    """Step 4. log pi(token | prompt, tokens before it) of every completion token: (N, C)."""
    longer = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(ids)}
    longer = {name: torch.cat([inputs[name], more], dim=1) for name, more in longer.items()}
    logits = model(**inputs | longer, logits_to_keep=ids.shape[1] + 1, use_cache=False).logits
    logps = logits[:, :-1].log_softmax(-1)  # (N, C, V): the position before a token predicts it
    return logps.gather(-1, ids[..., None]).squeeze(-1)


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, beta=BETA, epsilon=EPSILON) -> Tensor:
    """Step 5. Token tensors are (N, C), advantages (N,). For token t of a completion with A:

        ratio[t] = pi(t) / pi_old(t) = exp(logp[t] - old_logp[t])
        loss[t]  = -min(ratio[t] * A, clip(ratio[t], 1 - epsilon, 1 + epsilon) * A) + beta * KL[t]

    The loss starts at 0. In the first update after a rollout pi equals pi_old, so every ratio is
    1 and the loss is minus the mean advantage, 0. Its gradient, that of -A * logp, is not 0.

    The clip limits what one rollout can change. Once a token of a good completion has become more
    than 1 + epsilon times as likely as when it was drawn (a bad one: less than 1 - epsilon times),
    the minimum is the clipped term. It is a constant, so the token gets no further gradient.

    The KL term pulls the policy towards the frozen starting model. It protects what the model can
    do already from rewards that are easy to trick. The estimate (k3) is unbiased and never < 0.
    """
    A, ratio = advantages[:, None], (logps - old_logps).exp()
    loss = -torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)  # (N, C)
    if beta:
        d = ref_logps - logps
        loss = loss + beta * (d.exp() - d - 1)
    return ((loss * mask).sum(1) / mask.sum(1)).mean()  # mean over tokens, then over completions


def train(rollouts: int = ROLLOUTS, beta: float = BETA) -> None:
    torch.manual_seed(0)
    policy, processor = load_policy("toy")
    reference = load_policy("toy")[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    world = ToyRows("train", seed=0)
    for r in range(rollouts):
        rows = [world[r * B + b] for b in range(B) for _ in range(G)]  # N, every question G times
        prompts = [build_prompt(row, "base") for row in rows]
        inputs = processor.encode(prompts, [row["images"] for row in rows])  # input_ids (N, P)
        ids, mask = sample(policy, inputs, processor.end_ids[0])  # (N, C)
        texts = ["<think>" + text for text in processor.decode(ids, mask)]  # the prompt's last tag
        accuracy = torch.tensor(list(map(accuracy_reward, texts, rows)))  # (N,)
        well_formed = torch.tensor(list(map(format_reward, texts, rows)))  # (N,)
        advantages = compute_advantages((accuracy + well_formed).view(B, G)).flatten()  # (N,)
        ref_logps = completion_logps(reference, inputs, ids, mask) if beta else None
        for update in range(UPDATES_PER_ROLLOUT):
            logps = completion_logps(policy, inputs, ids, mask)
            if update == 0:
                old_logps = logps.detach()  # the weights have not changed since sampling
            loss = grpo_loss(logps, old_logps, ref_logps, advantages, mask, beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scores = f"accuracy {accuracy.mean():.2f}  format {well_formed.mean():.2f}"
            line = f"rollout {r:3}  update {update}  loss {loss:+z.4f}  {scores}"
            print(f"{line}  length {mask.sum() / B / G:.0f}", flush=True)


if __name__ == "__main__":
    train()
