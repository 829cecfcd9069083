"""rollouts.py and roller.py: the packed stream of samples, the saved files, which problems a step draws."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import roller as roller_module
from roller import Roller, draw
from rollouts import (
    Sample,
    banned_token_ids,
    collate_samples,
    generate_and_grade,
    problem_key,
    read_samples,
    stop_token_ids,
    write_samples,
)


def prompt(*tokens):
    return SimpleNamespace(tokens=list(tokens), pixel_values=None, grid_thw=None)


def sample(problem, index, tokens, mask=None, reward=0.0, **more):
    n = len(tokens)
    return Sample(
        problem,
        index,
        list(tokens),
        -np.arange(1, n + 1, dtype=np.float32),
        np.array(mask if mask is not None else [True] * n, bool),
        "stop",
        "text",
        reward=reward,
        **more,
    )


def test_the_stream_has_each_target_one_row_before_its_token():
    """A shift by one trains on the wrong token and still learns something: nobody would notice."""
    samples = [
        sample(0, 0, [7, 8], advantage=0.5),
        sample(1, 0, [9, 4, 6], [True, False, True], advantage=-1.0),
    ]
    b = collate_samples(
        [0, 1], samples, np.array([0.25, 0.125]), [prompt(1, 2, 3), prompt(5)], None, 1
    )
    assert b.tokens.tolist() == [1, 2, 3, 7, 8, 5, 9, 4, 6]
    assert b.targets.tolist() == [
        -100,
        -100,
        7,
        8,
        -100,
        9,
        -100,
        6,
        -100,
    ]  # 4 was forced: context, not target
    assert b.cu_seqlens.tolist() == [0, 5, 9] and b.position_ids[0].tolist() == [
        0,
        1,
        2,
        3,
        4,
        0,
        1,
        2,
        3,
    ]
    assert b.sequence.tolist() == [0, 0, 1, 1] and b.advantages.tolist() == [0.5, 0.5, -1, -1]
    assert b.weights.tolist() == [0.25, 0.25, 0.125, 0.125] and b.sampler_logprobs.tolist() == [
        -1,
        -2,
        -1,
        -3,
    ]


def test_positions_go_on_behind_an_image():
    """An image takes fewer positions than tokens: counting tokens would shift every position of the completion."""
    image = SimpleNamespace(
        tokens=[1, 99, 99, 99, 99, 2],
        pixel_values=torch.zeros(16, 4),
        grid_thw=torch.tensor([[1, 4, 4]]),
    )
    b = collate_samples([0], [sample(0, 0, [7, 8])], np.ones(1), [image], 99, 2)
    assert b.position_ids[0].tolist() == [0, 1, 1, 1, 1, 3, 4, 5]
    assert b.position_ids[2].tolist() == [0, 1, 2, 1, 2, 3, 4, 5]
    assert b.pixel_values.shape == (16, 4) and b.grid_thw.tolist() == [[1, 4, 4]]


def test_saved_samples_come_back_bit_for_bit(tmp_path):
    """A replay trains on what is read: a log-probability rounded by JSON would make it another run."""
    problems = [{"id": "a", "task": "t", "answer": "1"}, {"id": "b", "task": "t", "answer": "2"}]
    written = [sample(0, 0, [7, 8], [True, False], reward=1.0), sample(1, 0, [9], trained=False)]
    written[0].logprobs[:] = [np.float32(-1 / 3), -np.float32(1e-30)]
    write_samples(tmp_path / "r" / "step_1.jsonl", written, problems, ["p", "q"])
    read, ids = read_samples(tmp_path / "r" / "step_1.jsonl")
    assert ids == ["a", "b"]
    for a, b in zip(written, read):
        assert (a.tokens, a.mask.tolist(), a.reward, a.trained, a.finish_reason, a.text) == (
            b.tokens,
            b.mask.tolist(),
            b.reward,
            b.trained,
            b.finish_reason,
            b.text,
        )
        assert a.logprobs.tobytes() == b.logprobs.tobytes()


def test_a_file_that_is_no_rollout_is_named_with_its_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"problem": 0}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:1: not a saved rollout"):
        read_samples(tmp_path / "x.jsonl")


class Grader:
    """Answers late and in reverse order, as processes may."""

    def submit(self, problem, text, finish_reason):
        return SimpleNamespace(
            result=lambda: SimpleNamespace(
                score=float(text == problem["answer"]), status="ok", answer=text
            )
        )


class FakeSampler:
    """Completions that end in any order; the text of a completion is its tokens."""

    def generate(self, prompts, params, sample_ids, on_finish):
        self.sample_ids = sample_ids
        for i in reversed(range(len(prompts))):
            for j in range(params.n):
                tokens = [prompts[i].tokens[0], j, 304]
                on_finish(
                    SimpleNamespace(
                        prompt_index=i,
                        sample_index=j,
                        tokens=tokens,
                        logprobs=[-1.0] * 3,
                        mask=[True] * 3,
                        finish_reason="stop",
                    )
                )


class Tokenizer:
    unk_token_id, eos_token_id = None, 304
    names = {"<|im_end|>": 304, "<|endoftext|>": 305, "<|image_pad|>": 302}

    def decode(self, tokens):
        return " ".join(map(str, tokens))

    def convert_tokens_to_ids(self, token):
        return self.names.get(token)

    def __len__(self):
        return 307


def test_rewards_reach_the_sample_that_earned_them():
    """Samples end in another order than they are returned: a reward by order of arrival is another sample's."""
    problems = [{"id": str(i), "answer": f"{i + 10} 1"} for i in range(3)]
    out, _ = generate_and_grade(
        FakeSampler(),
        Grader(),
        Tokenizer(),
        problems,
        [prompt(i + 10) for i in range(3)],
        SimpleNamespace(n=2),
        keys=[1, 2, 3],
        stop_ids=[304],
    )
    assert [(s.problem, s.index, s.reward, s.text) for s in out] == [
        (i, j, float(j == 1), f"{i + 10} {j}") for i in range(3) for j in range(2)
    ]
    assert all(s.tokens[-1] == 304 for s in out), (
        "the end token is trained on, though it is no text"
    )


