"""Flags: their ranges, recipes and files, and how mistakes are answered."""

import dataclasses
import json
import math
import typing

import pytest
import yaml
from accelerate.state import AcceleratorState

import grpo
import sft
from core.options import UserError, parse_options
from core.processes import launch
from grpo import GRPOOptions
from sft import SFTOptions
from toy.world import ToyRows

STAGES = {"grpo.py": GRPOOptions, "sft.py": SFTOptions}
FIELDS = {prog: dataclasses.fields(options) for prog, options in STAGES.items()}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, and `sys.argv` names the stage."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["grpo.py"])


def parse(*words, options=GRPOOptions):
    return parse_options(options, argv=list(map(str, words)))


def refused(capsys, *words, options=GRPOOptions) -> str:
    """The one line that answers these words. The exit code is 2 and no folder was made."""
    with pytest.raises(SystemExit) as stopped:
        parse(*words, options=options)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1 and ": error: " in line
    return line


# --- recipes and files ---------------------------------------------------------------------------


def test_the_recipe_is_the_toys_for_a_toy_model_or_dataset_and_else_the_papers():
    for words in ([], ["--model", "toy", "--dataset", "sat"], ["--model", "Qwen/Qwen2-VL-2B"]):
        options = parse(*words)
        assert (options.recipe, options.learning_rate, options.max_steps) == ("toy", 1.2e-4, 230)
    options = parse("--dataset", "sat")
    assert (options.recipe, options.learning_rate, options.max_steps) == ("paper", 1e-6, 1500)
    assert (options.model, options.beta, options.seed) == ("Qwen/Qwen2-VL-2B", 0.04, 42)
    assert parse("--dataset", "sat", "--beta", 0, "--seed", 1).beta == 0, "flags win"
    given = parse("--recipe", "paper")
    assert given.lr_schedule == "linear"
    assert given.recipe_reason == "given by a flag or a config file"


def test_sft_makes_the_papers_two_passes_over_sat_unless_a_flag_says_otherwise(tmp_path):
    options = parse("--dataset", "sat", options=SFTOptions)
    assert options.max_steps * options.rows_per_update == 2 * 15_000
    options = parse("--dataset", "sat", "--max_steps", 100, options=SFTOptions)
    assert (options.max_steps, options.epochs) == (100, None), "epochs would win over max_steps"
    (tmp_path / "run.yaml").write_text("epochs: 2\n")
    words = ["--config", tmp_path / "run.yaml"]
    assert parse(*words, options=SFTOptions).epochs == 2
    assert parse(*words, "--max_steps", 100, options=SFTOptions).epochs is None


def test_a_reward_of_ones_own_may_import_a_module_beside_it(tmp_path):
    (tmp_path / "words_of_mine.py").write_text("WORD = 'left'")
    (tmp_path / "mine.py").write_text("""
from words_of_mine import WORD
def said(completion, row): return WORD in completion
""")
    name = f"{tmp_path}/mine.py:said"
    assert parse("--rewards", name).functions[name]("so left", {}) is True


def test_a_reward_that_is_given_twice_is_refused(capsys):
    assert "accuracy is given twice" in refused(capsys, "--rewards", "accuracy", "accuracy")


