"""Stage two of X-Reasoner: GRPO on text-only problems with an exact 1/0 reward.

    torchrun --nproc_per_node=8 train_grpo.py --model runs/sft/final --data orz57k.jsonl --out runs/grpo
    python train_grpo.py --model DIR --data problems.jsonl --out runs/try --steps 20 --prompts 8 --max_new_tokens 256

One step: take `prompts` problems → `group` rollouts of each, graded while others still decode → advantages within each
group → clipped loss over all sampled tokens of the step → AdamW → the new weights sample the next step.

The defaults are the paper's recipe (arXiv 2505.03981, section 2.3 and appendix B.2). Where it is silent or contradicts
itself the field's own --help says what we took. Read in this order: `group_advantages`, `policy_loss`,
`kl_estimate`, `token_weights` (the normaliser), `update`, `train`.
"""
from __future__ import annotations

import time
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

import attention
import optim
from checkpoint import build_model, export_hf, load_state, newest_state, resolve_model_dir, save_state
from data import attention_cost, balance, load_problems, load_tokenizer, pack_plan, render_problem
from experiment import (Run, StopRequest, hash_files, header, memory_gib, option, parse_config, quiet_garbage_collection,
                        user_errors)
from model import Model
from parallel import World, all_gather_objects, all_max, all_sum, gathered, init, main_first, shutdown
from rewards import Grader
from rollouts import (RolloutBatch, Sample, collate_samples, empty_rollouts, generate_and_grade, problem_key,
                      read_samples, write_samples)
from sampler import Sampler, SamplingParams, think_exit
from vision import ImageConfig


