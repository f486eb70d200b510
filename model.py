"""All that knows it is a Qwen-VL: load, encode, per-token log-probabilities, freeze, save.

Works on the unmodified Qwen2-VL, Qwen2.5-VL and Qwen3-VL of transformers, without torchvision.
Letters: B prompts, G completions per prompt, P prompt length, C completion length, V vocabulary,
T length of a packed sequence, N = completion tokens of a batch. Rows are prompt-major: b * G + g.
"""

import copy
import json
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    Qwen2VLImageProcessorPil,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import toy
from data import BadRow, build_prompt

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TOY_CHECKPOINT = Path(__file__).parent / "assets" / "toy-qwen2-vl"
LOGITS_AT_ONCE = 2**26  # logits held at a time: 256 MiB in float32, whatever the vocabulary


class Processor:
    """Tokenizer and PIL image processor: prompts and images in, left-padded model inputs out."""

    def __init__(self, tokenizer, image_processor, end_ids: list[int] | None = None):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.end_ids = end_ids or [tokenizer.eos_token_id]
        self.pad_id = tokenizer.pad_token_id or self.end_ids[0]

    @property
    def default_style(self) -> str:
        """The prompt style of the checkpoint: instruct models end their turn with <|im_end|>."""
        chat_end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        return "instruct" if chat_end in self.end_ids else "base"

    def encode_one(self, prompt: str, images: list[Image.Image]) -> dict[str, Tensor]:
        """One prompt, unpadded: `input_ids` (P,), and of its images `pixel_values` (patches,
        3 * 2 * patch²) and `image_grid_thw` (images, 3), if it has any.

        Raises ValueError when the prompt does not name exactly as many images as are given.
        """
        pieces = prompt.split("<|image_pad|>")
        if len(pieces) - 1 != len(images):
            raise ValueError(
                f"the prompt has {len(pieces) - 1} image places for {len(images)} images"
            )
        encoded = {}
        if images:
            encoded = dict(self.image_processor(images=images, return_tensors="pt"))
            # one token per merged patch: t * h * w / merge²
            tokens = encoded["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2
            pieces[1:] = [
                "<|image_pad|>" * int(n) + piece
                for n, piece in zip(tokens, pieces[1:], strict=True)
            ]
        ids = self.tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
        return {"input_ids": torch.tensor(ids), **encoded}

    def prepare(self, row: dict, style: str, max_prompt_length: int | None = None) -> dict:
        """The row with its `prompt` text and `encoded` inputs; BadRow when it is too long."""
        prompt = build_prompt(row, style)
        encoded = self.encode_one(prompt, row["images"])
        length = len(encoded["input_ids"])
        if max_prompt_length and length > max_prompt_length:
            raise BadRow(
                row["id"], f"the prompt has {length} tokens, more than {max_prompt_length}"
            )
        opening = (
            "<think>" if prompt.endswith("<think>") else ""
        )  # what the answer's text continues
        return row | {"prompt_text": prompt, "encoded": encoded, "opening": opening}

    def collate(self, encoded: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Prompts from `encode_one` as one left-padded batch: see `encode`."""
        length = max(len(one["input_ids"]) for one in encoded)
        input_ids = torch.full((len(encoded), length), self.pad_id)
        attention_mask = torch.zeros(len(encoded), length, dtype=torch.long)
        for row, one in enumerate(encoded):
            start = length - len(one["input_ids"])
            input_ids[row, start:] = one["input_ids"]
            attention_mask[row, start:] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch["mm_token_type_ids"] = (input_ids == self.image_id).long()
        for key in ("pixel_values", "image_grid_thw"):
            parts = [one[key] for one in encoded if key in one]
            if parts:
                batch[key] = torch.cat(parts)
        return batch

    def encode(self, prompts: list[str], images: list[list[Image.Image]]) -> dict[str, Tensor]:
        """Prompts with their images as model inputs.

        Returns `input_ids`, `attention_mask`, `mm_token_type_ids` (B, P), padded on the left, and,
        flat over all images of the batch, `pixel_values` (patches, …) and `image_grid_thw`
        (images, 3), absent when there is no image. Raises ValueError as `encode_one` does.
        """
        return self.collate([self.encode_one(p, i) for p, i in zip(prompts, images, strict=True)])

    def decode(self, completion_ids: Tensor, completion_mask: Tensor) -> list[str]:
        """Completions as text, without end token and padding."""
        return [
            self.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
            for ids, mask in zip(completion_ids, completion_mask, strict=True)
        ]

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        # name the class that every transformers can load, with torchvision or without
        path = Path(folder) / "preprocessor_config.json"
        settings = json.loads(path.read_text()) | {"image_processor_type": "Qwen2VLImageProcessor"}
        path.write_text(json.dumps(settings, indent=2) + "\n")


# --- load, freeze, save --------------------------------------------------------------------------


def load_policy(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    freeze: str = "none",
    gradient_checkpointing: bool = False,
    max_pixels: int | None = None,
    seed: int = 0,
):
    """A model and its processor from `toy`, `toy-scratch` (random weights), a folder or a hub id.

    Weights are read from safetensors only and no code of a checkpoint is run. `max_pixels` bounds
    every image (28 * 28 pixels make a visual token). Raises ValueError in one line when there is no
    such checkpoint or when it is not a Qwen-VL.
    """
    if name == "toy-scratch":
        tokenizer = toy.build_tokenizer()
        model = toy.build_model(tokenizer, seed).to(dtype)
        image_processor = Qwen2VLImageProcessorPil()
    else:
        source = str(TOY_CHECKPOINT) if name == "toy" else name
        try:
            config = AutoConfig.from_pretrained(source)
            if config.model_type not in FAMILIES:
                raise ValueError(
                    f"{name} is a {config.model_type} model; these can be trained: "
                    + ", ".join(FAMILIES)
                )
            tokenizer = AutoTokenizer.from_pretrained(source)
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(source)
            model = AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, use_safetensors=True
            )
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"no model {name!r}: not `toy`, not a folder with a checkpoint, and not to be had "
                f"from the hub ({str(error).splitlines()[0]})"
            ) from error
    if max_pixels is not None:
        size = image_processor.size  # pixel counts; only this attribute is read when it is called
        longest = min(max_pixels, size["longest_edge"])
        image_processor.size = {
            "shortest_edge": min(size["shortest_edge"], longest),
            "longest_edge": longest,
        }
    if model.generation_config is None:
        model.generation_config = GenerationConfig()
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    if tokenizer.chat_template and "<|im_start|>" not in tokenizer.chat_template:
        # the base checkpoint's template has no roles; it ends a text, not a turn
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # what was published (top_k without do_sample, say) would not be saved
        kept = ("bos_token_id", "eos_token_id", "pad_token_id")
        kept = {name: getattr(model.generation_config, name) for name in kept}
        model.generation_config = GenerationConfig(**kept)
    ends = model.generation_config.eos_token_id
    processor = Processor(tokenizer, image_processor, ends if isinstance(ends, list) else [ends])
    freeze_part(model, freeze)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, processor


def freeze_part(model: nn.Module, part: str) -> None:
    """Stop training `vision` (tower and merger) or `language` (layers, embeddings and head)."""
    parts = {
        "none": [],
        "vision": [model.model.visual],
        "language": [model.model.language_model, model.lm_head],
    }
    if part not in parts:
        raise ValueError(f"freeze must be one of {', '.join(parts)}, not {part!r}")
    for module in parts[part]:
        module.requires_grad_(False)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Trainable and frozen parameters: {"vision": (trainable, frozen), "language": (…)}."""
    counts = {}
    vision = {id(p) for p in model.model.visual.parameters()}
    for part in ("vision", "language"):
        chosen = [p for p in model.parameters() if (id(p) in vision) == (part == "vision")]
        trainable = sum(p.numel() for p in chosen if p.requires_grad)
        counts[part] = (trainable, sum(p.numel() for p in chosen) - trainable)
    return counts


def save_policy(
    model: nn.Module, processor: Processor, folder: str | Path, state_dict=None
) -> None:
    """A complete Hugging Face folder: safetensors, config, tokenizer, image processor."""
    model.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)


# --- per-token log-probabilities -----------------------------------------------------------------


class Packing(NamedTuple):
    """Where the tokens of packed groups are, for `packed_attention`."""

    prompt: int  # P, tokens of the longest prompt
    tokens: Tensor  # (B*G*C,): the row of the flat (B*T) that holds each completion token
    mask: Tensor  # (B*G, 1, C, P + C): what each sees, its prompt and its completion up to itself
    back: Tensor  # (B*T,): the row of the flat (B, P + G*C) that holds each packed token


def pack_groups(
    model: nn.Module, prompt_inputs: dict, completion_ids: Tensor, completion_mask: Tensor
):
    """Each group as one sequence [ prompt | c1 | … | cG ], tight, padded on the right.

    Every completion attends to the prompt and to itself, and its positions go on from the prompt's
    end, as if the others were not there. (Shared prefixes: Prefix Grouper, arXiv 2506.05433.)

    Returns `input_ids` (B, T), `position_ids` (3, B, T), `predictor` (B, T): which index predicts
    each completion token, -1 elsewhere; and the `Packing`.
    """
    prompt_ids, prompt_mask = prompt_inputs["input_ids"], prompt_inputs["attention_mask"].bool()
    prompt_positions, _ = model.model.get_rope_index(  # (3, B, P)
        input_ids=prompt_ids,
        mm_token_type_ids=prompt_inputs["mm_token_type_ids"],
        image_grid_thw=prompt_inputs.get("image_grid_thw"),
        attention_mask=prompt_inputs["attention_mask"],
    )
    B, device = len(prompt_ids), prompt_ids.device
    completion_ids = completion_ids.view(B, -1, completion_ids.shape[-1])  # (B, G, C)
    completion_mask = completion_mask.view_as(completion_ids).bool()
    G, C = completion_ids.shape[1:]
    P = int(prompt_mask.sum(-1).max())
    offset = torch.arange(C, device=device)
    column = torch.zeros_like(completion_ids)  # in the packed row; a padding token's is not used

    rows = []
    for b in range(B):
        kept, seen = completion_mask[b], prompt_mask[b]
        positions = prompt_positions[:, b, seen]  # (3, prompt)
        length, offsets = positions.shape[1], offset.expand(G, C)[kept]
        index = torch.arange(length, length + len(offsets), device=device)
        column[b][kept] = index
        before = torch.where(offsets == 0, length - 1, index - 1)
        after = positions.max() + 1 + offsets
        padded = P + kept.flatten().nonzero().squeeze(-1)
        rows.append(
            {
                "ids": torch.cat([prompt_ids[b, seen], completion_ids[b][kept]]),
                "positions": torch.cat([positions, after.expand(3, -1)], dim=1).T,
                "predictor": torch.cat([torch.full_like(positions[0], -1), before]),
                "back": torch.cat([torch.arange(length, device=device), padded]),
            }
        )

    def pad(key: str, value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([row[key] for row in rows], True, value)

    input_ids, row = pad("ids", 0), torch.arange(B, device=device)
    prompt_seen = torch.arange(P, device=device) < prompt_mask.sum(-1)[:, None, None, None]
    own_seen = offset <= offset[:, None]  # (C, C)
    mask = torch.cat([prompt_seen.expand(B, G, C, P), own_seen.expand(B, G, C, C)], -1)
    packing = Packing(
        P,
        (column + row[:, None, None] * input_ids.shape[1]).flatten(),
        mask.flatten(0, 1)[:, None],
        (pad("back", 0) + row[:, None] * (P + G * C)).flatten(),
    )
    return input_ids, pad("positions", 0).permute(2, 0, 1), pad("predictor", -1), packing


def packed_attention(module, query, key, value, attention_mask, packing=None, **kwargs):
    """Attention of packed groups, (B, heads, T, D) -> (B, T, heads, D); without `packing`, sdpa.

    The prompts attend to themselves, then every completion to its prompt and itself, as rows
    (B*G, heads, C, D) by (P + C). A dense mask over T x T would have every completion compute, and
    throw away, its scores with all others: G times the work when completions are long.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    B, T, P = len(query), query.shape[2], packing.prompt
    rows = len(packing.mask)  # B*G

    def own(x: Tensor) -> Tensor:
        x = x.transpose(1, 2).flatten(0, 1).index_select(0, packing.tokens)
        return x.unflatten(0, (rows, -1)).transpose(1, 2)

    def seen(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :P].repeat_interleave(rows // B, 0), own(x)], dim=2)

    parts = (x[:, :, :P] for x in (query, key, value))
    prompts, _ = sdpa_attention_forward(module, *parts, None, **kwargs)  # (B, P, heads, D)
    parts = (own(query), seen(key), seen(value), packing.mask)
    completions, _ = sdpa_attention_forward(module, *parts, **kwargs)  # (B*G, C, heads, D)
    both = torch.cat([prompts, completions.reshape(B, -1, *prompts.shape[2:])], dim=1)
    return both.flatten(0, 1).index_select(0, packing.back).unflatten(0, (B, T)), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def token_logps(lm_head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float):
    """log softmax(logits / temperature) of the targets, and the entropy (no gradient): (N,), (N,).

    The logits exist for a slice of the tokens at a time and are computed again in the backward
    pass, so that memory does not grow with N * V.
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
    model: nn.Module,
    prompt_inputs: dict[str, Tensor],
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
):
    """log pi(token | prompt, tokens before) of every completion token, with each group packed.

    Args: `prompt_inputs` of B prompts from `Processor.encode`; `completion_ids` and
    `completion_mask` (B*G, C) or (B, G, C), padded on the right.
    Returns (B, G, C) in float32, zero where the mask is zero; with `with_entropy`, also the entropy
    of the distribution each token was drawn from, in nats, same shape, without gradient.
    """
    B, C = len(prompt_inputs["input_ids"]), completion_ids.shape[-1]
    input_ids, position_ids, predictor, packing = pack_groups(
        model, prompt_inputs, completion_ids, completion_mask
    )
    model.config.get_text_config()._attn_implementation = "packed"  # else it is sdpa
    hidden = model.model(
        input_ids=input_ids,
        attention_mask=packing.mask,  # four-dimensional, so that the library makes none of its own
        position_ids=position_ids,
        use_cache=False,
        packing=packing,
        **{k: v for k, v in prompt_inputs.items() if k in ("pixel_values", "image_grid_thw")},
    ).last_hidden_state  # (B, T, H)
    row, column = torch.nonzero(predictor >= 0, as_tuple=True)  # completion tokens, row by row
    logps, entropy = token_logps(
        model.lm_head, hidden[row, predictor[row, column]], input_ids[row, column], temperature
    )
    mask = completion_mask.view(B, -1, C).bool()
    zeros = torch.zeros(mask.shape, dtype=logps.dtype, device=logps.device)
    per_token_logps = zeros.masked_scatter(mask, logps)  # (B, G, C)
    if with_entropy:
        return per_token_logps, zeros.masked_scatter(mask, entropy)
    return per_token_logps


class Policy(nn.Module):
    """What DDP and FSDP wrap: they act on `forward` alone, so it returns what is trained."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # what FSDP shards as a unit

    def forward(self, prompt_inputs, completion_ids, completion_mask, temperature: float = 1.0):
        """Log-probabilities and entropy, both (B, G, C): see `group_logps`."""
        return group_logps(
            self.model,
            prompt_inputs,
            completion_ids,
            completion_mask,
            temperature=temperature,
            with_entropy=True,
        )


class Replica:
    """The policy to sample from: `.model` is whole and in the precision of computing.

    It is the trained model itself where that is both; under sharding or with bf16 over fp32 master
    weights it is a copy, to be refreshed after every update, so that every process decodes at its
    own pace. Make it before the model is wrapped.
    """

    def __init__(self, model: nn.Module, accelerator):
        half = accelerator.mixed_precision == "bf16"
        sharded = accelerator.distributed_type == "FSDP"
        self.model = model
        self.is_copy = half or sharded
        if self.is_copy:
            self.model = copy.deepcopy(model).requires_grad_(False).eval()
            self.model.to(accelerator.device, torch.bfloat16 if half else torch.float32)

    @torch.no_grad()
    def refresh(self, policy: nn.Module) -> None:
        """Copy the wrapped policy's weights; every process must call it."""
        if not self.is_copy:
            return
        ours = dict(self.model.named_parameters())
        for name, parameter in policy.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            ours[name.removeprefix("module.").removeprefix("model.")].copy_(whole)
