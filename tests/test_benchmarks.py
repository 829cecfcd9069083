"""The benchmarks' own arithmetic, and that the script runs: a wrong fit would hide the growth that
it is to find."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_quadratic_cost_is_told_from_a_linear_one(scaling):
    """Growth must show: as an exponent near 2, and as a residual that a straight line cannot take
    away."""
    x = np.array([256, 512, 1024, 2048, 4096, 8192])
    straight = scaling.line(x, 80 + 0.05 * x)
    assert (
        straight["a"] == pytest.approx(80)
        and straight["b"] == pytest.approx(0.05)
        and straight["worst"] < 1e-9
    )
    assert scaling.line(x, 80 + 1e-5 * x**2)["worst"] > 0.3
    assert scaling.exponent(x, 3.0 * x) == pytest.approx(1)
    assert scaling.exponent(x, 3.0 * x + x**2) == pytest.approx(2, abs=0.01)


def test_scaling_runs_and_accounts_for_the_samplers_time(scaling, tmp_path):
    """A curve without rows, or a part that is timed under a name that the sampler no longer calls,
    would go unseen."""
    done = subprocess.run(
        [sys.executable, "benchmarks/scaling.py", "--dry", "--out", tmp_path / "s.svg"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "s.svg").read_text().rstrip().endswith("</svg>")
    for curve, sizes in (
        ("length", "lengths"),
        ("samples", "samples"),
        ("slots", "slots"),
        ("limit", "limits"),
        ("host", "documents"),
    ):
        assert [r["size"] for r in found[curve]] == scaling.DRY[sizes]
    for r in found["samples"] + found["slots"] + found["limit"]:
        parts = [r[k] for k in ("prefill", "forward", "choose", "host")]
        assert min(parts) > 0 and sum(parts) == pytest.approx(r["cpu"], rel=1e-6)
        assert r["steps"] * r["rows"] == pytest.approx(r["tokens"])
    assert set(found["fits"]) == {
        "length",
        "slots",
        "samples_exponent",
        "host_exponent",
        "limit_exponent",
        "pack_exponent",
        "collate_exponent",
    }
    assert len({r["tokens"] for r in found["limit"]}) == 1  # or its cost could not be constant
