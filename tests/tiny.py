"""Tiny random models of the three families, with the toy world's tokenizer, for exactness tests."""

import functools
import random

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    Qwen2VLImageProcessorPil,
)

from core.qwen import Processor
from toy.base_model import build_tokenizer

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
WORDS = (
    "red green blue square circle triangle left right above below large small look so 1 2 3".split()
)

TEXT = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
TEXT_OF = {
    "qwen2_vl": dict(mrope_section=[2, 2, 2], theta=10_000.0),
    "qwen2_5_vl": dict(mrope_section=[2, 2, 2], theta=10_000.0),
    # heads wider than hidden_size / heads, so that nothing can confuse the two
    "qwen3_vl": dict(mrope_section=[4, 2, 2], theta=10_000.0, head_dim=16, mrope_interleaved=True),
}
VISION = {
    "qwen2_vl": dict(depth=2, embed_dim=32, hidden_size=48, num_heads=2, mlp_ratio=2),
    "qwen2_5_vl": dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=48,
        window_size=56,
        fullatt_block_indexes=[1],
    ),
    "qwen3_vl": dict(
        depth=3,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=48,
        patch_size=16,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 2],
    ),
}


@functools.cache
def tiny_tokenizer():
    return build_tokenizer(rows=300)


def tiny_model(family: str, seed: int = 0, tie_word_embeddings: bool = True):
    """A random model of `family` in float32, evaluation mode, and its processor.

    The weights are large enough that the next-token distribution is far from flat, and biases and
    norms are random too, so that forgetting any of them shows.
    """
    tokenizer = tiny_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    end = token("<|endoftext|>")
    rope = dict(TEXT_OF[family])
    text = TEXT | dict(
        vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end
    )
    if "head_dim" in rope:
        text["head_dim"] = rope.pop("head_dim")
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": rope.pop("theta"), **rope}
    config = AutoConfig.for_model(
        family,
        text_config=text | {"tie_word_embeddings": tie_word_embeddings},
        vision_config=VISION[family],
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=tie_word_embeddings,
    )
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std, mean = (0.2, 0.0) if parameter.dim() > 1 else (0.3, 0.0)
            if "norm" in name and name.endswith("weight"):
                mean = 1.0
            parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    patch = 16 if family == "qwen3_vl" else 14
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=patch,
        size={"shortest_edge": (2 * patch) ** 2, "longest_edge": 12 * (2 * patch) ** 2},
    )
    return model, Processor(tokenizer, image_processor)


def random_images(count: int, seed: int = 0) -> list[Image.Image]:
    """Noise images of different small sizes and aspect ratios."""
    rng = random.Random(seed)
    images = []
    for _ in range(count):
        width, height = rng.randint(30, 120), rng.randint(30, 120)
        images.append(Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height)))
    return images


def random_batch(
    processor: Processor, images_of=(1, 2, 0, 1), seed: int = 0
) -> dict[str, torch.Tensor]:
    """Left-padded model inputs of prompts of unequal length with that many images each."""
    rng = random.Random(seed)
    prompts, images = [], []
    for row, count in enumerate(images_of):
        words = [" ".join(rng.choices(WORDS, k=rng.randint(2, 12))) for _ in range(count + 1)]
        prompts.append(IMAGE.join(words))
        images.append(random_images(count, seed * 1000 + row))
    return processor.encode(prompts, images)
