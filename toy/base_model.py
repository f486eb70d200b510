"""The toy world's base model: a tiny Qwen2-VL, its tokenizer, and the command that pretrains it.

    python -m toy.base_model --output_dir toy/qwen2-vl

The text that it learns from has the four habits of `toy/world.py`. Looking is learned first, in the
first 80 % of the updates. The last 20 % mix the habits as `MIXTURE` says, so that the model usually
guesses and can still look.
"""

import argparse
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    get_cosine_schedule_with_warmup,
)

from core.qwen import MAX_PIXELS, Processor, save_policy
from data import STYLES, build_prompt
from toy.world import CELL, GRID, HABITS, ToyRows, write

LOOKING = (0, 0, 1, 2)  # weights of the HABITS while looking is learned
MIXTURE = (0.25, 0.50, 0.20, 0.05)  # and at the end
LOOKING_SHARE = 0.8  # of the updates
ROWS = 64  # completions per update

SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
VOCAB = 640


# --- tokenizer and model -------------------------------------------------------------------------


def fixed_sentences() -> list[str]:
    """The sentences that every prompt repeats around the question and its options."""
    blank = {"question": "<blank>", "options": ["<blank>"] * 2, "images": [None]}
    pieces = (re.split(r"<[^>]+>", build_prompt(blank, style)) for style in STYLES)
    return sorted({piece for style in pieces for piece in style if len(piece) > 8})


def build_tokenizer(rows: int = 3000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the toy world's text with Qwen's special tokens.

    Each of the fixed sentences is one token, so that the tiny model spends its sequence on the
    question.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    atoms = [*TAGS, *fixed_sentences()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(atoms),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def corpus():
        world = ToyRows(size=rows)
        for index in range(rows):
            scene, question, rng = world.draw(index)
            options = f"{', '.join(question.options)} or"
            texts = [write(habit, question, scene, rng) for habit in HABITS]
            yield "\n".join([question.text, options, *texts])

    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken(atom, normalized=False, special=False) for atom in atoms])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL of about a million parameters with random weights.

    The library's default std of 0.02 is far too small for so narrow a model. It would not learn.
    """
    token = tokenizer.convert_tokens_to_ids
    end = token("<|endoftext|>")
    std = dict(initializer_range=0.08)
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 6, 6],
            },
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            tie_word_embeddings=True,
            **std,
        ),
        vision_config=dict(depth=2, embed_dim=64, hidden_size=128, num_heads=4, mlp_ratio=2, **std),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        **std,
    )
    torch.manual_seed(seed)
    return Qwen2VLForConditionalGeneration(config)


# --- pretraining ---------------------------------------------------------------------------------


def batch(world: ToyRows, indices: range, weights: tuple, processor) -> tuple[dict, Tensor]:
    """Model inputs of prompts with completions, and the labels, -100 outside the completions."""
    rows, texts = [world[i] for i in indices], []
    for i in indices:
        habit = random.Random(f"habit {i}").choices(HABITS, weights)[0]
        scene, question, rng = world.draw(i)
        texts.append(write(habit, question, scene, rng))
    prompts = [build_prompt(row, "base") for row in rows]
    inputs = processor.encode(prompts, [row["images"] for row in rows])
    ids, mask = processor.encode_targets(texts)  # (B, C)
    labels = F.pad(ids.masked_fill(mask == 0, -100), (inputs["input_ids"].shape[1], 0), value=-100)
    more = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(ids)}
    return inputs | {name: torch.cat([inputs[name], x], 1) for name, x in more.items()}, labels


def pretrain(model: nn.Module, processor: Processor, steps: int, seed: int) -> None:
    """AdamW on the cross-entropy of the completions; cosine schedule after a short warm-up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    world, began = ToyRows(seed=seed, size=steps * ROWS), time.perf_counter()
    model.train()
    for step in range(steps):
        weights = LOOKING if step < LOOKING_SHARE * steps else MIXTURE
        indices = range(step * ROWS, (step + 1) * ROWS)
        inputs, labels = batch(world, indices, weights, processor)
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            minutes = (time.perf_counter() - began) / 60
            print(f"update {step:5}  loss {loss.item():.4f}  {minutes:5.1f} minutes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to write")
    parser.add_argument("--steps", type=int, default=4800, help="Updates")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights and the rows")
    options = parser.parse_args()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, options.seed)
    processor = Processor(tokenizer, Qwen2VLImageProcessorPil())
    # Smaller images are enlarged to the size of the grid.
    smallest = (GRID * CELL) ** 2
    processor.image_processor.size = {"shortest_edge": smallest, "longest_edge": MAX_PIXELS}
    pretrain(model, processor, options.steps, options.seed)
    save_policy(model.eval(), processor, options.output_dir)
    # what `--recipe auto` means for this model
    (options.output_dir / "run_config.json").write_text('{"recipe": "toy"}\n')


if __name__ == "__main__":
    main()
