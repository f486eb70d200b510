"""docs/grpo.md: its worked example is what the code computes, and its diffs apply and train."""

import json
import re
import shutil
import subprocess
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from launch import FLAGS, run, tiny_checkpoint

from core.user_rewards import load_rewards
from docs.worked_example import build, replaced

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "grpo.md").read_text()
DIFFS = {path.stem: path for path in sorted((ROOT / "docs" / "diffs").glob("*.diff"))}
FLAGS_OF = {  # as the page names them
    "dynamic-sampling": "--prompts_per_update 8",
    "rloo": "--scale_rewards rloo --loss_type dr_grpo",
    "kl-in-reward": "--beta 0.04 --scale_rewards none",
    "kl-k2": "--beta 0.04",
    "no-baseline": "",
    "truncated-importance-sampling": "--precision bf16",
    "no-clip": "--num_iterations 2 --epsilon 0.001",  # small, so that three updates meet the clip
}
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def test_the_worked_example_is_what_the_code_computes():
    blocks, _ = build()
    fresh = replaced(PAGE, blocks)
    assert NUMBER.sub("#", fresh) == NUMBER.sub("#", PAGE)
    stated, computed = (list(map(float, NUMBER.findall(text))) for text in (PAGE, fresh))
    # another processor rounds differently, and four updates by AdamW enlarge the difference
    assert computed == pytest.approx(stated, rel=0.05, abs=0.02)


def test_a_page_without_a_marker_is_refused():
    with pytest.raises(ValueError, match="no place for group"):
        replaced("<!-- question -->\n<!-- end -->\n", {"question": "?", "group": "|"})


def test_the_page_shows_every_diff_as_its_file_has_it():
    shown = re.findall(r"^```diff\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert sorted(shown) == sorted(path.read_text() for path in DIFFS.values())
    named = re.findall(r"`([\w-]+)\.diff`", PAGE)
    assert sorted(named) == sorted(DIFFS) == sorted(FLAGS_OF)


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_changes_at_most_ten_lines(name):
    changed = re.findall(r"^[-+](?![-+])", DIFFS[name].read_text(), re.MULTILINE)
    assert 0 < len(changed) <= 10


def patched(name: str, folder: Path) -> str:
    """The source of grpo.py with the diff applied."""
    shutil.copy(ROOT / "grpo.py", folder)
    argv = ["patch", "--quiet", "--fuzz=0", "grpo.py", str(DIFFS[name])]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    if done.returncode and is_edited("grpo.py"):
        pytest.skip("grpo.py is edited where this diff applies")
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "grpo.py").read_text()


def is_edited(file: str) -> bool:
    """Whether a reader has changed this file since the last commit."""
    return subprocess.run(["git", "diff", "--quiet", "HEAD", "--", file], cwd=ROOT).returncode == 1


def module_of(source: str) -> types.ModuleType:
    """grpo.py with this source."""
    module = types.ModuleType("patched_grpo")
    exec_in(source, module)
    return module


def exec_in(source: str, module: types.ModuleType) -> None:
    exec(compile(source, "grpo.py", "exec"), vars(module))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", DIFFS)
def test_training_with_a_diff_differs_from_training_without(name, checkpoint, tmp_path):
    source = patched(name, tmp_path)
    flags = [*FLAGS, "--model", checkpoint, *FLAGS_OF[name].split()]
    flags += "--max_steps 4 --eval_steps 0 --save_steps 0".split()
    changed = partial(exec_in, source)
    run(*flags, output_dir=tmp_path / "with", patch=changed)
    flags = [flag.replace("rloo", "none") for flag in flags]  # a value that the diff adds
    run(*flags, output_dir=tmp_path / "without")
    lines = [
        [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").open()]
        for folder in ("with", "without")
    ]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4]
    assert not any(line["skipped_updates"] for line in lines[0])
    if is_edited("grpo.py"):
        pytest.skip("the edit of grpo.py may have replaced what the diff changes")
    # rloo is off by a constant factor, which AdamW removes from the update but not from the norm
    assert lines[0][-1]["grad_norm"] != pytest.approx(lines[1][-1]["grad_norm"], rel=1e-3)


def test_rloo_compares_with_the_mean_of_the_others_by_hand(tmp_path):
    advantages = module_of(patched("rloo", tmp_path)).compute_advantages
    rewards = torch.tensor([[2.0, 0.0, 1.0, 1.0]])
    expected = torch.tensor([[2 - 2 / 3, 0 - 4 / 3, 1 - 3 / 3, 1 - 3 / 3]])
    torch.testing.assert_close(advantages(rewards, "rloo"), expected)


def test_k2_is_half_the_square_by_hand(tmp_path):
    loss = module_of(patched("kl-k2", tmp_path)).grpo_loss
    logps, ref, one = torch.zeros(1, 1), torch.full((1, 1), 0.6), torch.ones(1, 1)
    _, stats = loss(logps, logps, ref, torch.zeros(1), one, beta=1.0, epsilon=0.2)
    assert stats["kl"] == pytest.approx(0.6**2 / 2)


def test_example_rewards_by_hand():
    path = ROOT / "docs" / "own_rewards.py"
    names = [f"{path}:brevity", f"{path}:no_repetition"]
    brevity, no_repetition = load_rewards(names).values()
    assert brevity("so red circle.", {}) == pytest.approx(-0.06)
    assert no_repetition("one two", {}) == 0
    assert no_repetition("a b c d", {}) == 0
    assert no_repetition("a b c a b c", {}) == pytest.approx(3 / 4 - 1)  # abc bca cab abc
