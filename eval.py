"""Evaluate a model on flat jsonl problems, text and image, by the rule that rewards training.

torchrun --nproc_per_node=8 eval.py --model DIR --data mmmu.jsonl gsm8k.jsonl --out runs/eval/base
python eval.py … --samples 5 --temperature 0.3    avg@5, maj@5, pass@5: the second protocol
python eval.py … --budgets 512 1024 2048          accuracy by thinking budget, from stored samples
python eval.py … --blind --samples 3 --temperature 0.3    no images; OUT/solved.txt: always solved
python eval.py --data … --out OUT --rescore [--compare OTHER]     grade again, without a model
python eval.py … --drop BLIND/solved.txt          without the text-solvable problems

OUT/samples.jsonl    one line a sample: prompt, text, answer, gold, reward, tokens (core/samples.py)
OUT/result.json      all metrics
OUT/header.json      command, versions, commit, settings, the whole prompt of each kind of problem
OUT/solved.txt       ids of the problems whose samples are all right
OUT/budget_N.jsonl   the samples that a forced exit after N tokens would have changed

Each rank writes a sample of its share to disk as soon as it ends, so a stopped evaluation resumes
when you rerun it; then rank 0 grades all. A sample depends on (seed, problem, sample index), not on
ranks or batches, up to the rounding of matrix products of another size.

The defaults are the paper's protocol (arXiv 2505.03981, section 3, appendix C, and its model card);
results/README.md says what we took where it is silent.
"""

from __future__ import annotations

import re
import time
from dataclasses import MISSING, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple, Sequence, TextIO

import numpy as np

import data
import grading
import model
import rewards
from core import run
from core.chat import banned_token_ids, opens_thought, stop_token_ids
from core.files import hash_files, write_json
from core.images import ImageConfig, ImageLoader
from core.options import DATA, MEMORY, OBJECTIVE, RUN, SAMPLING, parse_config
from core.parallel import World, all_any, all_max, barrier, from_rank0, init
from core.plan import compute_dtype
from core.samples import Sample, make_sample, problem_seed, read_samples, set_grade, write_samples
from core.slots import ForcedExit, exit_positions
from sampler import Completion, Sampler, SamplingParams
from scoring.metrics import all_metrics, cluster, compare, positions
from scoring.tables import read_result, report

IMAGE_TOKENS = 200_000  # of one call of the sampler: 4 patches of 1,176 fp32 values each, 3.8 GB
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
    prompt_style: Literal["kind", *data.INSTRUCTIONS] = DATA("kind", "kind: by kind of problem")
    min_pixels: int = DATA(262_144, "scale images up to this; 0: model's", ge=0)
    max_pixels: int = DATA(262_144, "scale images down to this; 0: model's", ge=0)
    rule: Literal[rewards.RULES] = OBJECTIVE("answer", "where the answer stands; line: 'Answer: X'")
    rescore: bool = OBJECTIVE(False, "grade stored samples, sample nothing")
    budgets: list[int] = OBJECTIVE([], "thinking budgets, as in 512 1024 2048")
    compare: str = OBJECTIVE("", "another --out: this minus the other")
    samples: int = SAMPLING(1, "per problem (paper: 1, and 5)", ge=1, le=1024)
    temperature: float = SAMPLING(0.0, "paper: 0, and 0.3 for 5", ge=0, le=10)
    top_p: float = SAMPLING(1.0, "nucleus sampling", gt=0, le=1)
    max_new_tokens: int = SAMPLING(4096, "answer included (paper: 4096)", ge=1)
    think_budget: int = SAMPLING(3800, "force </think> here (paper: at 4096); 0: never", ge=0)
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
        if self.rescore and self.budgets:
            raise ValueError("--rescore grades all budgets in --out; leave out --budgets")
        longest = self.think_budget or self.max_new_tokens
        if wrong := [b for b in self.budgets if not 0 < b <= longest]:
            raise ValueError(f"--budgets {wrong[0]}: must be from 1 to {longest} tokens")


SAMPLES_DEPEND_ON = "samples temperature top_p max_new_tokens think_budget answer_budget".split()
SAMPLES_DEPEND_ON += "seed prompt_style min_pixels max_pixels blind".split()


