"""The chunked loss against torch's own cross-entropies: value, hidden gradient, weight gradient."""

import pytest
import torch
import torch.nn.functional as F
from test_model import load, text_stream

from core import logprobs
from core.logprobs import ChunkedLogProbs
from data import Prompt
from sampler import Sampler, SamplingParams

ROWS, WIDTH, WORDS = 96, 32, 300


def inputs(dtype):
    """Hidden states, output matrix and targets of which a quarter is ignored; realistic logits of a
    few units."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(ROWS, WIDTH, generator=g),
        torch.randn(WORDS, WIDTH, generator=g) / WIDTH**0.5 * 2,
    )
    targets = torch.randint(0, WORDS, (ROWS,), generator=g)
    targets[::4] = -100
    return hidden.to(dtype), weight.to(dtype), targets


def ours(hidden, weight, targets, chunk):
    """Sum of the token losses and its gradients, as the model calls it: ignored rows never reach
    the head."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    kept = targets != -100
    loss = -ChunkedLogProbs.apply(h[kept], w, targets[kept], 1.0, False, None, chunk)[0].sum()
    loss.backward()
    return loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_equal_to_cross_entropy_in_fp64(chunks):
    hidden, weight, targets = inputs(torch.float32)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = F.cross_entropy(h @ w.T, targets, reduction="sum")
    exact.backward()
    for a, b in zip(ours(hidden, weight, targets, 72 // chunks), (exact.detach(), h.grad, w.grad)):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_equal_to_torchs_own_fused_linear_cross_entropy():
    """torch 2.13's F.linear_cross_entropy, in fp32."""
    hidden, weight, targets = inputs(torch.float32)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = F.linear_cross_entropy(h, w, targets, reduction="sum")
    loss.backward()
    for a, b in zip(ours(hidden, weight, targets, 9), (loss.detach(), h.grad, w.grad)):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("chunks", [1, 8, 36])
def test_bf16_weight_gradient_is_summed_in_fp32(monkeypatch, chunks):
    """Before its final cast it is within 2e-4 of fp64 on the same rounded logit gradients, whatever
    the number of chunks;
    a bf16 sum is not. The loss itself is fp32, and all within bf16's 2e-2 of the exact
    gradients."""
    hidden, weight, targets = inputs(torch.bfloat16)
    total, pieces, real = [], [], logprobs.add_weight_gradient

    def record(accumulated, d_logits, rows):
        real(accumulated, d_logits, rows)
        total[:] = [accumulated]
        pieces.append((d_logits, rows))

    monkeypatch.setattr(logprobs, "add_weight_gradient", record)
    loss, d_hidden, d_weight = ours(hidden, weight, targets, 72 // chunks)
    assert len(pieces) == chunks and loss.dtype == torch.float32
    same = sum(d.double().T @ rows.double() for d, rows in pieces)
    assert (total[0].double() - same).norm() <= 2e-4 * same.norm()
    if chunks > 1:
        rounded = sum(
            (d.T @ rows for d, rows in pieces), torch.zeros(WORDS, WIDTH, dtype=torch.bfloat16)
        )
        assert (rounded.double() - same).norm() > 1e-3 * same.norm()
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = F.cross_entropy(h @ w.T, targets, reduction="sum")
    exact.backward()
    print(
        "bf16 weight gradient before the cast, against fp64 from the inputs:",
        ((total[0].double() - w.grad).norm() / w.grad.norm()).item(),
    )
    assert abs(loss - exact) <= 1e-4 * exact
    assert (d_hidden - h.grad).norm() <= 2e-2 * h.grad.norm() and (
        d_weight - w.grad
    ).norm() <= 2e-2 * w.grad.norm()


def test_only_gradients_that_are_asked_for_are_computed(monkeypatch):
    """GRPO logs the entropy of every token, but its loss seldom holds it: the weight's gradient is
    then the one without entropy, bit for bit. With LoRA the head is frozen: no (V, C) buffer."""
    hidden, weight, targets = inputs(torch.float32)
    plain, made, zeros = ours(hidden, weight, targets.clamp(min=0), 9), [], torch.zeros
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    monkeypatch.setattr(torch.Tensor, "exp", None)  # its first use is the gradient of the entropy
    both = ChunkedLogProbs.apply(h, w, targets.clamp(min=0), 1.0, True, None, 9)
    (-both[0].sum()).backward()
    assert torch.equal(h.grad, plain[1]) and torch.equal(w.grad, plain[2])
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: (made.append(a[0]), zeros(*a, **k))[1])
    frozen = ChunkedLogProbs.apply(h, weight, targets.clamp(min=0), 1.0, False, None, 9)
    frozen[0].sum().backward()
    assert weight.shape not in made


def test_the_fp32_product_is_never_part_of_a_graph(tiny_vl, monkeypatch):
    """On CUDA `mm(out_dtype=…)` has no gradient. Neither training, with entropies or without, nor
    sampling lets autograd see it; logits without targets do."""
    seen, real = [], logprobs.matmul_fp32

    def product(a, b):
        seen.append(torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
        return real(a, b)

    monkeypatch.setattr(logprobs, "matmul_fp32", product)
    model, stream = load(tiny_vl).bfloat16(), text_stream([6, 9])
    for entropy in (False, True):
        scored = model(*stream, targets=stream[0], entropy=entropy)
        sum(x.sum() for x in scored if x is not None).backward()
    sampled = Sampler(model, max_len=8).generate(
        [Prompt([1], None, None)], SamplingParams(max_new_tokens=3)
    )
    assert len(sampled) == 1 and len(seen) > 4 and not any(seen)
    model(*stream)
    assert seen[-1]
