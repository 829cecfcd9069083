"""The GPU benchmark's dry run: a script that a lent machine runs once must not fail on a misspelt
name."""

import json
import subprocess
import sys

from conftest import ROOT


def run(*flags):
    command = [sys.executable, "benchmarks/gpu.py", "--dry", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_section_runs_with_tiny_sizes(tmp_path):
    (tmp_path / "vision.json").write_text("[]")  # an earlier call got that far
    done = run("--into", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failed_sections"] == 0
    sections = {row["section"] for row in result["rows"]}
    assert sections == {"check", "sft", "prefill", "decode", "grpo", "peer"}
    values = {row["name"]: row["value"] for row in result["rows"]}
    assert values.pop("samples of a sharded model like a whole one's") == 1
    assert values["sampler - trainer log-probability, step 2, mean"] <= 1e-5
    table = (tmp_path / "rows.md").read_text().splitlines()
    assert len(table) == 4 + len(result["rows"]) and all(line.count("|") == 7 for line in table[2:])
    again = run("--into", tmp_path)
    assert json.loads(again.stdout.splitlines()[-1])["rows"] == result["rows"]
    errors = [
        row["value"]
        for row in result["rows"]
        if row["section"] == "check" and row["name"] in values
    ]
    assert max(errors) <= 1e-5  # the CPU is its own reference; on a GPU these are bf16's errors
