"""`docs/minimal.py` is what `grpo.py` computes, without the engineering."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.packing import group_logps, pack_groups
from core.qwen import load_policy
from data import build_prompt
from docs import minimal
from grpo import compute_advantages, grpo_loss, token_weights
from toy.world import ToyRows

ROOT = Path(__file__).resolve().parent.parent
B, G, EPSILON = 2, 4, 0.2


@pytest.fixture(scope="module")
def rollout():
    """The toy model and its processor, inputs of B prompts, and a rollout by minimal.py."""
    torch.manual_seed(0)
    model, processor = load_policy("toy")
    rows = [ToyRows("train", seed=0)[b] for b in range(B)]
    prompts, images = [build_prompt(row, "base") for row in rows], [row["images"] for row in rows]
    groups = processor.encode(prompts, images)
    repeated = [[item for item in items for _ in range(G)] for items in (prompts, images)]
    inputs = processor.encode(*repeated)
    ids, mask = minimal.sample(model, inputs, processor.end_ids[0])
    return model, processor, groups, inputs, ids, mask


def gradient_of(loss, model) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_minimal_and_grpo_give_the_same_loss_and_gradient(rollout, beta):
    model, _, groups, inputs, ids, mask = rollout
    rewards = torch.tensor([[2.0, 1.0, 0.0, 1.0], [1.0, 2.0, 1.0, 1.0]])
    # Weights that sampled, and a reference, which differ from the weights that are trained: some
    # ratios are beyond the clip, on both sides.
    moved = 0.3 * torch.randn(2, *ids.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        old_logps, ref_logps = minimal.completion_logps(model, inputs, ids, mask) + moved

    advantages = minimal.compute_advantages(rewards).flatten()
    logps = minimal.completion_logps(model, inputs, ids, mask)
    loss = minimal.grpo_loss(logps, old_logps, ref_logps, advantages, mask, beta, EPSILON)
    gradient = gradient_of(loss, model)

    packed_logps = group_logps(model, pack_groups(model, groups, ids, mask)).flatten(0, 1)
    per_token_loss, stats = grpo_loss(
        packed_logps,
        old_logps,
        ref_logps,
        compute_advantages(rewards).flatten(),
        mask,
        beta=beta,
        epsilon=EPSILON,
    )
    weights = token_weights(
        mask,
        "grpo",
        num_completions=B * G,
        num_tokens=int(mask.sum()),
        max_completion_length=ids.shape[1],
    )
    expected = (per_token_loss * weights).sum()
    expected_gradient = gradient_of(expected, model)
    assert 0 < stats["clip_ratio"] < 1
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


def test_the_loss_starts_at_zero_and_its_gradient_does_not(rollout):
    model, _, _, inputs, ids, mask = rollout
    advantages = minimal.compute_advantages(torch.tensor([[2.0, 1, 0, 1], [1, 2, 1, 1]])).flatten()
    logps = minimal.completion_logps(model, inputs, ids, mask)
    loss = minimal.grpo_loss(logps, logps.detach(), None, advantages, mask)
    assert abs(loss.item()) < 1e-6
    assert gradient_of(loss, model).norm() > 0.1


def test_a_completion_is_masked_up_to_its_end_token_and_holds_no_vision_token(rollout):
    model, processor, _, _, ids, mask = rollout
    end = processor.end_ids[0]
    for row, seen in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
        assert end not in row[: seen - 1]
        assert row[seen - 1] == end or seen == minimal.MAX_C
    assert not torch.isin(ids, torch.tensor(model.config.image_token_id)).any()


def test_it_runs_from_the_repository_root_and_stays_short():
    source = (ROOT / "docs" / "minimal.py").read_text()
    assert len(source.splitlines()) <= 130
    code = "import runpy; runpy.run_path('docs/minimal.py')['train'](rollouts=1, beta=0.04)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "loss +0.0000" in first
    assert float(second.split("loss")[1].split()[0]) != 0
