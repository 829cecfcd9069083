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

import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean as mean
from typing import Callable, ClassVar, Literal

import numpy as np
import torch
from tqdm import tqdm

import data
from core import attention, optim, plan, throughput
from core.chat import banned_token_ids, opens_thought, stop_token_ids
from core.files import hash_files
from core.images import ImageConfig, ImageLoader
from core.lora import lora_disabled
from core.options import DATA, MEMORY, OBJECTIVE, OPTIMIZER, RUN, SAMPLING, parse_config
from core.packing import next_problems
from core.parallel import World, all_max, all_sum, init
from core.run import Run, run_and_exit, script
from core.samples import Sample, problem_seed, rollout_metrics, sample_on_ranks
from core.slots import ForcedExit
from core.training import Training, TrainingOptions, trained_on
from data import Prompt, RolloutBatch
from model import Model, ModelConfig, build_model, meta_model, resolve_model_dir
from rewards import RULES, Grader, part_weights
from sampler import Sampler, SamplingParams
from scoring.metrics import accuracy, accuracy_by

MOST_BATCHES = 8  # sampled for one step at most under --zero_variance refill
MAX_REWARD_ERRORS = 0.5  # share of a step's rewards that may fail


@dataclass
class Config(TrainingOptions):
    CHANGEABLE: ClassVar[set[str]] = TrainingOptions.CHANGEABLE | {  # on resume
        *("slots", "kv_gb", "offload_optimizer", "graders", "reward_deadline"),
        *("eval_data", "eval_every"),
    }

    prompt_style: str = DATA("train", "train: the paper's; kind: its evaluation prompts; plain")
    max_prompt_tokens: int = DATA(2048, "longer prompts are left out and counted", ge=1)
    max_pixels: int = DATA(0, "scale images down to this area; 0: the model's own limit", ge=0)
    rule: Literal[RULES] = DATA("answer", "where the built-in reward looks for the answer")
    reward: str = DATA("", "module:name or file.py:name of your own function, see rewards.py")
    reward_weights: list[str] = DATA([], "PART=WEIGHT of its named parts; 1 for the others")

    advantage: Literal["grpo", "mean_only", "rloo"] = OBJECTIVE(
        "grpo", "grpo: (r - mean) / std (paper); mean_only: Dr. GRPO; rloo: leave-one-out mean"
    )
    loss: Literal["ppo_clip", "gspo", "cispo"] = OBJECTIVE(
        "ppo_clip", "gspo: with --aggregation seq_mean_token_mean and clips around 3e-4"
    )
    clip_low: float = OBJECTIVE(0.2, "clip the ratio below 1 - clip_low", ge=0, le=1)
    clip_high: float = OBJECTIVE(0.2, "clip above 1 + clip_high (paper: 0.2; DAPO: 0.28)", ge=0)
    aggregation: Literal["token_mean", "seq_mean_token_mean", "constant"] = OBJECTIVE(
        "token_mean", "normaliser, see the equation in train_grpo.py; constant: Dr. GRPO"
    )
    kl_coef: float = OBJECTIVE(0.01, "weight of the KL (paper: 0.01); 0: no reference model", ge=0)
    overlong_masking: bool = OBJECTIVE(False, "leave truncated samples out of the loss")
    overlong_buffer: int = OBJECTIVE(
        0, "reward falls to -1 over this many tokens before the limit (DAPO); 0: off", ge=0
    )
    zero_variance: Literal["keep", "drop", "refill"] = OBJECTIVE(
        "keep", "groups of equal rewards; refill: sample others (DAPO's dynamic sampling)"
    )

    prompts: int = SAMPLING(128, "problems a step (paper: batch 128)", ge=1)
    group: int = SAMPLING(8, "rollouts of each problem (paper: 8)", ge=2)
    max_new_tokens: int = SAMPLING(4096, "longest completion (paper: 4096)", ge=1, le=131_072)
    temperature: float = SAMPLING(1.0, "of sampling and of every log-probability", gt=0)
    think_budget: int = SAMPLING(0, "force </think> after this many tokens; 0: never", ge=0)
    graders: int = SAMPLING(2, "grading processes a rank", ge=1)
    reward_deadline: float = SAMPLING(5.0, "seconds until a reward is killed and counts 0", gt=0)

    epochs: int = OPTIMIZER(3, "passes over the problems (paper: 3)", ge=1)
    updates: int = OPTIMIZER(1, "optimizer steps per batch of rollouts; 1: on-policy", ge=1)
    lr: float = OPTIMIZER(0, "learning rate; 0: 3e-6 (paper), 3e-5 with LoRA", ge=0, le=1)
    schedule: Literal["constant", "linear", "cosine"] = OPTIMIZER("constant", "after warmup")
    warmup_ratio: float = OPTIMIZER(0.1, "share of steps with rising lr (paper: 0.1)", ge=0, le=1)
    weight_decay: float = OPTIMIZER(0.01, "of AdamW, on matrices (paper: 0.01)", ge=0)

    micro_tokens: int = MEMORY(16384, "tokens of a micro-batch, or its one longer sample's", ge=1)
    slots: int | None = MEMORY(None, "samples decoded at once on a rank, default by --kv_gb", ge=1)
    kv_gb: float | None = MEMORY(None, "GB of KV cache a rank, default: what is free", gt=0)
    offload_optimizer: bool = MEMORY(False, "optimizer states in host memory while sampling")

    save_every: int = RUN(10, "save resumable state every n steps; 0: only at the end", ge=0)
    eval_data: list[str] = RUN([], "problems to evaluate on; the best model goes to OUT/best")
    eval_every: int = RUN(20, "evaluate every n steps, and at both ends", ge=1)

    def __post_init__(self):
        super().__post_init__()
        self.lr = self.lr or (3e-5 if self.lora else 3e-6)
        self.part_weights = part_weights(self.reward_weights, self.reward)
        if self.prompts % self.updates:
            raise ValueError(f"--prompts {self.prompts}: no multiple of --updates {self.updates}")
        if self.loss == "gspo" and (self.clip_low, self.clip_high) == (0.2, 0.2):
            raise ValueError(
                "--loss gspo: a ratio of whole sequences never meets clips of 0.2; "
                "pass the paper's --clip_low 3e-4 --clip_high 4e-4"
            )
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError("--overlong_buffer: longer than --max_new_tokens")


