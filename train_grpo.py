"""Stage two of X-Reasoner: GRPO on text-only problems with an exact 1/0 reward.

    torchrun --nproc_per_node=8 train_grpo.py --model runs/sft/final --data orz57k.jsonl --out runs/grpo
    python train_grpo.py --model DIR --data problems.jsonl --out runs/try --steps 20 --prompts 8 --max_new_tokens 256

One step: take `prompts` problems → `group` rollouts of each, graded while others still decode → advantages within each
group → clipped loss over all sampled tokens of the step → AdamW → the new weights sample the next step.

The defaults are the paper's recipe (arXiv 2505.03981, section 2.3 and appendix B.2). Where it is silent or contradicts
itself the field's own --help says what we took. Read in this order: `group_advantages` (advantage), `policy_loss`
(ratio and clip), `kl_estimate`, `token_weights` (the normaliser), `micro_batch_loss` (all of them together), `update`,
`train`. Where the rollouts come from: roller.py.
"""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar, Iterator, Literal

import numpy as np
import torch

from core import attention, optim
from core.checkpoint import require_space, save_state
from core.checkpoint import resume as resume_state
from core.parallel import World, all_any, all_gather_objects, all_max, all_sum, init
from core.run import (
    Run,
    StopRequest,
    hash_files,
    header,
    option,
    parse_config,
    quiet_garbage_collection,
    run_and_exit,
    script,
)
from core.vision import ImageConfig
from core.weights import export_hf
from data import (
    attention_cost,
    balance,
    image_token_count,
    load_problems,
    load_tokenizer,
    pack_plan,
    prompt_tokens,
)
from model import Model, build_model, resolve_model_dir
from rewards import Grader
from roller import Roller, Rollouts, rollout_figures, speed
from rollouts import (
    RolloutBatch,
    Sample,
    banned_token_ids,
    collate_samples,
    empty_rollouts,
    write_samples,
)


