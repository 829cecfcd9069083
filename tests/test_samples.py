"""core/samples.py: grades reach their samples, rows survive the disk, seeds belong to problems."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from core.images import ImageLoader
from core.samples import (
    Rollouts,
    Sample,
    deal,
    problem_seed,
    read_samples,
    rollout_metrics,
    sampled_mask,
    write_samples,
)
from sampler import SamplingParams


def sample(**more):
    return Sample(
        **{"id": "a", "sample": 0, "tokens": [7, 8], "finish_reason": "stop", "text": "x", **more}
    )


def test_rows_come_back_as_they_were(tmp_path):
    written = [
        sample(
            logprobs=np.array([-1 / 3, -1e-30], np.float32),
            forced_at=1,
            forced_tokens=1,
            gold=["1", "2"],
        ),
        sample(
            id="b",
            text="two\u2028lines",
            reward=1.0,
            answer="1",
            advantage=-0.5,
            trained=False,
            problem=3,
        ),
    ]
    write_samples(tmp_path / "r" / "step_1.jsonl", written)
    assert (tmp_path / "r" / "step_1.jsonl").read_text().count("\n") == 2
    read = read_samples(tmp_path / "r" / "step_1.jsonl")
    assert np.abs(read[0].logprobs - written[0].logprobs).max() <= 1e-5
    assert read[0].mask.tolist() == [True, False] and read[0].logprobs.dtype == np.float32
    read[0].logprobs = written[0].logprobs = None
    assert read == written


def test_a_line_that_is_no_sample_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text(sample().to_json() + '{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: not a stored sample"):
        read_samples(tmp_path / "x.jsonl")


def test_a_line_cut_by_a_crash_is_dropped_only_on_request(tmp_path):
    (tmp_path / "x.jsonl").write_text(sample().to_json() + sample().to_json()[:20])
    assert len(read_samples(tmp_path / "x.jsonl", truncated_end=True)) == 1
    with pytest.raises(ValueError, match=":2:"):
        read_samples(tmp_path / "x.jsonl")


def test_fields_of_a_newer_version_are_ignored(tmp_path):
    (tmp_path / "x.jsonl").write_text(sample().to_json()[:-2] + ', "colour": 3}\n')
    assert read_samples(tmp_path / "x.jsonl") == [sample()]


def test_forced_tokens_are_masked():
    assert sampled_mask(5, 1, 2).tolist() == [True, False, False, True, True]
    assert sampled_mask(2, None, 0).all()


class Grader:
    """Full marks for the problem's answer."""

    def submit(self, problem, text, finish_reason):
        right = text == problem["answer"]
        grade = SimpleNamespace(score=float(right), status="ok", answer=text, why="")
        return SimpleNamespace(result=lambda: grade)


class FakeSampler:
    """Completions that end in any order; the text of a completion is its tokens."""

    weights = nullcontext

    def generate(self, prompts, params, sample_ids, indices, on_finish):
        for i in reversed(range(len(prompts))):
            for j in range(params.n):
                tokens = [prompts[i].tokens[0], j, 304]
                on_finish(
                    SimpleNamespace(
                        prompt_index=i,
                        sample_index=j,
                        tokens=tokens,
                        prompt_tokens=1,
                        logprobs=np.zeros(3),
                        finish_reason="stop",
                        forced_at=None,
                        forced_tokens=0,
                    )
                )


def test_rewards_reach_the_sample_that_earned_them(world):
    """Samples end in another order than they are returned: a reward by order of arrival is another
    sample's."""
    problems = [{"id": str(i), "answer": f"{i + 10} 1"} for i in range(3)]
    tokenizer = SimpleNamespace(decode=lambda tokens: " ".join(map(str, tokens)))
    rollouts = Rollouts(
        *(FakeSampler(), SamplingParams(n=2), tokenizer, Grader(), ImageLoader(None)),
        *(lambda problem, loaded: SimpleNamespace(tokens=[int(problem["id"]) + 10]), world),
    )
    samples, prompts = rollouts(problems, salts=[5, 6, 7])
    seeds = [problem_seed(p, salt) for p, salt in zip(problems, (5, 6, 7))]
    assert [p.tokens for p in prompts] == [[10], [11], [12]]
    assert [(s.id, s.problem, s.sample, s.reward, s.text, s.seed, s.prompt) for s in samples] == [
        (str(i), i, j, float(j == 1), f"{i + 10} {j}", seeds[i], str(i + 10))
        for i in range(3)
        for j in range(2)
    ]
    assert all(s.tokens[-1] == 304 for s in samples), "the end token is trained on, but no text"


def test_a_bonus_is_no_right_answer_and_a_penalty_no_wrong_one():
    """With "above 0", a model that writes empty tags for a bonus would seem to solve everything."""
    earned = [(1.1, {"right": 1, "form": 0.1}), (0.5, {"right": 1, "long": -0.5})]
    earned += [(0.1, {"right": 0, "form": 0.1}), (-0.5, {"right": 0, "long": -0.5})]
    samples = [sample(reward=reward, parts=parts, trained=True) for reward, parts in earned]
    m = rollout_metrics(samples, group=2)
    assert (m["solved"], m["solved_any"], m["solved_all"]) == (0.5, 0.5, 0.5)
    assert (m["rewards/right/mean"], m["rewards/form/mean"]) == (0.5, 0.1)


def test_seeds_belong_to_the_problem_and_its_position_in_the_stream():
    """By rank or by index in the batch, a group would repeat itself, or depend on the ranks."""
    a, b = {"id": "1", "task": "t"}, {"id": "2", "task": "t"}
    seeds = {problem_seed(p, salt) for p in (a, b) for salt in (0, 1, -1)}
    assert len(seeds) == 6 and all(0 <= k < 2**63 for k in seeds)


@pytest.mark.parametrize(
    "problems, n, ranks, most",
    [(9, 64, 8, 72), (128, 8, 8, 128), (3, 5, 2, 10), (1, 2, 4, 1), (2, 8, 6, 4), (31, 4, 8, 16)],
)
def test_every_sample_is_dealt_to_one_rank(problems, n, ranks, most):
    """A sample that two ranks made, or none, would be a wrong group."""
    shares = [deal(problems, n, rank, ranks) for rank in range(ranks)]
    pairs = [(i, j) for mine, indices in shares for i in mine for j in indices]
    assert sorted(pairs) == [(i, j) for i in range(problems) for j in range(n)]
    assert max(len(mine) * len(indices) for mine, indices in shares) == most


def test_many_problems_are_dealt_whole():
    """Round robin: the miniature's figures hang on who shares a batch."""
    assert deal(32, 8, 1, 2) == (range(1, 32, 2), range(8))
