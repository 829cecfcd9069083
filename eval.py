"""Evaluate a model on flat jsonl problems, text and image, by the rule that rewards training.

torchrun --nproc_per_node=8 eval.py --model DIR --data mmmu.jsonl gsm8k.jsonl --out runs/eval/base
python eval.py … --samples 5 --temperature 0.3    avg@5, maj@5, pass@5: the paper's second protocol
python eval.py … --budgets 512,1024,2048          accuracy by thinking budget, from stored samples
python eval.py … --blind --samples 3 --temperature 0.3    no images; OUT/solved.txt: always solved
python eval.py --data … --out OUT --rescore       grade the stored samples again, without a model
python eval.py --data … --out OUT --rescore --compare OTHER [--drop BLIND/solved.txt]

OUT/samples.jsonl    one line a sample: prompt, text, answer, gold, reward, tokens (core/samples.py)
OUT/result.json      all metrics; the last line on stdout is its summary
OUT/config.json      the settings that the samples depend on
OUT/header.json      command, versions, commit, the whole prompt of each kind of problem
OUT/solved.txt       ids of the problems whose samples are all right
OUT/budget_N.jsonl   the samples that a forced exit after N tokens would have changed

Problems are checked and rendered before the model is loaded. Each rank samples its share and
appends each sample as it ends, so a stopped evaluation resumes. Then everything is graded and
scored. A sample depends on (seed, problem, sample index) and not on ranks or batches, up to the
rounding of matrix products of another size.

From the paper (arXiv 2505.03981, section 3 and appendix C): prompts, greedy and 5 samples at 0.3,
forced exit, removal of text-solvable questions; from its model card: 262,144 pixels per image.
Ours where both are silent: the extraction rule (rewards.py), ties in a vote, intervals.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from dataclasses import MISSING, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import grading
import rewards
from core.parallel import World, all_any, all_gather_objects, barrier, gathered, init, rank0_first
from core.run import hash_files, header, option, parse_config, run_and_exit, script
from core.samples import Sample, make_sample, problem_seed, read_samples, set_grade, write_samples
from core.vision import ImageConfig
from data import (
    INSTRUCTIONS,
    Prompt,
    image_token_count,
    load_images,
    load_problems,
    load_tokenizer,
    prompt_text,
    prompt_tokens,
)
from model import Model, ModelConfig, build_model, check_model_dir, resolve_model_dir
from sampler import (
    Completion,
    ForcedExit,
    Sampler,
    SamplingParams,
    banned_token_ids,
    exit_positions,
    stop_token_ids,
)
from scoring.metrics import all_metrics, budget_metrics, cluster, compare, is_looping
from scoring.tables import headline, report

PIXEL_BYTES = 4e9  # host memory for the preprocessed images of one call of the sampler
Rows = dict[tuple[str, int], Sample]  # (problem id, sample index) → sample


@dataclass
class Config:
    data: list[str] = option(MISSING, "jsonl file(s) of problems", group="data")
    out: str = option(MISSING, "directory of this evaluation; rerun to resume", group="run")
    model: str = option("", "model directory or hub id; --rescore needs none", group="data")
    limit: int = option(
        0, "at most this many problems per task, always the same, before --drop; 0: all",
        group="data", ge=0,
    )  # fmt: skip
    drop: str = option("", "file of problem ids to leave out, one per line", group="data")
    skip_bad_rows: bool = option(
        False, "evaluate without the rows that fail the check", group="data"
    )
    blind: bool = option(False, "remove all images (paper: table 6)", group="data")
    prompt_style: Literal[("kind", *INSTRUCTIONS)] = option(
        "kind", "kind: the paper's prompt for each kind of problem; or one for all", group="data"
    )
    min_pixels: int = option(
        262_144, "scale images up to this (model card: 262144); 0: the model's limit",
        group="data", ge=0,
    )  # fmt: skip
    max_pixels: int = option(
        262_144, "scale images down to this (model card: 262144); 0: the model's limit",
        group="data", ge=0,
    )  # fmt: skip
    samples: int = option(
        1, "samples per problem (paper: 1, and 5)", group="sampling", ge=1, le=1024
    )
    temperature: float = option(
        0.0, "0: greedy (paper: 0; 0.3 for 5 samples)", group="sampling", ge=0, le=10
    )
    top_p: float = option(1.0, "nucleus sampling (paper: not stated)", group="sampling", gt=0, le=1)
    max_new_tokens: int = option(
        4096, "longest completion, answer included (paper: 4096)", group="sampling", ge=1
    )
    think_budget: int = option(
        3800, "force </think> after this many tokens, which leaves room for the answer (paper: at "
        "4096); 0: never", group="sampling", ge=0,
    )  # fmt: skip
    answer_budget: int = option(
        256, "tokens for the answer after a forced exit (paper: not stated)", group="sampling", ge=1
    )
    seed: int = option(0, "decides every sampled token", group="sampling", ge=0)
    rule: Literal[rewards.RULES] = option(
        "answer", "where the answer is looked for: answer (<answer>, else \\boxed), boxed, or line "
        "(the last 'Answer: X')", group="objective",
    )  # fmt: skip
    rescore: bool = option(
        False, "grade the stored samples again; samples nothing", group="objective"
    )
    budgets: str = option(
        "", "thinking budgets such as 512,1024,2048: what a forced exit there would have given",
        group="objective",
    )  # fmt: skip
    compare: str = option(
        "", "another evaluation's directory: paired differences, this one minus the other",
        group="objective",
    )  # fmt: skip
    dtype: Literal["auto", "bf16", "fp32"] = option(
        "auto", "auto: bf16 on CUDA, fp32 on CPU", group="memory and speed"
    )
    slots: int = option(
        0,
        "samples decoded at once per rank; 0: by --kv_gb",
        group="memory and speed",
        ge=0,
        le=4096,
    )
    kv_gb: float = option(
        0.0, "KV cache in GB per rank; 0: a share of free memory", group="memory and speed", ge=0
    )
    graders: int = option(2, "grading processes per rank", group="memory and speed", ge=1, le=256)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to run", group="run")

    def __post_init__(self):
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"--samples {self.samples} at --temperature 0 gives {self.samples} equal ones; "
                f"pass --temperature 0.3"
            )
        if not self.model and not self.rescore:
            raise ValueError("--model is missing; only --rescore needs none")
        if 0 < self.max_pixels < self.min_pixels:
            raise ValueError(
                f"--min_pixels {self.min_pixels} is more than --max_pixels {self.max_pixels}"
            )
        if self.compare and not (Path(self.compare) / "result.json").is_file():
            raise ValueError(
                f"--compare {self.compare}: no result.json in it; name the --out of a finished "
                f"evaluation"
            )
        if not re.fullmatch(r"(0*[1-9]\d*(,0*[1-9]\d*)*)?", self.budgets):
            raise ValueError(
                f"--budgets {self.budgets}: must be token counts with commas, as in 512,1024,2048"
            )
        self.budget_list = sorted({int(b) for b in self.budgets.split(",") if b})


SAMPLES_DEPEND_ON = (
    "samples", "temperature", "top_p", "max_new_tokens", "think_budget", "answer_budget", "seed",
    "prompt_style", "min_pixels", "max_pixels", "blind",
)  # fmt: skip


# ---------------------------------------------------------------------------------------- problems
def choose_problems(config: Config) -> tuple[list[dict], dict]:
    """The problems to evaluate, in the order of the files, and how many rows were left out. Raises
    ValueError for bad rows, a --drop file without effect, and --blind without an image."""
    problems, faults = load_problems(config.data, skip_bad_rows=config.skip_bad_rows)
    left_out = {"bad_rows": len({(f.file, f.line) for f in faults}), "dropped": 0}
    if config.limit:  # before --drop, so that runs with and without it choose the same problems
        chosen = set()
        for task in dict.fromkeys(p["task"] for p in problems):
            ids = (p["id"] for p in problems if p["task"] == task)
            chosen.update(sorted(ids, key=lambda i: sha256(i.encode()).digest())[: config.limit])
        problems = [p for p in problems if p["id"] in chosen]
    if config.drop:
        if not Path(config.drop).is_file():
            raise ValueError(f"--drop {config.drop}: no such file")
        ids = set(Path(config.drop).read_text(encoding="utf-8").splitlines()) - {""}
        kept = [p for p in problems if p["id"] not in ids]
        left_out["dropped"] = len(problems) - len(kept)
        if ids and len(kept) == len(problems):
            raise ValueError(
                f"--drop {config.drop}: none of its {len(ids)} ids is among the {len(problems)} "
                f"problems; wrong file?"
            )
        if not kept:
            raise ValueError(f"--drop {config.drop}: no problem is left")
        problems = kept
    if config.blind and not any(p.get("images") for p in problems):
        raise ValueError("--blind: no problem of --data has an image to remove")
    return problems, left_out


def without_images(problem: dict) -> dict:
    """The problem without its images and their markers; its cluster stays that of the image."""

    def blank(text: str) -> str:
        return re.sub(r"<image>\n?", "", text)

    changes = {"question": blank(problem["question"]), "images": []}
    changes["meta"] = {**(problem.get("meta") or {}), "cluster": cluster(problem)}
    changes["options"] = problem.get("options") and [blank(o) for o in problem["options"]]
    return {**problem, **changes}


# --------------------------------------------------------------------------------------------- OUT
def model_fingerprint(model_dir: Path) -> str:
    """sha256 of the small files, and of the size and 64 blocks of 64 KiB of each weight file: other
    weights differ everywhere, and 15 GB take a second."""
    digest, block = sha256(), 1 << 16
    suffixes = (".json", ".jinja", ".txt", ".safetensors")
    for file in sorted(f for f in model_dir.iterdir() if f.suffix in suffixes):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as f:
            for start in sorted({int(x) for x in np.linspace(0, max(0, size - block), 64)}):
                f.seek(start)
                digest.update(f.read(block))
    return digest.hexdigest()


def opens_thought(model_dir: Path) -> bool:
    """Whether the chat template ends the prompt with <think>; then a completion begins in a thought."""
    chat = [{"role": "user", "content": "x"}]
    template = load_tokenizer(model_dir).apply_chat_template
    return template(chat, tokenize=False, add_generation_prompt=True).rstrip().endswith("<think>")


def check_out(config: Config, model_dir: Path | None, world: World) -> dict:
    """The settings of this evaluation: those of the command, or with --rescore those in OUT. Raises
    ValueError where OUT holds anything else. Writes nothing."""
    out, file = Path(config.out), Path(config.out) / "config.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: not a directory")
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ours = isinstance(old, dict) and {"model_sha256", "data_sha256"} <= old.keys()
    if not ours and out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"--out {out}: not empty and not an evaluation; name a new directory (nothing was changed)"
        )
    if config.rescore:
        if not ours:
            raise ValueError(f"--rescore: {out} holds no samples; run it with --model first")
        for k in SAMPLES_DEPEND_ON:
            if getattr(config, k) not in (getattr(Config, k), old[k]):
                raise ValueError(
                    f"--rescore grades what {out} holds: its {k} is {old[k]!r}, not "
                    f"{getattr(config, k)!r}"
                )
        return old
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and world.device.type == "cuda")
    new = {k: getattr(config, k) for k in SAMPLES_DEPEND_ON} | {
        "dtype": "bf16" if bf16 else "fp32",
        "model": config.model,
        "limit": config.limit,
        "model_sha256": model_fingerprint(model_dir),
        "data_sha256": [[Path(k).name, v] for k, v in hash_files(config.data).items()],
        "open_thought": opens_thought(model_dir),
    }
    if any(out.glob("samples.*")):
        for k in new.keys() - {"model", "limit"}:  # the model may move, its hash may not change
            if new[k] != old.get(k):
                raise ValueError(
                    f"--out {out} holds samples of another evaluation: its {k} is {old.get(k)!r}, "
                    f"now {new[k]!r}. Name another --out"
                )
    return new


def write_json(file: Path, value: dict) -> None:
    tmp = file.with_suffix(".tmp")
    tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    tmp.rename(file)


def load_rows(file: Path, truncated_end: bool = False) -> Rows:
    """The stored samples by (problem, sample index); {} without the file."""
    rows: Rows = {}
    for s in read_samples(file, truncated_end) if file.is_file() else []:
        s.tokens = np.array(s.tokens, np.int32)  # a fifth of a list's memory
        rows.setdefault((s.id, s.sample), s)
    return rows


def join_parts(out: Path, stage: str) -> None:
    """Join what the ranks of this or a stopped run appended with OUT/STAGE.jsonl."""
    parts = sorted(out.glob(f"{stage}.part*.jsonl"))
    if parts:
        rows = load_rows(out / f"{stage}.jsonl")
        for part in parts:
            rows = load_rows(part, truncated_end=True) | rows
        write_samples(out / f"{stage}.jsonl", rows.values())
    for part in parts:
        part.unlink()


def write_header(config: Config, settings: dict, engine: Engine, problems: list[dict]) -> None:
    """Print and store what is needed to repeat the samples, with the first prompt of each kind."""
    prompts = {}
    for p in problems:
        if p["kind"] not in prompts:
            text = engine.tokenizer.decode(engine.prompt(p))
            prompts[p["kind"]] = re.sub(r"(?:<\|image_pad\|>){2,}", "<|image_pad|>…", text)
    world, more = engine.world, {"model": str(engine.dir), "settings": settings, "prompts": prompts}
    more["exit_text"] = engine.tokenizer.decode(engine.exit.tokens)
    write_json(Path(config.out) / "header.json", header(world_size=world.size, **more))
    print(
        f"model {engine.dir}, {settings['dtype']} on {world.size} x {world.device.type}; "
        f"{len(problems)} problems; {', '.join(f'{k} {settings[k]}' for k in SAMPLES_DEPEND_ON)}",
        *(f"--- prompt of the first {kind} problem\n{text}\n---" for kind, text in prompts.items()),
        sep="\n", flush=True,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- sampling
@dataclass
class Job:
    """A prompt to continue, or a prompt and a thought that is ended by force."""

    problem: dict
    tokens: list[int]  # prompt and head
    seed: int
    sample: int = 0
    head: list[int] = field(default_factory=list)  # the thought so far and the exit tokens


class Engine:
    """Tokenizer and limits of a model directory; its weights once something has to be sampled."""

    def __init__(
        self, config: Config, settings: dict, model_dir: Path, problems: list[dict], world
    ):
        self.config, self.settings, self.dir, self.world = config, settings, model_dir, world
        self.tokenizer, self.model = load_tokenizer(model_dir), None
        self.model_config = ModelConfig.from_dir(model_dir)
        self.tokens, self.seconds = 0, 0.0  # sampled so far
        self.with_images = any(p.get("images") for p in problems)
        if self.with_images:
            if self.model_config.vision is None:
                raise ValueError(
                    f"{model_dir}: a text-only model, but problems have images; --blind removes them"
                )
            limits = {k: settings[k] for k in ("min_pixels", "max_pixels") if settings[k]}
            self.images = replace(ImageConfig.from_dir(model_dir), **limits)
        self.exit = ForcedExit.from_tokenizer(
            self.tokenizer, self.model_config.vocab_size, 0, settings["answer_budget"]
        )
        raw = self.model_config.raw
        context = (raw.get("text_config") or raw).get("max_position_embeddings", 1 << 17)
        if settings["max_new_tokens"] > context:
            raise ValueError(
                f"--max_new_tokens {settings['max_new_tokens']}: more than the model's context of "
                f"{context} tokens"
            )
        try:
            self.main_params = self.params(settings["samples"], settings["max_new_tokens"])
        except ValueError as e:
            raise ValueError(f"{e}; --think_budget 0 turns forced exit off") from e

    def params(self, n: int, max_new_tokens: int, exit: bool = True) -> SamplingParams:
        s, budget = self.settings, self.settings["think_budget"]
        forced = replace(self.exit, budget=budget) if exit and budget else None
        return SamplingParams(
            n=n, max_new_tokens=max_new_tokens, temperature=s["temperature"], top_p=s["top_p"],
            seed=s["seed"], stop_ids=stop_token_ids(self.tokenizer), forced_exit=forced,
        )  # fmt: skip

    def prompt(self, problem: dict) -> list[int]:
        counts = [image_token_count(f, self.images) for f in problem.get("images") or []]
        return prompt_tokens(problem, self.tokenizer, counts, self.settings["prompt_style"])

    def load(self) -> Model:
        if self.model is None:
            dtype = torch.bfloat16 if self.settings["dtype"] == "bf16" else torch.float32
            self.model = build_model(
                self.dir, self.world, with_vision=self.with_images,
                compute_dtype=dtype, master_dtype=dtype,
            )  # fmt: skip
            banned = banned_token_ids(self.tokenizer, self.model_config.vocab_size)
            self.model.set_banned_ids(banned)
        return self.model

    def run(self, stage: str, jobs: list[Job], params: SamplingParams) -> None:
        """Sample this rank's jobs and append each sample as it ends; then rank 0 joins the ranks'
        files. Collective."""
        out, world, begin = Path(self.config.out), self.world, time.perf_counter()
        model = self.load()
        sampler = Sampler(
            model,
            max_len=max((len(j.tokens) for j in jobs), default=1) + params.max_new_tokens,
            slots=self.config.slots or None,
            kv_gb=self.config.kv_gb or None,
            min_rows=16 if world.device.type == "cpu" else 1,  # results don't depend on the batch
        )
        part = out / f"{stage}.part{world.rank}.jsonl"
        with gathered(model), open(part, "a", encoding="utf-8", newline="\n") as file:
            for chunk in chunks(jobs, self.model_config.image_token_id):
                images = (
                    [load_images(j.problem.get("images") or [], self.images) for j in chunk]
                    if self.with_images
                    else [(None, None)] * len(chunk)
                )

                def store(completion: Completion, chunk: list[Job] = chunk) -> None:
                    file.write(self.sample(chunk[completion.prompt_index], completion).to_json())
                    file.flush()
                    self.tokens += int(completion.mask.sum())

                sampler.generate(
                    [Prompt(j.tokens, *i) for j, i in zip(chunk, images)], params,
                    sample_ids=[j.seed for j in chunk], on_finish=store, progress=world.is_main,
                )  # fmt: skip
            sampler.release()
        self.seconds += time.perf_counter() - begin
        barrier()  # every rank has written
        with rank0_first(world):
            if world.is_main:
                join_parts(out, stage)

    def sample(self, job: Job, completion: Completion) -> Sample:
        """A completion as it is stored, before it is graded."""
        prompt = prompt_text(job.problem, self.settings["prompt_style"])
        s = make_sample(job.problem, completion, self.tokenizer, prompt=prompt, seed=job.seed)
        s.logprobs = None
        if job.head:
            s.forced_tokens = len(self.exit.tokens)
            s.forced_at, s.sample = len(job.head) - s.forced_tokens, job.sample
            s.prompt_tokens -= len(job.head)
            s.tokens = [*job.head, *s.tokens]
            shown = s.tokens[:-1] if s.finish_reason == "stop" else s.tokens
            s.text, s.finish_reason = self.tokenizer.decode(shown), f"forced+{s.finish_reason}"
        return s


def chunks(jobs: list[Job], image_token_id: int | None) -> list[list[Job]]:
    """Jobs in order, split where their images would take more than PIXEL_BYTES."""
    parts, held = [], 0
    for job in jobs:
        tokens = job.tokens.count(image_token_id) if job.problem.get("images") else 0
        size = tokens * 4 * 1176 * 4  # 4 patches a token, 1176 fp32 values a patch
        if not parts or (size and held + size > PIXEL_BYTES):
            parts.append([])
            held = 0
        parts[-1].append(job)
        held += size
    return parts


def sample_missing(engine: Engine, rows: Rows, problems: list[dict]) -> None:
    """Sample the problems that lack a sample, each rank its share. Collective."""
    n, world = engine.settings["samples"], engine.world
    missing = [p for p in problems if any((p["id"], i) not in rows for i in range(n))]
    if missing:
        mine = missing[world.rank :: world.size]
        jobs = [Job(p, engine.prompt(p), problem_seed(p)) for p in mine]
        engine.run("samples", jobs, engine.main_params)


def sample_budget(engine: Engine, rows: Rows, problems: list[dict], budget: int) -> None:
    """Generate the answers that a forced exit at `budget` would have brought, where the stored
    thought is longer: the same tokens up to there, which don't depend on the budget. Collective."""
    out, world, stage = Path(engine.config.out), engine.world, f"budget_{budget}"
    with rank0_first(world):
        if world.is_main:
            join_parts(out, stage)
    have, mine = load_rows(out / f"{stage}.jsonl"), problems[world.rank :: world.size]
    pairs = [(p, rows[p["id"], i]) for p in mine for i in range(engine.settings["samples"])]
    pairs = [(p, s) for p, s in pairs if (s.id, s.sample) not in have]
    thoughts = [s.tokens[: s.forced_at] for _, s in pairs]
    limited = [s.finish_reason == "length" for _, s in pairs]
    jobs = []
    starts = exit_positions(thoughts, limited, replace(engine.exit, budget=budget)) if pairs else []
    for (p, s), at in zip(pairs, starts):
        if at is not None:
            head = [*s.tokens[:at].tolist(), *engine.exit.tokens]
            seed = problem_seed(p, salt=budget * 1_000_003 + s.sample + 1)
            jobs.append(Job(p, [*engine.prompt(p), *head], seed, s.sample, head))
    if all_any(bool(jobs)):
        engine.run(stage, jobs, engine.params(1, engine.settings["answer_budget"], exit=False))
    elif world.is_main and not (out / f"{stage}.jsonl").is_file():
        write_samples(out / f"{stage}.jsonl", [])


