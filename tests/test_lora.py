"""LoRA: training starts at the given model, merged weights are the adapted model, runs resume."""

import shutil
from pathlib import Path

import pytest
import torch
from launch import FLAGS, launch, metrics, run, tiny_checkpoint
from safetensors.torch import load_file
from tiny import FAMILIES, random_batch, tiny_model
from torch import nn
from transformers import AutoModelForImageTextToText

from core.lora import LoraLinear, add_adapters, whole_weights
from core.packing import Policy, group_logps, pack_groups, use_packed_attention

RUN = [*FLAGS, "--lora_rank", 4, "--max_steps", 4, "--beta", 0.04, "--learning_rate", 1e-2]
COMPARED = ("loss", "grad_norm", "kl", "entropy", "reward", "eval/completion_length")


def logps(model: nn.Module, processor) -> torch.Tensor:
    """Log-probabilities of random completions, with the model in its own precision."""
    use_packed_attention(model)
    ids = torch.randint(100, 200, (6, 5), generator=torch.Generator().manual_seed(0))
    inputs = random_batch(processor, images_of=(1, 2))
    with torch.autocast("cpu", enabled=model.dtype == torch.bfloat16):
        return group_logps(model, pack_groups(model, inputs, ids, torch.ones_like(ids)))


def adapted_model(family: str, dtype: torch.dtype = torch.float32, noise: float = 0.0):
    """A tiny model with adapters of rank 4 that `noise` moves away from their start."""
    model, processor = tiny_model(family)
    add_adapters(model, 4, seed=0, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            generator = torch.Generator().manual_seed(len(name))
            parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return model, processor


def test_a_layer_with_adapters_computes_the_formula():
    base = nn.Linear(2, 2)
    base.weight.data, base.bias.data = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([0.5, 0])
    layer = LoraLinear(base, 1, torch.Generator())
    layer.lora_A.data, layer.lora_B.data = torch.tensor([[1.0, -1]]), torch.tensor([[3.0], [0.5]])
    # W x = (11, 25) for x = (3, 4), A x = -1, so 2 B A x = (-6, -1)
    assert layer(torch.tensor([3.0, 4])).tolist() == [11 + 0.5 - 6, 25 - 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_are_trained_seven_per_layer_in_float32(family):
    model, _ = adapted_model(family, torch.bfloat16)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    projections = "self_attn.q self_attn.k self_attn.v self_attn.o mlp.gate mlp.up mlp.down".split()
    names = [
        f"model.language_model.layers.{layer}.{projection}_proj.lora_{matrix}"
        for layer in range(3)
        for projection in projections
        for matrix in "AB"
    ]
    assert sorted(trained) == sorted(names)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_at_the_start_are_bit_identical_to_the_model_s(family, dtype):
    base, processor = tiny_model(family)
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype)
    adapted = logps(adapted_model(family, dtype)[0], processor)
    assert torch.equal(adapted, logps(base, processor))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_the_adapted_model(family):
    adapted, processor = adapted_model(family, noise=0.1)
    merged, _ = tiny_model(family)
    expected, before = logps(adapted, processor), logps(merged, processor)
    merged.load_state_dict(dict(whole_weights(Policy(adapted))), strict=False)
    assert (expected - before).abs().max() > 0.1, "the adapters matter"
    torch.testing.assert_close(logps(merged, processor), expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_reaches_both_adapters_of_every_layer_and_no_weight():
    model, processor = adapted_model("qwen2_vl", noise=0.1)
    logps(model.train(), processor).sum().backward()
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved == ("lora" in name), name


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def precision(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def one(model, precision, tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("one") / precision
    run("--model", model, *RUN, "--precision", precision, output_dir=folder)
    return folder


def interrupted(folder: Path, to: Path) -> Path:
    """The run as if it had been killed after checkpoint-2."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("final", "checkpoint-4"))
    return to


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(one, tmp_path):
    folder = interrupted(one, tmp_path / "run")
    assert "checkpoint-2" in run("--resume", output_dir=folder)
    assert metrics(folder) == metrics(one)
    ours, theirs = (load_file(path / "final" / "model.safetensors") for path in (folder, one))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_saved_folder_is_the_given_model_plus_the_adapters_beside_it(one, model, precision):
    state = torch.load(one / "checkpoint-2" / "training_state.pt")["adapters"]
    folder = one / "checkpoint-2"
    saved, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys"))
    given = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    dtype, saved = saved.dtype, dict(saved.named_parameters())
    assert dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for name, weight in given.named_parameters():
        layer = f"model.{name.removesuffix('.weight')}"
        expected = weight.to(dtype).float()
        if f"{layer}.lora_A" in state:
            change = 2 * state.pop(f"{layer}.lora_B") @ state.pop(f"{layer}.lora_A")
            assert change.any(), name
            expected = expected + change
        torch.testing.assert_close(saved[name], expected.to(dtype), msg=name)
    assert not state, "every adapter has been merged"


@pytest.mark.parametrize(
    "precision, config",
    [("fp32", "ddp"), ("fp32", "fsdp"), ("bf16", "fsdp")],
    indirect=["precision"],
)
def test_two_processes_resume_the_run_of_one_and_give_the_same(precision, config, one, tmp_path):
    folder = interrupted(one, tmp_path / "run")
    assert "checkpoint-2" in launch("--resume", "--output_dir", folder, processes=2, config=config)
    # In bf16 the update after the first one may sample other tokens.
    lines, tolerance = {"fp32": (5, 1e-5), "bf16": (4, 2e-2)}[precision]
    for a, b in zip(metrics(one)[:lines], metrics(folder)[:lines], strict=True):
        for name in COMPARED:
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=tolerance, abs=tolerance)
