"""Groups as one sequence [ prompts | completions ]: the plan, the attention, log-probabilities.

All G completions of a group share the prompt. Without packing, its image and text would be computed
G times. A packed sequence holds each prompt once. Every completion attends to its prompt and to
itself, and its positions start at the prompt's end, as if the other completions were not there. The
result is exact. (Shared-prefix forward: Prefix Grouper, arXiv 2506.05433.)

Letters: B prompts, G completions per prompt, P prompt length, C completion length, T tokens of the
packed sequence, M completion tokens among them, V vocabulary. Rows are prompt-major: b * G + g.
"""

import math
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device
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
    """Groups without padding in one sequence, and every index that the forward pass needs.

    The attention works on a padded grid: the flat (B, P) of the prompts, followed by the flat
    (B, G, C) of the completions.
    """

    inputs: dict[str, Tensor]  # of the model: tokens, positions, mask, pixels
    places: Tensor  # (B*P + B*G*C,) which token of the sequence is in each cell of the grid
    cells: Tensor  # (T,) in which cell of the grid each token is
    before: Tensor  # (M,) the token that predicts each completion token
    targets: Tensor  # (M,) the completion tokens
    results: Tensor  # (M,) where their log-probabilities belong in the flat `shape`
    shape: tuple[int, int, int]  # (B, G, C) as given


def get_positions(model: nn.Module, prompt_inputs: dict) -> tuple[Tensor, Tensor]:
    """Positions of the prompt tokens on three axes, (3, B, P), and of the token after them (B,)."""
    inputs = {name: x for name, x in prompt_inputs.items() if name != "pixel_values"}
    positions = model.model.get_rope_index(**inputs)[0]
    positions = positions * prompt_inputs["attention_mask"]  # those of the padding are arbitrary
    return positions, positions.amax((0, 2)) + 1


def pack_groups(
    model: nn.Module, prompt_inputs: dict, completion_ids: Tensor, completion_mask: Tensor
) -> Packed:
    """Pack B groups for `group_logps`.

    `prompt_inputs` come from `Processor.encode`. Completions are (B*G, C) or (B, G, C), padded on
    the right. Everything is computed from lengths on the CPU and moved to the model's device once,
    so that the forward pass never waits for the device.
    """
    inputs = {name: x.cpu() for name, x in prompt_inputs.items()}
    prompt_mask = inputs["attention_mask"].bool()  # (B, P), padded on the left
    positions, start = get_positions(model, inputs)
    (B, P), given = prompt_mask.shape, completion_mask.shape[-1]
    mask = completion_mask.cpu().bool().view(B, -1, given)
    G, C = mask.shape[1], max(1, int(mask.sum(-1).max()))  # C of the longest
    results = mask.flatten().nonzero().squeeze(-1)
    completion_ids, mask = completion_ids.cpu().view(B, G, given)[..., :C], mask[..., :C]

    prompt_seen = torch.arange(P) < prompt_mask.sum(-1, keepdim=True)  # (B, P), padded on the right
    in_grid = torch.cat([prompt_seen.flatten(), mask.flatten()])
    places = in_grid.cumsum(0) - 1  # a padded cell repeats the token before it
    last_of_prompt = places[: B * P].view(B, P)[:, -1, None, None].expand(B, G, 1)
    own = places[B * P :].view(B, G, C)
    before = torch.cat([last_of_prompt, own[..., :-1]], -1)  # (B, G, C)

    own_positions = (start[:, None, None] + torch.arange(C)).expand(B, G, C)[mask]  # (M,)
    own_positions = own_positions.expand(3, -1)  # the same on all axes
    seen_prompt = prompt_seen[:, None, None].expand(B, G, C, P)
    seen_itself = torch.ones(C, C, dtype=torch.bool).tril().expand(B, G, C, C)
    model_inputs = {
        "input_ids": torch.cat([inputs["input_ids"][prompt_mask], completion_ids[mask]])[None],
        "position_ids": torch.cat([positions[:, prompt_mask], own_positions], 1)[:, None],
        # what a completion token sees: its prompt, and itself so far; (B*G, 1, C, P + C)
        "attention_mask": torch.cat([seen_prompt, seen_itself], -1).flatten(0, 1)[:, None],
        **plan_images(model, inputs),
    }
    cells, targets = in_grid.nonzero().squeeze(-1), completion_ids[mask]
    plan = model_inputs, places, cells, before[mask], targets, results
    # The library reads the grids of the images on the host, so they stay there.
    plan = send_to_device(plan, model.device, non_blocking=True, skip_keys="image_grid_thw")
    return Packed(*plan, shape=(B, G, given))


def plan_images(model: nn.Module, prompt_inputs: dict) -> dict[str, Tensor]:
    """Pixel values, and what the vision tower would otherwise read back from the grids."""
    if "pixel_values" not in prompt_inputs:
        return {}
    tower, grid = model.model.visual, prompt_inputs["image_grid_thw"]
    plan = {name: prompt_inputs[name] for name in ("pixel_values", "image_grid_thw")}
    merge = tower.spatial_merge_size
    plan["image_position_ids"] = get_vision_position_ids(grid, merge)
    if hasattr(tower, "num_grid_per_side"):  # Qwen3-VL interpolates learned positions
        how = tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners
        interpolation = get_vision_interpolation_indices_and_weights(grid, *how, merge)
        plan["image_interp_indices"], plan["image_interp_weights"] = interpolation
    return plan


