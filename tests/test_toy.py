"""The toy world: answers, splits, habits, and the base model that shows them."""

import random
import re
from pathlib import Path

import pytest

from benchmarks.habits import habit_of, measure
from core.qwen import load_policy
from rewards import accuracy_reward, format_reward, reflects
from toy import base_model
from toy.world import GRID, HABITS, TASKS, ToyRows, conclude, list_readings, see, write

ROOT = Path(__file__).resolve().parent.parent


def drawn(split: str = "train", count: int = 200, seed: int = 5) -> list:
    """Scene, question and generator of the first rows."""
    world = ToyRows(split, seed)
    return [world.draw(index) for index in range(count)]


def read_scene(row: dict) -> dict[str, tuple[int, int, str]]:
    """name -> (column, row, size), read from the row's reasoning by a parser of its own."""
    looked = row["thinking"].partition(" so ")[0]
    found = re.findall(r"(\w+ \w+) (\d) (\d) (large|small)\.", looked)
    return {name: (int(x), int(y), size) for name, x, y, size in found}


def solve(row: dict) -> str:
    """The answer, from the reading of the scene and the question's words alone."""
    scene, question = read_scene(row), row["question"]
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
    steps = [abs(ox - x) + abs(oy - y) for ox, oy, _ in others]
    return named[1 + steps.index(min(steps))]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_answer_is_right_by_an_independent_solver(split):
    rows = [ToyRows(split, seed=5)[index] for index in range(300)]
    for row in rows:
        assert solve(row) == row["answer"], row["question"]
        assert row["answer"] in row["options"] and len(set(row["options"])) == len(row["options"])
    assert {row["task"] for row in rows} == set(TASKS)


def test_an_object_is_drawn_in_the_cell_and_size_that_its_reading_says():
    row = ToyRows(seed=5)[0]
    image = row["images"][0]
    background, filled = image.getpixel((0, 0)), {}
    for y in range(image.height):
        for x in range(image.width):
            if image.getpixel((x, y)) != background:
                cell = (x // 28 + 1, y // 28 + 1)
                filled[cell] = filled.get(cell, 0) + 1
    sizes = {(x, y): size for x, y, size in read_scene(row).values()}
    assert filled.keys() == sizes.keys()
    assert {cell: "large" if area > 200 else "small" for cell, area in filled.items()} == sizes


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1), (3, 7)])
def test_training_and_held_out_questions_share_no_scene(seeds):
    train, held_out = (
        {list_readings(scene) for scene, _, _ in drawn(split, 400, seed)}
        for split, seed in zip(("train", "eval"), seeds, strict=True)
    )
    assert len(train) > 350 and len(held_out) > 300 and not train & held_out


def test_a_row_is_a_function_of_seed_split_and_index():
    def content(row: dict) -> dict:
        return row | {"images": [image.tobytes() for image in row["images"]]}

    row = content(ToyRows("train", seed=1, size=100)[7])
    assert content(ToyRows("train", seed=1, size=10)[7]) == row
    others = (ToyRows("train", 2)[7], ToyRows("eval", 1)[7], ToyRows("train", 1)[8])
    assert all(content(other)["images"] != row["images"] for other in others)


def test_the_place_of_the_right_option_is_no_hint():
    questions = [question for _, question, _ in drawn(count=1500)]
    places = [q.options.index(q.answer) for q in questions if len(q.options) == 2]
    assert 0.45 < sum(places) / len(places) < 0.55


def test_a_hasty_look_sees_exactly_the_first_three_of_four_objects():
    for scene, question, rng in drawn():
        assert see(scene) == scene[:3] and len(scene) == 4
        hasty = write("a hasty look", question, scene, rng)
        assert hasty.startswith(f"look: {list_readings(scene[:3])} so ")
        assert scene[3].reading not in hasty


def test_a_hasty_look_is_right_whenever_the_question_needs_only_what_it_sees():
    complete = incomplete = 0
    for scene, question, _ in drawn(count=400):
        answers = {conclude(question, see(scene), random.Random(i))[1] for i in range(20)}
        needed = [thing for thing, _ in question.evidence]
        if question.task == "Count":
            counted = sum(question.counted in thing.name.split() for thing in scene[:3])
            assert answers == {str(counted)}
        elif scene[3] in needed:
            incomplete += 1
            assert answers == set(question.options)  # a guess
        else:
            complete += 1
            assert answers == {question.answer}
    assert complete > 50 and incomplete > 50


@pytest.mark.parametrize("split", ["train", "eval"])
def test_looking_again_reads_every_object_and_is_always_right_and_well_formed(split):
    for scene, question, rng in drawn(split):
        completion = "<think>" + write("looking again", question, scene, rng)
        row = {"options": question.options, "answer": question.answer, "question": question.text}
        assert accuracy_reward(completion, row) == format_reward(completion, row) == 1.0
        first, again = completion.split(" wait, let me look again. ")
        assert first == f"<think>look: {list_readings(scene[:3])}"
        assert again.startswith(f"{list_readings(scene[3:])} so ")


@pytest.mark.parametrize("habit", HABITS)
def test_a_written_habit_is_recognised(habit):
    for scene, question, rng in drawn():
        completion = write(habit, question, scene, rng)
        assert habit_of(completion) == habit
        assert reflects(completion) == (habit == "looking again")
        assert format_reward("<think>" + completion, {}) == (habit != "rambling")


def test_a_cell_of_the_grid_is_one_visual_token():
    model, processor = load_policy("toy")
    row = ToyRows()[0]
    assert row["images"][0].size == (84, 84)
    ids = processor.prompt(row, "base").inputs["input_ids"]
    assert (ids == model.config.image_token_id).sum() == GRID**2 == 9


def test_the_shipped_model_is_small_and_has_the_habits_that_grpo_starts_from():
    files = (ROOT / "toy" / "qwen2-vl").iterdir()
    assert sum(file.stat().st_size for file in files) <= 5_000_000
    found = measure("toy", questions=100)
    rambling, guessing, once, again = (found[habit]["share"] for habit in HABITS)
    assert 0.15 <= rambling <= 0.30 and 0.40 <= guessing <= 0.60
    assert 0.15 <= once <= 0.25 and 0.02 <= again <= 0.08
    assert found["greedy"] <= 0.50 and found["asked to look again"] >= 0.85


def test_the_command_that_makes_the_base_model_learns_and_saves_it(tmp_path, monkeypatch, capsys):
    """With a quarter of the rows per update, and far fewer updates."""
    monkeypatch.setattr(base_model, "ROWS", 16)
    argv = ["base_model", "--steps", "40", "--output_dir", str(tmp_path / "model")]
    monkeypatch.setattr("sys.argv", argv)
    base_model.main()
    first, last = map(float, re.findall(r"loss (\S+)", capsys.readouterr().out))
    assert first > 5.5 and last < 4.5  # a uniform guess among 640 tokens has log(640) = 6.5
    model, _ = load_policy(str(tmp_path / "model"))
    assert 500_000 < sum(p.numel() for p in model.parameters()) < 2_000_000
