"""The sampler against transformers' generate, the model's own full forward, and itself in other
batches and orders."""

import copy
import dataclasses
import gc
import weakref
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from ranks import run_ranks
from scipy import stats
from tiny import make_tiny_tokenizer
from tiny_model import TEXT, VOCAB, make_tiny_qwen2, make_tiny_vl

import sampler as sampler_module
from core.attention import attend
from core.chat import banned_token_ids, stop_token_ids
from core.decode_kernels import (
    Graphs,
    bucket_of,
    decode_attend,
    exp_and_sum,
    merge_parts,
    pack_queries,
    plan_attention,
    rotate,
    swiglu,
    warm_up_stream,
)
from core.decode_weights import DecodeWeights, fuse
from core.random_numbers import sample_key, uniform
from core.slots import ForcedExit, Slots, close_table, exit_positions, force_exit, number_of_slots
from core.vision import mrope_positions
from core.weights import load_hf
from data import Prompt
from model import Model, ModelConfig
from sampler import Sampler, SamplingParams, Scheduler, nucleus, sample_token, samples_sharing
from tools.memory import published_config

IMAGE, START, END = 302, 300, 301  # ids of tiny_model's configs
BANNED = [300, 301, 302, 303]


def load(path, with_vision=False):
    model = Model(ModelConfig.from_dir(path), with_vision)
    load_hf(model, path)
    model.set_banned_ids(BANNED)
    return model


@pytest.fixture(scope="module")
def model(tiny_vl):
    return load(tiny_vl)


@pytest.fixture(scope="module")
def seeing(tiny_vl):
    return load(tiny_vl, with_vision=True)


def text_prompt(length, seed=0):
    g = torch.Generator().manual_seed(1000 * seed + length)
    return Prompt(torch.randint(0, 290, (length,), generator=g).tolist(), None, None)