@dataclass
class Config:
    MAY_CHANGE: ClassVar[set[str]] = {"epochs", "steps", "graders", "offload_optimizer", "keep_sampler", "save_every",
                                      "keep_last", "max_bad_steps", "eval_every", "eval_n"}  # in a resumed run

    model: str = option(MISSING, "model directory or hub id to start from, usually OUT/final of train_sft.py")
    data: list[str] = option(MISSING, "jsonl file(s) of problems, see `python data.py check`")
    out: str = option(MISSING, "run directory; OUT/final is the trained model, OUT/rollouts every sample")
    epochs: int = option(3, "passes over the problems (paper: 3 in the text, 'until convergence' in its appendix)")
    steps: int = option(-1, "steps, overrides --epochs; -1: by epochs")
    prompts: int = option(128, "problems a step (paper: batch 128, taken as prompts, not samples)")
    group: int = option(8, "rollouts of each problem (paper: 8)")
    max_new_tokens: int = option(4096, "longest completion (paper: 4096)")
    max_prompt_tokens: int = option(2048, "longer prompts are left out and counted (paper: not stated)")
    prompt_style: str = option("train", "instruction before each question: train (the paper's), kind (the paper's for "
                               "evaluation), plain (none)")
    temperature: float = option(1.0, "of sampling and of every log-probability (paper: 1); no top-p or top-k here")
    think_budget: int = option(0, "force </think> after so many tokens, 0: never (paper: at evaluation only)")
    # objective
    advantage: Literal["grpo", "mean_only", "batch_std", "rloo"] = option(
        "grpo", "grpo: (r - mean) / std of the group (paper); mean_only: Dr. GRPO; batch_std: std over the step; rloo: "
        "leave-one-out mean")
    loss: Literal["ppo_clip", "gspo", "cispo"] = option("ppo_clip", "policy loss (paper: ppo_clip); use gspo with "
                                                        "--aggregation seq_mean_token_mean and clips around 3e-4")
    clip_low: float = option(0.2, "ratio is clipped below 1 - clip_low (paper: 0.2)")
    clip_high: float = option(0.2, "ratio is clipped above 1 + clip_high (paper: 'higher' in the text, value never "
                              "given; 0.2 in its appendix. DAPO: 0.28)")
    dual_clip: float = option(3.0, "bound of the loss at negative advantage, 0: off (paper: silent; verl, which it "
                              "forked, has 3)")
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"] = option(
        "token_mean", "token_mean: over all tokens of the step (paper's text; its equation shows "
        "seq_mean_token_mean); constant: sum / (samples × max_new_tokens), Dr. GRPO")
    kl_coef: float = option(0.01, "weight of the KL to the starting model in the loss; 0: no reference model is loaded "
                            "(paper: 0.01 in its appendix, 'reduced or removed' in the text)")
    kl: Literal["k1", "k2", "k3"] = option("k3", "KL estimator (paper: silent; verl's default is k3). k1's gradient in "
                                           "the loss is zero on average; k2 has the gradient of KL(policy || reference)")
    entropy_coef: float = option(0.0, "weight of an entropy bonus (paper: none mentioned)")
    tis_cap: float = option(0.0, "truncated importance sampling of the sampler/trainer gap: weight min(w, cap), 0: off")
    tis_mask: bool = option(False, "with --tis_cap: drop tokens with w outside [1/cap, cap] instead of truncating")
    old_logprobs: Literal["trainer", "sampler"] = option("trainer", "denominator of the ratio: the trainer's own forward "
                                                         "(free when --updates is 1), or the sampler's (bypass)")
    updates: int = option(1, "optimizer steps per batch of rollouts (paper: silent); 1 is exactly on-policy")
    overlong_masking: bool = option(False, "leave truncated samples out of the loss and of its denominator")
    overlong_buffer: int = option(0, "soft overlong penalty (DAPO): reward falls linearly to -1 over the last so many "
                                  "tokens before max_new_tokens, 0: off")
    zero_variance: Literal["keep", "drop", "refill"] = option(
        "keep", "groups with equal rewards: keep in the denominator (paper: nothing else mentioned), drop, or drop and "
        "sample further problems until --prompts groups have spread (dynamic sampling)")
    # optimizer
    lr: float = option(3e-6, "learning rate (paper: 3e-6)")
    schedule: Literal["constant", "linear", "cosine"] = option("constant", "after warmup (paper: silent)")
    warmup_ratio: float = option(0.1, "share of steps with linearly rising lr (paper: 0.1)")
    weight_decay: float = option(0.01, "AdamW weight decay on matrices (paper: 0.01)")
    grad_clip: float = option(1.0, "clip the global gradient norm (paper: 1)")
    seed: int = option(0, "order of the problems and, with (step, problem, sample), every sampled token")
    # machinery
    micro_tokens: int = option(16384, "tokens of one packed micro-batch; a longer sample has one of its own")
    slots: int = option(0, "samples decoded at once on a rank, 0: by --kv_gb")
    kv_gb: float = option(0.0, "memory for the KV cache in GB a rank, 0: a share of what is free")
    keep_sampler: bool = option(False, "keep KV memory and CUDA graphs while training: saves setting them up each step")
    reward: str = option("", "module:function to use instead of the built-in grading")
    graders: int = option(2, "grading processes a rank")
    dtype: Literal["auto", "bf16", "fp32"] = option("auto", "compute dtype; auto: bf16 on CUDA, fp32 on CPU")
    adam_dtype: Literal["fp32", "bf16"] = option("fp32", "AdamW moments; bf16 on CUDA only")
    offload_optimizer: bool = option(False, "keep optimizer states in host memory while sampling")
    checkpointing: Literal["none", "attn", "matmul", "full"] = option("full", "activation checkpointing, as in SFT")
    compile: bool = option(False, "torch.compile each decoder block")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")
    save_every: int = option(10, "save resumable state every n steps, 0: only when stopped")
    keep_last: int = option(2, "checkpoints to keep")
    max_bad_steps: int = option(5, "stop after this many non-finite steps in a row")
    skip_bad_rows: bool = option(False, "train without the rows that fail the check")
    eval_data: list[str] = option([], "problems to evaluate on, before the first step and every --eval_every")
    eval_every: int = option(20, "evaluate every n steps")
    eval_n: int = option(0, "samples a problem for avg@n beside greedy, 0: greedy only")
    replay: str = option("", "train on the rollouts that another run saved (its OUT), without sampling")
    rollout_only: bool = option(False, "sample and save rollouts, train nothing")

    def __post_init__(self):
        for name in ("prompts", "group", "max_new_tokens", "temperature", "lr", "updates", "micro_tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive")
        if self.prompts % self.updates:
            raise ValueError(f"--prompts {self.prompts} must be a multiple of --updates {self.updates}")
        if self.tis_cap and self.old_logprobs == "sampler":
            raise ValueError("--tis_cap corrects old (trainer) against sampler log-probabilities; with --old_logprobs "
                             "sampler the ratio already does, and the correction would count twice")
        if self.advantage == "rloo" and self.group < 2:
            raise ValueError("--advantage rloo needs --group 2 or more")


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


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, sequence: torch.Tensor, *,
                kind: str, clip_low: float, clip_high: float, dual_clip: float) -> tuple[torch.Tensor, dict]:
    """Loss of each token, to be minimised, and what was clipped. All inputs (R,); sequence: which sample a token is of.

    ratio = exp(logprobs - old_logprobs)
    ppo_clip: -min(ratio · A, clip(ratio, 1 - clip_low, 1 + clip_high) · A), arXiv 1707.06347; at A < 0 never above
              -dual_clip · A (1912.09729)
    gspo:     the same with the ratio of the whole sample, exp(mean over its tokens of the log-ratio), 2507.18071
    cispo:    -detach(clip(ratio)) · A · logprobs: clips the weight, never the gradient (2506.13585)
    """
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)
    if kind == "gspo":
        total = torch.zeros(int(sequence.max()) + 1 if len(sequence) else 0, device=logprobs.device)
        mean = (total.to(log_ratio).index_add(0, sequence, log_ratio.detach())
                / total.to(log_ratio).index_add(0, sequence, torch.ones_like(log_ratio)).clamp(min=1))[sequence]
        log_ratio = mean + logprobs - logprobs.detach()  # value: the sample's ratio; gradient: through each token
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if kind == "cispo":
        loss = -clipped.detach() * advantages * logprobs
    else:
        loss = -torch.minimum(ratio * advantages, clipped * advantages)
        if dual_clip:
            loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss, {"clip_low": ((ratio < 1 - clip_low) & (advantages < 0)).float(),
                  "clip_high": ((ratio > 1 + clip_high) & (advantages > 0)).float(), "ratio": ratio.detach()}


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str) -> torch.Tensor:
    """Per-token estimate of the KL to the reference, d = logprobs - ref_logprobs: k1 = d, k2 = d²/2, k3 = e^-d + d - 1.

    In the loss their gradients differ (on-policy): k1's is zero on average, k2's is that of KL(policy || reference),
    k3's that of KL(reference || policy).
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    return 0.5 * d**2 if kind == "k2" else (-d).clamp(max=20).exp() + d - 1


def importance_weights(old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, cap: float, mask: bool) -> torch.Tensor:
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
    per_sequence = {"token_mean": np.full(len(lengths), 1 / tokens),
                    "seq_mean_token_mean": 1 / (sequences * np.maximum(lengths, 1)),
                    "seq_mean_token_sum": np.full(len(lengths), 1 / sequences),
                    "constant": np.full(len(lengths), 1 / (sequences * max_length))}[kind]
    return np.where(counted, per_sequence, 0.0)


def soft_overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """0 up to max_length - buffer, then linearly down to -1 at max_length (DAPO, arXiv 2503.14476).
    max 20, buffer 4: 16 → 0, 17 → -0.25, 20 → -1."""
    return -min(1.0, max(0, length - (max_length - buffer)) / buffer) if buffer else 0.0


# ------------------------------------------------------------------------------------------------------ the update
def micro_batches(minibatch: list[int], samples: list[Sample], prompts: list, config: Config, model: Model, world: World
                  ) -> list[RolloutBatch]:
    """This rank's packed micro-batches of one update, with the weight of every token. Every rank gets equally many."""
    trained = [0 if config.overlong_masking and s.truncated else s.trained_tokens for s in samples]
    weights = np.zeros(len(samples))
    weights[minibatch] = token_weights(np.array([trained[i] for i in minibatch]), config.aggregation,
                                       config.max_new_tokens)
    chosen = [i for i in minibatch if weights[i] > 0]
    lengths = np.array([len(prompts[samples[i].problem].tokens) + len(samples[i].tokens) for i in chosen], dtype=np.int64)
    merge = model.config.vision.spatial_merge_size if model.config.vision else 1
    packs = pack_plan(lengths, max(config.micro_tokens, lengths.max(initial=1)), seed=0, epoch=0) if chosen else []
    shares = balance([attention_cost(lengths[p]) for p in packs], world.size) if packs else [[]] * world.size
    mine = [collate_samples([chosen[i] for i in packs[p]], samples, weights, prompts, model.config.image_token_id, merge)
            for p in shares[world.rank]]
    return mine + [empty_rollouts() for _ in range(max(1, *map(len, shares)) - len(mine))]


