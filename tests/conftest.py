"""Shared by all tests: top-level modules importable, one torch thread, a one-process world."""

import os
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # cores may be shared: two threads on a busy core are far slower
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world():
    from core import parallel

    return parallel.init("cpu")


@pytest.fixture(scope="session")
def tiny_vl(tmp_path_factory):
    """A model directory with random weights written by transformers: Qwen2.5-VL, untied, nested
    config."""
    from tiny_model import make_tiny_vl

    return make_tiny_vl(tmp_path_factory.mktemp("tiny_vl"))