def image_prompt(*grids, seed=0):
    """Text, images of random patches, text."""
    g = torch.Generator().manual_seed(seed)
    tokens = text_prompt(7, seed).tokens
    for h, w in grids:
        tokens += [START, *[IMAGE] * (h * w // 4), END, *text_prompt(3, seed + h).tokens]
    patches = sum(h * w for h, w in grids)
    return Prompt(
        tokens, torch.randn(patches, 1176, generator=g), torch.tensor([[1, h, w] for h, w in grids])
    )


def hf_greedy(path, prompts, new):
    """What transformers' generate makes of each prompt alone."""
    from transformers import AutoModelForCausalLM, Qwen2_5_VLForConditionalGeneration

    vl = "qwen2_5_vl" in (path / "config.json").read_text()
    theirs = (
        (Qwen2_5_VLForConditionalGeneration if vl else AutoModelForCausalLM)
        .from_pretrained(path, attn_implementation="eager")
        .eval()
    )
    out = []
    for p in prompts:
        ids = torch.tensor([p.tokens])
        images = (
            {}
            if p.pixel_values is None
            else dict(
                pixel_values=p.pixel_values,
                image_grid_thw=p.grid_thw,
                mm_token_type_ids=(ids == IMAGE).int(),
            )
        )
        whole = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=BANNED,
            **images,
        )
        out.append(whole[0, len(p.tokens) :].tolist())
    return out


def teacher_forced(model, prompt, rollout, temperature=1.0):
    """Log-probabilities of a rollout's tokens by one full forward of the trainer's model."""
    tokens = torch.tensor([*prompt.tokens, *rollout.tokens])
    start = len(prompt.tokens)
    positions, delta = torch.arange(start).expand(3, -1), 0
    if prompt.grid_thw is not None:
        positions, delta = mrope_positions(
            torch.tensor(prompt.tokens), prompt.grid_thw, image_token_id=IMAGE, merge_size=2
        )
    positions = torch.cat(
        [positions, torch.arange(start, len(tokens)).expand(3, -1) + delta], dim=1
    )
    targets = torch.cat([torch.full((start - 1,), -100), tokens[start:], torch.tensor([-100])])
    with torch.no_grad():
        logprobs, _ = model(
            tokens,
            positions,
            torch.tensor([0, len(tokens)]).int(),
            targets=targets,
            temperature=temperature,
            pixel_values=prompt.pixel_values,
            grid_thw=prompt.grid_thw,
        )
    return logprobs[start - 1 : -1].numpy()


def assert_same(a, b, tolerance=3e-6):
    """Same samples: tokens, masks, reasons equal; log-probabilities up to the rounding of other
    matrix shapes."""
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert (x.tokens, x.finish_reason, x.mask.tolist()) == (
            y.tokens,
            y.finish_reason,
            y.mask.tolist(),
        )
        assert np.abs(x.logprobs - y.logprobs).max() <= tolerance


# --------------------------------------------------------------------------------- parity (1, 2, 3)
@pytest.mark.parametrize("kind", ["vl", "vl_tied", "qwen2"])
def test_greedy_text_equals_transformers_generate(tmp_path, kind):
    """Ragged prompts, fewer slots than prompts: a wrong cache position, mask or fused weight shows
    in the tokens."""
    path = (
        make_tiny_qwen2(tmp_path)
        if kind == "qwen2"
        else make_tiny_vl(tmp_path, tied=kind == "vl_tied")
    )
    prompts = [text_prompt(n) for n in (1, 5, 17, 63, 64, 65)]
    ours = load(path)
    rollouts = Sampler(ours, max_len=130, slots=4).generate(
        prompts, SamplingParams(temperature=0, max_new_tokens=64)
    )
    assert [r.tokens for r in rollouts] == hf_greedy(path, prompts, 64)
    for p, r in zip(prompts, rollouts):
        assert np.abs(r.logprobs - teacher_forced(ours, p, r)).max() <= 1e-5
        assert r.finish_reason == "length" and r.mask.all() and r.logprobs.dtype == np.float32


def test_greedy_images_equal_transformers_generate(tiny_vl, seeing):
    """One image, two images, text and images in one batch: a lost M-RoPE offset shows after the
    first token, images
    given to the wrong prompt at once."""
    prompts = [
        image_prompt((4, 6)),
        text_prompt(9),
        image_prompt((8, 4), (4, 10), seed=1),
        image_prompt((6, 6), seed=2),
    ]
    s = Sampler(seeing, max_len=120, slots=3)
    rollouts = s.generate(prompts, SamplingParams(temperature=0, max_new_tokens=64))
    assert [r.tokens for r in rollouts] == hf_greedy(tiny_vl, prompts, 64)
    for p, r in zip(prompts, rollouts):
        assert np.abs(r.logprobs - teacher_forced(seeing, p, r)).max() <= 1e-5


def test_second_call_with_other_images_keeps_nothing_of_the_first(seeing):
    """A rope offset or image kept between calls would move the second call's positions."""
    s, params = (
        Sampler(seeing, max_len=120, slots=2),
        SamplingParams(temperature=0, max_new_tokens=20),
    )
    s.generate([image_prompt((8, 8)), image_prompt((4, 12), seed=4)], params)
    second = [image_prompt((4, 6), seed=5), text_prompt(20)]
    assert_same(
        s.generate(second, params),
        Sampler(seeing, max_len=120, slots=2).generate(second, params),
        0,
    )
    assert_same(s.generate(second[:1], params), s.generate(second, params)[:1])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_logprobs_equal_the_trainers(model, temperature):
    """Before temperature, over another vocabulary, or of a neighbouring token: a policy gradient
    would be wrong."""
    prompts = [text_prompt(n) for n in (3, 30)]
    params = SamplingParams(n=5, temperature=temperature, max_new_tokens=40, stop_ids=range(20))
    for r in Sampler(model, max_len=80, slots=4).generate(prompts, params):
        assert (
            np.abs(
                r.logprobs - teacher_forced(model, prompts[r.prompt_index], r, temperature)
            ).max()
            <= 1e-5
        )
        assert not set(r.tokens) & set(BANNED)


def test_bf16_weights_and_cache(model):
    """bf16: the cache, logits and log-probabilities stay close to fp32's, and log-probabilities are
    fp32."""
    prompts = [text_prompt(n) for n in (3, 30)]
    s = Sampler(copy.deepcopy(model).bfloat16(), max_len=80, slots=4)
    rollouts = s.generate(prompts, SamplingParams(max_new_tokens=20))
    for p, r in zip(prompts, rollouts):
        assert r.logprobs.dtype == np.float32
        assert np.abs(r.logprobs - teacher_forced(model, p, r)).mean() < 0.05


def with_(sampler, **attributes):
    """What a GPU has other values of: `sync_every`, `prefill_tokens`."""
    for name, value in attributes.items():
        assert hasattr(sampler, name)
        setattr(sampler, name, value)
    return sampler


# ---------------------------------------------------------- one sample, however it is batched (4–7)
MANY = [text_prompt(n, seed=1) for n in (3, 41, 8, 25, 1, 12, 33, 19)]
PARAMS = SamplingParams(n=8, max_new_tokens=30, stop_ids=range(12), seed=3)


@pytest.fixture(scope="module")
def together(model):
    return Sampler(model, max_len=80, slots=64).generate(MANY, PARAMS)


@pytest.mark.parametrize(
    "settings",
    [
        dict(slots=1),
        dict(slots=5),
        dict(slots=5, min_rows=16),
        dict(slots=16, prefill_tokens=1),
        dict(slots=7, sync_every=8),
        dict(slots=64, sync_every=16),
    ],
    ids=str,
)
def test_samples_do_not_depend_on_slots_refills_or_syncs(model, together, settings):
    """64 samples at once, one by one, through 5 refilled slots, with K = 1, 8, 16: the same
    samples."""
    inner = {k: settings.pop(k) for k in ("sync_every", "prefill_tokens") if k in settings}
    s = with_(Sampler(model, max_len=80, **settings), **inner)
    assert_same(s.generate(MANY, PARAMS), together)


def test_a_sample_alone_is_the_sample_in_a_batch(model, together):
    """The needle: random numbers belong to (seed, sample id, position), not to a row or a call."""
    for i in (1, 6):
        alone = Sampler(model, max_len=80, slots=8).generate([MANY[i]], PARAMS, sample_ids=[i])
        expected = [dataclasses.replace(r, prompt_index=0) for r in together if r.prompt_index == i]
        assert_same(alone, expected)
    backwards = Sampler(model, max_len=80, slots=9).generate(
        MANY[::-1], PARAMS, sample_ids=range(7, -1, -1)
    )
    assert_same(sorted(backwards, key=lambda r: (-r.prompt_index, r.sample_index)), together)


def test_padded_batches_are_bitwise_equal(model):
    """With 16 rows at least, a row's matrix products do not depend on its neighbours: exact replay
    in another batch."""
    prompts = [text_prompt(20, seed=s) for s in range(6)]
    params = SamplingParams(n=2, max_new_tokens=25)
    a = Sampler(model, max_len=64, slots=12, min_rows=16).generate(prompts, params)
    b = Sampler(model, max_len=64, slots=3, min_rows=16).generate(prompts, params)
    assert_same(a, b, 0)


def test_seed_and_sample_id_matter(model, together):
    other = Sampler(model, max_len=80, slots=64).generate(MANY, dataclasses.replace(PARAMS, seed=4))
    assert sum(a.tokens == b.tokens for a, b in zip(together, other)) <= 2
    ids = Sampler(model, max_len=80, slots=64).generate(MANY, PARAMS, sample_ids=range(100, 108))
    assert sum(a.tokens == b.tokens for a, b in zip(together, ids)) <= 2
    assert len({tuple(r.tokens) for r in together}) > 55


def _sample_on_rank(world, path, out, copied):
    from core import parallel

    model = parallel.shard(load(path), world, compute_dtype=torch.float32)
    mine = range(world.rank, len(MANY), world.size)
    s = (copying if copied else Sampler)(model, max_len=80, slots=10)
    with pytest.raises(ValueError, match="sharded"):
        s.generate([MANY[0]], PARAMS)
    weight = model.lm_head.weight
    for factor in (0.5, 2.0):  # the second time with weights gathered anew
        with torch.no_grad():
            weight.mul_(factor)
        with s.weights():
            gathered = all(type(p) is torch.nn.Parameter for p in model.parameters())
            assert gathered is not copied  # a copy leaves the model sharded
            rollouts = s.generate([MANY[i] for i in mine], PARAMS, sample_ids=list(mine))
    torch.save(
        [dataclasses.replace(r, prompt_index=mine[r.prompt_index]) for r in rollouts],
        out / f"{world.rank}.pt",
    )


class FusedCopy(DecodeWeights):
    """Copies and fuses the weights, as on a GPU."""

    copies = True

    def _make_copy(self, like):
        copy = super()._make_copy(like)
        for layer in copy.model.layers:
            fuse(layer)
        return copy


def copying(model, **options):
    s = Sampler(model, **options)
    s.decoder = FusedCopy(model, s.decoder.build)
    return s


@pytest.mark.parametrize("copied", [False, True])
def test_two_ranks_with_sharded_weights_sample_what_one_does(tiny_vl, together, tmp_path, copied):
    run_ranks(2, _sample_on_rank, tiny_vl, tmp_path, copied)
    parts = [
        r for rank in range(2) for r in torch.load(tmp_path / f"{rank}.pt", weights_only=False)
    ]
    assert_same(sorted(parts, key=lambda r: (r.prompt_index, r.sample_index)), together)


class Poisoning(Scheduler):
    """Fills what a freed slot still holds with NaN. Its KV must be zero but for position 0, which
    the idle row goes on writing."""

    def collect(self):
        ended = super().collect()
        for slot, c in enumerate(self.running):
            if c is None:
                assert not self.slots.kv[:, :, slot, 1:].any()
                self.slots.kv[:, :, slot, 0] = float("nan")
                self.slots.hidden[slot], self.slots.logprobs[slot] = (float("nan"),) * 2
        return ended


@pytest.mark.parametrize("slots, every", [(5, 1), (5, 8), (64, 8)])
def test_freed_slots_leave_no_trace(model, together, slots, every, monkeypatch):
    """A later sample that saw one cached value of the last one would be NaN."""
    monkeypatch.setattr(sampler_module, "Scheduler", Poisoning)
    s = with_(Sampler(model, max_len=80, slots=slots), sync_every=every)
    for _ in range(2):
        assert_same(s.generate(MANY, PARAMS), together)


# --------------------------------------------------------------------------------------- edges (10)
def test_edges(model):
    s = Sampler(model, max_len=64, slots=3)
    assert s.generate([], PARAMS) == []
    everything = SamplingParams(n=7, max_new_tokens=5, stop_ids=range(VOCAB))
    first = s.generate([text_prompt(4), text_prompt(1)], everything)
    assert [(len(r.tokens), r.finish_reason) for r in first] == [
        (1, "stop")
    ] * 14  # ends at the first token
    one = s.generate(
        [text_prompt(4), text_prompt(1)],
        dataclasses.replace(everything, stop_ids=(), max_new_tokens=1),
    )
    assert [(len(r.tokens), r.finish_reason) for r in one] == [(1, "length")] * 14
    both = s.generate([text_prompt(4)], dataclasses.replace(everything, max_new_tokens=1))
    assert {r.finish_reason for r in both} == {
        "stop"
    }  # the limit and a stop in one step: it did stop
    full = s.generate(
        [text_prompt(34)], SamplingParams(max_new_tokens=30)
    )  # max_len to the last token
    assert len(full[0].tokens) == 30


def test_user_errors_come_before_any_work(model):
    s = Sampler(model, max_len=64)
    for prompt, params, message in [
        (text_prompt(60), SamplingParams(max_new_tokens=10), "max_len"),
        (Prompt([], None, None), PARAMS, "empty"),
        (Prompt([VOCAB], None, None), PARAMS, "tokenizer"),
        (image_prompt((4, 4)), PARAMS, "vision tower"),
    ]:
        with pytest.raises(ValueError, match=message):
            s.generate([text_prompt(3), prompt], params)
    with pytest.raises(ValueError, match="sample_ids"):
        s.generate([text_prompt(3)], PARAMS, sample_ids=[1, 2])
    for slots in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            Sampler(model, max_len=64, slots=slots)
    with pytest.raises(
        ValueError, match="would fit"
    ):  # 2 TB of address space, before torch takes it
        Sampler(model, max_len=10**10).generate([text_prompt(3)], PARAMS)
    for wrong in (dict(n=0), dict(temperature=-1), dict(top_p=0), dict(max_new_tokens=0)):
        with pytest.raises(ValueError):
            SamplingParams(**wrong)


def test_slots_come_from_the_memory_budget(model):
    """kv_gb that holds 10 slots gives 10; one that holds none, or fewer than asked for, says how
    many would fit."""
    per_slot = 2 * TEXT["num_hidden_layers"] * 2 * 16 * 4 * 64 / 1e9
    s = Sampler(model, max_len=64, kv_gb=10.5 * per_slot)
    s.generate([text_prompt(3)], SamplingParams(max_new_tokens=2))
    assert s.slots.kv.shape[2] == 10
    default = Sampler(model, max_len=64)
    default.generate([text_prompt(3)], SamplingParams(max_new_tokens=2))
    assert default.slots.kv.shape[2] == 64
    with pytest.raises(ValueError, match="10 would fit"):
        Sampler(model, max_len=64, slots=11, kv_gb=10.5 * per_slot).generate(
            [text_prompt(3)], PARAMS
        )
    with pytest.raises(ValueError, match="0 would fit"):
        Sampler(model, max_len=64, kv_gb=0.5 * per_slot).generate([text_prompt(3)], PARAMS)


@pytest.mark.parametrize("free, slots", [(53.9, 137), (15.2, 25), (90.0, 241), (6.0, None)])
def test_a_gpu_keeps_room_for_prefill_and_graphs(monkeypatch, free, slots):
    """The 7B in bf16 at 6,144 tokens: 4.1 GiB of prefill and 2 GiB; a share of what is free would
    keep 3 GiB of 15."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * 2**30), 0))
    form = (6144, 16384, published_config("7B"), torch.bfloat16, torch.device("cuda"))
    if slots is None:
        with pytest.raises(ValueError, match="0 would fit in 0 GB"):
            number_of_slots(None, None, *form)
    else:
        assert number_of_slots(None, None, *form) == slots


def test_finished_rollouts_survive_an_interrupt(model, together):
    """What was handed out before Ctrl-C is whole, and the sampler can be used again."""
    s, seen = Sampler(model, max_len=80, slots=6), []

    def finished(rollout):
        seen.append(rollout)
        if len(seen) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s.generate(MANY, PARAMS, on_finish=finished)
    expected = {(r.prompt_index, r.sample_index): r.tokens for r in together}
    assert all(expected[r.prompt_index, r.sample_index] == r.tokens for r in seen)
    assert_same(s.generate(MANY, PARAMS), together)


def test_running_out_of_memory_says_what_helps(model, monkeypatch):
    s = Sampler(model, max_len=80, slots=6)

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(sampler_module, "decode_step", fails)
    with pytest.raises(torch.OutOfMemoryError) as error:
        s.generate(MANY, PARAMS)
    assert "--slots 3" in error.value.__notes__[0]


def test_rollouts_are_handed_out_while_others_still_run(model):
    """Grading overlaps decoding only if a rollout arrives before the last one has ended."""
    s, live = Sampler(model, max_len=80, slots=6), []
    rollouts = s.generate(
        MANY, PARAMS, on_finish=lambda r: live.append(6 - int(s.slots.done.sum()))
    )
    assert len(live) == len(rollouts) == 64
    assert sum(n > 0 for n in live) > 50


# --------------------------------------------------------------------------------- forced exit (11)
CLOSE = {10: "</", 11: "think", 12: ">", 13: ">\n", 14: "<", 15: "a</", 16: "</think>", 17: ""}
PIECES = [CLOSE.get(i, "x") for i in range(VOCAB)]
EXIT = ForcedExit(0, [10, 11, 13], close_table(PIECES, "</think>"))


def forced(budget, answer=None):
    return dataclasses.replace(EXIT, budget=budget, answer_budget=answer)


def test_close_table_follows_the_text():
    """Against the plain search in the text, for random token sequences that are rich in pieces of
    the close."""
    table = EXIT.close_table
    rng = np.random.default_rng(0)
    for _ in range(300):
        state, text = 0, ""
        for i in rng.choice(
            [10, 11, 12, 13, 14, 15, 16, 17, 0],
            size=8,
            p=[0.25, 0.2, 0.15, 0.1, 0.1, 0.1, 0.02, 0.04, 0.04],
        ):
            state, text = int(table[state, i]), text + PIECES[i]
            if "</think>" in text:
                assert state == 8
                break
            assert state == max(k for k in range(8) if text.endswith("</think>"[:k]))


def run_script(script, budget):
    """Feed `script` as the sampled tokens through force_exit → (tokens, indices of inserted
    ones)."""
    exit = dataclasses.replace(EXIT, budget=budget, tokens=torch.tensor(EXIT.tokens))
    s = Slots(torch.zeros(9, 1, dtype=torch.long))
    s.exit_at.fill_(-1)
    s.limit.fill_(100)
    tokens, inserted = [], []
    for i, t in enumerate(script):
        token, was_forced = force_exit(s, torch.tensor([t]), exit)
        tokens.append(int(token))
        inserted += [i] if was_forced else []
        s.count += 1
    return tokens, inserted


@pytest.mark.parametrize(
    "script, budget, places",
    [
        ([0] * 8, 0, [0, 1, 2]),
        ([0] * 8, 1, [1, 2, 3]),
        ([0] * 8, 4, [4, 5, 6]),
        ([0, 10, 11, 12, 0, 0, 0, 0], 4, []),  # closed before the budget
        ([0, 10, 11, 12, 0, 0, 0, 0], 2, []),  # closing when the budget ends: let it
        ([0, 15, 11, 13, 0, 0, 0, 0], 2, []),  # the same in other tokens
        ([0, 10, 11, 0, 0, 0, 0, 0], 2, [4, 5, 6]),  # began to close and did not
        (
            [14, 14, 14, 14, 14, 14, 14, 14],
            1,
            [2, 3, 4],
        ),  # writes "<" for ever: no progress, no more patience
        ([0, 10, 11, 12, 0, 0, 10, 11], 5, []),  # nothing after the close counts
    ],
)
def test_forced_exit_waits_for_a_natural_close(script, budget, places):
    tokens, found = run_script(script, budget)
    assert found == places
    assert [tokens[i] for i in places] == EXIT.tokens[: len(places)]
    assert all(tokens[i] == script[i] for i in range(len(script)) if i not in places)


@pytest.mark.parametrize("budget, answer", [(0, None), (1, 4), (6, 6)])
def test_forced_exit_in_a_run(model, budget, answer):
    """Forced tokens stand where they must with mask 0 and the model's own log-probability, the
    answer has its budget,
    and forcing works through refills, whatever the batch."""
    stop = [*range(20, 26), 13]  # 13 is a token of the exit too: only a sampled one stops
    params = SamplingParams(
        n=6, max_new_tokens=30, stop_ids=stop, forced_exit=forced(budget, answer)
    )
    prompts = [
        text_prompt(5),
        Prompt([*text_prompt(9).tokens, 14, 11, 12], None, None),
    ]  # the second opens <think>
    rollouts = Sampler(model, max_len=64, slots=5).generate(prompts, params)
    assert_same(
        with_(Sampler(model, max_len=64, slots=12), sync_every=8).generate(prompts, params),
        rollouts,
    )
    reasons = set()
    for r in rollouts:
        reasons.add(r.finish_reason)
        assert np.abs(r.logprobs - teacher_forced(model, prompts[r.prompt_index], r)).max() <= 1e-5
        if not r.finish_reason.startswith("forced"):
            assert len(r.tokens) <= budget + 8 and r.mask.all()
            continue
        at = int((~r.mask).argmax())
        assert budget <= at <= budget + 7 and r.tokens[at : at + 3] == EXIT.tokens
        assert r.mask.sum() == len(r.tokens) - 3
        room = 30 if answer is None else at + 3 + answer
        assert len(r.tokens) == room if r.finish_reason == "forced+length" else r.tokens[-1] in stop
        assert len(r.tokens) <= room
    assert "forced+length" in reasons and (budget < 6 or "stop" in reasons)


def test_a_budget_that_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="raise max_new_tokens to 110"):
        SamplingParams(max_new_tokens=100, forced_exit=forced(90, 9))


def test_exit_positions_are_where_the_sampler_would_have_exited(model):
    """The budget curve of stored completions: against real forced exits with the same random
    numbers, whose tokens up to the exit are those of the free run."""
    params = SamplingParams(n=40, max_new_tokens=30, stop_ids=range(20, 26))
    prompt = [Prompt([*text_prompt(9).tokens, 14, 11, 12], None, None)]
    s = Sampler(model, max_len=64, slots=40)
    free = s.generate(prompt, params)
    for budget in (0, 3, 11):
        real = s.generate(prompt, dataclasses.replace(params, forced_exit=forced(budget)))
        unfinished = [c.finish_reason == "length" for c in free]
        assert exit_positions([c.tokens for c in free], unfinished, forced(budget)) == [
            c.forced_at for c in real
        ]


@pytest.mark.parametrize(
    "script, budget, unfinished, at",
    [
        ([0, 0, 0], 2, False, 2),
        ([0, 0, 0], 3, False, None),  # it ended by itself
        ([0, 0, 0], 3, True, 3),  # cut off at its end
        ([0, 0, 10], 3, True, 3),  # cut off while closing
        ([0, 0, 10], 2, False, 2),
        ([0, 10, 11, 12, 0, 0], 2, True, None),
        ([0, 10, 11, 0, 0, 0], 2, True, 4),
    ],
)
def test_exit_positions_at_the_end_of_a_completion(script, budget, unfinished, at):
    others = [[0] * 9, [16]]
    found = exit_positions([script, *others], [unfinished, True, True], forced(budget))
    assert found == [at, budget, None]


def test_both_ends_stop_and_no_image_token_can_be_sampled():
    """A missing end id reads as truncated samples; a sampled image placeholder breaks the next
    forward."""

    class Tokenizer:
        unk_token_id, eos_token_id = None, 304
        names = {"<|im_end|>": 304, "<|endoftext|>": 305, "<|image_pad|>": 302}

        def convert_tokens_to_ids(self, token):
            return self.names.get(token)

        def __len__(self):
            return 307

    assert stop_token_ids(Tokenizer()) == [304, 305]
    assert banned_token_ids(Tokenizer(), 310) == [302, 307, 308, 309]


def test_think_exit_from_a_tokenizer(tmp_path):
    """From a real byte-level tokenizer: the exit's ids spell the text, and its own encoding of a
    close is found."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_tokenizer(tmp_path))
    exit = ForcedExit.from_tokenizer(tokenizer, VOCAB, 5)
    assert tokenizer.decode(exit.tokens) == "</think>\n"
    for text, closes in [
        ("so 2 </think>\n\nthe answer", True),
        ("a</think", False),
        ("</ think>", False),
    ]:
        state = 0
        for i in tokenizer.encode(text, add_special_tokens=False):
            state = int(exit.close_table[state, i])
        assert (state == 8) == closes, text


# -------------------------------------------------------------------------------- sampling (12, 13)
def test_uniform_is_splitmix64():
    """The published first outputs of splitmix64 for seed 0, and never 0 or 1."""
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    u = uniform(torch.zeros(3, dtype=torch.long), torch.arange(3))
    assert u.tolist() == [(x >> 41) * 2**-23 + 2**-24 for x in outputs]
    many = uniform(torch.arange(200_000) * 7919, torch.zeros(200_000, dtype=torch.long))
    assert 0 < many.min() and many.max() < 1
    assert stats.kstest(many.numpy(), "uniform").pvalue > 1e-3
    triples = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0), (-1, 0, 0), (0, 2**63 - 1, 0)]
    keys = {sample_key(*t) for t in triples}
    assert len(keys) == 7 and all(-(2**63) <= k < 2**63 for k in keys)