def score(model: Model, b: RolloutBatch, config: Config, entropy: bool = False):
    """Log-probabilities (R,) of a micro-batch's trained tokens at the sampling temperature, and entropies or None."""
    logprobs, entropies = model(b.tokens, b.position_ids, b.cu_seqlens, targets=b.targets, entropy=entropy,
                                temperature=config.temperature, pixel_values=b.pixel_values, grid_thw=b.grid_thw)
    rows = (b.targets != -100).nonzero().squeeze(1).to(logprobs.device)
    return logprobs[rows], entropies[rows] if entropy else None


@torch.no_grad()
def score_before_updates(model: Model, reference: Model | None, minibatches: list[list[RolloutBatch]], config: Config
                         ) -> None:
    """Fill in old_logprobs (when more than one update follows, or the sampler's stand in) and ref_logprobs."""
    for b in (b for batches in minibatches for b in batches):
        if config.old_logprobs == "sampler":
            b.old_logprobs = b.sampler_logprobs
        elif len(minibatches) > 1:
            b.old_logprobs = score(model, b, config)[0]
        if reference is not None:
            b.ref_logprobs = score(reference, b, config)[0]


def update(model: Model, optimizer: torch.optim.Optimizer, batches: list[RolloutBatch], samples: list[Sample],
           config: Config, lr: float, world: World) -> tuple[dict, bool]:
    """One optimizer step. Returns sums over this update's tokens and ranks (`Tally`'s fields), and whether it stepped."""
    tally = Tally()
    for b in batches:
        logprobs, entropies = score(model, b, config, entropy=True)
        sampler, advantages, weights, sequence = (t.to(world.device, non_blocking=True) for t in
                                                  (b.sampler_logprobs, b.advantages, b.weights, b.sequence))
        # one update: the policy that is updated is the one that sampled, its ratio is 1 and its gradient is not
        old = logprobs.detach() if b.old_logprobs is None else b.old_logprobs.to(world.device)
        loss, clips = policy_loss(logprobs, old, advantages, sequence, kind=config.loss, clip_low=config.clip_low,
                                  clip_high=config.clip_high, dual_clip=config.dual_clip)
        policy = loss.detach()
        if config.tis_cap:
            loss = loss * importance_weights(old, sampler, config.tis_cap, config.tis_mask)
        kl = torch.zeros_like(loss)
        if b.ref_logprobs is not None:
            kl = kl_estimate(logprobs, b.ref_logprobs, config.kl)
            loss = loss + config.kl_coef * kl
        if config.entropy_coef:
            loss = loss - config.entropy_coef * entropies
        loss = (loss * weights).sum()  # the weights' denominator is global: no rank's or micro-batch's own mean
        (loss * world.size).backward()  # FSDP averages over ranks
        tally.add(b, loss, policy * weights, logprobs, old, sampler, entropies, kl, clips)
    sums = tally.over_ranks(samples)
    norm, stepped = optim.guarded_step(model, optimizer, lr=lr, max_norm=config.grad_clip, loss=sums["loss"])
    return {**sums, "grad_norm": norm}, stepped


