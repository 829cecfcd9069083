"""One completion of one problem: GRPO trains on it, evaluation scores it, a json line stores it.

{"id": "gsm8k/7", "task": "gsm8k", "sample": 0, "seed": 812…, "prompt": "…", "text": "…",
 "tokens": [151, …], "finish_reason": "stop", "gold": "18", "answer": "18", "reward": 1.0, …}

rollouts = Rollouts(sampler, params, tokenizer, grader, images, render, world)
samples, prompts = rollouts(problems, salts)
write_samples(file, samples)  # OUT/rollouts/step_N.jsonl of GRPO, OUT/samples.jsonl of eval
samples = read_samples(file)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import numpy as np

from core.files import replacing
from core.parallel import World, all_gather_objects

MAX_REWARD_ERRORS = 0.5  # share of a step's rewards that may fail
SOLVED = 0.5  # least reward of a right answer, penalties included; bonuses are less than it


@dataclass
class Sample:
    """A completion, its grade, and what GRPO or evaluation adds. None fields aren't stored."""

    id: str  # of the problem
    sample: int  # which of the problem's samples, from 0
    tokens: list[int]  # the completion, end token included
    finish_reason: str  # stop | length | forced+stop | forced+length
    text: str  # decoded without the end token
    prompt: str = ""
    seed: int = 0  # of the problem; with the sampler's seed and `sample` it decides every token
    prompt_tokens: int = 0
    forced_at: int | None = None  # index of the first inserted token of a forced exit
    forced_tokens: int = 0  # how many were inserted
    logprobs: np.ndarray | None = None  # (len(tokens),) fp32, the sampler's, after temperature
    task: str | None = None
    gold: Any = None  # the problem's answer
    images: list[str] = field(default_factory=list)
    # the grade
    reward: float = 0.0
    answer: str | None = None  # as extracted; None: no answer found
    status: str = "ok"  # ok | no_answer | truncated | timeout | error
    why: str | None = None  # what went wrong with the reward
    parts: dict[str, float] | None = None  # named parts of a user's reward
    # GRPO
    problem: int | None = None  # index of the problem within the step
    advantage: float | None = None
    trained: bool | None = None  # False: left out of the update
    # evaluation
    lenient: float | None = None  # reward under lenient extraction

    @property
    def truncated(self) -> bool:
        return self.finish_reason.endswith("length")

    @property
    def mask(self) -> np.ndarray:
        """(len(tokens),) bool: True sampled, False inserted by force (never trained on)."""
        return sampled_mask(len(self.tokens), self.forced_at, self.forced_tokens)

    def to_json(self) -> str:
        """One line, line break included. Log-probabilities are rounded to 1e-5."""
        row = {k: v for k, v in vars(self).items() if v is not None}
        if self.logprobs is not None:
            row["logprobs"] = np.round(np.asarray(self.logprobs, np.float64), 5).tolist()
        row["tokens"] = np.asarray(self.tokens).tolist()
        return json.dumps(row, ensure_ascii=False) + "\n"


FIELDS = {f.name for f in dataclasses.fields(Sample)}


def sampled_mask(length: int, forced_at: int | None, forced_tokens: int) -> np.ndarray:
    """(length,) bool: False for the `forced_tokens` tokens from `forced_at` on."""
    mask = np.ones(length, bool)
    if forced_at is not None:
        mask[forced_at : forced_at + forced_tokens] = False
    return mask


