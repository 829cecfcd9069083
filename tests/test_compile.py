"""--compile changes nothing but speed. Inductor's C++ takes a minute, so dynamo and autograd
tracing run with the `aot_eager` backend here. Attention is the operator that a GPU has, with
stand-ins for its kernels: at SDPA per document graphs break, and of a recomputed block nothing is
compiled."""

import pytest
import torch
from test_attention_backends import kernels  # noqa: F401
from test_model import load, text_stream
from torch._dynamo.utils import counters
from torch.nn.attention.varlen import varlen_attn


def attend_on_gpu(q, k, v, cu_seqlens, max_len, *, causal):
    """`core.attention.attend` as for CUDA tensors in bf16."""
    window = (-1, 0) if causal else (-1, -1)
    ends = (cu_seqlens, cu_seqlens, max_len, max_len)
    return varlen_attn(q, k, v, *ends, window_size=window, enable_gqa=True)


def gradients(path, mode, compiled):
    torch._dynamo.reset()
    model = load(path)
    for block in model.model.layers:
        block.checkpointing = mode
        if compiled:
            block.compile(backend="aot_eager")
    # other shapes first: a graph specialised on them must not be used for the next
    for lengths in ([30, 5, 17], [12, 25], [9, 1, 7, 3]):
        stream = text_stream(lengths)
        model.zero_grad()
        model(*stream, targets=stream[0])[0].sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("mode", ["none", "matmul", "full"])
def test_compiled_blocks_give_the_same_gradients(tiny_vl, kernels, monkeypatch, mode):  # noqa: F811
    """A value that was traced as a constant (a length, a boundary of documents) would give another
    gradient. All blocks share their graphs: one for the first shape, one for all others."""
    monkeypatch.setattr("model.attend", attend_on_gpu)
    eager = gradients(tiny_vl, mode, False)
    counters.clear()
    for a, b in zip(gradients(tiny_vl, mode, True), eager):
        assert (a - b).norm() <= 1e-5 * b.norm().clamp(min=1e-6)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
