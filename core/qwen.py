"""Load, encode, freeze and save Qwen-VL checkpoints.

Works with the unmodified Qwen2-VL, Qwen2.5-VL and Qwen3-VL of transformers, without torchvision.
Letters: B prompts, P prompt length, C completion length.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    Qwen2VLImageProcessorPil,
)

from core.files import HUB_ID, download
from core.options import TrainingOptions, UserError, run_config
from core.packing import use_packed_attention
from data import build_prompt

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TOY_CHECKPOINT = Path(__file__).parent.parent / "toy" / "qwen2-vl"
FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja")
MAX_PIXELS = 401_408  # 512 visual tokens, the paper's limit


@dataclass
class Prompt:
    """A row, the prompt that asks about it, and the prompt's encoded inputs, unpadded."""

    row: dict
    text: str
    inputs: dict[str, Tensor]

    @property
    def opening(self) -> str:
        """The part of the answer's format that the prompt already contains."""
        return next((tag for tag in ("<think>", "<answer>") if self.text.endswith(tag)), "")


class Processor:
    """Tokenizer and image processor: prompts and images in, left-padded model inputs out."""

    def __init__(self, tokenizer, image_processor, end_ids: list[int] | None = None):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.end_ids = end_ids or [tokenizer.eos_token_id]
        self.pad_id = tokenizer.pad_token_id or self.end_ids[0]

    @property
    def default_style(self) -> str:
        """Instruct models end their turn with <|im_end|>, base models do not."""
        chat_end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        return "instruct" if chat_end in self.end_ids else "base"

    def prompt(self, row: dict, style: str) -> Prompt:
        """Build and encode the prompt of a row."""
        text = build_prompt(row, style)
        return Prompt(row, text, self.encode_one(text, row["images"]))

    def prompt_length(self, row: dict, style: str) -> int:
        """Tokens of the row's prompt, without processing the pixels."""
        text = build_prompt(row, style)
        count_patches = self.image_processor.get_number_of_image_patches
        patches = [count_patches(image.height, image.width) for image in row["images"]]
        visual_tokens = sum(patches) // self.image_processor.merge_size**2
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return len(tokens) - len(patches) + visual_tokens

    def encode_one(self, prompt: str, images: list[Image.Image]) -> dict[str, Tensor]:
        """One prompt, unpadded: `input_ids` (P,), the images as in `encode`.

        Raises ValueError if the number of image places in the prompt is not that of the images.
        """
        pieces = prompt.split("<|image_pad|>")
        if (places := len(pieces) - 1) != len(images):
            raise ValueError(f"the prompt has {places} image places for {len(images)} images")
        encoded = {}
        if images:
            encoded = dict(self.image_processor(images=images, return_tensors="pt"))
            # one token per merged patch: t * h * w / merge²
            tokens = encoded["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2
            for place, n in enumerate(tokens.tolist()):
                pieces[place] += "<|image_pad|>" * n
        ids = self.tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
        return {"input_ids": torch.tensor(ids), **encoded}

    def collate(self, encoded: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad prompts from `encode_one` on the left to one batch: see `encode`."""
        input_ids, attention_mask = self.pad([one["input_ids"] for one in encoded], "left")
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch["mm_token_type_ids"] = (input_ids == self.image_id).long()
        for key in ("pixel_values", "image_grid_thw"):
            parts = [one[key] for one in encoded if key in one]
            if parts:
                batch[key] = torch.cat(parts)
        return batch

    def pad(self, rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
        """Rows of token ids as one tensor, and the mask of what is not padding."""
        masks = [torch.ones_like(row) for row in rows]
        ids = nn.utils.rnn.pad_sequence(rows, True, self.pad_id, side)
        return ids, nn.utils.rnn.pad_sequence(masks, True, 0, side)

    def encode(self, prompts: list[str], images: list[list[Image.Image]]) -> dict[str, Tensor]:
        """Prompts and their images as model inputs.

        Returns `input_ids`, `attention_mask` and `mm_token_type_ids` (B, P), padded on the left.
        `pixel_values` (patches, 3 * 2 * patch²) and `image_grid_thw` (images, 3) are flat over all
        images of the batch and absent if there are none. Raises ValueError as `encode_one` does.
        """
        return self.collate([self.encode_one(p, i) for p, i in zip(prompts, images, strict=True)])

    def encode_targets(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts and their end token as `completion_ids` and `completion_mask`, (B, C)."""
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return self.pad([torch.tensor(row + self.end_ids[:1]) for row in rows], "right")

    def decode(self, completion_ids: Tensor, completion_mask: Tensor) -> list[str]:
        """Completions as text, without end token and padding."""
        pairs = zip(completion_ids, completion_mask.bool(), strict=True)
        return self.tokenizer.batch_decode([i[m] for i, m in pairs], skip_special_tokens=True)

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        # Name the class that every transformers can load, with or without torchvision.
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
    revision: str | None = None,
) -> tuple[nn.Module, Processor]:
    """A model and its processor from `toy`, a folder or a hub id.

    Only safetensors weights are read, and no code from a checkpoint is run. `max_pixels` bounds
    every image (28 * 28 pixels make a visual token in Qwen2-VL). By default the checkpoint's own
    limit holds, at most `MAX_PIXELS`. Raises UserError if the checkpoint is missing, damaged or
    incomplete, or if it is not a Qwen-VL.
    """
    folder, commit = locate_model(name, revision)
    try:
        for file in sorted(folder.iterdir()):
            read_checked(file)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        older = folder / "chat_template.json"  # which the tokenizer does not read
        if older.exists() and not tokenizer.chat_template:
            tokenizer.chat_template = read_checked(older).get("chat_template")
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
        )
    except (OSError, ValueError) as error:
        raise cannot_load(name, error) from error
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if missing:
        raise UserError(
            f"{name} lacks {len(missing)} weights, {', '.join(missing[:3])} among them. Are they "
            "named and shaped as transformers has them? (Merge adapters before saving.)"
        )
    model.hub_commit = commit
    use_packed_attention(model)
    size = image_processor.size  # pixel counts; its attribute max_pixels has no effect
    longest = max_pixels or min(MAX_PIXELS, size["longest_edge"])
    shortest = min(size["shortest_edge"], longest)
    image_processor.size = {"shortest_edge": shortest, "longest_edge": longest}
    freeze_part(model, freeze)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, Processor(tokenizer, image_processor, settle_generation(model, tokenizer))


