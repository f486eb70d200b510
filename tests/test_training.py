"""Training: what a run logs, what it trains, and that it learns what it is told to learn."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from launch import FLAGS, metrics, read_lines, run, tiny_checkpoint
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model

import core.qwen
import sft
from core.optimizer import learning_rate
from core.packing import Policy
from core.qwen import load_reference
from data import BadRow
from grpo import GRPOOptions
from sft import SFTOptions, target_text
from toy.world import ToyRows

EVALUATED = {"eval/accuracy", "eval/completion_length", "eval/reflection"}
TRAINED = {"step", "loss", "grad_norm", "learning_rate", "skipped_updates", "seconds/train"}
TRAINED |= {"tokens_per_second"}
SAMPLED = {
    *("reward", "reward_std", "rewards/accuracy", "rewards/format", "rewards/length"),
    *("frac_reward_zero_std", "groups/all_right", "groups/all_wrong"),
    *("completions/mean_length", "completions/clipped_ratio", "completions/reflection"),
    *("kl", "entropy", "clip_ratio", "sampling/logp_difference", "sampling/kl", "seconds/rollout"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


# --- what is logged ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(model, tmp_path_factory) -> Path:
    """A run with three weighted rewards, KL, a tracker and every group in its log."""
    folder = tmp_path_factory.mktemp("runs") / "logged"
    words = ["--rewards", "accuracy", "format", "length", "--reward_weights", 1, 0.5, 2]
    words += ["--beta", 0.1, "--log_groups", 4, "--log_with", "tensorboard"]
    run("--model", model, *FLAGS, *words, output_dir=folder)
    return folder


def test_the_metrics_have_their_names(logged):
    first, *updates = read_lines(logged / "metrics.jsonl")
    tasks = {
        f"eval/{line['task']}" for line in read_lines(logged / "rollouts.jsonl") if not line["step"]
    }
    assert set(first) == {"step"} | EVALUATED | tasks
    assert [set(m) for m in updates[:-1]] == [TRAINED | SAMPLED] * 5
    assert set(updates[-1]) == TRAINED | SAMPLED | EVALUATED | tasks


def test_sampler_and_training_pass_agree_in_float32(logged):
    for m in metrics(logged)[1:]:
        assert 0 < m["sampling/logp_difference"] < 1e-5 and abs(m["sampling/kl"]) < 1e-7


def test_loss_and_kl_are_0_at_the_first_update_and_their_gradient_is_not(logged):
    first, second = metrics(logged)[1:3]
    assert abs(first["loss"]) < 1e-6 and first["kl"] < 1e-9 and first["grad_norm"] > 0.1
    assert second["kl"] > 1e-4


def test_rewards_are_weighted_and_advantages_are_those_of_the_weighted_sum(logged):
    updates = metrics(logged)
    for step in range(1, 7):
        groups = [line for line in read_lines(logged / "rollouts.jsonl") if line["step"] == step]
        groups = [group for group in groups if group["split"] == "train"]
        totals = []
        for group in groups:
            scores = [group["rewards"][name] for name in ("accuracy", "format", "length")]
            totals.append([a + 0.5 * f + 2 * n for a, f, n in zip(*scores, strict=True)])
            mean, std = statistics.mean(totals[-1]), statistics.stdev(totals[-1])
            expected = [(total - mean) / (std + 1e-4) for total in totals[-1]]
            assert group["advantages"] == pytest.approx(expected, abs=1e-3)
        assert len(groups) == 4
        assert updates[step]["reward"] == pytest.approx(statistics.mean(sum(totals, [])))


def test_a_tracker_gets_the_metrics_of_the_run(logged):
    (events,) = (logged / logged.name).glob("events*")
    tracked = EventAccumulator(str(events)).Reload()
    for name in ("reward", "completions/mean_length", "eval/accuracy"):
        expected = [(m["step"], m[name]) for m in metrics(logged) if name in m]
        seen = [(scalar.step, scalar.value) for scalar in tracked.Scalars(name)]
        assert seen == [(step, pytest.approx(value)) for step, value in expected]


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_learning_rate_schedules_by_hand(schedule, expected):
    options = GRPOOptions(learning_rate=1.0, lr_schedule=schedule, max_steps=6, warmup_ratio=0.34)
    assert [learning_rate(options, step) for step in range(1, 7)] == pytest.approx(expected)


# --- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_frozen_part_does_not_move_and_the_other_does(part, model, tmp_path):
    words = ["--freeze", part, "--max_steps", 2, "--eval_steps", 0, "--save_steps", 0]
    run("--model", model, *FLAGS, *words, output_dir=tmp_path / "run")
    before, after = (
        load_file(Path(f) / "model.safetensors") for f in (model, tmp_path / "run/final")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ("visual" in name) == (part == "language")}


def test_without_kl_no_reference_model_is_loaded(monkeypatch):
    def load_policy(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(core.qwen, "load_policy", load_policy)
    assert load_reference(GRPOOptions(beta=0.0), Accelerator(cpu=True)) is None
    with pytest.raises(AssertionError, match="loaded"):
        load_reference(GRPOOptions(beta=0.1), Accelerator(cpu=True))


def test_grpo_makes_likelier_what_a_reward_of_ones_own_pays(model, tmp_path):
    (tmp_path / "mine.py").write_text("def has_e(completion, row):\n    return 'e' in completion\n")
    words = f"--rewards {tmp_path / 'mine.py'}:has_e --num_generations 8 --max_completion_length 4"
    words += " --learning_rate 3e-3 --warmup_ratio 0 --max_steps 25 --eval_steps 0 --save_steps 0"
    run("--model", model, *FLAGS, *words.split(), output_dir=tmp_path / "run")
    rewards = [m["reward"] for m in metrics(tmp_path / "run")]
    assert statistics.mean(rewards[:3]) < 0.6 and statistics.mean(rewards[-3:]) > 0.9, rewards


# --- supervised ----------------------------------------------------------------------------------


def toy_prompts(processor, count: int, style: str = "base") -> list:
    return [processor.prompt(ToyRows("train", 3)[i], style) for i in range(count)]


@pytest.mark.parametrize(
    "style, target", [("base", "trace"), ("base-direct", "answer"), ("instruct", "trace")]
)
def test_only_the_answer_and_its_end_token_are_trained(style, target):
    model, processor = tiny_model("qwen2_vl")
    prompts = toy_prompts(processor, 3, style)
    options = SFTOptions(target=target, rows_per_forward=3)
    ((packed, mask),) = sft.make_micro_batches(prompts, model, processor, options)
    trained = [ids.tolist() for ids in packed.targets.split(mask.sum(-1).tolist())]
    assert all(ids[-1] == processor.end_ids[0] for ids in trained)
    expected = []
    for row, opening in [(prompt.row, prompt.opening) for prompt in prompts]:
        trace = f"<think>{row['thinking']}</think><answer>{row['answer']}</answer>"
        expected.append(row["answer"] if target == "answer" else trace.removeprefix(opening))
    assert sorted(processor.tokenizer.decode(ids[:-1]) for ids in trained) == sorted(expected)


def test_a_trace_target_needs_thinking():
    with pytest.raises(BadRow, match="r1.*no `thinking`"):
        target_text({"id": "r1", "answer": "3", "thinking": ""}, "trace")


def test_the_sft_loss_is_the_librarys_cross_entropy_in_one_forward_or_several():
    losses, gradients = [], []
    for size in (8, 1):
        model, processor = tiny_model("qwen2_vl")
        prompts = toy_prompts(processor, 8)
        options = SFTOptions(target="trace", rows_per_forward=size)
        batches = sft.make_micro_batches(prompts, model, processor, options)
        tokens = sum(int(mask.sum()) for _, mask in batches)
        loss = sft.compute_gradients(Policy(model), batches, tokens, Accelerator(cpu=True))["loss"]
        losses.append(loss)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

    total = 0.0
    for prompt in prompts:
        ids, _ = processor.encode_targets([target_text(prompt.row, "trace", prompt.opening)])
        full = torch.cat([prompt.inputs["input_ids"], ids[0]])[None]
        labels = full.masked_fill(torch.arange(full.shape[1]) < full.shape[1] - ids.shape[1], -100)
        images = {key: prompt.inputs[key] for key in ("pixel_values", "image_grid_thw")}
        types = (full == processor.image_id).long()
        mean = model(input_ids=full, mm_token_type_ids=types, labels=labels, **images).loss
        total += mean.item() * ids.shape[1] / tokens
    assert losses == pytest.approx([total, total], rel=1e-5)


def test_sft_learns_eight_rows_by_heart_in_as_many_epochs_as_asked(model, tmp_path):
    rows = []
    for number in range(8):
        Image.effect_noise((60, 60), 60).convert("RGB").save(tmp_path / f"{number}.png")
        answer = ["left", "right"][number % 2]
        row = {"image": f"{number}.png", "question": f"Where is {number}?", "answer": answer}
        rows.append(json.dumps(row | {"options": ["left", "right"]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    words = ["--dataset", tmp_path / "rows.jsonl", "--recipe", "toy", "--epochs", 40]
    words += ["--rows_per_update", 8, "--learning_rate", 3e-3, "--max_completion_length", 4]
    run("--model", model, *words, output_dir=tmp_path / "run", stage="sft")
    updates = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [m["step"] for m in updates] == list(range(41)) and TRAINED == set(updates[1])
    assert updates[0]["eval/accuracy"] < 0.5 and updates[-1]["eval/accuracy"] == 1
    rates = [m["learning_rate"] for m in updates[1:]]
    assert max(rates) == pytest.approx(3e-3) and rates[0] == pytest.approx(3e-3 / 4)
    assert rates[-1] == pytest.approx(3e-3 / 36), "linear, after a warm-up over a tenth"
    again = {"output_dir": tmp_path / "run", "stage": "sft"}
    run("--resume", "--epochs", 42, **again)
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 42
    assert "all 42 updates are done" in run("--resume", "--epochs", 42, **again)
    run("--resume", "--max_steps", 43, **again)
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 43
