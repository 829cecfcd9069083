"""How fast and how safe is grading? Beside math-verify alone, what a user would pick instead.

    python benchmarks/rewards.py speed [--golds FILE.jsonl]    # ms per answer: integers, letters, LaTeX
    python benchmarks/rewards.py stress [--items 10000 --hanging 200 --deadline 1]    # exits non-zero on a miss

`speed` grades each gold (field "answer" or "gold" of the rows; a built-in mix without a file) against itself
respelled and against another gold. `stress` runs the same load three times: from the main thread, from another
thread, and in a process that is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grading.equality import quick_equal  # noqa: E402
from rewards import Grader, reward  # noqa: E402

LATEX = [
    r"\frac{1}{2}",
    r"2\sqrt{3}",
    r"\frac{\pi}{4}",
    r"x^2-1",
    r"(2, \infty)",
    r"\{1,2,3\}",
    r"3 \pm 2\sqrt{2}",
    r"2^{n-1}",
    r"\frac{n(n+1)}{2}",
    r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
    r"5x - 7y + 11z + 4 = 0",
    r"\left( 3, \frac{\pi}{2} \right)",
    "y = 2x + 3",
    r"1 - \frac{1}{e}",
    r"11 \sqrt{5} + 11",
    r"\frac{11+9a}{20}",
    r"x^5 - x^4 + x^3 - 1",
    r"(0,9) \cup (9,36)",
    r"6 - 5i",
    r"\frac{448}{15625}",
]
HOSTILE = [
    r"9^{9^{9^9}}",
    "99999999!",
    "(" * 2000 + "1" + ")" * 2000,
    r"\binom{10^8}{5*10^7}",
    r"(10^{9})!",
    r"{{2^{9999}}^{9999}}^{9999}",
    r"\int_0^\infty \frac{\sin(x^3)\ln x}{x^x+1} dx",
    r"\sum_{k=1}^{\infty}\frac{\sin(k^2)}{k}",
    r"\int_0^{1} e^{x^2}\sin(x^3) dx",
    "MEGABYTES",
    r"(((10!)!)!)!",
    r"\sum_{n=1}^{10^9} n^n",
    "1 " * 100_000,
    "9" * 200_000,
    r"\int \sin(x^x)/x^{x^x} dx",
]


def respell(text: str) -> str:
    """The same answer, not the same string: the identity path must not flatter us. Spellings that math-verify knows."""
    text = (
        text.replace(r"\frac", r"\dfrac")
        .replace("+", " + ")
        .replace("-", " - ")
        .replace(r"\sqrt2", r"\sqrt{2}")
    )
    return text.replace(r"\left", "").replace(r"\right", "")


def milliseconds(grade, jobs: list[tuple]) -> tuple[list[float], int]:
    times, right = [], 0
    for *job, expected in jobs:
        begin = time.perf_counter()
        right += bool(grade(*job)) == expected
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times), right


def report(name: str, times: list[float], right: int) -> None:
    n = len(times)
    print(
        f"{name:44}{n:7}{times[n // 2]:11.4f}{times[int(0.99 * (n - 1))]:10.3f}{times[-1]:10.2f}"
        f"{sum(times) / n:10.3f}{right / n:9.1%}"
    )


def speed(golds: list[str]) -> None:
    """Median, p99, max, mean ms of one answer at a time, and the share graded right."""
    from math_verify import parse, verify

    shuffled = golds[:]
    random.Random(0).shuffle(shuffled)
    whole = [g for g in golds if re.fullmatch(r"\s*-?\d+\s*", g)] or [
        str(i) for i in range(-100, 900)
    ]
    others = [g for g in golds if not re.fullmatch(r"\s*-?[\d,]+\s*", g)]
    wrong = [
        (a, b)
        for a, b in zip(shuffled, golds)
        if a.strip() != b.strip() and not re.fullmatch(r"\s*-?[\d,]+\s*", b)
    ]
    sets = {
        "integers": [(g, g, True) for g in whole] + [(str(int(g) + 1), g, False) for g in whole],
        "LaTeX, the gold respelled": [(respell(g), g, True) for g in others],
        "LaTeX, another problem's gold": [(a, b, False) for a, b in wrong],
    }
    sets["LaTeX that needs algebra"] = [
        job for name in list(sets)[1:] for job in sets[name] if quick_equal(job[0], job[1]) is None
    ]
    print(f"{'':44}{'answers':>7}{'median ms':>11}{'p99':>10}{'max':>10}{'mean':>10}{'right':>9}")
    letters = [(rf"<think>t</think><answer>{x}</answer>", "B", x == "B") for x in "ABCD" * 250]
    with Grader(workers=1) as grader:
        choice = {"kind": "choice", "options": list("wxyz")}
        report(
            "ours: letters",
            *milliseconds(
                lambda text, gold: grader.submit(choice | {"answer": gold}, text).result().score,
                letters,
            ),
        )

        def score(pred: str, gold: str) -> float:
            text = rf"<think>t</think>\boxed{{{pred}}}"
            return grader.submit({"kind": "math", "answer": gold}, text).result().score

        for name, jobs in sets.items():
            report(f"ours: {name}", *milliseconds(score, jobs))
        counts = grader.counters()
    for name, jobs in sets.items():
        report(
            f"math-verify: {name}",
            *milliseconds(lambda p, g: verify(parse(f"${g}$"), parse(rf"$\boxed{{{p}}}$")), jobs),
        )
    print(
        f"settled without a worker: {counts['here']} of {counts['graded']}; killed {counts['kills']}"
    )


def jobs_for_stress(items: int, hanging: int) -> list[tuple[dict, str, float]]:
    """Innocent answers, half of them wrong, with the hostile ones spread among them."""
    rng = random.Random(0)
    jobs = []
    for i in range(items - hanging):
        gold = rng.choice(LATEX) if i % 3 == 0 else str(rng.randrange(10**6))
        wrong = i % 2 == 1
        pred = (
            respell(gold)
            if not wrong
            else rf"{gold}+17"
            if not gold.isdigit()
            else str(int(gold) + 1)
        )
        jobs.append(
            (
                {"kind": "math", "answer": gold},
                rf"<think>t</think>\boxed{{{pred}}}",
                float(not wrong),
            )
        )
    for i in range(hanging):
        pred = HOSTILE[i % len(HOSTILE)]
        text = "x" * 10_000_000 + r"\boxed{3}" if pred == "MEGABYTES" else rf"\boxed{{{pred}}}"
        jobs.insert(
            rng.randrange(len(jobs)), ({"kind": "math", "answer": r"\sqrt{2}+1"}, text, 0.0)
        )
    return jobs


def peak_mb(pid: int) -> float:
    try:
        return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
    except (FileNotFoundError, TypeError):
        return 0.0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stress_once(jobs: list, deadline: float, out: dict) -> None:
    seen, peak = set(), 0.0
    begin = time.monotonic()
    with Grader(workers=2, deadline=deadline, memory_gb=2) as grader:
        futures = [grader.submit(problem, text) for problem, text, _ in jobs]
        while not all(f.done() for f in futures):
            pids = grader.pool.pids()
            seen.update(pids)
            peak = max([peak, *map(peak_mb, pids)])
            time.sleep(0.2)
        scores = [f.result().score for f in futures]
        out.update(grader.counters(), longest=grader.pool.longest)
    out.update(
        misses=sum(s != e for s, (*_, e) in zip(scores, jobs)),
        workers_peak_mb=round(peak),
        seconds=round(time.monotonic() - begin, 1),
    )
    out["left_behind"] = sum(map(alive, seen))
    out["parent_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    out["late"] = out["longest"] > deadline + 1


def stress(items: int, hanging: int, deadline: float) -> int:
    """0 if every run graded all innocents right, in time, and left nothing behind."""
    jobs = jobs_for_stress(items, hanging)
    main_thread: dict = {}
    stress_once(jobs, deadline, main_thread)
    print("main thread ", main_thread)
    other: dict = {}
    part = jobs[: len(jobs) // 10]
    thread = threading.Thread(target=stress_once, args=(part, deadline, other))
    thread.start()
    thread.join()
    print("other thread", other)
    code = (
        "import sys, time; sys.path.insert(0, 'benchmarks'); sys.path.insert(0, '.')\nimport importlib.util as u\n"
        "s = u.spec_from_file_location('bench', 'benchmarks/rewards.py')\n"
        "b = u.module_from_spec(s); s.loader.exec_module(b)\n"
        "g = b.Grader(workers=2, deadline=1000)\n"
        "[g.submit({'kind': 'math', 'answer': '1+x'}, '\\\\boxed{' + h + '}') for h in b.HOSTILE[3:9]]\n"
        "time.sleep(3); print(*g.pool.pids(), flush=True); time.sleep(1000)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    pids = [int(p) for p in parent.stdout.readline().split()]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    time.sleep(1)
    left = sum(map(alive, pids))
    print(f"parent killed: workers {len(pids)}, left behind after 1 s: {left}")
    bad = (
        left
        or len(pids) != 2
        or any(r["misses"] or r["late"] or r["left_behind"] for r in (main_thread, other))
    )
    return int(bool(bad))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("speed", "stress"))
    parser.add_argument(
        "--golds", nargs="*", default=[], help="jsonl files with a field answer or gold"
    )
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--hanging", type=int, default=200)
    parser.add_argument("--deadline", type=float, default=1.0)
    args = parser.parse_args()
    if args.what == "stress":
        raise SystemExit(stress(args.items, args.hanging, args.deadline))
    rows = [json.loads(line) for name in args.golds for line in open(name, encoding="utf-8")]
    golds = [
        str(r.get("answer", r.get("gold"))).split("####")[-1].strip() for r in rows
    ] or LATEX * 20
    reward({"kind": "math", "answer": "1"}, r"\boxed{1}")  # imports and caches
    speed(golds)


if __name__ == "__main__":
    main()
