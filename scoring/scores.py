"""From stored samples to figures: rows on disk, grades by the rule that training uses, accuracy with its interval, votes,
budget curves, paired comparison, tables. eval.py samples and calls it; what a figure means is said where it is made."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Sequence

import numpy as np

import rewards
from core.parallel import World, all_gather_objects
from grading import equality, notation
from rewards import Grader
from scoring import stats

# -------------------------------------------------------------------------------------------------- samples on disk
Rows = dict[tuple[str, int], dict]  # (problem id, sample) → row
SAMPLED = (
    "id",
    "sample",
    "seed",
    "prompt",
    "finish",
    "text",
    "forced_at",
    "prompt_tokens",
    "tokens",
)  # before grading


def read_rows(file: Path, torn_end: bool = False) -> Rows:
    """The rows of a samples file, tokens as int32 arrays. torn_end: what follows the last line break was cut by a crash
    and is dropped. Raises ValueError with file and line for anything else that is not a row."""
    rows: Rows = {}
    if not file.is_file():
        return rows
    with open(file, encoding="utf-8", errors="replace", newline="\n") as f:
        for number, line in enumerate(f, 1):
            if torn_end and not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                row = {k: row[k] for k in SAMPLED} | row
                row["tokens"] = np.array(row["tokens"], np.int32)
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(
                    f"{file}:{number}: not a stored sample ({type(e).__name__}: {e}); remove the line to "
                    f"sample it again"
                ) from e
            rows.setdefault((row["id"], row["sample"]), row)
    return rows


def write_rows(file: Path, rows: Sequence[dict]) -> None:
    tmp = file.with_suffix(".tmp")
    with open(tmp, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(as_line(r) for r in rows)
    tmp.rename(file)


def as_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False, default=np.ndarray.tolist) + "\n"


def by_problem(problems: list[dict], rows: Rows, n: int) -> list[list[dict]]:
    """The n samples of each problem, in order."""
    return [[rows[p["id"], i] for i in range(n)] for p in problems]


# ---------------------------------------------------------------------------------------------------------- grading
def hashlib_of_files(files: Sequence[Path]):
    """One sha256 over names and contents, to be added to or read."""
    digest = sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest


def rules_sha256() -> str:
    """Of the files that decide what is an answer and which answers are equal."""
    return hashlib_of_files([Path(m.__file__) for m in (rewards, equality, notation)]).hexdigest()


def grade(
    rows: list[dict], problems: dict[str, dict], settings: dict, grader: Grader, world: World
) -> list[dict]:
    """Rows with gold, answer, score, status, why and the lenient score added; each rank grades a share. Collective."""
    mine = range(world.rank, len(rows), world.size)
    open_thought, graded = settings["open_thought"], {}
    futures = [
        grader.submit(problems[rows[i]["id"]], rows[i]["text"], rows[i]["finish"]) for i in mine
    ]
    for i, future in zip(mine, futures):
        strict, row, problem = future.result(), rows[i], problems[rows[i]["id"]]
        lenient = strict.score
        if strict.status in ("no_answer", "truncated"):
            lenient = rewards.reward(
                problem, row["text"], row["finish"], open_thought=open_thought, lenient=True
            ).score
        graded[i] = {
            "task": problem["task"],
            "gold": problem["answer"],
            "score": strict.score,
            "lenient": lenient,
            "answer": strict.answer if strict.status == "ok" else None,
            "status": strict.status,
            "why": strict.why,
            "looping": is_looping(row["tokens"]),
        }
    for part in all_gather_objects(graded):
        graded.update(part)
    return [{**{k: row[k] for k in SAMPLED}, **graded[i]} for i, row in enumerate(rows)]


def is_looping(tokens: Sequence[int], window: int = 512, gram: int = 8) -> bool:
    """Does the end of a completion repeat itself: are fewer than half of the 8-grams of its last 512 tokens different?
    Completions below 64 tokens never count."""
    tail = list(tokens[-window:])
    grams = [tuple(tail[i : i + gram]) for i in range(len(tail) - gram + 1)]
    return len(tail) >= 64 and len(set(grams)) < len(grams) / 2


def vote_labels(rows: list[dict]) -> list:
    """Equal answers of one problem get equal labels; None abstains. All right ones equal the gold, so each other."""
    wrong = [None if r["score"] else r["answer"] for r in rows]
    labels = stats.answer_classes(wrong, lambda a, b: a == b or rewards.is_equal(a, b))
    return ["right" if r["score"] else label for r, label in zip(rows, labels)]


# ---------------------------------------------------------------------------------------------------------- figures
def cluster(problem: dict) -> str:
    """Questions about one image are not independent: they share a cluster."""
    return (problem.get("meta") or {}).get("cluster") or (problem.get("images") or [problem["id"]])[
        0
    ]


def share(values) -> float:
    values = list(values)
    return float(np.mean(values)) if values else 0.0


def accuracy(problems: list[dict], rows: list[list[dict]], key: str = "score") -> stats.Interval:
    """Over questions, samples averaged within each; rows: one list a problem."""
    return stats.interval(
        [share(r[key] for r in group) for group in rows], [cluster(p) for p in problems]
    )


def set_figures(problems: list[dict], rows: list[list[dict]], settings: dict) -> dict:
    """All figures of one set of questions. rows: the n graded samples of each problem."""
    n, flat = settings["n"], [r for group in rows for r in group]
    strict, lenient = accuracy(problems, rows), accuracy(problems, rows, "lenient")
    lengths, words = [len(r["tokens"]) for r in flat], [len(r["text"].split()) for r in flat]
    forced = [r["finish"].startswith("forced") for r in flat]
    figures = {
        "n": len(problems),
        "clusters": strict.clusters,
        "metric": f"avg@{n}" if settings["temperature"] else "greedy",
        **{k: getattr(strict, k) for k in ("se", "low", "high", "method")},
        "accuracy": strict.mean,
        "lenient": lenient.mean,
        "lenient_low": lenient.low,
        "lenient_high": lenient.high,
        "unparsed": share(r["status"] == "no_answer" for r in flat),
        "truncated": share(r["finish"].endswith("length") for r in flat),
        "forced": share(forced),
        "looping": share(r["looping"] for r in flat),
        "grader_failed": share(r["status"] in ("timeout", "error") for r in flat),
        "accuracy_natural": share(r["score"] for r, f in zip(flat, forced) if not f)
        if not all(forced)
        else None,
        "accuracy_forced": share(r["score"] for r, f in zip(flat, forced) if f)
        if any(forced)
        else None,
        "accuracy_without_exit": share(r["score"] * (not f) for r, f in zip(flat, forced)),
        "tokens_mean": share(lengths),
        "tokens_p50": float(np.median(lengths)),
        "tokens_p95": float(np.percentile(lengths, 95)),
        "words_mean": share(words),
    }
    for name, right in (("right", True), ("wrong", False)):
        chosen = [x for x, r in zip(lengths, flat) if (r["score"] > 0) == right]
        figures[f"tokens_{name}"] = share(chosen) if chosen else None
    if n > 1:
        solved = [round(sum(r["score"] for r in group)) for group in rows]
        ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64) if k < n} | {n})
        figures["pass"] = {str(k): share(stats.pass_at_k(n, c, k) for c in solved) for k in ks}
        figures["maj"] = {
            str(n): share(stats.maj_at_k(vote_labels(g), [r["score"] for r in g], n) for g in rows)
        }
        figures["all"] = {str(n): share(c == n for c in solved)}
    return figures


def sets_of(problems: list[dict]) -> dict[str, list[int]]:
    """Places of the problems of each task, and of the health slice of each task that has one."""
    sets: dict[str, list[int]] = {}
    for i, p in enumerate(problems):
        sets.setdefault(p["task"], []).append(i)
    for task, places in list(sets.items()):
        health = [i for i in places if (problems[i].get("meta") or {}).get("health")]
        if health and len(health) < len(places):
            sets[f"{task}:health"] = health
    return sets


def figures_of(problems: list[dict], rows: list[list[dict]], settings: dict) -> dict:
    """Figures of every task, its health slice and its subsets; micro (over questions) and macro means over tasks."""
    sets = {}
    for name, places in sets_of(problems).items():
        mine, graded = [problems[i] for i in places], [rows[i] for i in places]
        sets[name] = set_figures(mine, graded, settings)
        subsets = {
            s: [i for i, p in enumerate(mine) if p.get("subset") == s]
            for s in dict.fromkeys(p.get("subset") for p in mine)
            if s
        }
        if len(subsets) > 1:
            parts = {
                s: accuracy([mine[i] for i in at], [graded[i] for i in at])
                for s, at in subsets.items()
            }
            sets[name]["macro"] = share(e.mean for e in parts.values())
            sets[name]["subsets"] = {
                s: {"n": e.n, "accuracy": e.mean, "low": e.low, "high": e.high}
                for s, e in parts.items()
            }
    tasks = [name for name in sets if ":" not in name]
    return {
        "sets": sets,
        "micro": share(share(r["score"] for r in group) for group in rows),
        "macro": share(sets[t]["accuracy"] for t in tasks),
    }


def budget_figures(problems: list[dict], rows: list[list[dict]], settings: dict) -> dict:
    """One point of the curve for each set."""
    keys = (
        "n",
        "accuracy",
        "low",
        "high",
        "accuracy_without_exit",
        "forced",
        "truncated",
        "unparsed",
        "tokens_mean",
    )
    settings = {**settings, "n": 1}  # no votes on the curve
    return {
        name: {
            k: v
            for k, v in set_figures(
                [problems[i] for i in at], [rows[i] for i in at], settings
            ).items()
            if k in keys
        }
        for name, at in sets_of(problems).items()
    }


# ------------------------------------------------------------------------------------------------------- comparison
def compare(problems: list[dict], rows: list[list[dict]], other: Path, rules: str) -> dict:
    """Paired differences, this run minus `other`, over the questions that both have: interval, p, McNemar where both
    have one sample, the smallest difference that the set could show, Holm's p over the tasks."""
    theirs = json.loads((other / "result.json").read_text())
    if theirs["rules"]["sha256"] != rules:
        raise ValueError(
            f"--compare {other}: it was graded by other rules than these; grade it again with --rescore"
        )
    stored: dict[str, list[dict]] = {}
    for (name, _), row in read_rows(other / "samples.jsonl").items():
        if "score" in row:  # a run that goes on may have rows that are not graded yet
            stored.setdefault(name, []).append(row)
    changed = [
        p["id"] for p in problems if p["id"] in stored and stored[p["id"]][0]["gold"] != p["answer"]
    ]
    if changed:
        raise ValueError(
            f"--compare {other}: the gold of {changed[0]} differs there ({len(changed)} differ); grade "
            f"both with the same data, --rescore"
        )
    sets = {}
    for name, places in sets_of(problems).items():
        both = [i for i in places if problems[i]["id"] in stored]
        if not both:
            continue
        a, b = [rows[i] for i in both], [stored[problems[i]["id"]] for i in both]
        means = [np.array([share(r["score"] for r in group) for group in side]) for side in (a, b)]
        d = stats.paired_difference(*means, [cluster(problems[i]) for i in both])
        sets[name] = {
            "n": len(both),
            "not_in_other": len(places) - len(both),
            "clusters": d.clusters,
            "this": share(means[0]),
            "other": share(means[1]),
            "difference": d.difference,
            "low": None,
            "high": None,
            "p": None,
            "mde": None,
        }
        if (
            d.se > 0
        ):  # else the questions all differ by the same: they say nothing of how far chance could go
            sets[name].update(low=d.low, high=d.high, p=d.p, mde=stats.mde(d.se))
        if {len(g) for g in a + b} == {1}:
            only = [int((x > y).sum()) for x, y in (means, means[::-1])]
            exact, mid = stats.mcnemar(*only)
            sets[name].update(only_this=only[0], only_other=only[1], mcnemar=exact, mcnemar_mid=mid)
    if not sets:
        raise ValueError(f"--compare {other}: it has none of these problems")
    tasks = [name for name in sets if ":" not in name and sets[name]["p"] is not None]
    for name, p in zip(tasks, stats.holm([sets[t]["p"] for t in tasks])):
        sets[name]["p_holm"] = p
    return {"other": str(other), "sets": sets}


