"""Which habits a base model of the toy world has, and how often each is right.

    python benchmarks/habits.py                              # the shipped model
    python benchmarks/habits.py --model outputs/base-model   # another one
    python benchmarks/habits.py --write                      # also into docs/toy-world.md

Completions are sampled for held-out questions and sorted by `habit_of`. "Asked to look again" is
greedy: the model reads the scene itself, and when it wants to conclude, its text is continued with
"wait, let me look again."
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.qwen import load_policy  # noqa: E402
from core.rollout import sample  # noqa: E402
from data import build_prompt  # noqa: E402
from rewards import accuracy_reward  # noqa: E402
from toy.world import HABITS, ToyRows  # noqa: E402

LENGTH = 96
AGAIN = " wait, let me look again."


def habit_of(completion: str) -> str:
    """Which of the `HABITS` a completion shows."""
    if "<answer>" not in completion:
        return "rambling"
    if "wait" in completion:
        return "looking again"
    return "a hasty look" if completion.lstrip().startswith("look") else "guessing"


def complete(model, processor, prompts: list[str], rows: list[dict], G: int, temperature: float):
    """G completions of each prompt, with their lengths in tokens."""
    texts, lengths = [], []
    for start in range(0, len(rows), 50):
        part = slice(start, start + 50)
        inputs = processor.encode(prompts[part], [row["images"] for row in rows[part]])
        ids, mask, _ = sample(model, inputs, G, LENGTH, temperature, step=start)
        texts += processor.decode(ids, mask)
        lengths += mask.sum(-1).tolist()
    return texts, lengths


def measure(name: str, questions: int = 200, G: int = 8) -> dict:
    """Per habit: share, accuracy and mean length. Greedy accuracy, and asked to look again."""
    torch.manual_seed(0)
    model, processor = load_policy(name)
    world = ToyRows("eval", 0, questions)
    rows = [world[i] for i in range(questions)]
    prompts = [build_prompt(row, "base") for row in rows]
    texts, lengths = complete(model, processor, prompts, rows, G, 1.0)
    right = [accuracy_reward("<think>" + text, rows[i // G]) for i, text in enumerate(texts)]
    habits = [habit_of(text) for text in texts]
    count = Counter(habits)
    result = {}
    for habit in HABITS:
        chosen = [i for i, other in enumerate(habits) if other == habit]
        total = max(1, len(chosen))
        result[habit] = {
            "share": count[habit] / len(texts),
            "accuracy": sum(right[i] for i in chosen) / total,
            "length": sum(lengths[i] for i in chosen) / total,
        }
    texts, lengths = complete(model, processor, prompts, rows, 1, 0.0)
    result["greedy"] = accuracy_of([""] * questions, texts, rows)

    looks = [prompt + "look:" for prompt in prompts]
    texts, _ = complete(model, processor, looks, rows, 1, 0.0)
    starts = ["look:" + text.partition(" so ")[0].partition(AGAIN)[0] + AGAIN for text in texts]
    looks = [prompt + start for prompt, start in zip(prompts, starts, strict=True)]
    texts, _ = complete(model, processor, looks, rows, 1, 0.0)
    result["asked to look again"] = accuracy_of(starts, texts, rows)
    return result


def accuracy_of(starts: list[str], texts: list[str], rows: list[dict]) -> float:
    completions = zip(starts, texts, rows, strict=True)
    return sum(accuracy_reward("<think>" + s + t, row) for s, t, row in completions) / len(rows)


def table(result: dict) -> str:
    lines = [
        "| habit | share of samples | right | tokens |",
        "|---|---|---|---|",
        *(
            f"| {habit} | {result[habit]['share']:.2f} | {result[habit]['accuracy']:.2f} "
            f"| {result[habit]['length']:.0f} |"
            for habit in HABITS
        ),
        "",
        f"Greedy, the model is right in {result['greedy']:.2f} of 200 held-out questions. If its "
        f"first look is continued with `{AGAIN.strip()}`, it is right in "
        f"{result['asked to look again']:.2f}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="toy", help="`toy` or a folder")
    parser.add_argument("--write", action="store_true", help="Write the table into the docs")
    options = parser.parse_args()
    text = table(measure(options.model))
    print(text)
    if options.write:
        page = ROOT / "docs" / "toy-world.md"
        block = re.compile("(<!-- habits -->\n).*?(<!-- end -->)", re.DOTALL)
        page.write_text(block.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page.read_text()))


if __name__ == "__main__":
    main()
