"""Every benchmark of the paper from flat jsonl, text and image, scored by the rule that training uses, with error bars.

    torchrun --nproc_per_node=8 eval.py --model DIR --data mmmu.jsonl gsm8k.jsonl --out runs/eval/base
    python eval.py … --samples 5 --temperature 0.3      avg@5, maj@5, pass@5 (the paper's second protocol)
    python eval.py … --budgets 512,1024,2048            accuracy by thinking budget, from the samples that are stored
    python eval.py … --blind --samples 3 --temperature 0.3     without images; OUT/solved.txt: solved every time
    python eval.py --data … --out OUT --rescore         grade the stored samples again, without a model
    python eval.py --data … --out OUT --rescore --compare OTHER [--drop BLIND/solved.txt]

OUT/samples.jsonl   one row a sample: prompt, output, extracted answer, gold, score, tokens, finish, seed
OUT/result.json     every figure; the last line on stdout is its summary
OUT/config.json     what the samples depend on         OUT/header.json     command, versions, commit, whole prompts
OUT/solved.txt      ids of which all samples are right OUT/budget_N.jsonl  answers after a forced exit at N

In order: problems are checked and rendered before a model is loaded → each rank samples its share, and rows are
appended as they end, so that a run that was cut goes on → all are graded → sets, slices, curve and comparison. A sample
depends on (seed, problem, sample) and not on ranks or batches, up to rounding in matrix products of another size.

From the paper (arXiv 2505.03981, section 3 and appendix C): prompts, greedy and 5 samples at 0.3, forced exit, removal
of text-solvable questions. From its model card: 262,144 pixels an image. Ours, where it is silent: the extraction rule
(`rewards.py`: strict, cut text is never an answer, nothing is guessed), plurality with ties by their mean, intervals.
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

from core.parallel import (
    World,
    all_gather_objects,
    barrier,
    gathered,
    init,
    process_group_cleanup,
    rank0_first,
    run_and_exit,
)
from core.run import exit_on_value_error, hash_files, header, option, parse_config
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
from rewards import Grader
from rollouts import banned_token_ids, problem_key, stop_token_ids
from sampler import Rollout, Sampler, SamplingParams
from sampling import think_exit
from scoring.scores import (
    Rows,
    as_line,
    budget_figures,
    by_problem,
    cluster,
    compare,
    figures_of,
    finite,
    grade,
    hashlib_of_files,
    headline,
    read_rows,
    report,
    rules_sha256,
    write_rows,
)

PIXEL_BYTES = 4e9  # images of one call of the sampler, preprocessed and held in host memory


@dataclass
class Config:
    data: list[str] = option(MISSING, "jsonl file(s) of problems, see `python -m tools.check`")
    out: str = option(MISSING, "directory of this evaluation; a run that was cut goes on in it")
    model: str = option("", "model directory or hub id; not needed with --rescore")
    # what the samples depend on
    n: int = field(
        default=1,
        metadata={
            "aliases": ["--samples"],
            "help": "samples a problem (paper: 1, and 5); write "
            "--samples under torchrun, which takes --n for an option of its own on Python 3.11 and older",
        },
    )
    temperature: float = option(0.0, "0: greedy (paper: 0, and 0.3 for 5 samples)")
    top_p: float = option(1.0, "nucleus sampling (paper: not stated)")
    max_new_tokens: int = option(
        4096, "longest completion, forced tokens and answer included (paper: 4096)"
    )
    think_budget: int = option(
        0,
        "append </think> after so many tokens, 0: never (paper: at its limit of 4096, which "
        "here must also hold the answer: 3800 leaves room)",
    )
    answer_budget: int = option(
        256, "tokens for the answer after a forced exit (paper: not stated)"
    )
    seed: int = option(0, "with problem and sample it decides every sampled token")
    prompt_style: str = option(
        "kind",
        f"kind: the paper's prompt for each kind of problem; or one for all: "
        f"{', '.join(INSTRUCTIONS)}",
    )
    min_pixels: int = option(
        262_144, "scale images up to this (model card: 262144); 0: the model directory's limit"
    )
    max_pixels: int = option(
        262_144, "scale images down to this (model card: 262144); 0: the directory's limit"
    )
    blind: bool = option(
        False, "remove all images: what can be solved from the text alone (paper: table 6)"
    )
    dtype: Literal["auto", "bf16", "fp32"] = option("auto", "auto: bf16 on CUDA, fp32 on CPU")
    # which problems, and what to do with the samples
    limit: int = option(
        0, "at most so many problems of each task, always the same ones, before --drop; 0: all"
    )
    drop: str = option(
        "", "file of ids, one a line, to leave out, such as OUT/solved.txt of a blind run"
    )
    skip_bad_rows: bool = option(False, "evaluate without the rows that fail the check")
    rescore: bool = option(
        False, "grade the stored samples again; nothing is sampled, no model is needed"
    )
    budgets: str = option(
        "",
        "thinking budgets such as 512,1024,2048: what forced exit there would have given; only "
        "the answers are generated",
    )
    compare: str = option(
        "", "another evaluation's directory: paired differences, this minus the other"
    )
    # machinery
    slots: int = option(0, "samples decoded at once on a rank, 0: by --kv_gb")
    kv_gb: float = option(0.0, "memory for the KV cache in GB a rank, 0: a share of what is free")
    graders: int = option(2, "grading processes a rank")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")

    def __post_init__(self):
        for name in ("n", "max_new_tokens", "answer_budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"--samples {self.n} at --temperature 0 gives {self.n} equal ones; pass --temperature 0.3"
            )
        if self.prompt_style not in ("kind", *INSTRUCTIONS):
            raise ValueError(
                f"--prompt_style {self.prompt_style}: one of kind, {', '.join(INSTRUCTIONS)}"
            )
        if not self.model and not self.rescore:
            raise ValueError("--model is missing; only --rescore needs none")
        if self.compare and not (Path(self.compare) / "result.json").is_file():
            raise ValueError(
                f"--compare {self.compare}: holds no result.json; name a finished evaluation's directory"
            )
        self.budget_list = parse_budgets(self.budgets)


SAMPLES_DEPEND_ON = (
    "n",
    "temperature",
    "top_p",
    "max_new_tokens",
    "think_budget",
    "answer_budget",
    "seed",
    "prompt_style",
    "min_pixels",
    "max_pixels",
    "blind",
)


def parse_budgets(text: str) -> list[int]:
    """ "512,1024" → [512, 1024]; raises ValueError for anything but positive whole numbers."""
    try:
        budgets = sorted({int(b) for b in text.split(",")}) if text else []
    except ValueError:
        budgets = [0]
    if budgets and budgets[0] < 1:
        raise ValueError(
            f"--budgets {text}: give tokens as whole numbers with commas, as in 512,1024,2048"
        )
    return budgets


# ------------------------------------------------------------------------------------------------------- problems
def choose_problems(config: Config) -> tuple[list[dict], dict]:
    """The problems of this evaluation in the order of the files, and what was left out. Raises ValueError with file,
    line and field for bad rows, a list of ids that names none, or --blind without an image."""
    problems, faults = load_problems(config.data, skip_bad_rows=config.skip_bad_rows)
    left_out = {"bad_rows": len({(f.file, f.line) for f in faults}), "dropped": 0}
    if config.limit:  # before --drop: a limited run and one that drops its solved questions speak of the same ones
        chosen = set()
        for task in dict.fromkeys(p["task"] for p in problems):
            ids = sorted(
                (p["id"] for p in problems if p["task"] == task),
                key=lambda i: sha256(i.encode()).digest(),
            )
            chosen.update(ids[: config.limit])
        problems = [p for p in problems if p["id"] in chosen]
    if config.drop:
        if not Path(config.drop).is_file():
            raise ValueError(f"--drop {config.drop}: no such file")
        ids = {i for i in Path(config.drop).read_text(encoding="utf-8").splitlines() if i}
        kept = [p for p in problems if p["id"] not in ids]
        left_out["dropped"] = len(problems) - len(kept)
        if ids and len(kept) == len(problems):
            raise ValueError(
                f"--drop {config.drop}: none of its {len(ids)} ids is among the {len(problems)} problems; wrong "
                f"file?"
            )
        problems = kept
    if not problems:
        raise ValueError("no problem is left after --drop")
    if config.blind and not any(p.get("images") for p in problems):
        raise ValueError("--blind: no problem of --data has an image to remove")
    return problems, left_out


def without_images(problem: dict) -> dict:
    """The same problem with its images and their places removed; clusters stay those of the images."""

    def blank(text: str) -> str:
        return re.sub(r"<image>\n?", "", text)

    meta = {**(problem.get("meta") or {}), "cluster": cluster(problem)}
    options = problem.get("options")
    return {
        **problem,
        "images": [],
        "question": blank(problem["question"]),
        "meta": meta,
        "options": options and [blank(o) for o in options],
    }


# ------------------------------------------------------------------------------------------------ what is on disk
def model_fingerprint(model_dir: Path) -> str:
    """sha256 of configuration and tokenizer files, and of 64 blocks of 64 KiB of each weight file with its size: other
    weights differ everywhere, so samples of 15 GB tell them apart in a second."""
    digest = hashlib_of_files(
        sorted(
            p
            for p in model_dir.iterdir()
            if p.name
            in (
                "config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "chat_template.json",
                "chat_template.jinja",
                "preprocessor_config.json",
                "vocab.json",
                "merges.txt",
            )
        )
    )
    for file in sorted(model_dir.glob("*.safetensors")):
        size, block = file.stat().st_size, 1 << 16
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as f:
            for at in sorted({int(x) for x in np.linspace(0, max(0, size - block), 64)}):
                f.seek(at)
                digest.update(f.read(block))
    return digest.hexdigest()


def claim(config: Config, model_dir: Path | None, world: World) -> None:
    """Write OUT/config.json, what the samples depend on; where OUT holds samples already, hold to it instead. Raises
    ValueError that names the first setting which has changed. Runs on rank 0 alone; see `rank0_first`."""
    out, file = Path(config.out), Path(config.out) / "config.json"
    old = json.loads(file.read_text()) if file.is_file() else None
    if config.rescore:
        if old is None:
            raise ValueError(f"--rescore: {config.out} holds no samples; run it with --model first")
        for k in SAMPLES_DEPEND_ON:
            if getattr(config, k) not in (getattr(Config, k), old[k]):
                raise ValueError(
                    f"--rescore grades what {config.out} holds: its {k} is {old[k]!r}, not "
                    f"{getattr(config, k)!r}"
                )
        return
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and world.device.type == "cuda")
    new = {k: getattr(config, k) for k in SAMPLES_DEPEND_ON} | {
        "dtype": "bf16" if bf16 else "fp32",
        "model": config.model,
        "model_sha256": model_fingerprint(model_dir),
        "data_sha256": [[Path(k).name, v] for k, v in hash_files(config.data).items()],
        "open_thought": opens_thought(model_dir),
    }
    if old is None and out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"--out {config.out}: not empty and not an evaluation; name another directory"
        )
    if old is None or not any(out.glob("samples.*")):
        out.mkdir(parents=True, exist_ok=True)
        return write_json(file, new)
    for k in new:
        if k != "model" and new[k] != old.get(k):  # a model may move, its hash is held to
            raise ValueError(
                f"--out {config.out} holds samples of another evaluation: its {k} is {old.get(k)!r}, now "
                f"{new[k]!r}. Name another --out, or remove that directory"
            )


def opens_thought(model_dir: Path) -> bool:
    """Does the chat template end the prompt inside a thought? Then a completion begins in one."""
    chat = [{"role": "user", "content": "x"}]
    text = load_tokenizer(model_dir).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    return text.rstrip().endswith("<think>")


def write_json(file: Path, value: dict) -> None:
    tmp = file.with_suffix(".tmp")
    tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    tmp.rename(file)


def collect(out: Path, stage: str) -> None:
    """Join what the ranks appended (of this run, or of one that was cut) with what was there: OUT/STAGE.jsonl."""
    parts = sorted(out.glob(f"{stage}.part*.jsonl"))
    if not parts:
        return
    rows = read_rows(out / f"{stage}.jsonl")
    for part in parts:
        rows = {**read_rows(part, torn_end=True), **rows}
    write_rows(out / f"{stage}.jsonl", list(rows.values()))
    for part in parts:
        part.unlink()


def check_questions(rows: Rows, problems: list[dict], style: str, file: Path) -> None:
    """Raise ValueError when a stored sample answers another question than the file has now."""
    for p in problems:
        row = rows.get((p["id"], 0))
        if row is not None and row["prompt"] != prompt_text(p, style):
            raise ValueError(
                f"{file}: the question or the options of {p['id']} have changed since it was sampled; "
                f"name another --out, or remove its rows there"
            )


# ------------------------------------------------------------------------------------------------------- sampling
@dataclass
class Job:
    """What one call of the sampler continues: a prompt, or a prompt with a thought that is cut short."""

    problem: dict
    tokens: list[int]
    key: int  # decides its random numbers
    sample: int = 0
    head: list[int] = field(
        default_factory=list
    )  # the part of `tokens` that belongs to the completion
    forced_at: int | None = None  # where in the completion the forced exit begins


class Engine:
    """The model's directory: tokenizer and limits at once, weights when something has to be sampled."""

    def __init__(
        self, config: Config, settings: dict, model_dir: Path, problems: list[dict], world: World
    ):
        self.config, self.settings, self.dir, self.world = config, settings, model_dir, world
        self.tokenizer, self.model, self.tokens = load_tokenizer(model_dir), None, 0
        self.seconds = 0.0
        self.model_config = ModelConfig.from_dir(model_dir)
        self.stop_ids = stop_token_ids(self.tokenizer)
        self.with_images = any(p.get("images") for p in problems)
        self.images = image_limits(model_dir, settings) if self.with_images else None
        if self.with_images and self.model_config.vision is None:
            raise ValueError(
                f"{model_dir}: a text-only model, but problems have images; --blind removes them"
            )
        self.exit = think_exit(self.tokenizer, self.model_config.vocab_size)
        self.main_params = self.params()  # refuses a think_budget that cannot be

    def params(self, **changes) -> SamplingParams:
        s = self.settings
        thinking = dict(
            think_budget=s["think_budget"], answer_budget=s["answer_budget"], **self.exit
        )
        return SamplingParams(
            **{
                **dict(
                    n=s["n"],
                    temperature=s["temperature"],
                    top_p=s["top_p"],
                    seed=s["seed"],
                    max_new_tokens=s["max_new_tokens"],
                    stop_ids=self.stop_ids,
                ),
                **(thinking if s["think_budget"] else {}),
                **changes,
            }
        )

    def prompt(self, problem: dict) -> list[int]:
        counts = [image_token_count(f, self.images) for f in problem.get("images") or []]
        return prompt_tokens(problem, self.tokenizer, counts, self.settings["prompt_style"])

    def load(self) -> Model:
        if self.model is None:
            dtype = torch.bfloat16 if self.settings["dtype"] == "bf16" else torch.float32
            self.model = build_model(
                self.dir,
                self.world,
                with_vision=self.with_images,
                compute_dtype=dtype,
                master_dtype=dtype,
            )
            self.model.set_banned_ids(
                banned_token_ids(self.tokenizer, self.model_config.vocab_size)
            )
        return self.model

    def run(self, stage: str, jobs: list[Job], params: SamplingParams) -> None:
        """Sample this rank's jobs and append each row as it ends; then rank 0 joins the ranks' files. Collective."""
        out, world = Path(self.config.out), self.world
        part = out / f"{stage}.part{world.rank}.jsonl"
        model, begin = self.load(), time.perf_counter()
        longest = max((len(j.tokens) for j in jobs), default=1)
        sampler = Sampler(
            model,
            max_len=longest + params.max_new_tokens,
            slots=self.config.slots or None,
            kv_gb=self.config.kv_gb or None,
            min_rows=16 if world.device.type == "cpu" else 1,
        )  # a row's bits don't depend on the batch
        with gathered(model), open(part, "a", encoding="utf-8", newline="\n") as file:
            for chunk in chunks(jobs, self.model_config.image_token_id):
                prompts = [
                    Prompt(j.tokens, *load_images(j.problem.get("images") or [], self.images))
                    for j in chunk
                ]

                def write(rollout: Rollout, chunk=chunk) -> None:
                    row = self.row(chunk[rollout.prompt_index], rollout)
                    self.tokens += rollout.sampled_tokens
                    file.write(as_line(row))
                    file.flush()

                sampler.generate(
                    prompts,
                    params,
                    sample_ids=[j.key for j in chunk],
                    on_finish=write,
                    progress=world.is_main,
                )
            sampler.release()
        self.seconds += time.perf_counter() - begin
        barrier()  # all have written
        with rank0_first(world):
            if world.is_main:
                collect(out, stage)

    def row(self, job: Job, rollout: Rollout) -> dict:
        """A sample as it is stored, before it is graded."""
        tokens = [*job.head, *rollout.tokens]
        forced = [] if rollout.mask.all() else np.flatnonzero(~rollout.mask)[:1].tolist()
        finish, forced_at = rollout.finish_reason, (forced or [job.forced_at])[0]
        if job.forced_at is not None:
            finish = f"forced+{finish}"
        shown = tokens[:-1] if finish.endswith("stop") else tokens
        return {
            "id": job.problem["id"],
            "sample": rollout.sample_index + job.sample,
            "seed": job.key,
            "prompt": prompt_text(job.problem, self.settings["prompt_style"]),
            "finish": finish,
            "text": self.tokenizer.decode(shown),
            "forced_at": forced_at,
            "prompt_tokens": rollout.prompt_tokens - len(job.head),
            "tokens": tokens,
            "images": job.problem.get("images") or [],
        }


