"""A group as one sequence [ prompt | c1 | … | cG ]: the plan, the attention, the log-probabilities.

All G completions of a group share the prompt, and with a vision-language model the prompt, mostly
its image, is most of the tokens. A packed group holds the prompt once. Every completion attends to
the prompt and to itself, and its positions start at the prompt's end, as if the other completions
were not there. The result is exact. (Shared-prefix forward: Prefix Grouper, arXiv 2506.05433.)

Letters: B prompts, G completions per prompt, P prompt length, C completion length, T length of a
packed sequence, N completion tokens of the batch, V vocabulary. Rows are prompt-major: b * G + g.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

LOGITS_AT_ONCE = 2**26  # logits held at a time: 256 MiB in float32, whatever the vocabulary


# --- the plan ------------------------------------------------------------------------------------


@dataclass
class Packed:
    """Packed groups, padded on the right, with every index that the forward pass needs."""

    input_ids: Tensor  # (B, T)
    position_ids: Tensor  # (3, B, T)
    own: Tensor  # (B*G*C,) where in the flat (B*T) each completion token is
    back: Tensor  # (B*T,) where in the flat (B, P + G*C) each packed token is
    mask: Tensor  # (B*G, 1, C, P + C) what a completion token sees: its prompt, and itself so far
    before: Tensor  # (N,) where in the flat (B*T) each completion token is predicted
    targets: Tensor  # (N,) the completion tokens
    cells: Tensor  # (N,) where in the flat (B*G*C) they belong
    images: dict[str, Tensor]  # pixel values and positions of their patches
    grids: list[list[int]]  # (t, h, w) of each image
    prompt_length: int  # P, of the longest prompt
    shape: tuple[int, int, int]  # (B, G, C)

    def to(self, device) -> "Packed":
        moved = {name: to_device(value, device) for name, value in vars(self).items()}
        return dataclasses.replace(self, **moved)


def to_device(value, device):
    """A tensor, or a dict of tensors, on the device. Anything else stays as it is."""
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def get_positions(model: nn.Module, prompt_inputs: dict) -> Tensor:
    """The position of every prompt token on the three axes: (3, B, padded P)."""
    names = ("input_ids", "mm_token_type_ids", "attention_mask")
    inputs = {name: prompt_inputs[name] for name in names}
    grids = prompt_inputs.get("image_grid_thw")
    return model.model.get_rope_index(**inputs, image_grid_thw=grids)[0]


def pack_groups(
    model: nn.Module, prompt_inputs: dict, completion_ids: Tensor, completion_mask: Tensor
) -> Packed:
    """Pack B groups for `group_logps`.

    `prompt_inputs` come from `Processor.encode`. Completions are (B*G, C) or (B, G, C), padded on
    the right. Everything is computed from lengths on the CPU and moved to the model's device once,
    so that the forward pass never waits for the device.
    """
    use_packed_attention(model)
    inputs = to_device(prompt_inputs, "cpu")
    prompt_mask = inputs["attention_mask"].bool()
    prompt_positions = get_positions(model, inputs)  # (3, B, padded P)
    B, C = len(prompt_mask), completion_ids.shape[-1]
    completion_ids = completion_ids.cpu().view(B, -1, C)
    mask = completion_mask.cpu().view(B, -1, C).bool()
    G, prompt_lengths, lengths = mask.shape[1], prompt_mask.sum(-1), mask.sum(-1)  # (B,), (B, G)
    P, T = int(prompt_lengths.max()), int((prompt_lengths + lengths.sum(-1)).max())

    group = torch.arange(B)[:, None]
    prompt_cells = torch.arange(P).expand(B, P)
    prompt_seen = prompt_cells < prompt_lengths[:, None]  # (B, P)
    packed_prompt = (group * T + prompt_cells)[prompt_seen]  # in the flat (B*T)

    offset = torch.arange(C)
    starts = prompt_lengths[:, None] + lengths.cumsum(-1) - lengths  # (B, G)
    own = group[..., None] * T + starts[..., None] + offset  # (B, G, C)
    last_of_prompt = (group[..., None] * T + prompt_lengths[:, None, None] - 1).expand_as(own)
    before = torch.where(offset == 0, last_of_prompt, own - 1)

    input_ids = torch.zeros(B * T, dtype=torch.long)
    input_ids[packed_prompt] = inputs["input_ids"][prompt_mask]
    input_ids[own[mask]] = completion_ids[mask]

    position_ids = torch.zeros(3, B * T, dtype=torch.long)
    position_ids[:, packed_prompt] = prompt_positions[:, prompt_mask]
    ends = prompt_positions.masked_fill(~prompt_mask, 0).amax((0, 2))  # (B,)
    position_ids[:, own[mask]] = (ends[:, None, None] + 1 + offset).expand_as(own)[mask]

    back = (group * (P + G * C)).expand(B, T).flatten().clone()  # padding repeats the first token
    back[packed_prompt] = (group * (P + G * C) + prompt_cells)[prompt_seen]
    cells = torch.arange(G * C).view(G, C)
    back[own[mask]] = (group[..., None] * (P + G * C) + P + cells)[mask]

    seen_prompt = prompt_seen[:, None, None].expand(B, G, C, P)
    seen_itself = (offset <= offset[:, None]).expand(B, G, C, C)
    return Packed(
        input_ids=input_ids.view(B, T),
        position_ids=position_ids.view(3, B, T),
        own=torch.where(mask, own, group[..., None] * T).flatten(),
        back=back,
        mask=torch.cat([seen_prompt, seen_itself], -1).flatten(0, 1)[:, None],
        before=before[mask],
        targets=completion_ids[mask],
        cells=(group[..., None] * G * C + cells)[mask],
        images=plan_images(model, inputs),
        grids=inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else [],
        prompt_length=P,
        shape=(B, G, C),
    ).to(model.device)


def plan_images(model: nn.Module, prompt_inputs: dict) -> dict[str, Tensor]:
    """Pixel values, and what the vision tower would otherwise read back from the grids."""
    if "pixel_values" not in prompt_inputs:
        return {}
    tower, grid = model.model.visual, prompt_inputs["image_grid_thw"]
    positions = get_vision_position_ids(grid, tower.spatial_merge_size)
    plan = {"pixel_values": prompt_inputs["pixel_values"], "image_position_ids": positions}
    if hasattr(tower, "num_grid_per_side"):  # Qwen3-VL interpolates learned positions
        plan["image_interp_indices"], plan["image_interp_weights"] = (
            get_vision_interpolation_indices_and_weights(
                grid,
                tower.num_grid_per_side,
                tower.interpolation_mode,
                tower.interpolation_align_corners,
                tower.spatial_merge_size,
            )
        )
    return plan


# --- attention -----------------------------------------------------------------------------------


def packed_attention(module, query, key, value, attention_mask, packed=None, **kwargs):
    """Attention of packed groups, (B, heads, T, D) -> (B, T, heads, D). Without `packed`, sdpa.

    The prompts attend to themselves. Then every completion attends to its prompt and to itself, as
    rows (B*G, heads, C, D) by (P + C). A dense mask over T x T would compute the scores between
    completions and throw them away: G times the work when completions are long.
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Under autocast the rotary embedding leaves queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    (B, G, _), T, P = packed.shape, query.shape[2], packed.prompt_length

    def own(x: Tensor) -> Tensor:  # (B, heads, T, D) -> (B*G, heads, C, D)
        x = x.transpose(1, 2).flatten(0, 1).index_select(0, packed.own)
        return x.unflatten(0, (B * G, -1)).transpose(1, 2)

    def seen(x: Tensor) -> Tensor:  # (B, heads, T, D) -> (B*G, heads, P + C, D)
        return torch.cat([x[:, :, :P].repeat_interleave(G, 0), own(x)], dim=2)

    # The first P tokens of a group with a shorter prompt include completion tokens. They cannot
    # change the prompt, which is causal and comes first. Their own results are dropped by `back`,
    # and the mask hides them from the completions.
    first = (x[:, :, :P] for x in (query, key, value))
    prompts, _ = sdpa_attention_forward(module, *first, None, **kwargs)  # (B, P, heads, D)
    rows = (own(query), seen(key), seen(value), packed.mask)
    completions, _ = sdpa_attention_forward(module, *rows, **kwargs)  # (B*G, C, heads, D)
    both = torch.cat([prompts, completions.reshape(B, -1, *prompts.shape[2:])], dim=1)
    return both.flatten(0, 1).index_select(0, packed.back).unflatten(0, (B, T)), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def use_packed_attention(model: nn.Module) -> None:
    """Let the language model attend by `packed_attention`. Without a packing it is sdpa."""
    model.config.get_text_config()._attn_implementation = "packed"


