"""One process and many give the same run: data parallel, sharded, on several machines.

The runs are launched as a user does, with `accelerate launch` and the files of configs/, on CPUs
over gloo.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from launch import ENV, FLAGS, ROOT, end, launch, metrics, read_lines, run, start, tiny_checkpoint
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from core.options import UserError
from core.processes import start_accelerator
from grpo import GRPOOptions

RUN = [*FLAGS, "--max_steps", 3, "--beta", 0.04, "--prompts_per_forward", 1, "--eval_rows", 6]
RUN += ["--learning_rate", 1e-4]  # Adam makes a step of a rounding error where the gradient is 0
COMPARED = ("loss", "grad_norm", "kl", "entropy", "reward", "reward_std", "eval/completion_length")

# A stage that also writes down what each rank sees
WATCHED = """
import json, sys, time
sys.path.insert(0, {root!r})
import core.checkpoint, core.processes, {stage} as stage

seen, slow = dict(is_fsdp2=[], dtypes=[], norms=[]), {slow}

def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

def held(tensors):
    tensors = [t for t in tensors if t.dim()]
    return [sum(local(t).numel() for t in tensors), sum(t.numel() for t in tensors)]

def compute(policy, batches, third, accelerator, compute=stage.compute_gradients):
    def watched(loss):
        backward(loss)
        gradients = [local(p.grad) for p in policy.parameters() if p.grad is not None]
        norms.append(sum(float(grad.square().sum()) for grad in gradients))

    time.sleep(slow / 4)
    backward, norms, accelerator.backward = accelerator.backward, [], watched
    hook = policy.register_forward_hook(lambda *args: seen["dtypes"].append(str(args[2][0].dtype)))
    measured = compute(policy, batches, third, accelerator)
    hook.remove()
    accelerator.backward = backward
    seen["norms"].append(norms)
    seen["is_fsdp2"].append(accelerator.is_fsdp2)
    return measured

def save_model(policy, processor, options, accelerator, name, optimizer=None):
    if optimizer:
        state = [t for of in optimizer.optimizer.state.values() for t in of.values()]
        seen.update(parameters=held(policy.parameters()), optimizer=held(state))
    with open(f"{{options.output_dir}}/rank-{{accelerator.process_index}}.json", "w") as file:
        json.dump(seen, file)
    core.checkpoint.save_model(policy, processor, options, accelerator, name, optimizer)

def save_policy(*rest, save_policy=core.checkpoint.save_policy):
    time.sleep(slow)
    save_policy(*rest)

