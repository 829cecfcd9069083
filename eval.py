"""Evaluate a model on flat jsonl problems, text and image, by the rule that rewards training.

torchrun --nproc_per_node=8 eval.py --model DIR --data mmmu.jsonl gsm8k.jsonl --out runs/eval/base
python eval.py … --samples 5 --temperature 0.3    avg@5, maj@5, pass@5: the second protocol
python eval.py … --budgets 512,1024,2048          accuracy by thinking budget, from stored samples
python eval.py … --blind --samples 3 --temperature 0.3    no images; OUT/solved.txt: always solved
python eval.py --data … --out OUT --rescore       grade the stored samples again, without a model
python eval.py --data … --out OUT --rescore --compare OTHER [--drop BLIND/solved.txt]

OUT/samples.jsonl    one line a sample: prompt, text, answer, gold, reward, tokens (core/samples.py)
OUT/result.json      all metrics
OUT/config.json      the settings that the samples depend on
OUT/header.json      command, versions, commit, the whole prompt of each kind of problem
OUT/solved.txt       ids of the problems whose samples are all right
OUT/budget_N.jsonl   the samples that a forced exit after N tokens would have changed

Each rank samples its share and appends each sample as it ends, so that a stopped evaluation
resumes; then rank 0 grades all. A sample depends on (seed, problem, sample index) and not on ranks
or batches, up to the rounding of matrix products of another size.

From the paper (arXiv 2505.03981, section 3 and appendix C): prompts, greedy and 5 samples at 0.3,
forced exit, removal of text-solvable questions; from its model card: 262,144 pixels per image.
Ours where both are silent: the extraction rule (rewards.py), ties in a vote, intervals.
"""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import MISSING, dataclass, replace
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple, Sequence

import numpy as np
import torch

import data
import grading
import model
import rewards
from core.chat import banned_token_ids, opens_thought, stop_token_ids
from core.images import ImageConfig
from core.options import DATA, MEMORY, OBJECTIVE, RUN, SAMPLING, parse_config
from core.out_dir import assert_shared, claim, lock, write_json
from core.parallel import World, all_any, all_gather_objects, all_max, from_rank0, init
from core.run import hash_files, header, run_and_exit, script
from core.samples import Sample, make_sample, problem_seed, read_samples, set_grade, write_samples
from core.slots import ForcedExit, exit_positions
from sampler import Completion, Sampler, SamplingParams
from scoring.metrics import all_metrics, cluster, compare, positions
from scoring.tables import read_result, report

PIXEL_BYTES = 4e9  # preprocessed images of one call of the sampler, in host memory: 4 patches a
# token, 1176 fp32 values a patch
STYLES = ("kind", *data.INSTRUCTIONS)
Rows = dict[tuple[str, int], Sample]  # (problem id, sample index) → sample