class Tally:
    """Sums over an update's tokens, for the metrics; one wait for the GPU at its end."""
    NAMES = ("loss", "policy_loss", "tokens", "entropy", "kl", "clip_low", "clip_high", "ratio", "gap", "gap_k3")

    def __init__(self):
        self.sums, self.most, self.gaps = [], [], []

    @torch.no_grad()
    def add(self, b, loss, policy, logprobs, old, sampler, entropies, kl, clips) -> None:
        """One micro-batch: loss a scalar, the rest (R,)."""
        difference = (logprobs if b.old_logprobs is None else old) - sampler  # trainer - sampler, before the update
        columns = (policy, torch.ones_like(policy), entropies, kl, clips["clip_low"], clips["clip_high"], clips["ratio"],
                   difference.abs(), difference.exp() - 1 - difference)
        self.sums.append(torch.stack([loss, *(c.sum() for c in columns)]).double())
        if len(difference):
            self.most.append(torch.stack([difference.abs().max(), (clips["ratio"] - 1).abs().max()]).double())
            totals = torch.zeros(len(b.samples), device=difference.device).index_add(
                0, b.sequence.to(difference.device), difference.abs())
            self.gaps.append((b.samples, totals))

    def over_ranks(self, samples: list[Sample]) -> dict:
        """Sums and maxima over micro-batches and ranks; each sample gets its mean |trainer - sampler| as `gap`."""
        sums = all_sum(*torch.stack(self.sums).sum(0).tolist())
        most = all_max(*(torch.stack(self.most).amax(0).tolist() if self.most else [0.0, 0.0]))
        mine = {i: t for chosen, totals in self.gaps for i, t in zip(chosen, totals.tolist())}
        for part in all_gather_objects(mine):  # rank 0 writes every sample's gap to the rollout file
            for i, total in part.items():
                samples[i].gap = total / samples[i].trained_tokens
        return {**dict(zip(self.NAMES, sums)), "gap_max": most[0], "ratio_off_one_max": most[1]}


