"""The objective of train_grpo.py against golden values that were computed with other trainers' own
functions (verl, TRL) and by hand, in fp64. Fixture: 6 samples of lengths 3 2 4 1 4 2 in two
groups."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from train_grpo import Config, group_advantages, grpo_loss, soft_overlong_penalty

LENGTHS = torch.tensor([3, 2, 4, 1, 4, 2])
REWARDS = torch.tensor([[1, 0, 0], [1, 1, 0]], dtype=torch.float64)
I, T = [
    torch.tensor(x, dtype=torch.float64)
    for x in zip(*[(i, t) for i, n in enumerate(LENGTHS) for t in range(n)])
]
OLD = -0.1 * (1 + I + T)
NEW = OLD + 0.15 * ((I + 2 * T) % 5 - 2)
REF = OLD - 0.05 * (T + 1)
SAMPLER = OLD + 0.1 * ((I * T) % 3 - 1)
SEQUENCE = I.long()
ADVANTAGES = group_advantages(REWARDS, "grpo").flatten()[SEQUENCE]


def near(a, b, tolerance=1e-6):
    b = torch.tensor(b, dtype=torch.float64)
    assert torch.allclose(torch.as_tensor(a, dtype=torch.float64), b, atol=tolerance), a


def config(**more):
    plain = dict(clip_high=0.28, max_new_tokens=8, kl_coef=0.0)
    return Config(model="", data=[], out="", **{**plain, **more})


def batch(
    old=OLD, advantages=ADVANTAGES, sequence=SEQUENCE, counts=LENGTHS, ref=None, sampler=None
):
    return SimpleNamespace(
        old_logprobs=old,
        advantages=advantages,
        sequence=sequence,
        counts=counts,
        ref_logprobs=ref,
        sampler_logprobs=old if sampler is None else sampler,
    )


def loss(new=NEW, b=None, tokens=16, samples=6, **more):
    """(the loss, metrics by token) of the fixture under these settings."""
    return grpo_loss(new, torch.zeros_like(new), b or batch(), tokens, samples, config(**more))


def one_token(ratio, advantage, **more):
    one = torch.zeros(1, dtype=torch.float64)
    b = batch(one, one + advantage, one.long(), torch.tensor([1]))
    return loss(one + np.log(ratio), b, 1, 1, **more)[0]


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("grpo", [1.154699, -0.577349, -0.577349, 0.577349, 0.577349, -1.154699]),
        ("mean_only", [0.666667, -0.333333, -0.333333, 0.333333, 0.333333, -0.666667]),
        ("rloo", [1, -0.5, -0.5, 0.5, 0.5, -1]),
    ],
)
def test_advantages(kind, expected):
    near(group_advantages(REWARDS, kind).flatten(), expected)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("size", [3, 8, 16])
def test_a_constant_group_has_exactly_no_advantage(value, size):
    """Eight fp32 rewards of 0.1 have a std of 8e-9: over a small epsilon, an advantage of 0.8."""
    for kind in ("grpo", "mean_only", "rloo"):
        assert (group_advantages(torch.full((2, size), value), kind) == 0).all()


@pytest.mark.parametrize(
    "aggregation, expected",
    [("token_mean", -0.04517353), ("seq_mean_token_mean", -0.02715291), ("constant", -0.01505784)],
)
def test_ppo_clip_under_each_normaliser(aggregation, expected):
    near(loss(aggregation=aggregation)[0], expected, 1e-7)


@pytest.mark.parametrize(
    "kind, low, high, aggregation, expected",
    [
        ("gspo", 3e-4, 4e-4, "seq_mean_token_mean", 0.00739817),
        ("gspo", 0.2, 0.28, "seq_mean_token_mean", -0.0348848),
        ("cispo", 0.2, 0.28, "token_mean", -0.0387838),
    ],
)
def test_other_losses(kind, low, high, aggregation, expected):
    near(loss(loss=kind, clip_low=low, clip_high=high, aggregation=aggregation)[0], expected, 1e-7)


def test_clip_ratios_count_only_tokens_whose_gradient_is_cut():
    metrics = loss()[1]
    near(metrics["clip_ratio/low_mean"].mean(), 0.0625)
    near(metrics["clip_ratio/high_mean"].mean(), 0.125)


@pytest.mark.parametrize(
    "a, ratio, expected", [(-1, 5, 5), (-1, 2, 2), (-1, 0.5, 0.8), (1, 1.5, -1.28), (1, 0.5, -0.5)]
)
def test_scalar_cases_of_the_clip(a, ratio, expected):
    near(one_token(ratio, a), expected)


def test_kl_values():
    """Also: a weight of 0.5 adds half the KL's mean to the loss."""
    plain, (with_kl, metrics) = loss()[0], loss(b=batch(ref=REF), kl_coef=0.5)
    near(metrics["kl"].mean(), 0.02789014, 1e-7)
    near(with_kl - plain, 0.5 * 0.02789014, 1e-6)