def test_sampled_frequencies_follow_the_softmax():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=g) * 1.5
    u = uniform(
        torch.tensor([sample_key(0, i, 0) for i in range(20_000)]), torch.full((20_000,), 5)
    )
    token, lse = sample_token(logits.expand(20_000, -1), u, 1.0)
    assert torch.allclose(lse, logits.logsumexp(0))
    expected = logits.double().softmax(0) * 20_000
    assert stats.chisquare(token.bincount(minlength=50).numpy(), expected.numpy()).pvalue > 1e-3


def test_first_tokens_of_a_group_follow_the_model(model):
    """A first token shared by the whole group (sampled once at prefill) is a known bug of
    others."""
    prompt, n = text_prompt(6), 3000
    params = SamplingParams(n=n, max_new_tokens=1, temperature=0.5)
    rollouts = Sampler(model, max_len=16, slots=64).generate([prompt], params)
    with torch.no_grad():
        logits = model(
            torch.tensor(prompt.tokens), torch.arange(6).expand(3, -1), torch.tensor([0, 6]).int()
        )[-1]
    expected = (logits / 0.5).softmax(0).double().numpy() * n
    found = np.bincount([r.tokens[0] for r in rollouts], minlength=VOCAB)
    often = expected >= 5
    assert often.sum() > 5
    observed, awaited = [np.append(x[often], x[~often].sum()) for x in (found, expected)]
    assert stats.chisquare(observed, awaited / awaited.sum() * n).pvalue > 1e-3


