"""How right, how fast and how safe is grading? Beside a brace-matched box with math-verify alone.

    python benchmarks/rewards.py compare [--data DIR]   # one table; DIR as XREASONER_TEST_DATA
    python benchmarks/rewards.py stress [--items 10000 --hanging 200 --deadline 1]

`compare` grades labelled rows, real outputs, changed and respelt golds, copied questions and
hostile answers, one row at a time, by both graders in worker processes with a deadline of 5 s.
Without --data only what the repository holds; copied questions and universal answers by ours only.
`stress` exits non-zero if an innocent answer among hanging ones is misgraded, a result is late, or
a process is left behind; also from a thread and after SIGKILL.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grading.extraction import last_boxed, tagged  # noqa: E402
from grading.notation import normalise, read_number, squash  # noqa: E402
from grading.workers import WorkerPool  # noqa: E402
from rewards import Grader  # noqa: E402

Row = tuple[dict, str, bool]  # problem, completion, is it right?
HOSTILE = [
    r"9^{9^{9^9}}", "99999999!", "(" * 2000 + "1" + ")" * 2000, r"\binom{10^8}{5*10^7}",
    r"(10^{9})!", r"{{2^{9999}}^{9999}}^{9999}", r"\int_0^\infty \frac{\sin(x^3)\ln x}{x^x+1} dx",
    r"\sum_{k=1}^{\infty}\frac{\sin(k^2)}{k}", r"\int_0^{1} e^{x^2}\sin(x^3) dx", r"(((10!)!)!)!",
    r"\sum_{n=1}^{10^9} n^n", "1 " * 100_000, "9" * 200_000, r"\int \sin(x^x)/x^{x^x} dx",
    r"x^{17}-x^5+\sin x+e^x=0", r"\gcd(10^{1000000},7^{1000000})",
    "+".join(f"x_{{{i}}}" for i in range(60)),
    r"\prod_{k=1}^{500} (x+k)", r"2^{10^9}", r"\sqrt[1000000]{2^{99999}}",
    "((((((((x+1)^9+1)^9+1)^9+1)^9",
    r"\frac{" * 30 + "1" + "}{2}" * 30, r"\sin(\sin(\sin(\sin(\sin(10^{50})))))",
    "e^{e^{e^{e^{10}}}}",
    r"\lim_{x\to 0}\frac{\sin^{9} x}{x^{9}}", "x" * 300, r"\sqrt{" * 20 + "2" + "}" * 20,
    r"(x+y+z+w)^{60}", r"\binom{500}{250}", "999!",
    r"\log_2(\log_2(\log_2(3^{3^{9}})))", "|" * 150 + "1",
]  # fmt: skip
UNIVERSAL = [
    "", "{}", "()", "[]", "|", "^", "&", "_", "=", r"\\", r"\boxed", r"\text{}", "x=x", "0=0",
    "1=1", r"\ne",
    r"\infty", "nan", "NaN", "None", "any", r"\text{any answer}", "the answer", "correct",
    "1.0=1", "x",
    r"x\approx x", r"\pm", "[-9999,9999]", r"(-\infty,\infty)", r"\mathbb{R}",
    "all of the above", "...",
    r"\ldots", "0,1,2,3,4,5,6,7,8,9", "answer", "y=y", r"\text{see above}", "1 or 2 or 3", "0/0",
]  # fmt: skip


def math_verify_alone(pred: str, gold: str) -> bool:
    """What most trainers call. Runs in a worker's main thread: its alarms work there."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(rf"$\boxed{{{pred}}}$")))


math_verify_alone.warm_up = lambda: math_verify_alone("x+1", "1+x")


# ------------------------------------------------------------------------------------------- rows
def boxed(pred: str, gold: str, right: bool, question: str = "") -> Row:
    return {"kind": "math", "answer": gold, "question": question}, rf"\boxed{{{pred}}}", right


def labelled(file: Path) -> list[Row]:
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [boxed(r["pred"], r["gold"], r["right"]) for r in rows]


def development(file: Path) -> dict[str, list[Row]]:
    """Rows of public graders' test suites by kind; choices are graded by the "line" rule there."""
    sets: dict[str, list[Row]] = {"dev: bare math": [], "dev: whole text": [], "dev: attacks": []}
    for r in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        kind, problem = r["kind"], {"kind": "math", "answer": r["gold"], "box": True}
        if kind.endswith("mcq"):
            continue
        name = {"math": "bare math", "text": "whole text"}.get(kind, "attacks")
        whole = kind == "text" or (kind != "math" and r"\boxed" in r["pred"])
        text = r["pred"] if whole else rf"\boxed{{{r['pred']}}}"
        right = r.get("expected_boxed_only", r["expected"]) if kind == "text" else r["expected"]
        sets[f"dev: {name}"].append((problem, text, right))
    return sets