# ---------------------------------------------------------------------------------------------------------- reports
def percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.1f}"


def number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}"


def table(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths)))
        for line in [head, *lines]
    )


def report(result: dict) -> str:
    """The result as tables for people; all shares in percent."""
    n, sets = result["settings"]["n"], result["sets"]
    metric = next(iter(sets.values()))["metric"]
    votes = [f"pass@{n}", f"maj@{n}", f"all@{n}"] if n > 1 else []
    lines = [
        [
            name,
            str(s["n"]),
            percent(s["accuracy"]),
            f"{percent(s['low'])} … {percent(s['high'])}",
            percent(s["lenient"]),
            *(percent(s[k][str(n)]) for k in ("pass", "maj", "all") if n > 1),
            *(
                percent(s[k])
                for k in (
                    "unparsed",
                    "truncated",
                    "forced",
                    "looping",
                    "accuracy_natural",
                    "accuracy_forced",
                )
            ),
            f"{s['tokens_mean']:.0f}",
            f"{s['tokens_p95']:.0f}",
            f"{s['words_mean']:.0f}",
        ]
        for name, s in sets.items()
    ]
    parts = [
        table(
            [
                "set",
                "n",
                metric,
                "95% interval",
                "lenient",
                *votes,
                "unparsed",
                "cut",
                "forced",
                "looping",
                "natural",
                "if forced",
                "tokens",
                "p95",
                "words",
            ],
            lines,
        )
    ]
    if len(sets) > 1:
        parts.append(
            f"all tasks: {percent(result['micro'])} over questions, {percent(result['macro'])} over tasks"
        )
    for name, s in sets.items():
        if "subsets" in s:
            parts.append(
                f"{name} by subset (mean of subsets {percent(s['macro'])}): "
                + ", ".join(
                    f"{k} {percent(v['accuracy'])} ({v['n']})" for k, v in s["subsets"].items()
                )
            )
    if result["budgets"]:
        parts.append(
            table(
                ["set", "budget", "accuracy", "95% interval", "no exit", "forced", "cut", "tokens"],
                [
                    [
                        name,
                        b,
                        percent(s["accuracy"]),
                        f"{percent(s['low'])} … {percent(s['high'])}",
                        percent(s["accuracy_without_exit"]),
                        percent(s["forced"]),
                        percent(s["truncated"]),
                        f"{s['tokens_mean']:.0f}",
                    ]
                    for name in sets
                    for b, point in result["budgets"].items()
                    for s in [point[name]]
                ],
            )
        )
    if result["compare"]:
        parts.append(
            f"this minus {result['compare']['other']} (mde: the difference that the set shows 4 times in 5)"
        )
        parts.append(
            table(
                [
                    "set",
                    "n",
                    "this",
                    "other",
                    "difference",
                    "95% interval",
                    "p",
                    "Holm",
                    "McNemar",
                    "only this/other",
                    "mde",
                ],
                [
                    [
                        name,
                        str(s["n"]),
                        percent(s["this"]),
                        percent(s["other"]),
                        f"{100 * s['difference']:+.1f}",
                        f"{percent(s.get('low'))} … {percent(s.get('high'))}",
                        number(s.get("p")),
                        number(s.get("p_holm")),
                        number(s.get("mcnemar")),
                        f"{s['only_this']}/{s['only_other']}" if "only_this" in s else "-",
                        percent(s.get("mde")),
                    ]
                    for name, s in result["compare"]["sets"].items()
                ],
            )
        )
    return "\n\n".join(parts)


def headline(result: dict) -> dict:
    """What goes to the last line on stdout."""
    keys = (
        "n",
        "accuracy",
        "low",
        "high",
        "lenient",
        "unparsed",
        "truncated",
        "forced",
        "looping",
        "pass",
        "maj",
    )
    line = {
        "micro": result["micro"],
        "macro": result["macro"],
        "sets": {name: {k: s[k] for k in keys if k in s} for name, s in result["sets"].items()},
    }
    if result["budgets"]:
        line["budgets"] = {
            b: {name: s["accuracy"] for name, s in point.items()}
            for b, point in result["budgets"].items()
        }
    return line | ({"compare": result["compare"]["sets"]} if result["compare"] else {})


def finite(value):
    """NaN and infinity are not JSON: None in their place."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
