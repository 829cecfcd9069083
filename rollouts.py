"""Rollouts between sampler, grader, disk and trainer: what roller.py, train_grpo.py and eval.py share.

samples = generate_and_grade(...)        problems → completions with rewards, grading while decoding goes on
write_samples(file, samples, ...)        one json line a sample: text, reward, advantage, lengths, log-probabilities
batch = collate_samples(samples, ...)    the packed stream of the trainer, with what the loss needs at each row
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.vision import mrope_positions
from data import Prompt


@dataclass
class Sample:
    """One completion of one problem."""

    problem: int  # place of its problem in the batch of problems
    index: int  # which of the group's samples
    tokens: list[int]  # completion, end token included
    logprobs: np.ndarray  # (len(tokens),) fp32: the sampler's own, after temperature
    mask: (
        np.ndarray
    )  # (len(tokens),) bool: True sampled, False forced (an inserted </think> is not trained on)
    finish_reason: str  # stop | length | forced+stop | forced+length
    text: str  # decoded without the end token
    reward: float = 0.0
    answer: str | None = None  # as extracted; None: no answer found
    status: str = "ok"  # ok | no_answer | truncated | timeout | error
    advantage: float = 0.0
    gap: float = 0.0  # mean |sampler - trainer log-probability|, filled in by the trainer
    trained: bool = (
        True  # False: sampled, but left out of the update (its group's rewards are equal)
    )

    @property
    def truncated(self) -> bool:
        return self.finish_reason.endswith("length")

    @property
    def trained_tokens(self) -> int:
        return int(self.mask.sum())


def problem_key(problem: dict, salt: int = 0) -> int:
    """A 63-bit number of a problem's id (and a salt such as the step): the seed of its samples. The same problem gets
    the same samples on whatever rank, in whatever batch."""
    digest = hashlib.sha256(f"{salt}|{problem.get('task')}|{problem['id']}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generate_and_grade(
    sampler,
    grader,
    tokenizer,
    problems: list[dict],
    prompts: list[Prompt],
    params,
    *,
    keys: list[int],
    stop_ids: list[int],
) -> tuple[list[Sample], float]:
    """Sample params.n completions of each prompt and grade each as soon as it ends, while others still decode.

    keys: one number a problem, its samples' seed (`problem_key`). Returns samples ordered by (problem, index), and the
    seconds waited for grades after the last token. Must run where every weight is whole (inside `parallel.gathered`);
    it is no collective.
    """
    pending = []

    def finished(rollout) -> None:
        tokens = list(rollout.tokens)
        shown = tokens[:-1] if tokens and tokens[-1] in stop_ids else tokens
        sample = Sample(
            rollout.prompt_index,
            rollout.sample_index,
            tokens,
            np.asarray(rollout.logprobs, np.float32),
            np.asarray(rollout.mask, bool),
            rollout.finish_reason,
            tokenizer.decode(shown),
        )
        pending.append(
            (sample, grader.submit(problems[sample.problem], sample.text, sample.finish_reason))
        )

    sampler.generate(prompts, params, sample_ids=keys, on_finish=finished)
    decoded, failed = time.perf_counter(), []
    for sample, future in pending:
        result = future.result()
        sample.reward, sample.status = result.score, result.status
        sample.answer = None if result.answer is None else str(result.answer)
        if result.status in ("timeout", "error"):
            failed.append(f"{problems[sample.problem]['id']}: {result.status}, {result.why}")
    if failed:
        print(
            f"{len(failed)} of {len(pending)} rewards failed; the first, of problem {failed[0]}",
            flush=True,
        )
    samples = sorted((sample for sample, _ in pending), key=lambda s: (s.problem, s.index))
    return samples, time.perf_counter() - decoded


def stop_token_ids(tokenizer) -> list[int]:
    """Both ends that Qwen models use: a sample that ends with <|endoftext|> would otherwise run to its limit."""
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    return sorted(
        {i for i in [*ids, tokenizer.eos_token_id] if i is not None and i != tokenizer.unk_token_id}
    )


def banned_token_ids(tokenizer, vocab_size: int) -> list[int]:
    """Ids that must never be sampled: vision placeholders (the next forward would look for an image) and the padded end
    of the vocabulary."""
    vision = [
        tokenizer.convert_tokens_to_ids(t)
        for t in (
            "<|vision_start|>",
            "<|vision_end|>",
            "<|vision_pad|>",
            "<|image_pad|>",
            "<|video_pad|>",
        )
    ]
    return [i for i in vision if i is not None and i != tokenizer.unk_token_id] + list(
        range(len(tokenizer), vocab_size)
    )


# ----------------------------------------------------------------------------------------------------------- disk
def write_samples(
    file: Path, samples: list[Sample], problems: list[dict], prompt_texts: list[str]
) -> None:
    """One json object a line, written aside and renamed. tokens and logprobs are base64 of int32 and float32, so that
    a replay is exact; everything else is for people and for report.py."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_suffix(".tmp")
    with open(tmp, "w") as f:
        for s in samples:
            p = problems[s.problem]
            row = {
                "problem": s.problem,
                "sample": s.index,
                "id": p["id"],
                "task": p.get("task"),
                "gold": p["answer"],
                "prompt": prompt_texts[s.problem],
                "text": s.text,
                "reward": s.reward,
                "answer": s.answer,
                "status": s.status,
                "finish_reason": s.finish_reason,
                "advantage": s.advantage,
                "gap": s.gap,
                "length": len(s.tokens),
                "images": p.get("images", []),
                "trained": s.trained,
                "mean_logprob": float(s.logprobs.mean()) if len(s.logprobs) else 0.0,
                "tokens": _pack(np.asarray(s.tokens, np.int32)),
                "logprobs": _pack(s.logprobs),
                "mask": _pack(s.mask.astype(np.uint8)),
            }
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    tmp.rename(file)


