"""Stage two of X-Reasoner: GRPO on text-only problems with an exact 1/0 reward.

    torchrun --nproc_per_node=8 train_grpo.py --model runs/sft/final --data orz57k.jsonl --out OUT
    python train_grpo.py --model DIR --data problems.jsonl --out OUT --steps 20 --prompts 8

A step: `prompts` problems → `group` rollouts of each, graded while others still decode →
advantages within each group → clipped loss over all sampled tokens → AdamW → the next step samples
from the new weights. Defaults are the paper's (arXiv 2505.03981, section 2.3, appendix B.2); where
it is silent or contradicts itself, --help says what we took.

OUT/final           the trained model            OUT/metrics.jsonl   one line a step
OUT/best            best on --eval_data          OUT/eval.jsonl      evaluations during training
OUT/exports/step_N  see --export_every           OUT/rollouts        every sample, a file a step
"""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from dataclasses import MISSING, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean as mean
from typing import Any, Callable, ClassVar, Literal

import numpy as np
import torch

from core import attention, optim
from core.chat import banned_token_ids, opens_thought, stop_token_ids
from core.checkpoint import require_space, resume, save_state
from core.images import ImageLoader
from core.lora import LoRA, add_lora, lora_disabled, save_adapter
from core.options import option, parse_config
from core.packing import next_problems
from core.parallel import World, all_any, all_gather_objects, all_max, all_sum, init
from core.plan import choose_setting, compute_dtype, plan_grpo
from core.run import (
    Run,
    StopRequest,
    hash_files,
    header,
    quiet_garbage_collection,
    run_and_exit,
    script,
    trained_on,
)
from core.samples import Sample, problem_seed, rollout_metrics, sample_on_ranks
from core.slots import ForcedExit
from core.throughput import describe_grpo_step, grpo_speed
from core.trackers import KINDS, check_installed
from core.vision import ImageConfig
from core.weights import export_hf
from data import (
    Prompt,
    RolloutBatch,
    image_token_count,
    load_problems,
    load_tokenizer,
    prompt_tokens,
    render_problem,
    rollout_batches,
)
from model import Model, ModelConfig, build_model, resolve_model_dir
from rewards import RULES, Grader, part_weights
from sampler import Sampler, SamplingParams
from scoring.metrics import accuracy, accuracy_by
from scoring.stats import Interval

DATA, GOAL, SAMPLE, OPTIM, MEMORY, RUN = (
    partial(option, group=g)
    for g in ("data", "objective", "sampling", "optimizer", "memory and speed", "run")
)
MOST_BATCHES = 8  # sampled for one step at most under --zero_variance refill


