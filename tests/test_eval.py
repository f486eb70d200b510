"""Evaluation: scores by hand, and whole evaluations as a user starts, kills and repeats them."""

import functools
import io
import itertools
import json
import operator
import random
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from launch import ROOT, Stage, launch
from tiny import random_images, tiny_model

import core.processes
import eval_cvbench
from core.options import parse_options
from core.qwen import Processor, save_policy
from eval_cvbench import EvalOptions, judge, pass_at_k, score, wilson

# --- scoring -------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text()
COUNT = {"options": ["3", "2", "1", "0"], "answer": "1"}  # (C)
ABOVE = {"options": ["above", "below"], "answer": "below"}  # (B)
DESK = {"options": ["chair", "desk"], "answer": "desk"}  # (B)
BLINK = {"options": ["A is closer", "B is closer"], "answer": "A is closer"}
ANGLE = {"options": [], "answer": "35°"}
OPEN_LETTER = {"options": [], "answer": "B"}
LOOP = "the desk is behind the chair, so " * 1500  # 10 000 words

# row, response, right strictly, right leniently
# fmt: off
TABLE = [
    # the last tag decides
    (COUNT, "One organ.</think><answer>(C)</answer>", 1, 1),
    (COUNT, "</think>\n<answer>\n1\n</answer>\n", 1, 1),
    (ABOVE, "</think><answer>above</answer><answer>below</answer>", 1, 1),
    (ABOVE, "</think><answer>below</answer> Wait. <answer>above</answer>", 0, 0),
    (ANGLE, r"</think><answer>\boxed{35^\circ}</answer>", 1, 1),
    # without a tag, a text counts if it states exactly one option or value
    (DESK, "desk", 0, 1),
    (DESK, "(B)", 0, 1),
    (DESK, "It is not the desk.", 0, 0),
    (DESK, "I see a dog and a cat.", 0, 0),
    (BLINK, "A is closer than B.", 0, 0),
    (COUNT, "Select from the following choices. (A) 3 (B) 2 (C) 1 (D) 0", 0, 0),
    (ANGLE, "The angle is 35 degrees.", 0, 1),
    (ANGLE, "It is 35 or 36 degrees.", 0, 0),
    (OPEN_LETTER, "The answer is (B).", 0, 1),
    (OPEN_LETTER, "A or B", 0, 0),
    # the text after </think>, or the whole text if nothing follows
    (DESK, "<think>chair or desk?</think> desk", 0, 1),
    (DESK, "<think>The desk, I am sure", 0, 1),
    (DESK, "<think>B", 0, 1),
    # a broken or empty tag
    (ABOVE, "so</think><answer>below", 0, 1),
    (ABOVE, "so</think><answer></answer> below", 0, 0),
    # 10 000 words of repetition
    (DESK, f"{LOOP}</think><answer>desk</answer>", 1, 1),
]
# fmt: on


@pytest.mark.parametrize("row, response, strict, lenient", TABLE)
def test_a_response_is_judged_as_by_hand(row, response, strict, lenient):
    verdict = judge(row, response)
    assert (verdict["correct"], verdict["correct_lenient"]) == (bool(strict), bool(lenient))
    assert (verdict["extracted"] is None) == ("</answer>" not in response.partition("<answer>")[2])


def record_of(row: dict, response: str, **more) -> dict:
    return row | {"response": response, **judge(row, response), **more}


def test_official_and_micro_scores_are_those_computed_by_hand():
    def some(right: int, bare: int, wrong: int, **about) -> list[dict]:
        answers = ["<answer>desk</answer>"] * right + ["desk"] * bare
        answers += ["<answer>chair</answer> hold on"] * wrong
        return [record_of(DESK, answer, **about) for answer in answers]

    records = [
        *some(3, 0, 1, task="Count", source="ADE20K"),  # 3/4, lenient 3/4
        *some(1, 1, 0, task="Relation", source="COCO"),  # 1/2, lenient 2/2
        *some(1, 1, 1, task="Depth", source="Omni3D"),  # Omni3D: 2/5, lenient 3/5
        *some(1, 0, 1, task="Distance", source="Omni3D"),
    ]
    scores = score(random.Random(0).sample(records, len(records)))
    assert scores["n"] == 11
    assert scores["accuracy"] == 6 / 11 and scores["accuracy_lenient"] == 8 / 11
    assert scores["official"] == pytest.approx(((3 / 4 + 1 / 2) / 2 + 2 / 5) / 2)
    assert scores["official_lenient"] == pytest.approx(((3 / 4 + 2 / 2) / 2 + 3 / 5) / 2)
    assert (scores["unparsed"], scores["reflection"]) == (2, 3 / 11)
    assert scores["completion_length"] == (8 * 1 + 3 * 3) / 11  # words
    assert scores["tasks"]["Depth"] == {"n": 3, "accuracy": 1 / 3, "accuracy_lenient": 2 / 3}
    assert scores["sources"]["Omni3D"] == {"n": 5, "accuracy": 2 / 5, "accuracy_lenient": 3 / 5}
    assert score(records[:6])["official"] is score(records[:6])["official_lenient"] is None


