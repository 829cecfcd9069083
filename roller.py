"""The rollouts of a GRPO step on all ranks: which problems, sampled and graded together, or read from another run.

    roller = Roller(config, parts, grader, world)      config and parts: train_grpo.py's
    rollouts = roller.step(cursor)         problems from this place of the endless stream on, `group` samples of each
    rollouts = roller.replay(step)         what another run saved for this step

What is sampled depends on nothing but the seed, the place in the stream and the weights (and on the rounding of matrix
products of another size): not on the number of ranks, nor on where a run was killed and resumed.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from core.parallel import World, all_gather_objects, all_max, gathered
from core.run import memory_gib
from data import Prompt, render_problem
from rewards import Grader
from rollouts import Sample, generate_and_grade, problem_key, read_samples, stop_token_ids
from sampler import Sampler, SamplingParams
from sampling import think_exit

MOST_BATCHES = 8  # sampled for one step at most when groups without spread are refilled


@dataclass
class Rollouts:
    """The rollouts of one step, the same on every rank."""

    problems: list[dict]
    prompts: list[Prompt]
    samples: list[
        Sample
    ]  # problem after problem, `group` of each; `trained` says which the update uses
    cursor: int  # where in the stream the next step begins


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """(size,): the problems of an epoch in an order of its own."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def draw(problems: list[dict], place: int, seed: int) -> dict:
    """The problem at a place of the endless stream, epoch after epoch."""
    epoch, i = divmod(place, len(problems))
    return problems[epoch_order(len(problems), seed, epoch)[i]]


class Roller:
    """Problems → graded samples: each rank samples its share, then everybody has all."""

    def __init__(self, config, parts, grader: Grader, world: World):
        self.config, self.model, self.tokenizer = config, parts.model, parts.tokenizer
        self.problems, self.images, self.grader, self.world = (
            parts.problems,
            parts.images,
            grader,
            world,
        )
        self.stop_ids = stop_token_ids(self.tokenizer)
        self.sampler = Sampler(
            self.model,
            slots=config.slots or None,
            kv_gb=config.kv_gb or None,
            max_len=parts.longest_prompt + config.max_new_tokens,
        )
        self.exit = (
            think_exit(self.tokenizer, self.model.config.vocab_size) if config.think_budget else {}
        )
        self.params(
            1, 1.0
        )  # a think budget that cannot work is an error now, not at the first sample
        self.sample_s = self.reward_s = 0.0  # of this rank, since `reset_clock`

    def params(self, n: int, temperature: float) -> SamplingParams:
        c = self.config
        return SamplingParams(
            n=n,
            temperature=temperature,
            max_new_tokens=c.max_new_tokens,
            stop_ids=self.stop_ids,
            seed=c.seed,
            think_budget=c.think_budget or None,
            **self.exit,
        )

    def render(self, problems: list[dict]) -> list[Prompt]:
        return [
            render_problem(p, self.tokenizer, self.images, style=self.config.prompt_style)
            for p in problems
        ]

    def sample(
        self,
        problems: list[dict],
        prompts: list[Prompt],
        keys: list[int],
        n: int,
        temperature: float,
    ) -> list[Sample]:
        """n samples of each problem, in order of (problem, sample), the same on every rank. Collective.
        keys: a number a problem, which seeds its samples."""
        mine, begin = range(self.world.rank, len(problems), self.world.size), time.perf_counter()
        with gathered(self.model):
            samples, waited = generate_and_grade(
                self.sampler,
                self.grader,
                self.tokenizer,
                [problems[i] for i in mine],
                [prompts[i] for i in mine],
                self.params(n, temperature),
                keys=[keys[i] for i in mine],
                stop_ids=self.stop_ids,
            )
            if not self.config.keep_sampler and self.world.device.type == "cuda":
                self.sampler.release()
        self.sample_s += time.perf_counter() - begin - waited  # gathering the weights included
        self.reward_s += waited  # grading that was not hidden behind decoding
        for s in samples:
            s.problem = mine[s.problem]
        everyone = [s for part in all_gather_objects(samples) for s in part]
        return sorted(everyone, key=lambda s: (s.problem, s.index))

    def step(self, cursor: int) -> Rollouts:
        """The rollouts of one step, from place `cursor` of the stream on. Collective.

        zero_variance drop: groups of equal rewards are sampled but not trained on. refill: more problems are drawn, as
        many as the share of groups with spread asks for, until `prompts` groups have it or MOST_BATCHES batches were
        drawn. Groups beyond those needed are drawn again by the next step, so no problem is passed over.
        """
        c, out, used = self.config, Rollouts([], [], [], cursor), 0
        while used < c.prompts and len(out.problems) < MOST_BATCHES * c.prompts:
            drawn = len(out.problems)
            n = (
                min(c.prompts, math.ceil((c.prompts - used) * drawn / max(used, 1)))
                if drawn
                else c.prompts
            )
            places = range(cursor + drawn, cursor + drawn + n)
            batch = [draw(self.problems, place, c.seed) for place in places]
            prompts = self.render(batch)
            keys = [problem_key(p, salt=place) for p, place in zip(batch, places)]
            samples = self.sample(batch, prompts, keys, c.group, c.temperature)
            for i, place in enumerate(places):
                group = samples[i * c.group : (i + 1) * c.group]
                wanted = used < c.prompts
                spread = c.zero_variance == "keep" or len({s.reward for s in group}) > 1
                for s in group:
                    s.problem, s.trained = drawn + i, wanted and spread
                used += wanted and spread
                out.cursor = place + 1 if wanted else out.cursor
            out.problems, out.prompts, out.samples = (
                out.problems + batch,
                out.prompts + prompts,
                out.samples + samples,
            )
            if c.zero_variance != "refill":
                break
        return out

    def replay(self, step: int) -> Rollouts:
        """What another run saved for this step (0-based). Raises ValueError when it does not fit this run."""
        c = self.config
        file = Path(c.replay) / "rollouts" / f"step_{step + 1}.jsonl"
        if not file.is_file():
            raise ValueError(
                f"--replay {c.replay}: {file} is missing; replay at most as many --steps as were sampled"
            )
        samples, ids = read_samples(file)
        if [s.problem for s in samples] != [i for i in range(len(ids)) for _ in range(c.group)]:
            raise ValueError(
                f"{file}: does not hold {c.group} samples of each problem; pass its own --group"
            )
        by_id = {p["id"]: p for p in self.problems}
        unknown = [i for i in ids if i not in by_id]
        if unknown:
            raise ValueError(
                f"{file}: problem {unknown[0]!r} is not in --data (or its prompt is too long); replay needs "
                f"the data that was sampled"
            )
        problems = [by_id[i] for i in ids]
        return Rollouts(problems, self.render(problems), samples, 0)

    def evaluate(self, problems: list[dict], step: int) -> dict:
        """Greedy accuracy and avg@n; the random numbers are the same at every evaluation. Collective."""
        c, prompts = self.config, self.render(problems)
        keys = [problem_key(p, salt=-1) for p in problems]
        greedy = self.sample(problems, prompts, keys, 1, 0.0)
        figures = {
            "step": step,
            "n": len(problems),
            "greedy": float(np.mean([s.reward for s in greedy])),
            "truncated": float(np.mean([s.truncated for s in greedy])),
        }
        if c.eval_n:
            several = self.sample(problems, prompts, keys, c.eval_n, c.temperature)
            figures[f"avg@{c.eval_n}"] = float(np.mean([s.reward for s in several]))
        return figures

    def reset_clock(self) -> None:
        self.sample_s = self.reward_s = 0.0