WRONG = {r"54^\circ", "98", "57", "19"}  # golds of the real outputs that some answers miss


def real_outputs(data: Path) -> list[Row]:
    """5,263 outputs of two models. Right: equal but for spaces and sizes, or read by hand."""

    def plain(text: str) -> str:
        return re.sub(r"\s|\\left|\\right|\\,|\\!|(?<=\\)[dt](?=frac)", "", text)

    rows = []
    for name, gold in (
        ("r1zero_format_sft_1767", "ground_truth"),
        ("gpt_oss_120b_math_minus_math500", "expected_answer"),
    ):
        for r in map(json.loads, (data / f"math_short_cot/{name}.jsonl").open(encoding="utf-8")):
            text = r.get("response") or rf"\boxed{{{r['extracted_answer']}}}"
            question = r.get("problem") or r["prompt"]
            answer = tagged(text.rpartition("</think>")[2]) or last_boxed(text) or ""
            right = plain(answer) == plain(r[gold]) or not (
                r[gold] in WRONG or answer.startswith("tag was")
            )
            rows.append(({"kind": "math", "answer": r[gold], "question": question}, text, right))
    return rows


def golds(data: Path) -> list[tuple[str, str, str]]:
    """(source, question, gold) of MATH-500, Orz and MATH's other 7,500."""
    orz = json.loads((data / "orz/orz_math_57k_head1967.json").read_text())
    found = [("orz", x[0]["value"], x[1]["ground_truth"]["value"].strip()) for x in orz]
    for source, name in (("math500", "math500_test"), ("math", "math_train_minus_math500")):
        for r in map(json.loads, (data / f"math/{name}.jsonl").open(encoding="utf-8")):
            found.append((source, r["problem"], r["answer"]))
    return found


def changed(gold: str, rng: random.Random) -> str | None:
    """One digit or one sign changed, so that it can't be equal."""
    spots = [m for m in re.finditer(r"\d|(?<=[\w}) ])[+-](?=[\w\\( ])|^-", gold)]
    if not spots or "\\pm" in gold or "mbox" in gold:
        return None
    m = rng.choice(spots)
    new = {"+": "-", "-": "+"}.get(m[0]) or str((int(m[0]) + rng.randrange(1, 9)) % 10)
    return gold[: m.start()] + new + gold[m.end() :]


def respelt(gold: str, rng: random.Random) -> str:
    """The same answer in two of the ways in which models write it differently."""
    number = read_number(normalise(gold))
    ways = [
        lambda t: t.replace(r"\dfrac", r"\frac").replace(r"\frac", r"\dfrac"),
        lambda t: re.sub(r"\\d?frac\{(\d+)\}\{(\d+)\}$", r"\1/\2", t),
        lambda t: t.replace(r"\left", "").replace(r"\right", ""),
        lambda t: re.sub(r"(?<=[\w})])([+-])(?=[\w\\(])", r" \1 ", t),
        lambda t: re.sub(
            r"^(\w+|\d*\\sqrt\{?\d+\}?) ?\+ ?(\w+|\d*\\sqrt\{?\d+\}?)$", r"\2 + \1", t
        ),
        lambda t: f"x = {t}" if number else t,
        lambda t: rf"\({t}\)",
        lambda t: re.sub(r"\^\{?\\circ\}?", " degrees", t),
        lambda t: (
            re.sub(r"\\sqrt\{(\d+)\}", r"\\sqrt\1", t) if not re.search(r"\\sqrt\{\d\d", t) else t
        ),
        lambda t: f"{t}.0" if re.fullmatch(r"-?\d{1,6}", t) else t,
        lambda t: re.sub(r"\\text\{(\w{4,})\}$", r"\1", t),
        lambda t: f"{int(t):,}" if re.fullmatch(r"\d{4,9}", t) else t,
        lambda t: re.sub(r"^\\frac\{([a-z])\}\{(\d+)\}$", r"\\frac{1}{\2}\1", t),
    ]
    rng.shuffle(ways)
    text, done = gold, 0
    for way in ways:
        new = way(text)
        done += new != text
        text = new
        if done == 2:
            break
    return text


