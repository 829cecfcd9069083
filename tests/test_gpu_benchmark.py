"""The GPU benchmark's dry run: a script that a lent machine runs once must not fail on a misspelt
name."""

import json
import subprocess
import sys

from conftest import ROOT


def test_every_section_runs_with_tiny_sizes():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--dry"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failed_sections"] == 0
    sections = {row["section"] for row in result["rows"]}
    assert sections == {"check", "sft", "prefill", "decode", "grpo", "vision", "peer"}
    errors = [row["value"] for row in result["rows"] if row["section"] == "check"]
    assert max(errors) <= 1e-5  # the CPU is its own reference; on a GPU these are bf16's errors