def test_impossible_tokens_are_never_taken():
    """At both ends of the interval, with one-hot, banned (-1e30) and -inf logits."""
    assert (
        sample_token(torch.zeros(1, 2), torch.tensor([0.5]), 1.0)[0].item() == 1
    )  # intervals are open above
    logits = torch.full((6, 9), -1e30)
    logits[:, 4] = 3.0
    logits[3:, 6] = 2.0
    logits[5, 0] = -float("inf")
    for u in (2.0**-24, 0.5, 1 - 2.0**-24):
        token, _ = sample_token(logits, torch.full((6,), u), 1.0)
        assert set(token.tolist()) <= {4, 6} and token[:3].tolist() == [4] * 3


def test_top_p_keeps_what_transformers_keeps():
    from transformers import TopPLogitsWarper

    logits = torch.randn(40, 100, generator=torch.Generator().manual_seed(1)) * 3
    p = logits.softmax(-1)
    for share in (0.01, 0.3, 0.9):
        kept = TopPLogitsWarper(share)(None, logits) > -float("inf")
        assert torch.equal(nucleus(p, share) > 0, kept)
    u = torch.rand(40, generator=torch.Generator().manual_seed(2)).clamp(2e-7, 1 - 2e-7)
    assert torch.equal(sample_token(logits, u, 1e-6)[0], logits.argmax(-1))


