"""Work one real group of the toy base model through, for docs/grpo.md.

    python docs/worked_example.py            # print the numbers
    python docs/worked_example.py --write    # and put them into docs/grpo.md, with the image

Four updates are made on this group alone, with the functions of docs/minimal.py. The page states
the settings: learning rate 5e-5, epsilon 0.2, no KL.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root

from core.qwen import load_policy
from core.rollout import sample
from data import build_prompt
from docs.minimal import EPSILON, completion_logps, compute_advantages, grpo_loss
from rewards import accuracy_reward, format_reward
from toy.world import ToyRows

DOCS = Path(__file__).resolve().parent
G, MAX_C, UPDATES, LEARNING_RATE, BETA = 8, 96, 4, 5e-5, 0.04


def find_group(model, processor):
    """The first training question for which every look was right, one guess right and one wrong.

    At most one completion may be ill-formed. Returns the row, the completions as token ids and mask
    (G, C) and as text, and their scores for accuracy and format (G, 2).
    """
    for index, row in enumerate(ToyRows("train", seed=0)):
        inputs = processor.encode([build_prompt(row, "base")], [row["images"]])
        ids, mask, _ = sample(model, inputs, G, MAX_C, seed=index)
        texts = processor.decode(ids, mask)
        scores = [[f("<think>" + t, row) for f in (accuracy_reward, format_reward)] for t in texts]
        kinds = {(text.split()[0], *score) for text, score in zip(texts, scores, strict=True)}
        wanted = {("so", 1.0, 1.0), ("look:", 1.0, 1.0), ("so", 0.0, 1.0)}
        unwanted = ("look:", 0.0, 1.0) in kinds
        if wanted <= kinds and not unwanted and sum(form for _, form in scores) >= G - 1:
            return row, ids, mask, texts, torch.tensor(scores)
    raise RuntimeError("no question has such a group")


def train(model, inputs: dict, ids: Tensor, mask: Tensor, advantages: Tensor):
    """UPDATES updates on the group.

    Returns a table line for each, and the log-probabilities before and after, both (G, C).
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    old_logps = completion_logps(model, inputs, ids, mask).detach()
    lines = []
    for update in range(UPDATES):
        logps = completion_logps(model, inputs, ids, mask)
        loss = grpo_loss(logps, old_logps, None, advantages, mask, 0.0, EPSILON)
        with_kl = grpo_loss(logps, old_logps, old_logps, advantages, mask, BETA, EPSILON)
        stopped = is_stopped((logps - old_logps).exp(), advantages[:, None]) & mask.bool()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
        optimizer.step()
        kl = with_kl.item() - loss.item()
        share = f"{int(stopped.sum())} of {int(mask.sum())}"
        lines.append([update + 1, f"{loss:z.4f}", f"{norm:.2f}", share, f"{kl:z.4f}"])
    return lines, old_logps, completion_logps(model, inputs, ids, mask).detach()


def is_stopped(ratio: Tensor, A: Tensor) -> Tensor:
    """Whether the clip stops the gradient of a token."""
    return ((ratio > 1 + EPSILON) & (A > 0)) | ((ratio < 1 - EPSILON) & (A < 0))


def token_lines(tokenizer, ids, mask, advantages, old_logps, new_logps) -> list[list]:
    """The first token of each completion, and the one that changed most. Equal lines are merged."""
    lines = {}
    for g, A in enumerate(advantages):
        change = ((new_logps - old_logps)[g] * mask[g]).abs()
        change[0] = 0
        for t in (0, int(change.argmax())):
            ratio = (new_logps[g, t] - old_logps[g, t]).exp()
            clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
            before, token = tokenizer.decode(ids[g, max(0, t - 2) : t]), tokenizer.decode(ids[g, t])
            line = [f"`{before}`" if before else "(start)", f"`{token.strip()}`", f"{A:+.4f}"]
            line += [f"{logps[g, t].exp():.4f}" for logps in (old_logps, new_logps)]
            line += [f"{ratio:.3f}", f"{ratio * A:+.4f}", f"{clipped * A:+.4f}"]
            line += [f"{-torch.minimum(ratio * A, clipped * A):+.4f}"]
            line += ["stopped" if is_stopped(ratio, A) else "flows"]
            lines.setdefault(tuple(line), []).append(str(g + 1))
    return [[" ".join(completions), *line] for line, completions in lines.items()]


def table(head: str, lines: list[list]) -> str:
    rows = [head.split(" | "), ["---"] * (head.count(" | ") + 1), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def build() -> tuple[dict[str, str], Image.Image]:
    """Every block of the page by its marker, and the question's image."""
    model, processor = load_policy("toy")
    row, ids, mask, texts, scores = find_group(model, processor)
    rewards = scores.sum(1)
    advantages = compute_advantages(rewards[None])[0]
    inputs = processor.encode([build_prompt(row, "base")] * G, [row["images"]] * G)
    updates, old_logps, new_logps = train(model, inputs, ids, mask, advantages)
    tokens = token_lines(processor.tokenizer, ids, mask, advantages, old_logps, new_logps)

    group = []
    for g, text in enumerate(texts):
        values = [int(value) for value in (*scores[g], rewards[g])]
        group.append([g + 1, f"`{text}`", *values, f"{advantages[g]:+.4f}"])
    mean, std = rewards.mean(), rewards.std()
    by_hand = [f"    mean(R) = ({' + '.join(f'{r:.0f}' for r in rewards)}) / {G} = {mean:.4f}"]
    by_hand += [f"    std(R)  = {std:.4f}"]
    for reward in rewards.unique().flip(0):
        A = (reward - mean) / (std + 1e-4)
        by_hand += [f"    A = ({reward:.0f} - {mean:.4f}) / ({std:.4f} + 0.0001) = {A:+.4f}"]
    options = ", ".join(f"*{option}*" for option in row["options"])
    return {
        "question": f"> {row['question']} Options: {options}. Right: *{row['answer']}*.",
        "group": table("g | completion | accuracy | format | R | A", group),
        "advantages": "\n".join(by_hand),
        "updates": table("update | loss | gradient norm | tokens clipped | beta * KL", updates),
        "tokens": table(
            "g | after | token | A | p when drawn | p now | ratio | ratio * A | clipped * A "
            "| loss | gradient",
            tokens,
        ),
    }, row["images"][0]


def replaced(page: str, blocks: dict[str, str]) -> str:
    """The page with each block between its markers."""
    for name, text in blocks.items():
        before, marker, rest = page.partition(f"<!-- {name} -->\n")
        old, end, after = rest.partition("<!-- end -->")
        if not (marker and end):
            raise ValueError(f"docs/grpo.md has no place for {name}")
        page = f"{before}{marker}{text}\n{end}{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="Write docs/grpo.md and its image")
    write = parser.parse_args().write
    blocks, image = build()
    print("\n\n".join(blocks.values()))
    if write:
        page = DOCS / "grpo.md"
        page.write_text(replaced(page.read_text(), blocks))
        image.resize((252, 252), 0).save(DOCS / "worked_example.png")


if __name__ == "__main__":
    main()