# ------------------------------------------------------------------------------------------ grading
def grading_rules(rule: str) -> dict:
    """The rule, and a hash of the code that decides what an answer is and which ones are equal."""
    digest = sha256()
    for file in [Path(rewards.__file__), *sorted(Path(grading.__file__).parent.glob("*.py"))]:
        digest.update(file.name.encode() + file.read_bytes())
    return {"rule": rule, "sha256": digest.hexdigest()}


def grade(
    samples: list[Sample], problems: dict[str, dict], grader, how: dict, world: World
) -> None:
    """Grade samples in place, each rank its share: reward, answer, status, why, the reward under
    lenient extraction, whether it loops. Collective."""
    mine = samples[world.rank :: world.size]
    futures = [grader.submit(problems[s.id], s.text, s.finish_reason) for s in mine]
    for s, future in zip(mine, futures):
        p = problems[s.id]
        set_grade(s, future.result())
        s.gold, s.task, s.looping, s.lenient = (
            p["answer"],
            p["task"],
            is_looping(s.tokens),
            s.reward,
        )
        if s.status in ("no_answer", "truncated"):
            s.lenient = rewards.reward(p, s.text, s.finish_reason, lenient=True, **how).score
    keys = ("reward", "answer", "status", "why", "gold", "task", "looping", "lenient")
    grades = all_gather_objects([[getattr(s, k) for k in keys] for s in mine])
    for rank, part in enumerate(grades):
        for s, values in zip(samples[rank :: world.size], part):
            for k, value in zip(keys, values):
                setattr(s, k, value)