def test_the_kl_gradient_is_that_of_the_forward_kl():
    """Exact expectation over a 3-class softmax: k3's gradient is that of KL(ref‖policy)."""
    z = torch.tensor([0.3, -0.5, 0.9], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.1, 0.2, -0.4], dtype=torch.float64).log_softmax(0)

    def gradient(value):
        return torch.autograd.grad(value, z, retain_graph=True)[0]

    logp = z.log_softmax(0)
    zero, total = torch.zeros(1, dtype=torch.float64), 0.0
    for i in range(3):  # advantage 0: the loss is the KL term alone
        token = logp[i : i + 1]
        b = batch(token.detach(), zero, zero.long(), torch.tensor([1]), ref[i : i + 1])
        total = total + logp[i].detach().exp() * loss(token, b, 1, 1, kl_coef=1.0)[0]
    near(gradient(total), gradient((ref.exp() * (ref - logp)).sum()).tolist(), 1e-6)


def test_soft_overlong_penalty():
    penalties = [soft_overlong_penalty(n, 20, 4) for n in (10, 16, 17, 18, 20)]
    assert penalties == [0, 0, -0.25, -0.5, -1]
    assert soft_overlong_penalty(20, 20, 0) == 0


def test_the_normaliser_is_global():
    """Losses [1,1,1,1] and [3] in two micro-batches: 1.4 over all tokens; a mean of means gives
    2."""
    parts = []
    for value, n in ((1.0, 4), (3.0, 1)):
        zeros = torch.zeros(n, dtype=torch.float64)
        b = batch(zeros, zeros - value, zeros.long(), torch.tensor([n]))
        parts.append(loss(zeros, b, tokens=5, samples=2)[0].item())
    assert abs(sum(parts) - 1.4) < 1e-6


def test_where_the_length_bias_is():
    """Weight of a token by its sample's length: equal under token_mean and constant, 1/n under
    seq_mean_token_mean."""
    for kind, expected in (("token_mean", 1), ("constant", 1), ("seq_mean_token_mean", 100)):
        weights = []
        for n in (10, 1000):
            zeros = torch.zeros(n, dtype=torch.float64)
            b = batch(zeros, zeros - 1, zeros.long(), torch.tensor([n]))
            weights.append(loss(zeros, b, tokens=1010, samples=2, aggregation=kind)[0].item() / n)
        assert weights[0] / weights[1] == pytest.approx(expected, rel=1e-5)


def test_gspo_gradient_is_that_of_the_sample_ratio():
    """The token form's gradient equals that of exp(mean log-ratio) · A, mean over samples."""
    new = NEW.clone().requires_grad_()
    wide = dict(loss="gspo", clip_low=1.0, clip_high=10, aggregation="seq_mean_token_mean")
    loss(new, **wide)[0].backward()
    ours, new.grad = new.grad.clone(), None
    ratios = torch.stack([(new[SEQUENCE == i] - OLD[SEQUENCE == i]).mean().exp() for i in range(6)])
    (-ratios * group_advantages(REWARDS, "grpo").flatten()).mean().backward()
    near(ours, new.grad.tolist(), 1e-7)


def test_ratio_one_still_has_the_policy_gradient():
    """On-policy the loss is -mean(A), about 0 when advantages cancel; its gradient is
    A·∇logprob."""
    new = NEW.clone().requires_grad_()
    value, metrics = loss(new, batch(old=None, sampler=SAMPLER), clip_high=0.2)
    value.backward()
    assert (metrics["ratio"] == 1).all()
    near(new.grad, (-ADVANTAGES / 16).tolist())