@dataclass
class Config:
    data: list[str] = DATA(MISSING, "jsonl file(s) of problems")
    out: str = RUN(MISSING, "directory of this evaluation; rerun to resume")
    model: str = DATA("", "model directory or hub id; --rescore needs none")
    limit: int = DATA(0, "problems per task, always the same; 0: all", ge=0)
    drop: str = DATA("", "file of problem ids to leave out, one per line")
    skip_bad_rows: bool = DATA(False, "leave out rows that fail the check")
    blind: bool = DATA(False, "remove all images (paper: table 6)")
    prompt_style: Literal[STYLES] = DATA("kind", "kind: by kind of problem")
    min_pixels: int = DATA(262_144, "scale images up to this; 0: model's", ge=0)
    max_pixels: int = DATA(262_144, "scale images down to this; 0: model's", ge=0)
    rule: Literal[rewards.RULES] = OBJECTIVE(
        "answer", "where it stands: answer (<answer>, else \\boxed), boxed, line ('Answer: X')"
    )
    rescore: bool = OBJECTIVE(False, "grade stored samples, sample nothing")
    budgets: str = OBJECTIVE("", "thinking budgets, as in 512,1024,2048")
    compare: str = OBJECTIVE("", "another --out: this minus the other")
    samples: int = SAMPLING(1, "per problem (paper: 1, and 5)", ge=1, le=1024)
    temperature: float = SAMPLING(0.0, "paper: 0, and 0.3 for 5", ge=0, le=10)
    top_p: float = SAMPLING(1.0, "nucleus sampling", gt=0, le=1)
    max_new_tokens: int = SAMPLING(4096, "answer included (paper: 4096)", ge=1)
    think_budget: int = SAMPLING(
        3800, "force </think> after this many tokens (paper: at 4096); 0: never", ge=0
    )
    answer_budget: int = SAMPLING(256, "tokens after a forced exit", ge=1)
    seed: int = SAMPLING(0, "decides every sampled token", ge=0)
    dtype: Literal["auto", "bf16", "fp32"] = MEMORY("auto", "auto: bf16 on CUDA, fp32 on CPU")
    slots: int = MEMORY(0, "samples at once; 0: by --kv_gb", ge=0, le=4096)
    kv_gb: float = MEMORY(0.0, "KV cache in GB; 0: by free memory", ge=0)
    graders: int = MEMORY(4, "grading processes, on rank 0", ge=1, le=256)
    device: Literal["auto", "cpu", "cuda"] = RUN("auto", "where to run")

    def __post_init__(self):
        if (n := self.samples) > 1 and self.temperature == 0:
            raise ValueError(f"--samples {n} at --temperature 0: {n} equal ones; pass 0.3")
        if not self.model and not self.rescore:
            raise ValueError("--model is missing; only --rescore needs none")
        if self.compare and read_result(self.compare)["rules"] != grading_rules(self.rule):
            raise ValueError(f"--compare {self.compare}: graded by other rules; --rescore it first")
        if not re.fullmatch(r"([1-9]\d{0,8}(,[1-9]\d{0,8})*)?", self.budgets):
            raise ValueError(f"--budgets {self.budgets}: must be numbers, as in 512,1024,2048")
        self.budget_list = sorted({int(b) for b in self.budgets.split(",") if b})
        longest = self.think_budget or self.max_new_tokens
        if not self.rescore and max(self.budget_list, default=0) > longest:
            raise ValueError(f"--budgets {self.budgets}: the thoughts end at {longest} tokens")


SAMPLES_DEPEND_ON = (
    "samples", "temperature", "top_p", "max_new_tokens", "think_budget", "answer_budget", "seed",
    "prompt_style", "min_pixels", "max_pixels", "blind",
)  # fmt: skip


# ---------------------------------------------------------------------------------------- problems
def choose_problems(c: Config) -> tuple[list[dict], dict]:
    """The problems to evaluate, in the order of the files, and how many rows were left out. Raises
    ValueError for bad rows, a --drop file without effect, and --blind without an image."""
    problems, faults = data.load_problems(c.data, skip_bad_rows=c.skip_bad_rows)
    left_out = {"bad_rows": len({(f.file, f.line) for f in faults}), "dropped": 0}
    if c.limit:  # before --drop, so that runs with and without it choose the same problems
        by_hash = sorted(problems, key=lambda p: sha256(p["id"].encode()).digest())
        chosen = {i for at in positions(by_hash, "task").values() for i in at[: c.limit]}
        ids = {by_hash[i]["id"] for i in chosen}
        problems = [p for p in problems if p["id"] in ids]
    if c.drop:
        if not Path(c.drop).is_file():
            raise ValueError(f"--drop {c.drop}: no such file")
        ids = set(Path(c.drop).read_text(encoding="utf-8", errors="replace").splitlines())
        kept = [p for p in problems if p["id"] not in ids]
        left_out["dropped"] = len(problems) - len(kept)
        if not kept or (ids and len(kept) == len(problems)):
            raise ValueError(f"--drop {c.drop}: leaves {len(kept)} of {len(problems)}; wrong file?")
        problems = kept
    if c.blind and not any(p.get("images") for p in problems):
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
    """sha256 of the size and 64 blocks of 64 KiB of each file: other weights differ everywhere, and
    15 GB take a second."""
    digest, block = sha256(), 1 << 16
    suffixes = (".json", ".jinja", ".txt", ".safetensors")
    for file in sorted(f for f in model_dir.iterdir() if f.suffix in suffixes):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as f:
            for start in sorted({*np.linspace(0, max(0, size - block), 64, dtype=int).tolist()}):
                f.seek(start)
                digest.update(f.read(block))
    return digest.hexdigest()


