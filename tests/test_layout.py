"""The layout holds: imports go one way, no cycles, and the repository speaks of the project
alone."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT

CARD = {"train_sft", "train_grpo", "model", "data", "rewards", "sampler", "eval"}
SCRIPTS = {"train_sft", "train_grpo", "eval"}
PACKAGES = sorted(p.parent.name for p in ROOT.glob("*/__init__.py"))
FILES = [p for folder in (ROOT, *(ROOT / d for d in PACKAGES)) for p in sorted(folder.glob("*.py"))]


def imports(path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return names


def room(dotted: str) -> str:
    return dotted.split(".")[0]


def test_the_root_holds_the_cards_scripts_alone():
    assert {p.stem for p in ROOT.glob("*.py")} == CARD


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    ours = {room(n) for n in imports(path)} & (CARD | set(PACKAGES))
    here = path.parent.name if path.parent != ROOT else path.stem
    assert not ours & (SCRIPTS - {here}), "no file imports a script"
    if here in ("core", "grading"):
        assert ours <= {here}, f"{here}/ stands below the seven scripts"
    if here in CARD:
        assert not ours & {"convert", "toy", "report"}, "these stand above the seven scripts"
    if here in ("rewards", "grading"):
        text = "grading processes must start fast and never touch CUDA"
        assert "torch" not in {room(n) for n in imports(path)}, text


def test_no_import_cycles_between_files():
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}
    graph = {name: imports(path) & modules.keys() for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' → '.join((*trail, name))}"
        if name not in done:
            for other in graph[name] - {name}:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_functions_fit_on_a_screen():
    long = [
        f"{p.name}: {n.name} has {n.end_lineno - n.lineno + 1} lines"
        for p in FILES
        for n in ast.walk(ast.parse(p.read_text()))
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
        and n.end_lineno - n.lineno + 1 > 80
    ]
    assert not long


def test_the_repository_names_no_machine_and_no_registry():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = files.stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.])/(?:work|opt)/|(?<!\w)\.library|index-url|pypi\.org")
    found = [
        f"{f}:{i}"
        for f in files
        if (ROOT / f).suffix in (".py", ".sh", ".md", ".txt", ".toml", "")
        and f != "tests/test_layout.py"
        and (ROOT / f).is_file()
        for i, line in enumerate((ROOT / f).read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found
