"""The GPU benchmark's dry run: a script that a lent machine runs once must not fail on a misspelt
name."""

import json
import subprocess
import sys

from conftest import ROOT


def run(*flags):
    command = [sys.executable, "benchmarks/gpu.py", "--dry", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.splitlines()[-2], json.loads(done.stdout.splitlines()[-1])


def test_every_piece_runs_with_tiny_sizes_and_only_once(tmp_path):
    (tmp_path / "vision.json").write_text("[]")  # an earlier call got that far
    said, result = run("--into", tmp_path, "--minutes", "0")
    assert said == "9 pieces left: run the same command again" and result["rows"] == []
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
    assert len(checks) == 7 and max(values[name] for name in checks) <= 1e-5  # the CPU's own
    for file in tmp_path.glob("*.json"):
        file.write_text(json.dumps([dict(result["rows"][0], note="kept")]))
    assert {row["note"] for row in run("--into", tmp_path)[1]["rows"]} == {"kept"}