def data_hashes(files: list[str]) -> list[list[str]]:
    return [[Path(file).name, digest] for file, digest in hash_files(files).items()]


def take_out(c: Config, model_dir: Path | None, world: World) -> tuple[dict, str]:
    """The settings of this evaluation (with --rescore, those in OUT), and the lock on OUT. Raises
    ValueError, with nothing changed, where OUT holds anything else or is in use. For rank 0."""
    out, settings = Path(c.out), {k: getattr(c, k) for k in SAMPLES_DEPEND_ON}
    if not c.rescore:
        by_device = "bf16" if world.device.type == "cuda" else "fp32"
        settings |= {
            "dtype": by_device if c.dtype == "auto" else c.dtype,
            "open_thought": opens_thought(data.load_tokenizer(model_dir)),
            "model": c.model,
            "limit": c.limit,
            "model_sha256": model_fingerprint(model_dir),
            "data_sha256": data_hashes(c.data),
        }
        free = ("model", "limit")  # a model may move; its hash may not change
        held = lambda out: any(out.glob("samples*.jsonl"))  # noqa: E731
        return settings, claim(out, "eval", settings, changeable=free, held=held)[1]
    try:
        old = json.loads((out / "config.json").read_text(encoding="utf-8"))
        ours = old.pop("script") == "eval"
    except (OSError, ValueError, TypeError, KeyError):
        ours = False
    if not ours:
        raise ValueError(f"--rescore: {out} holds no samples; run it with --model first")
    for k, now in settings.items():
        if now not in (getattr(Config, k), old[k]):
            raise ValueError(f"--rescore: the {k} of {out} is {old[k]!r}, not {now!r}")
    return old, lock(out)


def load_rows(out: Path, stage: str) -> Rows:
    """The samples of OUT/STAGE.jsonl and of the parts that ranks wrote."""
    rows: Rows = {}
    for file in [*out.glob(f"{stage}.jsonl"), *sorted(out.glob(f"{stage}.part*.jsonl"))]:
        for s in read_samples(file, truncated_end=".part" in file.name):
            s.tokens = np.array(s.tokens, np.int32)  # a fifth of a list's memory
            rows.setdefault((s.id, s.sample), s)
    return rows


def stored_stages(c: Config, settings: dict, problems: list[dict]) -> dict[str, Rows]:
    """What --rescore grades: all stages in OUT, or those of --budgets. Raises ValueError unless it
    holds every sample, of the questions as they are now."""
    out, rows = Path(c.out), load_rows(Path(c.out), "samples")
    for p in problems:
        prompt = data.prompt_text(p, settings["prompt_style"])
        stored = [rows.get((p["id"], i)) for i in range(settings["samples"])]
        if not all(s and s.prompt == prompt for s in stored):
            raise ValueError(
                f"--rescore: {out} (made with --limit {settings['limit']}) has not all samples of "
                f"{p['id']} as it is now; sample it with --model, where it changed in another --out"
            )
    names = [f.stem.removeprefix("budget_") for f in out.glob("budget_*.jsonl")]
    known = sorted(int(name) for name in names if name.isdigit())
    if unknown := [b for b in c.budget_list if b not in known]:
        raise ValueError(f"--rescore --budgets {unknown[0]}: not sampled; run it with --model")
    stages = (f"budget_{b}" for b in c.budget_list or known)
    return {"samples": rows} | {stage: load_rows(out, stage) for stage in stages}


# ---------------------------------------------------------------------------------------- sampling
class Job(NamedTuple):
    """A prompt to continue, or a prompt and a thought that is ended by force."""

    problem: dict
    tokens: list[int]  # prompt and head
    seed: int
    sample: int = 0
    head: Sequence[int] = ()  # the thought so far and the exit tokens