def image_limits(model_dir: Path, settings: dict) -> ImageConfig:
    limits = {k: settings[k] for k in ("min_pixels", "max_pixels") if settings[k]}
    return replace(ImageConfig.from_dir(model_dir), **limits)


def chunks(jobs: list[Job], image_token_id: int | None) -> list[list[Job]]:
    """Jobs in order, cut where their images would take more memory than PIXEL_BYTES."""
    parts, held = [], PIXEL_BYTES
    for job in jobs:
        size = (
            sum(t == image_token_id for t in job.tokens) * 4 * 1176 * 4
            if job.problem.get("images")
            else 0
        )
        if not parts or (size and held + size > PIXEL_BYTES):
            parts.append([])
            held = 0
        parts[-1].append(job)
        held += size
    return parts


def sample_missing(engine: Engine, rows: Rows, problems: list[dict], world: World) -> None:
    """Sample the problems that have not all their samples; each rank takes every size-th of them."""
    n = engine.settings["n"]
    missing = [p for p in problems if any((p["id"], i) not in rows for i in range(n))]
    if missing:
        jobs = [Job(p, engine.prompt(p), problem_key(p)) for p in missing[world.rank :: world.size]]
        engine.run("samples", jobs, engine.main_params)


# ----------------------------------------------------------------------------------------------- the budget curve
def exit_place(
    tokens: list[int],
    forced_at: int | None,
    cut_off: bool,
    close_table: list[list[int]],
    budget: int,
) -> int | None:
    """Where a run with this budget would have begun its forced exit, or None where the thought was closed before. The
    rule of `sampler.force_exit`: at the first token from `budget` on at which the thought is open and the model is not
    just closing it. forced_at: where the stored run did so; cut_off: the stored run ended at its length limit.
    """
    closed, state, hold = len(close_table) - 1, 0, False
    for place, token in enumerate(tokens[:forced_at]):
        if state == closed:
            return None
        if place >= budget and not hold:
            return place
        after = close_table[state][token]
        state, hold = after, state < after < closed
    if forced_at is not None:
        return forced_at
    return len(tokens) if cut_off and state < closed and len(tokens) >= budget else None