@dataclass
class Config:
    CHANGEABLE: ClassVar[set[str]] = {
        "epochs",
        "steps",
        "graders",
        "offload_optimizer",
        "keep_sampler",
        "save_every",
        "keep_last",
        "max_bad_steps",
        "max_reward_errors",
        "reward_deadline",
        "eval_every",
    }  # in a resumed run

    model: str = option(
        MISSING, "model directory or hub id to start from, usually OUT/final of train_sft.py"
    )
    data: list[str] = option(MISSING, "jsonl file(s) of problems, see `python -m tools.check`")
    out: str = option(
        MISSING, "run directory; OUT/final is the trained model, OUT/rollouts every sample"
    )
    epochs: int = option(
        3, "passes over the problems (paper: 3 in the text, 'until convergence' in its appendix)"
    )
    steps: int = option(-1, "steps, overrides --epochs; -1: by epochs")
    prompts: int = option(128, "problems a step (paper: batch 128, taken as prompts, not samples)")
    group: int = option(8, "rollouts of each problem (paper: 8)")
    max_new_tokens: int = option(4096, "longest completion (paper: 4096)")
    max_prompt_tokens: int = option(
        2048, "longer prompts are left out and counted (paper: not stated)"
    )
    prompt_style: str = option(
        "train",
        "instruction before each question: train (the paper's), kind (the paper's for "
        "evaluation), plain (none)",
    )
    temperature: float = option(
        1.0, "of sampling and of every log-probability (paper: 1); no top-p or top-k here"
    )
    think_budget: int = option(
        0, "force </think> after so many tokens, 0: never (paper: at evaluation only)"
    )
    # objective
    advantage: Literal["grpo", "mean_only", "batch_std", "rloo"] = option(
        "grpo",
        "grpo: (r - mean) / std of the group (paper); mean_only: Dr. GRPO; batch_std: std over the step; rloo: "
        "leave-one-out mean",
    )
    loss: Literal["ppo_clip", "gspo", "cispo"] = option(
        "ppo_clip",
        "policy loss (paper: ppo_clip); use gspo with "
        "--aggregation seq_mean_token_mean and clips around 3e-4",
    )
    clip_low: float = option(0.2, "ratio is clipped below 1 - clip_low (paper: 0.2)")
    clip_high: float = option(
        0.2,
        "ratio is clipped above 1 + clip_high (paper: 'higher' in the text, value never "
        "given; 0.2 in its appendix. DAPO: 0.28)",
    )
    dual_clip: float = option(
        3.0,
        "ppo_clip: bound of the loss at negative advantage, 0: off (paper: silent; verl, "
        "which it forked, has 3)",
    )
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"] = (
        option(
            "token_mean",
            "token_mean: over all tokens of the step (paper's text; its equation shows "
            "seq_mean_token_mean); constant: sum / (samples × max_new_tokens), Dr. GRPO",
        )
    )
    kl_coef: float = option(
        0.01,
        "weight of the KL to the starting model in the loss; 0: no reference model is loaded "
        "(paper: 0.01 in its appendix, 'reduced or removed' in the text)",
    )
    kl: Literal["k1", "k2", "k3"] = option(
        "k3",
        "KL estimator (paper: silent; verl's default is k3). k1's gradient in "
        "the loss is zero on average; k2 has the gradient of KL(policy || reference)",
    )
    entropy_coef: float = option(0.0, "weight of an entropy bonus (paper: none mentioned)")
    tis_cap: float = option(
        0.0, "truncated importance sampling of the sampler/trainer gap: weight min(w, cap), 0: off"
    )
    tis_mask: bool = option(
        False, "with --tis_cap: drop tokens with w outside [1/cap, cap] instead of truncating"
    )
    old_logprobs: Literal["trainer", "sampler"] = option(
        "trainer",
        "denominator of the ratio: the trainer's own forward "
        "(free when --updates is 1), or the sampler's (bypass)",
    )
    updates: int = option(
        1, "optimizer steps per batch of rollouts (paper: silent); 1 is exactly on-policy"
    )
    overlong_masking: bool = option(
        False, "leave truncated samples out of the loss and of its denominator"
    )
    overlong_buffer: int = option(
        0,
        "soft overlong penalty (DAPO): reward falls linearly to -1 over the last so many "
        "tokens before max_new_tokens, 0: off",
    )
    zero_variance: Literal["keep", "drop", "refill"] = option(
        "keep",
        "groups with equal rewards: keep in the denominator (paper: nothing else mentioned), drop, or refill: "
        "drop, and sample further problems until --prompts groups have spread (dynamic sampling)",
    )
    # optimizer
    lr: float = option(3e-6, "learning rate (paper: 3e-6)")
    schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "after warmup (paper: silent)"
    )
    warmup_ratio: float = option(0.1, "share of steps with linearly rising lr (paper: 0.1)")
    weight_decay: float = option(0.01, "AdamW weight decay on matrices (paper: 0.01)")
    grad_clip: float = option(1.0, "clip the global gradient norm (paper: 1)")
    seed: int = option(
        0, "order of the problems and, with (step, problem, sample), every sampled token"
    )
    # machinery
    micro_tokens: int = option(
        16384, "tokens of one packed micro-batch, or those of the longest sample, if more"
    )
    slots: int = option(0, "samples decoded at once on a rank, 0: by --kv_gb")
    kv_gb: float = option(0.0, "memory for the KV cache in GB a rank, 0: a share of what is free")
    keep_sampler: bool = option(
        False,
        "keep KV memory and CUDA graphs while training: saves setting them up each "
        "step (always so on CPU)",
    )
    reward: str = option(
        "",
        "module:function(problem, completion, finish_reason) → number, instead of the built-in one",
    )
    reward_deadline: float = option(
        5.0, "seconds after which a grading process is killed; its sample gets 0"
    )
    max_reward_errors: float = option(
        1.0,
        "stop before training on a step of which more than this share of the rewards "
        "raised, hung or were no number (each is a reward of 0 and counted); 1: never",
    )
    graders: int = option(2, "grading processes a rank")
    dtype: Literal["auto", "bf16", "fp32"] = option(
        "auto", "compute dtype; auto: bf16 on CUDA, fp32 on CPU"
    )
    adam_dtype: Literal["fp32", "bf16"] = option("fp32", "AdamW moments; bf16 saves 28 GiB at 7B")
    offload_optimizer: bool = option(
        False, "keep optimizer states in host memory while sampling (GPU)"
    )
    checkpointing: Literal["none", "matmul", "full"] = option(
        "full", "activation checkpointing, as in SFT"
    )
    compile: bool = option(False, "torch.compile each decoder block")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")
    save_every: int = option(10, "save resumable state every n steps, 0: only when stopped")
    keep_last: int = option(2, "checkpoints to keep")
    max_bad_steps: int = option(5, "stop after this many non-finite steps in a row")
    skip_bad_rows: bool = option(False, "train without the rows that fail the check")
    eval_data: list[str] = option(
        [], "problems to evaluate on, before the first step and every --eval_every"
    )
    eval_every: int = option(20, "evaluate every n steps")
    eval_n: int = option(0, "samples a problem for avg@n beside greedy, 0: greedy only")
    replay: str = option(
        "",
        "train on the rollouts that another run saved (its OUT), without sampling; with other "
        "settings than that run's they are off-policy: pass --old_logprobs sampler",
    )
    rollout_only: bool = option(False, "sample and save rollouts, train nothing, save no model")

    def __post_init__(self):
        for name in (
            "prompts",
            "group",
            "max_new_tokens",
            "temperature",
            "lr",
            "updates",
            "micro_tokens",
            "graders",
            "reward_deadline",
            "keep_last",
            "max_bad_steps",
            "eval_every",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive")
        if self.prompts % self.updates:
            raise ValueError(
                f"--prompts {self.prompts} must be a multiple of --updates {self.updates}"
            )
        if self.tis_cap and self.old_logprobs == "sampler":
            raise ValueError(
                "--tis_cap corrects old (trainer) against sampler log-probabilities; with --old_logprobs "
                "sampler the ratio already does, and the correction would count twice"
            )
        if self.tis_mask and self.tis_cap <= 1:
            raise ValueError(
                "--tis_mask keeps weights in [1/cap, cap]: it needs a --tis_cap above 1"
            )
        if self.group < 2 and self.advantage != "batch_std":
            raise ValueError(
                "--group 1 has nothing to compare with: every advantage would be 0; sample 2 or more"
            )
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError("--overlong_buffer cannot be longer than --max_new_tokens")
        if self.rollout_only and (self.replay or self.zero_variance == "refill"):
            raise ValueError(
                "--rollout_only samples every group once: leave --replay and --zero_variance refill out"
            )


# --------------------------------------------------------------------------------------------------- the objective
def group_advantages(rewards: torch.Tensor, kind: str, eps: float = 1e-6) -> torch.Tensor:
    """rewards (P, G), one row a problem → advantages (P, G): how much better than its group each sample did.

    grpo: (r - mean) / (std + eps), std unbiased (arXiv 2402.03300); mean_only: r - mean (Dr. GRPO, 2503.20783);
    batch_std: the std of all rewards of the step (2508.08221); rloo: r - mean of the others (2402.14740).
    A group of equal rewards gets exactly 0, found by its range: a std of rounding noise would be blown up.
    [[1, 0, 0]] → grpo [[1.1547, -0.5774, -0.5774]], mean_only [[2/3, -1/3, -1/3]], rloo [[1, -1/2, -1/2]].
    """
    size = rewards.shape[1]
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "grpo" and size > 1:
        centred = centred / (rewards.std(dim=1, keepdim=True) + eps)
    elif kind == "batch_std" and rewards.numel() > 1:
        centred = centred / (rewards.std() + eps)
    elif kind == "rloo":
        centred = centred * (size / (size - 1))
    return centred.masked_fill(no_spread(rewards)[:, None], 0.0)


def no_spread(rewards: torch.Tensor) -> torch.Tensor:
    """(P, G) → (P,) bool: groups whose samples all got the same reward and teach nothing."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    sequence: torch.Tensor,
    *,
    kind: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[torch.Tensor, dict]:
    """Loss of each token, to be minimised, and what was clipped. All inputs (R,); sequence: which sample each token is
    of, counted from 0. Also returned: {"clip_low", "clip_high": whose gradient is cut, "ratio"}, each (R,).

    ratio = exp(logprobs - old_logprobs)
    ppo_clip: -min(ratio · A, clip(ratio, 1 - clip_low, 1 + clip_high) · A), arXiv 1707.06347; at A < 0 never above
              -dual_clip · A (1912.09729)
    gspo:     the same with the ratio of the whole sample, exp(mean over its tokens of the log-ratio), 2507.18071
    cispo:    -detach(clip(ratio)) · A · logprobs: clips the weight, never the gradient (2506.13585)
    """
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)
    if kind == "gspo":
        zeros = torch.zeros_like(
            log_ratio, requires_grad=False
        )  # an entry a sample, of which there are at most R
        totals = zeros.index_add(0, sequence, log_ratio.detach())
        counts = zeros.index_add(0, sequence, torch.ones_like(zeros))
        # value: the sample's mean; gradient: through each token
        log_ratio = (totals / counts.clamp(min=1))[sequence] + logprobs - logprobs.detach()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if kind == "cispo":
        loss = -clipped.detach() * advantages * logprobs
    else:
        loss = -torch.minimum(ratio * advantages, clipped * advantages)
        if dual_clip and kind == "ppo_clip":
            loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss, {
        "clip_low": ((ratio < 1 - clip_low) & (advantages < 0)).float(),
        "clip_high": ((ratio > 1 + clip_high) & (advantages > 0)).float(),
        "ratio": ratio.detach(),
    }


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str) -> torch.Tensor:
    """Per-token estimate of the KL to the reference, d = logprobs - ref_logprobs: k1 = d, k2 = d²/2, k3 = e^-d + d - 1.

    In the loss their gradients differ (on-policy): k1's is zero on average, k2's is that of KL(policy || reference),
    k3's that of KL(reference || policy).
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    return 0.5 * d**2 if kind == "k2" else (-d).clamp(max=20).exp() + d - 1


def importance_weights(
    old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, cap: float, mask: bool
) -> torch.Tensor:
    """w = exp(trainer - sampler log-probability), detached: corrects for sampling with slightly other numerics.
    Truncated at `cap`, or with `mask` zero outside [1/cap, cap]. Multiplies the policy loss only."""
    w = (old_logprobs - sampler_logprobs).detach().clamp(-20, 20).exp()
    return w * ((w >= 1 / cap) & (w <= cap)) if mask else w.clamp(max=cap)


def token_weights(lengths: np.ndarray, kind: str, max_length: int) -> np.ndarray:
    """The normaliser: the weight of each token of each sample, so that loss = Σ weight · token loss over ALL samples of
    an update, on whatever rank and in whatever micro-batch they are. lengths (S,) trained tokens; 0: sample left out.

    token_mean 1/Σn; seq_mean_token_mean 1/(S·n); seq_mean_token_sum 1/S; constant 1/(S·max_length).
    Losses [1,1,1,1] and [3]: token_mean gives 7/5 = 1.4; a mean of micro-batch means would give 2.
    """
    counted = lengths > 0
    sequences, tokens = max(1, int(counted.sum())), max(1, int(lengths.sum()))
    per_sequence = {
        "token_mean": np.full(len(lengths), 1 / tokens),
        "seq_mean_token_mean": 1 / (sequences * np.maximum(lengths, 1)),
        "seq_mean_token_sum": np.full(len(lengths), 1 / sequences),
        "constant": np.full(len(lengths), 1 / (sequences * max_length)),
    }[kind]
    return np.where(counted, per_sequence, 0.0)


def soft_overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """0 up to max_length - buffer, then linearly down to -1 at max_length (DAPO, arXiv 2503.14476).
    max 20, buffer 4: 16 → 0, 17 → -0.25, 20 → -1."""
    return -min(1.0, max(0, length - (max_length - buffer)) / buffer) if buffer else 0.0


# ------------------------------------------------------------------------------------------------------ the update
def set_advantages(samples: list[Sample], config: Config) -> None:
    """Give every sample that is trained on its advantage, from its reward and the overlong penalty."""
    trained = [s for s in samples if s.trained]
    if not trained:
        return
    shaped = [
        s.reward
        + soft_overlong_penalty(len(s.tokens), config.max_new_tokens, config.overlong_buffer)
        for s in trained
    ]
    advantages = group_advantages(
        torch.tensor(shaped, dtype=torch.float64).view(-1, config.group), config.advantage
    )
    for s, a in zip(trained, advantages.flatten().tolist()):
        s.advantage = a


def micro_batches(
    chosen: list[int],
    samples: list[Sample],
    prompts: list,
    config: Config,
    model: Model,
    world: World,
) -> list[RolloutBatch]:
    """This rank's packed micro-batches of one update on the samples `chosen`, with the weight of every token. Every rank
    gets equally many; none when no token is trained (then there is no update)."""
    trained = np.array(
        [
            0 if config.overlong_masking and samples[i].truncated else samples[i].trained_tokens
            for i in chosen
        ],
        dtype=np.int64,
    )
    weights = dict(zip(chosen, token_weights(trained, config.aggregation, config.max_new_tokens)))
    chosen = [i for i in chosen if weights[i] > 0]
    if not chosen:
        return []
    lengths = np.array(
        [len(prompts[samples[i].problem].tokens) + len(samples[i].tokens) for i in chosen]
    )
    packs = pack_plan(lengths, max(config.micro_tokens, lengths.max()), seed=0, epoch=0)
    shares = balance([attention_cost(lengths[p]) for p in packs], world.size)
    merge = model.config.vision.spatial_merge_size if model.config.vision else 1
    mine = [
        collate_samples(
            [chosen[i] for i in packs[p]],
            samples,
            weights,
            prompts,
            model.config.image_token_id,
            merge,
        )
        for p in shares[world.rank]
    ]
    return mine + [empty_rollouts() for _ in range(max(map(len, shares)) - len(mine))]


def score(model: Model, b: RolloutBatch, config: Config, entropy: bool = False):
    """Log-probabilities (R,) of a micro-batch's trained tokens at the sampling temperature, and entropies or None."""
    logprobs, entropies = model(
        b.tokens,
        b.position_ids,
        b.cu_seqlens,
        targets=b.targets,
        entropy=entropy,
        temperature=config.temperature,
        pixel_values=b.pixel_values,
        grid_thw=b.grid_thw,
    )
    rows = (b.targets != -100).nonzero().squeeze(1).to(logprobs.device)
    return logprobs[rows], entropies[rows] if entropy else None


@torch.no_grad()
def score_before_updates(
    model: Model, reference: Model | None, updates: list[list[RolloutBatch]], config: Config
) -> None:
    """Fill in old_logprobs (when more than one update follows, or the sampler's stand in) and ref_logprobs."""
    for b in (b for batches in updates for b in batches):
        if config.old_logprobs == "sampler":
            b.old_logprobs = b.sampler_logprobs
        elif len(updates) > 1:
            b.old_logprobs = score(model, b, config)[0]
        if reference is not None:
            b.ref_logprobs = score(reference, b, config)[0]


def micro_batch_loss(
    model: Model, b: RolloutBatch, config: Config, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's part of the update's loss, and its figures, one (R,) tensor each. Parts add up to the loss over
    all ranks and micro-batches: the weights' denominator is global, no rank's or micro-batch's own mean."""
    logprobs, entropy = score(model, b, config, entropy=True)
    sampler, advantages, weights, sequence = (
        t.to(device, non_blocking=True)
        for t in (b.sampler_logprobs, b.advantages, b.weights, b.sequence)
    )
    # without old_logprobs this is the policy that sampled: its ratio is 1, and the ratio's gradient is not 0
    old = logprobs.detach() if b.old_logprobs is None else b.old_logprobs.to(device)
    policy, clips = policy_loss(
        logprobs,
        old,
        advantages,
        sequence,
        kind=config.loss,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )
    if config.tis_cap:
        policy = policy * importance_weights(old, sampler, config.tis_cap, config.tis_mask)
    loss, kl = policy, torch.zeros_like(policy)
    if b.ref_logprobs is not None:
        kl = kl_estimate(logprobs, b.ref_logprobs, config.kl)
        loss = loss + config.kl_coef * kl
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy
    trainer = logprobs if config.old_logprobs == "sampler" else old
    gap = (trainer - sampler).detach()
    figures = {
        "policy_loss": policy * weights,
        "tokens": torch.ones_like(policy),
        "entropy": entropy,
        "kl": kl,
        **clips,
        "gap": gap.abs(),
        "gap_k3": gap.exp() - 1 - gap,
    }
    return (loss * weights).sum(), {k: v.detach() for k, v in figures.items()}


def update(
    model: Model,
    optimizer: torch.optim.Optimizer,
    batches: list[RolloutBatch],
    samples: list[Sample],
    config: Config,
    lr: float,
    world: World,
) -> tuple[dict, bool]:
    """One optimizer step. Returns the update's figures, summed over its tokens and ranks, and whether it stepped."""
    tally = Tally()
    for b in batches:
        loss, figures = micro_batch_loss(model, b, config, world.device)
        (loss * world.size).backward()  # FSDP averages over ranks
        tally.add(b, loss.detach(), figures)
    sums = tally.over_ranks(samples)
    norm, stepped = optim.guarded_step(
        model, optimizer, lr=lr, max_norm=config.grad_clip, loss=sums["loss"]
    )
    return {**sums, "grad_norm": norm}, stepped


class Tally:
    """An update's figures, summed over its micro-batches on the device; read once, at its end."""

    def __init__(self):
        self.sums, self.most, self.gaps = [], [], []

    def add(self, b: RolloutBatch, loss: torch.Tensor, figures: dict[str, torch.Tensor]) -> None:
        self.names = ["loss", *figures]
        self.sums.append(torch.stack([loss, *(v.sum() for v in figures.values())]).double())
        gap = figures["gap"]
        if len(gap):
            self.most.append(torch.stack([gap.max(), (figures["ratio"] - 1).abs().max()]).double())
            self.gaps.append(
                (
                    b.samples,
                    gap.new_zeros(len(b.samples)).index_add(0, b.sequence.to(gap.device), gap),
                )
            )

    def over_ranks(self, samples: list[Sample]) -> dict:
        """Sums and maxima over micro-batches and ranks; each sample gets its mean |trainer - sampler| as `gap`."""
        sums = all_sum(*torch.stack(self.sums).sum(0).tolist())
        most = all_max(*(torch.stack(self.most).amax(0).tolist() if self.most else [0.0, 0.0]))
        mine = {i: t for chosen, totals in self.gaps for i, t in zip(chosen, totals.tolist())}
        for part in all_gather_objects(
            mine
        ):  # rank 0 writes every sample's gap to the rollout file
            for i, total in part.items():
                samples[i].gap = total / samples[i].trained_tokens
        return {**dict(zip(self.names, sums)), "gap_max": most[0], "ratio_off_one_max": most[1]}


def train_on(
    model: Model,
    reference: Model | None,
    optimizer,
    rollouts: Rollouts,
    lr: float,
    config: Config,
    world: World,
) -> tuple[dict, bool]:
    """All updates on the rollouts of a step. Returns (figures, every update stepped)."""
    samples, begin = rollouts.samples, time.perf_counter()
    groups = np.array([i for i, s in enumerate(samples) if s.trained], dtype=np.int64).reshape(
        -1, config.group
    )
    updates = [
        micro_batches(part.flatten().tolist(), samples, rollouts.prompts, config, model, world)
        for part in np.array_split(groups, config.updates)
    ]
    updates = [
        batches for batches in updates if batches
    ]  # an empty one would still move the weights, by momentum
    if not updates:
        return {}, True
    score_before_updates(model, reference, updates, config)
    scored = time.perf_counter()
    results = [update(model, optimizer, batches, samples, config, lr, world) for batches in updates]
    every = [figures for figures, _ in results]
    tokens = sum(f["tokens"] for f in every)
    mean = {k: sum(f[k] for f in every) / len(every) for k in ("loss", "policy_loss", "grad_norm")}
    per_token = {
        k: sum(f[k] for f in every) / tokens
        for k in ("entropy", "kl", "clip_low", "clip_high", "ratio", "gap", "gap_k3")
    }
    figures = {
        **mean,
        **per_token,
        "ratio_off_one_max": max(f["ratio_off_one_max"] for f in every),
        "gap_max": max(f["gap_max"] for f in every),
        "trained_tokens": int(tokens),
        "logprob_s": round(scored - begin, 3),
        "update_s": round(time.perf_counter() - scored, 3),
    }
    return figures, all(stepped for _, stepped in results)


# ----------------------------------------------------------------------------------------------------------- the run
@dataclass
class Parts:
    """What a run is made of."""

    model_dir: Path
    tokenizer: object
    problems: list[dict]
    evaluation: list[dict]
    longest_prompt: int  # tokens
    images: ImageConfig | None
    model: Model
    reference: Model | None  # None: no KL term
    optimizer: torch.optim.Optimizer | None  # None: --rollout_only


def set_up(config: Config, world: World, run: Run) -> Parts:
    """Everything that can fail before the first sample: problems that fit, tokenizer, models, optimizer."""
    model_dir = resolve_model_dir(config.model, world)
    tokenizer = load_tokenizer(model_dir)
    problems, faults = load_problems(config.data, skip_bad_rows=config.skip_bad_rows)
    evaluation = (
        load_problems(config.eval_data, skip_bad_rows=config.skip_bad_rows)[0]
        if config.eval_data
        else []
    )
    with_images = any(p.get("images") for p in problems + evaluation)
    images = ImageConfig.from_dir(model_dir) if with_images else None

    def length(p: dict) -> int:
        counts = [image_token_count(f, images) for f in p.get("images") or []]
        return len(prompt_tokens(p, tokenizer, counts, config.prompt_style))

    lengths = {p["id"]: n for p in problems if (n := length(p)) <= config.max_prompt_tokens}
    fitting = [p for p in problems if p["id"] in lengths]
    run.say(
        f"{len(fitting)} problems ({len({(f.file, f.line) for f in faults})} bad rows skipped, "
        f"{len(problems) - len(fitting)} prompts over {config.max_prompt_tokens} tokens left out), "
        f"{len(evaluation)} for evaluation"
    )
    if not fitting:
        raise ValueError(
            f"no problem has a prompt of ≤ {config.max_prompt_tokens} tokens; raise --max_prompt_tokens"
        )
    eval_lengths = {p["id"]: length(p) for p in evaluation}
    if too_long := [i for i, n in eval_lengths.items() if n > config.max_prompt_tokens]:
        raise ValueError(
            f"{len(too_long)} problems of --eval_data have prompts of more than {config.max_prompt_tokens} "
            f"tokens, the first is {too_long[0]!r}; raise --max_prompt_tokens, none is left out silently"
        )
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and world.device.type == "cuda")
    compute = torch.bfloat16 if bf16 else torch.float32
    options = dict(with_vision=with_images, compute_dtype=compute)
    model = build_model(
        model_dir,
        world,
        checkpointing=config.checkpointing,
        compile_blocks=config.compile,
        **options,
    )
    reference = optimizer = None
    if config.kl_coef and not config.rollout_only:
        reference = build_model(model_dir, world, master_dtype=compute, **options)
    for m in (model, reference):  # the same probabilities 0 in sampler, trainer and reference
        if m is not None:
            m.set_banned_ids(banned_token_ids(tokenizer, m.config.vocab_size))
    if not config.rollout_only:
        optimizer = optim.adamw(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            state_dtype=torch.bfloat16 if config.adam_dtype == "bf16" else torch.float32,
        )
    longest = max(*lengths.values(), *eval_lengths.values(), 1)
    return Parts(
        model_dir, tokenizer, fitting, evaluation, longest, images, model, reference, optimizer
    )


def resume(parts: Parts, config: Config, run: Run, world: World, hashes: dict[str, str]) -> dict:
    """Fill model and optimizer from the newest whole checkpoint and return where it stood, else the beginning. Rollout
    files of steps that will be done again are removed."""
    at = {"step": 0, "cursor": 0, "bad_steps": 0, "bad_in_a_row": 0}
    folder = run.out / "rollouts"
    if config.rollout_only:  # nothing is trained: whole files are all there is to go on from
        while (folder / f"step_{at['step'] + 1}.jsonl").is_file():
            at = {**at, "step": at["step"] + 1, "cursor": at["cursor"] + config.prompts}
    else:
        root = run.out / "checkpoints"
        at = resume_state(root, "auto", parts.model, parts.optimizer, world, hashes) or at
        require_space(
            root,
            parts.model,
            parts.optimizer,
            world,
            copies=config.keep_last + 1 if config.save_every else 1,
            export_bytes=sum(f.stat().st_size for f in parts.model_dir.glob("*.safetensors")),
        )
    if world.is_main:
        for file in folder.glob("step_*.jsonl"):
            if int(file.stem[5:]) > at["step"]:
                file.unlink()
    return at


@contextmanager
def optimizer_in_host_memory(parts: Parts, config: Config, world: World) -> Iterator[None]:
    """With --offload_optimizer: AdamW's moments leave the GPU to the sampler for as long as the context lasts."""
    if config.offload_optimizer and parts.optimizer:
        optim.move_states(parts.optimizer, "cpu")
    yield
    if config.offload_optimizer and parts.optimizer:
        optim.move_states(parts.optimizer, world.device)


def evaluate_once(roller: Roller, parts: Parts, run: Run, step: int) -> None:
    """Evaluate the weights after `step` steps into eval.jsonl, unless a run that was killed later has done so."""
    if not run.has("eval", step):
        run.log_evaluation(roller.evaluate(parts.evaluation, step))


def train(config: Config) -> int:
    """Run to the end, or to a signal. Returns the exit code."""
    world = init(config.device)
    run = Run(config.out, config, world)
    if run.complete:
        return run.finished()
    parts = set_up(config, world, run)
    total = (
        config.steps
        if config.steps >= 0
        else -(-config.epochs * len(parts.problems) // config.prompts)
    )
    hashes = hash_files(config.data) if world.is_main else {}
    at = resume(parts, config, run, world, hashes)
    saved = at["step"]  # the newest checkpoint; at 0 there is nothing to save
    run.start(
        header(
            world_size=world.size,
            data=hashes | hash_files(config.eval_data),
            model=str(parts.model_dir),
            attention=attention.backend(world.device, torch.bfloat16),
        ),
        at["step"],
    )
    run.progress(total, at["step"])
    stop = StopRequest()
    quiet_garbage_collection()
    with Grader(
        workers=config.graders, deadline=config.reward_deadline, reward=config.reward
    ) as grader:
        roller = Roller(config, parts, grader, world)
        for step in range(at["step"], total + 1):
            if parts.evaluation and (step == total or step % config.eval_every == 0):
                with optimizer_in_host_memory(parts, config, world):
                    evaluate_once(roller, parts, run, step)
            if step == total:
                break
            at, metrics, error = one_step(at, roller, parts, total, config, run, world)
            last = at["step"] == total
            stop_asked = all_any(stop.requested)
            due = (
                last
                or stop_asked
                or error
                or (config.save_every and at["step"] % config.save_every == 0)
            )
            if due and at["step"] > saved and not config.rollout_only:
                save_state(
                    run.out / "checkpoints",
                    at["step"],
                    parts.model,
                    parts.optimizer,
                    at,
                    world,
                    config.keep_last,
                    hashes,
                )
                saved = at["step"]
            if error:
                raise ValueError(error)
            run.say(describe(metrics, total))
            run.advance()
            gc.collect(0)  # what this step left behind; automatic collection is off
            if stop_asked and not last:
                return run.stopped(at["step"])
    if config.rollout_only:
        return run.finished(
            f"rollouts of {total} steps are in {run.out / 'rollouts'}; train on them with "
            f"--replay {run.out}"
        )
    export_hf(parts.model, parts.model_dir, run.out / "final", world)
    return run.finished()


def one_step(
    at: dict, roller: Roller, parts: Parts, total: int, config: Config, run: Run, world: World
) -> tuple[dict, dict, str]:
    """Sample, grade, update, and write down step at["step"]. Returns (where the run stands now, the step's metrics, why
    the run must end or "")."""
    begin, step = time.perf_counter(), at["step"]
    roller.reset_clock()
    with optimizer_in_host_memory(parts, config, world):
        rollouts = roller.replay(step) if config.replay else roller.step(at["cursor"])
    rolled = time.perf_counter()
    samples = rollouts.samples
    set_advantages(samples, config)
    figures, stepped, error = rollout_figures(rollouts, config.group), True, ""
    failed = figures["reward_timeouts"] + figures["reward_errors"]
    lr = optim.lr_at(
        step,
        lr=config.lr,
        total_steps=total,
        steps_per_epoch=total,
        schedule=config.schedule,
        warmup_steps=int(config.warmup_ratio * total),
    )
    if failed > config.max_reward_errors:
        error = (
            f"step {step + 1}: {failed:.0%} of the rewards raised, hung or were no number, more than "
            f"--max_reward_errors; nothing was trained on them. Mend the reward (the samples are in "
            f"{run.out / 'rollouts'}), then run the same command again"
        )
    elif not config.rollout_only:
        more, stepped = train_on(
            parts.model, parts.reference, parts.optimizer, rollouts, lr, config, world
        )
        figures.update(more)
    if world.is_main:
        write_samples(
            run.out / "rollouts" / f"step_{step + 1}.jsonl",
            samples,
            rollouts.problems,
            [parts.tokenizer.decode(p.tokens) for p in rollouts.prompts],
        )
    if error:
        return at, {}, error
    at = {
        "step": step + 1,
        "cursor": rollouts.cursor,
        "bad_steps": at["bad_steps"] + (not stepped),
        "bad_in_a_row": 0 if stepped else at["bad_in_a_row"] + 1,
    }
    metrics = {
        "step": step + 1,
        "epoch": round(rollouts.cursor / len(parts.problems), 4),
        "lr": lr,
        **figures,
        **speed(rollouts, begin, rolled, roller),
        "bad_steps": at["bad_steps"],
    }
    run.log(metrics)
    if at["bad_in_a_row"] >= config.max_bad_steps:
        error = (
            f"loss or gradient was not finite in {at['bad_in_a_row']} steps in a row (now step {step + 1}); the "
            f"weights are as before them. Lower --lr, or look at {run.out / 'rollouts'}"
        )
    return at, metrics, error


def describe(m: dict, total: int) -> str:
    """A step's figures on one line."""
    parts = [
        f"step {m['step']}/{total}",
        f"reward {m['reward_mean']:.3f}",
        f"no spread {m['zero_variance']:.0%}",
        f"length {m['length_mean']:.0f} (max {m['length_max']})",
        f"truncated {m['truncated']:.0%}",
    ]
    if "loss" in m:
        parts += [
            f"loss {m['loss']:+.4f}",
            f"entropy {m['entropy']:.3f}",
            f"kl {m['kl']:.4f}",
            f"norm {m['grad_norm']:.3f}",
            f"gap {m['gap']:.1e}",
            f"lr {m['lr']:.1e}",
        ]
    parts += [
        f"{m['tok_per_s']:.0f} tok/s",
        f"rollouts {m['rollout_s']:.1f} s of {m['step_s']:.1f} s",
    ]
    if failed := m["reward_timeouts"] + m["reward_errors"]:
        parts.append(f"rewards failed {failed:.1%}")
    return " | ".join(parts + ([f"bad steps {m['bad_steps']}"] if m["bad_steps"] else []))


def main(argv: list[str] | None = None) -> None:
    with script():
        code = train(parse_config(Config, __doc__, argv))
    raise SystemExit(code)


if __name__ == "__main__":
    run_and_exit(main)