def data_sources(files: list[str]) -> list[dict]:
    """Each file with its sha256, and the release it was converted from (FILE.info.json)."""
    sources = []
    for file, digest in hash_files(files).items():
        info = Path(f"{file}.info.json")
        told = json.loads(info.read_text(encoding="utf-8")) if info.is_file() else {}
        sources.append(
            {"file": Path(file).name, "sha256": digest, "download": told.get("download")}
        )
    return sources


# --------------------------------------------------------------------------------------------- main
def stored_samples(
    config: Config, settings: dict, problems: list[dict]
) -> tuple[Rows, dict[int, Rows]]:
    """All samples for --rescore, and those of each budget. Raises ValueError for missing ones."""
    out = Path(config.out)
    rows, result = load_rows(out / "samples.jsonl"), {}
    if (out / "result.json").is_file():
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    keys = [(p["id"], i) for p in problems for i in range(settings["samples"])]
    if missing := [i for i, n in keys if (i, n) not in rows]:
        limit = settings.get("limit", 0)
        hint = f"it was made with --limit {limit}: pass that, or sample the rest with --model"
        raise ValueError(
            f"--rescore: {len(set(missing))} of {len(problems)} problems have no stored samples, the "
            f"first is {missing[0]}; {hint if limit != config.limit else 'sample them with --model'}"
        )
    known = [int(b) for b in result.get("budgets", {})]
    if unknown := [b for b in config.budget_list if b not in known]:
        raise ValueError(f"--rescore --budgets {unknown[0]}: not sampled yet; run it with --model")
    budgets = config.budget_list or known
    return rows, {b: load_rows(out / f"budget_{b}.jsonl") for b in budgets}