# ---------------------------------------------------------------------------------------- problems
def choose_problems(c: Config) -> tuple[list[dict], dict]:
    """The problems to evaluate, in the order of the files, and how many rows were left out. Raises
    ValueError for bad rows and a --drop file without effect."""
    problems, faults = data.load_problems(c.data, skip_bad_rows=c.skip_bad_rows)
    left_out = {"bad_rows": len({(f.file, f.line) for f in faults}), "dropped": 0}
    if c.limit:  # before --drop, so that runs with and without it choose the same problems
        by_hash = sorted(problems, key=lambda p: sha256(p["id"].encode()).digest())
        tasks = positions(by_hash, "task").values()
        ids = {by_hash[i]["id"] for at in tasks for i in at[: c.limit]}
        problems = [p for p in problems if p["id"] in ids]
    if c.drop:
        if not Path(c.drop).is_file():
            raise ValueError(f"--drop {c.drop}: no such file")
        ids = set(Path(c.drop).read_text(encoding="utf-8").splitlines())
        kept = [p for p in problems if p["id"] not in ids]
        left_out["dropped"] = len(problems) - len(kept)
        if not kept or (ids and len(kept) == len(problems)):
            raise ValueError(f"--drop {c.drop}: leaves {len(kept)} of {len(problems)}; wrong file?")
        problems = kept
    return problems, left_out


def without_images(problem: dict) -> dict:
    """The problem without its images and their markers; its cluster stays that of the image."""
    texts = problem["question"], *(problem.get("options") or ())
    question, *options = (re.sub(r"<image>\n?", "", text) for text in texts)
    meta = {**(problem.get("meta") or {}), "cluster": cluster(problem)}
    return {**problem, "question": question, "options": options, "images": [], "meta": meta}


# --------------------------------------------------------------------------------------------- OUT
def hashes(files: list[str | Path]) -> list[list[str]]:
    """[[name, sha256], …]"""
    return [[Path(file).name, digest] for file, digest in hash_files(files).items()]


def take_out(c: Config, model_dir: Path | None, world: World) -> tuple[dict, str]:
    """The settings of this evaluation (with --rescore, those in OUT), and the lock on OUT. Raises
    ValueError, with nothing changed, where OUT holds anything else or is in use. For rank 0."""
    out, settings = Path(c.out), {k: getattr(c, k) for k in SAMPLES_DEPEND_ON}
    if c.rescore:
        if not (old := run.stored_settings(out, "eval")):
            raise ValueError(f"--rescore: {out} holds no samples; run it with --model first")
        for k, now in settings.items():
            if now not in (getattr(Config, k), old[k]):
                raise ValueError(f"--rescore: the {k} of {out} is {old[k]!r}, not {now!r}")
        settings = {k: v for k, v in old.items() if k != "script"}
    else:
        endings = (".json", ".jinja", ".txt", ".safetensors")
        files = sorted(f for f in model_dir.iterdir() if f.suffix in endings)
        by_device = "bf16" if world.device.type == "cuda" else "fp32"
        settings |= {
            "dtype": by_device if c.dtype == "auto" else c.dtype,
            "open_thought": opens_thought(data.load_tokenizer(model_dir)),
            "model": c.model,
            "limit": c.limit,
            "model_sha256": sha256(str(hashes(files)).encode()).hexdigest(),
            "data_sha256": hashes(c.data),
        }
    # a model may move; its hash may not change
    return settings, run.claim(out, "eval", settings, ("model", "limit"))[1]


def load_rows(out: Path, stage: str) -> Rows:
    """The samples of OUT/STAGE.jsonl and of the parts that ranks wrote."""
    rows: Rows = {}
    for file in [*out.glob(f"{stage}.jsonl"), *sorted(out.glob(f"{stage}.part*.jsonl"))]:
        for s in read_samples(file, truncated_end=".part" in file.name):
            s.tokens = np.array(s.tokens, np.int32)  # a fifth of a list's memory
            rows.setdefault((s.id, s.sample), s)
    return rows


