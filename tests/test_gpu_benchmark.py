"""The GPU benchmark's dry run: a script that a lent machine runs once must not fail on a misspelt
name."""

import json
import subprocess
import sys
from types import SimpleNamespace

from conftest import ROOT

from benchmarks import gpu


def run(*flags):
    command = [sys.executable, "benchmarks/gpu.py", "--dry", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.splitlines()[-2], json.loads(done.stdout.splitlines()[-1])


def test_every_piece_runs_with_tiny_sizes_and_only_once(tmp_path):
    (tmp_path / "vision.json").write_text("[]")  # an earlier call got that far
    said, result = run("--into", tmp_path, "--minutes", "0")
    assert said == "10 pieces left: run the same command again" and result["rows"] == []
    said, result = run("--into", tmp_path)
    assert (said, result["failed"], result["left"]) == ("done", 0, 0)
    sections = {row["section"] for row in result["rows"]}
    assert sections == {"check", "sft", "prefill", "decode", "grpo", "peer"}
    values = {row["name"]: row["value"] for row in result["rows"]}
    assert values.pop("samples of a sharded model like a whole one's") == 1
    assert values["sampler - trainer log-probability, step 2, mean"] <= 1e-5
    table = (tmp_path / "rows.md").read_text().splitlines()
    assert len(table) == 4 + len(result["rows"]) and all(line.count("|") == 7 for line in table[2:])
    checks = [r["name"] for r in result["rows"] if r["section"] == "check" and r["name"] in values]
    assert len(checks) == 8 and max(values[name] for name in checks) <= 1e-5  # the CPU's own
    for file in tmp_path.glob("*.json"):
        file.write_text(json.dumps([dict(result["rows"][0], note="kept")]))
    assert {row["note"] for row in run("--into", tmp_path)[1]["rows"]} == {"kept"}


def test_a_piece_that_breaks_cuda_stops_one_call_only(tmp_path, monkeypatch):
    """After an illegal access every call fails: the other pieces wait for a new process, in which
    the one to blame is not tried again."""
    ran = []

    def piece(name):
        def run(b):
            ran.append(name)
            if name == "check bad":
                raise RuntimeError("CUDA error: illegal\nmore lines")
            b.rows.append(dict(section="check", name=name, value=1.0, unit="", limit=None, note=""))

        return run

    names = ("check a", "check bad", "check c")
    monkeypatch.setattr(gpu, "pieces", lambda args: {name: piece(name) for name in names})

    def call():
        def memory():
            if ran[-1] == "check bad":
                raise RuntimeError("CUDA error")

        ran.clear()
        args = SimpleNamespace(into=tmp_path)
        b = SimpleNamespace(args=args, rows=[], title="a GPU:", memory=memory)
        return gpu.run_pieces(b, float("inf")), list(ran)

    assert call() == ((1, 1), ["check a", "check bad"])
    assert "RuntimeError: CUDA error: illegal |" in (tmp_path / "rows.md").read_text()
    assert call() == ((0, 0), ["check c"])
    assert len((tmp_path / "rows.md").read_text().splitlines()) == 4 + 3
