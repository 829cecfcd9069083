"""train_grpo.py as a whole: one gradient however the work is split, exactly on-policy, equal to
TRL, learns, survives."""

import dataclasses
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from arithmetic import make_model, warm_up, write_problems
from nursery import PHASES, Nursery
from safetensors.torch import load_file
from tiny_model import make_tiny_vl

import train_grpo
from core.packing import next_problems
from core.samples import Sample, read_samples
from core.training import data_warnings
from data import collate_samples, rollout_batches
from train_grpo import Config, grpo_loss, score, set_advantages


def config(**more):
    return Config(
        model="", data=[], out="", **{"group": 4, "prompts": 4, "checkpointing": "none", **more}
    )


def made_up(seed=0, group=4, prompts=4):
    """Prompts and samples of random tokens, some truncated, some with forced tokens, one empty of
    sampled ones."""
    g = np.random.default_rng(seed)
    prompt_list = [
        SimpleNamespace(tokens=g.integers(0, 290, n).tolist(), pixel_values=None, grid_thw=None)
        for n in g.integers(3, 20, prompts)
    ]
    samples = []
    for p in range(prompts):
        for i in range(group):
            n = int(g.integers(1, 25))
            samples.append(
                Sample(
                    id=str(p),
                    sample=i,
                    problem=p,
                    tokens=g.integers(0, 290, n).tolist(),
                    logprobs=-g.random(n).astype(np.float32) * 3,
                    finish_reason="length" if i == 2 else "stop",
                    text="",
                    reward=float(g.random() < 0.5),
                    trained=True,
                )
            )
            if i == 1:
                samples[-1].forced_at, samples[-1].forced_tokens = n // 2, min(2, n - n // 2)
    samples[3].forced_at, samples[3].forced_tokens = 0, len(samples[3].tokens)
    return prompt_list, samples


def trainable(samples, c):
    """What `train_on` leaves of a step's samples."""
    return [s for s in samples if s.mask.any() and not (c.overlong_masking and s.truncated)]


def training(model, c, world):
    """As much of `core.training.Training` as an update needs."""
    return SimpleNamespace(model=model, optimizer=None, options=c, run=SimpleNamespace(world=world))


def batches_of(samples, prompts, c, world):
    return rollout_batches(samples, prompts, c.micro_tokens, world)


def indices_of(b):
    """Indices of a batch's samples, each of which has its index as advantage."""
    return [int(b.advantages[b.sequence == n][0]) for n in range(len(b.counts))]


def loss_of(model, b, samples, c):
    """The loss of a micro-batch of an update on `samples`, and its metrics."""
    tokens = sum(int(s.mask.sum()) for s in samples)
    return grpo_loss(*score(model, b, c, entropy=True), b, tokens, len(samples), c)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_vl(tmp_path_factory.mktemp("m"), tied=True)


@pytest.fixture(scope="module")
def model(model_dir, world):
    from model import build_model

    return build_model(model_dir, world)


# ------------------------------------------------------------------------------------- one gradient
OBJECTIVE = dict(kl_coef=0.1, overlong_masking=True, clip_high=0.28, temperature=0.8)


def update_gradient(model, reference, world, samples, prompts, c):
    """The gradient that `train_on` hands to the optimizer, and its figures."""
    seen, real = {}, (train_grpo.optim.guarded_step, train_grpo.data.rollout_batches)

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

    def off_policy(*args):
        batches = real[1](*args)
        for b in batches:  # ratios other than 1, so that clipping takes part
            b.old_logprobs = b.sampler_logprobs.clone() * 0.97
            b.ref_logprobs = score(reference, b, c)[0].detach() * 0.9
        return batches

    train_grpo.optim.guarded_step, train_grpo.data.rollout_batches = capture, off_policy
    try:
        set_advantages(samples, c)
        figures, _ = train_grpo.train_on(training(model, c, world), None, samples, prompts, 1.0)
    finally:
        train_grpo.optim.guarded_step, train_grpo.data.rollout_batches = real
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
        results.append((grads, figures))
    if world.is_main:
        torch.save(results, out)