# ------------------------------------------------------------------------------------------------------ the figures
def rollout_figures(rollouts: Rollouts, group: int) -> dict:
    """What all samples of a step say, those that are not trained on too."""
    samples = rollouts.samples
    rewards = np.array([s.reward for s in samples]).reshape(-1, group)
    lengths, right = np.array([len(s.tokens) for s in samples]), rewards.flatten() > 0

    def share(test) -> float:
        return float(np.mean([test(s) for s in samples]))

    def mean_length(chosen: np.ndarray) -> float | None:
        return float(lengths[chosen].mean()) if chosen.any() else None

    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "solved": float(right.mean()),
        "solved_all": float((rewards.min(1) > 0).mean()),
        "solved_any": float((rewards.max(1) > 0).mean()),
        "zero_variance": float((rewards.max(1) == rewards.min(1)).mean()),
        "samples": len(samples),
        "trained_samples": sum(s.trained for s in samples),
        "length_mean": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "length_right": mean_length(right),
        "length_wrong": mean_length(~right),
        "truncated": share(lambda s: s.truncated),
        "forced": share(lambda s: s.finish_reason.startswith("forced")),
        "no_answer": share(lambda s: s.status == "no_answer"),
        "reward_timeouts": share(lambda s: s.status == "timeout"),
        "reward_errors": share(lambda s: s.status == "error"),
    }


def speed(rollouts: Rollouts, begin: float, rolled: float, roller: Roller) -> dict:
    """Tokens and seconds of a step that began at `begin` and had its rollouts at `rolled` (time.perf_counter).
    tokens: sampled, over all ranks; sample_s, reward_s: of the slowest rank."""
    seconds, tokens = time.perf_counter() - begin, sum(len(s.tokens) for s in rollouts.samples)
    memory, sample_s, reward_s = all_max(memory_gib(), roller.sample_s, roller.reward_s)
    return {
        "tokens": tokens,
        "prompt_tokens": sum(len(p.tokens) for p in rollouts.prompts),
        "tok_per_s": round(tokens / seconds, 1),
        "sample_tok_per_s": round(tokens / max(rolled - begin, 1e-9), 1),
        "step_s": round(seconds, 3),
        "rollout_s": round(rolled - begin, 3),
        "sample_s": round(sample_s, 3),
        "reward_s": round(reward_s, 3),
        "memory_gib": round(memory, 3),
    }