@dataclass
class Config:
    CHANGEABLE: ClassVar[set[str]] = {  # on resume: what does not change the method
        *("epochs", "steps", "micro_tokens", "checkpointing", "compile", "slots", "kv_gb"),
        *("graders", "reward_deadline", "max_reward_errors", "offload_optimizer", "keep_sampler"),
        *("save_every", "keep_last", "export_every", "eval_data", "eval_every", "eval_n"),
        *("max_bad_steps", "resume", "report_to"),
    }

    model: str = DATA(MISSING, "model directory or hub id to start from, often SFT's OUT/final")
    data: list[str] = DATA(MISSING, "jsonl file(s) of problems, see `python -m tools.check`")
    out: str = DATA(MISSING, "run directory")
    eval_data: list[str] = DATA([], "problems to evaluate on; the best model goes to OUT/best")
    prompt_style: str = DATA("train", "train: the paper's; kind: its evaluation prompts; plain")
    max_prompt_tokens: int = DATA(2048, "longer prompts are left out and counted", ge=1)
    skip_bad_rows: bool = DATA(False, "train without the rows that fail the check")
    train_vision: bool = DATA(False, "train the vision tower too, where problems have images")
    max_pixels: int = DATA(0, "scale images down to this area; 0: the model's own limit", ge=0)
    rule: Literal[RULES] = DATA("answer", "where the built-in reward looks for the answer")
    reward: str = DATA("", "module:name or file.py:name of your own function, see rewards.py")
    reward_weights: list[str] = DATA([], "PART=WEIGHT of its named parts; 1 for the others")

    advantage: Literal["grpo", "mean_only", "rloo"] = GOAL(
        "grpo", "grpo: (r - mean) / std (paper); mean_only: Dr. GRPO; rloo: leave-one-out mean"
    )
    loss: Literal["ppo_clip", "gspo", "cispo"] = GOAL(
        "ppo_clip", "gspo: with --aggregation seq_mean_token_mean and clips around 3e-4"
    )
    clip_low: float = GOAL(0.2, "clip the ratio below 1 - clip_low", ge=0, le=1)
    clip_high: float = GOAL(0.2, "clip above 1 + clip_high (paper: 0.2; DAPO: 0.28)", ge=0)
    dual_clip: float = GOAL(3.0, "bound of the loss at A < 0, 0: none (verl: 3)", ge=0)
    aggregation: Literal["token_mean", "seq_mean_token_mean", "constant"] = GOAL(
        "token_mean", "normaliser, see the equation in train_grpo.py; constant: Dr. GRPO"
    )
    kl_coef: float = GOAL(0.01, "weight of the KL (paper: 0.01); 0: no reference model", ge=0)
    kl: Literal["k1", "k2", "k3"] = GOAL("k3", "KL estimator; k1 has no gradient on average")
    entropy_coef: float = GOAL(0.0, "weight of an entropy bonus", ge=0)
    tis_cap: float = GOAL(0.0, "importance weight of trainer/sampler, at most this; 0: off", ge=0)
    old_logprobs: Literal["trainer", "sampler"] = GOAL("trainer", "denominator of the ratio")
    lora_rank: int = GOAL(0, "train LoRA adapters of this rank; 0: all weights", ge=0)
    lora_alpha: float = GOAL(32.0, "adapters count alpha / rank times", gt=0)
    lora_targets: Literal["all-linear", "attention", "mlp"] = GOAL("all-linear", "where")
    adapter: str = GOAL("", "PEFT adapter to start from; the KL term is to --model without it")
    overlong_masking: bool = GOAL(False, "leave truncated samples out of the loss")
    overlong_buffer: int = GOAL(
        0, "reward falls to -1 over this many tokens before the limit (DAPO); 0: off", ge=0
    )
    zero_variance: Literal["keep", "drop", "refill"] = GOAL(
        "keep", "groups of equal rewards; refill: replace them (DAPO's dynamic sampling)"
    )

    prompts: int = SAMPLE(128, "problems a step (paper: batch 128)", ge=1)
    group: int = SAMPLE(8, "rollouts of each problem (paper: 8)", ge=2)
    max_new_tokens: int = SAMPLE(4096, "longest completion (paper: 4096)", ge=1, le=131_072)
    temperature: float = SAMPLE(1.0, "of sampling and of every log-probability", gt=0)
    think_budget: int = SAMPLE(0, "force </think> after this many tokens; 0: never", ge=0)
    graders: int = SAMPLE(2, "grading processes a rank", ge=1)
    reward_deadline: float = SAMPLE(5.0, "seconds until a reward is killed and counts 0", gt=0)
    max_reward_errors: float = SAMPLE(
        0.5, "stop when more than this share of a step's rewards fails; 1: never", ge=0, le=1
    )

    epochs: int = OPTIM(3, "passes over the problems (paper: 3)", ge=1)
    steps: int | None = OPTIM(None, "steps, instead of --epochs", ge=1)
    updates: int = OPTIM(1, "optimizer steps per batch of rollouts; 1: on-policy", ge=1)
    lr: float = OPTIM(0, "learning rate; 0: 3e-6 (paper), 3e-5 with LoRA", ge=0, le=1)
    schedule: Literal["constant", "linear", "cosine"] = OPTIM("constant", "after warmup")
    warmup_ratio: float = OPTIM(0.1, "share of steps with rising lr (paper: 0.1)", ge=0, le=1)
    weight_decay: float = OPTIM(0.01, "AdamW weight decay on matrices (paper: 0.01)", ge=0)
    grad_clip: float = OPTIM(1.0, "clip the global gradient norm (paper: 1)", ge=0)

    micro_tokens: int = MEMORY(16384, "tokens of a micro-batch, or its one longer sample's", ge=1)
    slots: int | None = MEMORY(None, "samples decoded at once on a rank, default by --kv_gb", ge=1)
    kv_gb: float | None = MEMORY(None, "GB of KV cache a rank, default 80% of what is free", gt=0)
    keep_sampler: bool = MEMORY(False, "keep KV memory and CUDA graphs while training")
    dtype: Literal["auto", "bf16", "fp32"] = MEMORY("auto", "auto: bf16 on CUDA, fp32 on CPU")
    adam_dtype: Literal["fp32", "bf16"] = MEMORY("fp32", "AdamW moments; bf16 saves 28 GiB at 7B")
    offload_optimizer: bool = MEMORY(False, "optimizer states in host memory while sampling")
    checkpointing: Literal["auto", "none", "matmul", "full"] = MEMORY(
        "auto", "what backward recomputes, as in SFT; auto: the least that fits the memory"
    )
    compile: bool = MEMORY(False, "torch.compile each decoder block")
    device: Literal["auto", "cpu", "cuda"] = MEMORY("auto", "where to run")

    seed: int = RUN(0, "order of problems; with (step, problem, sample) every sampled token", ge=0)
    resume: str = RUN("auto", "checkpoint to start from when OUT has none")
    save_every: int = RUN(10, "save resumable state every n steps; 0: only at the end", ge=0)
    keep_last: int = RUN(2, "checkpoints to keep", ge=1)
    export_every: int = RUN(0, "write a model directory every n steps; 0: never", ge=0)
    report_to: Literal[KINDS] = RUN("none", "also log to a tracker; pip install it first")
    max_bad_steps: int = RUN(5, "stop after this many non-finite steps in a row", ge=1)
    eval_every: int = RUN(20, "evaluate every n steps, and at both ends", ge=1)
    eval_n: int = RUN(0, "samples a problem for avg@n beside greedy; 0: greedy only", ge=0)

    def __post_init__(self):
        check_installed(self.report_to)
        self.lora = LoRA.from_flags(self)
        self.lr = self.lr or (3e-5 if self.lora else 3e-6)
        self.part_weights = part_weights(self.reward_weights, self.reward)
        if self.prompts % self.updates:
            raise ValueError(f"--prompts {self.prompts}: no multiple of --updates {self.updates}")
        if self.tis_cap and self.old_logprobs == "sampler":
            raise ValueError("--tis_cap with --old_logprobs sampler: the ratio already corrects")
        if self.eval_n and not self.eval_data:
            raise ValueError("--eval_n: needs --eval_data, the problems to evaluate on")
        if self.keep_sampler and not (self.kv_gb or self.slots):
            raise ValueError(
                "--keep_sampler: give --kv_gb or --slots too; a cache of 80% of the free memory "
                "would leave none to train"
            )
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError("--overlong_buffer: longer than --max_new_tokens")