def cannot_load(name: str, reason: object) -> UserError:
    return UserError(f"cannot load the model {name!r}: {' '.join(str(reason).split())}")


def read_checked(file: Path) -> dict:
    """The content of a JSON file. Raises ValueError if a JSON file or a file of weights is damaged.

    The message names the file behind a link: deleting a link in the hub's cache does not help.
    """
    try:
        if file.suffix == ".safetensors":
            safe_open(file, "pt")
        return json.loads(file.read_bytes()) if file.suffix == ".json" else {}
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{file.resolve()} is damaged ({error}): get it again") from error


def load_for_training(options: TrainingOptions, checkpoint: Path | None):
    """Model and processor of the checkpoint that is resumed, or else of `--model`."""
    if options.lora_rank:  # a checkpoint's adapters belong to the unmerged model
        checkpoint = None
    return load_policy(
        str(checkpoint or options.model),
        freeze=options.freeze,
        gradient_checkpointing=options.gradient_checkpointing,
        max_pixels=options.max_pixels,
        revision=options.revision,
    )


def load_reference(options: TrainingOptions, accelerator: Accelerator) -> nn.Module | None:
    """The model that the run started from, frozen; None without KL."""
    if not options.beta:
        return None
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    reference, _ = load_policy(options.model, dtype=dtype, revision=options.revision)
    return reference.requires_grad_(False).eval().to(accelerator.device)


def locate_model(
    name: str, revision: str | None, files: Sequence[str] = FILES
) -> tuple[Path, str | None]:
    """A Qwen-VL's folder, and the hub commit of its weights or of those that its run started from.

    Only `files` are downloaded. Raises UserError if there is no such model.
    """
    if name == "toy":
        return TOY_CHECKPOINT, None
    if Path(name).is_dir():
        folder, commit = Path(name), run_config(name).get("model_commit")
    elif HUB_ID.fullmatch(name):
        folder = download(name, "model", files, revision)
        commit = folder.name
    else:
        raise cannot_load(name, "there is no such folder")
    try:
        family = read_checked(folder / "config.json").get("model_type")
    except (OSError, ValueError) as error:
        raise cannot_load(name, error) from error
    if family not in FAMILIES:
        raise UserError(f"{name} is a {family} model. Valid: {', '.join(FAMILIES)}")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{name} holds adapters: merge them into the weights before you save them")
    return folder, commit


def settle_generation(model: nn.Module, tokenizer) -> list[int]:
    """Make the generation config one that can be saved. Returns the ids that end a completion."""
    config = model.generation_config or GenerationConfig()
    ends = config.eos_token_id or tokenizer.eos_token_id
    if tokenizer.chat_template and "<|im_start|>" not in tokenizer.chat_template:
        # The base checkpoint's template has no roles. It ends a text, not a turn.
        ends = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    # Without the sampling settings: Qwen's base models have some that cannot be saved.
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=config.pad_token_id)
    return ends if isinstance(ends, list) else [ends]


def freeze_part(model: nn.Module, part: str) -> None:
    """Stop training `vision` (tower and merger) or `language` (layers, embeddings and head)."""
    parts = {"none": [], "vision": [model.model.visual]}
    parts["language"] = [model.model.language_model, model.lm_head]
    for module in parts[part]:
        module.requires_grad_(False)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Trainable and frozen parameters: {"vision": (trainable, frozen), "language": (…)}."""
    vision = set(model.model.visual.parameters())
    counts = {"vision": vision, "language": set(model.parameters()) - vision}
    for part, parameters in counts.items():
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        counts[part] = trainable, sum(p.numel() for p in parameters) - trainable
    return counts


def save_policy(model: nn.Module, processor: Processor, folder: str | Path, weights=None) -> None:
    """A complete Hugging Face folder: safetensors, config, tokenizer, image processor."""
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