# -------------------------------------------------------------------------------- the objective
#   J = E[ Σ_i Σ_t w_it ( min(r_it A_i, clip(r_it, 1-ε_low, 1+ε_high) A_i) - β KL_it ) ]
#
#   A_i   (R_i - mean of its group) / std of its group: how much better than its group sample i did
#   r_it  π(o_it | q, o_i<t) / π_old(o_it | q, o_i<t), the probability ratio of its token t
#   KL_it ρ - log ρ - 1 with ρ = π_ref / π at that token (the estimator k3)
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
    limits = (c.max_new_tokens, c.overlong_buffer)
    shaped = [s.reward + soft_overlong_penalty(len(s.tokens), *limits) for s in samples]
    rewards = torch.tensor(shaped, dtype=torch.float64).view(-1, c.group)
    if samples:
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
        log_ratio = sums[b.sequence] / n.float() + logprobs - logprobs.detach()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
    if c.loss == "cispo":  # 2506.13585: clips the weight, never the gradient
        loss = -clipped.detach() * A * logprobs
    else:
        loss = -torch.minimum(ratio * A, clipped * A)
    policy, kl = loss, torch.zeros_like(loss)
    if b.ref_logprobs is not None:
        d = b.ref_logprobs - logprobs
        kl = d.clamp(max=20).exp() - d - 1
        loss = loss + c.kl_coef * kl
    weight = {
        "token_mean": torch.full_like(n, 1 / tokens),
        "seq_mean_token_mean": 1 / (samples * n),
        "constant": torch.full_like(n, 1 / (samples * c.max_new_tokens)),
    }[c.aggregation].float()
    metrics = {
        "policy_loss": policy * weight,
        "entropy": entropy,
        "kl": kl,
        "clip_ratio/low_mean": ((ratio < 1 - c.clip_low) & (A < 0)).float(),
        "clip_ratio/high_mean": ((ratio > 1 + c.clip_high) & (A > 0)).float(),
        "ratio": ratio,
        "sampling/logp_difference_mean": (old - b.sampler_logprobs).abs(),
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
    t: Training, batches: list[RolloutBatch], samples: list[Sample], lr: float
) -> tuple[dict[str, float], bool]:
    """One optimizer step on `batches`, this rank's share of `samples`. Returns sums of metrics over
    the update's tokens on all ranks, and whether the step was taken (the loss was finite)."""
    c, world, tokens = t.options, t.run.world, sum(int(s.mask.sum()) for s in samples)
    sums, most = [], [torch.zeros(2, device=world.device)]
    for b in (b.to(world.device) for b in batches):
        logprobs, entropy = score(t.model, b, c, entropy=True)
        loss, m = grpo_loss(logprobs, entropy, b, tokens, len(samples), c)
        (loss * world.size).backward()  # FSDP averages over ranks
        sums.append(torch.stack([loss.detach(), *(v.sum() for v in m.values())]).double())
        if len(logprobs):
            off = m["sampling/logp_difference_mean"], (m["ratio"] - 1).abs()
            most.append(torch.stack([v.max() for v in off]))
    # read only now: between micro-batches the GPU would run dry
    metrics = dict(zip(["loss", *m], all_sum(*torch.stack(sums).sum(0).tolist())))
    most = all_max(*torch.stack(most).amax(0).tolist())
    how = dict(lr=lr, max_norm=c.grad_clip, loss=metrics["loss"])
    norm, stepped = optim.guarded_step(t.model, t.optimizer, **how)
    maxima = dict(zip(("sampling/logp_difference_max", "ratio_off_one_max"), most))
    return {**metrics, **maxima, "tokens": tokens, "grad_norm": norm}, stepped


