"""The embedded world: answers right, splits disjoint, the model a small real Qwen2-VL."""

import re

import pytest
import torch

import toy
from model import TOY_CHECKPOINT, load_policy
from rewards import accuracy_reward, format_reward, reflects
from rollout import sample


def objects(row) -> dict[str, tuple[int, int, str]]:
    """name -> (column, row, size), read from the description by a parser of its own."""
    description = row["thinking"].partition(" so ")[0]
    found = re.findall(r"(\w+ \w+) (\d) (\d) (large|small)\.", description)
    return {name: (int(x), int(y), size) for name, x, y, size in found}


def solve(row) -> str:
    """The answer from the description and the question alone."""
    scene, question = objects(row), row["question"]
    named = re.findall(r"(?:red|green|blue|yellow) (?:square|circle|triangle)", question)
    if row["task"] == "Count":
        what = re.match(r"How many (\w+?)s? (?:objects )?are", question).group(1)
        return str(sum(what in name.split() for name in scene))
    if row["task"] == "Relation":
        (ax, ay, _), (bx, by, _) = scene[named[0]], scene[named[1]]
        if "left" in row["options"]:
            return "left" if ax < bx else "right"
        return "above" if ay < by else "below"
    if row["task"] == "Depth":
        return next(name for name in named if scene[name][2] == "large")
    (x, y, _), *others = (scene[name] for name in named)
    return min(
        zip(others, named[1:], strict=True), key=lambda o: abs(o[0][0] - x) + abs(o[0][1] - y)
    )[1]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_answer_is_right_by_an_independent_solver(split):
    rows = toy.ToyRows(split, seed=5, size=400)
    for i in range(400):
        row = rows[i]
        assert solve(row) == row["answer"], row["question"]
        assert row["answer"] in row["options"] and len(set(row["options"])) == len(row["options"])
        trace = f"<think>{row['thinking']}</think><answer>{row['answer']}</answer>"
        assert accuracy_reward(trace, row) == format_reward(trace, row) == 1.0
    assert {rows[i]["task"] for i in range(100)} == set(toy.TASKS)


def test_train_and_held_out_scenes_are_disjoint_whatever_the_seed():
    def scenes(split, seed):
        rows = toy.ToyRows(split, seed, 500)
        return {rows[i]["thinking"].partition(" so ")[0].partition(" wait")[0] for i in range(500)}

    train = scenes("train", 0) | scenes("train", 1)
    held_out = scenes("eval", 0) | scenes("eval", 1)
    assert not train & held_out and len(train) > 900


def test_a_row_depends_on_seed_split_and_index_alone():
    one, other = toy.ToyRows(seed=1)[7], toy.ToyRows(seed=1, size=10)[7]
    assert one["images"][0].tobytes() == other["images"][0].tobytes()
    assert {k: v for k, v in one.items() if k != "images"} == {
        k: v for k, v in other.items() if k != "images"
    }
    assert toy.ToyRows(seed=2)[7]["thinking"] != one["thinking"]


def test_the_place_of_the_right_option_is_no_hint():
    rows = toy.ToyRows(size=2000)
    places = [
        r["options"].index(r["answer"])
        for r in (rows[i] for i in range(2000))
        if len(r["options"]) == 2
    ]
    assert 0.46 < sum(places) / len(places) < 0.54


def test_a_cell_of_the_grid_is_one_visual_token():
    _, processor = load_policy("toy-scratch")
    encoded = processor.prepare(toy.ToyRows()[0], "base")["encoded"]
    assert encoded["image_grid_thw"].tolist() == [[1, 2 * toy.GRID, 2 * toy.GRID]]
    assert (encoded["input_ids"] == processor.image_id).sum() == toy.GRID**2


def test_the_habits_are_as_documented():
    rows = [toy.ToyRows(size=3000)[i] for i in range(3000)]
    texts = [toy.habit_text(row, 0.2) for row in rows]
    looks = [thinking.startswith("look:") for thinking, _ in texts]
    assert 0.17 < sum(looks) / 3000 < 0.23
    guessed = [
        answer == row["answer"]
        for (_, answer), row, look in zip(texts, rows, looks, strict=True)
        if not look
    ]
    chance = sum(1 / len(row["options"]) for row in rows) / 3000
    assert abs(sum(guessed) / len(guessed) - chance) < 0.04
    twice = [reflects(row["thinking"]) for row in rows]
    assert 0.02 < sum(twice) / 3000 < 0.06


def test_the_shipped_checkpoint_is_small_and_has_both_habits():
    files = list(TOY_CHECKPOINT.iterdir())
    assert sum(file.stat().st_size for file in files) <= 5 * 2**20
    model, processor = load_policy("toy")
    assert model.config.model_type == "qwen2_vl"
    rows = [processor.prepare(toy.ToyRows("eval", 9)[i], "base") for i in range(64)]
    inputs = processor.collate([row["encoded"] for row in rows])
    ids, mask = sample(model, inputs, 4, 96, seed=0)
    texts = processor.decode(ids, mask)
    pairs = [(text, rows[i // 4]) for i, text in enumerate(texts)]
    looked = [accuracy_reward(text, row) for text, row in pairs if text.startswith("look:")]
    guessed = [accuracy_reward(text, row) for text, row in pairs if text.startswith("so ")]
    assert 0.1 < len(looked) / 256 < 0.35 and len(looked) + len(guessed) > 240
    assert sum(looked) / len(looked) > 0.85 and sum(guessed) / len(guessed) < 0.6
    greedy = processor.decode(*sample(model, inputs, 1, 96, 0.0))
    assert sum(map(accuracy_reward, greedy, rows)) / 64 <= 0.6


def test_the_tokenizer_round_trips_any_text():
    _, processor = load_policy("toy-scratch")
    for text in (
        "look: red square 1 3 large.",
        "140° – „ü“ 漢字 🙂",
        "<think>a</think><answer>b</answer>",
    ):
        ids = processor.tokenizer(text)["input_ids"]
        assert processor.tokenizer.decode(ids) == text
    assert torch.tensor(ids).max() < len(processor.tokenizer)
