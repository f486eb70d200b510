"""The algorithm against hand-computed values and independent oracles."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_model

import grpo
from core.groups import Rollout, make_micro_batches, trained_tokens
from core.options import UserError
from core.packing import Policy, use_packed_attention
from core.qwen import Prompt
from grpo import GRPOOptions, compute_advantages, grpo_loss, token_weights
from toy.world import ToyRows

LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "cispo")


# --- advantages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale, stds",
    [("group", [math.sqrt(2 / 3), 1.0]), ("batch", [math.sqrt(5.5 / 7)] * 2), ("none", [1.0] * 2)],
)
def test_advantages_by_hand_with_bessel_corrected_std(scale, stds):
    rewards = torch.tensor([[2.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0]])
    centred = torch.tensor([[1.0, -1.0, 0.0, 0.0], [-0.5, -0.5, -0.5, 1.5]])
    expected = centred / (torch.tensor(stds)[:, None] + (scale != "none") * 1e-4)
    torch.testing.assert_close(compute_advantages(rewards, scale), expected)
    torch.testing.assert_close(compute_advantages(rewards.long(), scale), expected)
    equal = compute_advantages(torch.full((3, 8), 1.7), scale)
    assert torch.equal(equal, torch.zeros(3, 8)), "exactly, without a rounding error"
    with pytest.raises(ValueError, match="group, batch or none"):
        compute_advantages(rewards, "groups")


# --- the loss of a token -------------------------------------------------------------------------


def loss_of(ratios, advantages, mask=None, ref=None, **settings):
    """The summed loss, stats and d loss / d logp for given probability ratios."""
    old = torch.full((len(ratios), len(ratios[0])), -2.0, dtype=torch.float64)
    logps = (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    mask = torch.ones(logps.shape) if mask is None else torch.tensor(mask)
    ref = None if ref is None else logps.detach() + torch.tensor(ref, dtype=torch.float64)
    settings = dict(beta=0.0, epsilon=0.2, epsilon_high=0.3) | settings
    advantages = torch.tensor(advantages, dtype=torch.float64)
    loss, stats = grpo_loss(logps, old, ref, advantages, mask, **settings)
    loss.sum().backward()
    return loss.sum().item(), {k: v.item() for k, v in stats.items()}, logps.grad


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
def test_clip_by_hand_for_both_signs_of_the_advantage(ratio, advantage, value, slope):
    loss, stats, grad = loss_of([[ratio]], [advantage])
    assert loss == pytest.approx(value)
    assert grad.item() == pytest.approx(slope)  # d(-ratio * A) / d logp = -ratio * A
    assert stats["clip_ratio"] == float(slope == 0.0)


def test_epsilon_high_defaults_to_epsilon():
    loss, stats, grad = loss_of([[1.25]], [1.0], epsilon_high=None)
    assert loss == pytest.approx(-1.2) and grad.item() == 0 and stats["clip_ratio"] == 1


def test_kl_is_k3_by_hand():
    # ref - logp = log 2: kl = 2 - log 2 - 1, its slope in logp is beta * (1 - 2)
    loss, stats, grad = loss_of([[1.0]], [0.0], ref=[[math.log(2)]], beta=0.5)
    assert stats["kl"] == pytest.approx(1 - math.log(2))
    assert loss == pytest.approx(0.5 * (1 - math.log(2))) and grad.item() == pytest.approx(-0.5)


def test_the_sequence_level_ratio_by_hand():
    # ratios 4 and 1: their geometric mean 2 is the ratio of both tokens; the third is not trained
    settings = dict(importance_sampling_level="sequence", epsilon=2.0, epsilon_high=2.0)
    tokens = [[4.0, 1.0, 9.0]], [1.5], [[1, 1, 0]]
    loss, _, grad = loss_of(*tokens, **settings)
    assert loss == pytest.approx(2 * -2 * 1.5)
    # loss = -2 A exp(mean log ratio), so its slope in each of the two logps is -A * 2
    assert grad.tolist() == [pytest.approx([-3.0, -3.0, 0.0])]
    _, stats, grad = loss_of(*tokens, **settings | {"epsilon_high": 0.9})
    assert stats["clip_ratio"] == 1 and not grad.any(), "the whole completion is clipped"
    default = GRPOOptions(importance_sampling_level="sequence")
    default.settle()
    assert default.epsilon == 3e-4


def test_cispo_by_hand_bounds_the_weight_and_keeps_the_gradient():
    # loss = -min(ratio, 1.3) * A * logp with logp = log(ratio) - 2; slope -min(ratio, 1.3) * A
    for ratio, bound, clipped in [(1.2, 1.2, 0), (1.5, 1.3, 1), (0.1, 0.1, 0)]:
        for A in (1.0, -2.0):
            loss, stats, grad = loss_of([[ratio]], [A], loss_type="cispo")
            assert loss == pytest.approx(-bound * A * (math.log(ratio) - 2))
            assert grad.item() == pytest.approx(-bound * A) and stats["clip_ratio"] == clipped


# --- how token losses are averaged ---------------------------------------------------------------


@pytest.mark.parametrize(
    "loss_type, weights",
    [
        ("grpo", [[1 / 6, 1 / 6, 1 / 6, 0], [1 / 2, 0, 0, 0]]),
        ("dapo", [[1 / 4, 1 / 4, 1 / 4, 0], [1 / 4, 0, 0, 0]]),
        ("cispo", [[1 / 4, 1 / 4, 1 / 4, 0], [1 / 4, 0, 0, 0]]),
        ("dr_grpo", [[1 / 20, 1 / 20, 1 / 20, 0], [1 / 20, 0, 0, 0]]),
    ],
)
def test_token_weights_by_hand(loss_type, weights):
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    counts = dict(num_completions=2, num_tokens=4, max_completion_length=10)
    torch.testing.assert_close(token_weights(mask, loss_type, **counts), torch.tensor(weights))
    with pytest.raises(ValueError, match="grpo, dapo, dr_grpo or cispo"):
        token_weights(mask, "ppo", **counts)


def random_update(seed: int = 0, N: int = 6, C: int = 5):
    """Log-probabilities of three policies, advantages of both signs, lengths 1 to C."""
    generator = torch.Generator().manual_seed(seed)
    logps, noise, ref = torch.randn(3, N, C, generator=generator) * 0.3
    lengths = torch.tensor([5, 1, 3, 2, 5, 4])
    mask = (torch.arange(C) < lengths[:, None]).long()
    return [logps - 2, logps - 2 + noise, ref - 2, torch.randn(N, generator=generator), mask]


def trl_loss(logps, old, ref, A, mask, loss_type: str, beta: float, max_length: int) -> float:
    """TRL's formulas, token by token in plain Python. (Its cispo names the bound itself.)"""
    sequences = []
    for n in range(len(A)):
        losses = []
        for t in range(int(mask[n].sum())):
            ratio, d = math.exp(logps[n, t] - old[n, t]), float(ref[n, t] - logps[n, t])
            loss = -min(ratio * A[n], min(max(ratio, 0.8), 1.3) * A[n])
            if loss_type == "cispo":
                loss = -min(ratio, 1.3) * A[n] * logps[n, t]
            losses.append(float(loss) + beta * (math.exp(d) - d - 1))
        sequences.append(losses)
    total, tokens = sum(map(sum, sequences)), sum(map(len, sequences))
    if loss_type == "grpo":
        return sum(sum(losses) / len(losses) for losses in sequences) / len(sequences)
    return total / (len(A) * max_length) if loss_type == "dr_grpo" else total / tokens


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_weighted_sum_is_trls_loss_in_one_batch_and_in_parts(loss_type):
    *tensors, mask = random_update()
    counts = dict(num_completions=6, num_tokens=int(mask.sum()), max_completion_length=9)
    weights = token_weights(mask, loss_type, **counts)
    if loss_type != "dr_grpo":
        assert weights.sum().item() == pytest.approx(1)
    expected = trl_loss(*tensors, mask, loss_type, beta=0.1, max_length=9)
    settings = dict(beta=0.1, epsilon=0.2, epsilon_high=0.3, loss_type=loss_type)
    for parts in ([range(6)], [[0], [1, 2], [3, 4, 5]]):
        total = 0.0
        for rows in map(list, parts):
            loss, _ = grpo_loss(*(x[rows] for x in (*tensors, mask)), **settings)
            total += (loss * token_weights(mask[rows], loss_type, **counts)).sum().item()
        assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_the_loss_writes_into_no_input_and_what_is_masked_may_be_nan(loss_type, level):
    inputs = random_update()
    settings = dict(beta=0.1, epsilon=0.2, loss_type=loss_type, importance_sampling_level=level)
    clean, clean_stats = grpo_loss(*inputs, **settings)
    for tensor in inputs[:3]:
        tensor[inputs[4] == 0] = math.nan
    copies = [x.clone() for x in inputs]
    logps = inputs[0].requires_grad_()
    loss, stats = grpo_loss(logps, *inputs[1:], **settings)
    loss.sum().backward()
    for given, copy in zip(inputs, copies, strict=True):
        torch.testing.assert_close(given.detach(), copy, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(loss, clean) and stats == clean_stats
    assert torch.equal(loss != 0, inputs[4].bool()) and logps.grad.isfinite().all()


# --- one update of a model -----------------------------------------------------------------------


def gradient_of(options: GRPOOptions, reference=None, without_last: bool = False):
    """Gradients by name, metrics and number of forwards of one update.

    It has 5 groups of 4 completions of unequal length. The second has no advantage, the
    completions of the last are truncated, and `without_last` takes its advantages away.
    """
    model, processor = tiny_model("qwen2_vl")
    B, G, C, generator = 5, 4, 9, torch.Generator().manual_seed(0)
    ids = torch.randint(300, len(processor.tokenizer), (B * G, C), generator=generator)
    lengths = torch.randint(1, C + 1, (B * G, 1), generator=generator)
    mask, truncated = (torch.arange(C) < lengths).long(), torch.arange(B * G) >= (B - 1) * G
    advantages = torch.randn(B, G, generator=generator)
    advantages[1], advantages[-1] = 0, advantages[-1] * (not without_last)
    prompts = [processor.prompt(ToyRows("train", 3)[i], "base") for i in range(B)]
    rollout = Rollout(prompts, ids, mask, ids * 0.0, truncated, [""] * B * G)

    options.num_generations, options.prompts_per_update = G, B
    options.settle()
    accelerator = Accelerator(cpu=True)
    trained, counts = trained_tokens(rollout, options, accelerator)
    weights = grpo.token_weights(trained, options.loss_type, **counts)
    batches = make_micro_batches(
        model, reference, processor, options, accelerator, rollout, advantages, weights
    )
    measured = grpo.compute_gradients(Policy(model), batches, options, accelerator)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, measured, len(batches)


def assert_same_gradients(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys() and any(grad.abs().max() > 1e-2 for grad in ours.values())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_of_one_and_of_all_give_the_same_gradient_and_metrics(loss_type):
    reference, _ = tiny_model("qwen2_vl", seed=1)
    use_packed_attention(reference)
    one, all_of_them = (
        gradient_of(GRPOOptions(loss_type=loss_type, beta=0.1, prompts_per_forward=n), reference)
        for n in (1, 5)
    )
    assert (one[2], all_of_them[2]) == (5, 1)
    assert_same_gradients(one[0], all_of_them[0])
    assert one[1] == pytest.approx(all_of_them[1], abs=1e-5, rel=1e-4)


def test_without_kl_a_group_without_advantage_costs_no_forward():
    assert gradient_of(GRPOOptions(prompts_per_forward=1))[2] == 4


def test_a_micro_batch_of_truncated_completions_has_weight_0_and_the_rest_is_trained():
    masking = GRPOOptions(prompts_per_forward=1, mask_truncated_completions=True)
    gradients, measured, forwards = gradient_of(masking)
    without, expected, _ = gradient_of(GRPOOptions(prompts_per_forward=1), without_last=True)
    assert forwards == 4 and measured["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert_same_gradients(gradients, without)


# --- rewards -------------------------------------------------------------------------------------


def scored(*values) -> torch.Tensor:
    """The scores (1, G, 1) of a group whose rewards are `values`, one completion each."""
    row = ToyRows("train", 3)[0]
    values, empty = iter(values), torch.zeros(2, 1)
    rollout = Rollout([Prompt(row, "", {})], empty, empty, empty, empty, ["a", "b"])
    return grpo.score(rollout, {"mine": lambda completion, row: next(values)})


def test_int_bool_and_numpy_rewards_are_numbers():
    assert torch.equal(scored(True, 3), torch.tensor([[[1.0], [3.0]]]))
    assert torch.equal(scored(np.float32(0.5), np.int64(2)), torch.tensor([[[0.5], [2.0]]]))
    assert torch.equal(scored(np.bool_(True), torch.tensor(0.5)), torch.tensor([[[1.0], [0.5]]]))


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "1.0", [1.0], 1e39, 10**400])
def test_any_other_reward_is_an_error_that_names_the_reward_the_row_and_the_value(value):
    with pytest.raises(UserError, match="mine.*toy-train-3-0") as error:
        scored(0.5, value)
    assert repr(value) in str(error.value)
