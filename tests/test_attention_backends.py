"""Attention's CUDA branch with CPU tensors that say they are on a GPU, and stand-ins for kernels
that only a GPU has: FlashAttention's forward and backward pass, as formulas in fp32 with bf16 in
and out. The arguments, what is saved, and the gradients' way back are the real ones."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_model import FLAT_7B, text_stream
from test_sampler import assert_same, load, text_prompt

import model
import sampler
from core import attention, decode_kernels
from core.slots import Slots
from model import Block, ModelConfig, rope_cos_sin


class OnGpu(torch.Tensor):
    """A CPU tensor, and what is computed from it, that takes the branch for CUDA."""

    is_cuda = True


def probabilities(q, k, causal, scale, lse=None):
    """q (n, Hq, D), k (m, Hkv, D) of one document, in fp32 → (Hq, n, m) and their log-sum-exp."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
    lse = scores.logsumexp(-1) if lse is None else lse
    return (scores - lse[..., None]).exp(), lse


def documents(cu_q, cu_k, max_q, max_k):
    assert cu_q.dtype == cu_k.dtype == torch.int32 and torch.equal(cu_q, cu_k)
    assert int(cu_q.diff().max()) <= max_q == max_k
    return [slice(a, b) for a, b in zip(cu_q.tolist(), cu_q.tolist()[1:]) if b > a]


def flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, **rest):
    """aten::_flash_attention_forward"""
    window = (rest.pop("window_size_left"), rest.pop("window_size_right"))
    assert window == ((-1, 0) if causal else (-1, -1)) and not any(rest.values()) and not dropout
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for s in documents(cu_q, cu_k, max_q, max_k):
        p, lse[:, s] = probabilities(q[s], k[s], causal, scale or q.shape[2] ** -0.5)
        values = v[s].float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        out[s] = torch.einsum("hqk,khd->qhd", p, values).to(q.dtype)
    return out, lse, torch.empty(0), torch.empty(0), torch.empty(0)


def flash_backward(
    d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, *_, scale=None, **window
):
    """aten::_flash_attention_backward: dS = P (dP - rowsum(dO · O)), from the saved log-sum-exp."""
    scale, group = scale or q.shape[2] ** -0.5, q.shape[1] // k.shape[1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for s in documents(cu_q, cu_k, max_q, max_k):
        p, _ = probabilities(q[s], k[s], causal, scale, lse[:, s])
        g, keys, values = (x[s].float() for x in (d_out, k, v))
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        dp = torch.einsum("qhd,khd->hqk", g, values)
        ds = p * (dp - (g * out[s].float()).sum(-1).t()[..., None]) * scale
        dq[s] = torch.einsum("hqk,khd->qhd", ds, keys).to(q.dtype)
        for into, parts in (
            (dk, torch.einsum("hqk,qhd->khd", ds, q[s].float())),
            (dv, torch.einsum("hqk,qhd->khd", p, g)),
        ):
            into[s] = parts.unflatten(1, (-1, group)).sum(2).to(q.dtype)
    return dq, dk, dv


def flash_decode(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, seqused_k, num_splits,
    **rest,
):  # fmt: skip
    """aten::_flash_attention_forward over a cache: `cu_k` says where a sequence's keys begin and no
    more. FlashAttention 2 writes 0 and +inf where there are none, and splits one query only."""
    assert rest.pop("window_size_left") == rest.pop("window_size_right") == -1 and not causal
    assert not any(rest.values()) and len(seqused_k) + 1 == len(cu_q) == len(cu_k)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (cu_q, cu_k, seqused_k))
    assert cu_q[0] == 0 and cu_q[-1] == len(q) and 0 <= cu_q.diff().min()
    assert cu_q.diff().max() <= max_q and seqused_k.max() <= max_k
    assert num_splits == (4 if max_q == 1 else 1)
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], len(q)), torch.nan)
    bounds = zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), seqused_k.tolist())
    for a, b, start, used in bounds:
        if used == 0:
            out[a:b], lse[:, a:b] = 0, torch.inf
        elif b > a:
            keys, values = (x[start : start + used] for x in (k, v))
            p, lse[:, a:b] = probabilities(q[a:b], keys, False, scale or q.shape[2] ** -0.5)
            values = values.float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            out[a:b] = torch.einsum("hqk,khd->qhd", p, values).to(q.dtype)
    return out, lse, torch.empty(0), torch.empty(0), torch.empty(0)


