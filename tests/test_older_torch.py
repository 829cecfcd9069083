"""benchmarks/older_torch: `varlen_attn` of torch 2.11 with the arguments that the code passes."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.nn.attention.varlen import AuxRequest, varlen_attn

FOLDER = ROOT / "benchmarks" / "older_torch"


@pytest.fixture
def extend(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "sitecustomize", raising=False)
    import sitecustomize

    monkeypatch.delitem(sys.modules, "sitecustomize")
    return sitecustomize.extend


def stream(rows, heads):
    return torch.empty(rows, heads, 64, dtype=torch.bfloat16, device="meta")


def test_an_old_varlen_attn_takes_the_new_arguments(extend):
    calls = []

    def old(
        q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        calls.append((return_aux, scale, window_size))
        return q

    module = SimpleNamespace(varlen_attn=old)
    extend(module)
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    # training: the old function, whose autograd is used
    q, kv = stream(30, 8), stream(30, 2)
    args = q, kv, kv, ends, ends, 10, 10
    assert module.varlen_attn(*args, window_size=(-1, 0), enable_gqa=True) is q
    assert calls == [(None, None, (-1, 0))]
    # decode, one query a sequence; then prompts read once, several
    used, cache = ends[:3], stream(3 * 100, 2)
    how = dict(seqused_k=used, window_size=(-1, -1))
    for q, most in ((stream(3, 8), 1), (stream(12, 2), 8)):
        args = q, cache, cache, ends, ends, most, 100
        out, lse = module.varlen_attn(*args, return_aux=AuxRequest(lse=True), num_splits=4, **how)
        assert out.shape == q.shape and lse.shape == (q.shape[1], q.shape[0])
        assert lse.dtype == torch.float32 and len(calls) == 1
        for aux in (None, AuxRequest(lse=False)):
            assert module.varlen_attn(*args, return_aux=aux, **how).shape == q.shape


def test_torch_with_the_arguments_stays_as_it_is(extend):
    module = SimpleNamespace(varlen_attn=varlen_attn)
    extend(module)
    assert module.varlen_attn is varlen_attn


def test_it_acts_when_torch_is_imported():
    """In a process of its own, as a user starts it."""
    code = (
        "import sys, sitecustomize; assert 'torch' not in sys.modules\n"
        "sitecustomize.extend = lambda module: print('seen', module.__name__)\n"
        "import core.attention"
    )
    path = os.pathsep.join([str(FOLDER), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout == b"seen torch.nn.attention.varlen\n", done.stderr[-2000:]
