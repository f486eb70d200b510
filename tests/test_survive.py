"""What a run survives: kills, signals, full disks, numbers that are not finite, hostile rows.

Every run here is a process of its own on a tiny random model. "Equal" leaves out only the metrics
that measure time.
"""

import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from launch import ENV, FLAGS, ROOT, Stage, launch_command, metrics, run, tiny_checkpoint
from PIL import Image


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


def assert_equal_runs(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    assert (one / "rollouts.jsonl").read_text() == (other / "rollouts.jsonl").read_text()
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] == weights[1]


def assert_fails(stage: Stage, code: int = 1) -> str:
    """The one line that the failing run ends with, instead of a traceback."""
    exit_code, output = stage.wait()
    assert exit_code == code and "Traceback" not in output, output
    assert output.count("error:") == 1, output
    return next(line for line in output.splitlines() if "error:" in line)


def slow(stage) -> None:
    """A patch of the stage: updates and saving that take long enough to be interrupted."""

    def slowed(function, seconds: float):
        def wrapped(*args, **kwargs):
            time.sleep(seconds)
            return function(*args, **kwargs)

        return wrapped

    stage.update, module = slowed(stage.update, 0.05), sys.modules["run"]
    module.save_policy, module.verify = slowed(module.save_policy, 0.2), slowed(module.verify, 0.2)


# --- killed, and resumed -------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(10))
def test_kill_9_at_a_random_moment_then_resume_equals_the_uninterrupted_run(
    number, model, whole, tmp_path
):
    chance, folder = random.Random(number), tmp_path / "run"
    stage = start(model, folder, patch=slow)
    update, writing = chance.randint(0, 5), number % 2
    if writing:  # while a checkpoint, or the final model, is being written
        name = f".{chance.choice(['checkpoint-2', 'checkpoint-4', 'final'])}.partial"
        stage.wait_until((folder / name).exists)
        time.sleep(chance.random() * 0.1)
    else:
        stage.wait_until(lambda: lines(folder) >= update)
        time.sleep(chance.random() * 0.1)
    stage.kill()
    assert stage.wait()[0] == -signal.SIGKILL
    saved = steps_of(folder)

    # the same command: it may have been killed before it had written down its settings
    output = run("--model", model, *FLAGS, "--resume", output_dir=folder)
    if saved:
        assert f"resuming from {folder / f'checkpoint-{saved[-1]}'}\n" in output
    else:
        assert "no checkpoint to resume from" in output
    assert_equal_runs(folder, whole)
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    assert steps_of(folder) == [2, 4]