@pytest.fixture
def kernels():
    """Counts of the two stand-ins' calls while they are torch's kernels on the CPU."""
    calls = {"forward": 0, "backward": 0}

    def counted(name, function):
        def run(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return run

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", counted("forward", flash_forward), "CPU")
    library.impl("_flash_attention_backward", counted("backward", flash_backward), "CPU")
    yield calls
    library._destroy()


def relative(x, exact) -> float:
    return ((x.float() - exact.float()).norm() / exact.float().norm()).item()


@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (4, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_gradients_in_bf16_equal_sdpa_for_each_document(kernels, causal, heads, kv_heads):
    """varlen_attn's output, dq, dk and dv against autograd through SDPA in fp32, document by
    document; as one document they would differ by far more."""
    g, lengths = torch.Generator().manual_seed(0), [70, 1, 0, 29]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    shapes = [(100, h, 16) for h in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(s, generator=g).bfloat16() for s in shapes)
    weight = torch.randn(100, heads, 16, generator=g)

    def run(kind, dtype, cu):
        inputs = [x.to(dtype, copy=True).as_subclass(kind).requires_grad_() for x in (q, k, v)]
        out = attention.attend(*inputs, cu, 70 if len(cu) > 2 else 100, causal=causal)
        return [out, *torch.autograd.grad((out * weight).sum(), inputs)]

    exact = run(torch.Tensor, torch.float32, cu)
    assert kernels == {"forward": 0, "backward": 0}
    ours, as_one = (run(OnGpu, torch.bfloat16, c) for c in (cu, cu[[0, -1]]))
    assert kernels == {"forward": 2, "backward": 2}
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), ours, exact, as_one):
        assert x.dtype == torch.bfloat16 and relative(x, y) < 6e-3 < 0.2 < relative(z, y), name