def gradient_by_hand(model, aggregation="token_mean"):
    """The same update written as plainly as possible: sample by sample, one document each, every
    term spelled out."""
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
        mask = torch.from_numpy(s.mask)
        logp = logp[torch.arange(len(s.tokens)), torch.tensor(s.tokens)]
        old, ref = torch.from_numpy(s.logprobs) * 0.97, logp.detach() * 0.9
        ratio = (logp - old).exp()
        loss = -torch.minimum(ratio * s.advantage, ratio.clamp(0.8, 1.28) * s.advantage)
        loss = loss + 0.1 * ((ref - logp).exp() + logp - ref - 1)
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
    """A mean of per-micro-batch or per-rank means, a truncated or forced token in the denominator,
    a document that sees
    its neighbour in the pack: each makes the step depend on how it was split. Budget 1: packs as
    long as the longest
    sample; 10**6: one pack, so that other ranks run an empty one."""
    from test_model import load

    exact, loss = gradient_by_hand(load(model_dir))
    code, said = place.nursery.run(
        [model_dir, tmp_path / "g.pt", *budgets], ranks=size, call="test_grpo:gradients_on_ranks"
    )
    assert code == 0, said
    for grads, figures in torch.load(tmp_path / "g.pt", weights_only=False):
        assert distance(grads, exact) <= 1e-6
        assert abs(figures["loss"] - loss) <= 1e-6 * abs(loss)


def test_a_left_out_sample_is_as_if_it_had_never_been(model, world):
    """Truncated samples that stay in the denominator lower the learning rate unnoticed."""
    c = config(overlong_masking=True)
    prompts, samples = made_up()
    for s in samples:
        s.advantage = 1.0
    seen = []
    for left in (samples, [s for s in samples if not s.truncated]):
        left = trainable(left, c)
        seen.append(
            [loss_of(model, b, left, c)[0].item() for b in batches_of(left, prompts, c, world)]
        )
    assert seen[0] == seen[1] and len(trainable(samples, c)) == 11


def test_nothing_to_train_on_is_no_update(model, world):
    """An update on an all-masked batch is 0/0, or a step by momentum alone."""
    prompts, samples = made_up()
    for s in samples:
        s.finish_reason = "length"
    c = config(overlong_masking=True)
    assert train_grpo.train_on(training(model, c, world), None, samples, prompts, 1.0) == ({}, True)
    assert train_grpo.train_on(training(model, c, world), None, [], prompts, 1.0) == ({}, True)
    set_advantages([], c)


def test_an_update_reads_nothing_back_between_micro_batches(world, monkeypatch):
    """On a GPU a value read waits for all kernels in the queue, and the next forward starts
    late."""
    events, names = [], ("item", "tolist", "cpu", "numpy")
    weight = torch.zeros((), requires_grad=True)

    def made_up_scores(model, b, c, entropy):
        events.append("forward")
        return weight - b.sampler_logprobs, b.sampler_logprobs

    def watched(name, plain):
        return lambda t, *a: (events.append(name), plain(t, *a))[1]

    prompts, samples = made_up()
    c = config(micro_tokens=60, kl_coef=0)
    set_advantages(samples, c)
    batches = batches_of(trainable(samples, c), prompts, c, world)
    monkeypatch.setattr(train_grpo.data, "rollout_batches", lambda *_: batches)
    for name in names:
        monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    monkeypatch.setattr(train_grpo, "score", made_up_scores)
    monkeypatch.setattr(train_grpo.optim, "guarded_step", lambda *_, **__: (0.0, True))
    nothing = SimpleNamespace(config=SimpleNamespace(vision=None, image_token_id=None))
    train_grpo.train_on(training(nothing, c, world), None, samples, prompts, 1e-6)
    assert len(batches) > 2 and events[: len(batches)] == ["forward"] * len(batches)


NOTHING = ("collect", "freeze", "disable")


@pytest.fixture
def in_process(monkeypatch):
    """train_grpo.train in this process, which keeps its signal handlers and garbage collector."""
    monkeypatch.setattr("core.training.StopRequest", lambda: SimpleNamespace(requested=False))
    monkeypatch.setattr("core.training.gc", SimpleNamespace(**dict.fromkeys(NOTHING, lambda *_: 0)))
    monkeypatch.setattr("core.run._current", None)