def read_samples(file: Path) -> tuple[list[Sample], list[str]]:
    """The samples of `write_samples`, and the id of each problem by its place. Raises ValueError with file and line."""
    samples, ids = [], {}
    for number, line in enumerate(
        Path(file).read_text().rstrip("\n").split("\n"), 1
    ):  # splitlines cuts at U+2028
        try:
            r = json.loads(line)
            samples.append(
                Sample(
                    r["problem"],
                    r["sample"],
                    _unpack(r["tokens"], np.int32).tolist(),
                    _unpack(r["logprobs"], np.float32),
                    _unpack(r["mask"], np.uint8).astype(bool),
                    r["finish_reason"],
                    r["text"],
                    r["reward"],
                    r["answer"],
                    r["status"],
                    trained=r["trained"],
                )
            )
            ids[r["problem"]] = r["id"]
        except (KeyError, ValueError, TypeError) as e:
            raise ValueError(
                f"{file}:{number}: not a saved rollout ({type(e).__name__}: {e}); sample this step again"
            ) from e
    return samples, [ids[i] for i in sorted(ids)]


def _pack(a: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(a).tobytes()).decode()


def _unpack(text: str, dtype) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()


# -------------------------------------------------------------------------------------------------- trainer's view
@dataclass
class RolloutBatch:
    """A packed micro-batch of whole samples. Row t predicts token t + 1; the arrays with R entries belong to the rows
    whose target is trained, in order."""

    tokens: torch.Tensor  # (T,)
    position_ids: torch.Tensor  # (3, T)
    cu_seqlens: torch.Tensor  # (N+1,)
    targets: torch.Tensor  # (T,) next token where it was sampled, else -100
    sequence: torch.Tensor  # (R,) which sample of this micro-batch
    samples: list[int]  # their places in the list of samples
    advantages: torch.Tensor  # (R,)
    weights: (
        torch.Tensor
    )  # (R,) weight of each token in the loss; they sum over all micro-batches, see token_weights
    sampler_logprobs: torch.Tensor  # (R,)
    pixel_values: torch.Tensor | None
    grid_thw: torch.Tensor | None
    old_logprobs: torch.Tensor | None = (
        None  # (R,) trainer's, before the first update; None: the first update itself
    )
    ref_logprobs: torch.Tensor | None = None  # (R,) reference model's; None: no KL term


def collate_samples(
    chosen: list[int],
    samples: list[Sample],
    weights: np.ndarray,
    prompts: list[Prompt],
    image_token_id: int | None,
    merge_size: int,
) -> RolloutBatch:
    """Samples `chosen` (places in `samples`) as one packed stream: prompt and completion of each, end to end.

    Prompt of 3 tokens [p0 p1 p2], completion [c0 c1], both sampled: tokens p0 p1 p2 c0 c1, targets -100 -100 c0 c1
    -100: the last prompt token predicts the first completion token, the last token predicts nothing.
    """
    rows = {
        k: []
        for k in ("tokens", "positions", "targets", "sequence", "advantages", "weights", "logprobs")
    }
    lengths, pixels, grids = [], [], []
    for n, i in enumerate(chosen):
        s, prompt = samples[i], prompts[samples[i].problem]
        tokens = torch.tensor([*prompt.tokens, *s.tokens])
        start = len(prompt.tokens)
        targets = torch.full((len(tokens),), -100)
        targets[start - 1 : -1] = torch.where(torch.from_numpy(s.mask), tokens[start:], -100)
        trained = s.trained_tokens
        rows["tokens"].append(tokens)
        rows["targets"].append(targets)
        rows["positions"].append(_positions(prompt, len(tokens), image_token_id, merge_size))
        rows["sequence"].append(torch.full((trained,), n))
        rows["advantages"].append(torch.full((trained,), s.advantage, dtype=torch.float32))
        rows["weights"].append(torch.full((trained,), weights[i], dtype=torch.float32))
        rows["logprobs"].append(torch.from_numpy(s.logprobs[s.mask]))
        lengths.append(len(tokens))
        if prompt.pixel_values is not None:
            pixels.append(prompt.pixel_values)
            grids.append(prompt.grid_thw)
    cat = {k: torch.cat(v, dim=-1) for k, v in rows.items()}
    return RolloutBatch(
        cat["tokens"],
        cat["positions"],
        torch.tensor([0, *lengths]).cumsum(0).int(),
        cat["targets"],
        cat["sequence"],
        list(chosen),
        cat["advantages"],
        cat["weights"],
        cat["logprobs"],
        torch.cat(pixels) if pixels else None,
        torch.cat(grids) if grids else None,
    )


def _positions(
    prompt: Prompt, length: int, image_token_id: int | None, merge_size: int
) -> torch.Tensor:
    """(3, length): the prompt's M-RoPE positions, then the completion counting on from them."""
    if prompt.grid_thw is None:
        return torch.arange(length).expand(3, -1)
    head, delta = mrope_positions(
        torch.tensor(prompt.tokens),
        prompt.grid_thw,
        image_token_id=image_token_id,
        merge_size=merge_size,
    )
    return torch.cat([head, torch.arange(len(prompt.tokens), length).expand(3, -1) + delta], dim=1)


def empty_rollouts() -> RolloutBatch:
    """One token and nothing trained: keeps a rank without samples in step with the others' collectives."""
    one, none = torch.zeros(1, dtype=torch.long), torch.zeros(0)
    return RolloutBatch(
        one,
        one.expand(3, 1),
        torch.tensor([0, 1]).int(),
        one - 100,
        none.long(),
        [],
        none,
        none,
        none,
        None,
        None,
    )