def new_samples(
    config: Config, settings: dict, problems: list[dict], model_dir: Path, world: World
) -> tuple[Rows, dict[int, Rows]]:
    """All samples and those of each budget; the missing ones are sampled now. Collective."""
    out, longest = Path(config.out), settings["think_budget"] or settings["max_new_tokens"]
    if config.budget_list and config.budget_list[-1] > longest:
        raise ValueError(
            f"--budgets {config.budget_list[-1]}: the stored thoughts end at {longest} tokens; "
            f"a budget can't be longer"
        )
    check_model_dir(model_dir)
    engine = Engine(config, settings, model_dir, problems, world)
    with rank0_first(world):
        if world.is_main:
            out.mkdir(parents=True, exist_ok=True)
            join_parts(out, "samples")
    rows = load_rows(out / "samples.jsonl")
    check_questions(rows, problems, settings["prompt_style"], out)
    if world.is_main:
        write_json(out / "config.json", settings)
        write_header(config, settings, engine, problems)
    sample_missing(engine, rows, problems)
    rows = load_rows(out / "samples.jsonl")
    for budget in config.budget_list:
        sample_budget(engine, rows, problems, budget)
    counts = all_gather_objects((engine.tokens, engine.seconds))
    tokens, seconds = sum(t for t, _ in counts), max(s for _, s in counts)
    if world.is_main and tokens:
        print(
            f"sampled {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tok/s", flush=True
        )
    return rows, {b: load_rows(out / f"budget_{b}.jsonl") for b in config.budget_list}


