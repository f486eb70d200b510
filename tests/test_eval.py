"""Evaluation: scores by hand, and whole evaluations as a user would start, kill and repeat them."""

import functools
import io
import itertools
import json
import random
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from launch import ROOT, Stage, launch
from tiny import random_images, tiny_model

import eval_cvbench
from eval_cvbench import judge, pass_at_k, score, wilson
from model import save_policy
from rewards import accuracy_reward, is_correct, lenient_answer
from toy import ToyRows

# --- scoring -------------------------------------------------------------------------------------

COUNT = {"options": ["3", "2", "1", "0"], "answer": "1"}  # (C)
ABOVE = {"options": ["above", "below"], "answer": "below"}  # (B)
DESK = {"options": ["chair", "desk"], "answer": "desk"}  # (B)
LAMPS = {"options": ["table lamp", "lamp", "floor lamp"], "answer": "lamp"}  # (B)
BLINK = {"options": ["A is closer", "B is closer"], "answer": "A is closer"}
VSR = {"options": ["True", "False"], "answer": "False"}
YES = {"options": ["yes", "no"], "answer": "no"}
ANGLE = {"options": [], "answer": "35°"}
LOOP = "the desk is behind the chair, so " * 1500  # 10 000 words

# row, response, right strictly, right leniently
# fmt: off
TABLE = [
    # a letter, a text, both, in the tag
    (COUNT, "One organ.</think><answer>(C)</answer>", 1, 1),
    (COUNT, "One organ.</think><answer>C</answer>", 1, 1),
    (COUNT, "</think>\n<answer>\n1\n</answer>\n", 1, 1),
    (COUNT, "</think><answer>(C) 1</answer>", 1, 1),
    (COUNT, "</think><answer>C. 1 organ</answer>", 1, 1),
    (COUNT, "</think><answer>one</answer>", 1, 1),
    (COUNT, "</think><answer>There is 1 organ.</answer>", 1, 1),
    (COUNT, "</think><answer>(B)</answer>", 0, 0),
    (COUNT, "</think><answer>(C) 2</answer>", 0, 0),
    (COUNT, "</think><answer>10</answer>", 0, 0),
    (COUNT, "</think><answer>-1</answer>", 0, 0),
    (COUNT, "</think><answer>none</answer>", 0, 0),
    (DESK, "It is near.</think><answer>desk</answer>", 1, 1),
    (DESK, "It is near.</think><answer>The desk is closer.</answer>", 1, 1),
    (DESK, "It is near.</think><answer>(B) desk</answer>", 1, 1),
    (DESK, "It is near.</think><answer>a desk</answer>", 1, 1),
    (DESK, "It is near.</think><answer>a</answer>", 0, 0),
    (DESK, "It is near.</think><answer>desks</answer>", 0, 0),
    # wrong case
    (ABOVE, "</think><answer>BELOW</answer>", 1, 1),
    (ABOVE, "</think><answer>Below.</answer>", 1, 1),
    (ABOVE, "</think><answer>(b)</answer>", 1, 1),
    (ABOVE, "</think><ANSWER>below</ANSWER>", 0, 1),
    # boxed, bold, quoted
    (ABOVE, r"</think><answer>\boxed{below}</answer>", 1, 1),
    (ABOVE, r"So it is $\boxed{\text{below}}$.", 0, 1),
    (ABOVE, "</think><answer>**below**</answer>", 1, 1),
    (ABOVE, "**Answer:** `below`", 0, 1),
    (ANGLE, r"</think><answer>\boxed{35^\circ}</answer>", 1, 1),
    (ANGLE, "</think><answer>53</answer>", 0, 0),
    (ANGLE, "The angle is 35 degrees.", 0, 1),
    (ANGLE, "70 / 2 = 35", 0, 0),
    # two answers
    (ABOVE, "</think><answer>above</answer><answer>below</answer>", 1, 1),
    (ABOVE, "</think><answer>below</answer> Wait. <answer>above</answer>", 0, 0),
    (ABOVE, "</think><answer>above or below</answer>", 0, 0),
    (ABOVE, "Above? No: below.", 0, 0),
    (VSR, "</think><answer>True. No, False</answer>", 0, 0),
    # the list of options repeated
    (COUNT, "</think><answer>3, 2, 1 or 0</answer>", 0, 0),
    (COUNT, "Select from the following choices. (A) 3 (B) 2 (C) 1 (D) 0", 0, 0),
    (ABOVE, "(A) above\n(B) below", 0, 0),
    (ABOVE, "(A) above (B) below</think><answer>(B) below</answer>", 1, 1),
    # an option within another one
    (LAMPS, "</think><answer>lamp</answer>", 1, 1),
    (LAMPS, "</think><answer>table lamp</answer>", 0, 0),
    (LAMPS, "The floor lamp.", 0, 0),
    (LAMPS, "The lamp.", 0, 1),
    # no tag: exactly one option is stated, or none, or several
    (DESK, "desk", 0, 1),
    (DESK, "The desk is closer to the camera.", 0, 1),
    (DESK, "chair", 0, 0),
    (DESK, "(B)", 0, 1),
    (DESK, "The chair is behind the desk.", 0, 0),
    (DESK, "<think>chair or desk?</think> desk", 0, 1),
    (DESK, "<think>The desk, I am sure", 0, 1),
    (DESK, "I see a dog and a cat.", 0, 0),
    (DESK, "It is not the desk.", 0, 0),
    (VSR, "The statement is false.", 0, 1),
    (VSR, "The statement is not false.", 0, 0),
    (BLINK, "Point A is closer.", 0, 1),
    (BLINK, "A is closer than B.", 0, 0),
    (YES, "No, it is not.", 0, 1),
    # the tag broken
    (ABOVE, "so</think><answer>below", 0, 1),
    (ABOVE, "so</think>below</answer>", 0, 1),
    (ABOVE, "so</think><answer>above</answer", 0, 0),
    (ABOVE, "so</think><answer></answer> below", 0, 0),
    # empty, or only markup
    (ABOVE, "", 0, 0),
    (ABOVE, "\n", 0, 0),
    (ABOVE, "</think><answer></answer>", 0, 0),
    (ABOVE, "<html><body><p></p></body></html>", 0, 0),
    # other languages' punctuation and signs
    (ABOVE, "</think><answer>「below」。</answer>", 1, 1),
    (ABOVE, "</think><answer>（Ｂ）</answer>", 1, 1),
    (ABOVE, "答案是：below。", 0, 1),
    (ABOVE, "</think><answer>下面</answer>", 0, 0),
    (COUNT, "</think><answer>１</answer>", 1, 1),
    # 10 000 tokens of repetition
    (DESK, LOOP, 0, 0),
    (DESK, f"{LOOP}</think><answer>desk</answer>", 1, 1),
    (DESK, f"<answer>{'desk ' * 10_000}</answer>", 0, 0),
    (COUNT, "1" * 10_000, 0, 0),
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
        *some(3, 0, 1, type="2D", task="Count", source="ADE20K"),  # 3/4, leniently 3/4
        *some(1, 1, 0, type="2D", task="Relation", source="COCO"),  # 1/2, 2/2
        *some(1, 1, 1, type="3D", task="Depth", source="Omni3D"),  # Omni3D: 2/5, 3/5
        *some(1, 0, 1, type="3D", task="Distance", source="Omni3D"),
    ]
    scores = score(random.Random(0).sample(records, len(records)))
    assert scores["n"] == 11
    assert scores["accuracy"] == 6 / 11 and scores["accuracy_lenient"] == 8 / 11
    assert scores["official"] == pytest.approx(((3 / 4 + 1 / 2) / 2 + 2 / 5) / 2)
    assert scores["official_lenient"] == pytest.approx(((3 / 4 + 2 / 2) / 2 + 3 / 5) / 2)
    assert scores["unparsed"] == 2
    assert scores["reflection"] == 3 / 11
    assert scores["completion_length"] == (8 * 1 + 3 * 3) / 11  # words
    assert set(scores["tasks"]) == {"Count", "Relation", "Depth", "Distance"}
    assert scores["tasks"]["Depth"] == {"n": 3, "accuracy": 1 / 3, "accuracy_lenient": 2 / 3}
    assert set(scores["sources"]) == {"ADE20K", "COCO", "Omni3D"}
    assert scores["sources"]["Omni3D"] == {"n": 5, "accuracy": 2 / 5, "accuracy_lenient": 3 / 5}