def train_on(
    t: Training, reference: Model | None, samples: list[Sample], prompts: list[Prompt], lr: float
) -> tuple[dict[str, float], bool]:
    """All updates on a step's trained samples → (metrics, every update was taken)."""
    c, world, vision = t.options, t.run.world, t.model.config.vision
    begin, parts = time.perf_counter(), []
    images = (t.model.config.image_token_id, vision.spatial_merge_size if vision else 2)
    for groups in np.array_split(np.arange(len(samples)).reshape(-1, c.group), c.updates):
        chosen = [samples[i] for i in groups.flat]
        chosen = [s for s in chosen if s.mask.any() and not (c.overlong_masking and s.truncated)]
        if chosen:  # an update on nothing would still move the weights, by momentum
            batches = data.rollout_batches(chosen, prompts, c.micro_tokens, world, *images)
            parts.append((batches, chosen))
    if not parts:
        return {}, True
    with torch.no_grad():
        for b in (b for batches, _ in parts for b in batches):
            if len(parts) > 1:
                b.old_logprobs = score(t.model, b.to(world.device), c)[0]
            if reference is not None:
                with lora_disabled(reference):
                    b.ref_logprobs = score(reference, b.to(world.device), c)[0]
    scored = time.perf_counter()
    done = [update(t, *part, lr) for part in parts]
    tokens, metrics = sum(m.pop("tokens") for m, _ in done), {}
    for k in done[0][0]:
        values = [m[k] for m, _ in done]
        if k.endswith("_max"):
            metrics[k] = max(values)
        else:  # a mean over updates, or over tokens
            count = len(done) if k in ("loss", "policy_loss", "grad_norm") else tokens
            metrics[k] = sum(values) / count
    seconds = {"logprob_s": scored - begin, "update_s": time.perf_counter() - scored}
    metrics |= {"trained_tokens": tokens} | {k: round(v, 3) for k, v in seconds.items()}
    return metrics, all(stepped for _, stepped in done)


