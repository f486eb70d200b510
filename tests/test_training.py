"""The update: batching changes nothing, only what should be trained is trained, and it learns."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_model

import sft
import toy
from grpo import Group, GRPOConfig, explore, micro_batches, sample_groups, update
from model import Policy, group_logps, load_policy
from rollout import sample
from run import load_data, open_rows
from sft import SFTConfig, encode_targets, target_text

ACCELERATOR = Accelerator(cpu=True)


class SGD(torch.optim.SGD):
    """Keeps the gradients it was given, so that a test can look at them."""

    def step(self, closure=None):
        self.seen = [
            None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]
        ]
        return super().step(closure)


def toy_rows(processor, count: int, style: str = "base", split: str = "train") -> list[dict]:
    return [
        processor.prepare(row, style) for row in (toy.ToyRows(split, 3)[i] for i in range(count))
    ]


def random_groups(processor, B: int, G: int = 4, C: int = 9) -> list[Group]:
    """Groups of unequal completion lengths and advantages; group 1 has no advantage at all."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for number, row in enumerate(toy_rows(processor, B)):
        ids = torch.randint(300, len(processor.tokenizer), (G, C - number % 3), generator=generator)
        lengths = torch.randint(1, ids.shape[1] + 1, (G, 1), generator=generator)
        mask = (torch.arange(ids.shape[1]) < lengths).long()
        advantages = torch.randn(G, generator=generator) * (number != 1)
        groups.append(Group(row, ids, mask, [""] * G, torch.zeros(G, 1), advantages))
    return groups


def gradients(config, groups, reference=None, iterations: int = 1):
    model, processor = tiny_model("qwen2_vl")
    policy = Policy(model)
    optimizer = SGD(policy.parameters(), lr=1e-3)
    batches = micro_batches(groups, processor, config, ACCELERATOR, reference)
    num_tokens = float(sum(group.completion_mask.sum() for group in groups))
    for _ in range(iterations):
        metrics = update(policy, optimizer, batches, num_tokens, config, ACCELERATOR)
    return optimizer.seen, metrics


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_micro_batches_change_neither_gradient_nor_metrics(loss_type, beta):
    reference, processor = tiny_model("qwen2_vl", seed=1)
    groups = random_groups(processor, 5)
    config = GRPOConfig(loss_type=loss_type, beta=beta, max_grad_norm=1e9, num_generations=4)
    results = [
        gradients(
            dataclasses.replace(config, prompts_per_forward=size),
            groups,
            beta and reference or None,
        )
        for size in (5, 2, 1)
    ]
    for grads, metrics in results[1:]:
        for one, other in zip(grads, results[0][0], strict=True):
            if other is not None:
                torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)
        for name, value in results[0][1].items():
            assert metrics[name] == pytest.approx(value, abs=1e-5, rel=1e-4), name


def test_the_gradient_is_that_of_every_row_alone():
    """B prompts at once against the plain policy gradient of one row at a time."""
    model, processor = tiny_model("qwen2_vl")
    groups = random_groups(processor, 3)
    grads, _ = gradients(GRPOConfig(max_grad_norm=1e9), groups)
    for group in groups:
        inputs = processor.collate([group.row["encoded"]])
        for ids, mask, advantage in zip(
            group.completion_ids, group.completion_mask, group.advantages, strict=True
        ):
            logps = group_logps(model, inputs, ids[None], mask[None])
            (-advantage * logps.sum() / mask.sum() / 12).backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        if grad is not None:
            torch.testing.assert_close(grad, p.grad, atol=2e-6, rtol=1e-4)


def test_groups_without_advantage_cost_no_forward_without_kl_and_one_with_it():
    _, processor = tiny_model("qwen2_vl")
    groups = random_groups(processor, 4)
    for group in groups[:3]:
        group.advantages = torch.zeros(4)
    config = GRPOConfig(prompts_per_forward=1)
    assert len(micro_batches(groups, processor, config, ACCELERATOR, None)) == 1
    config.beta = 0.1
    assert len(micro_batches(groups, processor, config, ACCELERATOR, None)) == 4


