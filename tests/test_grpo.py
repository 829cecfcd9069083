"""train_grpo.py as a whole: one gradient however the work is split, exactly on-policy, equal to TRL, learns, survives."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from arithmetic import make_model, warm_up, write_problems
from nursery import PHASES, Nursery
from safetensors.torch import load_file
from tiny_model import make_tiny_vl

import train_grpo
from rollouts import Sample, empty_rollouts, read_samples
from train_grpo import Config, micro_batch_loss, micro_batches, score, set_advantages, token_weights


def config(**more):
    return Config(
        model="", data=[], out="", **{"group": 4, "prompts": 4, "checkpointing": "none", **more}
    )


def made_up(seed=0, group=4, prompts=4):
    """Prompts and samples of random tokens, some truncated, some with forced tokens, one empty of sampled ones."""
    g = np.random.default_rng(seed)
    prompt_list = [
        SimpleNamespace(tokens=g.integers(0, 290, n).tolist(), pixel_values=None, grid_thw=None)
        for n in g.integers(3, 20, prompts)
    ]
    samples = []
    for p in range(prompts):
        for i in range(group):
            n = int(g.integers(1, 25))
            mask = np.ones(n, bool)
            mask[n // 2 : n // 2 + 2] = i != 1
            samples.append(
                Sample(
                    p,
                    i,
                    g.integers(0, 290, n).tolist(),
                    -g.random(n).astype(np.float32) * 3,
                    mask,
                    "length" if i == 2 else "stop",
                    "",
                    reward=float(g.random() < 0.5),
                )
            )
    samples[3].mask[:] = False
    return prompt_list, samples


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_vl(tmp_path_factory.mktemp("m"), tied=True)


@pytest.fixture(scope="module")
def model(model_dir, world):
    from model import build_model

    return build_model(model_dir, world)


# ---------------------------------------------------------------------------------------------------- one gradient
OBJECTIVE = dict(
    kl_coef=0.1,
    entropy_coef=0.01,
    tis_cap=1.5,
    overlong_masking=True,
    clip_high=0.28,
    temperature=0.8,
)


def update_gradient(model, reference, world, samples, prompts, c):
    """The gradient that `update` hands to the optimizer, and its figures."""
    seen = {}

    def capture(model, optimizer, **_):
        from torch.distributed.tensor import DTensor

        seen.update(
            {
                n: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
                for n, p in model.named_parameters()
            }
        )
        model.zero_grad()
        return 0.0, True

    real, train_grpo.optim.guarded_step = train_grpo.optim.guarded_step, capture
    try:
        set_advantages(samples, c)
        batches = micro_batches(list(range(len(samples))), samples, prompts, c, model, world)
        for b in batches:  # ratios other than 1, so that clipping takes part
            b.old_logprobs = b.sampler_logprobs.clone() * 0.97
            b.ref_logprobs = score(reference, b, c)[0].detach() * 0.9
        figures, _ = train_grpo.update(model, None, batches, samples, c, 1.0, world)
    finally:
        train_grpo.optim.guarded_step = real
    return seen, figures


def gradients_on_ranks(world, model_dir, out, *budgets):
    from model import build_model

    model = build_model(model_dir, world)
    results = []
    for budget in budgets:
        prompts, samples = made_up()
        grads, figures = update_gradient(
            model, model, world, samples, prompts, config(micro_tokens=int(budget), **OBJECTIVE)
        )
        results.append((grads, figures, [s.gap for s in samples]))
    if world.is_main:
        torch.save(results, out)


def gradient_by_hand(model, aggregation="token_mean"):
    """The same update written as plainly as possible: sample by sample, one document each, every term spelled out."""
    prompts, samples = made_up()
    c = config(**OBJECTIVE)
    set_advantages(samples, c)
    kept = [s for s in samples if s.mask.any() and not s.truncated]
    total = 0.0
    for s in kept:
        ids = torch.tensor(prompts[s.problem].tokens + s.tokens)
        logits = model(ids, torch.arange(len(ids)).expand(3, -1), torch.tensor([0, len(ids)]).int())
        logp = (logits / c.temperature).log_softmax(-1)[
            len(prompts[s.problem].tokens) - 1 : -1
        ]  # (completion, V)
        mask, entropy = torch.from_numpy(s.mask), -(logp.exp() * logp).sum(-1)
        logp = logp[torch.arange(len(s.tokens)), torch.tensor(s.tokens)]
        sampler = torch.from_numpy(s.logprobs)
        old, ref = sampler * 0.97, logp.detach() * 0.9
        ratio = (logp - old).exp()
        loss = -torch.minimum(ratio * s.advantage, ratio.clamp(0.8, 1.28) * s.advantage)
        if s.advantage < 0:
            loss = loss.clamp(max=-3 * s.advantage)
        loss = loss * (old - sampler).exp().clamp(max=1.5)
        loss = loss + 0.1 * ((ref - logp).exp() + logp - ref - 1) - 0.01 * entropy
        total = total + (loss * mask).sum() / sum(int(k.mask.sum()) for k in kept)
    total.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return grads, total.item()


def distance(a, b):
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-8)).item() for n in b)


@pytest.mark.parametrize(
    "size, budgets", [(1, [10**6, 70, 1]), (2, [10**6, 70, 1]), (4, [10**6, 70])]
)
def test_one_gradient_for_any_ranks_and_micro_batches(tmp_path, place, model_dir, size, budgets):
    """A mean of per-micro-batch or per-rank means, a truncated or forced token in the denominator, a document that sees
    its neighbour in the pack: each makes the step depend on how it was split. Budget 1: packs as long as the longest
    sample; 10**6: one pack, so that other ranks run an empty one."""
    from test_model import load

    exact, loss = gradient_by_hand(load(model_dir))
    code, said = place.nursery.run(
        [model_dir, tmp_path / "g.pt", *budgets], ranks=size, call="test_grpo:gradients_on_ranks"
    )
    assert code == 0, said
    for grads, figures, gaps in torch.load(tmp_path / "g.pt", weights_only=False):
        assert distance(grads, exact) <= 1e-6
        assert abs(figures["loss"] - loss) <= 1e-6 * abs(loss)
        assert sum(g > 0 for g in gaps) == sum(
            s.mask.any() and not s.truncated for s in made_up()[1]
        )


def test_a_left_out_sample_is_as_if_it_had_never_been(model, world):
    """Truncated samples that stay in the denominator lower the learning rate unnoticed."""
    c = config(overlong_masking=True, aggregation="seq_mean_token_mean")
    prompts, samples = made_up()
    set_advantages(samples, c)
    whole = micro_batches(list(range(16)), samples, prompts, c, model, world)
    without = micro_batches(
        [i for i in range(16) if not samples[i].truncated], samples, prompts, c, model, world
    )
    a, b = (
        sum(micro_batch_loss(model, x, c, world.device)[0] for x in xs).item()
        for xs in (whole, without)
    )
    assert a == b


def test_nothing_to_train_on_is_no_update(model, world):
    """An update on an all-masked batch is 0/0, or a step by momentum alone."""
    prompts, samples = made_up()
    for s in samples:
        s.finish_reason = "length"
    assert (
        micro_batches(
            list(range(16)), samples, prompts, config(overlong_masking=True), model, world
        )
        == []
    )
    rollouts = SimpleNamespace(samples=samples, prompts=prompts)
    assert train_grpo.train_on(
        model, None, None, rollouts, 1.0, config(overlong_masking=True), world
    ) == ({}, True)


def test_an_empty_micro_batch_has_loss_zero_and_finite_gradients(model, world):
    """A rank that has no samples must still call backward, or the others wait for it for ever."""
    for kind in ("ppo_clip", "gspo", "cispo"):
        loss, figures = micro_batch_loss(model, empty_rollouts(), config(loss=kind), world.device)
        loss.backward()
        assert loss.item() == 0 and all(len(v) == 0 for v in figures.values())
    assert all(p.grad is None or (p.grad.full_tensor() == 0).all() for p in model.parameters())
    model.zero_grad()


def test_the_ratio_is_one_when_the_old_forward_was_packed_otherwise(model, world):
    """Old log-probabilities from another micro-batching make ratios differ from 1 and clip tokens of an on-policy step."""
    prompts, samples = made_up()
    small, large = (
        micro_batches(list(range(16)), samples, prompts, config(micro_tokens=n), model, world)
        for n in (1, 10**6)
    )
    with torch.no_grad():
        for b in small:
            logprobs = score(model, b, config())[0]
            for n, i in enumerate(b.samples):
                samples[i].logprobs[samples[i].mask] = logprobs[b.sequence == n].numpy()
        (b,) = micro_batches(list(range(16)), samples, prompts, config(), model, world)
        b.old_logprobs = b.sampler_logprobs
        _, figures = micro_batch_loss(model, b, config(), world.device)
    assert len(small) > 5 and len(large) == 1
    assert (figures["ratio"] - 1).abs().max() <= 1e-5 and figures["gap"].max() <= 1e-5
    assert figures["clip_low"].sum() == figures["clip_high"].sum() == 0


def norm_gradient(model, loss):
    loss.backward()
    gradient = model.model.norm.weight.grad.full_tensor().clone()
    model.zero_grad()
    return gradient


def test_bypass_still_reports_the_gap_and_is_importance_weighted_reinforce(model, world):
    """With the sampler's log-probabilities as `old`, gap = old - sampler would be 0 by construction; and the correction
    must enter once, as the ratio: gradient -w·A·∇logprob."""
    prompts, samples = made_up()
    c = config(old_logprobs="sampler", clip_low=1.0, clip_high=1e9, dual_clip=0)
    set_advantages(samples, c)
    (b,) = micro_batches(list(range(16)), samples, prompts, c, model, world)
    b.old_logprobs = b.sampler_logprobs
    loss, figures = micro_batch_loss(model, b, c, world.device)
    assert figures["gap"].max() > 0.1
    ours = norm_gradient(model, loss)
    logprobs, _ = score(model, b, c)
    w = (logprobs - b.sampler_logprobs).exp().detach()
    theirs = norm_gradient(model, (-w * b.advantages * logprobs * b.weights).sum())
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-8)


def test_updates_share_the_groups_and_see_each_sample_once(model, world):
    """Mini-batches that cut a group or drop the rest would train on other data than was sampled."""
    prompts, samples = made_up(prompts=5)
    for s in samples[4:8]:
        s.trained = False
    seen = []
    real, train_grpo.update = (
        train_grpo.update,
        lambda m, o, batches, *a: (
            seen.append(sorted(i for b in batches for i in b.samples))
            or dict.fromkeys(
                (
                    "loss",
                    "policy_loss",
                    "grad_norm",
                    "entropy",
                    "kl",
                    "clip_low",
                    "clip_high",
                    "ratio",
                    "gap",
                    "gap_k3",
                    "ratio_off_one_max",
                    "gap_max",
                ),
                0.0,
            )
            | {"tokens": 1.0},
            True,
        ),
    )
    try:
        rollouts = SimpleNamespace(samples=samples, prompts=prompts)
        train_grpo.train_on(
            model, None, None, rollouts, 1.0, config(updates=2, old_logprobs="sampler"), world
        )
    finally:
        train_grpo.update = real
    assert seen == [[0, 1, 2, *range(8, 12)], [*range(12, 20)]]  # sample 3 has nothing sampled


def test_the_length_bias_is_where_it_is_said_to_be():
    """Weight of one token by its sample's length: equal under token_mean and constant, 1/n under seq_mean_token_mean."""
    n = np.array([10, 1000])
    for kind, ratio in (
        ("token_mean", 1),
        ("constant", 1),
        ("seq_mean_token_sum", 1),
        ("seq_mean_token_mean", 100),
    ):
        w = token_weights(n, kind, 4096)
        assert w[0] / w[1] == pytest.approx(ratio)