def test_temperature_to_zero_is_greedy(model):
    prompts, s = [text_prompt(5), text_prompt(21)], Sampler(model, max_len=64, slots=4)
    greedy = s.generate(prompts, SamplingParams(temperature=0, max_new_tokens=20, seed=1))
    assert_same(
        s.generate(prompts, SamplingParams(temperature=0, max_new_tokens=20, seed=2)), greedy, 0
    )
    cold = s.generate(prompts, SamplingParams(temperature=1e-4, max_new_tokens=20))
    assert [r.tokens for r in cold] == [r.tokens for r in greedy]
    top1 = s.generate(prompts, SamplingParams(top_p=1e-6, max_new_tokens=20))
    assert [r.tokens for r in top1] == [r.tokens for r in greedy]
    assert_same(top1, greedy)  # log-probabilities are those of the whole distribution


# ------------------------------------------------------------------------------------- weights (15)
def test_new_weights_are_used_at_once(tiny_vl):
    """Any tensor kept from before the update would show against a fresh sampler."""
    model = load(tiny_vl)
    s, params = (
        Sampler(model, max_len=64, slots=4),
        SamplingParams(temperature=0, max_new_tokens=20),
    )
    before = s.generate([text_prompt(9)], params)
    for name in (name for name, _ in model.named_parameters()):
        if "layers.2" in name or "layers" not in name:
            with torch.no_grad():
                p = model.get_parameter(name)
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) * 0.2)
            after = s.generate([text_prompt(9)], params)
            assert np.abs(after[0].logprobs - before[0].logprobs).max() > 0, name
            assert_same(
                after, Sampler(model, max_len=64, slots=4).generate([text_prompt(9)], params), 0
            )
            before = after
    s.release()
    assert s.slots is None
    assert_same(s.generate([text_prompt(9)], params), before, 0)