def test_there_is_no_official_score_without_all_three_sources_of_cv_bench():
    records = [record_of(DESK, "desk", task="Count", source=s) for s in ("ADE20K", "COCO")]
    assert score(records)["official"] is score(records)["official_lenient"] is None


def test_a_perfect_responder_scores_100_percent_and_a_random_one_chance():
    rows = [ToyRows("eval", 3)[i] for i in range(600)]
    rng = random.Random(0)

    def spelled(row: dict, option: str) -> str:
        letter = "ABCD"[row["options"].index(option)]
        return rng.choice((option, f"({letter})", f"({letter}) {option}", f"It is {option}."))

    right = [record_of(r, f"<answer>{spelled(r, r['answer'])}</answer>") for r in rows]
    assert score(right)["accuracy"] == score(right)["accuracy_lenient"] == 1
    guesses = [record_of(r, spelled(r, rng.choice(r["options"]))) for r in rows]
    chance = sum(1 / len(row["options"]) for row in rows) / len(rows)
    low, high = wilson(score(guesses)["accuracy_lenient"], len(rows), z=3.5)
    assert low < chance < high
    assert score(guesses)["accuracy"] == 0 and score(guesses)["unparsed"] == 600


def test_the_interval_is_wilsons():
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = wilson(0.5947, 2638)
    assert low < 0.5947 < high and high - low == pytest.approx(0.0375, abs=2e-4)