def one_block(mode):
    """A small decoder block in bf16, and what its forward takes for three documents."""
    changes = dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, vocab_size=320)
    changes |= dict(intermediate_size=192, num_hidden_layers=1)
    changes["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 1, 1]}
    config, lengths = ModelConfig.from_dict({**FLAT_7B, **changes}), [60, 41, 7]
    torch.manual_seed(0)
    block = Block(config).to(torch.bfloat16)
    block.checkpointing = mode
    x = torch.randn(sum(lengths), 64, dtype=torch.bfloat16, requires_grad=True)
    _, positions, cu = text_stream(lengths)
    return block, (x, *rope_cos_sin(positions, config), cu, max(lengths))


@pytest.mark.parametrize("mode, runs", [("none", 1), ("matmul", 1), ("full", 2)])
def test_a_blocks_gradients_through_varlen_attn(kernels, monkeypatch, mode, runs):
    """All parameters of a decoder block, bf16, under each checkpointing mode: as through SDPA, and
    the kernel runs again only where everything is recomputed."""

    def on_gpu(q, k, v, *ends, causal):
        q, k, v = (t.as_subclass(OnGpu) for t in (q, k, v))
        return attention.attend(q, k, v, *ends, causal=causal).as_subclass(torch.Tensor)

    gradients = []
    for attend in (attention.attend, on_gpu):
        monkeypatch.setattr(model, "attend", attend)
        block, (x, *rest) = one_block(mode)
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        loss = (block(x, *rest) * weight).sum()
        gradients.append(torch.autograd.grad(loss, [x, *block.parameters()]))
    assert kernels == {"forward": runs, "backward": 1}
    assert len(gradients[0]) == 13
    for ours, sdpa in zip(*reversed(gradients)):
        assert relative(ours, sdpa) < 2e-2


def test_the_flash_attn_packages_function_gets_its_own_arguments(monkeypatch):
    """A stand-in with the package's signature that computes from what it is given."""
    seen = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1),
    ):  # fmt: skip
        seen.append((max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size))
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        window = dict(window_size_left=-1, window_size_right=0 if causal else -1)
        return flash_forward(q, k, v, *ends, dropout_p, causal, False, **window)[0]

    monkeypatch.setattr(attention, "flash_attn_varlen_func", flash_attn_varlen_func)
    q, k, v = torch.randn(3, 30, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    cu = torch.tensor([0, 11, 30], dtype=torch.int32)
    for causal in (True, False):
        ours = attention.attend(*(x.as_subclass(OnGpu) for x in (q, k, v)), cu, 19, causal=causal)
        assert relative(ours, attention.attend(q, k, v, cu, 19, causal=causal)) < 6e-3
    assert seen == [(19, 19, 0.0, None, causal, (-1, -1)) for causal in (True, False)]


@pytest.mark.parametrize(
    "package, capability, version", [(True, 9, 3), (True, 8, 2), (True, 10, 2), (False, 9, 2)]
)
def test_flash_attention_3_on_hopper_where_its_package_is(
    monkeypatch, package, capability, version
):
    """Torch is asked for it once, by name, and goes on being called by varlen_attn."""
    asked, spec = [], attention.importlib.util.find_spec
    found = {"flash_attn_interface": object() if package else None}
    monkeypatch.setattr(
        attention.importlib.util, "find_spec", lambda n: found[n] if n in found else spec(n)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    monkeypatch.setattr(attention, "activate_flash_attention_impl", asked.append)
    monkeypatch.delenv("ATTENTION", raising=False)
    name, function = attention._choose_flash()
    assert asked == ["FA3"] * (version == 3) and function is None
    assert name == "torch varlen_attn" + " with FlashAttention 3" * (version == 3)


@pytest.mark.parametrize(
    "value, words", [("flash_attn", "No module named 'flash_attn'"), ("fast", "must be torch")]
)
def test_a_backend_that_is_not_there(value, words):
    command = [sys.executable, "-c", "import core.attention"]
    env = {**os.environ, "ATTENTION": value}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode and words in done.stderr


def test_fp32_decode_on_a_gpu_equals_the_cpus():
    """The branch for fp32 on CUDA masks the whole cache; here with CPU tensors."""
    g = torch.Generator().manual_seed(0)
    q, lengths = torch.randn(5, 8, 16, generator=g), torch.tensor([0, 3, 63, 64, 99])
    k, v = torch.randn(2, 5, 100, 2, 16, generator=g)
    plan = decode_kernels.plan_attention(lengths, 100, lengths.tolist())
    mask = decode_kernels._mask(lengths + 1, 100)
    masked = decode_kernels._attend_sdpa(q, k, v, [(0, 5, 100, mask)])
    assert (masked - decode_kernels.decode_attend(q, k, v, plan)).abs().max() < 2e-6
    assert attention.backend("cpu", torch.bfloat16) == "SDPA per document"


# ------------------------------------------------------------------- prompts read once in decode
@pytest.fixture
def decoding(monkeypatch):
    """Decode attention as on a GPU, also in fp32, on the CPU; yields, for each call over prompts,
    the keys that it read."""
    read = []

    def kernel(q, k, v, cu_q, *args, **kwargs):
        if args[1] > 1:
            read.append(int((kwargs["seqused_k"] * (cu_q.diff() > 0)).sum()))
        return flash_decode(q, k, v, cu_q, *args, **kwargs)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", kernel, "CPU")
    monkeypatch.setattr(decode_kernels, "HALF", (torch.bfloat16, torch.float32))
    monkeypatch.setattr(decode_kernels, "compiled", lambda function: function)
    yield read
    library._destroy()


def on_gpu(function):
    """function(tensor, …) as on a GPU."""

    def run(x, *args):
        out = function(x.as_subclass(OnGpu), *args)
        return out.as_subclass(torch.Tensor) if isinstance(out, torch.Tensor) else out

    return run


plan_attention, decode_attend = map(
    on_gpu, (decode_kernels.plan_attention, decode_kernels.decode_attend)
)


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (3, 3)])
@pytest.mark.parametrize("rows", [14, 18])
def test_attention_that_reads_prompts_once(decoding, heads, kv_heads, rows):
    """Groups of 8, 3, 2 and 1 in any order of slots, prompts of many lengths, empty slots behind:
    as each sample's attention over its own slot, whose other tokens are NaN here."""
    g, capacity, size = torch.Generator().manual_seed(rows), 100, 16
    shape = dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=size)
    c = SimpleNamespace(num_hidden_layers=1, hidden_size=8, **shape)
    slots = Slots.allocate(18, capacity, c, torch.float32, torch.device("cpu"))
    tokens = [33, 1, 64, 90]  # of each prompt
    prompts = [[0] * 8, [1] * 3, [2] * 2, [3]]
    prompts = [p for group in prompts for p in group]
    prompts = [prompts[i] for i in torch.randperm(14, generator=g)]
    own = torch.randint(0, 10, (14,), generator=g).tolist()
    kv = torch.full((2, 18, capacity, kv_heads, size), torch.nan)
    prompt_kv = torch.randn(4, 2, 90, kv_heads, size, generator=g)
    for i, p in enumerate(prompts):
        kv[:, i, : tokens[p]] = prompt_kv[p, :, : tokens[p]]
        added = torch.randn(2, own[i] + 1, kv_heads, size, generator=g)
        kv[:, i, tokens[p] : tokens[p] + own[i] + 1] = added
    kv[:, 14:, 0] = 1  # an empty slot's row runs along
    length = torch.tensor([tokens[p] + n for p, n in zip(prompts, own)] + [0] * 4)[:rows]
    q, (k, v) = torch.randn(rows, heads, size, generator=g), kv[:, :rows]
    slots.group([(p + 7, tokens[p]) for p in prompts], c)
    exact = decode_attend(q, k, v, plan_attention(length, capacity, None))
    assert not decoding and not exact.isnan().any()
    plan = plan_attention(length, capacity, None, slots.first(rows).groups, 8)
    assert (decode_attend(q, k, v, plan) - exact).abs().max() < 2e-6
    assert decoding == [sum(tokens)]
    assert relative(decode_attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), plan), exact) < 6e-3