def stored_stages(c: Config, settings: dict, problems: list[dict]) -> dict[str, Rows]:
    """What --rescore grades: all samples and budgets in OUT. Raises ValueError unless it holds
    every sample, of the questions as they are now."""
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
    stages = (f"budget_{b}" for b in sorted(int(name) for name in names if name.isdigit()))
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
    """Samples this rank's share of the problems; loads the weights when the first sample is due."""

    def __init__(self, c: Config, settings: dict, model_dir: Path, world: World, problems: list):
        self.c, self.settings, self.dir, self.world = c, settings, model_dir, world
        self.out, self.sampler, self.images = Path(c.out), None, None
        self.tokenizer = data.load_tokenizer(model_dir)
        self.config = config = model.ModelConfig.from_dir(model_dir)
        if config.vision and any(p.get("images") for p in problems):
            own = ImageConfig.from_dir(model_dir)
            low, high = c.min_pixels or own.min_pixels, c.max_pixels or own.max_pixels
            self.images = replace(own, min_pixels=low, max_pixels=high)
        limits = config.vocab_size, c.think_budget, c.answer_budget
        self.exit = ForcedExit.from_tokenizer(self.tokenizer, *limits)
        self.params = SamplingParams(
            n=c.samples, temperature=c.temperature, top_p=c.top_p, seed=c.seed,
            max_new_tokens=c.max_new_tokens, stop_ids=stop_token_ids(self.tokenizer),
            forced_exit=self.exit if c.think_budget else None,
        )  # fmt: skip
        prompt = self.tokenizer, self.images, c.prompt_style
        self.prompt = lambda problem: data.prompt_tokens(problem, *prompt)
        self.mine = problems[world.rank :: world.size]
        self.prompts = {p["id"]: self.prompt(p) for p in self.mine}
        longest = int(all_max(max(map(len, self.prompts.values()), default=0))[0])
        # an exit waits while the model is closing its thought by itself
        after = len(self.exit.close_table) - 1 + len(self.exit.tokens) + c.answer_budget
        new = max([c.max_new_tokens, *(budget + after for budget in c.budgets)])
        self.max_len = config.room_for(longest, new)

    def load(self) -> Sampler:
        """The model in a sampler with room for the longest prompt. Collective."""
        c, on_gpu = self.c, self.world.device.type == "cuda"
        dtype = compute_dtype(c.dtype, on_gpu)
        how = dict(compute_dtype=dtype, master_dtype=dtype, with_vision=self.images is not None)
        loaded = model.build_model(self.dir, self.world, **how)
        loaded.set_banned_ids(banned_token_ids(self.tokenizer, self.config.vocab_size))
        rows = 1 if on_gpu else 16  # results don't depend on the batch
        memory = dict(slots=c.slots or None, kv_gb=c.kv_gb or None, min_rows=rows)
        return Sampler(loaded, max_len=self.max_len, **memory)

    def run_jobs(self, stage: str, jobs: list[Job], params: SamplingParams) -> Rows:
        """Sample this rank's jobs into a new part of OUT/STAGE; returns the samples that all ranks
        have now. Collective."""
        if all_any(bool(jobs)):
            self.sampler = self.sampler or self.load()
            part = self.out / f"{stage}.part{self.world.rank}.{time.time_ns()}.jsonl"
            sizes = [j.tokens.count(self.config.image_token_id) for j in jobs]
            calls = np.cumsum(sizes) // IMAGE_TOKENS
            with self.sampler.weights(), open(part, "w", encoding="utf-8", newline="\n") as file:
                for call in np.unique(calls):
                    self.generate([j for j, at in zip(jobs, calls) if at == call], params, file)
            barrier()  # every rank has written
        return load_rows(self.out, stage)

    def generate(self, jobs: list[Job], params: SamplingParams, file: TextIO) -> None:
        """Sample `jobs` in one call; a line of `file` each, as soon as it ends."""

        def store(completion: Completion) -> None:
            job, completion.logprobs = jobs[completion.prompt_index], None
            if job.head:
                completion.sample_index = job.sample
                completion.tokens = [*job.head, *completion.tokens]
                completion.prompt_tokens -= len(job.head)
                completion.finish_reason = f"forced+{completion.finish_reason}"
                completion.forced_tokens = len(self.exit.tokens)
                completion.forced_at = len(job.head) - completion.forced_tokens
            how = dict(prompt=data.prompt_text(job.problem, self.c.prompt_style), seed=job.seed)
            file.write(make_sample(job.problem, completion, self.tokenizer, **how).to_json())
            file.flush()

        images = ImageLoader(self.images)([j.problem.get("images") or [] for j in jobs])
        prompts = [data.Prompt(j.tokens, *loaded) for j, loaded in zip(jobs, images)]
        how = dict(sample_ids=[j.seed for j in jobs], progress=self.world.is_main)
        self.sampler.generate(prompts, params, on_finish=store, **how)

    def sample(self) -> Rows:
        """All samples of all problems; those in OUT are not sampled again. Collective."""
        rows, n = load_rows(self.out, "samples"), range(self.c.samples)
        missing = [p for p in self.mine if any((p["id"], i) not in rows for i in n)]
        jobs = [Job(p, self.prompts[p["id"]], problem_seed(p)) for p in missing]
        return self.run_jobs("samples", jobs, self.params)

    def sample_budget(self, rows: Rows, budget: int) -> Rows:
        """The samples that a forced exit at `budget` would have changed. Up to there the tokens are
        those of the stored thought, so only the answers are generated. Collective."""
        stage, exit, jobs = f"budget_{budget}", replace(self.exit, budget=budget), []
        have, keys = load_rows(self.out, stage), range(self.c.samples)
        pairs = [(p, rows[p["id"], i]) for p in self.mine for i in keys if (p["id"], i) not in have]
        thoughts = [s.tokens[: s.forced_at] for _, s in pairs]
        unfinished = [s.finish_reason == "length" for _, s in pairs]
        starts = exit_positions(thoughts, unfinished, exit) if pairs else []
        for (p, s), at in zip(pairs, starts):
            if at is not None:
                head = [*s.tokens[:at].tolist(), *exit.tokens]
                seed = problem_seed(p, salt=budget * 1_000_003 + s.sample + 1)
                jobs.append(Job(p, [*self.prompts[p["id"]], *head], seed, s.sample, head))
        answer = {"n": 1, "max_new_tokens": exit.answer_budget, "forced_exit": None}
        return self.run_jobs(stage, jobs, replace(self.params, **answer))