# -------------------------------------------------------------------------------- the objective
#   J = E[ Σ_i Σ_t w_it ( min(r_it A_i, clip(r_it, 1-ε_low, 1+ε_high) A_i) - β KL_it ) ]
#
#   A_i   (R_i - mean of its group) / std of its group: how much better than its group sample i did
#   r_it  π(o_it | q, o_i<t) / π_old(o_it | q, o_i<t), the probability ratio of its token t
#   KL_it ρ - log ρ - 1 with ρ = π_ref / π at that token (k3)
#   w_it  the normaliser; n_i = |o_i|, S samples, sums over all ranks and micro-batches:
#         1 / Σ_j n_j (token_mean), 1 / (S n_i) (seq_mean_token_mean), 1 / (S max_new_tokens)
#         (constant). Losses [1,1,1,1] and [3]: token_mean 7/5, a mean of rank means would be 2.
def group_advantages(rewards: torch.Tensor, kind: str, eps: float = 1e-6) -> torch.Tensor:
    """rewards (P, G), a row a problem → advantages (P, G).

    grpo: (r - mean) / (std + eps), std unbiased (arXiv 2402.03300); mean_only: r - mean (Dr. GRPO,
    2503.20783); rloo: r - mean of the others (2402.14740). Groups of equal rewards get exactly 0.
    [1, 0, 0] → grpo [1.1547, -.5774, -.5774], mean_only [2/3, -1/3, -1/3], rloo [1, -1/2, -1/2]
    """
    size = rewards.shape[1]
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "grpo":
        centred = centred / (rewards.std(dim=1, keepdim=True) + eps)
    elif kind == "rloo":
        centred = centred * (size / (size - 1))
    # by their range: a std of rounding noise would be blown up
    return centred.masked_fill((rewards.amax(1) == rewards.amin(1))[:, None], 0.0)


def soft_overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """0 up to max_length - buffer, then linearly down to -1 at max_length (DAPO, 2503.14476).
    max 20, buffer 4: 16 → 0, 17 → -0.25, 20 → -1."""
    return -min(1.0, max(0, length - (max_length - buffer)) / buffer) if buffer else 0.0


def set_advantages(samples: list[Sample], c: Config) -> None:
    """From reward and overlong penalty; samples: whole groups, one after the other."""
    if not samples:
        return
    shaped = [
        s.reward + soft_overlong_penalty(len(s.tokens), c.max_new_tokens, c.overlong_buffer)
        for s in samples
    ]
    rewards = torch.tensor(shaped, dtype=torch.float64).view(-1, c.group)
    for s, a in zip(samples, group_advantages(rewards, c.advantage).flatten().tolist()):
        s.advantage = a