# -------------------------------------------------------------------- the fused copy of the weights
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "tied"])
def test_a_fused_copy_samples_what_the_model_does(tiny_vl, tmp_path, kind):
    """Biases on q, k, v; norms on heads; a tied head; images through the copied tower."""
    if kind == "qwen2_5_vl":
        model = load(tiny_vl, with_vision=True)
    elif kind == "tied":
        model = load(make_tiny_qwen2(tmp_path))
    else:
        config = dataclasses.replace(load(tiny_vl).config, qk_norm=True, qkv_bias=False)
        torch.manual_seed(0)
        model = Model(config)
        for p in model.parameters():
            p.data += torch.randn_like(p) * 0.05
    images = [image_prompt((4, 4))] if model.visual is not None else []
    prompts = [text_prompt(9), text_prompt(30), *images]
    params = SamplingParams(n=3, max_new_tokens=24, seed=5)
    expected = Sampler(model, max_len=80, slots=4).generate(prompts, params)
    s = copying(model, max_len=80, slots=4)
    assert_same(s.generate(prompts, params), expected)
    with torch.no_grad():  # new weights are copied
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        model.model.layers[0].self_attn.v_proj.weight.mul_(0.5)
    expected = Sampler(model, max_len=80, slots=4).generate(prompts, params)
    assert_same(s.generate(prompts, params), expected)
    copy = weakref.ref(s.decoder.copy)
    gc.disable()  # as in training: 14 GiB of the 7B must not wait for the collector
    s.release()
    gc.enable()
    assert copy() is None