def test_the_interval_is_wilsons():
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_include_a_right_one():
    for n, k in ((1, 1), (4, 2), (5, 3), (6, 6)):
        for c in range(n + 1):
            chosen = list(itertools.combinations(range(n), k))
            assert pass_at_k(n, c, k) == pytest.approx(
                sum(min(choice) < c for choice in chosen) / len(chosen)
            )
    right, wrong = "<answer>1</answer>", "<answer>2</answer>"
    one = record_of(COUNT, right, more_samples=[wrong, wrong, "1"])  # leniently two
    scores = score([one, record_of(COUNT, wrong, more_samples=[wrong] * 3)])
    assert [scores[f"pass@{k}"] for k in (1, 2, 4)] == [1 / 8, 1 / 4, 1 / 2]
    assert scores["pass@2_lenient"] == pytest.approx(5 / 12)
    assert scores["accuracy"] == 1 / 2  # of the first samples


def test_the_papers_totals_in_the_readme_are_the_micro_averages_of_its_tasks():
    sizes = (788, 650, 600, 600)  # Count, Relation, Depth, Distance
    rows = re.findall(r"^\| (?:Qwen2-VL-2B|\+).*(?:\| *[\d.]+.*){5}\|$", README, re.MULTILINE)
    assert len(rows) == 4
    for row in rows:
        *tasks, total = (float(re.match(r"[\d.]+", cell)[0]) for cell in row.split(" | ")[1:])
        micro = sum(map(operator.mul, tasks, sizes)) / sum(sizes)
        assert micro == pytest.approx(total, abs=0.02), row


# --- whole evaluations ---------------------------------------------------------------------------

TASKS = (("2D", "Count", "ADE20K"), ("2D", "Relation", "COCO"))
TASKS += (("3D", "Depth", "Omni3D"), ("3D", "Distance", "Omni3D"))
QUESTIONS = 36


def png(number: int) -> bytes:
    data = io.BytesIO()
    random_images(1, number)[0].save(data, "PNG")
    return data.getvalue()


def write_cvbench(folder: Path) -> list[dict]:
    """test_2d.parquet and test_3d.parquet in the published layout."""
    rng, records = random.Random(0), []
    for number in range(QUESTIONS):
        kind, task, source = TASKS[number * len(TASKS) // QUESTIONS]
        options = ["3", "2", "1", "0"] if task == "Count" else ["red square", "circle"]
        question = "Which is it" + " so large" * rng.randint(0, 9) + "?"
        listed = "\n".join(f"({'ABCD'[i]}) {option}" for i, option in enumerate(options))
        record = dict(idx=number, type=kind, task=task, source=source, choices=options)
        record |= dict(question=question, answer=f"({'ABCD'[number % len(options)]})")
        record |= dict(prompt=f"{question} Select from the following choices.\n{listed}")
        records.append(record | {"image": {"bytes": png(number), "path": f"{number}.png"}})
    folder.mkdir()
    for kind in ("2d", "3d"):
        table = pa.Table.from_pylist([r for r in records if r["type"].lower() == kind])
        pq.write_table(table, folder / f"test_{kind}.parquet")
    return records


def keep_in(cache: Path, stage) -> None:
    """Converted files go to the test's own folder."""
    import datasets.config

    datasets.config.HF_DATASETS_CACHE = str(cache)


class World:
    """A folder with a checkpoint, a CV-Bench, and the evaluations of both."""

    def __init__(self, folder: Path):
        self.folder, self.data, self.model = folder, folder / "data", folder / "model"
        self.published = write_cvbench(self.data)
        save_policy(*tiny_model("qwen2_vl"), self.model)

    def options(self, *more) -> list[str]:
        given = ["--model", self.model, "--max_completion_length", 32]
        if "--dataset" not in more:
            given += ["--benchmark", "cvbench", "--data_path", self.data]
        return [str(word) for word in (*given, *more)]

    def read(self, name: str) -> tuple[dict, list[dict]]:
        """The scores and the responses."""
        lines = (self.folder / name / "responses.jsonl").read_text().splitlines()
        scores = (self.folder / name / "scores.json").read_text()
        return json.loads(scores), list(map(json.loads, lines))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("eval"))


