"""Evaluate a model on flat jsonl problems, text and image, by the rule that rewards training.

torchrun --nproc_per_node=8 eval.py --model DIR --data mmmu.jsonl gsm8k.jsonl --out runs/eval/base
python eval.py … --samples 5 --temperature 0.3    avg@5, maj@5, pass@5: the second protocol
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

Each rank samples its share and appends each sample as it ends, so that a stopped evaluation
resumes; then everything is graded. A sample depends on (seed, problem, sample index) and not on
ranks or batches, up to the rounding of matrix products of another size.

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

import data
import grading
import model
import rewards
from core.chat import banned_token_ids, opens_thought, stop_token_ids
from core.options import option, parse_config
from core.out_dir import assert_shared, claim, lock, write_json
from core.parallel import World, all_any, all_gather_objects, barrier, from_rank0, init
from core.run import hash_files, header, run_and_exit, script
from core.samples import Sample, make_sample, problem_seed, read_samples, set_grade, write_samples
from core.slots import ForcedExit, exit_positions
from core.vision import ImageConfig
from sampler import Completion, Sampler, SamplingParams
from scoring.metrics import all_metrics, cluster, compare, is_looping
from scoring.tables import read_result, report

PIXEL_BYTES = 4e9  # host memory for the preprocessed images of one call of the sampler
STYLES = ("kind", *data.INSTRUCTIONS)
Rows = dict[tuple[str, int], Sample]  # (problem id, sample index) → sample


@dataclass
class Config:
    data: list[str] = option(MISSING, "jsonl file(s) of problems", group="data")
    out: str = option(MISSING, "directory of this evaluation; rerun to resume")
    model: str = option("", "model directory or hub id; --rescore needs none", group="data")
    limit: int = option(0, "problems per task, always the same; 0: all", group="data", ge=0)
    drop: str = option("", "file of problem ids to leave out, one per line", group="data")
    skip_bad_rows: bool = option(False, "leave out rows that fail the check", group="data")
    blind: bool = option(False, "remove all images (paper: table 6)", group="data")
    prompt_style: Literal[STYLES] = option("kind", "kind: by kind of problem", group="data")
    min_pixels: int = option(262_144, "scale images up to this; 0: model's", group="data", ge=0)
    max_pixels: int = option(262_144, "scale images down to this; 0: model's", group="data", ge=0)
    rule: Literal[rewards.RULES] = option(
        "answer", "where the answer stands: answer (<answer>, else \\boxed), boxed, or line "
        "('Answer: X')", group="objective",
    )  # fmt: skip
    rescore: bool = option(False, "grade stored samples, sample nothing", group="objective")
    budgets: str = option("", "thinking budgets, as in 512,1024,2048", group="objective")
    compare: str = option("", "another --out: this minus the other", group="objective")
    samples: int = option(1, "per problem (paper: 1, and 5)", group="sampling", ge=1, le=1024)
    temperature: float = option(0.0, "paper: 0, and 0.3 for 5", group="sampling", ge=0, le=10)
    top_p: float = option(1.0, "nucleus sampling", group="sampling", gt=0, le=1)
    max_new_tokens: int = option(4096, "answer included (paper: 4096)", group="sampling", ge=1)
    think_budget: int = option(
        3800, "force </think> after this many tokens (paper: at 4096, room for the answer not "
        "stated); 0: never", group="sampling", ge=0,
    )  # fmt: skip
    answer_budget: int = option(256, "tokens after a forced exit", group="sampling", ge=1)
    seed: int = option(0, "decides every sampled token", group="sampling", ge=0)
    dtype: Literal["auto", "bf16", "fp32"] = option(
        "auto", "auto: bf16 on CUDA, fp32 on CPU", group="memory and speed"
    )
    slots: int = option(
        0, "samples at once; 0: by --kv_gb", group="memory and speed", ge=0, le=4096
    )
    kv_gb: float = option(0.0, "KV cache in GB; 0: by free memory", group="memory and speed", ge=0)
    graders: int = option(2, "grading processes per rank", group="memory and speed", ge=1, le=256)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to run", group="run")

    def __post_init__(self):
        n, low, high = self.samples, self.min_pixels, self.max_pixels
        if n > 1 and self.temperature == 0:
            raise ValueError(
                f"--samples {n} at --temperature 0: {n} equal ones; pass --temperature 0.3"
            )
        if not self.model and not self.rescore:
            raise ValueError("--model is missing; only --rescore needs none")
        if 0 < high < low:
            raise ValueError(f"--min_pixels {low}: is more than --max_pixels {high}")
        if self.compare and read_result(self.compare)["rules"] != grading_rules(self.rule):
            raise ValueError(
                f"--compare {self.compare}: graded by other rules; grade it again with --rescore"
            )
        if not re.fullmatch(r"([1-9]\d{0,8}(,[1-9]\d{0,8})*)?", self.budgets):
            raise ValueError(f"--budgets {self.budgets}: must be numbers, as in 512,1024,2048")
        self.budget_list = sorted({int(b) for b in self.budgets.split(",") if b})


SAMPLES_DEPEND_ON = (
    "samples", "temperature", "top_p", "max_new_tokens", "think_budget", "answer_budget", "seed",
    "prompt_style", "min_pixels", "max_pixels", "blind",
)  # fmt: skip


# ---------------------------------------------------------------------------------------- problems
def choose_problems(config: Config) -> tuple[list[dict], dict]:
    """The problems to evaluate, in the order of the files, and how many rows were left out. Raises
    ValueError for bad rows, a --drop file without effect, and --blind without an image."""
    problems, faults = data.load_problems(config.data, skip_bad_rows=config.skip_bad_rows)
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
        ids = set(Path(config.drop).read_text(encoding="utf-8", errors="replace").splitlines())
        kept = [p for p in problems if p["id"] not in ids]
        left_out["dropped"] = len(problems) - len(kept)
        if not kept or (ids - {""} and len(kept) == len(problems)):
            raise ValueError(
                f"--drop {config.drop}: its {len(ids)} ids leave {len(kept)} of {len(problems)} "
                f"problems; wrong file?"
            )
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


def take_out(config: Config, model_dir: Path | None, world: World) -> tuple[dict, str]:
    """The settings of this evaluation (with --rescore, those in OUT), and the lock on OUT. Raises
    ValueError, with nothing changed, where OUT holds anything else or is in use. For rank 0."""
    out, file = Path(config.out), Path(config.out) / "config.json"
    if not config.rescore:
        bf16 = config.dtype == "bf16" or (config.dtype == "auto" and world.device.type == "cuda")
        settings = {k: getattr(config, k) for k in SAMPLES_DEPEND_ON} | {
            "dtype": "bf16" if bf16 else "fp32",
            "open_thought": opens_thought(data.load_tokenizer(model_dir)),
            "model": config.model,
            "limit": config.limit,
            "model_sha256": model_fingerprint(model_dir),
            "data_sha256": data_hashes(config.data),
        }
        free = ("model", "limit")  # a model may move; its hash may not change
        held = lambda out: any(out.glob("samples*.jsonl"))  # noqa: E731
        return settings, claim(out, "eval", settings, changeable=free, held=held)[1]
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
        ours = old["script"] == "eval"
    except (OSError, ValueError, TypeError, KeyError):
        ours = False
    if not ours:
        raise ValueError(f"--rescore: {out} holds no samples; run it with --model first")
    for k in SAMPLES_DEPEND_ON:
        if (now := getattr(config, k)) not in (getattr(Config, k), old[k]):
            raise ValueError(
                f"--rescore grades what {out} holds: its {k} is {old[k]!r}, not {now!r}"
            )
    return {k: v for k, v in old.items() if k != "script"}, lock(out)


def data_hashes(files: list[str]) -> list[list[str]]:
    return [[Path(file).name, digest] for file, digest in hash_files(files).items()]


def load_rows(out: Path, stage: str) -> Rows:
    """Samples by (problem, sample index): of OUT/STAGE.jsonl and of the parts that ranks wrote."""
    rows: Rows = {}
    for file in [*out.glob(f"{stage}.jsonl"), *sorted(out.glob(f"{stage}.part*.jsonl"))]:
        for s in read_samples(file, truncated_end=".part" in file.name):
            s.tokens = np.array(s.tokens, np.int32)  # a fifth of a list's memory
            rows.setdefault((s.id, s.sample), s)
    return rows


def check_stored(config: Config, settings: dict, problems: list[dict], rows: Rows) -> None:
    """Raise ValueError unless --rescore finds all samples, of the questions as they are now."""
    keys = [(p["id"], i) for p in problems for i in range(settings["samples"])]
    if missing := list(dict.fromkeys(i for i, n in keys if (i, n) not in rows)):
        limit = settings["limit"]
        hint = f"it was made with --limit {limit}: pass that, or sample the rest with --model"
        raise ValueError(
            f"--rescore: {len(missing)} of {len(problems)} problems have no stored samples, the "
            f"first is {missing[0]}; {hint if limit != config.limit else 'sample with --model'}"
        )
    for p in problems:
        if rows[p["id"], 0].prompt != data.prompt_text(p, settings["prompt_style"]):
            raise ValueError(
                f"--rescore: the question or the options of {p['id']} have changed since it was "
                f"sampled; sample them into another --out"
            )


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
    """What samples: tokenizer and limits at once, weights when the first sample is due."""

    def __init__(self, config: Config, settings: dict, model_dir: Path, world: World, images: bool):
        """images: whether any problem has one."""
        self.config, self.settings, self.dir, self.world = config, settings, model_dir, world
        self.out, self.model, self.images = Path(config.out), None, None
        self.tokens, self.seconds = 0, 0.0  # sampled so far
        self.tokenizer = data.load_tokenizer(model_dir)
        model.check_model_dir(model_dir)
        self.model_config = c = model.ModelConfig.from_dir(model_dir)
        if images and c.vision is None:
            raise ValueError(
                f"{model_dir}: has no vision tower, but problems have images; --blind?"
            )
        if images:
            limits = {k: settings[k] for k in ("min_pixels", "max_pixels") if settings[k]}
            self.images = replace(ImageConfig.from_dir(model_dir), **limits)
        budget, answer, most = (
            settings[k] for k in ("think_budget", "answer_budget", "max_new_tokens")
        )
        self.exit = ForcedExit.from_tokenizer(self.tokenizer, c.vocab_size, budget, answer)
        try:
            self.params = SamplingParams(
                n=settings["samples"], max_new_tokens=most, seed=settings["seed"],
                temperature=settings["temperature"], top_p=settings["top_p"],
                stop_ids=stop_token_ids(self.tokenizer), forced_exit=self.exit if budget else None,
            )  # fmt: skip
        except ValueError as e:
            raise ValueError(f"{e}; --think_budget 0 turns forced exit off") from e
        longest = budget or most
        if config.budget_list and config.budget_list[-1] > longest:
            raise ValueError(
                f"--budgets {config.budget_list[-1]}: the stored thoughts end at {longest} tokens"
            )

    def prompt(self, problem: dict) -> list[int]:
        counts = [data.image_token_count(f, self.images) for f in problem.get("images") or []]
        return data.prompt_tokens(problem, self.tokenizer, counts, self.settings["prompt_style"])

    def write_header(self, problems: list[dict]) -> None:
        """Print and store what is needed to repeat the samples, with a prompt of each kind."""
        prompts = {}
        for p in problems:
            if p["kind"] not in prompts:
                text = self.tokenizer.decode(self.prompt(p))
                prompts[p["kind"]] = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>…", text)
        more = {"model": str(self.dir), "settings": self.settings, "prompts": prompts}
        write_json(self.out / "header.json", header(world_size=self.world.size, **more))
        settings = ", ".join(f"{k} {self.settings[k]}" for k in (*SAMPLES_DEPEND_ON, "dtype"))
        print(f"model {self.dir}; {len(problems)} problems; {settings}")
        for kind, text in prompts.items():
            print(f"--- prompt of the first {kind} problem\n{text}\n---", flush=True)

    def run(self, stage: str, jobs: list[Job], params: SamplingParams) -> None:
        """Sample this rank's jobs into a new part of OUT/STAGE, line by line. Collective."""
        if not all_any(bool(jobs)):
            return
        begin, config, c = time.perf_counter(), self.config, self.model_config
        prompt = max(all_gather_objects(max((len(j.tokens) for j in jobs), default=0)))
        longest = prompt + params.max_new_tokens
        context = (c.raw.get("text_config") or c.raw).get("max_position_embeddings", 1 << 17)
        if longest > context:
            raise ValueError(
                f"--max_new_tokens {params.max_new_tokens}: with the longest prompt ({prompt} "
                f"tokens) more than the model's context of {context} tokens"
            )
        if self.model is None:
            dtype = torch.bfloat16 if self.settings["dtype"] == "bf16" else torch.float32
            dtypes, vision = dict(compute_dtype=dtype, master_dtype=dtype), self.images is not None
            self.model = model.build_model(self.dir, self.world, with_vision=vision, **dtypes)
            self.model.set_banned_ids(banned_token_ids(self.tokenizer, c.vocab_size))
        rows = 16 if self.world.device.type == "cpu" else 1  # results don't depend on the batch
        memory = dict(slots=config.slots or None, kv_gb=config.kv_gb or None, min_rows=rows)
        decoder = Sampler(self.model, max_len=longest, **memory)
        part = self.out / f"{stage}.part{self.world.rank}.{time.time_ns()}.jsonl"
        with decoder.weights(), open(part, "w", encoding="utf-8", newline="\n") as file:
            for chunk in chunks(jobs, c.image_token_id):

                def store(completion: Completion, chunk: list[Job] = chunk) -> None:
                    file.write(self.sample(chunk[completion.prompt_index], completion).to_json())
                    file.flush()
                    self.tokens += len(completion.tokens) - completion.forced_tokens

                pixels = [
                    data.load_images(j.problem.get("images") or [], self.images) for j in chunk
                ]
                prompts = [data.Prompt(j.tokens, *p) for j, p in zip(chunk, pixels)]
                ids = [j.seed for j in chunk]
                show = self.world.is_main
                decoder.generate(prompts, params, sample_ids=ids, on_finish=store, progress=show)
            decoder.release()
        self.seconds += time.perf_counter() - begin
        barrier()  # every rank has written

    def sample(self, job: Job, completion: Completion) -> Sample:
        """A completion as it is stored, before it is graded."""
        prompt = data.prompt_text(job.problem, self.settings["prompt_style"])
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

    def sample_missing(self, problems: list[dict]) -> Rows:
        """All samples of `problems`; each rank samples its share of the missing. Collective."""
        rows, n, world = load_rows(self.out, "samples"), self.settings["samples"], self.world
        missing = [p for p in problems if any((p["id"], i) not in rows for i in range(n))]
        mine = missing[world.rank :: world.size]
        jobs = [Job(p, self.prompt(p), problem_seed(p)) for p in mine]
        self.run("samples", jobs, self.params)
        return load_rows(self.out, "samples")

    def sample_budget(self, problems: list[dict], rows: Rows, budget: int) -> Rows:
        """The samples that a forced exit at `budget` would have changed. Up to there the tokens are
        those of the stored thought, so only the answers are generated. Collective."""
        world, stage = self.world, f"budget_{budget}"
        have, mine = load_rows(self.out, stage), problems[world.rank :: world.size]
        pairs = [(p, rows[p["id"], i]) for p in mine for i in range(self.settings["samples"])]
        pairs = [(p, s) for p, s in pairs if (s.id, s.sample) not in have]
        thoughts = [s.tokens[: s.forced_at] for _, s in pairs]
        unfinished = [s.finish_reason == "length" for _, s in pairs]
        exit, jobs = replace(self.exit, budget=budget), []
        starts = exit_positions(thoughts, unfinished, exit) if pairs else []
        for (p, s), at in zip(pairs, starts):
            if at is not None:
                head = [*s.tokens[:at].tolist(), *exit.tokens]
                seed = problem_seed(p, salt=budget * 1_000_003 + s.sample + 1)
                jobs.append(Job(p, [*self.prompt(p), *head], seed, s.sample, head))
        answer = {"n": 1, "max_new_tokens": exit.answer_budget, "forced_exit": None}
        self.run(stage, jobs, replace(self.params, **answer))
        return load_rows(self.out, stage)