def write_header(engine: Engine, problems: list[dict]) -> None:
    """Say how the samples are made; store what repeats them, with a prompt of each kind."""
    s, prompts, file = engine.settings, {}, engine.out / "header.json"
    for p in {p["kind"]: p for p in reversed(problems)}.values():  # the first of each kind
        text = engine.tokenizer.decode(engine.prompt(p))
        prompts[p["kind"]] = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>…", text)
    more = {"model": str(engine.dir), "settings": s, "prompts": prompts}
    write_json(file, run.header(world_size=engine.world.size, **more))
    exit = f"forced exit after {s['think_budget']}" if s["think_budget"] else "no forced exit"
    exit += ", images removed" * s["blind"]
    how = f"{s['samples']} sample(s) each at temperature {s['temperature']}, {exit}"
    print(f"{len(problems)} problem(s), {how}, at most {s['max_new_tokens']} tokens; see {file}")


# --------------------------------------------------------------------------------- grades, results
def grading_rules(rule: str) -> dict:
    """The rule, and a hash of the code that decides what an answer is and which ones are equal."""
    files = [rewards.__file__, *sorted(Path(grading.__file__).parent.glob("*.py"))]
    return {"rule": rule, "sha256": sha256(str(hashes(files)).encode()).hexdigest()}


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


def score(c: Config, settings: dict, problems: list, left_out: dict, stages: dict) -> dict:
    """Grade all samples; their metrics into OUT and onto stdout. For rank 0."""
    out, rows, n = Path(c.out), stages["samples"], settings["samples"]
    by_id, keys = {p["id"]: p for p in problems}, [(p["id"], i) for p in problems for i in range(n)]
    chosen = [s for stored in stages.values() for s in stored.values() if s.id in by_id]
    grade(c, chosen, by_id, settings["open_thought"])

    def groups(rows: Rows) -> list[list[Sample]]:
        return [[rows[p["id"], i] for i in range(n)] for p in problems]

    samples, once = groups(rows), {**settings, "samples": 1}  # no votes on the curve
    result = {"settings": settings, "rules": grading_rules(c.rule), "limit": c.limit, **left_out}
    result |= {"data": hashes(c.data), "sets": all_metrics(problems, samples, settings)}
    result |= {"compare": None, "budgets": {}}
    for stage, stored in stages.items():
        if stage != "samples":
            points = all_metrics(problems, groups(rows | stored), once)
            result["budgets"][stage.removeprefix("budget_")] = points
        # in the order of the problems, then what --limit and --drop leave out
        ordered = {k: stored[k] for k in keys if k in stored} | stored
        write_samples(out / f"{stage}.jsonl", ordered.values())
        for part in out.glob(f"{stage}.part*.jsonl"):
            part.unlink()
    if c.compare:
        theirs = load_rows(Path(c.compare), "samples").values()
        result["compare"] = compare(problems, samples, theirs, c.compare)
    write_json(out / "result.json", result)
    solved = (p["id"] for p, group in zip(problems, samples) if all(s.reward == 1 for s in group))
    (out / "solved.txt").write_text("".join(f"{i}\n" for i in solved), encoding="utf-8")
    print(report(result), flush=True)
    return result


def evaluate(c: Config) -> dict | None:
    """Sample what is missing, grade all, write and print the result; returns it on rank 0."""
    world, out = init(c.device, timeout_minutes=24 * 60), Path(c.out)
    problems, left_out = choose_problems(c)
    model_dir = None if c.rescore else model.resolve_model_dir(c.model, world)
    settings, token = from_rank0(world, lambda: take_out(c, model_dir, world))
    run.assert_shared(out, token, world)
    problems = [without_images(p) for p in problems] if settings["blind"] else problems
    if c.rescore:
        stages = stored_stages(c, settings, problems)
    else:
        engine = Engine(c, settings, model_dir, world, problems)
        if world.is_main:
            write_header(engine, problems)
        stages = {"samples": engine.sample()}
        for b in sorted(set(c.budgets)):
            stages[f"budget_{b}"] = engine.sample_budget(stages["samples"], b)
    return score(c, settings, problems, left_out, stages) if world.is_main else None


def main(argv: list[str] | None = None) -> None:
    with run.script():
        evaluate(parse_config(Config, __doc__, argv))


if __name__ == "__main__":
    run.run_and_exit(main)
