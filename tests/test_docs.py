"""What the pages say about the code is true: links, files, names, flags, commands, tables."""

import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from launch import read_lines, run, tiny_checkpoint

import report
from benchmarks import ablations
from benchmarks.readme import TABLES
from core.options import parse_options
from eval_cvbench import EvalOptions
from grpo import GRPOOptions
from rewards import accuracy_reward
from sft import SFTOptions
from toy.world import TASKS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks" / "README.md"]
STAGES = {"grpo": GRPOOptions, "sft": SFTOptions, "eval_cvbench": EvalOptions}
WITH_COMMANDS = [*PAGES, *(ROOT / f"{stage}.py" for stage in (*STAGES, "report"))]
SCRIPTS = [ROOT / "report.py", ROOT / "toy" / "base_model.py", *ROOT.glob("benchmarks/*.py")]
OF_OTHER_TOOLS = set(  # accelerate launch, pip, git
    "--config_file --num_processes --num_machines --machine_rank --main_process_ip "
    "--main_process_port --mixed_precision --quiet --cpu --multi_gpu --requirement --help".split()
)
WRITTEN = set(  # by a run, an evaluation or the reader
    "config.json metrics.jsonl rollouts.jsonl responses.jsonl scores.json eval_config.json "
    "run_config.json report.html report.png mine.py run.yaml my.jsonl train.jsonl "
    "test.jsonl traces.jsonl".split()
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(page: Path, kind: str = "") -> str:
    return re.sub(rf"^```{kind}.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def in_backticks(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_code(page))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_and_pictures_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if not target.startswith(("http:", "https:")):
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


@each_page
def test_files_that_are_named_exist(page):
    file = re.compile(r"[\w./-]+\.(py|md|jsonl?|ya?ml|html|png|diff)")
    files = [name for name in in_backticks(page) if file.fullmatch(name)]
    ours = [n for n in files if n not in WRITTEN and not n.startswith(("outputs/", "path/to/"))]
    places = (ROOT, page.parent, ROOT / "docs" / "diffs")
    assert [name for name in ours if not any((place / name).exists() for place in places)] == []


@each_page
def test_functions_that_are_named_exist(page):
    """`module.name` and `folder.module.name`, with or without brackets."""
    modules = {path.stem for path in ROOT.glob("*.py")}
    modules |= {f"{p.parent.name}.{p.stem}" for p in ROOT.glob("*/*.py")}
    for name in in_backticks(page):
        module, _, attribute = name.removesuffix("()").rpartition(".")
        if module in modules and re.fullmatch(r"\w+", attribute) and attribute != "py":
            assert hasattr(importlib.import_module(module), attribute), name


@each_page
def test_flags_that_are_mentioned_exist(page):
    fields = [field for options in STAGES.values() for field in dataclasses.fields(options)]
    known = {f"--{field.name}" for field in fields} | OF_OTHER_TOOLS
    for script in SCRIPTS:
        known |= set(re.findall(r'add_argument\(\s*"(--\w+)"', script.read_text()))
    mentioned = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", without_code(page, "diff")))
    assert {"--" + flag.replace("-", "_") for flag in mentioned} - known == set()


def commands(path: Path) -> list[str]:
    """The lines of a page or of a stage's docstring that start a Python script."""
    lines = re.sub(r"\\\n\s*", "", path.read_text()).splitlines()
    start = re.compile(r"\s*([A-Z_]+=\S+ )*(accelerate launch|python) ")
    return [line for line in lines if start.match(line)]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_line_parses(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    for line in commands(path):
        words = shlex.split(line, comments=True)
        script = next(i for i, word in enumerate(words) if re.search(r"\.py$|^-m$", word))
        name, argv = Path(words[script]).stem, words[script + 1 :]
        for word in argv:
            if own := re.fullmatch(r"([\w/]+\.py):(\w+)", word):  # a reward of the reader's
                (tmp_path / own[1]).parent.mkdir(exist_ok=True)
                (tmp_path / own[1]).write_text(f"def {own[2]}(completion, row): return 0.0\n")
        if "--config_file" in words[:script]:
            assert (ROOT / words[words.index("--config_file") + 1]).exists(), line
        if name in STAGES:
            parse_options(STAGES[name], argv=argv)  # exits if something is wrong
        elif name == "report":
            with pytest.raises(SystemExit, match="has no metrics.jsonl"):
                report.main(argv)
        else:
            assert words[script] == "-m" or (ROOT / words[script]).exists(), line


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_training_by_several_processes_is_given_time_to_save_after_ctrl_c(path):
    """The launcher kills them after 30 seconds otherwise."""
    several = re.compile(r"configs/(ddp|fsdp)\w*\.yaml .*\b(grpo|sft)\.py")
    for line in filter(several.search, commands(path)):
        before = path.read_text().partition(line)[0]
        assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=" in before + line, line


@each_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    said = re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE)
    assert set(said) <= targets


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1500


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_what_the_kept_results_give(name):
    """A table without results is empty."""
    try:
        table = TABLES[name]()
    except FileNotFoundError:
        table = ""
    pages = "".join(page.read_text() for page in PAGES)
    found = re.findall(rf"<!-- {name} -->\n(.*?)\n?<!-- end -->", pages, re.DOTALL)
    assert found and set(found) == {table}


def test_the_ablations_page_is_what_the_kept_results_give():
    results = json.loads((ablations.KEPT / "results.json").read_text())
    page = (ROOT / "docs" / "ablations.md").read_text()
    assert ablations.insert_results(page, results) == page
    lessons = {name for name, row in ablations.ROWS.items() if "lesson" in row}
    assert lessons <= results.keys()


def test_every_metric_is_explained_and_every_explained_metric_is_written(tmp_path):
    model, folder = tiny_checkpoint(tmp_path / "model"), tmp_path / "run"
    flags = "--max_steps 1 --eval_steps 1 --eval_rows 8 --num_generations 2 --prompts_per_update 2"
    run("--model", model, *flags.split(), "--max_completion_length", 8, output_dir=folder)
    written = {name for line in read_lines(folder / "metrics.jsonl") for name in line} - {"step"}
    of_a_task = {f"eval/{task}": "eval/<task>" for task in TASKS}
    written = {re.sub("^rewards/.*", "rewards/<name>", of_a_task.get(n, n)) for n in written}
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert written == {name for row in rows for name in re.findall("`(.*?)`", row)}


def test_what_counts_as_right_is_what_the_rewards_pay():
    page = (ROOT / "docs" / "data.md").read_text().partition("## What counts as right")[2]
    line = re.compile(r"^\| (.*?) ?\| (.+) \| `(.+)` \| (yes|no) \|$", re.MULTILINE)
    verdicts = []
    for options, answer, said, counts in line.findall(page):
        row = {"options": [text for text in options.split(", ") if text], "answer": answer}
        assert accuracy_reward(f"<answer>{said}</answer>", row) == (counts == "yes"), said
        verdicts.append(counts)
    assert {"yes", "no"} <= set(verdicts)


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    kinds = {".py", ".md", ".yaml", ".yml", ".json", ".jsonl", ".ipynb", ".toml", ".html"}
    files = [*ROOT.glob("*.*"), *ROOT.glob("[!.o]*/**/*.*")]  # not .venv, .git and outputs
    files = [path for path in files if path.suffix in kinds]
    assert len(files) > 50
    absolute = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|Users|mnt|opt)/")
    assert [p.name for p in files if absolute.search(p.read_text(errors="ignore"))] == []
