"""What the documents say of the code is true: flags, names, files, links, diffs, numbers."""

import ast
import dataclasses
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from eval_cvbench import EvalConfig
from grpo import GRPOConfig, compute_advantages, grpo_loss
from sft import SFTConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("benchmarks/*.md")]
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py")]
MODULES = {path.stem for path in ROOT.glob("*.py")}

OTHER_FLAGS = {  # of accelerate launch, pip and git
    *("--config_file", "--num_processes", "--num_machines", "--machine_rank", "--mixed_precision"),
    *(
        "--main_process_ip",
        "--main_process_port",
        "--requirement",
        "--upgrade",
        "--help",
        "--quiet",
    ),
}
WRITTEN = {  # by a run, an evaluation or the reader, so not in the repository
    *("config.json", "metrics.jsonl", "rollouts.jsonl", "responses.jsonl", "scores.json"),
    *("report.html", "report.png", "change.diff"),
}

pytestmark = pytest.mark.parametrize("doc", DOCS, ids=lambda path: str(path.relative_to(ROOT)))


def flags() -> set[str]:
    configs = (GRPOConfig, SFTConfig, EvalConfig)
    names = {f"--{field.name}" for config in configs for field in dataclasses.fields(config)}
    scripts = [ROOT / "report.py", *ROOT.glob("benchmarks/*.py")]
    for script in scripts:
        names |= set(re.findall(r'add_argument\(\s*"(--\w+)"', script.read_text()))
    return names | OTHER_FLAGS


def fenced(doc: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", doc.read_text(), re.DOTALL | re.MULTILINE)


def prose(doc: Path) -> str:
    return re.sub(r"^```.*?^```", "", doc.read_text(), flags=re.DOTALL | re.MULTILINE)


def spans(doc: Path) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", prose(doc))


def test_nothing_is_left_to_fill_in(doc):
    assert re.findall(r"@@\w+@@", doc.read_text()) == []


def test_every_flag_exists(doc):
    text = re.sub(r"^```diff.*?^```", "", doc.read_text(), flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert {flag.replace("-", "_").replace("__", "--", 1) for flag in named} - flags() == set()


def test_every_file_exists(doc):
    suffixes = "py|md|json|jsonl|yaml|yml|toml|html|png|diff"
    files = [s for s in spans(doc) if re.fullmatch(rf"[\w./-]+\.(?:{suffixes})", s)]
    outputs = [s for s in files if s in WRITTEN or s.startswith(("outputs/", "path/to/"))]
    here = {s for s in files if (ROOT / s).exists() or (doc.parent / s).exists()}
    missing = [s for s in files if s not in outputs and s not in here]
    assert missing == []


def test_every_function_and_setting_exists(doc):
    """`module.name`, and any name with an underscore, whether function, field or metric."""
    source = " ".join(path.read_text() for path in SOURCES if path != Path(__file__))
    words = set(re.findall(r"\w+", source))
    missing = []
    for span in spans(doc):
        module, _, rest = span.partition(".")
        if module in MODULES and re.fullmatch(r"\w+(\.\w+)*", rest) and rest != "py":
            thing = importlib.import_module(module)
            for name in rest.split("."):
                thing = getattr(thing, name, None)
            missing += [span] * (thing is None)
        elif re.fullmatch(r"[A-Za-z]+(_\w+)+(\(\))?", span):
            missing += [span] * (span.removesuffix("()") not in words)
    assert missing == []


def test_stated_line_counts_are_true(doc):
    stated = re.findall(r"`([\w/]+\.\w+)` \((\d+) lines\)", doc.read_text())
    counted = [(file, str(len((ROOT / file).read_text().splitlines()))) for file, _ in stated]
    assert stated == counted


def test_links_and_images_lead_somewhere(doc):
    def anchors(path: Path) -> set[str]:
        heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}

    for target in re.findall(r"\]\(([^)\s]+)\)", prose(doc)):
        file, _, anchor = target.partition("#")
        if not re.match(r"https?:", target):
            path = doc.parent / file if file else doc
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_every_diff_applies_to_the_source(doc, tmp_path):
    for number, diff in enumerate(fenced(doc, "diff")):
        copy = tmp_path / str(number)
        copy.mkdir()
        for path in ROOT.glob("*.py"):
            shutil.copy(path, copy)
        argv = ["git", "apply", "--verbose", "-"]
        done = subprocess.run(argv, cwd=copy, input=diff, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (changed,) = re.findall(r"^\+\+\+ b/(\S+)", diff, re.MULTILINE)
        assert (copy / changed).read_text() != (ROOT / changed).read_text()
        ast.parse((copy / changed).read_text())


def table(doc: Path, head: str) -> list[list[str]]:
    """The cells of the table with this first line, or nothing."""
    lines = doc.read_text().splitlines()
    rows = lines[lines.index(head) + 2 :] if head in lines else []
    end = next((i for i, line in enumerate(rows) if not line.startswith("|")), len(rows))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[:end]]


def test_the_worked_example_is_what_the_functions_give(doc):
    group = table(doc, "| g | completion | accuracy | format | reward | advantage |")
    if not group:
        pytest.skip("no worked example here")
    accuracy, form, rewards, stated = torch.tensor([[float(c) for c in row[2:]] for row in group]).T
    assert torch.equal(rewards, accuracy + form)
    advantages = compute_advantages(rewards[None])[0]
    assert torch.allclose(advantages, stated, atol=1e-4)

    tokens = table(doc, "| g | token | old_logp | logp | ratio | loss |")
    pairs: dict[int, list[tuple[float, float]]] = {g: [] for g in range(1, len(group) + 1)}
    for members, _, *numbers in tokens:
        old, new, ratio, loss = map(float, numbers)
        assert abs(ratio - torch.tensor(new - old).exp()) < 1e-3
        for g in map(int, members.split()):
            pairs[g].append((old, new))
            one = torch.tensor([[old]]), torch.tensor([[new]]), advantages[g - 1 : g]
            given, _ = grpo_loss(
                one[1], one[0], None, one[2], torch.ones(1, 1), beta=0, epsilon=0.2
            )
            assert abs(given - loss) < 1.5e-3
    old, new = torch.tensor(list(pairs.values())).unbind(-1)  # (G, 2) both
    mask, text = torch.ones_like(old), " ".join(doc.read_text().split())
    loss, stats = grpo_loss(new, old, None, advantages, mask, beta=0, epsilon=0.2)
    with_kl, _ = grpo_loss(new, old, old, advantages, mask, beta=0.04, epsilon=0.2)
    stopped = round(float(stats["clip_ratio"]) * mask.numel())
    said = re.search(r"these sixteen tokens is \*\*(\S+)\*\*.* and the loss \*\*(\S+)\*\*", text)
    assert torch.allclose(torch.stack([loss, with_kl]), torch.tensor([*map(float, said.groups())]),
                          atol=2e-4)  # fmt: skip
    assert f"stops the gradient of {stopped} of the {mask.numel()}" in text
