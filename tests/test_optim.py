"""The optimizer step: groups, schedules, the guard, against torch's and transformers' own."""

import math

import pytest
import torch
from test_model import load, text_stream
from torch import nn

from core.optim import Offload, adamw, guarded_step, lr_at, round_to_bf16


def rates(steps, **settings):
    return [
        lr_at(s, lr=1e-5, total_steps=steps, steps_per_epoch=10, **settings) for s in range(steps)
    ]


def test_the_papers_schedule_is_torchs_step_lr():
    """lr × 0.8 each epoch: an off-by-one would decay a step early or late."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-5)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.8)
    expected = []
    for _ in range(40):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(40, schedule="epoch_decay") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "schedule, name",
    [
        ("linear", "get_linear_schedule_with_warmup"),
        ("constant", "get_constant_schedule_with_warmup"),
        ("cosine", "get_cosine_schedule_with_warmup"),
    ],
)
def test_schedules_have_the_shape_of_transformers(schedule, name):
    """Ours reaches its peak at the last warmup step and its end at the last step; transformers'
    starts at 0, one step that trains nothing, and never reaches its end. So ours over n steps is
    theirs one step on, after warmup over one step less."""
    import transformers

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-5)
    arguments = (optimizer, 5) if schedule == "constant" else (optimizer, 5, 5 + 24)
    theirs = getattr(transformers, name)(*arguments)
    expected = [theirs.lr_lambdas[0](s) * 1e-5 for s in range(5 + 25)]
    ours = rates(30, schedule=schedule, warmup_steps=5)
    assert ours[:5] == pytest.approx(expected[1:6], rel=1e-9) and ours[5:] == pytest.approx(
        expected[5:], abs=1e-12
    )


def test_warmup_then_epochs():
    assert rates(30, schedule="epoch_decay", warmup_steps=4)[:5] == pytest.approx(
        [2.5e-6, 5e-6, 7.5e-6, 1e-5, 1e-5]
    )


def trained(tiny_vl, steps=3, **settings):
    """A tiny model after some steps of ours, and the same steps by torch's plain AdamW and
    clip_grad_norm_."""
    stream = text_stream([20, 9])
    ours, theirs = load(tiny_vl), load(tiny_vl)
    optimizer = adamw(ours, lr=1e-3, **settings)
    named = dict(theirs.named_parameters())
    plain = torch.optim.AdamW(
        [
            {
                "params": [p for n, p in named.items() if "norm" in n or "bias" in n],
                "weight_decay": 0,
            },
            {"params": [p for n, p in named.items() if "norm" not in n and "bias" not in n]},
        ],
        lr=1e-3,
        foreach=False,
        **settings,
    )
    norms = []
    for _ in range(steps):
        for model in (ours, theirs):
            (-model(*stream, targets=stream[0])[0].sum()).backward()
        norms.append(guarded_step(ours, optimizer, lr=1e-3, max_norm=1.0, loss=1.0)[0])
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)))
        plain.step()
        plain.zero_grad()
    return ours, theirs, norms


def test_steps_equal_plain_adamw_without_decay_on_norms_and_biases(tiny_vl):
    """Groups, clipping, bias correction and pre-made moments at once; a decay on norms would pull
    them to zero."""
    # eps: some key biases have a gradient of rounding noise alone (softmax ignores a shift),
    # which Adam would blow up
    ours, theirs, norms = trained(tiny_vl, weight_decay=0.5, betas=(0.9, 0.95), eps=1e-4)
    assert norms[::2] == pytest.approx(norms[1::2], rel=1e-6) and norms[0] > 1
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert (a - b).abs().max() <= 2e-6, name


def test_no_clipping_when_it_is_off(tiny_vl):
    model, stream = load(tiny_vl), text_stream([20])
    optimizer = adamw(model, lr=1e-3, weight_decay=0.0)
    (-model(*stream, targets=stream[0])[0].sum()).backward()
    exact = model.model.norm.weight.grad.clone()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.model.norm.weight.grad.clone()))
    guarded_step(model, optimizer, lr=1e-3, max_norm=0, loss=1.0)
    assert torch.equal(seen[0], exact)


@pytest.mark.parametrize("loss, poison", [(math.nan, False), (math.inf, False), (1.0, True)])
def test_a_non_finite_step_changes_nothing(tiny_vl, loss, poison):
    """Neither weights nor moments; and the gradients are gone, or they would poison the next
    step."""
    model, stream = load(tiny_vl), text_stream([20])
    optimizer = adamw(model, lr=1e-3, weight_decay=0.1)
    (-model(*stream, targets=stream[0])[0].sum()).backward()
    if poison:
        model.model.norm.weight.grad[3] = math.nan
    before = [p.clone() for p in model.parameters()]
    _, stepped = guarded_step(model, optimizer, lr=1e-3, max_norm=1.0, loss=loss)
    assert not stepped and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all((s["exp_avg"] == 0).all() and s["step"] == 0 for s in optimizer.state.values())
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------ bf16 moments
def test_rounding_to_bf16_is_right_on_average_and_exact_where_it_can_be():
    generator = torch.Generator().manual_seed(0)
    exact = torch.tensor([0.0, 1.0, -2.0, 0.40625, -1e-20]).bfloat16().float()
    assert torch.equal(round_to_bf16(exact, generator).float(), exact)
    for value in (1.001, -1.001, 3e-9, -7.77e5):
        x = torch.full((200_000,), value)
        got = round_to_bf16(x, generator)
        below, above = sorted(set(got.float().tolist()))
        assert below < value < above and above - below <= abs(value) / 128
        assert abs(got.double().mean() - value) <= 0.01 * (above - below)


def decayed(state_dtype, nearest=False):
    """|second moment| of a weight whose gradient falls from 1 to 0.3, after 4,000 more steps."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    optimizer = adamw(model, lr=0.0, weight_decay=0.0, state_dtype=state_dtype)
    state = optimizer.state[model.weight]
    state["exp_avg_sq"].fill_(1.0)
    state["step"].fill_(10_000.0)
    for _ in range(4000):
        model.weight.grad = torch.full_like(model.weight, 0.3)
        if (
            nearest
        ):  # what torch's fused kernel does on CUDA: fp32 arithmetic, rounded on its way out
            v = state["exp_avg_sq"].float() * 0.999 + 0.001 * 0.09
            state["exp_avg_sq"].copy_(v)
        else:
            guarded_step(model, optimizer, lr=0.0, max_norm=None, loss=1.0)
    return state["exp_avg_sq"].double().mean().item()


