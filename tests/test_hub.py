"""The README's commands for the 2B model, on a loopback hub with tiny files in the same layout."""

import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import huggingface_hub
import launch
import pytest
from hub import Hub, commit_of, sha1
from launch import read_lines
from PIL import Image
from safetensors.torch import load_file, save_file
from samples import plain, png, sat, write
from tiny import IMAGE, tiny_model

from core.options import UserError
from core.qwen import load_policy, save_policy

MODEL = "Qwen/Qwen2-VL-2B"
SHARD = "model-00002-of-00004.safetensors"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def run_all(commands: list) -> list[tuple[int, str]]:
    """Run stages at the same time in forks of this process: exit codes and outputs."""
    for module in ("datasets", "eval_cvbench", "grpo"):  # once, before the forks
        importlib.import_module(module)
    processes = []
    for stage, *words in commands:
        log = Path(tempfile.mkstemp()[1])
        arguments = (stage, [*map(str, words)], log, None)
        process = multiprocessing.get_context("fork").Process(target=launch._stage, args=arguments)
        process.start()
        processes.append((process, log))
    return [(process.join() or process.exitcode, log.read_text()) for process, log in processes]


def publish_model(folder: Path) -> None:
    """A tiny Qwen2-VL with the files, names and keys of the published one, in several shards."""
    model, processor = tiny_model("qwen2_vl")
    model.save_pretrained(folder, max_shard_size="200KB")
    processor.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    del text["layer_types"], text["model_type"], config["vision_config"]["rope_parameters"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text["rope_theta"] = rope["rope_theta"]
    generation = {f"{name}_token_id": text["eos_token_id"] for name in ("bos", "eos", "pad")}
    generation |= {"top_k": 1, "top_p": 0.001, "temperature": 0.1}
    images = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}
    images |= {"temporal_patch_size": 2, "image_processor_type": "Qwen2VLImageProcessor"}
    files = {"config": text | config, "generation_config": generation}
    files |= {"preprocessor_config": images, "chat_template": {"chat_template": TEMPLATE}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    publish_model(folder / MODEL)
    for name in ("drop", "truncated"):
        shutil.copytree(folder / MODEL, folder / "broken" / name)
    os.truncate(folder / "broken/truncated" / SHARD, 10_000)
    for split, count in {"train": 40, "val": 4, "static": 4, "test": 4}.items():
        # 24 MB, of which the client keeps the first 10 when a download breaks off at half
        more = {"padding": random.randbytes(600_000) if split == "train" else b""}
        rows = [sat(n) | more for n in range(count)]
        write(folder / f"datasets/array/SAT/SAT_{split}.parquet", rows)
    write(folder / "datasets/broken/drop/train.parquet", [*map(plain, range(40))])
    image, prompt = {"bytes": png(), "path": None}, "How many?\n(A) 3\n(B) 2"
    question = plain(0, image=image, prompt=prompt, choices=["3", "2"], answer="(B)", task="Count")
    for part, sources in {"2d": ("ADE20K", "COCO"), "3d": ("Omni3D",)}.items():
        rows = [question | {"idx": n, "source": source} for n, source in enumerate(sources)]
        write(folder / f"datasets/nyu-visionx/CV-Bench/test_{part}.parquet", rows)
    hub = Hub(folder)
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("hf"))
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}"}
    return online | {"HF_HOME": cache, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(environment):
    """`run([stage, *flags], …)` runs commands at the same time: [(exit code, output), …]."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        with mock.patch.dict(os.environ, environment):
            executor.submit(int).result()  # starts the worker
        yield lambda *commands: executor.submit(run_all, commands).result()


def train(folder: Path, *more) -> list:
    few = "--dataset sat --max_steps 2 --num_generations 2 --prompts_per_update 2 --eval_rows 2"
    return ["grpo", *few.split(), "--max_completion_length", 8, "--output_dir", folder, *more]


def evaluate(folder: Path, *more) -> list:
    return ["eval_cvbench", "--max_completion_length", 8, "--output_dir", folder, *more]


def launch_one(command: list, environment: dict) -> str:
    """Run a command as the README does. Returns what it prints on stderr."""
    stage, *flags = command
    started = launch.start(*flags, script=f"{stage}.py", env=environment)
    code, out, err = launch.end(started, timeout=600)
    assert code == 0, out + err
    return err


@pytest.fixture(scope="module")
def readme(hub, environment, tmp_path_factory):
    """The README's two commands, with an empty cache: their folder and what they print on stderr.

    Two downloads of the first one are interrupted.
    """
    folder, printed = tmp_path_factory.mktemp("readme"), ""
    hub.interrupt |= {"SAT_train.parquet", SHARD}
    score = evaluate(folder / "eval", "--model", folder / "run/final")
    for command in (train(folder / "run"), score):
        printed += launch_one(command, environment)
    return folder, printed


def test_the_readmes_training_command_trains_and_writes_down_the_commits(readme):
    folder = readme[0] / "run"
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [0, 1, 2]
    config = json.loads((folder / "config.json").read_text())
    assert (config["recipe"], config["model"]) == ("paper", MODEL)
    assert config["model_commit"] == commit_of(MODEL)
    assert config["data_commit"] == commit_of("datasets/array/SAT")


def test_the_readmes_evaluation_command_scores_the_trained_model(readme):
    scores = json.loads((readme[0] / "eval/scores.json").read_text())
    assert scores["n"] == 3 and scores["official"] is not None


def test_an_interrupted_download_resumes_where_it_broke_off_and_the_file_is_whole(
    hub, readme, environment
):
    chunk = huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE  # a part of one is thrown away
    for path in (f"{MODEL}/{SHARD}", "datasets/array/SAT/SAT_train.parquet"):
        content, name = (hub.folder / path).read_bytes(), Path(path).name
        asked = [request for request in hub.requests if name in request and "GET" in request]
        kept = len(content) // 2 // chunk * chunk
        assert [request.partition(" from ")[2] for request in asked] == ["", str(kept or "")]
        (cached,) = Path(environment["HF_HOME"]).glob(f"hub/*/snapshots/*/{name}")
        assert cached.read_bytes() == content


def test_downloads_show_their_progress(readme):
    bar = r"Fetching \d+ files: 100%"
    assert len(re.findall(bar, readme[1])) >= 3, readme[1]  # SAT, the model, CV-Bench


def test_a_trained_model_keeps_the_chat_template_of_the_published_one(readme):
    _, processor = load_policy(str(readme[0] / "run/final"))
    assert processor.tokenizer.chat_template == TEMPLATE


def test_revisions_are_requested_and_their_commits_written_down(hub, run, tmp_path):
    before, revisions = len(hub.requests), ["--revision", "v2", "--data_revision", "v2"]
    ends = run(
        train(tmp_path / "run", *revisions),
        evaluate(tmp_path / "eval", "--model", MODEL, *revisions),
    )
    assert [code for code, _ in ends] == [0, 0], ends
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["model_commit"] == commit_of(MODEL, "v2")
    assert config["data_commit"] == commit_of("datasets/array/SAT", "v2")
    asked = hub.requests[before:]
    for name in (f"models/{MODEL}", "datasets/array/SAT", "datasets/nyu-visionx/CV-Bench"):
        assert f"GET /api/{name}/revision/v2" in asked
    assert [request for request in asked if "main" in request] == []


def test_a_second_run_works_from_the_cache_without_the_hub(hub, readme, environment, tmp_path):
    hub.stop()
    try:
        for command in (train(tmp_path / "run"), evaluate(tmp_path / "eval", "--model", MODEL)):
            launch_one(command, environment)
    finally:
        hub.start()
    first, again = (read_lines(folder / "run/metrics.jsonl")[2] for folder in (readme[0], tmp_path))
    assert first["entropy"] == again["entropy"]


def test_a_failing_hub_is_one_line_that_names_the_repository_and_what_to_do(hub, run, tmp_path):
    names = [f"broken/{name}" for name in (401, 404, 429, 500, "drop")]
    cases = [(kind, name) for kind in ("model", "dataset") for name in names]
    ends = run(*(["grpo", f"--{kind}", name, "--output_dir", tmp_path] for kind, name in cases))
    for (kind, name), (code, output) in zip(cases, ends, strict=True):
        line = output.splitlines()[-1]
        assert code == 1 and "Traceback" not in output and output.count("error:") == 1, output
        assert line.startswith("grpo.py: error: ") and f"{kind} {name}" in line
        assert f"--{kind} path/to/folder" in line
        asked = [request for request in hub.requests if name in request]
        assert 1 <= len(asked) <= 60  # it gives up


def test_a_truncated_shard_is_named_as_damaged_by_the_file_behind_its_link(hub, run, tmp_path):
    ((code, output),) = run(["grpo", "--model", "broken/truncated", "--output_dir", tmp_path])
    assert code == 1 and "Traceback" not in output
    line = output.splitlines()[-1]
    blob = sha1((hub.folder / "broken/truncated" / SHARD).read_bytes())
    assert "cannot load the model 'broken/truncated'" in line and f"blobs/{blob} is damaged" in line


def test_errors_that_need_no_data_come_before_any_request(hub, run, tmp_path):
    (tmp_path / "config.json").write_text("{}")  # a folder that holds a run
    before, new = len(hub.requests), tmp_path / "new"
    cases = [
        (train(new, "--rewards", "accurate"), 2, "unknown reward accurate"),
        (train(new, "--rewards", "mine.py:score"), 2, "there is no file mine.py"),
        (train(tmp_path), 1, "already holds a run"),
        (train(new, "--log_with", "tensorbord"), 1, "tensorbord is not installed"),
        (train(new, "--dataset", "stat"), 1, "did you mean sat?"),
        (train(new, "--model", "outputs/gone/final"), 1, "there is no such folder"),
        (train(new, "--image_folder", "gone"), 1, "there is no folder gone"),
        (evaluate(new, "--model", "outputs/gone/final"), 1, "there is no such folder"),
        (evaluate(new, "--model", MODEL, "--dataset", "cvbenhc"), 1, "did you mean cvbench?"),
        (evaluate(new, "--model", MODEL, "--data_path", "gone"), 1, "gone does not exist"),
    ]
    ends = run(*(command for command, _, _ in cases))
    for (code, output), (_, expected, message) in zip(ends, cases, strict=True):
        assert code == expected and message in output.splitlines()[-1], output
    assert hub.requests[before:] == []


def test_a_wrong_model_is_found_before_the_data_and_wrong_data_before_the_weights(
    hub, run, tmp_path
):
    before = len(hub.requests)
    ends = run(
        train(tmp_path / "run", "--model", f"{MODEL}B"),
        evaluate(tmp_path / "eval", "--model", f"{MODEL}B"),
        train(tmp_path / "run", "--model", "broken/truncated", "--dataset", "array/SAD"),
    )
    for (code, output), name in zip(ends, (f"{MODEL}B", f"{MODEL}B", "array/SAD"), strict=True):
        assert code == 1 and f"{name} from the hub" in output.splitlines()[-1], output
    asked = "\n".join(hub.requests[before:])
    assert "SAT" not in asked and "CV-Bench" not in asked and "safetensors" not in asked
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "prefix, message",
    [
        ("", r"lacks 1 weights, \S*layers.1.mlp.up_proj.weight among them"),
        ("base_model.model.", r"lacks \d\d weights, lm_head.weight, .*Merge adapters"),
    ],
)
def test_missing_weights_are_an_error_that_names_them(tmp_path, prefix, message):
    publish_model(tmp_path)
    for shard in tmp_path.glob("*.safetensors"):
        weights = load_file(shard).items()
        kept = {prefix + name: w for name, w in weights if "layers.1.mlp.up_proj" not in name}
        save_file(kept, shard, {"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_policy(str(tmp_path))


def test_a_larger_max_pixels_by_hand_wins_over_the_one_that_a_checkpoint_saved(hub, tmp_path):
    model, processor = load_policy(str(hub.folder / MODEL), max_pixels=4 * 784)
    save_policy(model, processor, tmp_path)
    for given, visual_tokens in (None, 4), (64 * 784, 64):
        _, processor = load_policy(str(tmp_path), max_pixels=given)
        inputs = processor.encode([IMAGE], [[Image.new("RGB", (224, 224))]])
        assert inputs["mm_token_type_ids"].sum() == visual_tokens