# --- log-probabilities ---------------------------------------------------------------------------


def token_logps(
    lm_head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) of the targets, and the entropy: (N,), (N,).

    The entropy, in nats, carries no gradient. The logits exist for a slice of the tokens at a time
    and are computed again in the backward pass, so that memory does not grow with N * V.
    """

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = lm_head(hidden).float() / temperature
        log_z = logits.logsumexp(-1)
        with torch.no_grad():
            entropy = log_z - (torch.softmax(logits, -1) * logits).sum(-1)
        return logits.gather(-1, targets[:, None]).squeeze(-1) - log_z, entropy

    size = max(1, LOGITS_AT_ONCE // lm_head.weight.shape[0])
    pieces = list(zip(hidden.split(size), targets.split(size), strict=True))
    if len(pieces) == 1 or not torch.is_grad_enabled():
        parts = [chunk(*piece) for piece in pieces]
    else:
        parts = [checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces]
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def group_logps(
    model: nn.Module, packed: Packed, *, temperature: float = 1.0, with_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """log pi(token | prompt, tokens before it) of every completion token: (B, G, C).

    Float32, zero where there is no token. `with_entropy` adds the entropy of the distribution that
    each token was drawn from, in nats, (B, G, C), without gradient.
    """
    # The library reads the grids on the host, so they stay there.
    grids = {"image_grid_thw": torch.tensor(packed.grids)} if packed.grids else {}
    hidden = model.model(
        input_ids=packed.input_ids,
        attention_mask=packed.mask,  # four-dimensional, so that the library makes none of its own
        position_ids=packed.position_ids,
        use_cache=False,
        packed=packed,
        **packed.images,
        **grids,
    ).last_hidden_state  # (B, T, H)
    hidden = hidden.flatten(0, 1)[packed.before]  # (N, H)
    logps, entropy = token_logps(model.lm_head, hidden, packed.targets, temperature)
    zeros = torch.zeros(math.prod(packed.shape), dtype=logps.dtype, device=logps.device)
    per_token_logps = zeros.index_copy(0, packed.cells, logps).view(packed.shape)
    if with_entropy:
        return per_token_logps, zeros.index_copy(0, packed.cells, entropy).view(packed.shape)
    return per_token_logps


class Policy(nn.Module):
    """What DDP and FSDP wrap. They act on `forward` alone, so it returns what is trained."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # what FSDP shards as a unit

    def forward(self, packed: Packed, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropy, both (B, G, C): see `group_logps`."""
        return group_logps(self.model, packed, temperature=temperature, with_entropy=True)