def chunks(jobs: list[Job], image_token_id: int | None) -> list[list[Job]]:
    """Jobs in order, split where their images would take more than PIXEL_BYTES."""
    parts, held = [[]], 0
    for job in jobs:
        tokens = job.tokens.count(image_token_id) if job.problem.get("images") else 0
        size = tokens * 4 * 1176 * 4  # 4 patches a token, 1176 fp32 values a patch
        if size and parts[-1] and held + size > PIXEL_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(job)
        held += size
    return parts


# --------------------------------------------------------------------------------- grades, results
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
    for rank, part in enumerate(all_gather_objects([[getattr(s, k) for k in keys] for s in mine])):
        for s, values in zip(samples[rank :: world.size], part):
            vars(s).update(zip(keys, values))


def write_result(
    config: Config, settings: dict, problems: list[dict], left_out: dict, rows: Rows, tails: dict
) -> dict:
    """Metrics of the graded samples, into OUT and onto stdout. tails: rows of each budget."""
    out, rules = Path(config.out), grading_rules(config.rule)

    def groups(rows: Rows) -> list[list[Sample]]:
        return [[rows[p["id"], i] for i in range(settings["samples"])] for p in problems]

    samples, result = groups(rows), {"settings": settings, "rules": rules, "limit": config.limit}
    result |= {**left_out, "data": data_hashes(config.data)}
    result["statuses"] = Counter(s.status for group in samples for s in group)
    result |= {**all_metrics(problems, samples, settings), "compare": None}
    once = {**settings, "samples": 1}  # no votes on the curve
    result["budgets"] = {
        str(b): all_metrics(problems, groups(rows | tail), once)["sets"]
        for b, tail in tails.items()
    }
    if config.compare:
        other = Path(config.compare)
        theirs = load_rows(other, "samples").values()
        result["compare"] = compare(problems, samples, other, theirs)
    for stage, stored in {"samples": rows, **{f"budget_{b}": t for b, t in tails.items()}}.items():
        write_samples(out / f"{stage}.jsonl", stored.values())
        for part in out.glob(f"{stage}.part*.jsonl"):
            part.unlink()
    write_json(out / "result.json", result)
    solved = (p["id"] for p, group in zip(problems, samples) if all(s.reward == 1 for s in group))
    (out / "solved.txt").write_text("".join(f"{i}\n" for i in solved), encoding="utf-8")
    print(report(result))
    keys = ("n", "accuracy", "low", "high", "unparsed", "truncated", "forced")
    short = {name: {k: s[k] for k in keys} for name, s in result["sets"].items()}
    print(
        json.dumps({"micro": result["micro"], "macro": result["macro"], "sets": short}), flush=True
    )
    return result