def check_questions(rows: Rows, problems: list[dict], style: str, out: Path) -> None:
    """Raise ValueError when a stored sample answers another question than the file has now."""
    for p in problems:
        row = rows.get((p["id"], 0))
        if row is not None and row.prompt != prompt_text(p, style):
            raise ValueError(
                f"{out / 'samples.jsonl'}: the question or the options of {p['id']} have changed since it was "
                f"sampled; name another --out"
            )


def evaluate(config: Config) -> dict | None:
    """Sample what is missing, grade everything, write and print the result. Returns it on rank 0."""
    world, out = init(config.device, timeout_minutes=24 * 60), Path(config.out)
    problems, left_out = choose_problems(config)
    model_dir = None if config.rescore else resolve_model_dir(config.model, world)
    settings = None
    with rank0_first(world):
        if world.is_main:
            settings = check_out(config, model_dir, world)
    settings = all_gather_objects(settings)[0]
    problems = [without_images(p) for p in problems] if settings["blind"] else problems
    if config.rescore:
        rows, tails = stored_samples(config, settings, problems)
        check_questions(rows, problems, settings["prompt_style"], out)
    else:
        rows, tails = new_samples(config, settings, problems, model_dir, world)
    keys = [(p["id"], i) for p in problems for i in range(settings["samples"])]
    rows = {k: rows[k] for k in keys} | rows  # in the order of the files
    tails = {b: {k: tail[k] for k in keys if k in tail} for b, tail in tails.items()}
    by_id, how = {p["id"]: p for p in problems}, {"open_thought": settings["open_thought"]}
    how["rule"] = config.rule
    with rewards.Grader(workers=config.graders, **how) as grader:
        for part in ([rows[k] for k in keys], *(list(tail.values()) for tail in tails.values())):
            grade(part, by_id, grader, how, world)
    return (
        write_result(config, settings, problems, left_out, rows, tails) if world.is_main else None
    )