def grpo_loss(
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    b: RolloutBatch,
    tokens: int,
    samples: int,
    c: Config,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-J of a micro-batch: its part of the update's loss (parts add up), and its metrics by token.

    logprobs, entropy (R,): of its sampled tokens; tokens, samples: counts of the whole update.
    """
    A, n = b.advantages, b.counts[b.sequence].double()  # (R,): of the token's sample
    # without old_logprobs this is the policy that sampled: ratio 1, whose gradient is not 0
    old = logprobs.detach() if b.old_logprobs is None else b.old_logprobs
    log_ratio = (logprobs - old).clamp(-20, 20)
    if c.loss == "gspo":  # 2507.18071: exp(mean over the sample); gradient through each token
        sums = torch.zeros_like(log_ratio).index_add(0, b.sequence, log_ratio.detach())
        mean = sums[b.sequence] / n.float()
        log_ratio = mean + logprobs - logprobs.detach()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
    if c.loss == "cispo":  # 2506.13585: clips the weight, never the gradient
        loss = -clipped.detach() * A * logprobs
    else:
        loss = -torch.minimum(ratio * A, clipped * A)
    if c.loss == "ppo_clip" and c.dual_clip:  # 1912.09729
        loss = torch.where(A < 0, torch.minimum(loss, -c.dual_clip * A), loss)
    if c.tis_cap:  # corrects for sampling with slightly other numerics
        loss = loss * (old - b.sampler_logprobs).clamp(-20, 20).exp().clamp(max=c.tis_cap)
    policy, kl = loss, torch.zeros_like(loss)
    if b.ref_logprobs is not None:
        d = logprobs - b.ref_logprobs
        kl = {"k1": d, "k2": 0.5 * d**2, "k3": (-d).clamp(max=20).exp() + d - 1}[c.kl]
        loss = loss + c.kl_coef * kl
    if c.entropy_coef:
        loss = loss - c.entropy_coef * entropy
    weight = {
        "token_mean": torch.full_like(n, 1 / tokens),
        "seq_mean_token_mean": 1 / (samples * n),
        "constant": torch.full_like(n, 1 / (samples * c.max_new_tokens)),
    }[c.aggregation].float()
    difference = ((logprobs if c.old_logprobs == "sampler" else old) - b.sampler_logprobs).detach()
    metrics = {
        "policy_loss": policy * weight,
        "entropy": entropy,
        "kl": kl,
        "clip_ratio/low_mean": ((ratio < 1 - c.clip_low) & (A < 0)).float(),
        "clip_ratio/high_mean": ((ratio > 1 + c.clip_high) & (A > 0)).float(),
        "ratio": ratio,
        "sampling/logp_difference_mean": difference.abs(),
    }
    return (loss * weight).sum(), {k: v.detach() for k, v in metrics.items()}


# ----------------------------------------------------------------------------------- the update
def score(
    model: Model, b: RolloutBatch, c: Config, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities (R,) of a micro-batch's sampled tokens, and entropies (R,) or None."""
    inputs, rows = b.stream.inputs(), b.stream.supervised_rows
    logprobs, entropies = model(**inputs, entropy=entropy, temperature=c.temperature)
    return logprobs[rows], entropies[rows] if entropy else None


def update(
    model: Model,
    optimizer: torch.optim.Optimizer | None,
    batches: list[RolloutBatch],
    samples: list[Sample],
    lr: float,
    c: Config,
    world: World,
) -> tuple[dict[str, float], bool]:
    """One optimizer step on `batches`, this rank's share of `samples`. Returns sums of metrics over
    the update's tokens on all ranks, and whether the step was taken (the loss was finite)."""
    tokens = sum(int(s.mask.sum()) for s in samples)
    sums, most, means = [], [torch.zeros(2, device=world.device)], []
    for b in (b.to(world.device) for b in batches):
        logprobs, entropy = score(model, b, c, entropy=True)
        loss, m = grpo_loss(logprobs, entropy, b, tokens, len(samples), c)
        (loss * world.size).backward()  # FSDP averages over ranks
        sums.append(torch.stack([loss.detach(), *(v.sum() for v in m.values())]).double())
        if len(difference := m["sampling/logp_difference_mean"]):
            most.append(torch.stack([difference.max(), (m["ratio"] - 1).abs().max()]))
            total = difference.new_zeros(len(b.samples)).index_add(0, b.sequence, difference)
            means.append((b.samples, total / b.counts))
    # read only now: between micro-batches the GPU would run dry
    metrics = dict(zip(["loss", *m], all_sum(*torch.stack(sums).sum(0).tolist())))
    most = all_max(*torch.stack(most).amax(0).tolist())
    mine = {i: v for chosen, of in means for i, v in zip(chosen, of.tolist())}
    for part in all_gather_objects(mine):  # rank 0 writes every sample's to disk
        for i, value in part.items():
            samples[i].logp_difference = value
    norm, stepped = optim.guarded_step(
        model, optimizer, lr=lr, max_norm=c.grad_clip, loss=metrics["loss"]
    )
    maxima = dict(zip(("sampling/logp_difference_max", "ratio_off_one_max"), most))
    return {**metrics, **maxima, "tokens": tokens, "grad_norm": norm}, stepped


def train_on(
    model: Model,
    reference: Model | None,
    optimizer: torch.optim.Optimizer | None,
    samples: list[Sample],
    prompts: list,
    lr: float,
    c: Config,
    world: World,
) -> tuple[dict[str, float], bool]:
    """All updates on a step's trained samples → (metrics, every update was taken)."""
    begin, parts, vision = time.perf_counter(), [], model.config.vision
    images = (model.config.image_token_id, vision.spatial_merge_size if vision else 2)
    for groups in np.array_split(np.arange(len(samples)).reshape(-1, c.group), c.updates):
        chosen = [samples[i] for i in groups.flat]
        chosen = [s for s in chosen if s.mask.any() and not (c.overlong_masking and s.truncated)]
        if chosen:  # an update on nothing would still move the weights, by momentum
            parts.append((chosen, rollout_batches(chosen, prompts, c.micro_tokens, world, *images)))
    if not parts:
        return {}, True
    with torch.no_grad():
        for b in (b for _, batches in parts for b in batches):
            if c.old_logprobs == "sampler":
                b.old_logprobs = b.sampler_logprobs
            elif len(parts) > 1:
                b.old_logprobs = score(model, b.to(world.device), c)[0]
            if reference is not None:
                with lora_disabled(reference):
                    b.ref_logprobs = score(reference, b.to(world.device), c)[0]
    scored = time.perf_counter()
    done = [update(model, optimizer, batches, s, lr, c, world) for s, batches in parts]
    sums = [m for m, _ in done]
    tokens, metrics = sum(m["tokens"] for m in sums), {}
    for k in sums[0]:
        values = [m[k] for m in sums]
        if k.endswith("_max"):
            metrics[k] = max(values)
        elif k in ("loss", "policy_loss", "grad_norm"):
            metrics[k] = sum(values) / len(values)  # a mean over updates
        else:
            metrics[k] = sum(values) / tokens
    seconds = {"logprob_s": scored - begin, "update_s": time.perf_counter() - scored}
    metrics |= {"trained_tokens": tokens} | {k: round(v, 3) for k, v in seconds.items()}
    del metrics["tokens"]
    return metrics, all(stepped for _, stepped in done)


# --------------------------------------------------------------------------------- the rollouts


def render(
    problems: list[dict], tokenizer, images: Any, loader: ImageLoader, style: str, seconds: Counter
) -> list[Prompt]:
    """The problems' prompts with their images; adds the wait for these to seconds["image_s"]."""
    start = time.perf_counter()
    loaded = loader([p.get("images") or [] for p in problems])
    seconds["image_s"] += time.perf_counter() - start  # 0 where they were ready
    return [render_problem(p, tokenizer, images, style, x) for p, x in zip(problems, loaded)]


def sample_step(
    sample: Callable, problems: list[dict], cursor: int, c: Config
) -> tuple[list[Sample], list[Prompt], int]:
    """The rollouts of one step from `cursor` of the stream on → (samples, prompts, new cursor).
    sample: `train`'s, with the problems' positions in the stream.

    drop: groups of equal rewards are not trained on. refill: more problems are sampled until
    `prompts` groups differ in reward, at most MOST_BATCHES batches; groups beyond those needed are
    sampled again by the next step, so no problem is passed over.
    """
    samples, prompts, used, end = [], [], 0, cursor
    while used < c.prompts and len(prompts) < MOST_BATCHES * c.prompts:
        seen, n = len(prompts), c.prompts
        if seen:  # as many as the share of useful groups so far asks for
            n = min(n, math.ceil((c.prompts - used) * seen / max(used, 1)))
        positions = list(range(cursor + seen, cursor + seen + n))
        new, new_prompts = sample(next_problems(problems, positions, c.seed), positions)
        for i, position in enumerate(positions):
            group, wanted = new[i * c.group : (i + 1) * c.group], used < c.prompts
            useful = c.zero_variance == "keep" or len({s.reward for s in group}) > 1
            for s in group:
                s.problem, s.trained = seen + i, wanted and useful
            used += wanted and useful
            end = position + 1 if wanted else end
        samples, prompts = samples + new, prompts + new_prompts
        if c.zero_variance != "refill":
            break
    return samples, prompts, end


def evaluate(
    sample: Callable, problems: list[dict], step: int, c: Config, run: Run, export: Callable
) -> None:
    """Log greedy accuracy and avg@n, with the same random numbers at every step, and keep the best
    model; nothing where that is done. Collective."""
    if run.has("eval", step):
        return
    salts = [-1] * len(problems)
    greedy, _ = sample(problems, salts, n=1, temperature=0.0)
    rewards = [[s.reward] for s in greedy]
    tasks = accuracy_by("task", problems, rewards) if len({p["task"] for p in problems}) > 1 else {}
    result = {"step": step, **greedy_score(accuracy(problems, rewards))}
    result["truncated"] = mean(s.truncated for s in greedy)
    result["tasks"] = {task: greedy_score(interval) for task, interval in tasks.items()}
    if c.eval_n:
        several, _ = sample(problems, salts, n=c.eval_n)
        result[f"avg@{c.eval_n}"] = mean(s.reward for s in several)
    run.keep_best(step, result["greedy"], export)
    run.log_evaluation(result)


def greedy_score(e: Interval) -> dict:
    return {"n": e.n, "greedy": e.mean, "low": e.low, "high": e.high}


# --------------------------------------------------------------------------------------- the run
def warnings(c: Config, problems: int, images: bool, any_images: bool) -> list[str]:
    """Settings that will not do what they seem to. images: in the problems; any_images: there or
    in those for evaluation."""
    said = trained_on(c.data, c.eval_data, "eval_data")
    if c.train_vision and not images:
        said.append("--train_vision: no problem of --data has an image")
    if c.max_pixels and not any_images:
        said.append("--max_pixels: no problem has an image")
    if c.prompts > problems:
        said.append(f"--prompts {c.prompts}: more than the {problems} problems; some come twice")
    if c.loss == "gspo" and (c.clip_low, c.clip_high) == (0.2, 0.2):
        said.append("--loss gspo: its ratios are of whole sequences; clips of 0.2 never act")
    return said


def load_data(c: Config, model_dir: Path, tokenizer, run: Run) -> tuple[list, list, int, Any]:
    """Problems whose prompts fit, problems for evaluation, longest prompt, image settings."""
    problems, faults = load_problems(c.data, skip_bad_rows=c.skip_bad_rows)
    held_out = load_problems(c.eval_data, skip_bad_rows=c.skip_bad_rows)[0] if c.eval_data else []
    with_images = any(p.get("images") for p in problems + held_out)
    images = ImageConfig.from_dir(model_dir) if with_images else None
    if images and c.max_pixels:
        low, high = (min(c.max_pixels, n) for n in (images.min_pixels, images.max_pixels))
        images = replace(images, min_pixels=low, max_pixels=high)

    def length(p: dict) -> int:
        counts = [image_token_count(f, images) for f in p.get("images") or []]
        return len(prompt_tokens(p, tokenizer, counts, c.prompt_style))

    lengths, eval_lengths = [length(p) for p in problems], [length(p) for p in held_out]
    fitting = [p for p, n in zip(problems, lengths) if n <= c.max_prompt_tokens]
    run.say(
        f"{len(fitting)} problems ({len({(f.file, f.line) for f in faults})} bad rows skipped, "
        f"{len(problems) - len(fitting)} prompts over {c.max_prompt_tokens} tokens left out), "
        f"{len(held_out)} for evaluation"
    )
    if not fitting or max(eval_lengths, default=0) > c.max_prompt_tokens:
        what = "a problem of --eval_data has" if fitting else "all problems have"
        raise ValueError(
            f"{what} more than {c.max_prompt_tokens} tokens; raise --max_prompt_tokens"
        )
    for warning in warnings(c, len(fitting), any(p.get("images") for p in problems), with_images):
        run.say(f"warning: {warning}")
    longest = max(n for n in lengths + eval_lengths if n <= c.max_prompt_tokens)
    return fitting, held_out, longest, images


def choose_checkpointing(
    c: Config, run: Run, model_dir: Path, with_images: bool, max_len: int, world: World
) -> str:
    """--checkpointing auto: the mode that recomputes least and fits; says what it needs."""
    with torch.device("meta"):
        model = Model(ModelConfig.from_dir(model_dir), with_images)
        if c.lora:
            add_lora(model, c.lora)
    kept = dict(offload_optimizer=c.offload_optimizer, keep_sampler=c.keep_sampler)
    cache = dict(kv_gb=c.kv_gb or 0.0, slots=c.slots or 0, max_len=max_len)
    plan = partial(plan_grpo, reference=bool(c.kl_coef and not c.lora), **cache, **kept)
    setting, text = choose_setting(
        model,
        world,
        [max(c.micro_tokens, max_len)],
        checkpointing=c.checkpointing,
        dtype=c.dtype,
        adam_dtype=c.adam_dtype,
        reshard=True,
        replicas=1,
        train_vision=c.train_vision and with_images,
        plan=plan,
    )
    run.say(text)
    return setting.checkpointing


def build(
    c: Config, run: Run, model_dir: Path, tokenizer, with_images: bool, max_len: int, world: World
) -> tuple[Model, Model | None, torch.optim.Optimizer]:
    """Model, reference model (None without a KL term; with LoRA the model itself, whose adapters
    are then switched off), optimizer."""
    mode = choose_checkpointing(c, run, model_dir, with_images, max_len, world)
    compute = compute_dtype(c.dtype, world.device.type == "cuda")
    load = partial(build_model, model_dir, world, with_vision=with_images, compute_dtype=compute)
    train_vision, more = c.train_vision and with_images, dict(compile_blocks=c.compile, lora=c.lora)
    model = load(train_vision=train_vision, checkpointing=mode, **more)
    reference = None
    if c.kl_coef:
        reference = model if c.lora else load(master_dtype=compute)
    for m in (model, reference):  # the same probabilities 0 in sampler, trainer and reference
        if m is not None:
            m.set_banned_ids(banned_token_ids(tokenizer, m.config.vocab_size))
    moments = torch.bfloat16 if c.adam_dtype == "bf16" else torch.float32
    optimizer = optim.adamw(model, lr=c.lr, weight_decay=c.weight_decay, state_dtype=moments)
    return model, reference, optimizer


def begin(c: Config, run: Run, model_dir: Path, model, optimizer, total: int, world) -> tuple:
    """Resume from this run's newest checkpoint, else from --resume; check the disk; write the
    header. Returns where the run stands, and the data's hashes."""
    hashes, root = hash_files(c.data) if world.is_main else {}, run.out / "checkpoints"
    at = resume(root, c.resume, model, optimizer, world, hashes)
    at = at or {"step": 0, "cursor": 0, "bad_steps": 0, "bad_in_a_row": 0}
    exports = 1 + bool(c.eval_data)
    if c.export_every:
        exports += total // c.export_every - at["step"] // c.export_every
    exports *= sum(f.stat().st_size for f in model_dir.glob("*.safetensors"))
    copies = c.keep_last + 1 if c.save_every else 1
    disk = require_space(root, model, optimizer, world, copies=copies, export_bytes=exports)
    if world.is_main:  # of steps that will be done again
        for file in (run.out / "rollouts").glob("step_*.jsonl"):
            if int(file.stem[5:]) > at["step"]:
                file.unlink()
    facts = {"data": hashes | hash_files(c.eval_data), "model": str(model_dir)}
    facts["attention"] = attention.backend(world.device, torch.bfloat16)
    run.progress(total, at["step"], disk)
    run.start(header(world_size=world.size, **facts), at["step"])
    return at, hashes


def train(c: Config) -> int:
    """Run to the end, or to a signal. Returns the exit code."""
    world = init(c.device)
    run, root = Run(c.out, c, world), Path(c.out) / "checkpoints"
    if run.complete:
        return run.finished()
    model_dir = resolve_model_dir(c.model, world)
    tokenizer = load_tokenizer(model_dir)
    grader = make_grader(c, tokenizer)  # first: a --reward that can't be loaded shows in a second
    problems, held_out, longest, images = load_data(c, model_dir, tokenizer, run)
    max_len, seen = longest + c.max_new_tokens, images is not None
    model, reference, optimizer = build(c, run, model_dir, tokenizer, seen, max_len, world)
    total = c.steps or -(-c.epochs * len(problems) // c.prompts)
    export = partial(export_hf, model, model_dir, world=world)
    sampler = Sampler(model, max_len=max_len, slots=c.slots, kv_gb=c.kv_gb)
    params = sampling_params(c, tokenizer, model.config.vocab_size)
    at, hashes = begin(c, run, model_dir, model, optimizer, total, world)
    stop, loader = StopRequest(), ImageLoader(images)
    moments = optim.Offload(optimizer, c.offload_optimizer)
    seconds = Counter()  # of the current step, by what they went into
    quiet_garbage_collection()

    def sample(problems: list[dict], salts: list[int], **changes):
        """Graded samples of the weights as they are now, and prompts; the same on every rank."""
        prompts = render(problems, tokenizer, images, loader, c.prompt_style, seconds)
        seeds = [problem_seed(p, salt) for p, salt in zip(problems, salts)]
        engine, how = (sampler, grader, tokenizer), replace(params, **changes)
        return sample_on_ranks(*engine, problems, prompts, how, seeds, world, seconds), prompts

    with grader:
        for step in range(at["step"], total + 1):
            moments.to_host()
            if held_out and (step == total or step % c.eval_every == 0):
                evaluate(sample, held_out, step, c, run, export)
            if step == total:
                break
            begun = time.perf_counter()
            seconds.clear()
            samples, prompts, cursor = sample_step(sample, problems, at["cursor"], c)
            coming = next_problems(problems, range(cursor, cursor + c.prompts), c.seed)
            loader.announce([p.get("images") or [] for p in coming])
            if not c.keep_sampler and world.device.type == "cuda":
                sampler.release()
            moments.to_device()
            seconds["rollout_s"] = time.perf_counter() - begun

            trained = [s for s in samples if s.trained]
            set_advantages(trained, c)
            fault = failed_rewards(samples, c, run)
            lr = learning_rate(step, total, c)
            metrics = {"step": step + 1, "epoch": round(cursor / len(problems), 4)}
            metrics |= {"learning_rate": lr} | rollout_metrics(samples, c.group)
            if not fault:
                new, stepped = train_on(model, reference, optimizer, trained, prompts, lr, c, world)
            run.log_samples(step + 1, samples)
            if fault:
                raise ValueError(f"step {step + 1}: {fault}")

            bad = 0 if stepped else at["bad_in_a_row"] + 1
            at |= {"step": step + 1, "cursor": cursor, "bad_in_a_row": bad}
            at["bad_steps"] += not stepped
            seconds["step_time"] = time.perf_counter() - begun
            metrics |= new | grpo_speed(metrics["tokens"], prompts, seconds)
            run.log(metrics | {"bad_steps": at["bad_steps"]})
            run.step_done(metrics, describe_grpo_step(metrics, total, at["bad_steps"]))
            last, stopping = step + 1 == total, all_any(stop.requested)
            due = c.save_every and (step + 1) % c.save_every == 0
            if last or stopping or due or bad >= c.max_bad_steps:
                save_state(root, step + 1, model, optimizer, at, world, c.keep_last, hashes)
            if c.export_every and (step + 1) % c.export_every == 0:
                export(run.out / "exports" / f"step_{step + 1}")
            if bad >= c.max_bad_steps:
                raise ValueError(f"step {step + 1}: {bad} steps in a row not finite; lower --lr")
            gc.collect(0)  # what this step left behind; automatic collection is off
            if stopping and not last:
                return run.stopped(step + 1)
    export(run.out / "final")
    if c.lora:
        save_adapter(model, run.out / "adapter", base_model=model_dir, is_main=world.is_main)
    return run.finished()


def make_grader(c: Config, tokenizer) -> Grader:
    how = dict(rule=c.rule, open_thought=opens_thought(tokenizer))
    how |= dict(reward=c.reward, weights=c.part_weights)
    return Grader(c.graders, c.reward_deadline, **how)


def sampling_params(c: Config, tokenizer, vocab_size: int) -> SamplingParams:
    exit = None
    if c.think_budget:
        exit = ForcedExit.from_tokenizer(tokenizer, vocab_size, c.think_budget)
    stop = stop_token_ids(tokenizer)
    return SamplingParams(
        c.group, c.temperature, 1.0, 0, c.max_new_tokens, stop, c.seed, forced_exit=exit
    )


def learning_rate(step: int, total: int, c: Config) -> float:
    plan = dict(total_steps=total, steps_per_epoch=total, warmup_steps=int(c.warmup_ratio * total))
    return optim.lr_at(step, lr=c.lr, schedule=c.schedule, **plan)


def failed_rewards(samples: list[Sample], c: Config, run: Run) -> str:
    """Say which rewards failed; returns why the run must stop where too many did, else ""."""
    failed = [s for s in samples if s.status in ("timeout", "error")]
    if not failed:
        return ""
    first = f"{failed[0].id}: {failed[0].status}, {failed[0].why}"
    said = f"{len(failed)} of {len(samples)} rewards failed; the first, of problem {first}"
    run.say(said)
    if len(failed) / len(samples) <= c.max_reward_errors:
        return ""
    return (
        f"{said}. Nothing was trained on them, as this is more than --max_reward_errors "
        f"{c.max_reward_errors}. Fix the reward (see {run.out / 'rollouts'}) and rerun the command"
    )


def main(argv: list[str] | None = None) -> None:
    with script():
        code = train(parse_config(Config, __doc__, argv))
    raise SystemExit(code)


if __name__ == "__main__":
    run_and_exit(main)
