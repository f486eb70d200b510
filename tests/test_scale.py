"""One process and many give the same run: data parallel, sharded, on several machines.

Started as a user does, with `accelerate launch` and the files of configs/; on CPUs over gloo.
"""

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from launch import ENV, FLAGS, ROOT, launch, launch_command, metrics, run, tiny_checkpoint
from safetensors.torch import load_file
from tiny import random_batch, tiny_model
from transformers import AutoModelForImageTextToText

RUN = [*FLAGS, "--max_steps", 3, "--beta", 0.04, "--prompts_per_forward", 1, "--eval_rows", 6]
RUN += ["--learning_rate", 1e-4]  # Adam makes a step of a rounding error where the gradient is 0
COMPARED = ("loss", "grad_norm", "kl", "entropy", "reward", "reward_std", "eval/completion_length")

# grpo.py that also writes down what each rank holds at the end
SHARDED = """
import json, sys
sys.path.insert(0, {root!r})
import grpo

def held(tensors):
    tensors = [t for t in tensors if t.dim()]
    return [sum(t.to_local().numel() for t in tensors), sum(t.numel() for t in tensors)]

def tell(run, policy, *rest, finish=grpo.Run.finish):
    optimizer = run.prepared[1]
    state = [t for of in optimizer.optimizer.state.values() for t in of.values()]
    report = {{"parameters": held(policy.parameters()), "optimizer": held(state)}}
    name = f"held-{{run.accelerator.process_index}}.json"
    json.dump(report, open(run.folder / name, "w"))
    finish(run, policy, *rest)

def keep(run, policy, prepare=grpo.Run.prepare):
    run.prepared = prepare(run, policy)
    return run.prepared

grpo.Run.finish, grpo.Run.prepare = tell, keep
grpo.main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def keep_logits(stage) -> None:
    """A patch of grpo.py: write down what the trained model in memory says, before it is saved."""

    def finish(run, policy, *rest, finish=stage.Run.finish):
        torch.save(logits_of(policy.model), run.folder / "logits.pt")
        finish(run, policy, *rest)

    stage.Run.finish = finish


def logits_of(model) -> torch.Tensor:
    inputs = random_batch(tiny_model("qwen2_vl")[1], images_of=(1, 2))
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory) -> dict[str, Path]:
    """The same three updates by 1 process, by 2 and by 2 that share the model."""
    folder = tmp_path_factory.mktemp("runs")
    script = folder / "grpo.py"
    script.write_text(SHARDED.format(root=str(ROOT)))
    words = ["--model", model, *RUN, "--output_dir"]
    run("--model", model, *RUN, output_dir=folder / "one", patch=keep_logits)
    launch(*words, folder / "ddp", processes=2)
    launch(*words, folder / "fsdp", processes=2, config="fsdp", script=str(script))
    return {name: folder / name for name in ("one", "ddp", "fsdp")}


def assert_same_metrics(one: Path, other: Path) -> None:
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for name in COMPARED:
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-5, abs=1e-5), (a, b)


def assert_same_run(one: Path, other: Path) -> None:
    assert_same_metrics(one, other)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_give_the_run_of_one(kind, runs):
    assert any(m["grad_norm"] > 0.1 for m in metrics(runs["one"])[1:]), "something is trained"
    assert_same_run(runs["one"], runs[kind])
    assert json.loads((runs[kind] / "config.json").read_text())["processes"] == 2


def test_each_rank_holds_half_of_a_sharded_model_and_of_its_optimizer_state(runs):
    parameters = sum(t.numel() for t in load_file(runs["one"] / "final/model.safetensors").values())
    for rank in range(2):
        held = json.loads((runs["fsdp"] / f"held-{rank}.json").read_text())
        for what, times in (("parameters", 1), ("optimizer", 2)):
            local, whole = held[what]
            assert whole == times * parameters
            assert 0.4 < local / whole < 0.6, (what, rank)


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp"])
@pytest.mark.parametrize("folder", ["final", "checkpoint-2"])
def test_saved_folders_load_in_plain_transformers_with_equal_logits(kind, folder, runs):
    model, info = AutoModelForImageTextToText.from_pretrained(
        runs[kind] / folder, output_loading_info=True
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys"))
    trained = torch.load(runs["one"] / "logits.pt")
    if (kind, folder) == ("one", "final"):
        assert torch.equal(logits_of(model), trained)
    elif folder == "final":
        torch.testing.assert_close(logits_of(model), trained, rtol=1e-4, atol=1e-4)
    else:
        assert not torch.allclose(logits_of(model), trained, atol=1e-5), "an earlier state"


def test_a_frozen_tower_stays_frozen_when_sharded_and_sft_is_the_same_run_too(model, tmp_path):
    words = ["--model", model, *RUN[-2:], "--rows_per_update", 4, "--rows_per_forward", 1]
    words += ["--max_steps", 3, "--freeze", "vision", "--eval_rows", 6]
    run(*words, output_dir=tmp_path / "one", stage="sft")
    fsdp = tmp_path / "fsdp"
    launch(*words, "--output_dir", fsdp, processes=2, config="fsdp", script="sft.py")
    assert_same_run(tmp_path / "one", fsdp)
    before, after = (
        load_file(f"{model}/model.safetensors"),
        load_file(fsdp / "final/model.safetensors"),
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "visual" not in name}


def interrupted(folder: Path, to: Path) -> Path:
    """The run as if it had been killed after checkpoint-2."""
    shutil.copytree(folder, to)
    shutil.rmtree(to / "final")
    return to


def test_a_run_of_two_processes_is_resumed_by_one(runs, tmp_path):
    folder = interrupted(runs["ddp"], tmp_path / "run")
    assert "checkpoint-2" in run("--resume", output_dir=folder)
    assert_same_run(folder, runs["one"])


def test_a_run_of_one_process_is_resumed_by_two_that_share_the_model(runs, tmp_path):
    folder = interrupted(runs["one"], tmp_path / "run")
    launch("--resume", "--output_dir", folder, processes=2, config="fsdp")
    assert_same_run(folder, runs["one"])


def test_two_machines_give_the_run_of_one(model, runs, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    where = ["--main_process_ip", "127.0.0.2", "--main_process_port", str(port)]
    machines = []
    for rank in range(2):
        command = launch_command(
            "--model", model, *RUN, "--output_dir", tmp_path / "run",
            processes=2, config="fsdp_multinode", more=[*where, "--machine_rank", str(rank)],
        )  # fmt: skip
        pipe = subprocess.PIPE
        machine = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=pipe, stderr=pipe, text=True)
        machines.append(machine)
    said = [machine.communicate(timeout=180) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "2 process(es)" in said[0][0] and said[1][0] == "", "the first machine speaks for both"
    assert_same_run(tmp_path / "run", runs["one"])


def test_what_cannot_be_divided_among_the_processes_is_said_once(model, tmp_path):
    words = ["--model", model, "--prompts_per_update", 3, "--output_dir", tmp_path / "run"]
    command = launch_command(*words, processes=2)
    done = subprocess.run(command, cwd=ROOT, env=ENV, text=True, capture_output=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("grpo.py: error: ") == 1
    assert done.stderr.startswith(
        "grpo.py: error: --prompts_per_update must be a multiple of the 2"
    )