def test_moments_are_in_host_memory_whenever_samples_are_drawn(tmp_path, in_process, monkeypatch):
    """Evaluation too: with the moments on the GPU it would find room for fewer slots, and the
    rollouts after it would keep these."""
    model_dir, data = make_model(tmp_path / "m"), write_problems(tmp_path / "p.jsonl", n=1)
    at, places, generate = ["start"], [], train_grpo.Sampler.generate
    for name, place in (("to_host", "cpu"), ("to_device", "device")):
        move = lambda _, place=place: at.append(place)  # noqa: E731
        monkeypatch.setattr(train_grpo.optim.Offload, name, move)

    def noted(*args, **how):
        places.append(at[-1])
        return generate(*args, **how)

    monkeypatch.setattr(train_grpo.Sampler, "generate", noted)
    monkeypatch.setattr(train_grpo, "train_on", lambda *_: (at.append("train"), ({}, True))[1])
    c = Config(str(model_dir), [str(data)], str(tmp_path / "o"), device="cpu")
    c = dataclasses.replace(c, eval_data=[str(data)])
    c = dataclasses.replace(c, offload_optimizer=True, kl_coef=0, steps=2, prompts=1, group=2)
    c = dataclasses.replace(c, max_new_tokens=2, prompt_style="plain", eval_every=1, graders=1)
    assert train_grpo.train(c) == 0
    assert places == ["cpu"] * 5, "three evaluations, two steps"


def test_an_empty_micro_batch_has_loss_zero_and_finite_gradients(model, world):
    """A rank that has no samples must still call backward, or the others wait for it for ever."""
    for kind in ("ppo_clip", "gspo", "cispo"):
        loss, metrics = loss_of(
            model, collate_samples([], []), made_up()[1], config(loss=kind, clip_high=0.3)
        )
        loss.backward()
        assert loss.item() == 0 and all(len(v) == 0 for v in metrics.values())
    assert all(p.grad is None or (p.grad.full_tensor() == 0).all() for p in model.parameters())
    model.zero_grad()


def test_the_ratio_is_one_when_the_old_forward_was_packed_otherwise(model, world):
    """Old log-probabilities from another micro-batching make ratios differ from 1 and clip tokens
    of an on-policy step."""
    prompts, samples = made_up()
    samples = trainable(samples, config())
    for i, s in enumerate(samples):
        s.advantage = i
    small, large = (batches_of(samples, prompts, config(micro_tokens=n), world) for n in (1, 10**6))
    with torch.no_grad():
        for b in small:
            logprobs = score(model, b, config())[0]
            for n, i in enumerate(indices_of(b)):
                samples[i].logprobs[samples[i].mask] = logprobs[b.sequence == n].numpy()
        (b,) = batches_of(samples, prompts, config(), world)
        b.old_logprobs = b.sampler_logprobs
        _, metrics = loss_of(model, b, samples, config())
    assert len(small) > 5 and len(large) == 1
    assert (metrics["ratio"] - 1).abs().max() <= 1e-5
    assert metrics["sampling/logp_difference_mean"].max() <= 1e-5
    assert metrics["clip_ratio/low_mean"].sum() == metrics["clip_ratio/high_mean"].sum() == 0


def test_updates_share_the_groups_and_see_each_sample_once(model, world, monkeypatch):
    """Mini-batches that cut a group or drop the rest would train on other data than was sampled."""
    prompts, samples = made_up(prompts=5)
    trained, seen, real = samples[:4] + samples[8:], [[]], grpo_loss
    for i, s in enumerate(samples):
        s.advantage = i

    def loss(logprobs, entropy, b, *counts):
        seen[-1] += indices_of(b)
        return real(logprobs, entropy, b, *counts)

    def step(model, *_, **__):
        seen.append([])
        model.zero_grad()
        return float(len(seen)), True

    monkeypatch.setattr(train_grpo, "grpo_loss", loss)
    monkeypatch.setattr(train_grpo.optim, "guarded_step", step)
    c = config(updates=2, micro_tokens=60)
    m, _ = train_grpo.train_on(training(model, c, world), None, trained, prompts, 1.0)
    tokens = sum(int(s.mask.sum()) for s in trained)
    assert (m["grad_norm"], m["trained_tokens"]) == (2.5, tokens)  # a mean over updates, a sum
    assert m["ratio"] == pytest.approx(1)  # a mean over the tokens of all updates
    first, second, _ = map(sorted, seen)
    assert (first, second) == ([0, 1, 2, *range(8, 12)], [*range(12, 20)])  # nothing sampled in 3


