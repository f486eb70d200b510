"""LoRA (arXiv 2106.09685): train small adapters of the language model, not its weights.

A linear layer with adapters of rank R computes

    W x + b + alpha / R * B A x        alpha = 2 R, so the factor is 2 at every rank

W and b are frozen. A (R, in) starts random and B (out, R) starts at zero, so that training begins
with exactly the given model.

Only the trained policy has adapters. Sampler and saved models get merged weights, W + 2 B A.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SCALE = 2.0  # alpha / R


class LoraLinear(nn.Module):
    """A frozen linear layer with adapters. `weight` and `bias` keep their names."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        size_out, size_in = base.weight.shape
        random = torch.randn(rank, size_in, generator=generator) / math.sqrt(size_in)
        self.lora_A = nn.Parameter(random.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(size_out, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        adapted = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + SCALE * adapted


def add_adapters(model: nn.Module, rank: int, seed: int, dtype: torch.dtype) -> None:
    """Freeze a Qwen-VL in `dtype` and add adapters to the linear layers of its language model.

    The adapters are float32 and depend on the seed alone. With `rank` 0 the model stays as it is.
    """
    if rank == 0:
        return
    for parameter in model.parameters():
        # Not model.to, which would round the rotary frequencies too.
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent in list(model.model.language_model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoraLinear(child, rank, generator))


@torch.no_grad()
def whole_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each weight of the wrapped model: its name, its value unsharded and with adapters merged.

    Every process must read all of them, because sharded weights are gathered one at a time.
    """
    for name, parameter in policy.named_parameters():
        layer, _, own_name = name.rpartition(".")
        module = policy.get_submodule(layer)
        if own_name in ("lora_A", "lora_B"):
            continue
        weight = whole(parameter)
        if own_name == "weight" and isinstance(module, LoraLinear):
            change = SCALE * (whole(module.lora_B) @ whole(module.lora_A))
            weight = (weight.float() + change).to(weight.dtype)
        yield name.removeprefix("module.").removeprefix("model."), weight  # of DDP, of Policy


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
