"""The GPU benchmark's dry run: a script that a lent machine runs once must not fail on a misspelt
name."""

import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import ROOT

from benchmarks import gpu


def run(*flags):
    command = [sys.executable, "benchmarks/gpu.py", "--dry", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.splitlines()[-2], json.loads(done.stdout.splitlines()[-1])


def test_every_piece_runs_with_tiny_sizes_and_only_once(tmp_path):
    kept = tmp_path / "rows.jsonl"
    kept.write_text('["vision", []]\n')  # an earlier call got that far
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
    for name, rows in map(json.loads, kept.read_text().splitlines()):
        with open(kept, "a") as f:  # of a piece the last line counts
            f.write(json.dumps([name, [dict(row, note="kept") for row in rows]]) + "\n")
    assert {row["note"] for row in run("--into", tmp_path)[1]["rows"]} == {"kept"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "rows.md"]


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
        (tmp_path / "rows.jsonl").touch()
        args = SimpleNamespace(into=tmp_path)
        b = SimpleNamespace(args=args, rows=[], title="a GPU:", memory=memory)
        return gpu.run_pieces(b, float("inf")), list(ran)

    assert call() == ((1, 1), ["check a", "check bad"])
    assert "RuntimeError: CUDA error: illegal |" in (tmp_path / "rows.md").read_text()
    assert call() == ((0, 0), ["check c"])
    assert len((tmp_path / "rows.md").read_text().splitlines()) == 4 + 3


def test_a_call_ends_in_time_and_no_piece_ends_two(tmp_path, monkeypatch):
    """A piece that may outlast the call is left for the next; one that did is not begun again."""
    names = {"grpo": 4, "decode 64 1024": 1.5, "vision": 1}

    def piece(name, b):
        if name == "vision":
            raise KeyboardInterrupt  # or a kill
        b.rows.append(dict(section=name, name=name, value=1.0, unit="", limit=None, note=""))

    monkeypatch.setattr(gpu, "pieces", lambda args: {n: partial(piece, n) for n in names})
    (tmp_path / "rows.jsonl").touch()

    def call(minutes):
        args = SimpleNamespace(into=tmp_path)
        b = SimpleNamespace(args=args, rows=[], title="a GPU:", memory=lambda: "")
        return gpu.run_pieces(b, gpu.time.perf_counter() + 60 * minutes), [
            r["name"] for r in b.rows
        ]

    assert call(0.9) == ((0, 3), [])
    with pytest.raises(KeyboardInterrupt):
        call(2)
    assert call(3.9) == ((0, 1), ["decode 64 1024", "error"])
    assert call(4.1) == ((0, 0), ["grpo", "decode 64 1024", "error"])
    assert "| vision | error | | | | the call ended in it |" in (tmp_path / "rows.md").read_text()
