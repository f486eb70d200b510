"""Turn the PyPI package `easy-vqa` into the files that docs/data.md trains on.

    pip install easy-vqa
    python docs/from_easy_vqa.py outputs/easy-vqa

This writes train.jsonl and test.jsonl with the package's questions and answers, traces.jsonl for
the cold start, and the images. The package has no reasoning. What is in an image is known from the
answers to other questions about it, and the traces are made from that. Six in ten of them guess:
the option is drawn at random. The others look, and end with the right answer.
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
ROWS = {"train": 8_000, "test": 1_000, "traces": 20_000}
GUESSING = 0.6  # of the traces


def look(question: str, answer: str, seen: str) -> str:
    """Name what is in the image, check what a yes-or-no question asks for, and conclude."""
    steps = [f"look: {seen}."]
    if answer in ("yes", "no"):
        words = re.findall(r"\w+", question)
        asked = next(word for word in words if word in (*COLOURS, *SHAPES))
        steps.append(f"{asked} {'yes' if asked in seen.split() else 'no'}.")
        steps += ["not."] * ("not" in words or "no" in words)
    return " ".join([*steps, f"so {answer}."])


def convert(folder: Path, name: str, questions: tuple, images: dict[int, str]) -> None:
    rng, rows = random.Random(name), list(zip(*questions, strict=True))
    rng.shuffle(rows)  # the package lists the questions about an image one after the other
    colour = {image: answer for _, answer, image in rows if answer in COLOURS}
    shape = {image: answer for _, answer, image in rows if answer in SHAPES}
    known = [row for row in rows if row[2] in colour and row[2] in shape]
    lines = []
    for question, answer, image in known[: ROWS[name]]:
        task = next(task for task, options in TASKS.items() if answer in options)
        path = f"images/{Path(images[image]).parts[-3]}-{image}.png"
        shutil.copy(images[image], folder / path)
        seen = f"{colour[image]} {shape[image]}"
        row = {"question": question, "options": TASKS[task], "image": path, "task": task}
        if name != "traces":
            row |= {"answer": answer, "seen": seen}
        elif rng.random() < GUESSING:
            guess = rng.choice(TASKS[task])
            row |= {"answer": guess, "thinking": f"so {guess}."}
        else:
            row |= {"answer": answer, "thinking": look(question, answer, seen)}
        lines.append(json.dumps(row) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in ("train", "traces"):
        convert(folder, name, easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())
    convert(folder, "test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())
