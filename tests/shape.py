"""The shape of the code: short files, short functions, and imports that go one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_PRODUCT = 4_530  # lines of the Python files outside tests, benchmarks, docs; the goal is 3 000
MAX_FILE, MAX_FILE_OF = 300, {"grpo.py": 350, "rewards.py": 200}
MAX_FUNCTION, MAX_CLASS = 60, 120
MAX_WIDTH = 100
STAGES = {"grpo", "sft", "eval_cvbench", "report"}

ROOT = Path(__file__).resolve().parent.parent
NOT_PRODUCT = {"tests", "benchmarks", "docs", "outputs"}
PRODUCT = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")])
    if path.relative_to(ROOT).parts[0] not in NOT_PRODUCT
}
each_file = pytest.mark.parametrize("path", PRODUCT.values(), ids=PRODUCT.keys())


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def definitions(path: Path, *kinds: type) -> Iterator[tuple[str, int]]:
    """Name and number of lines, decorators included, of each definition of these kinds."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, kinds):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, node.end_lineno - start + 1


def imports_of(path: Path) -> set[str]:
    """The product's modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & PRODUCT.keys()


@each_file
def test_no_file_is_long(path):
    assert len(lines_of(path)) <= MAX_FILE_OF.get(path.name, MAX_FILE)


def test_the_product_is_short():
    assert sum(len(lines_of(path)) for path in PRODUCT.values()) <= MAX_PRODUCT


@each_file
def test_no_line_is_wide_and_no_two_statements_share_one(path):
    assert [line for line in lines_of(path) if len(line) > MAX_WIDTH] == []
    statements = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.stmt)]
    starts = [statement.lineno for statement in statements]
    assert [line for line in starts if starts.count(line) > 1] == []


@each_file
def test_no_function_and_no_class_is_long(path):
    functions = definitions(path, ast.FunctionDef, ast.AsyncFunctionDef)
    assert [(name, lines) for name, lines in functions if lines > MAX_FUNCTION] == []
    classes = definitions(path, ast.ClassDef)
    assert [(name, lines) for name, lines in classes if lines > MAX_CLASS] == []


@each_file
def test_nothing_imports_a_stage(path):
    assert imports_of(path) & STAGES == set()


def test_nothing_imports_in_a_circle():
    left = {module: imports_of(path) for module, path in PRODUCT.items()}
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    assert left.keys() == set()


def test_the_toy_world_imports_nothing_of_ours():
    assert imports_of(PRODUCT["toy.world"]) == set()


def test_every_file_says_what_it_is_for():
    for module, path in PRODUCT.items():
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring or path.name == "__init__.py", module
