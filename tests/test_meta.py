"""The training pass reads no value: it runs on the meta device, where tensors have shapes only.

A value read, a shape that depends on values (`nonzero`, a boolean index) or an index on another
device makes the CPU wait for a GPU. No CPU test sees that. On the meta device each is an error.
"""

import pytest
import torch
from tiny import FAMILIES, random_batch, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from core import packing
from core.packing import Policy, pack_groups
from grpo import grpo_loss

G, C = 2, 5
DEEPSTACK = Qwen3VLTextModel._deepstack_process


def add_deepstack(self, hidden_states, visual_pos_masks, visual_embeds):
    """Qwen3-VL's own `_deepstack_process`, written without a boolean index."""
    added = torch.zeros_like(hidden_states)
    return hidden_states + added.masked_scatter(visual_pos_masks[..., None], visual_embeds)


@pytest.fixture(autouse=True)
def without_the_waits_of_transformers(monkeypatch):
    """The three places in the library that make the CPU wait. Everything else must not."""
    # It reads whether there are as many image features as image tokens. This turns it off.
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")

    # Qwen2.5-VL computes the order of its windows on the CPU and copies it in every pass.
    def windows(*args, find=qwen2_5_vl.get_vision_window_index, **kwargs):
        index, lengths = find(*args, **kwargs)
        return index.to("meta"), lengths

    monkeypatch.setattr(qwen2_5_vl, "get_vision_window_index", windows)
    # Qwen3-VL adds features of its vision tower at hidden_states[visual_pos_masks], a nonzero. The
    # library makes that mask in the same forward pass, so no argument of ours can replace it.
    monkeypatch.setattr(Qwen3VLTextModel, "_deepstack_process", add_deepstack)


class OneDevice(TorchDispatchMode):
    """Refuse an operation on tensors of two devices. The meta device lets some of them pass."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
        devices = {x.device.type for x in tensors}
        assert len(devices) <= 1, f"{func} takes tensors on {devices}"
        return func(*args, **(kwargs or {}))


def train_on_meta(family: str) -> torch.nn.Module:
    """Forward, loss and backward of four groups with 1, 2, 0 and 1 images."""
    model, processor = tiny_model(family)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model.config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    prompt_inputs = random_batch(processor, images_of=(1, 2, 0, 1))
    mask = (torch.arange(C) < torch.tensor([1, 2, 3, 4, 5, 5, 4, 0])[:, None]).long()
    packed = pack_groups(model, prompt_inputs, torch.full((4 * G, C), 300), mask)

    advantages, mask = torch.empty(4 * G, device="meta"), mask.to("meta")
    settings = dict(beta=0.04, epsilon=0.2)
    with OneDevice():
        logps, entropy = Policy(model).train()(packed)
        logps = logps.flatten(0, 1)
        loss, _ = grpo_loss(logps, logps.detach(), logps.detach(), advantages, mask, **settings)
        loss.sum().backward()
    assert logps.shape == (4 * G, C) and logps.is_meta and entropy.is_meta
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_is_read_in_forward_loss_and_backward(family):
    model = train_on_meta(family)
    assert all(parameter.grad is not None for parameter in model.parameters())


def boolean_index(hidden, targets):
    return hidden[targets >= 0], targets


def value_read(hidden, targets):
    return hidden * float(hidden.detach().abs().max()), targets


def index_on_the_cpu(hidden, targets):
    return hidden, torch.zeros(len(targets), dtype=torch.long)


@pytest.mark.parametrize(
    "fault, error, message",
    [
        (boolean_index, NotImplementedError, "nonzero"),
        (value_read, RuntimeError, "meta"),
        (index_on_the_cpu, AssertionError, "gather"),
    ],
)
def test_each_of_these_faults_would_be_an_error(fault, error, message, monkeypatch):
    token_logps = packing.token_logps

    def faulty(lm_head, hidden, targets, temperature):
        return token_logps(lm_head, *fault(hidden, targets), temperature)

    monkeypatch.setattr(packing, "token_logps", faulty)
    with pytest.raises(error, match=message):
        train_on_meta("qwen2_vl")


def test_the_deepstack_of_these_tests_is_the_librarys():
    arguments = torch.randn(2, 3, 4), torch.tensor([[0, 1, 1], [1, 0, 0]]).bool(), torch.randn(3, 4)
    assert torch.equal(add_deepstack(None, *arguments), DEEPSTACK(None, *arguments))


def test_the_librarys_deepstack_is_where_qwen3_vl_waits(monkeypatch):
    monkeypatch.setattr(Qwen3VLTextModel, "_deepstack_process", DEEPSTACK)
    with pytest.raises(NotImplementedError, match="nonzero") as error:
        train_on_meta("qwen3_vl")
    calls = [call.name for call in error.traceback if call.path.name == "modeling_qwen3_vl.py"]
    assert calls[-1] == "_deepstack_process"