def run_budget(engine: Engine, rows: Rows, problems: list[dict], budget: int, world: World) -> None:
    """Generate the answers that forced exit at `budget` would have brought, where the stored thought is longer."""
    out, table = Path(engine.config.out), engine.exit["close_table"].tolist()
    stage = f"budget_{budget}"
    with rank0_first(world):
        if world.is_main:
            collect(out, stage)
    have, jobs, wanted = read_rows(out / f"{stage}.jsonl"), [], 0
    for p in problems:
        for sample in range(engine.settings["n"]):
            row = rows[p["id"], sample]
            at = exit_place(
                row["tokens"].tolist(), row["forced_at"], row["finish"] == "length", table, budget
            )
            if at is None or at == row["forced_at"] or (p["id"], sample) in have:
                continue
            wanted += 1
            if wanted % world.size == world.rank:
                head = [*row["tokens"][:at].tolist(), *engine.exit["exit_tokens"]]
                key = problem_key(p, salt=budget * 1_000_003 + sample + 1)
                jobs.append(Job(p, [*engine.prompt(p), *head], key, sample, head, at))
    if wanted:
        answer = engine.params(
            n=1, max_new_tokens=engine.settings["answer_budget"], think_budget=None
        )
        engine.run(stage, jobs, answer)
    elif world.is_main and not (out / f"{stage}.jsonl").is_file():
        write_rows(out / f"{stage}.jsonl", [])