# --- attention -----------------------------------------------------------------------------------


def packed_attention(module, query, key, value, attention_mask, packed=None, **kwargs):
    """Attention of packed groups, (1, heads, T, D) -> (1, T, heads, D). Without `packed`, sdpa.

    The prompts attend to themselves. Then every completion attends to its prompt and to itself, as
    rows (B*G, heads, C, D) by (P + C). A dense mask over T x T would compute the scores between
    completions and throw them away: G times the work when completions are long.
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    (B, G, _), (rows, _, C, _) = packed.shape, attention_mask.shape
    # Under autocast the rotary embedding leaves queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)

    def in_grid(x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, heads, T, D) -> prompts (B, heads, P, D) and completions (B*G, heads, C, D)."""
        x = x[0].transpose(0, 1).index_select(0, packed.places)
        prompts, completions = x[: -rows * C].unflatten(0, (B, -1)), x[-rows * C :]
        return prompts.transpose(1, 2), completions.unflatten(0, (rows, C)).transpose(1, 2)

    (prompt_query, query), (prompt_key, key), (prompt_value, value) = map(
        in_grid, (query, key, value)
    )
    key = torch.cat([prompt_key.repeat_interleave(G, 0), key], dim=2)
    value = torch.cat([prompt_value.repeat_interleave(G, 0), value], dim=2)
    # The padding of a prompt comes last, so causal attention hides it from the prompt.
    prompts = prompt_query, prompt_key, prompt_value, None
    prompts, _ = sdpa_attention_forward(module, *prompts, **kwargs)  # (B, P, heads, D)
    completions = query, key, value, attention_mask
    completions, _ = sdpa_attention_forward(module, *completions, **kwargs)  # (B*G, C, heads, D)
    grid = torch.cat([prompts.flatten(0, 1), completions.flatten(0, 1)])
    return grid.index_select(0, packed.cells)[None], None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def use_packed_attention(model: nn.Module) -> None:
    """Let the language model attend by `packed_attention`. Without `packed` it is sdpa."""
    model.config.get_text_config()._attn_implementation = "packed"


# --- log-probabilities ---------------------------------------------------------------------------


def token_logps(
    lm_head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) of the targets, and the entropy: (M,), (M,).

    The entropy, in nats, carries no gradient. The logits exist for a slice of the tokens at a time
    and are computed again in the backward pass, so that memory does not grow with M * V.
    """

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = lm_head(hidden).float() / temperature
        log_z = logits.logsumexp(-1)
        with torch.no_grad():
            entropy = log_z - (torch.softmax(logits, -1) * logits).sum(-1)
        return logits.gather(-1, targets[:, None]).squeeze(-1) - log_z, entropy

    size = max(1, LOGITS_AT_ONCE // lm_head.weight.shape[0])
    pieces = list(zip(hidden.split(size), targets.split(size), strict=True))
    if len(pieces) == 1:  # nothing to save
        return chunk(*pieces[0])
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
    use_packed_attention(model)  # for a model that `load_policy` did not load
    nothing = 0  # before the language model, because all processes must gather in one order
    if "pixel_values" not in packed.inputs and torch.distributed.is_initialized():
        nothing = 0 * see_blank_image(model)
    hidden = model.model(**packed.inputs, use_cache=False, packed=packed).last_hidden_state[0]
    hidden = hidden[packed.before] + nothing  # (M, H)
    both = token_logps(model.lm_head, hidden, packed.targets, temperature)
    zeros = torch.zeros(math.prod(packed.shape), device=hidden.device)
    logps, entropy = (zeros.index_copy(0, packed.results, x).view(packed.shape) for x in both)
    return (logps, entropy) if with_entropy else logps


def see_blank_image(model: nn.Module) -> Tensor:
    """One number that depends on every weight of the vision tower.

    DDP waits for a gradient of every trained weight, and FSDP gathers layers on all processes at
    once, so with several processes a batch without images must use the tower too.
    """
    tower, device = model.model.visual, model.device
    merge = tower.spatial_merge_size
    blank = torch.zeros(merge**2, tower.patch_embed.proj.weight.shape[1:].numel(), device=device)
    seen = tower(blank, grid_thw=torch.tensor([[1, merge, merge]], device=device))
    return sum(x.sum() for x in [seen.pooler_output, *getattr(seen, "deepstack_features", [])])


class Policy(nn.Module):
    """What DDP and FSDP wrap. They hook `forward` alone, so it computes what needs gradients."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # what FSDP shards as a unit

    def forward(self, packed: Packed, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropy, both (B, G, C): see `group_logps`."""
        return group_logps(self.model, packed, temperature=temperature, with_entropy=True)
