"""The algorithm against hand-computed values and independent oracles."""

import math

import pytest
import torch

from grpo import compute_advantages, grpo_loss

LOG = math.log


def loss_of(ratios, advantages, mask=None, ref=None, **settings):
    """The loss, stats and d loss / d logp for given probability ratios."""
    logps = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    old = torch.zeros_like(logps)
    mask = torch.ones(logps.shape) if mask is None else torch.tensor(mask)
    ref = None if ref is None else torch.tensor(ref, dtype=torch.float64)
    settings = dict(beta=0.0, epsilon=0.2, epsilon_high=0.3, loss_type="grpo") | settings
    advantages = torch.tensor(advantages, dtype=torch.float64)
    loss, stats = grpo_loss(logps, old, ref, advantages, mask, **settings)
    loss.backward()
    return loss.item(), {k: v.item() for k, v in stats.items()}, logps.grad


# --- advantages ---


def test_advantages_by_hand_with_bessel_corrected_std():
    rewards = torch.tensor([[2.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0]])
    std = [math.sqrt(2 / 3), 1.0]
    expected = torch.tensor(
        [
            [1 / (std[0] + 1e-4), -1 / (std[0] + 1e-4), 0, 0],
            [-0.5 / (std[1] + 1e-4)] * 3 + [1.5 / (std[1] + 1e-4)],
        ]
    )
    torch.testing.assert_close(compute_advantages(rewards), expected)


def test_unscaled_and_batch_scaled_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    centred = torch.tensor([[0.5, -0.5], [0.0, 0.0]])
    torch.testing.assert_close(compute_advantages(rewards, "none"), centred)
    batch_std = 0.5  # of 1, 0, 1, 1: sqrt(0.75 / 3)
    torch.testing.assert_close(compute_advantages(rewards, "batch"), centred / (batch_std + 1e-4))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exact_zeros(scale):
    advantages = compute_advantages(torch.full((3, 8), 1.7), scale)
    assert torch.equal(advantages, torch.zeros(3, 8))


def test_advantages_refuse_an_unknown_scale():
    with pytest.raises(ValueError, match="group, batch or none"):
        compute_advantages(torch.ones(1, 2), "groups")


# --- the clip: both signs, inside and outside ---


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [
        (1.0, 2.0, -2.0, -2.0),  # at the start: value -A, gradient -A
        (1.0, -2.0, 2.0, 2.0),
        (1.29, 1.0, -1.29, -1.29),  # inside: -ratio * A
        (1.31, 1.0, -1.3, 0.0),  # above the clip and good: no further
        (1.31, -1.0, 1.31, 1.31),  # above the clip and bad: pushed back
        (0.81, -1.0, 0.81, 0.81),
        (0.79, -1.0, 0.8, 0.0),  # below the clip and bad: no further
        (0.79, 1.0, -0.79, -0.79),  # below the clip and good: pulled back
    ],
)
def test_clip_by_hand(ratio, advantage, value, slope):
    loss, stats, grad = loss_of([[ratio]], [advantage])
    assert loss == pytest.approx(value)
    assert grad.item() == pytest.approx(slope)  # d(-ratio * A) / d logp = -ratio * A
    assert stats["clip_ratio"] == float(slope == 0.0)


def test_epsilon_high_defaults_to_epsilon():
    loss, stats, grad = loss_of([[1.25]], [1.0], epsilon_high=None)
    assert loss == pytest.approx(-1.2) and grad.item() == 0 and stats["clip_ratio"] == 1


# --- how token losses are averaged ---

RATIOS = [[1.1, 0.9, 1.2, 1.0], [1.2, 1.0, 1.0, 1.0]]
MASK = [[1, 1, 1, 0], [1, 0, 0, 0]]
# token losses: row 0, A = 1: -1.1 -0.9 -1.2; row 1, A = -1: 1.2


@pytest.mark.parametrize(
    "loss_type, settings, expected",
    [
        ("grpo", {}, (-3.2 / 3 + 1.2) / 2),
        ("bnpo", {}, (-3.2 + 1.2) / 4),
        ("bnpo", {"num_tokens": 100}, (-3.2 + 1.2) / 4),
        ("dr_grpo", {"max_completion_length": 10}, (-3.2 + 1.2) / 20),
        ("dapo", {}, (-3.2 + 1.2) / 4),
        ("dapo", {"num_tokens": 8}, (-3.2 + 1.2) / 8),
    ],
)
def test_loss_types_by_hand(loss_type, settings, expected):
    loss, _, grad = loss_of(RATIOS, [1.0, -1.0], MASK, loss_type=loss_type, **settings)
    assert loss == pytest.approx(expected)
    assert torch.equal(grad != 0, torch.tensor(MASK, dtype=torch.bool))


def test_kl_is_k3_by_hand():
    # logp = 0 (ratio 1), ref = log 2 -> d = log 2, kl = 2 - log 2 - 1; slope beta * (1 - e^d)
    loss, stats, grad = loss_of([[1.0]], [0.0], ref=[[LOG(2)]], beta=0.5)
    assert stats["kl"] == pytest.approx(1 - LOG(2))
    assert loss == pytest.approx(0.5 * (1 - LOG(2)))
    assert grad.item() == pytest.approx(0.5 * (1 - 2))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_masked_tokens_and_empty_rows_are_harmless_even_when_they_hold_nan(loss_type):
    kinds = dict(loss_type=loss_type, beta=0.1, max_completion_length=4, num_tokens=3)
    clean = loss_of([[1.1, 0.9, 1.2, 1.0]], [1.0], [[1, 1, 1, 0]], [[0.1] * 4], **kinds)
    logps = torch.tensor([[1.1, 0.9, 1.2, float("nan")], [float("nan")] * 4]).log()
    logps.requires_grad_()
    ref = torch.tensor([[0.1, 0.1, 0.1, float("-inf")], [float("nan")] * 4])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])
    zeros, advantages = torch.zeros_like(logps.detach()), torch.tensor([1.0, -1.0])
    loss, _ = grpo_loss(logps, zeros, ref, advantages, mask, epsilon=0.2, epsilon_high=0.3, **kinds)
    loss.backward()
    rows = {"grpo": 2, "bnpo": 1, "dr_grpo": 2, "dapo": 1}[loss_type]  # an empty row counts as 0
    assert loss.item() * rows == pytest.approx(clean[0], rel=1e-5)
    torch.testing.assert_close(logps.grad[0, :3] * rows, clean[2][0, :3].float())
    assert not logps.grad[1].any() and not logps.grad[0, 3:].any()


def test_a_batch_of_empty_rows_gives_zero_not_nan():
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        loss, stats, _ = loss_of([[1.0, 1.0]], [1.0], [[0, 0]], loss_type=loss_type)
        assert loss == 0 and stats == {"kl": 0, "clip_ratio": 0}


def test_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="grpo, bnpo, dr_grpo or dapo"):
        loss_of([[1.0]], [1.0], loss_type="ppo")


def test_gradient_at_ratio_one_is_the_policy_gradient():
    """At the first update d loss = -mean over rows and tokens of A * d logp; the loss is 0."""
    advantages = torch.tensor([1.0, -1.0])
    loss, _, grad = loss_of([[1.0] * 5, [1.0] * 5], advantages.tolist())
    assert loss == pytest.approx(0)
    torch.testing.assert_close(grad.float(), -advantages[:, None].expand(2, 5) / 10)
