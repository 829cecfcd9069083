"""Stage two of X-Reasoner: GRPO on text-only problems with an exact 1/0 reward.

    torchrun --nproc_per_node=8 train_grpo.py --model runs/sft/final --data orz57k.jsonl --out OUT
    python train_grpo.py --model DIR --data problems.jsonl --out OUT --steps 20 --prompts 8

A step: `prompts` problems → `group` rollouts of each, graded while others still decode →
advantages within each group → clipped loss over all sampled tokens → AdamW; the next step samples
from the new weights. The defaults are the paper's (arXiv 2505.03981, 2.3 and B.2), see --help.

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
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
from core import optim, plan, throughput
from core.chat import banned_token_ids, opens_thought, stop_token_ids
from core.files import hash_files
from core.images import ImageConfig, ImageLoader
from core.lora import lora_disabled
from core.options import DATA, MEMORY, OBJECTIVE, OPTIMIZER, RUN, SAMPLING, parse_config
from core.packing import next_problems
from core.parallel import all_max, all_sum, init
from core.run import Run, run_and_exit, script
from core.samples import Rollouts, Sample, check_rewards, rollout_metrics
from core.slots import ForcedExit
from core.training import Training, TrainingOptions, data_warnings
from data import Prompt, RolloutBatch
from model import Model, ModelConfig, build_model, meta_model, resolve_model_dir
from rewards import RULES, Grader, part_weights
from sampler import Sampler, SamplingParams
from scoring.metrics import accuracy, accuracy_by

MOST_BATCHES = 8  # sampled for one step at most under --zero_variance refill


@dataclass
class Config(TrainingOptions):
    CHANGEABLE: ClassVar[set[str]] = TrainingOptions.CHANGEABLE | {  # on resume
        *"slots kv_gb offload_optimizer graders reward_deadline eval_data eval_every".split()
    }

    prompt_style: Literal["kind", *data.INSTRUCTIONS] = DATA("train", "train: the paper's")
    max_prompt_tokens: int = DATA(2048, "longer prompts are left out and counted", ge=1)
    max_pixels: int = DATA(0, "scale images down to this area; 0: the model's own limit", ge=0)
    rule: Literal[RULES] = DATA("answer", "where the built-in reward looks for the answer")
    reward: str = DATA("", "module:name or file.py:name of your own function: docs/rewards.md")
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
    overlong_buffer: int = OBJECTIVE(0, "reward falls by 1 over the last n tokens (DAPO)", ge=0)
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
            fix = "pass its paper's --clip_low 3e-4 --clip_high 4e-4"
            raise ValueError(f"--loss gspo: a whole sample's ratio never meets clips of 0.2; {fix}")
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
def group_advantages(rewards: Tensor, kind: str, eps: float = 1e-6) -> Tensor:
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
    logprobs: Tensor, entropy: Tensor, b: RolloutBatch, tokens: int, samples: int, c: Config
) -> tuple[Tensor, dict[str, Tensor]]:
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
def score(model: Model, b: RolloutBatch, c: Config, entropy=False) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (R,) of a micro-batch's sampled tokens, and entropies (R,) or None."""
    inputs, rows = b.stream.inputs(), b.stream.supervised_rows
    logprobs, entropies = model(**inputs, entropy=entropy, temperature=c.temperature)
    return logprobs[rows], entropies[rows] if entropy else None


def train_on(
    t: Training, reference: Model | None, samples: list[Sample], prompts: list[Prompt], lr: float
) -> tuple[dict[str, float], bool]:
    """--updates optimizer steps on a step's trained samples → (metrics, every one was taken)."""
    c, world, vision = t.options, t.run.world, t.model.config.vision
    images = (t.model.config.image_token_id, vision.spatial_merge_size if vision else 2)
    begin, updates = time.perf_counter(), []  # (this rank's micro-batches, samples of all ranks)
    for groups in np.array_split(np.arange(len(samples)).reshape(-1, c.group), c.updates):
        chosen = [samples[i] for i in groups.flat]
        chosen = [s for s in chosen if s.mask.any() and not (c.overlong_masking and s.truncated)]
        if chosen:  # an update on nothing would still move the weights, by momentum
            batches = data.rollout_batches(chosen, prompts, c.micro_tokens, world, *images)
            updates.append((batches, chosen))
    if not updates:
        return {}, True
    with torch.no_grad():  # log π_old and log π_ref of the objective
        for b in (b for batches, _ in updates for b in batches):
            if len(updates) > 1:
                b.old_logprobs = score(t.model, b.to(world.device), c)[0]
            if reference is not None:
                with lora_disabled(reference):
                    b.ref_logprobs = score(reference, b.to(world.device), c)[0]

    scored, totals, maxima, all_taken = time.perf_counter(), Counter(), [], True
    for batches, chosen in updates:
        tokens, sums = sum(int(s.mask.sum()) for s in chosen), []
        for b in (b.to(world.device) for b in batches):
            logprobs, entropy = score(t.model, b, c, entropy=True)
            loss, m = grpo_loss(logprobs, entropy, b, tokens, len(chosen), c)
            (loss * world.size).backward()  # FSDP averages over ranks
            sums.append(torch.stack([loss.detach(), *(v.sum() for v in m.values())]).double())
            off = m["sampling/logp_difference_mean"], (m["ratio"] - 1).abs()  # (R,), R can be 0
            maxima.append(torch.stack([torch.cat([v, v.new_zeros(1)]).max() for v in off]))
        # read only now: between micro-batches the GPU would run dry
        metrics = dict(zip(["loss", *m], all_sum(*torch.stack(sums).sum(0).tolist())))
        how = dict(lr=lr, max_norm=c.grad_clip, loss=metrics["loss"])
        norm, taken = optim.guarded_step(t.model, t.optimizer, **how)
        totals.update(metrics, grad_norm=norm, trained_tokens=tokens)  # a Counter adds
        all_taken &= taken

    tokens, per_update = totals.pop("trained_tokens"), ("loss", "policy_loss", "grad_norm")
    means = {k: v / (len(updates) if k in per_update else tokens) for k, v in totals.items()}
    names = ("sampling/logp_difference_max", "ratio_off_one_max", "logprob_s", "update_s")
    seconds = (round(s, 3) for s in (scored - begin, time.perf_counter() - scored))
    largest = dict(zip(names, all_max(*torch.stack(maxima).amax(0).tolist(), *seconds)))
    return means | largest | {"trained_tokens": tokens}, all_taken