def test_an_update_without_any_signal_moves_nothing():
    _, processor = tiny_model("qwen2_vl")
    groups = random_groups(processor, 2)
    for group in groups:
        group.advantages = torch.zeros(4)
    grads, metrics = gradients(GRPOConfig(), groups)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert not any(grad.any() for grad in grads if grad is not None)


def test_old_logps_are_those_of_the_first_update_of_a_rollout():
    _, processor = tiny_model("qwen2_vl")
    groups = random_groups(processor, 2)
    config = GRPOConfig(epsilon=1e-6, max_grad_norm=1e9)
    assert gradients(config, groups, iterations=1)[1]["clip_ratio"] == 0
    assert gradients(config, groups, iterations=2)[1]["clip_ratio"] > 0


def test_kl_is_zero_against_itself_and_positive_against_another():
    same, processor = tiny_model("qwen2_vl")
    other, _ = tiny_model("qwen2_vl", seed=1)
    groups = random_groups(processor, 2)
    config = GRPOConfig(beta=0.1)
    assert gradients(config, groups, same)[1]["kl"] == pytest.approx(0, abs=1e-6)
    assert gradients(config, groups, other)[1]["kl"] > 0.1


def test_a_nonfinite_loss_leaves_the_weights_as_they_are():
    model, processor = tiny_model("qwen2_vl")
    groups = random_groups(processor, 2)
    groups[0].advantages = torch.full((4,), float("nan"))
    policy = Policy(model)
    before = [p.clone() for p in policy.parameters()]
    config = GRPOConfig()
    batches = micro_batches(groups, processor, config, ACCELERATOR, None)
    metrics = update(policy, SGD(policy.parameters(), lr=1.0), batches, 1.0, config, ACCELERATOR)
    assert metrics["skipped_updates"] == 1
    assert all(torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))


def test_eight_prompts_at_once_are_eight_prompts_one_at_a_time():
    """Completions and rewards of a prompt do not depend on what else is in the batch."""
    model, processor = tiny_model("qwen2_vl")
    rows = toy_rows(processor, 8)
    config = GRPOConfig(num_generations=3, max_completion_length=12)
    together = sample_groups(model, processor, rows, list(range(8)), 5, config)
    for slot, group in enumerate(together):
        (alone,) = sample_groups(model, processor, [rows[slot]], [slot], 5, config)
        assert alone.completions == group.completions
        assert torch.equal(alone.rewards, group.rewards)


def test_dynamic_sampling_replaces_groups_without_signal(monkeypatch):
    model, processor = tiny_model("qwen2_vl")
    config = GRPOConfig(num_generations=4, prompts_per_update=4, max_completion_length=8)
    config.rewards, config.dynamic_sampling = ["accuracy"], True
    seen = []

    def reward(completion, row):
        if row["id"] not in seen:
            seen.append(row["id"])
        return float(len(completion) % 2) if len(seen) > 2 else 1.0  # the first two teach nothing

    monkeypatch.setitem(__import__("grpo").REWARDS, "accuracy", reward)
    feed, _ = load_data((open_rows(config)[0], []), config, processor, "base", ACCELERATOR)
    rows = [feed[i] for i in range(4)]
    groups, _, metrics = explore(feed, model, processor, config, ACCELERATOR, 0, rows)
    assert metrics["sampled_groups"] >= 6
    assert all(group.row["id"] not in seen[:2] for group in groups)


def test_grpo_makes_what_is_rewarded_likelier(monkeypatch):
    """The whole loop as a bandit: completions that contain an "e" are rewarded, nothing else is."""
    model, processor = tiny_model("qwen2_vl")
    config = GRPOConfig(max_completion_length=4, num_generations=8, rewards=["accuracy"])
    monkeypatch.setitem(
        __import__("grpo").REWARDS, "accuracy", lambda text, row: float("e" in text)
    )
    rows = toy_rows(processor, 4)
    policy = Policy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    rewards = []
    for step in range(25):
        groups, tokens, metrics = explore(None, model, processor, config, ACCELERATOR, step, rows)
        batches = micro_batches(groups, processor, config, ACCELERATOR, None)
        update(policy, optimizer, batches, tokens, config, ACCELERATOR)
        rewards.append(metrics["reward"])
    assert rewards[0] < 0.6 and sum(rewards[-3:]) / 3 > 0.9, rewards