def check_budgets(budgets: list[int], settings: dict) -> None:
    limit = settings["think_budget"] or settings["max_new_tokens"]
    if budgets and budgets[-1] > limit:
        raise ValueError(
            f"--budgets {budgets[-1]}: the stored thoughts end at {limit} tokens; budgets up to there "
            f"can be drawn from them"
        )


# ----------------------------------------------------------------------------------------------------------- main


def data_sources(files: list[str]) -> list[dict]:
    """Each file with its sha256, and the release that it was converted from where FILE.info.json says so."""
    sources = []
    for file, digest in hash_files(files).items():
        info = Path(f"{file}.info.json")
        told = json.loads(info.read_text(encoding="utf-8")) if info.is_file() else {}
        sources.append(
            {"file": Path(file).name, "sha256": digest, "download": told.get("download")}
        )
    return sources


def write_header(
    config: Config, settings: dict, engine: Engine, problems: list[dict], world: World
) -> None:
    """What is needed to repeat the samples, and the whole prompt of the first problem of each kind."""
    examples = {}
    for p in problems:
        if p["kind"] not in examples:
            text = engine.tokenizer.decode(engine.prompt(p))
            examples[p["kind"]] = re.sub(r"(?:<\|image_pad\|>){2,}", "<|image_pad|>…", text)
    write_json(
        Path(config.out) / "header.json",
        {
            **header(world_size=world.size),
            "model": str(engine.dir),
            "settings": settings,
            "prompts": examples,
            "exit_text": engine.tokenizer.decode(engine.exit["exit_tokens"]),
            "stop_ids": engine.stop_ids,
            "rules": {"rule": "answer", "sha256": rules_sha256()},
        },
    )
    print(
        f"model {engine.dir}, {settings['dtype']} on {world.size} x {world.device.type}; {len(problems)} problems; "
        f"settings: " + ", ".join(f"{k} {settings[k]}" for k in SAMPLES_DEPEND_ON),
        flush=True,
    )
    for kind, text in examples.items():
        print(f"--- prompt of the first {kind} problem\n{text}\n---", flush=True)