@pytest.mark.parametrize(
    "flags, named",
    [
        (dict(updates=3), "--updates"),
        (dict(overlong_buffer=5000), "overlong"),
        (dict(lora_rank=4, train_vision=True), "--train_vision"),
        (dict(loss="gspo"), "--clip_low 3e-4"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags, named):
    with pytest.raises(ValueError, match=named):
        config(**flags)


def test_data_that_are_trained_on_are_warned_of():
    c = SimpleNamespace(data=["d/a.jsonl", "b.jsonl"], eval_data=["./d/a.jsonl", "c.jsonl"])
    c.train_vision = False
    (said,) = data_warnings(c, "eval_data", False)
    assert said.startswith("warning: --eval_data ./d/a.jsonl: ")


def test_a_reward_that_cannot_be_loaded_shows_before_the_model_is_built(
    tmp_path, world, monkeypatch
):
    """It showed after minutes of loading a 7B."""
    for name in ("load_data", "build"):
        monkeypatch.setattr(train_grpo, name, lambda *a: pytest.fail("too late"))
    monkeypatch.setattr(train_grpo.data, "load_tokenizer", lambda path: None)
    monkeypatch.setattr(train_grpo, "opens_thought", lambda tokenizer: False)
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="can't be loaded: .*none.py: no such file"):
        c = Config(model=str(tmp_path), data=[], out=str(tmp_path / "o"), reward="none.py:f")
        train_grpo.train(c)


# ---------------------------------------------------------------------------------------------- TRL
@pytest.mark.parametrize(
    "loss_type, aggregation",
    [("dapo", "token_mean"), ("grpo", "seq_mean_token_mean"), ("dr_grpo", "constant")],
)
def test_advantages_and_loss_equal_trls(tmp_path, trl_trainer, loss_type, aggregation):
    """The same rollouts through TRL's GRPOTrainer: its advantages and its loss, off-policy (so that
    clips act) and with
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
                id=str(i // 4),
                sample=i % 4,
                problem=i // 4,
                tokens=t[:n].tolist(),
                logprobs=np.zeros(n, np.float32),
                finish_reason="stop",
                text="",
                reward=trainer.seen_rewards[i],
            )
        )
    rewards = torch.tensor(trainer.seen_rewards, dtype=torch.float64).view(-1, 4)
    advantages = train_grpo.group_advantages(rewards, "grpo", eps=1e-4).flatten()  # TRL's epsilon
    assert torch.allclose(advantages.float(), inputs["advantages"], atol=1e-5)
    assert len(set(trainer.seen_rewards)) > 2
    c = config(kl_coef=0.04, aggregation=aggregation, max_new_tokens=trainer.max_completion_length)
    for i, s in enumerate(samples):
        s.advantage = i
    (b,) = batches_of(samples, prompts, c, train_grpo.init("cpu"))
    rows = [(i, t) for i in indices_of(b) for t in range(len(samples[i].tokens))]
    b.advantages = torch.tensor([advantages[i] for i, _ in rows], dtype=torch.float32)
    b.old_logprobs, b.ref_logprobs = (
        torch.stack([inputs[k][i, t] for i, t in rows])
        for k in ("old_per_token_logps", "ref_per_token_logps")
    )
    loss, metrics = loss_of(ours, b, samples, c)
    assert metrics["clip_ratio/low_mean"].sum() > 0 and metrics["clip_ratio/high_mean"].sum() > 0
    assert abs(loss.item() - theirs) <= 1e-5


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory, world):
    """A GRPOTrainer with the rollouts that it sampled itself, and our model with the same
    weights."""
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


# --------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A nursery, and a model that is right on a quarter of the one-digit sums up to 3 + 3."""
    folder = tmp_path_factory.mktemp("grpo")
    model_dir, problems = make_model(folder / "m"), write_problems(folder / "p.jsonl", n=4)
    assert 0.2 <= warm_up(model_dir, problems) <= 0.3
    with Nursery(folder) as nursery:
        common = (
            f"--model {model_dir} --data {problems} --max_new_tokens 12 --prompt_style plain "
            "--graders 1 --slots 64 --reward strange_rewards:exact --checkpointing none "
            "--prompts 4 --group 4"
        ).split()
        yield SimpleNamespace(nursery=nursery, folder=folder, common=common, problems=problems)


def rows(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


TIMES = (
    "tok_per_s sample_tok_per_s step_time rollout_s image_s sample_s reward_s logprob_s update_s "
    "memory_gib"
).split()


def trace(out):
    """Everything of a run but its clock and memory."""
    return (
        [{k: v for k, v in r.items() if k not in TIMES} for r in rows(out)],
        {f.name: f.read_text() for f in sorted((out / "rollouts").glob("*"))},
        (out / "eval.jsonl").read_text() if (out / "eval.jsonl").is_file() else "",
        {k: v.numpy().tobytes() for k, v in load_file(out / "final" / "model.safetensors").items()},
    )


def test_killed_at_random_moments_it_ends_bit_equal(place):
    """Steps done twice, a truncated checkpoint, other rollouts after a restart, a lost or doubled
    evaluation."""
    flags = (
        f"--reward strange_rewards:slow --eval_data {place.problems} --eval_every 2 --lr 1e-3 "
        "--steps 5 --save_every 2 --zero_variance refill --updates 2"
    )
    flags = [*place.common, *flags.split()]
    assert place.nursery.run([*flags, "--out", place.folder / "straight"])[0] == 0
    killed, rng = place.folder / "killed", random.Random()
    kills = [
        place.nursery.kill_in([*flags, "--out", killed], phase, rng.random() * 0.05, skip)
        for phase, skip in zip(PHASES, (1, 4, 2, 1))
    ]
    code, said = place.nursery.run([*flags, "--out", killed])
    # where the last kill came too late, that start has ended the run, and this one finds it
    # complete
    assert code == 0 and sum(kills) >= 3 and ("resuming from" in said or not kills[-1])
    assert trace(killed) == trace(place.folder / "straight")
    assert [r["step"] for r in rows(killed, "eval.jsonl")] == [0, 2, 4, 5]


def test_hostile_rewards_are_counted_and_the_run_goes_on(place):
    """A reward that raises, hangs or returns NaN, None or text must cost its own sample only."""
    out = place.folder / "hostile"
    flags = "--reward strange_rewards:half_hostile --reward_deadline 0.3 --graders 4 --steps 1"
    flags = [*place.common, *flags.split(), "--prompts", 16, "--group", 2]
    code, said = place.nursery.run([*flags, "--out", out])
    assert code == 0 and "12 of 32 rewards failed; the first, of problem" in said
    (m,), samples = rows(out), rows(out, "rollouts/step_1.jsonl")
    assert all(m[k] == round(m[k], 3) for k in TIMES)
    assert m["reward_timeouts"] == 0.125 and m["reward_errors"] == 0.25 and len(samples) == 32
    assert all(s["reward"] == 0 for s in samples if s["status"] != "ok") and m["grad_norm"] > 0


def test_too_many_failed_rewards_stop_the_run_before_it_trains_on_them(place):
    out = place.folder / "stopped"
    flags = (
        "--reward strange_rewards:hostile --reward_deadline 0.3 --steps 1 --prompts 16 --group 2"
    )
    code, said = place.nursery.run([*place.common, *flags.split(), "--out", out])
    assert code == 2 and "24 of 32 rewards failed" in said
    assert len(rows(out, "rollouts/step_1.jsonl")) == 32
    assert not (out / "metrics.jsonl").is_file() and not (out / "final").exists()


def test_a_finished_run_is_left_alone(place):
    """Somebody may be reading its model."""
    out, written = place.folder / "finished", []
    for _ in range(2):
        assert place.nursery.run([*place.common, "--steps", 1, "--out", out])[0] == 0
        written.append((out / "final" / "model.safetensors").stat().st_mtime_ns)
    assert written[0] == written[1]


def test_another_runs_checkpoint_exports_and_the_best_model(place):
    """A copied checkpoint brings weights and stream; --export_every and OUT/best leave models
    that load; settings that don't change the method may change when a run goes on."""
    first, second = place.folder / "first", place.folder / "second"
    flags = [*place.common, "--lr", 3e-3, "--save_every", 2, "--eval_data", place.problems]
    flags += ["--eval_every", 1, "--group", 16]
    assert place.nursery.run([*flags, "--steps", 2, "--out", first])[0] == 0
    more = [*flags, "--steps", 4, "--export_every", 3, "--out", second, "--micro_tokens", 64]
    shutil.copytree(first / "checkpoints", second / "checkpoints")
    code, said = place.nursery.run(more)
    assert code == 0 and "resuming from" in said, said
    assert [m["step"] for m in rows(second)] == [3, 4]
    weights = load_file(second / "exports" / "step_3" / "model.safetensors")
    assert weights.keys() == load_file(second / "final" / "model.safetensors").keys()
    scores = [r["greedy"] for r in rows(first, "eval.jsonl")]
    assert json.loads((first / "best.json").read_text())["score"] == max(scores)
    assert (first / "best" / "model.safetensors").is_file()


def test_changed_data_are_refused_when_a_run_goes_on(place, tmp_path):
    """Under the same name another file gives another stream: the run would mix the two."""
    data = tmp_path / "p.jsonl"
    data.write_text(place.problems.read_text())
    flags = [data if f == str(place.problems) else f for f in place.common]
    flags += ["--save_every", 1, "--out", tmp_path / "o"]
    assert place.nursery.run([*flags, "--steps", 1])[0] == 0
    data.write_text("".join(reversed(place.problems.read_text().splitlines(keepends=True))))
    code, said = place.nursery.run([*flags, "--steps", 2])
    assert code == 2 and "has changed since" in said


OUT_OF_RANGE = (
    "group 1, seed -1, lr 3, clip_low 2, kl_coef -1, steps 0, slots -1, slots 0, lr -1, "
    "max_new_tokens 9999999, warmup_ratio 5, temperature 0"
)


@pytest.mark.parametrize("flag, value", [x.split() for x in OUT_OF_RANGE.split(", ")])
def test_numbers_out_of_range_are_refused_at_once(flag, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        argv = ["--model", "m", "--data", "d", "--out", "o", f"--{flag}={value}"]
        train_grpo.parse_config(Config, "", argv)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and f"--{flag} {value}" in said.replace(".0:", ":")


def test_two_ranks_sample_and_learn_as_one(place):
    """Seeds by rank would give every rank the same samples, or others at another world size; also
    the first step is
    on-policy: ratio 1, nothing clipped, trainer and sampler agree."""
    one, two = place.folder / "one", place.folder / "two"
    flags = [*place.common, "--lr", 1e-3, "--steps", 2, "--temperature", 0.7]
    assert place.nursery.run([*flags, "--out", one])[0] == 0
    assert place.nursery.run([*flags, "--out", two], ranks=2)[0] == 0
    a, b = rows(one, "rollouts/step_1.jsonl"), rows(two, "rollouts/step_1.jsonl")
    assert [(s["id"], s["sample"], s["tokens"], s["advantage"]) for s in a] == [
        (s["id"], s["sample"], s["tokens"], s["advantage"]) for s in b
    ]
    assert len({tuple(s["tokens"]) for s in a if s["problem"] == 0}) > 1, (
        "the samples of a group differ"
    )
    for m in rows(one) + rows(two):
        assert (
            m["sampling/logp_difference_max"] <= 1e-5
            and m["ratio_off_one_max"] == 0
            and m["clip_ratio/low_mean"] == m["clip_ratio/high_mean"] == 0
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


LEARNING = (
    "--lr 1e-3 --prompts 16 --group 32 --updates 2 --slots 64 --save_every 0 --kl_coef 0".split()
)


def test_it_learns_from_rewards_and_from_nothing_else(place):
    """The sum of all parts: a sign error, a shifted target or a wrong advantage shows as a curve
    that does not climb. With
    rewards that a coin decides, the same run must not climb."""
    learned, coin = place.folder / "learned", place.folder / "coin"
    assert place.nursery.run([*place.common, *LEARNING, "--steps", 30, "--out", learned])[0] == 0
    rates = solve_rates(learned, place.problems)
    assert rates[0] <= 0.32 and np.mean(rates[-5:]) >= 0.9, np.round(rates, 2)
    flags = [*place.common, *LEARNING, "--steps", 10, "--reward", "strange_rewards:coin"]
    assert place.nursery.run([*flags, "--out", coin])[0] == 0
    rates = solve_rates(coin, place.problems)
    assert np.mean(rates[-5:]) <= 0.4, np.round(rates, 2)


def test_problems_with_images_train_the_language_model_alone(place, tmp_path):
    """A frozen tower that gets weight decay, positions that forget the image, a sampled image
    placeholder (sampling at
    temperature 3 would meet one): on-policy and unmoved is what this run must be."""
    from PIL import Image
    from tiny import make_tiny_tokenizer

    model_dir = make_tiny_tokenizer(make_tiny_vl(tmp_path / "vl"))
    sizes = dict(
        min_pixels=3136, max_pixels=6272, patch_size=14, temporal_patch_size=2, merge_size=2
    )
    sizes |= dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (model_dir / "preprocessor_config.json").write_text(json.dumps(sizes))
    Image.effect_noise((60, 90), 80).convert("RGB").save(tmp_path / "x.png")
    problems = [
        {"id": str(i), "task": "t", "kind": "open", "question": f"{i}?", "answer": "1"}
        for i in range(4)
    ]
    for p in problems[1::2]:
        p |= {"question": f"<image>{p['question']}", "images": ["x.png"]}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    flags = (
        f"--model {model_dir} --data {tmp_path / 'p.jsonl'} --out {tmp_path / 'o'} --steps 2 "
        "--prompts 4 --group 4 --max_new_tokens 40 --temperature 3 --lr 1e-2 --weight_decay 0.1 "
        "--graders 1 --reward strange_rewards:coin --micro_tokens 300"
    )
    code, said = place.nursery.run(flags.split())
    assert code == 0, said
    for m in rows(tmp_path / "o"):
        assert m["sampling/logp_difference_max"] <= 1e-5 and m["ratio_off_one_max"] == 0
    before, after = (
        {
            k.replace("model.language_model.", "model.").replace("model.visual.", "visual."): v
            for k, v in load_file(d / "model.safetensors").items()
        }
        for d in (model_dir, tmp_path / "o" / "final")
    )
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.startswith("visual."), name
    sampled = {
        t
        for i in (1, 2)
        for s in read_samples(tmp_path / "o" / "rollouts" / f"step_{i}.jsonl")
        for t in s.tokens
    }
    assert not sampled & {300, 301, 302, 303, *range(307, 320)} and len(sampled) > 150


# -------------------------------------------------------------------- which problems a step samples
def test_an_epoch_has_every_problem_once_in_an_order_of_its_own():
    problems = [{"id": str(i)} for i in range(10)]
    epochs = [
        [p["id"] for p in next_problems(problems, range(e * 10, e * 10 + 10), 3)] for e in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [p["id"] for p in problems]
    assert epochs[0] != epochs[1]


PROBLEMS = [{"id": i, "task": "t"} for i in range(20)]


def fake_sampling(reward):
    """`train`'s `sample`, with the rewards of `reward(problem, sample index)` and no model."""

    def sample(problems, salts):
        samples = [
            Sample(str(p["id"]), j, [5], "stop", "", problem=i, reward=reward(p["id"], j))
            for i, p in enumerate(problems)
            for j in range(2)
        ]
        return samples, [None] * len(problems)

    return sample


def one_step(zero_variance, reward, cursor=0):
    c = config(zero_variance=zero_variance, group=2)
    return train_grpo.sample_step(fake_sampling(reward), PROBLEMS, cursor, c)


def test_refill_fills_the_batch():
    """Half the problems teach nothing: each step trains on 4 that do, and the stream goes on behind
    the last that was sampled."""
    cursor = 0
    for _ in range(3):
        samples, prompts, end = one_step("refill", lambda i, j: float(j) if i % 2 else 1.0, cursor)
        trained = [s for s in samples if s.trained]
        assert len(trained) == 8 and all(int(s.id) % 2 for s in trained)
        assert len(samples) == 2 * len(prompts) == 2 * (end - cursor) and len(prompts) > 4
        ids = [p["id"] for p in next_problems(PROBLEMS, range(cursor, end), 0)]
        assert [int(s.id) for s in samples[::2]] == ids
        assert [s.problem for s in samples[::2]] == list(range(len(prompts)))
        cursor = end


def test_refill_gives_up_when_all_groups_are_equal():
    """A solved data set must not make the step sample for ever."""
    samples, prompts, cursor = one_step("refill", lambda i, j: 1.0)
    assert len(prompts) == train_grpo.MOST_BATCHES * 4 == cursor
    assert not any(s.trained for s in samples)


@pytest.mark.parametrize("kind, trained", [("keep", 8), ("drop", 4)])
def test_keep_and_drop_sample_one_batch(kind, trained):
    differing = [p["id"] for p in next_problems(PROBLEMS, (0, 1), 0)]
    samples, _, cursor = one_step(kind, lambda i, j: float(j) if i in differing else 0.0)
    assert (len(samples), sum(s.trained for s in samples), cursor) == (8, trained, 4)


# -------------------------------------------------------------------------------- the packed stream
def of_tokens(problem, tokens, **more):
    logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
    return Sample(str(problem), 0, tokens, "stop", "", problem=problem, logprobs=logprobs, **more)


def test_the_stream_has_each_target_one_row_before_its_token():
    """A shift by one trains on the wrong token and still learns something: nobody would notice."""
    samples = [
        of_tokens(0, [7, 8], advantage=0.5),
        of_tokens(1, [9, 4, 6], forced_at=1, forced_tokens=1, advantage=-1.0),
    ]
    prompts = [
        SimpleNamespace(tokens=t, pixel_values=None, grid_thw=None) for t in ([1, 2, 3], [5])
    ]
    b = collate_samples(samples, prompts)
    no = -100
    assert b.stream.tokens.tolist() == [1, 2, 3, 7, 8, 5, 9, 4, 6]
    assert b.stream.targets.tolist() == [no, no, 7, 8, no, 9, no, 6, no]  # 4 was forced: no target
    assert b.stream.cu_seqlens.tolist() == [0, 5, 9]
    assert b.stream.position_ids[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert b.sequence.tolist() == [0, 0, 1, 1] and b.counts.tolist() == [2, 2]
    assert b.advantages.tolist() == [0.5, 0.5, -1, -1]
    assert b.sampler_logprobs.tolist() == [-1, -2, -1, -3]


def test_positions_go_on_behind_an_image():
    """An image takes fewer positions than tokens: counting tokens would shift every position of the
    completion."""
    image = SimpleNamespace(
        tokens=[1, 99, 99, 99, 99, 2],
        pixel_values=torch.zeros(16, 4),
        grid_thw=torch.tensor([[1, 4, 4]]),
    )
    b = collate_samples([of_tokens(0, [7, 8], advantage=0.0)], [image], 99, 2).stream
    assert b.position_ids[0].tolist() == [0, 1, 1, 1, 1, 3, 4, 5]
    assert b.position_ids[2].tolist() == [0, 1, 2, 1, 2, 3, 4, 5]
    assert b.pixel_values.shape == (16, 4) and b.grid_thw.tolist() == [[1, 4, 4]]