@pytest.mark.parametrize(
    "flags, named",
    [
        (dict(updates=3), "--updates"),
        (dict(tis_cap=2.0, old_logprobs="sampler"), "count twice"),
        (dict(group=1), "--group"),
        (dict(tis_mask=True), "--tis_cap"),
        (dict(temperature=0), "--temperature"),
        (dict(overlong_buffer=5000), "overlong"),
        (dict(rollout_only=True, zero_variance="refill"), "--rollout_only"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags, named):
    with pytest.raises(ValueError, match=named):
        config(**flags)


# -------------------------------------------------------------------------------------------------------------- TRL
@pytest.mark.parametrize(
    "loss_type, aggregation",
    [("dapo", "token_mean"), ("grpo", "seq_mean_token_mean"), ("dr_grpo", "constant")],
)
def test_advantages_and_loss_equal_trls(tmp_path, trl_trainer, loss_type, aggregation):
    """The same rollouts through TRL's GRPOTrainer: its advantages and its loss, off-policy (so that clips act) and with
    a KL term."""
    trainer, ours = trl_trainer
    trainer.loss_type = loss_type
    inputs = dict(trainer.rollouts)
    g = torch.Generator().manual_seed(1)
    noise = 0.3 * torch.randn(inputs["completion_ids"].shape, generator=g)
    with torch.no_grad():
        old = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            inputs["completion_ids"].shape[1],
        )[0]
    inputs["old_per_token_logps"] = old + noise
    inputs["ref_per_token_logps"] = old - 0.5 * noise
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(trainer.model, inputs).item()

    samples, prompts = [], []
    for i, (p, pm, t, tm) in enumerate(
        zip(
            *(inputs[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"))
        )
    ):
        n = int(tm.sum())
        if i % 4 == 0:
            prompts.append(
                SimpleNamespace(tokens=p[pm.bool()].tolist(), pixel_values=None, grid_thw=None)
            )
        samples.append(
            Sample(
                i // 4,
                i % 4,
                t[:n].tolist(),
                np.zeros(n, np.float32),
                np.ones(n, bool),
                "stop",
                "",
                reward=trainer.seen_rewards[i],
            )
        )
    rewards = torch.tensor(trainer.seen_rewards, dtype=torch.float64).view(-1, 4)
    advantages = train_grpo.group_advantages(rewards, "grpo", eps=1e-4).flatten()  # TRL's epsilon
    assert torch.allclose(advantages.float(), inputs["advantages"], atol=1e-5)
    assert len(set(trainer.seen_rewards)) > 2
    for s, a in zip(samples, advantages.tolist()):
        s.advantage = a
    c = config(
        kl_coef=0.04,
        aggregation=aggregation,
        dual_clip=0,
        max_new_tokens=trainer.max_completion_length,
    )
    (b,) = micro_batches(
        list(range(len(samples))), samples, prompts, c, ours, train_grpo.init("cpu")
    )
    rows = [(i, t) for i in b.samples for t in range(len(samples[i].tokens))]
    b.old_logprobs, b.ref_logprobs = (
        torch.stack([inputs[k][i, t] for i, t in rows])
        for k in ("old_per_token_logps", "ref_per_token_logps")
    )
    loss, figures = micro_batch_loss(ours, b, c, torch.device("cpu"))
    assert figures["clip_low"].sum() > 0 and figures["clip_high"].sum() > 0
    assert abs(loss.item() - theirs) <= 1e-5


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory, world):
    """A GRPOTrainer with the rollouts that it sampled itself, and our model with the same weights."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model import build_model

    folder = tmp_path_factory.mktemp("trl")
    model_dir = make_model(folder / "m")
    trainer = trl.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [float(len(c) % 3) for c in completions],
        args=trl.GRPOConfig(
            output_dir=str(folder / "o"),
            per_device_train_batch_size=16,
            num_generations=4,
            beta=0.04,
            max_completion_length=12,
            use_cpu=True,
            report_to="none",
            temperature=1.0,
            bf16=False,
            disable_tqdm=True,
            seed=3,
            use_bias_correction_kl=False,
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]
        ),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    kept = []
    real = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *a, **k: kept.append(real(*a, **k)) or kept[-1]
    trainer.model.train()
    trainer.rollouts = trainer._generate_and_score_completions(
        [{"prompt": f"{i}+1="} for i in range(4) for _ in range(4)]
    )
    trainer.seen_rewards = kept[0].sum(1).tolist()
    return trainer, build_model(model_dir, world)


# ------------------------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A nursery, and a model that is right on a quarter of the one-digit sums up to 3 + 3."""
    folder = tmp_path_factory.mktemp("grpo")
    model_dir, problems = make_model(folder / "m"), write_problems(folder / "p.jsonl", n=4)
    assert 0.2 <= warm_up(model_dir, problems) <= 0.3
    with Nursery(folder) as nursery:
        common = [
            "--model",
            model_dir,
            "--data",
            problems,
            "--max_new_tokens",
            12,
            "--prompt_style",
            "plain",
            "--graders",
            1,
            "--slots",
            64,
            "--reward",
            "strange_rewards:exact",
            "--checkpointing",
            "none",
            "--prompts",
            4,
            "--group",
            4,
        ]
        yield SimpleNamespace(nursery=nursery, folder=folder, common=common, problems=problems)


def rows(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


TIMES = (
    "tok_per_s",
    "sample_tok_per_s",
    "step_s",
    "rollout_s",
    "sample_s",
    "reward_s",
    "logprob_s",
    "update_s",
    "memory_gib",
)


def trace(out):
    """Everything of a run but its clock and memory."""
    return (
        [{k: v for k, v in r.items() if k not in TIMES} for r in rows(out)],
        {f.name: f.read_text() for f in sorted((out / "rollouts").glob("*"))},
        (out / "eval.jsonl").read_text() if (out / "eval.jsonl").is_file() else "",
        {k: v.numpy().tobytes() for k, v in load_file(out / "final" / "model.safetensors").items()},
    )


def test_killed_at_random_moments_it_ends_bit_equal(place):
    """Steps done twice, a torn checkpoint, other rollouts after a restart, a lost or doubled evaluation."""
    flags = [
        *place.common,
        "--reward",
        "strange_rewards:slow",
        "--eval_data",
        place.problems,
        "--eval_every",
        2,
        "--lr",
        1e-3,
        "--steps",
        5,
        "--save_every",
        2,
        "--zero_variance",
        "refill",
        "--updates",
        2,
    ]
    assert place.nursery.run([*flags, "--out", place.folder / "straight"])[0] == 0
    killed, rng = place.folder / "killed", random.Random()
    kills = [
        place.nursery.kill_in([*flags, "--out", killed], phase, rng.random() * 0.05, skip)
        for phase, skip in zip(PHASES, (1, 4, 2, 1))
    ]
    code, said = place.nursery.run([*flags, "--out", killed])
    # where the last kill came too late, that start has ended the run, and this one finds it complete
    assert code == 0 and sum(kills) >= 3 and ("resuming from" in said or not kills[-1])
    assert trace(killed) == trace(place.folder / "straight")
    assert [r["step"] for r in rows(killed, "eval.jsonl")] == [0, 2, 4, 5]


def test_hostile_rewards_are_counted_and_the_run_goes_on(place):
    """A reward that raises, hangs or returns NaN, None or text must cost its own sample only."""
    out = place.folder / "hostile"
    flags = [
        *place.common,
        "--reward",
        "strange_rewards:hostile",
        "--reward_deadline",
        0.3,
        "--graders",
        4,
        "--steps",
        1,
        "--prompts",
        16,
        "--group",
        2,
    ]
    code, said = place.nursery.run([*flags, "--out", out])
    assert code == 0 and "24 of 32 rewards failed; the first, of problem" in said
    (m,), samples = rows(out), rows(out, "rollouts/step_1.jsonl")
    assert m["reward_timeouts"] == 0.25 and m["reward_errors"] == 0.5 and len(samples) == 32
    assert all(s["reward"] == 0 for s in samples if s["status"] != "ok") and m["grad_norm"] > 0


def test_too_many_failed_rewards_stop_the_run_before_it_trains_on_them(place):
    out = place.folder / "stopped"
    flags = [
        *place.common,
        "--reward",
        "strange_rewards:hostile",
        "--reward_deadline",
        0.3,
        "--steps",
        1,
        "--prompts",
        16,
        "--group",
        2,
        "--max_reward_errors",
        0.1,
        "--out",
        out,
    ]
    code, said = place.nursery.run(flags)
    assert (
        code == 2
        and "--max_reward_errors" in said
        and len(rows(out, "rollouts/step_1.jsonl")) == 32
    )
    assert not (out / "metrics.jsonl").is_file() and not (out / "final").exists()


def test_replay_trains_as_the_run_that_sampled_did(place):
    """What is saved must be all that training needs, bit for bit; and --rollout_only samples the first step alike."""
    sampled, replayed, only = (place.folder / n for n in ("sampled", "replayed", "only"))
    flags, written = [*place.common, "--lr", 1e-3, "--steps", 2, "--zero_variance", "drop"], []
    for _ in range(
        2
    ):  # the second finds the run complete, and leaves a model alone that somebody may be reading
        assert place.nursery.run([*flags, "--out", sampled])[0] == 0
        written.append((sampled / "final" / "model.safetensors").stat().st_mtime_ns)
    assert written[0] == written.pop()
    code, said = place.nursery.run([*flags, "--out", replayed, "--replay", sampled])
    assert code == 0 and trace(replayed)[3] == trace(sampled)[3], said
    written.clear()
    for _ in range(2):  # the second finds all there and samples nothing again
        code, said = place.nursery.run(
            [*flags, "--steps", 1, "--out", only, "--rollout_only", "True"]
        )
        assert code == 0 and "finished: rollouts of 1 steps are in" in said
        assert (only / "status").read_text() == "finished\n" and len(rows(only)) == 1
        written.append((only / "rollouts" / "step_1.jsonl").stat().st_mtime_ns)
    assert written[0] == written[1]
    mine, theirs = rows(only, "rollouts/step_1.jsonl"), rows(sampled, "rollouts/step_1.jsonl")
    assert [s["tokens"] for s in mine] == [s["tokens"] for s in theirs] and not (
        only / "final"
    ).exists()
    code, said = place.nursery.run(
        [*flags, "--steps", 3, "--out", place.folder / "beyond", "--replay", sampled]
    )
    assert code == 2 and "step_3.jsonl is missing" in said


def test_two_ranks_sample_and_learn_as_one(place):
    """Seeds by rank would give every rank the same samples, or others at another world size; also the first step is
    on-policy: ratio 1, nothing clipped, trainer and sampler agree."""
    one, two = place.folder / "one", place.folder / "two"
    flags = [*place.common, "--lr", 1e-3, "--steps", 2, "--temperature", 0.7]
    assert place.nursery.run([*flags, "--out", one])[0] == 0
    assert place.nursery.run([*flags, "--out", two], ranks=2)[0] == 0
    a, b = rows(one, "rollouts/step_1.jsonl"), rows(two, "rollouts/step_1.jsonl")
    assert [(s["id"], s["sample"], s["tokens"], s["advantage"]) for s in a] == [
        (s["id"], s["sample"], s["tokens"], s["advantage"]) for s in b
    ]
    assert len({s["tokens"] for s in a if s["problem"] == 0}) > 1, "the samples of a group differ"
    for m in rows(one) + rows(two):
        assert (
            m["gap_max"] <= 1e-5
            and m["ratio_off_one_max"] == 0
            and m["clip_low"] == m["clip_high"] == 0
        )
    norms = [[m["grad_norm"] for m in rows(out)] for out in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def solve_rates(out, problems):
    """Share of right samples in each step, by the saved text and not by the reward."""
    gold = {p["id"]: p["answer"] for p in map(json.loads, problems.read_text().splitlines())}
    return [
        np.mean(
            [
                s["text"] == f"<answer>{gold[s['id']]}</answer>"
                for s in rows(out, f"rollouts/step_{i}.jsonl")
            ]
        )
        for i in range(1, len(rows(out)) + 1)
    ]


LEARNING = [
    "--lr",
    1e-3,
    "--prompts",
    16,
    "--group",
    32,
    "--updates",
    2,
    "--keep_sampler",
    "True",
    "--save_every",
    0,
    "--kl_coef",
    0,
]


def test_it_learns_from_rewards_and_from_nothing_else(place):
    """The sum of all parts: a sign error, a shifted target or a wrong advantage shows as a curve that does not climb. With
    rewards that a coin decides, the same run must not climb."""
    learned, coin = place.folder / "learned", place.folder / "coin"
    assert place.nursery.run([*place.common, *LEARNING, "--steps", 30, "--out", learned])[0] == 0
    rates = solve_rates(learned, place.problems)
    assert rates[0] <= 0.32 and np.mean(rates[-5:]) >= 0.9, np.round(rates, 2)
    assert (
        place.nursery.run(
            [
                *place.common,
                *LEARNING,
                "--steps",
                10,
                "--out",
                coin,
                "--reward",
                "strange_rewards:coin",
            ]
        )[0]
        == 0
    )
    rates = solve_rates(coin, place.problems)
    assert np.mean(rates[-5:]) <= 0.4, np.round(rates, 2)


def test_problems_with_images_train_the_language_model_alone(place, tmp_path):
    """A frozen tower that gets weight decay, positions that forget the image, a sampled image placeholder (sampling at
    temperature 3 would meet one): on-policy and unmoved is what this run must be."""
    from PIL import Image
    from tiny import make_tiny_tokenizer

    model_dir = make_tiny_tokenizer(make_tiny_vl(tmp_path / "vl"))
    (model_dir / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "min_pixels": 3136,
                "max_pixels": 6272,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            }
        )
    )
    Image.effect_noise((60, 90), 80).convert("RGB").save(tmp_path / "x.png")
    (tmp_path / "p.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": str(i),
                    "task": "t",
                    "kind": "open",
                    "question": f"<image>{i}?" if i % 2 else f"{i}?",
                    "answer": "1",
                    **({"images": ["x.png"]} if i % 2 else {}),
                }
            )
            + "\n"
            for i in range(4)
        )
    )
    flags = [
        "--model",
        model_dir,
        "--data",
        tmp_path / "p.jsonl",
        "--out",
        tmp_path / "o",
        "--steps",
        2,
        "--prompts",
        4,
        "--group",
        4,
        "--max_new_tokens",
        40,
        "--temperature",
        3,
        "--lr",
        1e-2,
        "--weight_decay",
        0.1,
        "--graders",
        1,
        "--reward",
        "strange_rewards:coin",
        "--micro_tokens",
        300,
    ]
    code, said = place.nursery.run(flags)
    assert code == 0, said
    for m in rows(tmp_path / "o"):
        assert m["gap_max"] <= 1e-5 and m["ratio_off_one_max"] == 0
    before, after = (
        load_file(d / "model.safetensors") for d in (model_dir, tmp_path / "o" / "final")
    )
    after = {
        k.replace("model.language_model.", "model.").replace("model.visual.", "visual."): v
        for k, v in after.items()
    }
    before = {
        k.replace("model.language_model.", "model.").replace("model.visual.", "visual."): v
        for k, v in before.items()
    }
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.startswith("visual."), name
    sampled = {
        t
        for i in (1, 2)
        for s in read_samples(tmp_path / "o" / "rollouts" / f"step_{i}.jsonl")[0]
        for t in s.tokens
    }
    assert not sampled & {300, 301, 302, 303, *range(307, 320)} and len(sampled) > 150