# --------------------------------------------------------------------------------------------------------- rollouts
class Roller:
    """Problems → graded samples: this rank's share of a batch, then everybody's on every rank."""

    def __init__(self, config: Config, model: Model, tokenizer, images: ImageConfig | None, grader: Grader, world: World):
        self.config, self.model, self.tokenizer, self.images = config, model, tokenizer, images
        self.grader, self.world = grader, world
        self.stop_ids = stop_ids(tokenizer)
        self.sampler = Sampler(model, slots=config.slots or None, kv_gb=config.kv_gb or None,
                               max_len=config.max_prompt_tokens + config.max_new_tokens)
        self.exit = think_exit(tokenizer, model.config.vocab_size) if config.think_budget else {}

    def prompts(self, problems: list[dict]) -> list:
        return [render_problem(p, self.tokenizer, self.images, style=self.config.prompt_style) for p in problems]

    def params(self, n: int, temperature: float) -> SamplingParams:
        c = self.config
        return SamplingParams(n=n, temperature=temperature, max_new_tokens=c.max_new_tokens, stop_ids=self.stop_ids,
                              seed=c.seed, think_budget=c.think_budget or None, **self.exit)

    def sample(self, problems: list[dict], prompts: list, keys: list[int], n: int, temperature: float) -> list[Sample]:
        """n samples of each problem, in order of (problem, sample), the same on every rank. Collective."""
        mine = range(self.world.rank, len(problems), self.world.size)
        with gathered(self.model):
            samples = generate_and_grade(
                self.sampler, self.grader, self.tokenizer, [problems[i] for i in mine], [prompts[i] for i in mine],
                self.params(n, temperature), keys=[keys[i] for i in mine], stop_ids=self.stop_ids)
            if not self.config.keep_sampler:
                self.sampler.release()
        for s in samples:
            s.problem = mine[s.problem]
        everyone = [s for part in all_gather_objects(samples) for s in part]
        return sorted(everyone, key=lambda s: (s.problem, s.index))

    def evaluate(self, problems: list[dict], run: Run, step: int) -> None:
        """Greedy accuracy and avg@n over the evaluation problems, into eval.jsonl."""
        prompts = self.prompts(problems)
        keys = [problem_key(p, salt=-1) for p in problems]
        greedy = self.sample(problems, prompts, keys, 1, 0.0)
        figures = {"step": step, "n": len(problems), "greedy": float(np.mean([s.reward for s in greedy])),
                   "truncated": float(np.mean([s.truncated for s in greedy]))}
        if self.config.eval_n:
            several = self.sample(problems, prompts, keys, self.config.eval_n, self.config.temperature)
            figures[f"avg@{self.config.eval_n}"] = float(np.mean([s.reward for s in several]))
        run.log_evaluation(figures)


def stop_ids(tokenizer) -> list[int]:
    """Both ends that Qwen models use: a sample that ends with <|endoftext|> would otherwise run to its limit."""
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None and i != tokenizer.unk_token_id})


def draw(problems: list[dict], position: int, seed: int) -> dict:
    """The problem at a position of the endless stream: epoch after epoch, each in an order of its own."""
    epoch, place = divmod(position, len(problems))
    return problems[np.random.default_rng([seed, epoch]).permutation(len(problems))[place]]


