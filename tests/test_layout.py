"""The house keeps its shape: imports go one way, the README's map is true, the repository speaks of the project alone."""
import ast
import re
import subprocess

import pytest
from conftest import ROOT

SCRIPTS = {"train_sft", "train_grpo", "eval", "toy", "report", "memory"}
FILES = {p.stem: p for p in ROOT.glob("*.py")}
# file → what it may import of ours; a file that is not named may import anything but scripts
ALLOWED = {"experiment": set(), "attention": set(), "stats": set(), "decode_kernels": {"attention"}, "vision": {"attention"},
           "model": {"attention", "vision"}, "parallel": set(), "notation": set(), "equality": {"notation"},
           "grader": set(), "optim": {"parallel"}, "schema": {"vision"}, "releases": set(),
           "converters": {"releases", "rewards", "schema"},
           "sampling": set(), "sampler": {"attention", "decode_kernels", "model", "sampling", "vision"}}


def imports(path) -> set[str]:
    """Names of the top-level modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_one_way(name):
    """Without this the files grow into each other, and none can be read or tested alone."""
    ours = imports(FILES[name]) & FILES.keys()
    assert not ours & {"train_sft", "train_grpo", "eval"}, "no file imports a script"
    if name in ALLOWED:
        assert ours <= ALLOWED[name]
    if name in ("data", "datacheck", "schema", "convert", "converters", "releases", "rewards", "grader", "equality", "notation",
                "sampler", "sampling"):
        assert "parallel" not in ours
    if name in ("rewards", "grader", "equality", "notation"):
        assert "torch" not in imports(FILES[name]), "grading processes must start fast and never touch CUDA"


def test_functions_fit_on_a_screen():
    long = [f"{p.name}: {n.name} has {n.end_lineno - n.lineno + 1} lines" for p in FILES.values()
            for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
            and n.end_lineno - n.lineno + 1 > 80]
    assert not long


def test_the_readmes_map_has_every_file_and_true_line_counts():
    listed = dict(re.findall(r"^\| `(\w+)\.py` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M))
    assert listed.keys() == FILES.keys()
    wrong = {n: (int(c), len(FILES[n].read_text().splitlines())) for n, c in listed.items()
             if abs(int(c) - len(FILES[n].read_text().splitlines())) > 20}
    assert not wrong, "README says, file has"


def test_the_repository_names_no_machine_and_no_registry():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.])/(?:work|opt)/|\.library|index-url|pypi\.org|huggingface\.co/(?!docs)")
    found = [f"{f}:{i}" for f in files if (ROOT / f).suffix in (".py", ".sh", ".md", ".txt", ".toml", "")
             and f != "tests/test_layout.py" and (ROOT / f).is_file()
             for i, line in enumerate((ROOT / f).read_text(errors="replace").splitlines(), 1) if pattern.search(line)]
    assert not found