# --------------------------------------------------------------------------------- the rollouts
def sample_step(
    rollouts: Rollouts, problems: list[dict], cursor: int, c: Config
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
                s.problem += len(prompts)
                s.trained = differs and useful < c.prompts
            useful += differs
        samples, prompts, cursor = samples + new, prompts + new_prompts, positions.stop
        if useful >= c.prompts:
            break
    return samples, prompts, cursor


def evaluate(rollouts: Rollouts, problems: list[dict], step: int, training: Training) -> None:
    """Log greedy accuracy on --eval_data and keep the best model, once a step. Collective."""
    if any(row["step"] == step for row in training.run.logged("eval")):
        return
    samples, _ = rollouts(problems, [-1] * len(problems), n=1, temperature=0.0)
    rewards = [[s.reward] for s in samples]
    tasks = accuracy_by("task", problems, rewards)
    found = [accuracy(problems, rewards), *(tasks.values() if len(tasks) > 1 else ())]
    whole, *parts = ({"n": e.n, "greedy": e.mean, "low": e.low, "high": e.high} for e in found)
    truncated = sum(s.truncated for s in samples) / len(samples)
    result = {"step": step, **whole, "truncated": truncated, "tasks": dict(zip(tasks, parts))}
    training.log_evaluation(result)


# --------------------------------------------------------------------------------------- the loop
def grpo(
    training: Training, reference: Model | None, rollouts: Rollouts, problems: list, held_out: list
) -> int:
    """Sample → reward → advantage → update, to the last step or a signal. Returns the exit code.
    reference: of the KL term; problems: to train on; held_out: to evaluate on."""
    c, run, total, seconds = training.options, training.run, training.total, rollouts.seconds
    moments = optim.Offload(training.optimizer, c.offload_optimizer)
    cursor = training.at.get("cursor", 0)  # position in the endless stream of problems
    for step in range(training.at["step"], total + 1):
        moments.to_host()
        if held_out and (step == total or step % c.eval_every == 0):
            evaluate(rollouts, held_out, step, training)
        if step == total:
            return training.finish()
        begin = time.perf_counter()
        seconds.clear()
        samples, prompts, cursor = sample_step(rollouts, problems, cursor, c)
        rollouts.pause(next_problems(problems, range(cursor, cursor + c.prompts), c.seed))
        moments.to_device()
        seconds["rollout_s"] = time.perf_counter() - begin

        trained = [s for s in samples if s.trained]
        set_advantages(trained, c)
        run.log_samples(step + 1, samples)
        check_rewards(samples, step + 1, run)
        warmup = int(c.warmup_ratio * total)
        lr = optim.lr_at(step, lr=c.lr, total_steps=total, schedule=c.schedule, warmup_steps=warmup)
        updated, stepped = train_on(training, reference, trained, prompts, lr)

        seconds["step_time"] = time.perf_counter() - begin
        metrics = {"step": step + 1, "epoch": round(cursor / len(problems), 4), "learning_rate": lr}
        metrics |= rollout_metrics(samples, c.group) | updated
        metrics |= throughput.grpo_speed(samples, prompts, seconds)
        if training.step_done(metrics, stepped, cursor=cursor):
            return run.stopped(step + 1)


# ------------------------------------------------------------------------------------ preparation
def load_data(
    c: Config, model_dir: Path, tokenizer, run: Run
) -> tuple[list[dict], list[dict], int, ImageConfig | None]:
    """Problems whose prompts fit, problems for evaluation, longest prompt, image settings."""
    problems, faults = data.load_problems(c.data, skip_bad_rows=c.skip_bad_rows)
    held_out = c.eval_data and data.load_problems(c.eval_data, skip_bad_rows=c.skip_bad_rows)[0]
    images, most = None, c.max_prompt_tokens
    if any(p.get("images") for p in problems + held_out):
        images = ImageConfig.from_dir(model_dir)
        cap = c.max_pixels or images.max_pixels
        low, high = min(cap, images.min_pixels), min(cap, images.max_pixels)
        images = replace(images, min_pixels=low, max_pixels=high)
    bar = tqdm(problems + held_out, "prompt tokens", disable=None if run.world.is_main else True)
    lengths = [len(data.prompt_tokens(p, tokenizer, images, c.prompt_style)) for p in bar]
    fitting = [p for p, n in zip(problems, lengths) if n <= most]
    if not fitting or max(lengths[len(problems) :], default=0) > most:
        what = "a problem of --eval_data has" if fitting else "all problems have"
        raise ValueError(f"{what} more than {most} tokens; raise --max_prompt_tokens")
    bad, long = len({(f.file, f.line) for f in faults}), len(problems) - len(fitting)
    said = f"{len(fitting)} problems, {c.prompts} a step, {len(held_out)} for evaluation "
    said += f"({bad} bad rows skipped, {long} prompts over {most} tokens left out)"
    warnings = data_warnings(c, "eval_data", any(p.get("images") for p in fitting))
    run.say("\n".join([said, *warnings]))
    return fitting, held_out, max(n for n in lengths if n <= most), images


def build(
    c: Config, run: Run, model_dir: Path, tokenizer, with_images: bool, max_len: int
) -> tuple[Model, Model | None]:
    """Model, and reference model: None without a KL term; with LoRA the model itself, whose
    adapters are then switched off. --checkpointing auto: what recomputes least and fits."""
    sampling = dict(kv_gb=c.kv_gb or 0.0, slots=c.slots or 0, max_len=max_len)
    sampling |= dict(offload_optimizer=c.offload_optimizer)
    planned = partial(plan.plan_grpo, reference=bool(c.kl_coef and not c.lora), **sampling)
    shape = meta_model(ModelConfig.from_dir(model_dir), with_images, c.lora)
    sizes = [max(c.micro_tokens, max_len)]
    setting, text = plan.choose_setting(shape, run.world, sizes, c, plan=planned)
    run.say(text)
    compute = plan.compute_dtype(c.dtype, run.world.device.type == "cuda")

    def load(**how) -> Model:
        how |= dict(with_vision=with_images, compute_dtype=compute)
        model = build_model(model_dir, run.world, **how)
        # the same probabilities 0 in sampler, trainer and reference
        model.set_banned_ids(banned_token_ids(tokenizer, model.config.vocab_size))
        return model

    how = dict(checkpointing=setting.checkpointing, compile_blocks=c.compile, lora=c.lora)
    model, reference = load(train_vision=c.train_vision and with_images, **how), None
    if c.kl_coef:
        reference = model if c.lora else load(master_dtype=compute)
    return model, reference


def train(c: Config) -> int:
    """Prepare, then run to the end or to a signal. Returns the exit code."""
    world = init(c.device)
    run = Run(c.out, c, world)
    if run.complete:
        return run.finished()
    model_dir = resolve_model_dir(c.model, world)
    tokenizer = data.load_tokenizer(model_dir)
    how = dict(rule=c.rule, open_thought=opens_thought(tokenizer), reward=c.reward)
    grader = Grader(c.graders, c.reward_deadline, weights=c.part_weights, **how)  # first: may fail
    problems, held_out, longest, images = load_data(c, model_dir, tokenizer, run)
    if c.reward and world.is_main:
        run.say(grader.trial(problems[0]))
    max_len = ModelConfig.from_dir(model_dir).room_for(longest, c.max_new_tokens)
    model, reference = build(c, run, model_dir, tokenizer, images is not None, max_len)

    sampler = Sampler(model, max_len=max_len, slots=c.slots, kv_gb=c.kv_gb)
    limits = tokenizer, model.config.vocab_size, c.think_budget
    exit = ForcedExit.from_tokenizer(*limits) if c.think_budget else None
    how = dict(stop_ids=stop_token_ids(tokenizer), seed=c.seed, forced_exit=exit)
    params = SamplingParams(c.group, c.temperature, max_new_tokens=c.max_new_tokens, **how)
    render = partial(data.render_problem, tokenizer=tokenizer, images=images, style=c.prompt_style)
    rollouts = Rollouts(sampler, params, tokenizer, grader, ImageLoader(images), render, world)

    total = c.steps or -(-c.epochs * len(problems) // c.prompts)
    facts = dict(data=hash_files(c.data), eval_data=hash_files(c.eval_data), best=bool(held_out))
    training = Training(run, c, model, source=model_dir, total=total, **facts)
    with grader:
        return grpo(training, reference, rollouts, problems, held_out)


def main(argv: list[str] | None = None) -> None:
    with script():
        code = train(parse_config(Config, __doc__, argv))
    raise SystemExit(code)


if __name__ == "__main__":
    run_and_exit(main)