def write_result(
    config: Config, settings: dict, problems: list[dict], left_out: dict, rows: Rows, tails: dict
) -> dict:
    """Metrics of the graded samples into OUT and onto stdout."""
    out, rules = Path(config.out), grading_rules(config.rule)

    def groups(rows: Rows) -> list[list[Sample]]:
        return [[rows[p["id"], i] for i in range(settings["samples"])] for p in problems]

    samples = groups(rows)
    statuses = Counter(s.status for group in samples for s in group)
    result = {
        "settings": settings,
        "rules": rules,
        "data": data_sources(config.data),
        "limit": config.limit,
        **left_out,
        "statuses": dict(sorted(statuses.items())),
        **all_metrics(problems, samples, settings),
        "budgets": {
            str(b): budget_metrics(problems, groups(rows | tail), settings)
            for b, tail in tails.items()
        },
        "compare": None,
    }
    if config.compare:
        theirs = load_rows(Path(config.compare) / "samples.jsonl").values()
        result["compare"] = compare(problems, samples, Path(config.compare), theirs, rules)
    write_samples(out / "samples.jsonl", rows.values())
    for budget, tail in tails.items():
        file = out / f"budget_{budget}.jsonl"
        write_samples(
            file, (tail | {k: v for k, v in load_rows(file).items() if k not in tail}).values()
        )
    write_json(out / "result.json", result)
    solved = (p["id"] for p, group in zip(problems, samples) if all(s.reward == 1 for s in group))
    (out / "solved.txt").write_text("".join(f"{i}\n" for i in solved), encoding="utf-8")
    print(report(result))
    print(json.dumps(headline(result)), flush=True)
    return result


def main(argv: list[str] | None = None) -> None:
    try:
        with script():
            evaluate(parse_config(Config, __doc__, argv))
    except KeyboardInterrupt:
        print(
            "stopped; the samples so far are stored, rerun the command to resume", file=sys.stderr
        )
        raise SystemExit(130) from None


if __name__ == "__main__":
    run_and_exit(main)