# --- supervised ---


@pytest.mark.parametrize(
    "style, target", [("base", "trace"), ("base-direct", "answer"), ("instruct", "trace")]
)
def test_only_the_answer_and_its_end_token_are_trained(style, target):
    """Token by token: what `group_logps` scores is the target text and the end token, no more."""
    _, processor = tiny_model("qwen2_vl")
    rows = toy_rows(processor, 3, style)
    texts = [target_text(row, target) for row in rows]
    (batch,) = sft.micro_batches(rows, processor, texts, 3)
    inputs, ids, mask = batch
    order = [
        next(
            i
            for i, row in enumerate(rows)
            if torch.equal(row["encoded"]["input_ids"], prompt[seen.bool()])
        )
        for prompt, seen in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    assert sorted(order) == [0, 1, 2]
    for i, row_ids, row_mask in zip(order, ids, mask, strict=True):
        trained = row_ids[row_mask.bool()].tolist()
        assert trained[-1] == processor.end_ids[0]
        assert processor.tokenizer.decode(trained[:-1]) == texts[i]
        assert processor.image_id not in trained
        answer = rows[i]["answer"]
        if target == "answer":
            assert texts[i] == answer
        else:
            thinking = "<think>" + rows[i]["thinking"] + "</think><answer>" + answer + "</answer>"
            assert rows[i]["opening"] + texts[i] == thinking


def sft_gradients(size: int):
    model, processor = tiny_model("qwen2_vl")
    rows = toy_rows(processor, 8)
    batches = sft.micro_batches(rows, processor, [target_text(r, "trace") for r in rows], size)
    policy = Policy(model)
    optimizer = SGD(policy.parameters(), lr=1e-3)
    num_tokens = sum(int(mask.sum()) for *_, mask in batches)
    config = SFTConfig(max_grad_norm=1e9)
    loss = sft.update(policy, optimizer, batches, num_tokens, config, ACCELERATOR)["loss"]
    return loss, optimizer.seen, len(batches)


def test_one_batch_of_eight_and_eight_of_one_give_equal_gradients():
    (loss, grads, one), (other_loss, other_grads, eight) = sft_gradients(8), sft_gradients(1)
    assert (one, eight) == (1, 8) and loss == pytest.approx(other_loss, abs=1e-5)
    for a, b in zip(grads, other_grads, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_sft_learns_32_rows_by_heart():
    model, processor = load_policy("toy")
    rows = toy_rows(processor, 32, "base-direct")
    answers = [target_text(row, "answer") for row in rows]
    batches = sft.micro_batches(rows, processor, answers, 32)
    num_tokens = sum(int(mask.sum()) for *_, mask in batches)
    policy = Policy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)

    def answered() -> list[str]:
        inputs = processor.collate([row["encoded"] for row in rows])
        return processor.decode(*sample(model, inputs, 1, 20, temperature=0.0))

    assert answered() != answers
    for _ in range(60):
        sft.update(policy, optimizer, batches, num_tokens, SFTConfig(), ACCELERATOR)
    assert answered() == answers


def test_sft_loss_is_the_librarys_cross_entropy():
    model, processor = tiny_model("qwen2_vl")
    rows = toy_rows(processor, 1)
    ids, mask = encode_targets(rows, processor, [target_text(rows[0], "trace")])
    prompt = rows[0]["encoded"]
    full = torch.cat([prompt["input_ids"], ids[0]])[None]
    labels = full.clone()
    labels[:, : len(prompt["input_ids"])] = -100
    expected = model(
        input_ids=full,
        mm_token_type_ids=(full == processor.image_id).long(),
        pixel_values=prompt["pixel_values"],
        image_grid_thw=prompt["image_grid_thw"],
        labels=labels,
    ).loss
    logps = group_logps(model, processor.collate([prompt]), ids, mask)[:, 0]
    assert sft.sft_loss(logps, mask, mask.sum()).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_trace_target_needs_reasoning():
    row = {"id": "r1", "answer": "3", "prompt_text": ""}
    with pytest.raises(ValueError, match="r1 has no reasoning"):
        target_text(row, "trace")