VARIANTS = {
    "several updates per rollout": ("--num_iterations", 2, "--save_steps", 3, "--beta", 0.1),
    "dynamic sampling": ("--dynamic_sampling", "--rewards", "format", "length"),
    "supervised": (),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sigterm_finishes_the_update_and_saves_and_resuming_is_exact(variant, model, tmp_path):
    words, more = ["--model", model, *FLAGS, *VARIANTS[variant]], {}
    if variant == "supervised":
        words, more = ["--model", model, *FLAGS[8:], "--rows_per_update", 4], {"stage": "sft"}
    run(*words, output_dir=tmp_path / "whole", **more)
    folder = tmp_path / "run"
    stage = Stage(*words, output_dir=folder, patch=slow, **more)
    stage.wait_until(lambda: lines(folder) >= 2)
    stage.kill(signal.SIGTERM)
    code, output = stage.wait()
    done = lines(folder) - 1
    assert code == 128 + signal.SIGTERM and "finishing this update" in output
    assert f"stopped after update {done}; " in output
    assert f"--resume --output_dir {folder} goes on from checkpoint-{done}" in output
    assert steps_of(folder)[-1] == done < 6

    run("--resume", output_dir=folder, **more)
    assert_equal_runs(folder, tmp_path / "whole")


def stall(stage) -> None:
    """An update that takes for ever."""
    stage.update = lambda *_: time.sleep(1000)


def test_ctrl_c_saves_and_a_second_one_leaves_at_once(model, whole, tmp_path):
    folder = tmp_path / "run"
    stage = start(model, folder, patch=slow)
    stage.wait_until(lambda: lines(folder) >= 2)
    stage.kill(signal.SIGINT)
    assert stage.wait()[0] == 128 + signal.SIGINT
    run("--resume", output_dir=folder)
    assert_equal_runs(folder, whole)

    stage = start(model, tmp_path / "stalled", patch=stall)
    stage.wait_until(lambda: lines(tmp_path / "stalled") >= 1)
    time.sleep(0.5)  # in the update
    for _ in range(2):
        assert stage.process.is_alive()
        stage.kill(signal.SIGINT)
        stage.process.join(2)
    assert stage.process.exitcode == 128 + signal.SIGINT


def test_a_damaged_checkpoint_is_not_loaded(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "final")
    os.truncate(folder / "checkpoint-4" / "model.safetensors", 100_000)
    output = run("--resume", output_dir=folder)
    assert "checkpoint-4 is damaged" in output
    assert f"resuming from {folder / 'checkpoint-2'}\n" in output
    assert_equal_runs(folder, whole)

    shutil.rmtree(folder / "final")
    for step in (2, 4):
        os.truncate(folder / f"checkpoint-{step}" / "training_state.pt", 100_000)
    code, output = Stage("--resume", output_dir=folder).wait()
    assert code == 1 and "no other checkpoint is left" in output and "Traceback" not in output
    assert steps_of(folder) == [2, 4]


def test_what_resume_takes_from_the_folder_and_what_from_the_command_line(model, whole, tmp_path):
    folder = tmp_path / "run"
    output = run("--model", model, *FLAGS, "--resume", output_dir=folder)
    assert "no checkpoint to resume from" in output, "a first start with --resume is a start"
    assert_equal_runs(folder, whole)

    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    assert f"{folder} is complete: all 6 updates are done" in run("--resume", output_dir=folder)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))

    run("--resume", "--max_steps", 8, "--save_total_limit", 0, output_dir=folder)
    config = json.loads((folder / "config.json").read_text())
    assert (config["max_steps"], config["model"], config["num_generations"]) == (8, model, 4)
    assert metrics(folder)[:5] == metrics(whole)[:5] and metrics(folder)[-1]["step"] == 8
    assert steps_of(folder) == [2, 4, 6]

    # starting anew leaves nothing of the old run, and nothing else is touched
    (folder / "notes.txt").write_text("mine")
    run("--model", model, *FLAGS, "--max_steps", 1, "--overwrite", output_dir=folder)
    assert [m["step"] for m in metrics(folder)] == [0, 1] and steps_of(folder) == []
    assert (folder / "notes.txt").read_text() == "mine"


# --- faults inside a run -------------------------------------------------------------------------


def at_third_update(fault):
    """A patch of the stage: `fault(policy)` before its third update."""

    def patch(stage) -> None:
        update, calls = stage.update, []

        def faulty(policy, *rest):
            calls.append(1)
            if len(calls) == 3:
                fault(policy)
            return update(policy, *rest)

        stage.update = faulty

    return patch


def inject_nan(stage) -> None:
    at_third_update(lambda policy: next(policy.parameters()).data.fill_(torch.nan))(stage)


def run_out_of_memory(stage) -> None:
    def fault(_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB"
        )

    at_third_update(fault)(stage)


def test_nan_weights_skip_updates_then_stop_the_run_with_a_diagnosis(model, tmp_path):
    folder = tmp_path / "run"
    stage = start(model, folder, "--max_steps", 20, "--save_steps", 1, patch=inject_nan)
    line = assert_fails(stage)
    assert "not finite in 5 updates in a row" in line and "is not finite: the model is lost" in line
    assert "goes on from checkpoint-2" in line
    skipped = [m["skipped_updates"] for m in metrics(folder)[1:]]
    assert skipped == [0, 0, 1, 1, 1, 1, 1]
    assert metrics(folder)[3]["loss"] is None
    assert steps_of(folder) == [1, 2], "weights that are not finite are not saved"

    run("--resume", "--max_steps", 6, output_dir=folder)
    assert [m["skipped_updates"] for m in metrics(folder)[1:]] == [0] * 6

    line = assert_fails(start(model, tmp_path / "short", "--save_steps", 3, patch=inject_nan))
    assert "could not save final (" in line and "is not finite" in line


def test_out_of_memory_names_the_flags_to_lower_and_the_checkpoint(model, whole, tmp_path):
    line = assert_fails(start(model, tmp_path / "run", patch=run_out_of_memory))
    assert "out of memory: 2.50 GiB" in line and "goes on from checkpoint-2" in line
    for flag in ("--prompts_per_forward 8", "--max_completion_length 12", "--gradient_check"):
        assert flag in line
    run("--resume", output_dir=tmp_path / "run")
    assert_equal_runs(tmp_path / "run", whole)


