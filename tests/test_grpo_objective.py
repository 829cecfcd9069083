"""The objective of train_grpo.py against golden values that were computed with other trainers' own functions (verl,
TRL) and by hand, in fp64. Fixture: 6 samples of lengths 3 2 4 1 4 2 in two groups, four token slots."""

import numpy as np
import pytest
import torch

from train_grpo import (
    group_advantages,
    importance_weights,
    kl_estimate,
    no_spread,
    policy_loss,
    soft_overlong_penalty,
    token_weights,
)

LENGTHS = np.array([3, 2, 4, 1, 4, 2])
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
    assert torch.allclose(
        torch.as_tensor(a, dtype=torch.float64),
        torch.tensor(b, dtype=torch.float64),
        atol=tolerance,
    ), a


def total(loss, kind, max_length=8):
    return (loss * torch.tensor(token_weights(LENGTHS, kind, max_length))[SEQUENCE]).sum()


def loss(kind="ppo_clip", low=0.2, high=0.28, dual=3.0):
    return policy_loss(
        NEW, OLD, ADVANTAGES, SEQUENCE, kind=kind, clip_low=low, clip_high=high, dual_clip=dual
    )[0]


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("grpo", [1.154699, -0.577349, -0.577349, 0.577349, 0.577349, -1.154699]),
        ("mean_only", [0.666667, -0.333333, -0.333333, 0.333333, 0.333333, -0.666667]),
        ("rloo", [1, -0.5, -0.5, 0.5, 0.5, -1]),
        ("batch_std", [1.217159, -0.60858, -0.60858, 0.60858, 0.60858, -1.217159]),
    ],
)
def test_advantages(kind, expected):
    near(group_advantages(REWARDS, kind).flatten(), expected)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("size", [3, 8, 16])
def test_a_constant_group_has_exactly_no_advantage(value, size):
    """Eight fp32 rewards of 0.1 have a std of 8e-9: divided by a small epsilon that is an advantage of 0.8."""
    for kind in ("grpo", "mean_only", "rloo", "batch_std"):
        assert (group_advantages(torch.full((2, size), value), kind) == 0).all()


def test_groups_without_spread_are_found_by_range_not_by_mean():
    assert no_spread(torch.tensor([[0.5, 0.5, 0.5], [0, 1, 0.0], [1, 1, 1]])).tolist() == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    "aggregation, expected",
    [
        ("token_mean", -0.04517353),
        ("seq_mean_token_mean", -0.02715291),
        ("seq_mean_token_sum", -0.12046276),
        ("constant", -0.01505784),
    ],
)
def test_ppo_clip_under_each_normaliser(aggregation, expected):
    near(total(loss(), aggregation), expected, 1e-7)


@pytest.mark.parametrize(
    "kind, low, high, aggregation, expected",
    [
        ("gspo", 3e-4, 4e-4, "seq_mean_token_mean", 0.00739817),
        ("gspo", 0.2, 0.28, "seq_mean_token_mean", -0.0348848),
        ("cispo", 0.2, 0.28, "token_mean", -0.0387838),
    ],
)
def test_other_losses(kind, low, high, aggregation, expected):
    near(total(loss(kind, low, high, dual=0.0), aggregation), expected, 1e-7)


def test_clip_fractions_count_only_tokens_whose_gradient_is_cut():
    clips = policy_loss(
        NEW, OLD, ADVANTAGES, SEQUENCE, kind="ppo_clip", clip_low=0.2, clip_high=0.28, dual_clip=3.0
    )[1]
    near(clips["clip_low"].mean(), 0.0625)
    near(clips["clip_high"].mean(), 0.125)


@pytest.mark.parametrize(
    "a, ratio, dual, expected",
    [
        (-1, 5, 3, 3),
        (-1, 5, 0, 5),
        (-1, 2, 3, 2),
        (-1, 0.5, 3, 0.8),
        (1, 1.5, 3, -1.28),
        (1, 0.5, 3, -0.5),
    ],
)
def test_scalar_cases_of_the_clip(a, ratio, dual, expected):
    one = torch.zeros(1, dtype=torch.float64)
    value, _ = policy_loss(
        one + np.log(ratio),
        one,
        one + a,
        torch.zeros(1, dtype=torch.long),
        kind="ppo_clip",
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=dual,
    )
    near(value, [expected])


