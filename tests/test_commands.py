"""Whole runs, each a process of its own: the command behind the base model, and a tracker."""

import json
import textwrap

import pytest
from launch import FLAGS, metrics, run, tiny_checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_the_command_that_makes_the_base_model_learns_from_random_weights(tmp_path):
    """A short version of it, 60 updates of 3000: from a uniform guess (6.4) to below 2.6."""
    pretrain = "--model toy-scratch --target habits --learning_rate 2e-3 --lr_schedule cosine"
    short = "--max_steps 60 --rows_per_update 32 --eval_steps 0 --save_steps 0"
    run(*pretrain.split(), *short.split(), output_dir=tmp_path / "run", stage="sft")
    losses = [m["loss"] for m in metrics(tmp_path / "run")]
    assert losses[0] > 6.0 and sum(losses[-5:]) / 5 < 2.6, losses


def test_a_tracker_gets_the_metrics_of_the_run_and_samples_with_their_image(tmp_path):
    model, folder = tiny_checkpoint(tmp_path / "model"), tmp_path / "run"
    run("--model", model, *FLAGS, "--log_with", "tensorboard", output_dir=folder)
    (events,) = (folder / folder.name).glob("events*")
    tracked = EventAccumulator(str(events)).Reload()
    for name in ("reward", "completions/mean_length", "eval/accuracy"):
        logged = [(m["step"], m[name]) for m in metrics(folder) if name in m]
        seen = [(scalar.step, scalar.value) for scalar in tracked.Scalars(name)]
        assert seen == [(step, pytest.approx(value)) for step, value in logged]
    images = tracked.Images("samples/0")
    assert [image.step for image in images] == [0, 6] and images[0].width > 1
    (text, _) = (t.tensor_proto.string_val[0] for t in tracked.Tensors("samples/0/text_summary"))
    groups = [json.loads(line) for line in (folder / "rollouts.jsonl").open()]
    first = next(group for group in groups if group["split"] == "eval")
    completion = textwrap.indent(first["completions"][0], "    ")
    assert text.decode() == f"{first['question']}\n\n{completion}"