class Engine:
    """What samples: tokenizer and limits at once, weights when the first sample is due."""

    def __init__(self, c: Config, settings: dict, model_dir: Path, world: World, with_images: bool):
        """with_images: whether any problem has one."""
        self.c, self.settings, self.dir, self.world = c, settings, model_dir, world
        self.out, self.model, self.images = Path(c.out), None, None
        self.tokenizer = data.load_tokenizer(model_dir)
        self.config = config = model.ModelConfig.from_dir(model_dir)
        if with_images and config.vision is None:
            raise ValueError(f"{model_dir}: has no vision tower for the problems' images; --blind?")
        if with_images:
            limits = {"min_pixels": c.min_pixels, "max_pixels": c.max_pixels}
            limits = {k: v for k, v in limits.items() if v}
            self.images = replace(ImageConfig.from_dir(model_dir), **limits)
        self.exit = ForcedExit.from_tokenizer(
            self.tokenizer, config.vocab_size, c.think_budget, c.answer_budget
        )
        self.params = SamplingParams(
            n=c.samples, temperature=c.temperature, top_p=c.top_p, seed=c.seed,
            max_new_tokens=c.max_new_tokens, stop_ids=stop_token_ids(self.tokenizer),
            forced_exit=self.exit if c.think_budget else None,
        )  # fmt: skip

    def prompt(self, problem: dict) -> list[int]:
        return data.prompt_tokens(problem, self.tokenizer, self.images, self.c.prompt_style)

    def sampler(self, jobs: list[Job], new_tokens: int) -> Sampler:
        """A sampler with room for these jobs on any rank; loads the weights. Collective."""
        config, c = self.config, self.c
        prompt = int(all_max(max((len(j.tokens) for j in jobs), default=0))[0])
        context = (config.raw.get("text_config") or config.raw).get("max_position_embeddings", 1e9)
        if prompt + new_tokens > context:
            said = f"--max_new_tokens {new_tokens}: with the longest prompt ({prompt} tokens)"
            raise ValueError(f"{said} more than the model's context of {context} tokens")
        if self.model is None:
            dtype = torch.bfloat16 if self.settings["dtype"] == "bf16" else torch.float32
            dtypes, vision = dict(compute_dtype=dtype, master_dtype=dtype), self.images is not None
            self.model = model.build_model(self.dir, self.world, with_vision=vision, **dtypes)
            self.model.set_banned_ids(banned_token_ids(self.tokenizer, config.vocab_size))
        rows = 16 if self.world.device.type == "cpu" else 1  # results don't depend on the batch
        memory = dict(slots=c.slots or None, kv_gb=c.kv_gb or None, min_rows=rows)
        return Sampler(self.model, max_len=prompt + new_tokens, **memory)

    def run(self, stage: str, jobs: list[Job], params: SamplingParams) -> Rows:
        """Sample this rank's jobs into a new part of OUT/STAGE, line by line; returns the samples
        that all ranks have now. Collective."""
        if not all_any(bool(jobs)):
            return load_rows(self.out, stage)
        begin, tokens = time.perf_counter(), 0
        sampler = self.sampler(jobs, params.max_new_tokens)
        part = self.out / f"{stage}.part{self.world.rank}.{time.time_ns()}.jsonl"
        pixels = [j.tokens.count(self.config.image_token_id) * 4 * 1176 * 4 for j in jobs]
        call = np.cumsum(pixels) // PIXEL_BYTES  # of the sampler, for each job
        with sampler.weights(), open(part, "w", encoding="utf-8", newline="\n") as file:
            for _, numbers in groupby(range(len(jobs)), key=lambda i: call[i]):
                some = [jobs[i] for i in numbers]

                def store(completion: Completion, some: list[Job] = some) -> None:
                    file.write(self.to_sample(some[completion.prompt_index], completion).to_json())
                    file.flush()

                images = [
                    data.load_images(j.problem.get("images") or [], self.images) for j in some
                ]
                prompts = [data.Prompt(j.tokens, *image) for j, image in zip(some, images)]
                how = dict(sample_ids=[j.seed for j in some], progress=self.world.is_main)
                sampler.generate(prompts, params, on_finish=store, **how)
                tokens += sampler.stats["decode_tokens"]
        sampler.release()
        tokens, seconds = sum(all_gather_objects(tokens)), time.perf_counter() - begin
        if self.world.is_main:  # and every rank has written
            print(f"{tokens:.0f} tokens, {tokens / seconds:.0f} a second", flush=True)
        return load_rows(self.out, stage)

    def to_sample(self, job: Job, completion: Completion) -> Sample:
        """A completion as it is stored, before it is graded."""
        if job.head:
            completion.sample_index = job.sample
            completion.tokens = [*job.head, *completion.tokens]
            completion.prompt_tokens -= len(job.head)
            completion.finish_reason = f"forced+{completion.finish_reason}"
            completion.forced_tokens = len(self.exit.tokens)
            completion.forced_at = len(job.head) - completion.forced_tokens
        prompt = data.prompt_text(job.problem, self.c.prompt_style)
        s = make_sample(job.problem, completion, self.tokenizer, prompt=prompt, seed=job.seed)
        s.logprobs = None
        return s

    def sample(self, problems: list[dict]) -> Rows:
        """All samples of `problems`; each rank samples its share of the missing. Collective."""
        rows, n, world = load_rows(self.out, "samples"), self.c.samples, self.world
        missing = [p for p in problems if any((p["id"], i) not in rows for i in range(n))]
        mine = missing[world.rank :: world.size]
        jobs = [Job(p, self.prompt(p), problem_seed(p)) for p in mine]
        return self.run("samples", jobs, self.params)

    def sample_budget(self, problems: list[dict], rows: Rows, budget: int) -> Rows:
        """The samples that a forced exit at `budget` would have changed. Up to there the tokens are
        those of the stored thought, so only the answers are generated. Collective."""
        stage, jobs = f"budget_{budget}", []
        have, mine = load_rows(self.out, stage), problems[self.world.rank :: self.world.size]
        pairs = [(p, rows[p["id"], i]) for p in mine for i in range(self.c.samples)]
        pairs = [(p, s) for p, s in pairs if (s.id, s.sample) not in have]
        thoughts = [s.tokens[: s.forced_at] for _, s in pairs]
        unfinished = [s.finish_reason == "length" for _, s in pairs]
        exit = replace(self.exit, budget=budget)
        starts = exit_positions(thoughts, unfinished, exit) if pairs else []
        for (p, s), at in zip(pairs, starts):
            if at is not None:
                head = [*s.tokens[:at].tolist(), *exit.tokens]
                seed = problem_seed(p, salt=budget * 1_000_003 + s.sample + 1)
                jobs.append(Job(p, [*self.prompt(p), *head], seed, s.sample, head))
        answer = {"n": 1, "max_new_tokens": exit.answer_budget, "forced_exit": None}
        return self.run(stage, jobs, replace(self.params, **answer))


