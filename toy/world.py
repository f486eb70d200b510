"""The toy world: drawn scenes, CV-Bench's four kinds of questions, and four habits of answering.

A scene is a grid of 3 x 3 cells, 28 pixels wide each, so that one cell is one merged visual token.
Four of them hold an object. The questions are Count, Relation (left, right, above, below),
Depth (large means near) and Distance (in steps on the grid).

The text describes an object as "red square 2 1 large": a large red square in column 2, row 1,
counted from the top left.

`toy/base_model.py` pretrains a tiny Qwen2-VL on four habits. They are put there on purpose, as the
internet put habits into Qwen2-VL-2B:

    rambling        HTML, or the question repeated; no tags
    guessing        "so left." and a random option
    a hasty look    reads the first three objects in raster order, then concludes
    looking again   the same, then "wait, let me look again.", the fourth object, the conclusion

GRPO is told nothing about them. It has to find out which of them pays.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {"red": "#d62728", "green": "#2ca02c", "blue": "#1f77b4", "yellow": "#f2c500"}
SHAPES = ("square", "circle", "triangle")
TASKS = ("Count", "Relation", "Depth", "Distance")
GRID, CELL = 3, 28
OBJECTS, SEEN = 4, 3  # in a scene, and by a hasty look

HABITS = ("rambling", "guessing", "a hasty look", "looking again")
RAMBLINGS = (
    '<div class="image"><img src="image.jpg"></div><p>{question}</p><ul><li>{one}</li>'
    "<li>{other}</li></ul>",
    "<html><body><h1>{question}</h1><ul><li>{one}</li><li>{other}</li></ul></body></html>",
    "User: {question} Assistant: {one} User: {question} Assistant: {other} User: {question}",
    "{question} {question} {question} {question}",
    "<p>{question}</p><p>{one}</p><p>{other}</p><p>{question}</p><p>{one}</p>",
)


# --- scenes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """One object. `x` is the column and `y` the row, counted from 1 at the top left."""

    colour: str
    shape: str
    x: int
    y: int
    large: bool

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def reading(self) -> str:
        return f"{self.name} {self.x} {self.y} {'large' if self.large else 'small'}"

    def steps_to(self, other: "Thing") -> int:
        return abs(self.x - other.x) + abs(self.y - other.y)


def draw_scene(rng: random.Random) -> list[Thing]:
    """Objects of different kinds in different cells, in raster order."""
    cells = sorted(rng.sample(range(GRID * GRID), OBJECTS))
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], OBJECTS)
    return [
        Thing(*kind, x=cell % GRID + 1, y=cell // GRID + 1, large=rng.random() < 0.5)
        for cell, kind in zip(cells, kinds, strict=True)
    ]


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


def list_readings(things: list[Thing]) -> str:
    return " ".join(f"{thing.reading}." for thing in things)


def is_held_out(scene: list[Thing]) -> bool:
    """A tenth of all scenes, chosen by a hash of their content, is never trained on."""
    return hashlib.md5(list_readings(scene).encode()).digest()[0] < 26


# --- questions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    task: str
    text: str
    options: list[str]
    answer: str
    counted: str = ""  # Count: the colour or shape that is counted
    evidence: tuple[tuple[Thing, str], ...] = ()  # other tasks: objects needed, and what to note


def ask(task: str, scene: list[Thing], rng: random.Random) -> Question | None:
    """A question of this kind about the scene, or None if the scene has no clear answer."""
    a, b, c = rng.sample(scene, 3)
    if task == "Count":
        attribute = rng.choice(("colour", "shape"))
        value = rng.choice(tuple(COLOURS) if attribute == "colour" else SHAPES)
        total = sum(value in thing.name.split() for thing in scene)
        what = f"{value}s" if attribute == "shape" else f"{value} objects"
        text, options = f"How many {what} are in the image?", ["0", "1", "2", "3"]
        return Question(task, text, options, str(total), counted=value) if total <= 3 else None
    evidence = [(a, a.reading), (b, b.reading)]
    if task == "Relation":
        axis, options = rng.choice((("x", ["left", "right"]), ("y", ["above", "below"])))
        one, other = getattr(a, axis), getattr(b, axis)
        text = f"Where is the {a.name} with respect to the {b.name}?"
    elif task == "Depth":
        one, other, options = b.large, a.large, [a.name, b.name]
        text = f"Which is closer to the camera, the {a.name} or the {b.name}?"
    else:
        one, other, options = a.steps_to(b), a.steps_to(c), [b.name, c.name]
        text = f"Which is closer to the {a.name}, the {b.name} or the {c.name}?"
        evidence[1:] = (b, f"{b.reading} {one} away"), (c, f"{c.reading} {other} away")
    if one == other:  # the option of the smaller one is right
        return None
    return Question(task, text, options, options[one > other], evidence=tuple(evidence))


# --- habits --------------------------------------------------------------------------------------


def see(scene: list[Thing]) -> list[Thing]:
    """What a hasty look sees: the first objects in raster order."""
    return scene[:SEEN]


def conclude(question: Question, seen: list[Thing], rng: random.Random) -> tuple[str, str]:
    """Reasoning and answer that follow from the objects seen.

    A count counts them. Any other question is answered right if every object it needs was seen,
    and by a random option if not. Sampling more often cannot repair that. Looking again can.
    """
    if question.counted:
        notes, total = [], 0
        for thing in seen:
            total += question.counted in thing.name.split()
            notes.append(f"{thing.name} {total}")
        return ", ".join(notes), str(total)
    notes = [note if thing in seen else f"{thing.name} unseen" for thing, note in question.evidence]
    all_seen = all(thing in seen for thing, _ in question.evidence)
    return ", ".join(notes), question.answer if all_seen else rng.choice(question.options)


def write(habit: str, question: Question, scene: list[Thing], rng: random.Random) -> str:
    """The completion that somebody with this habit writes after the prompt's `<think>`."""
    if habit == "rambling":
        one, other = rng.sample(question.options, 2)
        return rng.choice(RAMBLINGS).format(question=question.text, one=one, other=other)
    if habit == "guessing":
        answer = rng.choice(question.options)
        return f"so {answer}.</think><answer>{answer}</answer>"
    seen = see(scene)
    thinking = f"look: {list_readings(seen)}"
    if habit == "looking again":
        thinking += f" wait, let me look again. {list_readings(scene[SEEN:])}"
        seen = scene
    notes, answer = conclude(question, seen, rng)
    return f"{thinking} so {notes}. so {answer}.</think><answer>{answer}</answer>"


