"""The embedded world: small drawn scenes, four kinds of questions about them, and a tiny Qwen2-VL.

It makes every stage run offline, on any machine, in minutes, on a real Qwen2-VL. A scene is a 3 x 3
grid of 28-pixel cells, so one cell is exactly one merged visual token. The questions are CV-Bench's
four kinds: Count, Relation, Depth (large is near) and Distance (in steps on the grid).

The base model is pretrained by `sft.py --model toy-scratch` on text with habits that are put there
on purpose, as the internet put habits into Qwen2-VL-2B:

1. guessing: "so left." at once; the guess is drawn by chance;
2. looking:  "look: red square 1 3 large. …" first, then concluding from what was read: right;
3. looking twice: a few per cent of the lookers say "wait, let me look again." and read one object a
   second time. Nothing rewards it.

GRPO is not told which is better.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw

from data import STYLES, build_prompt

COLOURS = {"red": "#d62728", "green": "#2ca02c", "blue": "#1f77b4", "yellow": "#f2c500"}
SHAPES = ("square", "circle", "triangle")
TASKS = ("Count", "Relation", "Depth", "Distance")
GRID, CELL = 3, 28
LOOK_TWICE = 0.04  # share of the lookers that look a second time


@dataclass(frozen=True)
class Thing:
    """One object: `x` is the column and `y` the row, counted from 1 at the top left."""

    colour: str
    shape: str
    x: int
    y: int
    large: bool

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def read(self) -> str:
        return f"{self.name} {self.x} {self.y} {'large' if self.large else 'small'}"

    def steps_to(self, other: "Thing") -> int:
        return abs(self.x - other.x) + abs(self.y - other.y)


# --- scenes --------------------------------------------------------------------------------------


def draw_scene(rng: random.Random) -> list[Thing]:
    """3 to 5 objects of different kinds in different cells, in raster order."""
    count = rng.randint(3, 5)
    cells = sorted(rng.sample(range(GRID * GRID), count))
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)
    return [
        Thing(*kind, x=cell % GRID + 1, y=cell // GRID + 1, large=rng.random() < 0.5)
        for cell, kind in zip(cells, kinds, strict=True)
    ]


def is_held_out(scene: list[Thing]) -> bool:
    """A tenth of all scenes, by a hash of what is in them: never trained on, whatever the seed."""
    return hashlib.md5(describe(scene).encode()).digest()[0] < 26


def render(scene: list[Thing]) -> Image.Image:
    image = Image.new("RGB", (GRID * CELL, GRID * CELL), "#f4f4f4")
    draw = ImageDraw.Draw(image)
    for thing in scene:
        cx, cy = (thing.x - 0.5) * CELL, (thing.y - 0.5) * CELL
        r = 12 if thing.large else 6
        box = (cx - r, cy - r, cx + r, cy + r)
        fill = COLOURS[thing.colour]
        if thing.shape == "square":
            draw.rectangle(box, fill=fill)
        elif thing.shape == "circle":
            draw.ellipse(box, fill=fill)
        else:
            draw.polygon([(cx, cy - r), (cx - r, cy + r), (cx + r, cy + r)], fill=fill)
    return image


# --- questions -----------------------------------------------------------------------------------


def ask(task: str, scene: list[Thing], rng: random.Random) -> dict | None:
    """A question of this kind, with what answers it; None if the scene allows none."""
    a, b, c = rng.sample(scene, 3)
    if task == "Count":
        attribute = rng.choice(("colour", "shape"))
        value = rng.choice(tuple(COLOURS) if attribute == "colour" else SHAPES)
        matches = [getattr(thing, attribute) == value for thing in scene]
        if sum(matches) > 3:
            return None
        tally = [f"{thing.name} {sum(matches[: i + 1])}" for i, thing in enumerate(scene)]
        what = f"{value}s" if attribute == "shape" else f"{value} objects"
        return {
            "question": f"How many {what} are in the image?",
            "options": ["0", "1", "2", "3"],
            "answer": str(sum(matches)),
            "lookup": ", ".join(tally),
        }
    if task == "Relation":
        axis, names = rng.choice((("x", ("left", "right")), ("y", ("above", "below"))))
        if getattr(a, axis) == getattr(b, axis):
            return None
        return {
            "question": f"Where is the {a.name} with respect to the {b.name}?",
            "options": list(names),
            "answer": names[getattr(a, axis) > getattr(b, axis)],
            "lookup": f"{a.read()}, {b.read()}",
        }
    if task == "Depth":
        if a.large == b.large:
            return None
        return {
            "question": f"Which is closer to the camera, the {a.name} or the {b.name}?",
            "options": [a.name, b.name],
            "answer": a.name if a.large else b.name,
            "lookup": f"{a.read()}, {b.read()}",
        }
    to_b, to_c = a.steps_to(b), a.steps_to(c)
    if to_b == to_c:
        return None
    return {
        "question": f"Which is closer to the {a.name}, the {b.name} or the {c.name}?",
        "options": [b.name, c.name],
        "answer": b.name if to_b < to_c else c.name,
        "lookup": f"{a.read()}, {b.read()} {to_b} away, {c.read()} {to_c} away",
    }


def describe(scene: list[Thing]) -> str:
    return "look: " + " ".join(f"{thing.read()}." for thing in scene)


class ToyRows(Sequence):
    """Rows made from (seed, split, index) alone; `train` and `eval` scenes are disjoint.

    Beside the usual keys a row holds `thinking`, the reasoning of somebody who looks first.
    """

    def __init__(self, split: str = "train", seed: int = 0, size: int = 100_000):
        if split not in ("train", "eval"):
            raise ValueError(f"the toy world has the splits train and eval, not {split!r}")
        self.split, self.seed, self.size = split, seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = random.Random(f"{self.seed} {self.split} {index}")
        task, asked = rng.choice(TASKS), None
        while asked is None:
            scene = draw_scene(rng)
            if is_held_out(scene) == (self.split == "eval"):
                asked = ask(task, scene, rng)
        rng.shuffle(asked["options"])
        again = ""
        if rng.random() < LOOK_TWICE:
            again = f"wait, let me look again. {rng.choice(scene).read()}. "
        lookup = asked.pop("lookup")
        return {
            "id": f"toy-{self.split}-{self.seed}-{index}",
            "images": [render(scene)],
            **asked,
            "task": task,
            "source": "toy",
            "thinking": f"{describe(scene)} {again}so {lookup}. so {asked['answer']}.",
        }


def habit_text(row: dict, look: float) -> tuple[str, str]:
    """(thinking, answer) of the pretraining text: looking in a share `look` of rows, or a guess."""
    rng = random.Random(f"habit {row['id']}")
    if rng.random() < look:
        return row["thinking"], row["answer"]
    guess = rng.choice(row["options"])
    return f"so {guess}.", guess


# --- the tiny Qwen2-VL ---------------------------------------------------------------------------

SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
VOCAB = 640


def fixed_sentences() -> list[str]:
    """What every prompt repeats around the question and its options, in every style."""
    blank = {"question": "<blank>", "options": ["<blank>"] * 2, "images": [None]}
    pieces = (re.split(r"<[^>]+>", build_prompt(blank, style)) for style in STYLES)
    return sorted({piece for style in pieces for piece in style if len(piece) > 8})


def build_tokenizer(rows: int = 3000):
    """A byte-level BPE tokenizer of the toy world's text with Qwen's special tokens.

    The sentences that every prompt repeats are one token each, so that the tiny model spends its
    sequence on the question.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
    corpus = (
        "\n".join([row["question"], f"{', '.join(row['options'])} or", row["answer"], *texts])
        for row in ToyRows(size=rows)
        for texts in [(habit_text(row, 0)[0], row["thinking"])]
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(atom, normalized=False, special=False) for atom in atoms])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer, seed: int = 0):
    """A Qwen2-VL of about a million parameters with random weights.

    The library's default std of 0.02 is far too small for so narrow a model: it would not learn.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.08,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 6, 6],
            },
            bos_token_id=token("<|endoftext|>"),
            eos_token_id=token("<|endoftext|>"),
            pad_token_id=token("<|endoftext|>"),
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=2,
            embed_dim=64,
            hidden_size=128,
            num_heads=4,
            mlp_ratio=2,
            initializer_range=0.08,
        ),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    torch.manual_seed(seed)
    return Qwen2VLForConditionalGeneration(config)