def all_samples(
    config: Config, settings: dict, problems: list[dict], model_dir: Path | None, world: World
) -> tuple[Rows, dict[int, Rows]]:
    """Stored samples of every problem, and the tails of each budget: sampled now where they are missing. Collective."""
    out = Path(config.out)
    file, budgets = out / "samples.jsonl", list(config.budget_list)
    rows = read_rows(file)
    check_questions(rows, problems, settings["prompt_style"], file)
    old = (
        json.loads((out / "result.json").read_text())
        if (out / "result.json").is_file()
        else {"budgets": {}}
    )
    if config.rescore:
        missing = [
            p["id"] for p in problems if any((p["id"], i) not in rows for i in range(settings["n"]))
        ]
        if missing:
            raise ValueError(
                f"--rescore: {len(missing)} problems have no stored samples, the first is {missing[0]}; "
                f"run it with --model to sample them"
            )
        unknown = [b for b in budgets if str(b) not in old["budgets"]]
        if unknown:
            raise ValueError(
                f"--rescore --budgets {unknown[0]}: not sampled yet; run it with --model"
            )
        budgets = budgets or [int(b) for b in old["budgets"]]
    else:
        check_budgets(budgets, settings)
        check_model_dir(model_dir)
        engine = Engine(config, settings, model_dir, problems, world)
        if world.is_main:
            write_header(config, settings, engine, problems, world)
        sample_missing(engine, rows, problems, world)
        rows = read_rows(file)
        for budget in budgets:
            run_budget(engine, rows, problems, budget, world)
        report_speed(engine, world)
    tails = {b: read_rows(out / f"budget_{b}.jsonl") for b in budgets}
    return rows, tails