def sample_step(roller: Roller, problems: list[dict], cursor: int, config: Config) -> tuple[list, list, list[Sample], int]:
    """The rollouts of one step: (problems, prompts, samples, new cursor). Each draw's seed is its place in the stream,
    so the samples depend on nothing but (seed, place, weights). With zero_variance drop or refill, groups without
    spread are left out; refill draws more until --prompts groups have spread (at most 8 batches)."""
    chosen, prompts, samples = [], [], []
    for _ in range(8 if config.zero_variance == "refill" else 1):
        batch = [draw(problems, cursor + i, config.seed) for i in range(config.prompts)]
        keys = [problem_key(p, salt=cursor + i) for i, p in enumerate(batch)]
        rendered = roller.prompts(batch)
        fresh = roller.sample(batch, rendered, keys, config.group, config.temperature)
        cursor += len(batch)
        for i, (problem, prompt) in enumerate(zip(batch, rendered)):
            group = fresh[i * config.group:(i + 1) * config.group]
            if config.zero_variance != "keep" and len({s.reward for s in group}) == 1:
                continue
            for s in group:
                s.problem = len(chosen)
            chosen, prompts, samples = chosen + [problem], prompts + [prompt], samples + group
        if len(chosen) >= config.prompts:
            break
    n = min(len(chosen), config.prompts)
    return chosen[:n], prompts[:n], samples[:n * config.group], cursor


def replay_step(roller: Roller, problems: list[dict], step: int, config: Config) -> tuple[list, list, list[Sample], int]:
    """As `sample_step`, from the rollouts that another run saved for this step."""
    file = Path(config.replay) / "rollouts" / f"step_{step + 1}.jsonl"
    if not file.is_file():
        raise ValueError(f"--replay {config.replay}: {file} is missing; replay as many --steps as were sampled")
    samples, ids = read_samples(file)
    by_id = {p["id"]: p for p in problems}
    unknown = [i for i in ids if i not in by_id]
    if unknown:
        raise ValueError(f"{file}: problem {unknown[0]!r} is not in --data; replay needs the data that was sampled")
    chosen = [by_id[i] for i in ids]
    return chosen, roller.prompts(chosen), samples, 0


def set_advantages(samples: list[Sample], config: Config) -> torch.Tensor:
    """Give every sample its advantage, from its reward and the overlong penalty; returns rewards (P, G)."""
    shaped = [s.reward + soft_overlong_penalty(len(s.tokens), config.max_new_tokens, config.overlong_buffer)
              for s in samples]
    advantages = group_advantages(torch.tensor(shaped, dtype=torch.float64).view(-1, config.group), config.advantage)
    for s, a in zip(samples, advantages.flatten().tolist()):
        s.advantage = a
    return torch.tensor([s.reward for s in samples], dtype=torch.float64).view(-1, config.group)


# --------------------------------------------------------------------------------------------------------- training
def train_step(model: Model, reference: Model | None, optimizer, samples: list[Sample], prompts: list, lr: float,
               config: Config, world: World) -> tuple[dict, bool]:
    """All updates on one batch of rollouts. Returns (figures, every update stepped)."""
    groups = np.arange(len(samples)).reshape(-1, config.group)
    parts = [p.flatten().tolist() for p in np.array_split(groups, config.updates)]
    minibatches = [micro_batches(part, samples, prompts, config, model, world) for part in parts]
    begin = time.perf_counter()
    score_before_updates(model, reference, minibatches, config)
    scored = time.perf_counter()
    results = [update(model, optimizer, batches, samples, config, lr, world) for batches in minibatches]
    sums, n = {k: sum(r[0][k] for r in results) for k in (*Tally.NAMES, "grad_norm")}, len(results)
    tokens = max(1.0, sums["tokens"])
    figures = {"loss": sums["loss"] / n, "policy_loss": sums["policy_loss"] / n, "grad_norm": sums["grad_norm"] / n,
               **{k: sums[k] / tokens for k in ("entropy", "kl", "clip_low", "clip_high", "gap_k3")},
               "ratio_mean": sums["ratio"] / tokens, "gap_mean": sums["gap"] / tokens,
               "ratio_off_one_max": max(r[0]["ratio_off_one_max"] for r in results),
               "gap_max": max(r[0]["gap_max"] for r in results), "trained_tokens": int(sums["tokens"]),
               "logprob_s": round(scored - begin, 3), "update_s": round(time.perf_counter() - scored, 3)}
    return figures, all(stepped for _, stepped in results)