@pytest.fixture
def evaluate(world, monkeypatch, capsys):
    """evaluate(name, option, value, …) -> (exit code, printed, error)."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(world.folder / "cache"))

    def run(name: str, *more):
        words = world.options("--output_dir", world.folder / name, *more)
        monkeypatch.setattr(sys, "argv", ["eval_cvbench.py", *words])
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
            core.processes.launch(eval_cvbench.main)
        return getattr(stop.value, "code", "interrupted"), *capsys.readouterr()

    return run


@pytest.fixture
def reference(world, evaluate):
    """The scores and responses of one process with batches of 16."""
    if not (world.folder / "reference").exists():
        assert evaluate("reference", "--batch_size", 16)[0] == 0
    return world.read("reference")


def test_cv_bench_as_published_is_evaluated_end_to_end(world, reference):
    scores, lines = reference
    assert len(lines) == scores["n"] == QUESTIONS
    for place, (line, row) in enumerate(zip(lines, world.published, strict=True)):
        assert all(line[name] == row[name] for name in ("type", "task", "source", "question"))
        assert line["options"] == row["choices"]  # the prompt letters them: not shuffled
        assert line["answer"] == row["choices"]["ABCD".index(row["answer"][1])]
        assert line["place"] == place and line["id"]
        assert line["response"].startswith("<think>")  # the prompt's end is part of the format
        assert line == line | judge(line, line["response"])
    assert len({line["response"] for line in lines}) > QUESTIONS // 2  # they do differ
    assert json.loads(json.dumps(score(lines))) == scores and scores["official"] is not None
    assert all(scores["tasks"][task]["n"] == QUESTIONS // 4 for _, task, _ in TASKS)


def test_killed_half_way_and_started_again_it_gives_the_same_files(world, evaluate, reference):
    folder = world.folder / "killed"
    path, words = folder / "responses.jsonl", world.options("--batch_size", 1)
    patch = functools.partial(keep_in, world.folder / "cache")
    process = Stage(*words, output_dir=folder, stage="eval_cvbench", patch=patch)
    process.wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") > 9, 300)
    process.kill()
    process.process.join()
    assert 9 < path.read_bytes().count(b"\n") < QUESTIONS
    with open(path, "a") as file:
        file.write('{"id": "cvbench-0", "type": "2D", "respon')  # cut short in writing
    assert evaluate("killed", "--batch_size", 1, "--resume")[0] == 0
    assert world.read("killed") == reference


def test_two_processes_give_the_same_files_as_one(world, reference):
    words = world.options("--batch_size", 5, "--output_dir", world.folder / "two")
    cache = str(world.folder / "cache")
    launch(*words, processes=2, script="eval_cvbench.py", env={"HF_DATASETS_CACHE": cache})
    assert world.read("two") == reference


# --- with answers that replace the model ---------------------------------------------------------


def answers_from(monkeypatch, answer) -> None:
    """Let `answer(place)` replace the model."""
    monkeypatch.setattr(eval_cvbench, "sample", lambda *_, prompts, **more: (prompts, None, None))
    monkeypatch.setattr(Processor, "decode", lambda _, places, mask: [answer(p) for p in places])


def write_own(folder: Path, images: int) -> Path:
    """A file of 12 rows with equal ids, questions and answers, but other images."""
    row = {"id": "same", "question": "Which?", "options": ["red", "blue"], "answer": "blue"}
    folder.mkdir(exist_ok=True)
    for number in range(images):
        (folder / f"{number}.png").write_bytes(png(number))
    rows = [row | {"image": f"{number}.png"} for number in range(12)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "own.jsonl"


def test_rows_of_a_file_of_ones_own_with_equal_ids_are_evaluated_separately(
    world, evaluate, monkeypatch, tmp_path
):
    own = write_own(tmp_path, images=12)
    answers_from(monkeypatch, lambda p: f"<answer>{'blue' if p in (0, 5, 7) else 'red'}</answer>")
    for name, size in (("own", 5), ("own", 3), ("own1", 1)):  # the second finds all answered
        assert evaluate(name, "--dataset", own, "--batch_size", size)[0] == 0
        scores, lines = world.read(name)
        assert (scores["n"], scores["accuracy"]) == (12, 3 / 12)
        assert [line["place"] for line in lines if line["correct"]] == [0, 5, 7]
    own.write_text(own.read_text().replace("Which?", "What?"))
    assert "made with other questions; --overwrite" in evaluate("own", "--dataset", own)[2]
    assert world.read("own") == (scores, lines)


def test_unusable_questions_are_counted_and_named_and_all_unusable_is_an_error(
    world, evaluate, monkeypatch, tmp_path
):
    answers_from(monkeypatch, lambda place: "blue")
    code, out, _ = evaluate("partly", "--dataset", write_own(tmp_path, images=10))
    scores, _ = world.read("partly")
    assert (code, scores["n"], scores["official"]) == (0, 10, None)
    assert [line.split(":")[0] for line in scores["skipped"]] == ["row 11, same", "row 12, same"]
    assert all(reason in out for reason in scores["skipped"])
    code, _, error = evaluate("none", "--dataset", write_own(tmp_path / "none", images=0))
    assert code == 1 and "no usable question: row 1, same" in error and error.count("\n") == 1


def test_responses_of_other_settings_or_other_weights_are_refused(world, evaluate, tmp_path):
    save_policy(*tiny_model("qwen2_vl"), tmp_path / "model")
    given = ("--model", tmp_path / "model", "--limit")
    assert evaluate("mine", *given, 2)[0] == 0
    kept = world.read("mine")
    with pytest.MonkeyPatch.context() as patch:  # before anything is downloaded or loaded
        patch.setattr(eval_cvbench, "load_rows", lambda *_, **more: pytest.fail("loaded"))
        patch.setattr(eval_cvbench, "check_sources", lambda *_: pytest.fail("loaded"))
        assert "other limit; --overwrite deletes it" in evaluate("mine", *given, 3)[2]
    save_policy(*tiny_model("qwen2_vl", seed=1), tmp_path / "model")
    code, _, error = evaluate("mine", *given, 2)
    assert code == 1 and "other weights;" in error and error.count("\n") == 1
    assert world.read("mine") == kept
    assert evaluate("mine", *given, 3, "--overwrite")[0] == 0
    assert world.read("mine")[0]["n"] == 3


def test_samples_differ_and_do_not_depend_on_the_batches(world, evaluate):
    given = ("--samples", 4, "--temperature", 1, "--limit", 6)
    assert evaluate("s1", *given, "--batch_size", 1)[0] == 0
    assert evaluate("s6", *given, "--batch_size", 6)[0] == 0
    assert world.read("s1") == world.read("s6")
    for line in world.read("s1")[1]:
        assert len(line["more_samples"]) == 3 and {line["response"]} != {*line["more_samples"]}


def test_rescoring_needs_options_answer_and_response_only(world, evaluate, reference):
    wrong = {"extracted": "desk", "correct": True, "correct_lenient": True}
    path = world.folder / "rescored" / "responses.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(json.dumps(line | wrong) for line in reference[1]))
    assert evaluate("unused", "--rescore", path)[0] == 0
    assert world.read("rescored") == reference
    bare = [json.dumps(row | {"response": row["answer"]}) for row in (COUNT, ABOVE, ANGLE)]
    path.write_text("\n".join(bare) + "\n")
    assert evaluate("unused", "--rescore", path)[0] == 0
    scores, _ = world.read("rescored")
    assert (scores["n"], scores["unparsed"], scores["official"]) == (3, 3, None)
    assert (scores["accuracy"], scores["accuracy_lenient"]) == (0, 1)


def test_rescoring_reads_numbers_as_text_and_a_missing_response_as_wrong(evaluate, tmp_path):
    path = tmp_path / "responses.jsonl"
    given = [
        {"options": [3, 4], "answer": 3, "response": "<answer>3</answer>"},
        {"options": None, "answer": 3, "response": "<answer>3</answer>"},
        {"options": [], "answer": "3", "response": None},
        {"options": [], "answer": "3", "response": "hundred " * 300},  # a model that repeats itself
    ]
    path.write_text("".join(json.dumps(line) + "\n\n" for line in given))
    assert evaluate("unused", "--rescore", path)[0] == 0
    assert json.loads(path.with_name("scores.json").read_text())["accuracy"] == 0.5


def test_a_line_without_a_response_is_named_and_a_mistake_in_the_code_keeps_its_traceback(
    evaluate, monkeypatch, tmp_path
):
    path = tmp_path / "responses.jsonl"
    path.write_text(json.dumps({"options": [], "answer": "3"}))
    code, _, error = evaluate("mistake", "--rescore", path)
    assert code == 1 and f"{path}: KeyError('response')" in error and error.count("\n") == 1
    path.write_text("")
    assert "it holds no responses" in evaluate("mistake", "--rescore", path)[2]
    path.write_text(json.dumps({"options": [], "answer": "3", "response": "3"}))
    monkeypatch.setattr(eval_cvbench, "is_correct", lambda *_: {}["typo"])
    with pytest.raises(KeyError, match="typo"):
        evaluate("mistake", "--rescore", path)


def test_comparing_prints_mean_and_spread_over_seeds(reference, evaluate, tmp_path):
    shares = {"road-0": 0.5, "road-1": 0.6, "base": 0.1, "checkpoint-1": 0.1, "checkpoint-2": 0.2}
    for name, share in shares.items():
        (tmp_path / name).mkdir()
        scores = reference[0] | {"accuracy_lenient": share}
        (tmp_path / name / "scores.json").write_text(json.dumps(scores))
    paths = [tmp_path / "base", tmp_path / "road-0" / "scores.json", f"{tmp_path}/road-1/"]
    paths += [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]  # no seeds
    code, out, _ = evaluate("unused", "--compare", *paths)
    table = dict(line.split("  ", 1) for line in out.splitlines())
    names = ("base", "road-0", "road-1", "checkpoint-1", "checkpoint-2", "road-*")
    assert code == 0 and list(table) == [f"{tmp_path}/{name}" for name in names]
    assert "all 50.0 " in table[f"{tmp_path}/road-0"]
    assert "all 55.0 ± 7.1 " in table[f"{tmp_path}/road-*"]  # 10 / sqrt(2)


def test_the_prompt_is_the_one_that_the_model_was_trained_with(world, evaluate, tmp_path):
    save_policy(*tiny_model("qwen2_vl"), tmp_path)
    for run, style in (({}, "base"), ({"style_used": "base-direct"}, "base-direct")):
        (tmp_path / "run_config.json").write_text(json.dumps(run))
        assert evaluate(style, "--limit", 1, "--model", tmp_path)[0] == 0
        response = world.read(style)[1][0]["response"]  # with what the prompt ends in
        assert response.startswith("<think>") == (style == "base")


def test_a_toy_model_is_asked_toy_questions_and_any_other_model_cv_bench():
    toy = parse_options(EvalOptions, argv=[])
    assert (toy.dataset, toy.max_completion_length) == ("toy", 96)
    other = parse_options(EvalOptions, argv=["--model", "outputs/grpo-sat/final"])
    assert (other.dataset, other.max_completion_length) == ("cvbench", 1024)
    assert other.output_dir == "outputs/eval-cvbench-grpo-sat-final"


@pytest.mark.parametrize(
    "words",
    "--limit 0, --limit -1, --batch_size 0, --samples 0, --temperature -1, --temperature nan, "
    "--temperature inf, --max_completion_length 0, --max_pixels 0, --seed -1".split(", "),
)
def test_every_numeric_flag_refuses_what_is_outside_its_range(evaluate, words):
    code, _, error = evaluate("mistake", *words.split())
    assert code == 2 and f"argument {words.split()[0]}: must be" in error


@pytest.mark.parametrize(
    "options, code, said",
    [
        (("--dataset", "mmlu"), 1, "mmlu"),
        (("--batch_size", 0), 2, "at least 1"),
        (("--samples", 8), 2, "--temperature"),
        (("--model", ROOT / "tests"), 1, "tests"),  # a folder without a model
        (("--rescore", "missing.jsonl"), 1, "missing.jsonl"),
        (("--compare", ROOT), 1, str(ROOT)),
    ],
)
def test_a_mistake_is_answered_in_one_line(evaluate, options, code, said):
    got, _, error = evaluate("mistake", *options)
    assert got == code and said in error and error.count("\n") == 1
