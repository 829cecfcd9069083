"""--compile changes nothing but speed. Inductor's C++ takes a minute, so dynamo and autograd
tracing are run with the
`aot_eager` backend here; by hand with inductor the gradients are within 2e-6 too."""

import pytest
import torch
from test_model import load, text_stream


def gradients(path, mode, compiled):
    torch._dynamo.reset()
    model = load(path)
    for block in model.model.layers:
        block.checkpointing = mode
        if compiled:
            block.compile(backend="aot_eager")
    for lengths in (
        [30, 5, 17],
        [12, 25],
    ):  # another shape first: a graph specialised on it must not be used for the next
        stream = text_stream(lengths)
        model.zero_grad()
        model(*stream, targets=stream[0])[0].sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled_blocks_give_the_same_gradients(tiny_vl, mode):
    """A value that was traced as a constant (a length, a boundary of documents) would give another
    gradient."""
    for a, b in zip(gradients(tiny_vl, mode, True), gradients(tiny_vl, mode, False)):
        assert (a - b).norm() <= 1e-5 * b.norm().clamp(min=1e-6)