def write_header(engine: Engine, problems: list[dict]) -> None:
    """Print and store what is needed to repeat the samples, with a prompt of each kind."""
    prompts = {}
    for p in problems:
        if p["kind"] not in prompts:
            text = engine.tokenizer.decode(engine.prompt(p))
            prompts[p["kind"]] = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>…", text)
    more = {"model": str(engine.dir), "settings": engine.settings, "prompts": prompts}
    write_json(engine.out / "header.json", header(world_size=engine.world.size, **more))
    print(f"{len(problems)} problems; {engine.settings}; prompts: {engine.out / 'header.json'}")


# --------------------------------------------------------------------------------- grades, results
def grading_rules(rule: str) -> dict:
    """The rule, and a hash of the code that decides what an answer is and which ones are equal."""
    digest = sha256()
    for file in [Path(rewards.__file__), *sorted(Path(grading.__file__).parent.glob("*.py"))]:
        digest.update(file.name.encode() + file.read_bytes())
    return {"rule": rule, "sha256": digest.hexdigest()}


def grade(c: Config, samples: list[Sample], problems: dict[str, dict], open_thought: bool) -> None:
    """Set reward, answer, status, why, and the reward under lenient extraction of each sample."""
    how = {"rule": c.rule, "open_thought": open_thought}
    with rewards.Grader(workers=c.graders, **how) as grader:
        futures = [grader.submit(problems[s.id], s.text, s.finish_reason) for s in samples]
        for s, future in zip(samples, futures):
            p = problems[s.id]
            set_grade(s, future.result())
            s.gold, s.task, s.lenient = p["answer"], p["task"], s.reward
            if s.status in ("no_answer", "truncated"):
                s.lenient = rewards.reward(p, s.text, s.finish_reason, lenient=True, **how).score