# --------------------------------------------------------------------------------- the rollouts
class Rollouts:
    """rollouts(problems, salts) → graded samples of the weights as they are now, in order of
    (problem, sample), and the prompts; the same on every rank. Collective.

    salts: one a problem; with its id and --seed it decides every token. Adds to self.seconds.
    """

    def __init__(self, c: Config, model, tokenizer, grader, images, max_len: int, world: World):
        """images: settings, None without any; max_len: of prompt and completion together."""
        self.c, self.tokenizer, self.grader, self.world = c, tokenizer, grader, world
        self.sampler = Sampler(model, max_len=max_len, slots=c.slots, kv_gb=c.kv_gb)
        self.images, self.loader, self.seconds = images, ImageLoader(images), Counter()
        exit, vocab = None, model.config.vocab_size
        if c.think_budget:
            exit = ForcedExit.from_tokenizer(tokenizer, vocab, c.think_budget)
        how = dict(max_new_tokens=c.max_new_tokens, seed=c.seed, forced_exit=exit)
        stop = stop_token_ids(tokenizer)
        self.params = SamplingParams(c.group, c.temperature, stop_ids=stop, **how)

    def __call__(
        self, problems: list[dict], salts: list[int], **changes
    ) -> tuple[list[Sample], list[Prompt]]:
        start = time.perf_counter()
        loaded = self.loader([p.get("images") or [] for p in problems])
        self.seconds["image_s"] += time.perf_counter() - start  # 0 where they were ready
        how = (self.tokenizer, self.images, self.c.prompt_style)
        prompts = [data.render_problem(p, *how, x) for p, x in zip(problems, loaded)]
        seeds = [problem_seed(p, salt) for p, salt in zip(problems, salts)]
        params, work = replace(self.params, **changes), (problems, prompts, seeds)
        tools = (self.sampler, self.grader, self.tokenizer)
        return sample_on_ranks(*tools, *work, params, self.world, self.seconds), prompts

    def pause(self, coming: list[dict]) -> None:
        """Free the sampler's GPU memory for training; images of the next step load meanwhile."""
        self.loader.announce([p.get("images") or [] for p in coming])
        if self.world.device.type == "cuda":
            self.sampler.release()


def sample_step(
    rollouts: Callable, problems: list[dict], cursor: int, c: Config
) -> tuple[list[Sample], list[Prompt], int]:
    """The rollouts of one step from `cursor` of the stream on → (samples, prompts, new cursor).

    drop: groups of equal rewards are not trained on. refill: batches are sampled until `prompts`
    groups differ in reward, at most MOST_BATCHES; the first of these groups are trained on.
    """
    samples, prompts, useful = [], [], 0
    for _ in range(MOST_BATCHES if c.zero_variance == "refill" else 1):
        positions = range(cursor, cursor + c.prompts)
        new, new_prompts = rollouts(next_problems(problems, positions, c.seed), positions)
        for i in range(0, len(new), c.group):
            group = new[i : i + c.group]
            differs = c.zero_variance == "keep" or len({s.reward for s in group}) > 1
            for s in group:
                s.problem = len(prompts) + i // c.group
                s.trained = differs and useful < c.prompts
            useful += differs
        samples, prompts, cursor = samples + new, prompts + new_prompts, positions.stop
        if useful >= c.prompts:
            break
    return samples, prompts, cursor


def check_rewards(samples: list[Sample], step: int, run: Run) -> None:
    """Say which rewards failed. Raises ValueError, with the samples on disk, where too many did."""
    if not (failed := [s for s in samples if s.status in ("timeout", "error")]):
        return
    s, said = failed[0], f"{len(failed)} of {len(samples)} rewards failed"
    run.say(f"{said}; the first, of problem {s.id}: {s.status}, {s.why}")
    if len(failed) > MAX_REWARD_ERRORS * len(samples):
        run.log_samples(step, samples)
        raise ValueError(
            f"step {step}: {said}, nothing was trained on them. Fix the reward (see "
            f"{run.out / 'rollouts'}) or raise --reward_deadline, and rerun the command"
        )