def test_what_is_compiled_on_a_gpu_equals_eager():
    """By torch's compiler for the CPU; with heads' norms as in Qwen3."""
    g = torch.Generator().manual_seed(0)
    cos, sin = torch.randn(2, 6, 8, generator=g)
    head = torch.rand(16, generator=g)
    qkv, logits = torch.randn(6, 8 * 16, generator=g), torch.randn(6, 500, generator=g)
    order = torch.tensor([2, 0, 5, 1, 4, 3], dtype=torch.int32)
    prompt, own = torch.randn(2, 6, 4, 16, generator=g)
    key, count = torch.randint(-(2**63), 2**63 - 1, (6,), generator=g), torch.arange(6) * 1000

    def everything():
        return (
            *rotate(qkv, cos, sin, head, head, 1e-6, 2, 16),
            swiglu(qkv),
            *exp_and_sum(logits, logits.amax(-1, True)),
            packed := pack_queries(prompt, order, 2),
            merge_parts(own, own[..., 0].t(), packed, packed[..., 0].t(), order, order - 1),
            uniform(key, count),
        )

    for ours, expected in zip(torch.compile(everything, fullgraph=True)(), everything()):
        assert ours.shape == expected.shape and (ours - expected).abs().max() <= 1e-4


# --------------------------------------------------------------------------------- decode attention
def test_decode_attention_equals_packed_attention():
    """Rows of very different lengths, grouped heads, rubbish beyond each row's end."""
    g = torch.Generator().manual_seed(0)
    lengths, capacity, heads, kv_heads, d = [0, 1, 63, 64, 65, 199, 7, 30, 128, 31], 200, 6, 2, 16
    rows = len(lengths)
    q = torch.randn(rows, heads, d, generator=g)
    k, v = torch.randn(2, rows, capacity, kv_heads, d, generator=g)
    length = torch.tensor(lengths)
    out = decode_attend(q, k, v, plan_attention(length, capacity, lengths))
    for i, n in enumerate(lengths):
        n += 1
        queries = torch.zeros(n, heads, d)
        queries[-1] = q[i]
        expected = attend(queries, k[i, :n], v[i, :n], torch.tensor([0, n]).int(), n, causal=True)[
            -1
        ]
        assert (out[i] - expected).abs().max() < 2e-6