def test_the_recipe_is_inherited_from_the_run_that_made_the_model_folder(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final/run_config.json").write_text(json.dumps({"recipe": "toy"}))
    options = parse("--model", tmp_path / "final", "--dataset", "mine.jsonl")
    assert options.recipe == "toy" and "final" in options.recipe_reason
    (tmp_path / "final/run_config.json").write_text(json.dumps({"recipe": "paper"}))
    assert parse("--model", tmp_path / "final", "--dataset", "mine.jsonl").recipe == "paper"
    assert parse("--model", tmp_path / "final", "--recipe", "toy").recipe == "toy"


def test_a_yaml_file_gives_flags_and_the_command_line_overrides_it(tmp_path, capsys):
    given = {"max-steps": 7, "rewards": ["accuracy", "length"], "epsilon": None, "resume": True}
    (tmp_path / "run.yaml").write_text(yaml.dump(given))
    options = parse("--config", tmp_path / "run.yaml", "--rewards", "format")
    assert (options.max_steps, options.rewards, options.resume) == (7, ["format"], True)
    (tmp_path / "run.yaml").write_text("max_stepz: 7")
    line = refused(capsys, "--config", tmp_path / "run.yaml")
    assert "run.yaml: unknown option max_stepz" in line and "Did you mean --max_steps" in line
    (tmp_path / "run.yaml").write_text("max_steps: many")
    assert "run.yaml: argument --max_steps" in refused(capsys, "--config", tmp_path / "run.yaml")
    assert "none.yaml" in refused(capsys, "--config", "none.yaml")
    for content in (b"\xff\xfe\x00", b"seed: 2024-13-45"):  # no text; a date that does not exist
        (tmp_path / "run.yaml").write_bytes(content)
        assert "config file" in refused(capsys, "--config", tmp_path / "run.yaml")
    assert parse("--reward_weights", "-1e-5", 1).reward_weights == [-1e-5, 1]
    assert parse("--log_with", "None", "--epsilon", "None").log_with is None


def test_the_config_json_of_a_run_gives_its_options_but_not_its_folder(tmp_path):
    words = "--dataset sat --loss_type dapo --output_dir old --overwrite"
    first = parse(*words.split())
    record = dataclasses.asdict(first) | {"versions": {"torch": "2"}, "processes": 4}
    (tmp_path / "config.json").write_text(json.dumps(record))
    again = parse("--config", tmp_path / "config.json", "--seed", 3)
    expected = {"seed": 3, "config": str(tmp_path / "config.json"), "overwrite": False}
    expected |= {"output_dir": "outputs/grpo-sat"}
    assert dataclasses.asdict(again) == dataclasses.asdict(first) | expected


# --- spelling ------------------------------------------------------------------------------------


def test_dashes_are_underscores():
    assert parse("--max-steps", 3, "--num-generations=4") == parse(
        "--max_steps", 3, "--num_generations=4"
    )


@pytest.mark.parametrize("stage", STAGES.values())
@pytest.mark.parametrize(
    "typed, valid",
    [
        (["--max_stepz", 3], "Did you mean --max_steps"),
        (["--max_step", 3], "Did you mean --max_steps"),  # no abbreviations
        (["--lr", 1e-4], "Did you mean --learning_rate?"),
        (["--num-train-epochs=2"], "--max_steps, in sft.py --epochs?"),
        (["--per_device_train_batch_size", 4], "--prompts_per_update, in sft.py --rows_per_upd"),
        (["--report_to", "wandb"], "Did you mean --log_with?"),
        (["--lr_scheduler_type", "cosine"], "Did you mean --lr_schedule?"),
        (["--max_new_tokens", 9], "Did you mean --max_completion_length?"),
        (["--resume_from_checkpoint"], "Did you mean --resume?"),
        (["sat"], "unknown option sat. See --help"),
    ],
)
def test_an_unknown_option_names_ours_also_for_hugging_face_spellings(typed, valid, stage, capsys):
    assert valid in refused(capsys, *typed, options=stage)


# --- ranges --------------------------------------------------------------------------------------


def numbers(prog: str):
    """(name, limits, number type) of every numeric flag of a stage."""
    hints = typing.get_type_hints(STAGES[prog])
    for field in FIELDS[prog]:
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        if kind := kinds & {int, float}:
            yield field.name, field.metadata["limits"], kind.pop()


@pytest.mark.parametrize("prog", STAGES)
def test_every_numeric_flag_has_a_range_and_refuses_what_is_outside(prog, capsys):
    for name, limits, kind in numbers(prog):
        outside = {"ge": -1, "gt": 0, "le": 1, "lt": 0}
        wrong = [bound + min(0, outside[limit]) for limit, bound in limits.items() if limit != "le"]
        wrong += [limits["le"] + 1] if "le" in limits else []
        assert any(limit in limits for limit in ("ge", "gt")) or name == "reward_weights", name
        for value in wrong + [math.nan, math.inf] * (kind is float):
            line = refused(capsys, f"--{name}={value}", options=STAGES[prog])
            assert f"argument --{name}: must be" in line, (name, value)


@pytest.mark.parametrize(
    "words",
    "--max_grad_norm -1, --save_total_limit -1, --eval_steps -1, --log_groups -1, --subset -1, "
    "--learning_rate -1, --learning_rate nan, --warmup_ratio 3, --beta -1, --epsilon -0.5, "
    "--num_generations 1, --max_steps 0, --max_steps many, --seed -1, --temperature 0, "
    "--loss_type ppo, --prompt_style poem, --rewards speed, --rewards none.py:f, "
    "--reward_weights 1 2 3".split(", "),
)
def test_a_value_that_cannot_work_is_refused_before_any_folder_is_made(words, capsys, tmp_path):
    assert words.split()[0] in refused(capsys, *words.split())
    assert not list(tmp_path.iterdir())


# --- help and exit codes -------------------------------------------------------------------------


@pytest.mark.parametrize("prog", STAGES)
def test_help_lists_each_flag_once_in_groups_with_the_values_of_both_recipes(prog, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help", options=STAGES[prog])
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    assert stopped.value.code == 0 and "model and data:" in text and "optimization:" in text
    for field in FIELDS[prog]:
        assert printed.count(f"\n  --{field.name} ") == 1, field.name
    for field in FIELDS[prog]:
        toy, paper = field.metadata["toy"], field.metadata["paper"]
        assert toy == paper or f"[toy {toy}, paper {paper}]".lower() in text.lower(), field.name


def ended(main, monkeypatch, *words) -> int:
    """The exit code of a stage that is run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("sys.argv", ["grpo.py", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        launch(main)
    return stopped.value.code


@pytest.mark.parametrize(
    "words, code, says",
    [
        (["--max_stepz", 3], 2, "Did you mean --max_steps"),
        (["--dataset", "none.parquet"], 1, "none.parquet"),
        (["--model", "no/such/folder"], 1, "no/such/folder"),
        (["--model", "bert"], 1, "is a bert model. Valid: qwen2_vl"),
        (["--log_with", "aim"], 1, "--log_with aim is not installed"),
        (["--output_dir", "run"], 1, "run already holds a run"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code(words, code, says, tmp_path, monkeypatch, capfd):
    for folder, model_type in (("bert", "bert"), ("run", "qwen2_vl")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert ended(grpo.main, monkeypatch, *words) == code
    out, err = capfd.readouterr()
    assert err.startswith("grpo.py: error: ") and says in err and err.count("\n") == 1, err
    assert not (tmp_path / "outputs").exists() and "Traceback" not in out + err


def test_every_other_exception_keeps_its_traceback(monkeypatch):
    def edited_badly(self, index):
        raise KeyError("colour")

    monkeypatch.setattr(ToyRows, "__getitem__", edited_badly)
    monkeypatch.setattr("sys.argv", ["sft.py"])
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(KeyError, match="colour") as error:
        launch(sft.main)
    assert error.traceback[-1].name == "edited_badly"


def test_a_user_error_ends_the_process_with_code_1(monkeypatch, capsys):
    def main():
        raise UserError("the row 7\nis empty: delete it")

    assert ended(main, monkeypatch) == 1
    assert capsys.readouterr().err == "grpo.py: error: the row 7 is empty: delete it\n"