def evaluate(rollouts: Rollouts, problems: list[dict], step: int, training: Training) -> None:
    """Log greedy accuracy on --eval_data and keep the best model; nothing where that is done.
    Collective."""
    if any(row["step"] == step for row in training.run.logged("eval")):
        return
    samples, _ = rollouts(problems, [-1] * len(problems), n=1, temperature=0.0)
    rewards = [[s.reward] for s in samples]

    def fields(e) -> dict:
        return {"n": e.n, "greedy": e.mean, "low": e.low, "high": e.high}

    result = {"step": step, **fields(accuracy(problems, rewards))}
    result["truncated"] = mean(s.truncated for s in samples)
    tasks = accuracy_by("task", problems, rewards)
    result["tasks"] = {k: fields(e) for k, e in tasks.items()} if len(tasks) > 1 else {}
    training.keep_best(step, result["greedy"])
    training.run.log(result, "eval")
    training.run.say(throughput.describe_evaluation(result))


# --------------------------------------------------------------------------------------- the loop
def grpo(
    training: Training,
    reference: Model | None,
    rollouts: Rollouts,
    problems: list[dict],
    held_out: list[dict],
) -> int:
    """Sample → reward → advantage → update, to the last step or a signal. Returns the exit code.

    reference: of the KL term; problems: to train on; held_out: to evaluate on.
    """
    c, run, total = training.options, training.run, training.total
    seconds = rollouts.seconds
    moments = optim.Offload(training.optimizer, c.offload_optimizer)
    cursor = training.at.get("cursor", 0)  # position in the endless stream of problems
    for step in range(training.at["step"], total + 1):
        moments.to_host()
        if held_out and (step == total or step % c.eval_every == 0):
            evaluate(rollouts, held_out, step, training)
        if step == total:
            return training.finish()
        begun = time.perf_counter()
        seconds.clear()
        samples, prompts, cursor = sample_step(rollouts, problems, cursor, c)
        check_rewards(samples, step + 1, run)
        rollouts.pause(next_problems(problems, range(cursor, cursor + c.prompts), c.seed))
        moments.to_device()
        seconds["rollout_s"] = time.perf_counter() - begun

        trained = [s for s in samples if s.trained]
        set_advantages(trained, c)
        warmup = int(c.warmup_ratio * total)
        lr = optim.lr_at(step, lr=c.lr, total_steps=total, schedule=c.schedule, warmup_steps=warmup)
        figures, stepped = train_on(training, reference, trained, prompts, lr)

        run.log_samples(step + 1, samples)
        seconds["step_time"] = time.perf_counter() - begun
        metrics = {"step": step + 1, "epoch": round(cursor / len(problems), 4), "learning_rate": lr}
        metrics |= rollout_metrics(samples, c.group) | figures
        metrics |= throughput.grpo_speed(metrics["tokens"], prompts, seconds)
        text = throughput.describe_step(metrics, total)
        if training.step_done(metrics, text, stepped, cursor=cursor):
            return run.stopped(step + 1)


# ------------------------------------------------------------------------------------ preparation
def load_data(
    c: Config, model_dir: Path, tokenizer, run: Run
) -> tuple[list[dict], list[dict], int, ImageConfig | None]:
    """Problems whose prompts fit, problems for evaluation, longest prompt, image settings."""
    problems, faults = data.load_problems(c.data, skip_bad_rows=c.skip_bad_rows)
    held_out = c.eval_data and data.load_problems(c.eval_data, skip_bad_rows=c.skip_bad_rows)[0]
    images = None
    if any(p.get("images") for p in problems + held_out):
        images = ImageConfig.from_dir(model_dir)
        most = c.max_pixels or images.max_pixels
        low, high = min(most, images.min_pixels), min(most, images.max_pixels)
        images = replace(images, min_pixels=low, max_pixels=high)
    lengths, most = [], c.max_prompt_tokens
    bar = tqdm(problems + held_out, "prompt tokens", disable=None if run.world.is_main else True)
    for p in bar:
        lengths.append(len(data.prompt_tokens(p, tokenizer, images, c.prompt_style)))
    fitting = [p for p, n in zip(problems, lengths) if n <= most]
    if not fitting or max(lengths[len(problems) :], default=0) > most:
        what = "a problem of --eval_data has" if fitting else "all problems have"
        raise ValueError(f"{what} more than {most} tokens; raise --max_prompt_tokens")
    run.say(
        f"{len(fitting)} problems ({len({(f.file, f.line) for f in faults})} bad rows skipped, "
        f"{len(problems) - len(fitting)} prompts over {most} tokens left out), {len(held_out)} for "
        "evaluation"
    )
    said = trained_on(c.data, c.eval_data, "eval_data")
    if c.train_vision and not any(p.get("images") for p in fitting):
        said.append("--train_vision: no problem of --data has an image")
    if c.prompts > len(fitting):
        said.append(
            f"--prompts {c.prompts}: more than all {len(fitting)} problems; some come twice"
        )
    for warning in said:
        run.say(f"warning: {warning}")
    return fitting, held_out, max(n for n in lengths if n <= most), images


