"""Turn the PyPI package `easy-vqa` into the rows that docs/data.md trains on.

    pip install easy-vqa
    python docs/from_easy_vqa.py outputs/easy-vqa     # writes train.jsonl, test.jsonl and images/

The package has questions and answers about images of one coloured shape, but no reasoning. What is
in an image is known from the answers to other questions about it. The traces are made from that.
"""

import json
import random
import re
import shutil
import sys
from pathlib import Path

import easy_vqa

SHAPES = ["circle", "rectangle", "triangle"]
COLOURS = sorted(set(easy_vqa.get_answers()) - {*SHAPES, "yes", "no"})
TASKS = {"yes or no": ["yes", "no"], "shape": SHAPES, "colour": COLOURS}
ROWS = {"train": 8_000, "test": 1_000}


def think(question: str, answer: str, seen: str, rng: random.Random) -> str:
    """Six in ten traces answer at once. The others look, check what is asked for, and answer."""
    if rng.random() < 0.6:
        return f"so {answer}."
    steps = [f"look: {seen}."]
    if answer in ("yes", "no"):
        words = re.findall(r"\w+", question)
        asked = next(word for word in words if word in (*COLOURS, *SHAPES))
        steps.append(f"{asked} {'yes' if asked in seen.split() else 'no'}.")
        steps += ["not."] * ("not" in words or "no" in words)
    return " ".join([*steps, f"so {answer}."])


def convert(folder: Path, split: str, questions: tuple, images: dict[int, str]) -> None:
    rng, rows = random.Random(split), list(zip(*questions, strict=True))
    rng.shuffle(rows)  # the package lists the questions about an image one after the other
    colour = {image: answer for _, answer, image in rows if answer in COLOURS}
    shape = {image: answer for _, answer, image in rows if answer in SHAPES}
    known = [row for row in rows if row[2] in colour and row[2] in shape]
    lines = []
    for question, answer, image in known[: ROWS[split]]:
        task = next(task for task, options in TASKS.items() if answer in options)
        path = f"images/{split}-{image}.png"
        shutil.copy(images[image], folder / path)
        seen = f"{colour[image]} {shape[image]}"
        row = {"question": question, "options": TASKS[task], "answer": answer, "image": path}
        row |= {"thinking": think(question, answer, seen, rng), "task": task, "seen": seen}
        lines.append(json.dumps(row) + "\n")
    (folder / f"{split}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "images").mkdir(parents=True, exist_ok=True)
    convert(folder, "train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())
    convert(folder, "test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())