# --- rows ----------------------------------------------------------------------------------------


class ToyRows(Sequence):
    """Rows made from (seed, split, index) alone. Train and eval share no scene, for any seed.

    A row also holds `thinking`, the reasoning of somebody who looks again.
    """

    def __init__(self, split: str = "train", seed: int = 0, size: int = 100_000):
        if split not in ("train", "eval"):
            raise ValueError(f"the toy world has the splits train and eval, not {split!r}")
        self.split, self.seed, self.size = split, seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        scene, question, rng = self.draw(index)
        completion = write("looking again", question, scene, rng)
        return {
            "id": f"toy-{self.split}-{self.seed}-{index}",
            "place": index,
            "images": [render(scene)],
            "question": question.text,
            "options": question.options,
            "answer": question.answer,
            "task": question.task,
            "source": "toy",
            "thinking": completion.partition("</think>")[0],
        }

    def draw(self, index: int) -> tuple[list[Thing], Question, random.Random]:
        """Scene and question of a row, and the generator for what is written about them."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = random.Random(f"{self.seed} {self.split} {index}")
        task, question = rng.choice(TASKS), None
        while question is None:
            scene = draw_scene(rng)
            if is_held_out(scene) == (self.split == "eval"):
                question = ask(task, scene, rng)
        rng.shuffle(question.options)
        return scene, question, rng