def rollout_figures(samples: list[Sample], rewards: torch.Tensor) -> dict:
    """What the samples of a step say by themselves."""
    lengths = np.array([len(s.tokens) for s in samples])
    share = lambda test: float(np.mean([test(s) for s in samples]))  # noqa: E731
    return {"reward_mean": rewards.mean().item(), "reward_std": rewards.std().item() if rewards.numel() > 1 else 0.0,
            "solved_all": (rewards.amin(1) > 0).double().mean().item(),
            "solved_any": (rewards.amax(1) > 0).double().mean().item(),
            "zero_variance": no_spread(rewards).double().mean().item(), "samples": len(samples),
            "length_mean": float(lengths.mean()), "length_max": int(lengths.max()),
            "truncated": share(lambda s: s.truncated), "forced": share(lambda s: s.finish_reason.startswith("forced")),
            "no_answer": share(lambda s: s.status == "no_answer"), "grader_timeouts": share(lambda s: s.status == "timeout"),
            "grader_errors": share(lambda s: s.status == "error")}


def set_up(config: Config, world: World, run: Run):
    """Problems that fit, tokenizer, models, optimizer: everything that can fail before the first sample."""
    model_dir = resolve_model_dir(config.model, world)
    tokenizer = load_tokenizer(model_dir)
    problems, faults = load_problems(config.data, skip_bad_rows=config.skip_bad_rows)
    evaluation = load_problems(config.eval_data, skip_bad_rows=config.skip_bad_rows)[0] if config.eval_data else []
    with_images = any(p.get("images") for p in problems + evaluation)
    images = ImageConfig.from_dir(model_dir) if with_images else None
    fitting = [p for p in problems
               if len(render_problem(p, tokenizer, images, style=config.prompt_style).tokens) <= config.max_prompt_tokens]
    run.say(f"{len(fitting)} problems ({len(faults)} bad rows skipped, {len(problems) - len(fitting)} prompts over "
            f"{config.max_prompt_tokens} tokens left out), {len(evaluation)} for evaluation")
    if not fitting:
        raise ValueError(f"no problem has a prompt of ≤ {config.max_prompt_tokens} tokens; raise --max_prompt_tokens")
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and world.device.type == "cuda")
    compute = torch.bfloat16 if bf16 else torch.float32
    options = dict(with_vision=with_images, compute_dtype=compute)
    model = build_model(model_dir, world, checkpointing=config.checkpointing, compile_blocks=config.compile, **options)
    reference = build_model(model_dir, world, master_dtype=compute, **options) if config.kl_coef else None
    for m in (model, reference):
        if m is not None:
            m.set_banned_ids(banned_ids(m, tokenizer))
    optimizer = optim.adamw(model, lr=config.lr, weight_decay=config.weight_decay,
                            state_dtype=torch.bfloat16 if config.adam_dtype == "bf16" else torch.float32)
    return model_dir, tokenizer, fitting, evaluation, images, model, reference, optimizer