def build(data: Path | None) -> dict[str, list[Row]]:
    """Name → rows. Random choices are seeded: the same rows every time."""
    rng = random.Random(0)
    sets = {"labelled forms of models": labelled(ROOT / "tests/data/answers.jsonl")}
    sets["unseen when the rules were made"] = labelled(ROOT / "tests/data/unseen.jsonl")
    sets["hostile"] = [boxed(h, r"\sqrt{2}+1", False) for h in HOSTILE]
    if data is None:
        return sets
    everything = golds(data)
    sets = development(data / "rewards_dev.jsonl") | sets | {"real outputs": real_outputs(data)}
    rich = [g for _, _, g in everything if not re.fullmatch(r"-?\d{1,2}", g)]
    rng.shuffle(rich)
    bad = [(c, g) for g in rich if (c := changed(g, rng)) and squash(c) != squash(g)]
    good = [(r, g) for g in rich if (r := respelt(g, rng)) != g]
    sets["golds, a digit or sign changed"] = [boxed(c, g, False) for c, g in bad[:2000]]
    sets["golds respelt"] = [boxed(r, g, True) for r, g in good[:600]]
    for source in ("math500", "orz"):
        sets[f"copied question: {source}"] = copied([x for x in everything if x[0] == source])
    sample = rng.sample([g for s, _, g in everything if s == "math500"], 100)
    sets["universal answers"] = [
        boxed(u, g, False)
        for g in sample
        for u in UNIVERSAL
        if squash(normalise(u)) != squash(normalise(g))
    ]
    return sets


