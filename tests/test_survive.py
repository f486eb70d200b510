"""What a run survives: kills, signals, failed writes, numbers that are not finite, bad rows.

Every run is a process of its own on a tiny random model. Runs are compared without the metrics
that measure time.
"""

import json
import math
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from launch import FLAGS, MANY_ENDS, Stage, metrics, read_lines, run, tiny_checkpoint
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

import core.checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run("--model", model, *FLAGS, output_dir=folder)
    return folder


def start(model: str, folder: Path, *words, **more) -> Stage:
    return Stage("--model", model, *FLAGS, *words, output_dir=folder, **more)


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def assert_equal_runs(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    assert (one / "rollouts.jsonl").read_text() == (other / "rollouts.jsonl").read_text()
    for name in ("final", "best"):
        assert weights(one / name) == weights(other / name)


def assert_fails(stage: Stage) -> str:
    """The one line that a run ends with after a UserError."""
    code, output = stage.wait()
    assert code == 1 and "Traceback" not in output and output.count(".py: error: ") == 1, output
    return next(line for line in output.splitlines() if ".py: error: " in line)


def slow(stage) -> None:
    """Patch a stage so that updates and saves take long enough to be interrupted."""

    def slowed(function, seconds: float):
        def wrapped(*args, **kwargs):
            time.sleep(seconds)
            return function(*args, **kwargs)

        return wrapped

    stage.compute_gradients = slowed(stage.compute_gradients, 0.05)
    core.checkpoint.save_policy = slowed(core.checkpoint.save_policy, 0.3)


def before_third_update(fault, stage) -> None:
    """Patch a stage so that `fault(policy, batches)` is called before the third update."""
    compute, calls = stage.compute_gradients, []

    def faulty(policy, batches, *rest):
        calls.append(1)
        if len(calls) == 3:
            fault(policy, batches)
        return compute(policy, batches, *rest)

    stage.compute_gradients = faulty


# --- killed, and resumed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment", ["update 1", "update 4", ".checkpoint-4.partial", ".final.partial"]
)
def test_kill_9_at_a_random_moment_then_resume_equals_the_uninterrupted_run(
    moment, model, whole, tmp_path
):
    folder = tmp_path / "run"
    stage = start(model, folder, patch=slow)
    if moment.startswith("update"):  # between two checkpoints, or just as one begins
        stage.wait_until(lambda: lines(folder) >= int(moment.split()[1]))
    else:  # while a checkpoint or the final model is being written
        stage.wait_until((folder / moment).exists)
    time.sleep(random.random() * 0.1)
    stage.kill()
    assert stage.wait()[0] == -signal.SIGKILL
    saved = steps_of(folder)

    # the whole command again: it may have been killed before it wrote config.json
    output = run("--model", model, *FLAGS, "--resume", output_dir=folder)
    if saved:
        assert f"resuming from {folder / f'checkpoint-{saved[-1]}'}\n" in output
    else:
        assert f"no checkpoint in {folder}: starting anew" in output
    assert_equal_runs(folder, whole)
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    assert steps_of(folder) == [4, 6]