def test_both_ends_stop_and_no_image_token_can_be_sampled():
    """A missing end id reads as truncated samples; a sampled image placeholder breaks the next forward."""
    assert stop_token_ids(Tokenizer()) == [304, 305]
    assert banned_token_ids(Tokenizer(), 310) == [302, 307, 308, 309]


def test_seeds_are_of_the_problem_and_its_place_in_the_stream():
    """By rank or by place in the batch, a group would repeat itself, or change with the number of ranks."""
    a, b = {"id": "1", "task": "t"}, {"id": "2", "task": "t"}
    keys = {problem_key(p, salt) for p in (a, b) for salt in (0, 1, -1)}
    assert len(keys) == 6 and all(0 <= k < 2**63 for k in keys)


def test_an_epoch_draws_every_problem_once_in_an_order_of_its_own():
    problems = [{"id": str(i)} for i in range(10)]
    epochs = [[draw(problems, e * 10 + i, seed=3)["id"] for i in range(10)] for e in range(2)]
    assert (
        sorted(epochs[0]) == sorted(epochs[1]) == [p["id"] for p in problems]
        and epochs[0] != epochs[1]
    )


@pytest.fixture
def make_roller(monkeypatch):
    """A roller whose samples get the rewards of `reward(problem, sample index)`, without a model."""

    def make(zero_variance, reward, prompts=4, group=2):
        r = object.__new__(Roller)
        r.config = SimpleNamespace(
            prompts=prompts, group=group, seed=0, zero_variance=zero_variance, temperature=1.0
        )
        r.problems = [{"id": i, "task": "t"} for i in range(20)]
        r.render = lambda problems: [prompt(1) for _ in problems]
        r.sample = lambda problems, prompts, keys, n, t: [
            sample(i, j, [5], reward=reward(p["id"], j))
            for i, p in enumerate(problems)
            for j in range(n)
        ]
        return r

    return make


def uses_every_place_once(r):
    """Ids of the problems that three steps train on or drop for want of spread, and where the stream stands."""
    cursor, seen = 0, []
    for _ in range(3):
        out = r.step(cursor)
        seen += [p["id"] for p in out.problems[: out.cursor - cursor]]
        cursor = out.cursor
    return seen, cursor


def test_refill_fills_the_batch_and_passes_no_problem_over(make_roller):
    """Half the problems have no spread: each step trains on 4 that have, and the stream goes on where it was used up."""
    r = make_roller("refill", lambda i, j: float(j) if i % 2 else 1.0)
    out = r.step(0)
    trained = [s for s in out.samples if s.trained]
    assert len(trained) == 8 and all(out.problems[s.problem]["id"] % 2 for s in trained)
    assert len(out.samples) == 2 * len(out.problems) and len(out.prompts) == len(out.problems) > 4
    seen, cursor = uses_every_place_once(r)
    order = [draw(r.problems, i, 0)["id"] for i in range(cursor)]
    assert seen == order


def test_refill_gives_up_when_nothing_has_spread(make_roller):
    """A solved data set must not make the step sample for ever."""
    out = make_roller("refill", lambda i, j: 1.0).step(0)
    assert len(out.problems) == roller_module.MOST_BATCHES * 4 and not any(
        s.trained for s in out.samples
    )
    assert out.cursor == 32


@pytest.mark.parametrize("kind, trained", [("keep", 8), ("drop", 4)])
def test_keep_and_drop_sample_one_batch(make_roller, kind, trained):
    r = make_roller(
        kind,
        lambda i, j: (
            float(j) if i in (draw(r.problems, 0, 0)["id"], draw(r.problems, 1, 0)["id"]) else 0.0
        ),
    )
    out = r.step(0)
    assert (
        len(out.samples) == 8 and sum(s.trained for s in out.samples) == trained and out.cursor == 4
    )