def copied(problems: list[tuple[str, str, str]]) -> list[Row]:
    """Every $…$ span of the question as answer, if it isn't the gold as a string or number."""
    rows = []
    for _, question, gold in problems:
        spans = re.findall(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", question, re.S)
        for span in {next(filter(None, s)).strip() for s in spans}:
            a, b = normalise(span), normalise(gold)
            numbers = read_number(a), read_number(b)
            same = squash(a) == squash(b) or (all(numbers) and numbers[0] == numbers[1])
            if span and not same:
                rows.append(boxed(span, gold, False, question))
    return rows


# ---------------------------------------------------------------------------------------- compare
def grade(rows: list[Row], submit) -> tuple[list[bool], list[float], int]:
    """Verdicts, milliseconds of each row, and how many were killed at the deadline."""
    verdicts, times, kills = [], [], 0
    for problem, text, _ in rows:
        begin = time.perf_counter()
        right, killed = submit(problem, text)
        times.append(1e3 * (time.perf_counter() - begin))
        verdicts.append(right)
        kills += killed
    return verdicts, times, kills


def compare(data: Path | None, shown: int, both: bool) -> None:
    sets, here = build(data), []
    head = f"{'rows':>6}{'agree':>8}{'FP':>6}{'FN':>6}{'median ms':>11}"
    head += f"{'p99':>9}{'max':>9}{'kills':>7}"
    print(f"{'set':32}{'grader':14}{head}")
    with (
        Grader(workers=1, deadline=5) as grader,
        WorkerPool(f"{__file__}:math_verify_alone", workers=1, deadline=5) as pool,
    ):

        def ours(problem: dict, text: str) -> tuple[bool, bool]:
            grader.how = {"rule": "boxed" if problem.get("box") else "answer"}
            future = grader.submit(problem, text)
            here.append(future.done())
            got = future.result()
            return got.score > 0, got.status == "timeout"

        def alone(problem: dict, text: str) -> tuple[bool, bool]:
            body = text.rpartition("</think>")[2]
            answer = (None if problem.get("box") else tagged(body)) or last_boxed(body)
            if not answer:
                return False, False
            outcome = pool.submit(answer, problem["answer"]).result()
            return bool(outcome.value), outcome.status == "timeout"

        for name, rows in sets.items():
            alone_too = both and not name.startswith(("copied", "universal"))
            for who, submit in (("ours", ours), ("math-verify", alone))[: 1 + alone_too]:
                verdicts, times, kills = grade(rows, submit)
                wrong = [(row, v) for row, v in zip(rows, verdicts) if v != row[2]]
                positive = sum(v for _, v in wrong)
                times.sort()
                cells = f"{1 - len(wrong) / len(rows):8.1%}{positive:6}{len(wrong) - positive:6}"
                p99 = times[int(0.99 * (len(times) - 1))]
                cells += f"{statistics.median(times):11.2f}{p99:9.1f}{times[-1]:9.1f}{kills:7}"
                print(f"{name:32}{who:14}{len(rows):6}{cells}", flush=True)
                if name.startswith("copied"):
                    questions = {row[0]["question"] for row, v in wrong}
                    print(f"{'':32}  problems where a copy pays: {len(questions)}")
                for (problem, text, right), _ in wrong[:shown] if who == "ours" else ():
                    print(f"    should be {right}: {text[-90:]!r} | {problem['answer'][:60]!r}")
        print(f"settled without a worker: {sum(here)} of {len(here)}")


# ----------------------------------------------------------------------------------------- stress
def jobs_for_stress(items: int, hanging: int) -> list[Row]:
    """Innocent answers, half of them wrong, with the hostile ones spread among them."""
    rng, jobs = random.Random(0), []
    latex = [
        r"\frac{1}{2}",
        r"2\sqrt{3}",
        "x^2-1",
        r"(2, \infty)",
        r"\{1,2,3\}",
        r"\frac{n(n+1)}{2}",
    ]
    for i in range(items - hanging):
        gold = rng.choice(latex) if i % 3 == 0 else str(rng.randrange(10**6))
        wrong = f"{int(gold) + 1}" if gold.isdigit() else f"{gold}+17"
        jobs.append(boxed(wrong if i % 2 else gold.replace("frac", "dfrac"), gold, i % 2 == 0))
    for i in range(hanging):
        at = rng.randrange(len(jobs))
        jobs.insert(at, boxed(HOSTILE[i % len(HOSTILE)], r"\sqrt{2}+1", False))
        if i % 50 == 0:
            jobs.insert(at, ({"answer": "3"}, "x" * 10_000_000 + r"\boxed{4}", False))
    return jobs


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stress_once(jobs: list[Row], deadline: float, out: dict) -> None:
    seen, begin = set(), time.monotonic()
    taken = []  # seconds from the taking of an item to its result, kill included
    with Grader(workers=2, deadline=deadline, memory_gb=2) as grader:
        submit = grader.pool.submit

        def timed(*args):
            future = submit(*args)
            future.add_done_callback(lambda done: taken.append(done.result().seconds))
            return future

        grader.pool.submit = timed
        futures = [grader.submit(problem, text) for problem, text, _ in jobs]
        while not all(f.done() for f in futures):
            seen.update(grader.pool.pids())
            time.sleep(0.2)
        scores = [f.result().score for f in futures]
        out.update(kills=grader.pool.kills, longest=round(max(taken), 2))
    out["misses"] = sum((s > 0) != right for s, (*_, right) in zip(scores, jobs))
    out["seconds"] = round(time.monotonic() - begin, 1)
    out["left_behind"] = sum(map(alive, seen))
    out["parent_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    out["late"] = out["longest"] > deadline + 1


def stress(items: int, hanging: int, deadline: float) -> int:
    """0 if every run graded all innocents right, in time, and left nothing behind."""
    jobs, runs = jobs_for_stress(items, hanging), ({}, {})
    stress_once(jobs, deadline, runs[0])
    print("main thread ", runs[0])
    args = (jobs[: len(jobs) // 10], deadline, runs[1])
    thread = threading.Thread(target=stress_once, args=args)
    thread.start()
    thread.join()
    print("other thread", runs[1])
    code = (
        "import time, sys; sys.path.insert(0, '.')\nfrom grading.workers import WorkerPool\n"
        "p = WorkerPool('time:sleep', workers=2, deadline=1000); p.submit(999)\n"
        "time.sleep(1); print(*p.pids(), flush=True); time.sleep(1000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    pids = [int(p) for p in parent.stdout.readline().split()]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    time.sleep(1)
    left = sum(map(alive, pids))
    print(f"parent killed: {len(pids)} workers, left behind after 1 s: {left}")
    bad = any(r["misses"] or r["late"] or r["left_behind"] for r in runs)
    return int(bool(bad or left or len(pids) != 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("compare", "stress"))
    parser.add_argument("--data", type=Path, default=os.environ.get("XREASONER_TEST_DATA"))
    parser.add_argument("--show", type=int, default=0, help="print so many misses of ours a set")
    parser.add_argument("--ours", action="store_true", help="leave math-verify alone out")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--hanging", type=int, default=200)
    parser.add_argument("--deadline", type=float, default=1.0)
    args = parser.parse_args()
    if args.what == "stress":
        raise SystemExit(stress(args.items, args.hanging, args.deadline))
    compare(Path(args.data) if args.data else None, args.show, not args.ours)


if __name__ == "__main__":
    main()