def report_speed(engine: Engine, world: World) -> None:
    parts = all_gather_objects((engine.tokens, engine.seconds))
    tokens, seconds = sum(t for t, _ in parts), max(s for _, s in parts)
    if world.is_main and tokens:
        print(
            f"sampled {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tok/s", flush=True
        )


def evaluate(config: Config) -> dict | None:
    """Sample what is missing, grade everything, write and print the result. Returns it on rank 0."""
    world, out = (
        init(config.device, timeout_minutes=24 * 60),
        Path(config.out),
    )  # a rank may wait long for the last one
    problems, left_out = choose_problems(config)
    model_dir = None if config.rescore else resolve_model_dir(config.model, world)
    with rank0_first(world):
        if world.is_main:
            claim(config, model_dir, world)
            collect(out, "samples")
    settings = json.loads((out / "config.json").read_text())
    problems = [without_images(p) for p in problems] if settings["blind"] else problems
    rows, tails = all_samples(config, settings, problems, model_dir, world)
    by_id, keys = (
        {p["id"]: p for p in problems},
        [(p["id"], i) for p in problems for i in range(settings["n"])],
    )
    with Grader(workers=config.graders, open_thought=settings["open_thought"]) as grader:
        graded = dict(zip(keys, grade([rows[k] for k in keys], by_id, settings, grader, world)))
        points = {
            b: grade([tail[k] for k in keys if k in tail], by_id, settings, grader, world)
            for b, tail in tails.items()
        }
    if not world.is_main:
        return None
    grouped, curve = by_problem(problems, graded, settings["n"]), {}
    for budget, point in points.items():
        point = {(r["id"], r["sample"]): r for r in point}
        curve[str(budget)] = budget_figures(
            problems, by_problem(problems, graded | point, settings["n"]), settings
        )
        write_rows(
            out / f"budget_{budget}.jsonl",
            list((point | {k: r for k, r in tails[budget].items() if k not in point}).values()),
        )
    rules = rules_sha256()
    result = finite(
        {
            "settings": settings,
            "rules": {"rule": "answer", "sha256": rules},
            "data": data_sources(config.data),
            "limit": config.limit,
            **left_out,
            "prompts": prompts_used(problems, settings["prompt_style"]),
            "statuses": dict(sorted(Counter(r["status"] for r in graded.values()).items())),
            **figures_of(problems, grouped, settings),
            "budgets": curve,
            "compare": compare(problems, grouped, Path(config.compare), rules)
            if config.compare
            else None,
        }
    )
    write_rows(
        out / "samples.jsonl", [*graded.values(), *(r for k, r in rows.items() if k not in graded)]
    )
    write_json(out / "result.json", result)
    solved = [p["id"] for p, group in zip(problems, grouped) if all(r["score"] == 1 for r in group)]
    (out / "solved.txt").write_text("".join(f"{i}\n" for i in solved), encoding="utf-8")
    print(report(result))
    print(json.dumps(headline(result)), flush=True)
    return result


def prompts_used(problems: list[dict], style: str) -> dict[str, str]:
    """The instruction that stands before the question, by kind of problem."""
    bare = {"question": "", "images": []}
    return {
        kind: prompt_text({**bare, "kind": kind}, style)
        for kind in sorted({p["kind"] for p in problems})
    }


def main(argv: list[str] | None = None) -> None:
    try:
        with process_group_cleanup(), exit_on_value_error():
            evaluate(parse_config(Config, __doc__, argv))
    except KeyboardInterrupt:
        print("stopped: what was sampled is stored, the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    run_and_exit(main)