def score(
    c: Config, settings: dict, problems: list[dict], left_out: dict, stages: dict[str, Rows]
) -> dict:
    """Grade all samples; their metrics into OUT and onto stdout. For rank 0."""
    out, rows, n = Path(c.out), stages["samples"], settings["samples"]
    by_id, keys = {p["id"]: p for p in problems}, [(p["id"], i) for p in problems for i in range(n)]
    chosen = [s for stored in stages.values() for s in stored.values() if s.id in by_id]
    grade(c, chosen, by_id, settings["open_thought"])

    def groups(rows: Rows) -> list[list[Sample]]:
        return [[rows[p["id"], i] for i in range(n)] for p in problems]

    samples, once = groups(rows), {**settings, "samples": 1}  # no votes on the curve
    result = {"settings": settings, "rules": grading_rules(c.rule), "limit": c.limit, **left_out}
    result |= {"data": data_hashes(c.data), "sets": all_metrics(problems, samples, settings)}
    result |= {"compare": None, "budgets": {}}
    for stage in (s for s in stages if s != "samples"):
        points = all_metrics(problems, groups(rows | stages[stage]), once)
        result["budgets"][stage.removeprefix("budget_")] = points
    if c.compare:
        theirs = load_rows(Path(c.compare), "samples").values()
        result["compare"] = compare(problems, samples, theirs, c.compare)
    for stage, stored in stages.items():  # in the order of the problems, then what was left out
        ordered = {k: stored[k] for k in keys if k in stored} | stored
        write_samples(out / f"{stage}.jsonl", ordered.values())
        for part in out.glob(f"{stage}.part*.jsonl"):
            part.unlink()
    write_json(out / "result.json", result)
    solved = (p["id"] for p, group in zip(problems, samples) if all(s.reward == 1 for s in group))
    (out / "solved.txt").write_text("".join(f"{i}\n" for i in solved), encoding="utf-8")
    print(report(result), flush=True)
    return result


def evaluate(c: Config) -> dict | None:
    """Problems → samples → scores: sample what is missing, grade all, write and print the result.
    Returns it on rank 0."""
    world, out = init(c.device, timeout_minutes=24 * 60), Path(c.out)
    problems, left_out = choose_problems(c)
    model_dir = None if c.rescore else model.resolve_model_dir(c.model, world)
    settings, token = from_rank0(world, lambda: take_out(c, model_dir, world))
    assert_shared(out, token, world)
    problems = [without_images(p) for p in problems] if settings["blind"] else problems

    if c.rescore:
        stages = stored_stages(c, settings, problems)
    else:
        engine = Engine(c, settings, model_dir, world, any(p.get("images") for p in problems))
        if world.is_main:
            write_header(engine, problems)
        stages = {"samples": engine.sample(problems)}
        for b in c.budget_list:
            stages[f"budget_{b}"] = engine.sample_budget(problems, stages["samples"], b)

    return score(c, settings, problems, left_out, stages) if world.is_main else None


def main(argv: list[str] | None = None) -> None:
    with script():
        try:
            evaluate(parse_config(Config, __doc__, argv))
        except KeyboardInterrupt:
            print("stopped; the samples so far are stored: rerun to resume", file=sys.stderr)
            raise SystemExit(130) from None


if __name__ == "__main__":
    run_and_exit(main)