def build(
    c: Config, run: Run, model_dir: Path, tokenizer, with_images: bool, max_len: int
) -> tuple[Model, Model | None, torch.optim.Optimizer]:
    """Model, reference model (None without a KL term; with LoRA the model itself, whose adapters
    are then switched off), optimizer. --checkpointing auto: what recomputes least and fits."""
    cache = dict(kv_gb=c.kv_gb or 0.0, slots=c.slots or 0, max_len=max_len)
    cache |= dict(offload_optimizer=c.offload_optimizer)
    planned = partial(plan.plan_grpo, reference=bool(c.kl_coef and not c.lora), **cache)
    shape = meta_model(ModelConfig.from_dir(model_dir), with_images, c.lora)
    sizes = [max(c.micro_tokens, max_len)]
    setting, text = plan.choose_setting(shape, run.world, sizes, c, plan=planned)
    run.say(text)
    compute = plan.compute_dtype(c.dtype, run.world.device.type == "cuda")
    load = partial(build_model, model_dir, run.world, with_vision=with_images)
    load = partial(load, compute_dtype=compute)
    how = dict(checkpointing=setting.checkpointing, compile_blocks=c.compile, lora=c.lora)
    model, reference = load(train_vision=c.train_vision and with_images, **how), None
    if c.kl_coef:
        reference = model if c.lora else load(master_dtype=compute)
    for m in (model, reference):  # the same probabilities 0 in sampler, trainer and reference
        if m is not None:
            m.set_banned_ids(banned_token_ids(tokenizer, m.config.vocab_size))
    adam = dict(lr=c.lr, weight_decay=c.weight_decay, state_dtype=c.moments_dtype)
    return model, reference, optim.adamw(model, **adam)


def train(c: Config) -> int:
    """Prepare, then run to the end or to a signal. Returns the exit code."""
    world = init(c.device)
    run = Run(c.out, c, world)
    if run.complete:
        return run.finished()
    model_dir = resolve_model_dir(c.model, world)
    tokenizer = data.load_tokenizer(model_dir)
    how = dict(rule=c.rule, open_thought=opens_thought(tokenizer))
    how |= dict(reward=c.reward, weights=c.part_weights)
    grader = Grader(c.graders, c.reward_deadline, **how)  # first: a wrong --reward shows at once
    problems, held_out, longest, images = load_data(c, model_dir, tokenizer, run)
    if c.reward and world.is_main:
        run.say(grader.trial(problems[0]))
    max_len = ModelConfig.from_dir(model_dir).room_for(longest, c.max_new_tokens)
    model, reference, optimizer = build(c, run, model_dir, tokenizer, images is not None, max_len)
    rollouts = Rollouts(c, model, tokenizer, grader, images, max_len, world)
    training = Training(
        run,
        c,
        model,
        optimizer,
        source=model_dir,
        total=c.steps or -(-c.epochs * len(problems) // c.prompts),
        data=hash_files(c.data) if world.is_main else {},
        best=bool(held_out),
        eval_data=hash_files(c.eval_data) if world.is_main else {},
        attention=attention.backend(world.device, torch.bfloat16),
    )
    with grader:
        return grpo(training, reference, rollouts, problems, held_out)


def main(argv: list[str] | None = None) -> None:
    with script():
        code = train(parse_config(Config, __doc__, argv))
    raise SystemExit(code)


if __name__ == "__main__":
    run_and_exit(main)