def problem_seed(problem: dict, salt: int = 0) -> int:
    """A 63-bit seed from a problem's id (and a salt such as its position in the data stream): the
    same samples on whatever rank, in whatever batch."""
    digest = hashlib.sha256(f"{salt}|{problem.get('task')}|{problem['id']}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


# ------------------------------------------------------------------------------------- generate
def make_sample(problem: dict, completion, tokenizer, *, prompt: str, seed: int) -> Sample:
    """A sampler's completion as an ungraded sample of `problem`."""
    tokens = list(completion.tokens)
    end = len(tokens) - completion.finish_reason.endswith("stop")
    return Sample(
        id=problem["id"],
        sample=completion.sample_index,
        tokens=tokens,
        finish_reason=completion.finish_reason,
        text=tokenizer.decode(tokens[:end]),
        prompt=prompt,
        seed=seed,
        prompt_tokens=completion.prompt_tokens,
        forced_at=completion.forced_at,
        forced_tokens=completion.forced_tokens,
        logprobs=completion.logprobs,
        task=problem.get("task"),
        gold=problem["answer"],
        images=problem.get("images") or [],
    )


def set_grade(sample: Sample, grade) -> None:
    """Copy a grader's result (score, answer, status, why) into the sample."""
    sample.reward, sample.status = grade.score, grade.status
    sample.answer = None if grade.answer is None else str(grade.answer)
    sample.why, sample.parts = grade.why or None, getattr(grade, "parts", None) or None


def deal(problems: int, n: int, rank: int, ranks: int) -> tuple[range, range]:
    """What one rank samples of a step of problems × n samples: (problems, samples of each).

    With 8 problems or more a rank, a group stays together and its prompt is prefilled once: problem
    i is rank (i mod ranks)'s. Fewer, larger groups are split into equal parts: a problem with long
    completions would else keep one rank busy and the others waiting. 9 problems × 64 on 8 ranks:
    8 samples of each problem for every rank, not 128 samples for one and 64 for the others.
    """
    wanted = min(ranks, -(-8 * ranks // problems))
    parts = max(p for p in range(1, wanted + 1) if n % p == ranks % p == 0)
    part, size = rank % parts, n // parts
    return range(rank // parts, problems, ranks // parts), range(part * size, (part + 1) * size)


class Rollouts:
    """rollouts(problems, salts) → graded samples from the weights as they are now, in order of
    (problem, sample), and the prompts; the same on every rank. Collective.

    salts: one a problem; with its id and the sampler's seed it decides every token. `seconds` adds
    up what images, decoding and grading took; call `pause` before training.
    """

    def __init__(self, sampler, params, tokenizer, grader, images, render: Callable, world: World):
        """images: an `ImageLoader`; render(problem, loaded=its images) → `data.Prompt`."""
        self.sampler, self.params, self.tokenizer, self.grader = sampler, params, tokenizer, grader
        self.images, self.render, self.world, self.seconds = images, render, world, Counter()

    def __call__(
        self, problems: list[dict], salts: Sequence[int], **changes
    ) -> tuple[list[Sample], list]:
        """changes: of `params`. A completion is graded as soon as it ends, while others still
        decode."""
        begin, params, pending = time.perf_counter(), replace(self.params, **changes), []
        loaded = self.images([p.get("images") or [] for p in problems])
        self.seconds["image_s"] += time.perf_counter() - begin  # 0 where they were ready
        prompts = [self.render(p, loaded=x) for p, x in zip(problems, loaded)]
        mine, indices = deal(len(problems), params.n, self.world.rank, self.world.size)
        seeds = {i: problem_seed(problems[i], salts[i]) for i in mine}
        texts = {i: self.tokenizer.decode(prompts[i].tokens) for i in mine}

        def grade(completion) -> None:
            i = mine[completion.prompt_index]
            how = dict(prompt=texts[i], seed=seeds[i])
            sample = make_sample(problems[i], completion, self.tokenizer, **how)
            sample.problem = i
            future = self.grader.submit(problems[i], sample.text, sample.finish_reason)
            pending.append((sample, future))

        begin, work = time.perf_counter(), dict(sample_ids=list(seeds.values()), indices=indices)
        with self.sampler.weights():  # whole: no collective while decoding
            self.sampler.generate([prompts[i] for i in mine], params, on_finish=grade, **work)
            decoded = time.perf_counter()
            for sample, future in pending:
                set_grade(sample, future.result())
        self.seconds["sample_s"] += decoded - begin
        self.seconds["reward_s"] += time.perf_counter() - decoded  # what decoding did not hide
        everyone = [s for part in all_gather_objects([s for s, _ in pending]) for s in part]
        return sorted(everyone, key=lambda s: (s.problem, s.sample)), prompts

    def pause(self, coming: list[dict]) -> None:
        """Free the sampler's GPU memory for training; images of the next step load meanwhile."""
        self.images.announce([p.get("images") or [] for p in coming])
        if self.world.device.type == "cuda":
            self.sampler.release()


def check_rewards(samples: list[Sample], step: int, run) -> None:
    """Say on the run's console which rewards failed. Raises ValueError where too many did."""
    if not (failed := [s for s in samples if s.status in ("timeout", "error")]):
        return
    s, said = failed[0], f"{len(failed)} of {len(samples)} rewards failed"
    run.say(f"{said}; the first, of problem {s.id}: {s.status}, {s.why}")
    if len(failed) > MAX_REWARD_ERRORS * len(samples):
        raise ValueError(
            f"step {step}: {said}, nothing was trained on them. Fix the reward (see "
            f"{run.out / 'rollouts'}) or raise --reward_deadline, and rerun the command"
        )


def rollout_metrics(samples: list[Sample], group: int) -> dict:
    """What all samples of a step say, those that are not trained on too."""
    rewards = np.array([s.reward for s in samples]).reshape(-1, group)
    lengths, right = np.array([len(s.tokens) for s in samples]), rewards.flatten() >= SOLVED

    parts: dict[str, list[float]] = {}
    for s in samples:
        for name, value in (s.parts or {}).items():
            parts.setdefault(name, []).append(value)

    def share(test) -> float:
        return float(np.mean([test(s) for s in samples]))

    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "frac_reward_zero_std": float((rewards.max(1) == rewards.min(1)).mean()),
        "solved": float(right.mean()),
        "solved_all": float((rewards.min(1) >= SOLVED).mean()),
        "solved_any": float((rewards.max(1) >= SOLVED).mean()),
        "samples": len(samples),
        "trained_samples": sum(s.trained for s in samples),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": int(lengths.max()),
        "completions/mean_length_right": float(lengths[right].mean()) if right.any() else None,
        "completions/mean_length_wrong": float(lengths[~right].mean()) if not right.all() else None,
        "completions/clipped_ratio": share(lambda s: s.truncated),
        "forced": share(lambda s: s.forced_at is not None),
        "no_answer": share(lambda s: s.status == "no_answer"),
        "reward_timeouts": share(lambda s: s.status == "timeout"),
        "reward_errors": share(lambda s: s.status == "error"),
        "tokens": int(lengths.sum()),
        **{f"rewards/{k}/mean": float(np.mean(v)) for k, v in parts.items()},
    }


# ----------------------------------------------------------------------------------------- disk
def write_samples(file: Path, samples: Iterable[Sample]) -> None:
    """One json object a line; a kill leaves the file whole or as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as aside, open(aside, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(s.to_json() for s in samples)


def read_samples(file: Path, truncated_end: bool = False) -> list[Sample]:
    """The samples of a file; fields of newer versions are ignored.

    truncated_end: a last line without a line break was cut by a crash and is dropped. Raises
    ValueError that names file and line of anything else that is not a sample.
    """
    samples = []
    with open(file, encoding="utf-8", errors="replace", newline="\n") as f:
        for number, line in enumerate(f, 1):
            if truncated_end and not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                row["tokens"] = np.array(row["tokens"], np.int32).tolist()
                if "logprobs" in row:
                    row["logprobs"] = np.array(row["logprobs"], np.float32)
                samples.append(Sample(**{k: v for k, v in row.items() if k in FIELDS}))
            except (ValueError, TypeError, KeyError) as e:  # no JSON, no object, a field missing
                why = f"no {e}" if isinstance(e, KeyError) else e
                raise ValueError(
                    f"{file}:{number}: not a stored sample ({why}); remove this line to resample it"
                ) from e
    return samples