def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_hold_a_right_one():
    for n, k in ((1, 1), (4, 2), (5, 3), (6, 6)):
        for c in range(n + 1):
            chosen = list(itertools.combinations(range(n), k))
            share = sum(min(choice) < c for choice in chosen) / len(chosen)
            assert pass_at_k(n, c, k) == pytest.approx(share)


def test_the_majority_counts_spellings_of_an_answer_together():
    tagged = [f"<answer>{text}</answer>" for text in ("(A)", "3", "(C)", "one", "1 organ", "0")]
    bare = ["1", "The answer is (A).", "three", "1 or 2", "", "?"]
    records = [
        record_of(COUNT, samples[0], task="Count", source="x", samples=samples)
        for samples in (tagged, bare)
    ]
    scores = score(records)
    # tagged: 3 of 6 right, the most frequent; leniently bare has 1 of 6, and 3 is more frequent
    assert scores["maj@k"] == {"6": 0.5} and scores["maj@k_lenient"] == {"6": 0.5}
    assert list(scores["pass@k"]) == ["1", "2", "4", "6"]
    assert scores["pass@k"]["1"] == pytest.approx((3 / 6 + 0) / 2)
    assert scores["pass@k_lenient"]["1"] == pytest.approx((3 / 6 + 1 / 6) / 2)
    assert scores["pass@k_lenient"]["6"] == 1


# --- whole evaluations ---------------------------------------------------------------------------

TASKS = (("2D", "Count", "ADE20K"), ("2D", "Relation", "COCO"), ("3D", "Depth", "Omni3D"))
TASKS += (("3D", "Distance", "Omni3D"),)
PUBLISHED = pa.schema(  # all nullable, as on the hub
    {
        "idx": pa.int64(),
        "type": pa.string(),
        "task": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "question": pa.string(),
        "choices": pa.list_(pa.string()),
        "answer": pa.string(),
        "prompt": pa.string(),
        "filename": pa.string(),
        "source": pa.string(),
        "source_dataset": pa.string(),
        "source_filename": pa.string(),
        "target_class": pa.string(),
        "target_size": pa.int64(),
        "bbox": pa.list_(pa.list_(pa.float64())),
    }.items()
)
QUESTIONS = 36