stage.compute_gradients, stage.save_model = compute, save_model
core.checkpoint.save_policy = save_policy
core.processes.launch(stage.main)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def watched(folder: Path, stage: str = "grpo", slow: float = 0) -> str:
    """The path of a script that watches a stage. `slow` are the seconds that a save takes."""
    script = folder / f"{stage}.py"
    script.write_text(WATCHED.format(root=str(ROOT), stage=stage, slow=slow))
    return str(script)


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory) -> dict[str, Path]:
    """The same three updates by 1 process, by 2 and by 2 that share the model."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["--model", model, *RUN, "--output_dir"]
    run(*words[:-1], output_dir=folder / "one")
    launch(*words, folder / "ddp", processes=2, script=watched(folder))
    launch(*words, folder / "fsdp", processes=2, config="fsdp", script=watched(folder))
    return {name: folder / name for name in ("one", "ddp", "fsdp")}


def ranks(folder: Path) -> list[dict]:
    return [read_lines(folder / f"rank-{rank}.json")[0] for rank in range(2)]


def assert_same_metrics(one: Path, other: Path, names=COMPARED, tolerance: float = 1e-5) -> None:
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for name in names:
            expected = pytest.approx(b.get(name, 0), rel=tolerance, abs=tolerance)
            assert a.get(name, 0) == expected, (name, a, b)


def assert_same_run(one: Path, other: Path, names=COMPARED) -> None:
    assert_same_metrics(one, other, names)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_give_the_run_of_one(kind, runs):
    assert all(m["grad_norm"] > 0.1 for m in metrics(runs["one"])[1:]), "something is trained"
    assert_same_run(runs["one"], runs[kind])
    assert_same_metrics(runs["one"], runs[kind], ("loss", "grad_norm"), tolerance=1e-6)
    assert '"processes": 2' in (runs[kind] / "config.json").read_text()


def test_accelerate_knows_after_prepare_that_a_run_on_cpus_is_sharded(runs):
    for kind in ("ddp", "fsdp"):
        assert [rank["is_fsdp2"] for rank in ranks(runs[kind])] == [[kind == "fsdp"] * 3] * 2


def test_gradients_are_not_reduced_before_the_last_micro_batch(runs):
    for first, second in zip(*(rank["norms"] for rank in ranks(runs["ddp"])), strict=True):
        assert first[0] != pytest.approx(second[0], rel=1e-3), "each rank has its own"
        assert first[1] == pytest.approx(second[1], rel=1e-6), "both have the sum"
    for rank in ranks(runs["fsdp"]):
        assert all(before == 0 < after for before, after in rank["norms"]), "shards, at the end"


def test_each_rank_holds_half_of_a_sharded_model_and_of_its_optimizer_state(runs):
    parameters = sum(t.numel() for t in load_file(runs["one"] / "final/model.safetensors").values())
    for rank in ranks(runs["fsdp"]):
        for what, times in (("parameters", 1), ("optimizer", 2)):
            local, whole = rank[what]
            assert whole == times * parameters and 0.4 < local / whole < 0.6


def test_sharded_bf16_is_one_process_in_fp32_up_to_bf16_s_error(model, tmp_path):
    # sft, because a token that is sampled in bf16 depends on the size of the batch
    words = ["--model", model, *RUN[-2:], "--rows_per_update", 4, "--rows_per_forward", 1]
    words += ["--max_steps", 3, "--eval_steps", 0, "--precision"]
    one, fsdp, script = tmp_path / "one", tmp_path / "fsdp", watched(tmp_path, "sft")
    run(*words, "fp32", output_dir=one, stage="sft")
    launch(*words, "bf16", "--output_dir", fsdp, processes=2, config="fsdp", script=script)
    assert '"mixed_precision": "bf16"' in (fsdp / "config.json").read_text()
    # A number in bf16 has 8 bits, so a rounding changes it by at most 2^-8. The loss is a float32
    # mean over the tokens' log-probabilities, whose errors average out to less than one rounding.
    assert_same_metrics(one, fsdp, ["loss"], tolerance=2**-8)
    # A gradient has passed about 80 roundings in series (5 layers, forward and backward). They add
    # up like a random walk: sqrt(80 / 3) * 2^-8 = 2 % of an element, and less in the norm. Over 3
    # seeds and 3 updates its error was 1.2 % (root mean square), with one process as with two.
    # 3 % is two and a half times that.
    assert_same_metrics(one, fsdp, ["grad_norm"], tolerance=0.03)
    assert {kind for rank in ranks(fsdp) for kind in rank["dtypes"]} == {"torch.float32"}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_several_processes_save_loads_in_plain_transformers(kind, runs):
    for folder in ("final", "best", "checkpoint-2"):
        _, report = AutoModelForImageTextToText.from_pretrained(
            runs[kind] / folder, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]


def test_a_process_whose_groups_have_no_signal_keeps_up_with_the_others(model, runs, tmp_path):
    # only the first two groups of each update, which rank 0 samples, can earn anything
    paid = {line["id"] for line in read_lines(runs["one"] / "rollouts.jsonl")}
    (tmp_path / "mine.py").write_text(
        f"def reward(completion, row):\n    return len(completion) * (row['id'] in {paid})\n"
    )
    words = ["--model", model, *RUN, "--beta", 0, "--rewards", f"{tmp_path / 'mine.py'}:reward"]
    run(*words, output_dir=tmp_path / "one")
    launch(*words, "--output_dir", tmp_path / "fsdp", processes=2, config="fsdp")
    assert all(m["frac_reward_zero_std"] >= 0.5 for m in metrics(tmp_path / "fsdp")[1:])
    # not the entropy: rank 1 measures it on a group that one process leaves out
    assert_same_run(tmp_path / "one", tmp_path / "fsdp", set(COMPARED) - {"entropy"})


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_rows_with_and_without_an_image_are_trained_on_by_two_processes_as_by_one(
    kind, model, tmp_path
):
    Image.effect_noise((60, 60), 60).convert("RGB").save(tmp_path / "a.png")
    rows = [{"question": f"What is {n}?", "answer": "left"} for n in range(16)]
    rows = [row | ({"image": "a.png"} if n % 2 else {}) for n, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--model", model, *RUN, "--dataset", tmp_path / "rows.jsonl", "--recipe", "toy"]
    words += ["--eval_steps", 0]
    run(*words, output_dir=tmp_path / "one")
    launch(*words, "--output_dir", tmp_path / kind, processes=2, config=kind)
    assert_same_run(tmp_path / "one", tmp_path / kind)


def test_a_frozen_tower_stays_frozen_when_sharded_and_sft_is_the_same_run_too(model, tmp_path):
    words = ["--model", model, *RUN[-2:], "--rows_per_update", 4, "--rows_per_forward", 1]
    words += ["--max_steps", 3, "--freeze", "vision", "--eval_rows", 6]
    run(*words, output_dir=tmp_path / "one", stage="sft")
    fsdp = tmp_path / "fsdp"
    launch(*words, "--output_dir", fsdp, processes=2, config="fsdp", script="sft.py")
    assert_same_run(tmp_path / "one", fsdp)
    before = load_file(f"{model}/model.safetensors")
    after = load_file(fsdp / "final/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "visual" not in name}


# --- resumed, stopped and ended ------------------------------------------------------------------


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


@pytest.mark.parametrize("timeout", [600, 1])
def test_ctrl_c_waits_for_a_slow_save_of_two_processes_if_there_is_time(
    timeout, model, runs, tmp_path
):
    folder, script = tmp_path / "run", watched(tmp_path, slow=4)
    words = ["--model", model, *RUN, "--save_steps", 0, "--output_dir", folder]
    env = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(timeout)}
    process = start(*words, processes=2, script=script, env=env)
    log, ends = folder / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and '"loss"' in log.read_text()):
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    code, _, said = end(process)
    done = len(metrics(folder)) - 1
    assert code != 0 and said.count("finishing this update") == 1
    saved = [folder / f"checkpoint-{done}"] if timeout == 600 else []
    assert 0 < done < 3 and sorted(folder.glob("checkpoint-*")) == saved
    run("--resume", output_dir=folder)
    assert_same_run(folder, runs["one"])


def test_three_runs_of_two_processes_beside_another_job_end_with_code_0():
    words = [sys.executable, "benchmarks/runs_end.py", "--runs", "3", "--load", "1"]
    done = subprocess.run(words, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and "3 x exit code 0" in done.stdout, done.stdout + done.stderr


def test_a_run_with_a_tracker_ends_without_destroying_the_process_group_too_early(model, tmp_path):
    words = ["--model", model, *FLAGS, "--max_steps", 1, "--eval_steps", 0]
    words += ["--log_with", "tensorboard", "--output_dir", tmp_path / "run"]
    assert "saved in" in launch(*words, processes=2)


def test_a_rank_that_fails_ends_all_ranks_and_says_why_in_one_line(model, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n\ndef reward(completion, row):\n    return [1.0, None][int(os.environ['RANK'])]"
    )
    words = ["--model", model, *FLAGS, "--rewards", f"{tmp_path / 'mine.py'}:reward"]
    code, _, err = end(start(*words, "--output_dir", tmp_path / "run", processes=2))
    (line,) = [line for line in err.splitlines() if "error: the reward" in line]
    assert code == 1 and "rank 1: grpo.py: error: the reward" in line and "returned None" in line
    assert "[rank0]: Traceback" not in err, "it lost its partner, which is not the cause"


def test_what_cannot_be_divided_among_the_processes_is_said_once(model, tmp_path):
    words = ["--model", model, "--prompts_per_update", 3, "--output_dir", tmp_path / "run"]
    code, _, err = end(start(*words, processes=2))
    assert code == 1 and err.count("grpo.py: error: ") == 1
    assert "--prompts_per_update 3 must be a multiple of the 2 processes" in err


def test_a_launch_that_accelerate_did_not_notice_is_refused(monkeypatch):
    Accelerator(cpu=True)  # one process, whatever was launched
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched but accelerate runs 1"):
        start_accelerator(GRPOOptions())


def test_a_mac_trains_on_all_cores_of_its_cpu():
    """MPS has no float64, and macOS cannot say which cores a process may use."""
    code = """if True:
        import os, torch
        from core.processes import start_accelerator
        from grpo import GRPOOptions
        torch.accelerator.is_available = torch.backends.mps.is_available = lambda: True
        del os.sched_getaffinity
        torch.set_num_threads(1)
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # from `accelerate launch`
        accelerator = start_accelerator(GRPOOptions())
        print(accelerator.device.type, accelerator.mixed_precision)
        print(torch.get_num_threads() == os.cpu_count())
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["cpu", "no", "True"], done.stderr


def test_two_machines_give_the_run_of_one(model, runs, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    where = ["--main_process_ip", "127.0.0.2", "--main_process_port", str(port)]
    words = ["--model", model, *RUN, "--output_dir", tmp_path / "run"]
    machines = [
        start(*words, processes=2, config="fsdp_multinode", more=[*where, "--machine_rank", rank])
        for rank in "01"
    ]
    ends = [end(machine) for machine in machines]
    assert [code for code, *_ in ends] == [0, 0], ends
    assert "saved in" in ends[0][1] and ends[1][1] == "", "the first machine speaks for both"
    assert_same_run(tmp_path / "run", runs["one"])