def test_when_prompts_are_read_once(model, monkeypatch):
    """On a GPU in half precision, where enough prompt tokens go unread; a step with few samples
    reads each sample's own copy."""
    gpu = dict(is_cuda=True, dtype=torch.bfloat16)
    for samples, tokens, weight, expected in [
        (8, (500, 524), gpu, 8),
        (8, (500, 523), gpu, 0),
        (2, (900, 896), gpu, 2),
        (1, (5000,), gpu, 0),
        (8, (5000,), dict(gpu, is_cuda=False), 0),
        (8, (5000,), dict(gpu, dtype=torch.float32), 0),
    ]:
        prompts = [Prompt([1] * n, None, None) for n in tokens]
        assert samples_sharing(prompts, samples, SimpleNamespace(**weight)) == expected
    seen = []
    monkeypatch.setattr(sampler_module, "decode_step", lambda *args: seen.append(args[-1]))
    s = Sampler(model, max_len=8, slots=65)
    s._allocate(model.head_weight())
    step = s._step(model, PARAMS, 8)
    for rows in (63, 64):
        step([0] * rows)
    assert seen == [0, 8]


def test_every_batch_has_a_bucket():
    """A batch larger than its graph would drop samples, a graph larger than the slots would write
    beyond them."""
    for most in (1, 7, 64, 100, 256, 300):
        for rows in range(1, most + 1):
            assert rows <= bucket_of(rows, most) <= most


def test_recorded_graphs_keep_alive_what_they_read(monkeypatch):
    """A graph replays addresses. If nothing else held the ids that it was recorded with, the next
    call would free them, and replays would stop at whatever came to lie there."""
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr("core.decode_kernels.warm_up_stream", cache(warm_up_stream.__wrapped__))
    stop_ids = torch.tensor([7])
    graphs = Graphs(lambda rows, ids=stop_ids: ids + rows, 2)
    held = weakref.ref(stop_ids)
    del stop_ids
    assert len(graphs.graphs) == 2 and held() is not None
    Graphs(lambda rows: None, 3)
    assert torch.cuda.Stream.call_count == 1  # each would keep a workspace of cuBLAS