def write_cvbench(folder: Path) -> None:
    """test_2d.parquet and test_3d.parquet in the published layout."""
    rng, records = random.Random(0), []
    for number in range(QUESTIONS):
        kind, task, source = TASKS[number * len(TASKS) // QUESTIONS]
        options = ["3", "2", "1", "0"] if task == "Count" else ["red square", "circle"]
        question = "Which is it" + " so large" * rng.randint(0, 9) + "?"
        listed = "\n".join(f"({'ABCD'[i]}) {option}" for i, option in enumerate(options))
        png = io.BytesIO()
        random_images(1, number)[0].save(png, "PNG")
        record = dict(idx=number, type=kind, task=task, source=source, choices=options)
        record |= dict(question=question, answer=f"({'ABCD'[rng.randrange(len(options))]})")
        record |= dict(prompt=f"{question} Select from the following choices.\n{listed}")
        record |= dict(image={"bytes": png.getvalue(), "path": f"{number}.png"})
        records.append(record | ({"target_class": "dog"} if kind == "2D" else {}))
    for kind in ("2D", "3D"):
        chosen = [record for record in records if record["type"] == kind]
        table = pa.Table.from_pylist(chosen, PUBLISHED)
        pq.write_table(table, folder / f"test_{kind.lower()}.parquet")


def keep_in(cache: str, stage) -> None:
    """Converted files go to a folder of the test's own."""
    import datasets.config

    datasets.config.HF_DATASETS_CACHE = cache


class World:
    """A checkpoint, a CV-Bench, and the command line in a process of its own."""

    def __init__(self, folder: Path):
        self.folder, self.data, self.model = folder, folder / "data", folder / "model"
        self.data.mkdir()
        write_cvbench(self.data)
        save_policy(*tiny_model("qwen2_vl"), self.model)
        self.cache = str(folder / "cache")

    def options(self, *more) -> list[str]:
        given = dict(model=self.model, benchmark="cvbench", data_path=self.data)
        given |= dict(max_completion_length=32)
        return [str(w) for k, v in given.items() for w in (f"--{k}", v)] + list(map(str, more))

    def start(self, name: str, *more) -> Stage:
        patch = functools.partial(keep_in, self.cache)
        words, folder = self.options(*more), self.folder / name
        return Stage(*words, output_dir=folder, stage="eval_cvbench", patch=patch)

    def run(self, name: str, *more) -> str:
        code, output = self.start(name, *more).wait()
        assert code == 0, output
        return output

    def read(self, name: str) -> tuple[bytes, bytes]:
        folder = self.folder / name
        return (folder / "scores.json").read_bytes(), (folder / "responses.jsonl").read_bytes()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def reference(world):
    """One process, batches of 16: what it printed."""
    return world.run("reference", "--batch_size", 16)


def test_cv_bench_as_published_is_evaluated_end_to_end(world, reference):
    scores, responses = world.read("reference")
    scores, lines = json.loads(scores), list(map(json.loads, responses.splitlines()))
    published = [
        row
        for kind in ("2d", "3d")
        for row in pq.read_table(world.data / f"test_{kind}.parquet").to_pylist()
    ]
    assert len(lines) == scores["n"] == QUESTIONS
    for line, row in zip(lines, published, strict=True):
        assert list(line) == [
            *("id", "type", "task", "source", "question", "options", "answer"),
            *("response", "extracted", "correct", "correct_lenient"),
        ]
        assert [line[k] for k in ("type", "task", "source", "question")] == [
            row[k] for k in ("type", "task", "source", "question")
        ]
        assert line["options"] == row["choices"]  # the prompt letters them: not shuffled
        assert line["answer"] == row["choices"]["ABCD".index(row["answer"][1])]
    assert len({line["response"] for line in lines}) > QUESTIONS // 2  # they do differ
    strict = [accuracy_reward(line["response"], line) for line in lines]
    stated = [lenient_answer(line["response"], line) for line in lines]
    lenient = [a is not None and is_correct(a, r) for a, r in zip(stated, lines, strict=True)]
    assert scores["accuracy"] == sum(strict) / QUESTIONS
    assert scores["accuracy_lenient"] == sum(lenient) / QUESTIONS
    assert {name: part["n"] for name, part in scores["tasks"].items()} == {
        task: QUESTIONS // 4 for _, task, _ in TASKS
    }
    assert scores["sources"]["Omni3D"]["n"] == QUESTIONS // 2 and scores["official"] is not None
    for text in (*scores["tasks"], *scores["sources"], "official", "95 % interval", "59.5"):
        assert text in reference


def test_killed_half_way_and_started_again_it_gives_the_same_files(world, reference):
    process = world.start("killed", "--batch_size", 1)
    path = world.folder / "killed" / "responses.jsonl"
    process.wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") > 9, 300)
    process.kill()
    process.wait()
    kept = path.read_bytes().count(b"\n")
    assert 9 < kept < QUESTIONS and not (path.parent / "scores.json").exists()
    with open(path, "a") as file:
        file.write('{"id": "cvbench-0", "type": "2D", "respon')  # cut short in writing
    out = world.run("killed", "--batch_size", 1)
    assert f"{kept} of {QUESTIONS} questions are answered already" in out
    assert world.read("killed") == world.read("reference")


def test_two_processes_give_the_same_files_as_one(world, reference):
    words = (*world.options("--batch_size", 5), "--output_dir", world.folder / "two")
    out = launch(*words, processes=2, script="eval_cvbench.py", HF_DATASETS_CACHE=world.cache)
    assert "2 process(es)" in out
    assert world.read("two") == world.read("reference")


# --- in this process -----------------------------------------------------------------------------


@pytest.fixture
def evaluate(world, monkeypatch, capsys):
    """evaluate(name, option, value, …) -> (exit code, printed, error)."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", world.cache)

    def run(name: str, *more):
        words = world.options("--output_dir", world.folder / name, *more)
        monkeypatch.setattr(sys, "argv", ["eval_cvbench.py", *words])
        try:
            code = eval_cvbench.main() or 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_rescoring_gives_the_same_scores_from_options_answer_and_response(
    world, reference, evaluate
):
    scores, responses = world.read("reference")
    folder = world.folder / "rescored"
    folder.mkdir()
    lines = list(map(json.loads, responses.splitlines()))
    for line in lines:  # what is recomputed may be wrong before
        line |= {"extracted": "desk", "correct": True, "correct_lenient": True}
    text = "\n".join(map(json.dumps, lines))  # and no newline at the end
    (folder / "responses.jsonl").write_text(text)
    assert evaluate("unused", "--rescore", folder / "responses.jsonl")[0] == 0
    assert world.read("rescored") == (scores, responses)


def test_options_answer_and_response_alone_are_enough_to_rescore(evaluate, tmp_path):
    path = tmp_path / "responses.jsonl"
    lines = [json.dumps(row | {"response": row["answer"]}) for row in (COUNT, ABOVE, ANGLE)]
    path.write_bytes("\ufeff".encode() + "\r\n\r\n".join([*lines, ""]).encode())
    assert evaluate("unused", "--rescore", path)[0] == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["n"] == scores["unparsed"] == 3 and scores["official"] is None
    assert (scores["accuracy"], scores["accuracy_lenient"]) == (0, 1)


@pytest.mark.parametrize(
    "line",
    [
        *(b'{"options": [], "answer": "3"}', b'{"options": [], "answer": 3, "response": "3"}'),
        *(b"[1]", b"\xff\xfe\x00", b'{"answer": "3", "response": "3", "samples": [1, 2]}'),
    ],
)
def test_a_line_that_is_no_response_is_named(evaluate, tmp_path, line):
    path = tmp_path / "responses.jsonl"
    path.write_bytes(b'{"options": [], "answer": "3", "response": "3"}\n' + line + b"\n")
    code, _, error = evaluate("unused", "--rescore", path)
    assert code == 1 and f"{path}, line 2: no response" in error and error.count("\n") == 1
    assert not (tmp_path / "scores.json").exists()


def answers_from(monkeypatch, processor, answer):
    """Let `answer(question's number)` stand in for the model; returns the numbers as asked."""
    asked = []

    def sample(model, inputs, k, C, temperature, *, seed, prompts):
        texts = [answer(number) for number in prompts for _ in range(k)]
        asked.extend(prompts)
        ids = [processor.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        masks = [torch.ones(len(i), dtype=torch.long) for i in ids]
        pad = torch.nn.utils.rnn.pad_sequence
        return pad([torch.tensor(i) for i in ids], True), pad(masks, True)

    monkeypatch.setattr(eval_cvbench, "sample", sample)
    return asked


def test_a_model_that_is_always_right_scores_1_and_is_asked_each_question_once_though_interrupted(
    world, evaluate, monkeypatch
):
    _, processor = tiny_model("qwen2_vl")
    rows = eval_cvbench.load_rows("cvbench", "eval", data_path=str(world.data))
    asked = []

    def answer(number: int) -> str:
        if len(asked) == 10:
            raise KeyboardInterrupt
        return f"so</think><answer>{rows[number]['answer']}</answer>"

    asked = answers_from(monkeypatch, processor, answer)
    code, _, error = evaluate("right", "--batch_size", 5)
    assert code == 130 and error.endswith("\nstopped; the same command goes on from here\n")
    first, asked = (
        asked,
        answers_from(monkeypatch, processor, lambda n: f"<answer>{rows[n]['answer']}</answer>"),
    )
    code, out, _ = evaluate("right", "--batch_size", 7)
    assert code == 0 and "10 of 36 questions are answered already" in out
    assert sorted(first + asked) == list(range(QUESTIONS))
    scores = json.loads(world.read("right")[0])
    assert scores["accuracy"] == scores["official"] == 1 and scores["unparsed"] == 0
    assert all(part["accuracy"] == 1 for part in scores["tasks"].values())


def test_samples_do_not_depend_on_the_batches_and_are_scored_and_rescored(world, evaluate):
    given = ("--samples", 4, "--temperature", 1, "--limit", 6)
    assert evaluate("s1", *given, "--batch_size", 1)[0] == 0
    assert evaluate("s6", *given, "--batch_size", 6)[0] == 0
    assert world.read("s1") == world.read("s6")
    scores, responses = world.read("s1")
    for line in map(json.loads, responses.splitlines()):
        assert len(set(line["samples"])) > 1 and line["samples"][0] == line["response"]
    assert list(json.loads(scores)["pass@k"]) == ["1", "2", "4"]
    assert evaluate("unused", "--rescore", world.folder / "s1" / "responses.jsonl")[0] == 0
    assert world.read("s1") == (scores, responses)


def test_responses_of_other_settings_or_other_weights_are_refused(world, evaluate, tmp_path):
    assert evaluate("mine", "--limit", 2)[0] == 0
    kept = world.read("mine")
    code, _, error = evaluate("mine", "--limit", 3)
    assert code == 1 and "other settings (limit)" in error and "--output_dir" in error
    model = world.folder / "retrained"
    save_policy(*tiny_model("qwen2_vl"), model)
    assert evaluate("again", "--limit", 2, "--model", model)[0] == 0
    assert world.read("again") == kept
    shutil.rmtree(model)
    save_policy(*tiny_model("qwen2_vl", seed=1), model)
    code, _, error = evaluate("again", "--limit", 2, "--model", model)
    assert code == 1 and "other settings (weights)" in error and error.count("\n") == 1
    assert world.read("again") == kept


def test_an_unusable_question_is_left_out_and_named(world, evaluate, tmp_path):
    image = random_images(1)[0]
    image.save(tmp_path / "here.png")
    row = {"question": "Which?", "choices": ["a", "b"], "answer": "(A)", "task": "T"}
    rows = [row | {"id": name, "image": f"{name}.png"} for name in ("here", "gone")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, out, _ = evaluate("partly", "--data_path", tmp_path / "test.jsonl")
    assert code == 0 and "1 of 2 questions are unusable" in out and "gone: image 1: " in out
    scores = json.loads(world.read("partly")[0])
    assert scores["n"] == 1 and scores["official"] is None


def test_comparing_prints_a_row_for_each_evaluation_and_the_papers(world, reference, evaluate):
    path, other = world.folder / "reference" / "scores.json", world.folder / "other"
    assert evaluate("unused", "--compare", path, other)[0] == 1  # the other does not exist
    other.mkdir()
    (other / "scores.json").write_bytes(path.read_bytes())
    code, out, _ = evaluate("unused", "--compare", path, other)
    assert code == 0
    lines = [line.split("  ")[0] for line in out.strip().splitlines()]
    assert lines == [
        *("strict / lenient, %", str(path), str(other)),
        *("paper: base", "paper: SFT", "paper: GRPO"),
    ]
    assert "59.5" in out.strip().splitlines()[-1]
    scores = json.loads(path.read_text())
    broken = [{k: v for k, v in scores.items() if k != key} for key in ("n", "tasks", "official")]
    for wrong in (*broken, scores | {"tasks": {"Count": {}}}, scores | {"tasks": 3}, [scores]):
        (other / "scores.json").write_text(json.dumps(wrong))
        code, out, error = evaluate("unused", "--compare", other)
        assert code == 1 and "is not a scores.json" in error and error.count("\n") == 1


def test_the_prompt_is_the_one_that_the_models_run_was_trained_with(world, evaluate, tmp_path):
    save_policy(*tiny_model("qwen2_vl"), tmp_path / "final")
    for run, style in (({}, "base"), ({"style_used": "base-direct"}, "base-direct")):
        (tmp_path / "config.json").write_text(json.dumps({"prompt_style": "auto"} | run))
        assert evaluate(style, "--limit", 1, "--model", tmp_path / "final")[0] == 0
        settings = json.loads((world.folder / style / "eval_config.json").read_text())
        assert settings["prompt_style"] == style


def test_a_toy_model_answers_500_toy_questions_and_any_other_the_whole_of_cv_bench():
    toy = eval_cvbench.parse_config([])
    assert (toy.benchmark, toy.limit, toy.max_completion_length) == ("toy", 500, 96)
    other = eval_cvbench.parse_config(["--model", "outputs/grpo-sat/final"])
    assert (other.benchmark, other.limit, other.max_completion_length) == ("cvbench", None, 1024)
    assert other.output_dir == "outputs/eval-cvbench-grpo-sat-final"


@pytest.mark.parametrize(
    "options, code, said",
    [
        (("--benchmark", "mmlu"), 2, "invalid choice"),
        (("--sampels", 3), 2, "did you mean --samples"),
        (("--batch_size", 0), 2, "at least 1"),
        (("--batch-size", "few"), 2, "invalid int"),
        (("--seed", -1), 2, "at least 0"),
        (("--samples", 8), 2, "--temperature"),
        (("--temperature", -1), 2, "0 or more"),
        (("--model", ROOT / "tests"), 1, "tests"),  # a folder without a model
        (("--data_path", "missing.parquet"), 1, "does not exist"),
        (("--rescore", "missing.jsonl"), 1, "missing.jsonl"),
        (("--rescore", ROOT / "pyproject.toml"), 1, "line 1"),
        (("--compare", ROOT / "pyproject.toml"), 1, "not a scores.json"),
    ],
)
def test_a_mistake_is_answered_in_one_line(evaluate, options, code, said):
    got, _, error = evaluate("mistake", *options)
    assert got == code and said in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", ["another model", "no weights", "torn weights"])
def test_a_folder_that_holds_no_qwen_vl_is_answered_in_one_line(world, evaluate, tmp_path, kind):
    folder = tmp_path / "model"
    shutil.copytree(world.model, folder)
    weights = folder / "model.safetensors"
    if kind == "another model":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    elif kind == "no weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    code, _, error = evaluate("mistake", "--model", folder)
    assert code == 1 and str(folder) in error and error.count("\n") == 1
    assert not (world.folder / "mistake").exists()


def test_a_mistake_ends_the_process_without_a_traceback(world):
    code, output = world.start("mistake", "--rescore", "missing.jsonl").wait()
    assert code == 1 and output.count("\n") == 1
    assert output.startswith("eval_cvbench.py: error: ")