VARIANTS = {
    "several updates per rollout": (
        "grpo",
        [*FLAGS, "--num_iterations", 2, "--save_steps", 3, "--beta", 0.1],
    ),
    "supervised": ("sft", [*FLAGS[6:], "--rows_per_update", 4]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sigterm_finishes_the_update_and_saves_and_resuming_is_exact(variant, model, tmp_path):
    stage, words = VARIANTS[variant]
    words, folder = ["--model", model, *words], tmp_path / "run"
    run(*words, output_dir=tmp_path / "whole", stage=stage)
    assert steps_of(tmp_path / "whole") == [4, 6], "at the first end of a rollout that is due"
    stopped = Stage(*words, output_dir=folder, stage=stage, patch=slow)
    stopped.wait_until(lambda: lines(folder) >= 2)
    stopped.kill(signal.SIGTERM)
    code, output = stopped.wait()
    done = lines(folder) - 1
    assert code == 128 + signal.SIGTERM and "finishing this update" in output
    assert f"stopped after update {done}; {stage}.py --resume --output_dir {folder}" in output
    assert steps_of(folder)[-1] == done < 6
    assert done % 2 == 0 or stage == "sft", "between two rollouts"

    run("--resume", output_dir=folder, stage=stage)
    assert_equal_runs(folder, tmp_path / "whole")


def stall(stage) -> None:
    stage.compute_gradients = lambda *_: time.sleep(1000)


def test_ctrl_c_saves_and_a_second_one_leaves_at_once(model, whole, tmp_path):
    folder, stalled = tmp_path / "run", tmp_path / "stalled"
    stage = start(model, folder, patch=slow)
    stage.wait_until(lambda: lines(folder) >= 2)
    stage.kill(signal.SIGINT)
    assert stage.wait()[0] == 128 + signal.SIGINT
    run("--resume", output_dir=folder)
    assert_equal_runs(folder, whole)

    stage = start(model, stalled, patch=stall)
    stage.wait_until(lambda: lines(stalled) >= 1)
    time.sleep(0.5)  # in the update
    for _ in range(2):
        assert stage.process.is_alive()
        stage.kill(signal.SIGINT)
        stage.process.join(2)
    assert stage.process.exitcode == 128 + signal.SIGINT


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_resumes_exactly(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "final")
    for file in ("training_state.pt", "model.safetensors"):
        os.truncate(folder / "checkpoint-6" / file, 100_000)
        line = assert_fails(Stage("--resume", output_dir=folder))
        assert f"{folder / 'checkpoint-6'}" in line and "damaged" in line
    shutil.rmtree(folder / "checkpoint-6")
    assert f"resuming from {folder / 'checkpoint-4'}\n" in run("--resume", output_dir=folder)
    assert_equal_runs(folder, whole)


def state(folder: Path) -> list:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_resuming_starts_continues_or_refuses_and_says_so(model, whole, tmp_path):
    folder = tmp_path / "run"
    output = run("--model", model, *FLAGS, "--resume", output_dir=folder)
    assert f"no checkpoint in {folder}: starting anew" in output, "a requeued job always passes it"
    assert_equal_runs(folder, whole)

    before = state(folder)
    assert f"{folder} is complete: all 6 updates are done" in run("--resume", output_dir=folder)
    assert state(folder) == before

    run("--resume", "--max_steps", 8, "--save_total_limit", 0, output_dir=folder)
    config = json.loads((folder / "config.json").read_text())
    assert (config["max_steps"], config["model"], config["num_generations"]) == (8, model, 4)
    assert metrics(folder)[:7] == metrics(whole) and lines(folder) == 9
    assert steps_of(folder) == [4, 6, 8]

    for step in (4, 6, 8):
        shutil.rmtree(folder / f"checkpoint-{step}")
    (folder / "final" / "run_config.json").unlink()
    before = state(folder)
    line = assert_fails(Stage("--resume", "--max_steps", 9, output_dir=folder))
    assert "finished run without a checkpoint" in line and "--overwrite" in line
    assert "already holds a run" in assert_fails(start(model, folder))
    assert state(folder) == before


def test_a_flag_that_is_given_when_resuming_wins_or_is_refused(whole, tmp_path):
    for name in ("plain", "decayed"):
        shutil.copytree(whole, tmp_path / name)
    before = state(tmp_path / "plain")
    others = {"--freeze": "vision", "--num_iterations": 2, "--lora_rank": 2, "--model": "toy"}
    for flag, value in others.items():
        words = ["--resume", "--max_steps", 7, flag, value]
        line = assert_fails(Stage(*words, output_dir=tmp_path / "plain"))
        assert f"checkpoint-6 was made with {flag[2:]} " in line and "must stay" in line
    other_stage = Stage("--resume", "--max_steps", 7, output_dir=tmp_path / "plain", stage="sft")
    assert "checkpoint-6 was made with stage grpo, which must stay" in assert_fails(other_stage)
    assert state(tmp_path / "plain") == before
    run("--resume", "--max_steps", 7, output_dir=tmp_path / "plain")
    run("--resume", "--max_steps", 7, "--weight_decay", 0.5, output_dir=tmp_path / "decayed")
    assert weights(tmp_path / "plain/final") != weights(tmp_path / "decayed/final")


def test_overwriting_leaves_nothing_of_the_old_run_and_touches_nothing_else(model, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint-2-mine").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "events.out.tfevents.0").write_text("of tensorboard")
    words = ["--max_steps", 1, "--overwrite", "--eval_steps", 0, "--save_steps", 0]
    run("--model", model, *FLAGS, *words, output_dir=folder)
    assert [m["step"] for m in metrics(folder)] == [1]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2-mine"]
    assert {line["step"] for line in read_lines(folder / "rollouts.jsonl")} == {1}
    assert not (folder / "best").exists() and (folder / "notes.txt").read_text() == "mine"
    assert not [*folder.rglob("events*")]


# --- what a run leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["final", "best", "checkpoint-6"])
def test_saved_folders_are_complete_for_plain_transformers(name, whole):
    model, report = AutoModelForImageTextToText.from_pretrained(
        whole / name, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.generation_config.eos_token_id == MANY_ENDS
    assert len(AutoTokenizer.from_pretrained(whole / name)) == model.config.text_config.vocab_size
    assert Qwen2VLImageProcessorPil.from_pretrained(whole / name).patch_size == 14


def plan_accuracies(stage) -> None:
    """Patch a stage so that held-out accuracy rises, then falls."""
    evaluate, planned = stage.evaluate, {0: 0.9, 2: 0.2, 4: 0.5, 6: 0.3}
    stage.evaluate = lambda *rest: evaluate(*rest) | {"eval/accuracy": planned[rest[-1]]}


def plan_worse(stage) -> None:
    evaluate = stage.evaluate
    stage.evaluate = lambda *rest: evaluate(*rest) | {"eval/accuracy": 0.1}


def test_best_is_the_checkpoint_with_the_highest_held_out_accuracy(model, tmp_path):
    folder, words = tmp_path / "run", ["--eval_steps", 2, "--save_total_limit", 0]
    code, output = start(model, folder, *words, patch=plan_accuracies).wait()
    assert code == 0 and "best held-out accuracy 0.500 after update 4: best/" in output, output
    assert weights(folder / "best") == weights(folder / "checkpoint-4")
    assert weights(folder / "best") != weights(folder / "final")

    shutil.rmtree(folder / "final")  # as if it had been killed after checkpoint-2
    for step in (4, 6):
        shutil.rmtree(folder / f"checkpoint-{step}")
    shutil.copytree(folder, tmp_path / "other")
    code, output = Stage("--resume", output_dir=folder, patch=plan_accuracies).wait()
    assert code == 0 and "best held-out accuracy 0.500 after update 4: best/" in output, output

    other = ["--resume", "--learning_rate", 0]  # best/ was made by updates that the run forgets
    code, output = Stage(*other, output_dir=tmp_path / "other", patch=plan_worse).wait()
    assert code == 0 and "best held-out accuracy 0.100 after update 4: best/" in output, output
    assert weights(tmp_path / "other/best") == weights(tmp_path / "other/checkpoint-2")


@pytest.fixture
def own_data(tmp_path) -> Path:
    """Ten rows with one question and one id but different images. Two images cannot be read."""
    rows = []
    for number in range(10):
        name = f"{number}.png"
        Image.effect_noise((60 + number, 60), 60).convert("RGB").save(tmp_path / name)
        rows.append({"id": "same", "image": name, "question": "Where?", "answer": "left"})
    (tmp_path / "8.png").write_bytes((tmp_path / "8.png").read_bytes()[:500])
    (tmp_path / "9.png").unlink()
    rows = [row | {"options": ["left", "right"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


def test_closing_lines_show_the_same_images_before_and_after_and_bad_rows_are_counted(
    own_data, model, tmp_path
):
    folder = tmp_path / "run"
    output = run(
        "--model", model, "--dataset", own_data, "--recipe", "toy", *FLAGS, output_dir=folder
    )
    assert "2 unusable rows" in output or "4 unusable rows" in output
    answers = {}
    for line in read_lines(folder / "rollouts.jsonl"):
        if line["split"] == "eval":
            answer = line["completions"][0].replace("\r", "\n")  # as it is read from the log
            answers.setdefault(line["images"][0], []).append(answer)
    assert len(answers) == 4
    for before, after in list(answers.values())[:3]:
        assert f"  before: {before}\n   after: {after}\n" in output


# --- faults inside a run -------------------------------------------------------------------------


def spoil_the_loss(_, batches) -> None:
    batches[0].advantages.fill_(math.nan)


def spoil_the_weights(policy, _) -> None:
    next(policy.parameters()).data.fill_(math.nan)


def limit_files(size: int, *_) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_an_update_with_a_loss_that_is_not_finite_is_skipped(model, tmp_path):
    code, output = start(
        model, tmp_path / "run", patch=partial(before_third_update, spoil_the_loss)
    ).wait()
    assert code == 0, output
    updates = metrics(tmp_path / "run")[1:]
    assert [m["skipped_updates"] for m in updates] == [0, 0, 1, 0, 0, 0]
    assert updates[2]["loss"] is None and all(map(math.isfinite, (m["loss"] for m in updates[3:])))


def test_five_updates_in_a_row_that_are_not_finite_stop_the_run_with_one_line(model, tmp_path):
    folder, patch = tmp_path / "run", partial(before_third_update, spoil_the_weights)
    line = assert_fails(start(model, folder, "--max_steps", 20, "--save_steps", 0, patch=patch))
    assert "not finite in 5 updates in a row (last: update 7" in line and "--learning_rate" in line
    assert [m["skipped_updates"] for m in metrics(folder)[1:]] == [0, 0, 1, 1, 1, 1]


def test_weights_that_are_not_finite_are_never_saved(model, whole, tmp_path):
    folder, patch = tmp_path / "run", partial(before_third_update, spoil_the_weights)
    line = assert_fails(start(model, folder, patch=patch))
    assert f"could not save {folder / 'checkpoint-4'}: " in line and "is not finite" in line
    assert steps_of(folder) == [2] and not list(folder.glob(".*"))
    run("--resume", output_dir=folder)
    assert_equal_runs(folder, whole)


@pytest.mark.parametrize("limit", [100_000, 800_000], ids=["weights", "optimizer"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(limit, model, whole, tmp_path):
    """A limit on the size of a file fails a write in the middle, as a full disk does."""
    folder, patch = tmp_path / "run", partial(before_third_update, partial(limit_files, limit))
    line = assert_fails(start(model, folder, patch=patch))
    assert f"could not save {folder / 'checkpoint-4'}: " in line and "File too large" in line
    assert "--resume continues" in line
    assert steps_of(folder) == [2] and not list(folder.glob(".*"))
    run("--resume", output_dir=folder)
    assert_equal_runs(folder, whole)


# --- settings that must not change a run ---------------------------------------------------------


def test_max_grad_norm_0_does_not_clip_and_trains(model, tmp_path):
    for norm in (0, 1e9, 1e-3):
        words = ["--max_grad_norm", norm, "--max_steps", 2, "--eval_steps", 0]
        run("--model", model, *FLAGS, *words, output_dir=tmp_path / str(norm))
    unclipped = weights(tmp_path / "0/final")
    assert unclipped == weights(tmp_path / "1000000000.0/final") != weights(Path(model))
    assert unclipped != weights(tmp_path / "0.001/final")
    assert metrics(tmp_path / "0")[0]["grad_norm"] > 0.1


def accumulate(stage) -> None:
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "4"


def test_accumulation_in_the_environment_changes_nothing(model, whole, tmp_path):
    code, output = start(model, tmp_path / "run", patch=accumulate).wait()
    assert code == 0, output
    assert_equal_runs(tmp_path / "run", whole)