@pytest.mark.parametrize("kind, expected", [("k1", 0.1125), ("k2", 0.0303125), ("k3", 0.02789014)])
def test_kl_values(kind, expected):
    near(kl_estimate(NEW, REF, kind).mean(), expected, 1e-7)


def test_kl_gradients_are_the_ones_documented():
    """Exact expectation over a 3-class softmax: k1 → 0, k2 → ∇KL(policy‖ref), k3 → ∇KL(ref‖policy)."""
    z = torch.tensor([0.3, -0.5, 0.9], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.1, 0.2, -0.4], dtype=torch.float64).log_softmax(0)

    def gradient(value):
        return torch.autograd.grad(value, z, retain_graph=True)[0]

    logp = z.log_softmax(0)
    p = logp.detach().exp()
    reverse = gradient((logp.exp() * (logp - ref)).sum())
    forward = gradient((ref.exp() * (ref - logp)).sum())
    for kind, exact in (
        ("k1", torch.zeros(3, dtype=torch.float64)),
        ("k2", reverse),
        ("k3", forward),
    ):
        near(gradient((p * kl_estimate(logp, ref, kind)).sum()), exact.tolist(), 1e-12)


@pytest.mark.parametrize("cap, expected", [(2.0, -0.07015067), (1.05, -0.06098949)])
def test_truncated_importance_sampling(cap, expected):
    w = importance_weights(OLD, SAMPLER, cap, mask=False)
    near((loss() * w).mean(), expected, 1e-7)


def test_importance_mask_drops_both_sides():
    w = importance_weights(torch.tensor([0.0, 0, 0]), torch.tensor([0.0, 1, -1]), 2.0, mask=True)
    near(w, [1, 0, 0])


def test_soft_overlong_penalty():
    assert [soft_overlong_penalty(n, 20, 4) for n in (10, 16, 17, 18, 20)] == [
        0,
        0,
        -0.25,
        -0.5,
        -1,
    ]
    assert soft_overlong_penalty(20, 20, 0) == 0


def test_the_normaliser_is_global():
    """Losses [1,1,1,1] and [3]: 1.4 over all tokens; a mean of per-micro-batch means would give 2.0."""
    w = token_weights(np.array([4, 1]), "token_mean", 8)
    assert abs(4 * w[0] * 1 + w[1] * 3 - 1.4) < 1e-12


@pytest.mark.parametrize("kind", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_a_left_out_sample_leaves_the_denominator_too(kind):
    """Truncated-and-masked samples still counted in the denominator would silently lower the learning rate."""
    with_hole, without = (
        token_weights(np.array([3, 0, 2]), kind, 8),
        token_weights(np.array([3, 2]), kind, 8),
    )
    assert with_hole[1] == 0 and np.array_equal(with_hole[[0, 2]], without)


def test_gspo_gradient_is_that_of_the_sample_ratio():
    """The token form's gradient equals the gradient of exp(mean log-ratio) · A, mean over samples."""
    new = NEW.clone().requires_grad_()
    value, _ = policy_loss(
        new, OLD, ADVANTAGES, SEQUENCE, kind="gspo", clip_low=10, clip_high=10, dual_clip=0
    )
    total(value, "seq_mean_token_mean").backward()
    ours, new.grad = new.grad.clone(), None
    ratios = torch.stack([(new[SEQUENCE == i] - OLD[SEQUENCE == i]).mean().exp() for i in range(6)])
    (-ratios * group_advantages(REWARDS, "grpo").flatten()).mean().backward()
    near(ours, new.grad.tolist(), 1e-12)


def test_ratio_one_still_has_the_policy_gradient():
    """On-policy the loss is -mean(A), about 0 when advantages cancel; its gradient is A·∇logprob all the same."""
    new = NEW.clone().requires_grad_()
    value, clips = policy_loss(
        new,
        new.detach(),
        ADVANTAGES,
        SEQUENCE,
        kind="ppo_clip",
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
    )
    value.sum().backward()
    assert (clips["ratio"] == 1).all() and torch.allclose(new.grad, -ADVANTAGES)