def evaluate(config: Config) -> dict | None:
    """Sample what is missing, grade all, write and print the result. Returns it on rank 0."""
    world, out = init(config.device, timeout_minutes=24 * 60), Path(config.out)
    problems, left_out = choose_problems(config)
    model_dir = None if config.rescore else model.resolve_model_dir(config.model, world)
    settings, token = from_rank0(world, lambda: take_out(config, model_dir, world))
    assert_shared(out, token, world)
    problems = [without_images(p) for p in problems] if settings["blind"] else problems
    if config.rescore:
        rows, known = load_rows(out, "samples"), [f.stem[7:] for f in out.glob("budget_*.jsonl")]
        check_stored(config, settings, problems, rows)
        if unknown := [b for b in config.budget_list if str(b) not in known]:
            raise ValueError(f"--rescore --budgets {unknown[0]}: not sampled; run it with --model")
        budgets = config.budget_list or sorted(int(b) for b in known if b.isdigit())
        tails = {b: load_rows(out, f"budget_{b}") for b in budgets}
    else:
        engine = Engine(config, settings, model_dir, world, any(p.get("images") for p in problems))
        if world.is_main:
            engine.write_header(problems)
        rows = engine.sample_missing(problems)
        tails = {b: engine.sample_budget(problems, rows, b) for b in config.budget_list}
        counts = all_gather_objects((engine.tokens, engine.seconds))
        tokens, seconds = sum(t for t, _ in counts), max(s for _, s in counts)
        if world.is_main and tokens:
            print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tok/s", flush=True)
    keys = [(p["id"], i) for p in problems for i in range(settings["samples"])]
    rows, *ordered = (
        {k: part[k] for k in keys if k in part} | part for part in (rows, *tails.values())
    )
    tails = dict(zip(tails, ordered))
    by_id = {p["id"]: p for p in problems}
    how = {"rule": config.rule, "open_thought": settings["open_thought"]}
    with rewards.Grader(workers=config.graders, **how) as grader:
        for stored in (rows, *tails.values()):
            grade([stored[k] for k in keys if k in stored], by_id, grader, how, world)
    return (
        write_result(config, settings, problems, left_out, rows, tails) if world.is_main else None
    )


def main(argv: list[str] | None = None) -> None:
    with script():
        try:
            evaluate(parse_config(Config, __doc__, argv))
        except KeyboardInterrupt:
            print("stopped; the samples so far are stored: rerun to resume", file=sys.stderr)
            raise SystemExit(130) from None


if __name__ == "__main__":
    run_and_exit(main)