def banned_ids(model: Model, tokenizer) -> list[int]:
    """Ids that a text policy must never sample, so they get probability 0 in sampler and trainer alike: vision
    placeholders (the next forward would look for an image) and the padded end of the vocabulary."""
    vision = [tokenizer.convert_tokens_to_ids(t) for t in
              ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")]
    return [i for i in vision if i is not None and i != tokenizer.unk_token_id] + \
        list(range(len(tokenizer), model.config.vocab_size))


def train(config: Config) -> int:
    """Run to the end, or to a signal. Returns the exit code."""
    world = init(config.device)
    with main_first(world):
        run = Run(config.out, config, is_main=world.is_main)
    model_dir, tokenizer, problems, evaluation, images, model, reference, optimizer = set_up(config, world, run)
    total = config.steps if config.steps >= 0 else -(-config.epochs * len(problems) // config.prompts)
    state_root, at = run.out / "checkpoints", {"step": 0, "cursor": 0, "bad_steps": 0, "bad_in_a_row": 0}
    if (newest := newest_state(state_root, world)) is not None:
        run.say(f"resuming from {newest}")
        at = load_state(newest, model, optimizer)
    run.start(header(world_size=world.size, data=hash_files(config.data + config.eval_data), model=str(model_dir),
                     attention=attention.backend(world.device, torch.bfloat16)), at["step"])
    run.progress(total, at["step"])
    stop = StopRequest()
    quiet_garbage_collection()
    with Grader(workers=config.graders, reward=config.reward) as grader:
        roller = Roller(config, model, tokenizer, images, grader, world)
        for step in range(at["step"], total):
            if evaluation and step % config.eval_every == 0:
                roller.evaluate(evaluation, run, step)
            begin = time.perf_counter()
            if config.offload_optimizer:
                optim.move_states(optimizer, "cpu")
            batch, prompts, samples, cursor = (replay_step(roller, problems, step, config) if config.replay else
                                               sample_step(roller, problems, at["cursor"], config))
            if config.offload_optimizer:
                optim.move_states(optimizer, world.device)
            sample_s = time.perf_counter() - begin
            lr = optim.lr_at(step, lr=config.lr, total_steps=total, steps_per_epoch=total, schedule=config.schedule,
                             warmup_steps=int(config.warmup_ratio * total))
            figures, stepped = {}, True
            if samples:
                figures = rollout_figures(samples, set_advantages(samples, config))
            if samples and not config.rollout_only:
                more, stepped = train_step(model, reference, optimizer, samples, prompts, lr, config, world)
                figures.update(more)
            at = {"step": step + 1, "cursor": cursor, "bad_steps": at["bad_steps"] + (not stepped),
                  "bad_in_a_row": 0 if stepped else at["bad_in_a_row"] + 1}
            if world.is_main:
                write_samples(run.out / "rollouts" / f"step_{step + 1}.jsonl", samples, batch,
                              [tokenizer.decode(p.tokens) for p in prompts])
            metrics = {"step": step + 1, "lr": lr, **figures,
                       **speed(samples, prompts, time.perf_counter() - begin, sample_s, grader),
                       "bad_steps": at["bad_steps"]}
            run.log(metrics)
            run.say(describe(metrics, total))
            run.advance()
            last, too_bad = step + 1 == total, at["bad_in_a_row"] >= config.max_bad_steps
            stop_asked = all_sum(float(stop.requested))[0] > 0
            if last or stop_asked or too_bad or (config.save_every and (step + 1) % config.save_every == 0):
                save_state(state_root, step + 1, model, optimizer, at, world, config.keep_last)
            if too_bad:
                raise ValueError(f"loss or gradient was not finite in {at['bad_in_a_row']} steps in a row (now step "
                                 f"{step + 1}); the weights are as before them. Lower --lr, or look at OUT/rollouts")
            if stop_asked and not last:
                return run.stopped(step + 1)
        if evaluation:
            roller.evaluate(evaluation, run, total)
    export_hf(model, model_dir, run.out / "final", world)
    return run.finished()


def speed(samples: list[Sample], prompts: list, seconds: float, sample_s: float, grader: Grader) -> dict:
    """Tokens and seconds of a step; tokens are sampled ones, over all ranks."""
    tokens = sum(len(s.tokens) for s in samples)
    memory, sample_s = all_max(memory_gib(), sample_s)
    return {"tokens": tokens, "tok_per_s": round(tokens / seconds, 1), "step_s": round(seconds, 3),
            "sample_s": round(sample_s, 3), "sample_tok_per_s": round(tokens / max(sample_s, 1e-9), 1),
            "prompt_tokens": sum(len(p.tokens) for p in prompts), "memory_gib": round(memory, 3)}


def describe(m: dict, total: int) -> str:
    """A step's figures on one line."""
    if "reward_mean" not in m:
        return f"step {m['step']}/{total} | no group had spread in its rewards: nothing to learn from"
    parts = [f"step {m['step']}/{total}", f"reward {m['reward_mean']:.3f}", f"no spread {m['zero_variance']:.0%}",
             f"length {m['length_mean']:.0f} (max {m['length_max']})", f"truncated {m['truncated']:.0%}"]
    if "loss" in m:
        parts += [f"loss {m['loss']:+.4f}", f"entropy {m['entropy']:.3f}", f"kl {m['kl']:.4f}",
                  f"norm {m['grad_norm']:.3f}", f"gap {m['gap_mean']:.1e}", f"lr {m['lr']:.1e}"]
    parts += [f"{m['tok_per_s']:.0f} tok/s", f"sample {m['sample_s']:.1f} s of {m['step_s']:.1f} s"]
    return " | ".join(parts + ([f"bad steps {m['bad_steps']}"] if m["bad_steps"] else []))


def main(argv: list[str] | None = None) -> None:
    code = None
    try:
        with user_errors():
            code = train(parse_config(Config, __doc__, argv))
    finally:
        shutdown(together=code is not None)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