def count_forwards(stage) -> None:
    update = stage.update

    def counting(policy, *rest):
        calls = []
        hook = policy.register_forward_hook(lambda *_: calls.append(1))
        measured = update(policy, *rest) | {"forwards": len(calls)}
        hook.remove()
        return measured

    stage.update = counting


def test_groups_without_signal_cost_no_forward_and_dynamic_sampling_replaces_them(model, tmp_path):
    words = ["--max_completion_length", 3, "--prompts_per_forward", 1, "--num_generations", 2]
    shares = {}
    for name, more in {"plain": [], "kl": ["--beta", 0.1], "dapo": ["--dynamic_sampling"]}.items():
        code, output = start(model, tmp_path / name, *words, *more, patch=count_forwards).wait()
        assert code == 0, output
        updates = metrics(tmp_path / name)[1:]
        shares[name] = [m["frac_reward_zero_std"] for m in updates]
        with_signal = [4 if name == "kl" else round(4 * (1 - share)) for share in shares[name]]
        assert [m["forwards"] for m in updates] == [max(1, n) for n in with_signal]
        assert all(m.get("sampled_groups", 4) >= 4 for m in updates)
    assert 0.2 < sum(shares["plain"]) / 6 < 1 and sum(shares["dapo"]) < sum(shares["plain"]) / 2


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill_disk(stage) -> None:
    def fault(_):
        folder = Path(sys.argv[-1])
        with open(folder / "filler", "wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    return

    at_third_update(fault)(stage)


def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(model, whole, small_disk, tmp_path):
    folder = small_disk / "run"
    log = small_disk / "run.log"
    log.symlink_to(tmp_path / "run.log")  # what a user sees is not on that disk
    line = assert_fails(start(model, folder, "--save_total_limit", 0, "--save_steps", 1))
    newest = steps_of(folder)[-1]
    assert f"could not save checkpoint-{newest + 1} (" in line and "o space left" in line
    assert f"goes on from checkpoint-{newest}" in line
    assert newest < 6 and not list(folder.glob(".*"))

    shutil.rmtree(folder / "checkpoint-1")  # makes room for what is left to do
    run("--resume", "--save_total_limit", 1, output_dir=folder)
    assert metrics(folder) == metrics(whole)

    line = assert_fails(start(model, folder, "--overwrite", patch=fill_disk))
    assert "No space left on device" in line and "goes on from checkpoint-2" in line
    (folder / "filler").unlink()
    run("--resume", "--save_total_limit", 1, output_dir=folder)
    assert_equal_runs(folder, whole)


FAILING_RANK = """
import sys
sys.path.insert(0, {root!r})
import grpo
update, calls = grpo.update, []
def faulty(policy, optimizer, batches, num_tokens, config, accelerator):
    calls.append(1)
    if accelerator.process_index == 1 and len(calls) == 3:
        raise {error}
    return update(policy, optimizer, batches, num_tokens, config, accelerator)
grpo.update = faulty
grpo.main()
"""


@pytest.mark.parametrize("error", ["RuntimeError('boom')", "OSError(5, 'disk lost')"])
def test_a_rank_that_raises_ends_all_ranks_with_its_error(error, model, tmp_path):
    script = tmp_path / "grpo.py"
    script.write_text(FAILING_RANK.format(root=str(ROOT), error=error))
    words = ["--model", model, *FLAGS, "--output_dir", tmp_path / "run"]
    began = time.monotonic()
    done = subprocess.run(
        launch_command(*words, processes=2, script=str(script)),
        cwd=ROOT, env=ENV, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    seconds = time.monotonic() - began
    assert done.returncode == 1 and seconds < 60
    said, _, launcher = done.stderr.partition("torch/distributed/elastic")
    if error.startswith("OSError"):
        assert "rank 1: error: [Errno 5] disk lost; " in said and "checkpoint-2" in said
        assert "Traceback" not in said
    else:
        assert "[rank1]: RuntimeError: boom" in said
    assert "rank0" not in said and "rank 0" not in said and "lost another" not in said
    assert "rank      : 1 (local_rank: 1)" in launcher


# --- input -------------------------------------------------------------------------------------


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A small file that announces a picture of that size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + encoded(Image.new("RGB", (8, 8)))[33:]


def test_a_dataset_with_ten_per_cent_corrupt_rows_trains_through(model, tmp_path):
    picture = Image.effect_noise((90, 60), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated
    good = [
        encoded(picture),
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(picture.convert("P")),
        encoded(picture.convert("L").convert("I;16")),
        encoded(picture, "GIF", save_all=True, append_images=[Image.new("RGB", (90, 60))]),
        encoded(picture, "JPEG", exif=exif),
        encoded(picture.convert("LA")),
    ]
    bad = {
        "truncated": encoded(picture)[:2000],
        "truncated jpeg": encoded(picture, "JPEG")[:700],
        "empty file": b"",
        "no image": b"<html>not found</html>",
        "bomb": png_of_size(60_000, 60_000),
        "no width": png_of_size(0, 10),
        "a line": png_of_size(10_000, 2),
        "missing": None,
    }
    kinds = list(bad)
    rows = [
        {
            "id": kinds[i // 10] if i % 10 == 3 else f"good-{i}",
            "images": [bad[kinds[i // 10]] if i % 10 == 3 else good[i % len(good)]],
            "question": "Where is it?",
            "options": ["left", "right"],
            "answer": "left",
        }
        for i in range(10 * len(kinds))
    ]
    rows += [row | {"id": f"last-{i}"} for i, row in enumerate(rows[:4])]  # held out, one corrupt
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    words = ("--dataset", tmp_path / "rows.parquet", "--model", model, *FLAGS)
    more = ("--max_steps", 5, "--prompts_per_update", 20, "--max_prompt_length", 600)
    output = run(*words, *more, "--num_generations", 2, output_dir=tmp_path / "run")
    trained = [json.loads(line) for line in open(tmp_path / "run" / "rollouts.jsonl")]
    assert all(group["id"].startswith(("good", "last")) for group in trained)
    assert [m["step"] for m in metrics(tmp_path / "run")] == [*range(6)]
    assert f"{len(bad)} unusable rows skipped: " in output
    report = next(line for line in output.splitlines() if "unusable" in line)
    assert sum(kind in report for kind in kinds) >= 3


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, whole) -> dict[str, tuple]:
    """Mistake -> flags, exit code, and what the line must say."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty.jsonl").write_text("")
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    pickled = folder / "pickled"
    shutil.copytree(whole / "final", pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    return {
        "unknown option": (["--max_stepz", 3], 2, "did you mean --max_steps"),
        "abbreviated option": (["--max_step", 3], 2, "--max_step"),
        "unknown value": (["--loss_type", "ppo"], 2, "choose from"),
        "no number": (["--max_steps", "many"], 2, "--max_steps"),
        "G = 1": (["--num_generations", 1], 2, "at least 2"),
        "no updates": (["--max_steps", 0], 2, "--max_steps"),
        "unknown reward": (["--rewards", "speed"], 2, "valid: accuracy, format, length"),
        "missing dataset": (["--dataset", folder / "none.parquet"], 1, "none.parquet"),
        "empty dataset": (["--dataset", folder / "empty.jsonl"], 1, "empty"),
        "unknown dataset": (["--dataset", "coco"], 1, "unknown dataset 'coco'"),
        "missing model": (["--model", folder / "none"], 1, "no model"),
        "no Qwen-VL": (["--model", folder / "bert"], 1, "is a bert model"),
        "a pickle": (["--model", pickled], 1, "no model"),
        "a run is there": (["--output_dir", whole], 1, "already holds a run"),
        "a seed below 0": (["--seed", -1], 2, "--seed"),
        "unknown tracker": (["--log_with", "abacus"], 1, "Choose between"),
        "a tracker that is not installed": (["--log_with", "aim"], 1, "pip install it first"),
    }


MISTAKES = (
    "unknown option, abbreviated option, unknown value, no number, G = 1, no updates, "
    "unknown reward, missing dataset, empty dataset, unknown dataset, missing model, no Qwen-VL, "
    "a pickle, a run is there, a seed below 0, unknown tracker, a tracker that is not installed"
).split(", ")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_one_line_and_leaves_no_folder(mistake, wrong, model, tmp_path):
    words, code, says = wrong[mistake]
    if "--model" not in words:
        words = ["--model", model, *words]
    folder = words[-1] if mistake == "a run is there" else tmp_path / "run"
    stage = Stage(*words, output_dir=folder)
    exit_code, output = stage.wait()
    assert exit_code == code, output
    assert len(output.strip().splitlines()) == 1 and says in output, output
    assert output.startswith("grpo.py: error: ")
    assert mistake == "a run is there" or not folder.exists()