def test_bf16_moments_follow_a_falling_gradient():
    """With beta2 0.999 the nearest bf16 to v * 0.999 is v: the update would stay at 0.3 of its
    size."""
    exact = decayed(torch.float32)
    assert exact == pytest.approx(0.09 + 0.91 * 0.999**4000, rel=1e-3)
    assert decayed(torch.bfloat16) == pytest.approx(exact, rel=0.01)
    assert decayed(torch.bfloat16, nearest=True) > 5 * exact


def test_bf16_moments_train_like_fp32_and_repeat_bit_for_bit(tiny_vl, monkeypatch):
    """Weights after 5 steps differ by a fraction of the distance travelled; chunking covers all."""
    monkeypatch.setattr("core.optim.CHUNK", 1000)
    stream, ends = text_stream([20, 9]), []
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        model = load(tiny_vl)
        start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        optimizer = adamw(model, lr=1e-3, weight_decay=0.1, eps=1e-4, state_dtype=dtype)
        for _ in range(5):
            (-model(*stream, targets=stream[0])[0].sum()).backward()
            guarded_step(model, optimizer, lr=1e-3, max_norm=1.0, loss=1.0)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - start)
        assert all(s["step"] == 5 and s["exp_avg"].dtype == dtype for s in optimizer.state.values())
    exact, once, again = ends
    assert torch.equal(once, again)
    assert 0 < (once - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_offloaded_moments_take_no_memory_and_come_back_to_the_bit(tiny_vl, state_dtype):
    """The next steps equal those without; the tensors stay the same objects, as a checkpoint holds
    them."""
    stream, models, held = text_stream([20]), [load(tiny_vl), load(tiny_vl)], []
    for model in models:
        optimizer = adamw(model, lr=1e-3, weight_decay=0.0, state_dtype=state_dtype)
        away = Offload(optimizer, model is models[0])
        for _ in range(3):
            held = [s[n] for s in optimizer.state.values() for n in ("exp_avg", "exp_avg_sq")]
            away.to_host()
            away.to_host()  # an evaluation before the rollouts
            left = sum(m.untyped_storage().nbytes() for m in held)
            assert (left == 0) is (model is models[0])
            away.to_device()
            (-model(*stream, targets=stream[0])[0].sum()).backward()
            guarded_step(model, optimizer, lr=1e-3, max_norm=1.0, loss=1.0)
            assert all(m.untyped_storage().nbytes() == m.nbytes for m in held)
    for a, b in zip(*(m.parameters() for m in models)):
        assert torch.equal(a, b)