@pytest.mark.parametrize("slots, every, rows", [(64, 1, 1), (5, 8, 1), (11, 8, 16)])
def test_a_sampler_that_reads_prompts_once(tiny_vl, decoding, monkeypatch, slots, every, rows):
    """Through refills, moves and ends, with what an ended sample leaves poisoned: the same samples,
    and never more keys read than those of the prompts that run."""
    prompts = [text_prompt(n, seed=1) for n in (3, 41, 8, 25, 1, 12)]
    params = sampler.SamplingParams(n=8, max_new_tokens=24, stop_ids=range(12), seed=3)
    model = load(tiny_vl)
    expected = sampler.Sampler(model, max_len=80, slots=48).generate(prompts, params)
    free, group, running = Slots.free, Slots.group, []

    def poisoned(self, slot, length):
        free(self, slot, length)
        self.kv[:, :, slot] = torch.nan  # the row runs along and writes position 0 before it reads

    def grouped(self, of, c):
        running.append(sum(tokens for _, tokens in set(of)))
        group(self, of, c)

    for name, function in (("plan_attention", plan_attention), ("decode_attend", decode_attend)):
        monkeypatch.setattr(sampler, name, function)
    monkeypatch.setattr(sampler, "samples_sharing", lambda prompts, samples, weight: samples)
    monkeypatch.setattr(sampler, "SHARED_ROWS", 1)
    monkeypatch.setattr(Slots, "free", poisoned)
    monkeypatch.setattr(Slots, "group", grouped)
    s = sampler.Sampler(model, max_len=80, slots=slots, min_rows=rows)
    s.sync_every = every
    assert_same(s.generate(prompts, params), expected, 1e-5)
    layers = model.config.num_hidden_layers
    assert running[0] == 0 and decoding == [n for n in running[1:] for _ in range(layers * every)]
