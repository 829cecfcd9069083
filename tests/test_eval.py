"""eval.py: from files to results, with a tiny random model, and with outputs written by hand where
scores matter."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from ranks import run_ranks
from real_data import REAL, needs_real

import data
import eval as ev
import rewards
from core.slots import ForcedExit, close_table, exit_positions
from scoring import metrics

ROOT = Path(ev.__file__).parent


class InlineGrader:
    """Grades in this process: the real one starts interpreters, which takes seconds."""

    def __init__(self, workers=1, **how):
        self.how = how

    def submit(self, problem, text, finish):
        result = rewards.reward(problem, text, finish, **self.how)
        return type("Done", (), {"result": lambda self: result})()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(rewards, "Grader", InlineGrader)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random Qwen2.5-VL with tokenizer and image settings."""
    from tiny import make_tiny_tokenizer
    from tiny_model import make_tiny_vl

    folder = make_tiny_tokenizer(make_tiny_vl(tmp_path_factory.mktemp("model")))
    (folder / "preprocessor_config.json").write_text('{"min_pixels": 3136, "max_pixels": 12845056}')
    return folder


def choice(i: int, **changes) -> dict:
    return {
        "id": f"q/{i}",
        "task": "quiz",
        "kind": "choice",
        "question": f"Question {i}?",
        "options": ["Yes", "No"],
        "answer": "B",
        **changes,
    }


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Text, one image, two images, a page that is all image, math and open questions; two tasks,
    one health slice."""
    folder = tmp_path_factory.mktemp("data")
    for i, size in enumerate([(56, 56), (84, 56), (60, 120)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    return write(
        folder / "p.jsonl",
        [
            choice(0),
            choice(
                1, subset="a", images=["0.png"], question="<image> What?", meta={"health": True}
            ),
            choice(2, subset="b", images=["0.png", "1.png"], question="Is <image> or <image>?"),
            choice(3, images=["2.png"]),
            {"id": "m/0", "task": "sums", "kind": "math", "question": "1+1?", "answer": "2"},
            {
                "id": "m/1",
                "task": "sums",
                "kind": "open",
                "question": "Which lung?",
                "answer": ["left", "left lung"],
            },
        ],
    )


CONFIG = dict(max_new_tokens=40, think_budget=0, answer_budget=6, min_pixels=0, max_pixels=6272)
CONFIG |= dict(slots=8, device="cpu", graders=1)


def config(model_dir, problems, out, **changes) -> ev.Config:
    files = dict(data=[str(problems)], out=str(out), model=str(model_dir))
    return ev.Config(**{**files, **CONFIG, **changes})


def stored(out: Path, name: str = "samples.jsonl") -> dict:
    return {
        (r["id"], r["sample"]): r
        for r in map(json.loads, (out / name).read_text().strip().split("\n"))
    }


def files(out: Path) -> dict[str, bytes]:
    names = ("header.json", "lock")
    return {f.name: f.read_bytes() for f in sorted(out.iterdir()) if f.name not in names}


# ----------------------------------------------------------------------------------------- sampling
@pytest.fixture(scope="module")
def five(model_dir, problems, tmp_path_factory, world):
    """Five samples a problem, by one process."""
    out = tmp_path_factory.mktemp("five")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "Grader", InlineGrader)
        ev.evaluate(config(model_dir, problems, out, samples=5, temperature=1.0, budgets=[6]))
    return out


def _evaluate_as_rank(world, model_dir, problems, out):
    rewards.Grader = InlineGrader
    ev.evaluate(config(model_dir, problems, out, samples=5, temperature=1.0, budgets=[6]))


def test_two_ranks_and_a_resumed_crash_give_the_same_files(model_dir, problems, five, tmp_path):
    """Prevents results that depend on the number of ranks, a resume that repeats or loses samples,
    one that trips over a
    truncated line, and seeds that change with what is left to do."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_bytes((five / "config.json").read_bytes())
    lines = (five / "samples.jsonl").read_text().strip().split("\n")
    graded = ("reward", "answer", "status", "why", "lenient")
    raw = [{k: v for k, v in json.loads(line).items() if k not in graded} for line in lines]
    write(
        out / "samples.part0.1.jsonl", raw[:7]
    )  # problems 0 whole and 1 in part, as a killed run of two ranks left them
    write(out / "samples.part1.2.jsonl", raw[20:23])
    with open(out / "samples.part1.2.jsonl", "a") as f:
        f.write(lines[23][:50])
    run_ranks(2, _evaluate_as_rank, model_dir, problems, out)
    assert files(out) == files(five)
    assert not list(out.glob("*.part*")) and len(stored(out, "budget_6.jsonl")) > 20


def test_every_sample_is_whole_on_disk(five, problems, model_dir):
    """Prevents a log that cannot be read again: tokens that are not the text's, a missing prompt,
    seed or finish."""
    tokenizer, rows = data.load_tokenizer(model_dir), stored(five)
    assert len(rows) == 30
    for row in rows.values():
        ended = row["finish_reason"] == "stop"
        assert tokenizer.decode(row["tokens"][:-1] if ended else row["tokens"]) == row["text"]
        assert row["finish_reason"] in ("stop", "length") and (ended or len(row["tokens"]) == 40)
        assert (
            row["seed"] > 0
            and "forced_at" not in row
            and row["status"] in ("no_answer", "truncated")
        )
    by_id = {p["id"]: p for p in data.load_problems([problems])[0]}
    assert (
        rows["q/1", 3]["prompt"] == data.prompt_text(by_id["q/1"]) and rows["q/1", 3]["gold"] == "B"
    )
    assert len({tuple(rows["q/0", i]["tokens"]) for i in range(5)}) == 5  # samples differ
    header = json.loads((five / "header.json").read_text())
    assert "Is the earth flat?" in header["prompts"]["choice"] and header["versions"]["torch"]
    assert header["prompts"]["choice"].startswith(
        "<|im_start|>system\nYou are a helpful assistant."
    )
    result = json.loads((five / "result.json").read_text())
    assert (
        result["data"][0][1]
        and result["settings"]["max_pixels"] == 6272
        and result["rules"]["rule"] == "answer"
    )


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"temperature": 0.5}, "temperature"),
        ({"blind": True}, "blind"),
        ({"dtype": "bf16"}, "dtype"),
    ],
)
def test_a_changed_setting_refuses_to_mix(five, model_dir, problems, changes, name, inline):
    """Prevents old samples from being served under new settings."""
    with pytest.raises(ValueError, match=f"whose {name} is .*another --out"):
        ev.evaluate(
            config(model_dir, problems, five, **{"samples": 5, "temperature": 1.0, **changes})
        )


def test_a_changed_model_or_file_refuses_to_mix(five, model_dir, problems, tmp_path, inline):
    """Prevents an older checkpoint's samples, or another file's, from counting for this one."""
    other = shutil.copytree(model_dir, tmp_path / "model")
    blob = bytearray((other / "model.safetensors").read_bytes())
    blob[-1] ^= 1
    (other / "model.safetensors").write_bytes(blob)
    with pytest.raises(ValueError, match="whose model_sha256 is"):
        ev.evaluate(config(other, problems, five, samples=5, temperature=1.0))
    copy = tmp_path / "p.jsonl"
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    write(
        copy,
        [{**r, "images": [str(problems.parent / i) for i in r.get("images", [])]} for r in rows],
    )
    with pytest.raises(ValueError, match="whose data_sha256 is"):
        ev.evaluate(config(model_dir, copy, five, samples=5, temperature=1.0))
    write(copy, [{**json.loads(copy.read_text().splitlines()[0]), "question": "Another?"}])
    with pytest.raises(ValueError, match="not all samples of q/0 as it is now"):
        ev.evaluate(config("", copy, five, rescore=True))


def test_budget_curve_equals_runs_with_these_budgets(
    model_dir, problems, tmp_path, inline, monkeypatch
):
    """Prevents a curve that is not what forced exit at that budget gives: wrong cut, wrong
    positions after images, a
    missing exit text, an answer of another length. Greedy, so that each point can be held to a run
    of its own."""
    out = tmp_path / "curve"
    result = ev.evaluate(config(model_dir, problems, out, budgets=[5, 12]))
    for budget in (5, 12):
        direct = tmp_path / f"direct{budget}"
        ev.evaluate(config(model_dir, problems, direct, think_budget=budget))
        want, point = stored(direct), stored(out) | stored(out, f"budget_{budget}.jsonl")
        keys = ("tokens", "finish_reason", "forced_at", "text", "prompt_tokens", "reward")
        assert {k: [r[x] for x in keys] for k, r in point.items()} == {
            k: [r[x] for x in keys] for k, r in want.items()
        }
        figures = result["budgets"][str(budget)]["quiz"]
        whole = json.loads((direct / "result.json").read_text())["sets"]["quiz"]
        assert figures == {k: whole[k] for k in figures}
        assert whole["forced"] == 1 and whole["accuracy_without_exit"] == 0
    monkeypatch.setattr(
        ev.model,
        "build_model",
        lambda *a, **k: pytest.fail("nothing is left to sample: no model is needed"),
    )
    assert ev.evaluate(config(model_dir, problems, out, budgets=[5, 12])) == result
    assert ev.evaluate(config("", problems, out, rescore=True)) == result  # the curve stays
    with pytest.raises(ValueError, match="--budgets 64: must be from 1 to 40 tokens"):
        ev.evaluate(config(model_dir, problems, out, budgets=[64]))
    with pytest.raises(ValueError, match="--rescore grades all budgets"):
        ev.evaluate(config("", problems, out, rescore=True, budgets=[7]))


def test_exit_positions():
    """Prevents a cut inside the model's own `</think>`, a second exit after it, and cuts beyond
    what was sampled. Held
    to the sampler's rule on pieces that share characters with the close."""
    pieces = ["a", "</", "think", ">", "/think>", "<"]
    table = close_table(pieces, "</think>")

    def at(text: str, budget: int, forced_at=None, cut_off=False):
        tokens = [pieces.index(p) for p in text.split()][:forced_at]
        return exit_positions([tokens], [cut_off], ForcedExit(budget, [0], table))[0]

    natural = "a a </ think > a a"  # from 3 on it is closing by itself
    assert [at(natural, b) for b in range(7)] == [0, 1, 2, None, None, None, None]
    assert (
        at("a < a a </ think > a", 2) == 3
    )  # "<" might have become the close: waits for one token
    assert at("a a a a", 2, cut_off=True) == 2 and at("a a a a", 4, cut_off=True) == 4
    assert at("a a a a", 4) is None and at("a a a a", 9) is None  # ended by itself without a close
    assert (
        at("a a a </ think > a", 3, forced_at=3) is None  # where it was, nothing to do
        and at("a a a </ think > a", 1, forced_at=3) == 1
    )
    assert at("a </ think > a a", 4, cut_off=True) is None  # only the answer was cut


def test_blind_removes_the_images_and_their_places(model_dir, problems, tmp_path, inline):
    """Prevents a text-only run that still sees images, or that drops the clusters with them."""
    result = ev.evaluate(config(model_dir, problems, tmp_path / "out", blind=True))
    rows = stored(tmp_path / "out")
    assert not any("<image>" in r["prompt"] or "image_pad" in r["prompt"] for r in rows.values())
    assert (
        result["sets"]["quiz"]["n"] == 4 and result["sets"]["quiz"]["clusters"] == 3
    )  # 1 and 2 show one image first
    assert result["sets"]["quiz:health"]["n"] == 1


def test_limit_takes_the_same_problems_of_each_task(model_dir, tmp_path, problems):
    """Prevents a quick look that depends on the order of the file or leaves a task out."""
    rows = [choice(i) for i in range(20)] + [choice(i, id=f"z/{i}", task="z") for i in range(3)]
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[::-1])
    chosen = [ev.choose_problems(config(model_dir, f, tmp_path / "o", limit=5))[0] for f in (a, b)]
    assert {p["id"] for p in chosen[0]} == {p["id"] for p in chosen[1]} and len(chosen[0]) == 8
    assert [p["id"] for p in chosen[0]] == [p["id"] for p in chosen[1]][
        ::-1
    ]  # the file's order stays
    fewer, _ = ev.choose_problems(config(model_dir, a, tmp_path / "o", limit=2))
    assert {p["id"] for p in fewer} < {p["id"] for p in chosen[0]}
    (tmp_path / "solved.txt").write_text(
        f"{fewer[0]['id']}\n"
    )  # of a blind run with the same limit: no other fills its place
    left, told = ev.choose_problems(
        config(model_dir, a, tmp_path / "o", limit=2, drop=str(tmp_path / "solved.txt"))
    )
    assert [p["id"] for p in left] == [p["id"] for p in fewer[1:]] and told["dropped"] == 1


# ------------------------------------------------------------------------ scores of written outputs
def make_run(
    out: Path, outputs: dict[str, list[tuple[str, str]]], problems: list[dict], **settings
) -> Path:
    """An evaluation whose samples were written by hand: id → [(text, finish), …]."""
    out.mkdir()
    n = len(next(iter(outputs.values())))
    written = {k: getattr(ev.Config, k) for k in ev.SAMPLES_DEPEND_ON}
    written |= dict(script="eval", limit=0, open_thought=False, think_budget=0)
    written |= dict(samples=n, temperature=0.3 if n > 1 else 0.0)
    (out / "config.json").write_text(json.dumps(written | settings))
    prompts = {p["id"]: data.prompt_text(p) for p in problems}
    rows = [
        dict(id=i, sample=s, seed=1, prompt=prompts[i], finish_reason=finish, text=text)
        | dict(prompt_tokens=9, tokens=list(range(len(text))))
        for i, texts in outputs.items()
        for s, (text, finish) in enumerate(texts)
    ]
    write(out / "samples.jsonl", rows)
    return out


def say(content: str, finish: str = "stop") -> tuple[str, str]:
    return f"<think>so</think><answer>{content}</answer>", finish


def rescore(out: Path, file: Path, **changes) -> dict:
    return ev.evaluate(
        ev.Config(data=[str(file)], out=str(out), rescore=True, device="cpu", **changes)
    )


def test_figures_of_one_sample(tmp_path, inline, world):
    """Prevents wrong shares: cut text that counts, forced exits on the wrong side, lenient below
    strict, macro for
    micro, a slice that is left out."""
    problems = [choice(i, subset="x" if i < 6 else "y", meta={"health": i < 2}) for i in range(8)]
    file = write(tmp_path / "p.jsonl", problems)
    outputs = {
        "q/0": say("B"),
        "q/1": say("B: No", "forced+stop"),
        "q/2": say("A"),
        "q/3": say("A", "forced+stop"),
        "q/4": say("B", "length"),
        "q/5": ("<think>B", "forced+length"),
        "q/6": ("</think>Answer: B", "stop"),
        "q/7": say("No"),
    }
    out = make_run(tmp_path / "run", {k: [v] for k, v in outputs.items()}, problems)
    result = rescore(out, file)
    s = result["sets"]["quiz"]
    assert (s["n"], s["metric"], s["accuracy"], s["lenient"]) == (8, "greedy", 3 / 8, 6 / 8)
    assert (s["unparsed"], s["truncated"], s["forced"]) == (1 / 8, 2 / 8, 3 / 8)
    assert s["accuracy_without_exit"] == 2 / 8
    low, high = scipy.stats.binomtest(3, 8).proportion_ci(method="wilson")
    assert (s["low"], s["high"], s["method"]) == (pytest.approx(low), pytest.approx(high), "wilson")
    assert s["subsets"]["x"]["accuracy"] == 2 / 6 and s["subsets"]["y"]["accuracy"] == 1 / 2
    assert s["macro"] == pytest.approx(5 / 12) and result["sets"]["quiz:health"]["accuracy"] == 1
    answers = [stored(out)[f"q/{i}", 0].get("answer") for i in range(8)]
    assert answers == ["B", "B", "A", "A", "B", None, None, "B"]
    assert (out / "solved.txt").read_text().split() == ["q/0", "q/1", "q/7"]


def test_votes_and_passes_of_five_samples(tmp_path, inline, world):
    """Prevents votes on raw text, votes of samples without an answer, pass@k as any of the first k,
    and k repeats that
    count as k questions."""
    problems = [
        {"id": f"m/{i}", "task": "sums", "kind": "math", "question": f"{i}?", "answer": "1/2"}
        for i in range(3)
    ]
    file = write(tmp_path / "p.jsonl", problems)
    cut = say("0.5", "length")
    unparsed = ("?", "stop")
    outputs = {
        "m/0": [say(a) for a in ("0.5", r"\frac{1}{2}", "3", "3.0", "1/2")],  # 3 of 5, in 3 forms
        "m/1": [say("0.5"), unparsed, unparsed, unparsed, say("7")],  # a tie of one against one
        "m/2": [say("4"), say("4"), say("4.0"), cut, cut],
    }
    out = make_run(tmp_path / "run", outputs, problems)
    s = rescore(out, file)["sets"]["sums"]
    assert s["metric"] == "avg@5" and s["accuracy"] == pytest.approx((3 / 5 + 1 / 5) / 3)
    assert s["se"] == pytest.approx(scipy.stats.sem([0.6, 0.2, 0.0])) and s["clusters"] == 3
    assert s["maj"] == {"5": pytest.approx((1 + 0.5 + 0) / 3)}
    assert s["pass"] == {
        "1": pytest.approx(0.8 / 3),
        "2": pytest.approx(((1 - 1 / 10) + (1 - 6 / 10)) / 3),
        "4": pytest.approx((1 + 0.8) / 3),
        "5": pytest.approx(2 / 3),
    }


def test_compare_and_drop(tmp_path, inline, world):
    """Prevents the difference of two intervals in place of the paired one, comparison across other
    rules, golds or
    questions, and a list of ids that is not applied."""
    rng = np.random.default_rng(0)
    problems = [choice(i, meta={"cluster": str(i // 2)}) for i in range(40)]
    file = write(tmp_path / "p.jsonl", problems)
    right = rng.random((2, 40)) < [[0.7], [0.4]]
    a, b = (
        make_run(
            tmp_path / name,
            {f"q/{i}": [say("B" if r else "A")] for i, r in enumerate(right[k])},
            problems,
        )
        for k, name in enumerate("ab")
    )
    rescore(b, file)
    s = rescore(a, file, compare=str(b))["compare"]["sets"]["quiz"]
    d = right[0].astype(float) - right[1]
    assert s["difference"] == pytest.approx(d.mean()) and s["clusters"] == 20
    sums = (d - d.mean()).reshape(20, 2).sum(1)
    se = np.sqrt(20 / 19 * (sums**2).sum()) / 40
    assert s["high"] - s["difference"] == pytest.approx(scipy.stats.t.ppf(0.975, 19) * se)
    assert s["mde"] == pytest.approx((scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)) * se)
    only = int((d > 0).sum()), int((d < 0).sum())
    assert (s["only_this"], s["only_other"]) == only
    assert s["mcnemar"] == pytest.approx(scipy.stats.binomtest(only[0], sum(only)).pvalue)
    same = rescore(b, file, compare=str(b))["compare"]["sets"]["quiz"]  # nothing known of chance
    known = [same[k] for k in ("difference", "low", "p", "mde", "mcnemar")]
    assert known == [0, None, None, None, 1]
    dropped = rescore(a, file, drop=str(b / "solved.txt"))
    assert (
        dropped["dropped"] == right[1].sum() and dropped["sets"]["quiz"]["n"] == (~right[1]).sum()
    )
    assert dropped["sets"]["quiz"]["accuracy"] == pytest.approx(right[0][~right[1]].mean())
    assert len(stored(a)) == 40  # the others are kept on disk
    old = json.loads((b / "result.json").read_text())
    (b / "result.json").write_text(json.dumps({**old, "rules": {"rule": "answer", "sha256": "x"}}))
    with pytest.raises(ValueError, match="graded by other rules"):
        rescore(a, file, compare=str(b))
    (b / "result.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="the gold of q/0 differs there"):
        rescore(a, write(file, [{**p, "answer": "A"} for p in problems]), compare=str(b))


def test_rescore_takes_corrected_golds_and_refuses_other_settings(tmp_path, inline, world):
    """Prevents a corrected gold from needing new samples, and flags that a rescore would silently
    ignore."""
    problems = [choice(0), choice(1)]
    file = write(tmp_path / "p.jsonl", problems)
    odd = (
        "<think>\u2028 \x85 \x0b</think><answer>B</answer>",
        "stop",
    )  # str.splitlines would cut here
    out = make_run(tmp_path / "run", {"q/0": [say("A")], "q/1": [odd]}, problems)
    assert rescore(out, file)["sets"]["quiz"]["accuracy"] == 0.5
    write(file, [choice(0, answer="A"), choice(1)])
    assert rescore(out, file)["sets"]["quiz"]["accuracy"] == 1.0
    with pytest.raises(ValueError, match="the max_new_tokens of .* is 4096, not 99"):
        rescore(out, file, max_new_tokens=99)
    with pytest.raises(ValueError, match="not all samples of q/2"):
        rescore(out, write(file, [choice(0), choice(1), choice(2)]))
    with open(out / "samples.jsonl", "a") as f:
        f.write("{}\n")
    with pytest.raises(ValueError, match=r"samples.jsonl:3: not a stored sample .no 'tokens'"):
        rescore(out, file)


# ---------------------------------------------------------------------------------- user's mistakes
MISTAKES = [
    ([choice(0, images=["none.png"])], {}, r"p.jsonl:1: images: .*none.png"),
    ([choice(0)], {"data": ["nowhere.jsonl"]}, "nowhere.jsonl: no such file"),
    ([choice(0)], {"model": "./nowhere"}, "--model ./nowhere: no such directory"),
    ([choice(0)], {"model": ""}, "--model is missing"),
    ([choice(0)], {"think_budget": 39}, "think_budget 39 with max_new_tokens 40: .* to 60"),
    (
        [choice(0)],
        {"think_budget": 3800, "max_new_tokens": 6},
        "think_budget 3800 with max_new_tokens 6: ",
    ),
    ([choice(0)], {"samples": 3}, "3 at --temperature 0: 3 equal ones"),
    ([choice(0)], {"budgets": [0]}, "--budgets 0: must be from 1 to 40"),
    ([choice(0)], {"prompt_style": "nice"}, "prompt style 'nice': choose kind, train"),
    ([choice(0)], {"compare": "nowhere"}, "nowhere: no result.json; name the --out"),
    ([choice(0)], {"drop": "nowhere.txt"}, "--drop nowhere.txt: no such file"),
    ([choice(0)], {"rescore": True, "model": ""}, "holds no samples; run it with --model first"),
    ([choice(0, question="a<|im_end|>")], {}, "control token"),
]


@pytest.mark.parametrize("rows, changes, message", MISTAKES)
def test_mistakes_are_named_before_the_model_is_loaded(
    model_dir, tmp_path, monkeypatch, world, rows, changes, message
):
    """Prevents minutes of loading before a typing error shows, and errors that do not say where."""
    monkeypatch.setattr(
        ev.model, "build_model", lambda *a, **k: pytest.fail("the model was loaded")
    )
    file = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        ev.evaluate(config(model_dir, file, tmp_path / "out", **changes))


def test_a_refused_start_does_not_hold_the_directory(
    model_dir, tmp_path, problems, world, inline, monkeypatch
):
    """Prevents a corrected command from being refused because the mistaken one wrote its settings
    down."""
    with pytest.raises(ValueError, match="think_budget 39 with"):
        ev.evaluate(config(model_dir, problems, tmp_path / "out", think_budget=39))
    monkeypatch.setattr(ev.Engine, "sample", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ev.evaluate(config(model_dir, problems, tmp_path / "out", think_budget=8))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(ValueError, match="no run of eval"):
        ev.evaluate(config(model_dir, problems, tmp_path / "mine"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("kind", ["model", "training run", "notes", "config.json alone"])
def test_an_out_that_holds_something_else_is_refused_untouched(
    model_dir, problems, tmp_path, world, inline, kind
):
    """Prevents an evaluation that overwrites the config.json of a model or a training run."""
    out = tmp_path / "out"
    if kind == "model":
        shutil.copytree(model_dir, out)
    else:
        (out / "checkpoints" / "step_2").mkdir(parents=True)
        names = {"notes": "letter.txt", "training run": "metrics.jsonl"}
        config_json = (
            '{"model": "m", "lr": 1e-5}'
            if kind == "config.json alone"
            else ('{"script": "train_sft", "model": "m"}')
        )
        (out / names.get(kind, "config.json")).write_text("{}")
        if kind != "notes":
            (out / "config.json").write_text(config_json)
    before = contents(out)
    with pytest.raises(ValueError, match="--out .*out: holds .* name a"):
        ev.evaluate(config(model_dir, problems, out))
    with pytest.raises(ValueError, match="--out .*out: holds .* no run of eval"):
        ev.evaluate(config("", problems, out, rescore=True))
    assert contents(out) == before


def test_two_evaluations_on_one_out_name_the_first(model_dir, problems, tmp_path, world, inline):
    """Prevents two processes that mix their samples in one directory."""
    out = tmp_path / "out"
    code = "import sys, time; from core.run import claim; "
    code += "claim(sys.argv[1], 'eval', {}); print(1, flush=True); time.sleep(99)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], cwd=ROOT, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    before = contents(out)
    try:
        with pytest.raises(ValueError, match=f"in use by process {holder.pid} on"):
            ev.evaluate(config(model_dir, problems, out))
        assert contents(out) == before
    finally:
        holder.kill()
        holder.wait()
    assert ev.evaluate(config(model_dir, problems, out, limit=1))["sets"]  # the dead hold nothing


BAD_NUMBERS = ["--slots -1", "--limit -1", "--temperature nan", "--top_p 0", "--rule nice"]


@pytest.mark.parametrize("flag", BAD_NUMBERS)
def test_values_out_of_range_are_refused_at_the_start(flag, capsys):
    """Prevents --slots -1, which looped forever, and --limit -1, which dropped a problem."""
    argv = ["--data", "p.jsonl", "--out", "o", "--model", "m", *flag.split()]
    with pytest.raises(SystemExit) as end:
        ev.parse_config(ev.Config, ev.__doc__, argv)
    assert end.value.code == 2 and flag.split()[0] in capsys.readouterr().err


def test_more_tokens_than_the_model_can_hold_are_refused(model_dir, problems, tmp_path, world):
    """Prevents --max_new_tokens 9999999 from allocating terabytes."""
    with pytest.raises(ValueError, match="and 9999999 new ones exceed the model's context of"):
        ev.evaluate(config(model_dir, problems, tmp_path / "out", max_new_tokens=9_999_999))


def test_a_prompt_longer_than_the_context_is_refused(model_dir, tmp_path, world, monkeypatch):
    """Prevents a row of a whole book from taking all of the machine's memory: it took 16 GB."""
    monkeypatch.setattr(ev.model, "build_model", lambda *a, **k: pytest.fail("too late"))
    long = write(tmp_path / "p.jsonl", [choice(0), choice(1, question="a=1;" * 50_000)])
    with pytest.raises(ValueError, match="and 40 new ones exceed the model's context"):
        ev.evaluate(config(model_dir, long, tmp_path / "out"))


def test_rescore_of_a_limited_run_says_so(model_dir, tmp_path, world, inline):
    """Prevents "problems have no stored samples" as the answer to a forgotten --limit."""
    file = write(tmp_path / "p.jsonl", [choice(i) for i in range(6)])
    ev.evaluate(config(model_dir, file, tmp_path / "out", limit=4))
    with pytest.raises(ValueError, match="made with --limit 4. has not all samples of q/"):
        ev.evaluate(config("", file, tmp_path / "out", rescore=True))
    assert ev.evaluate(config("", file, tmp_path / "out", rescore=True, limit=4))["limit"] == 4


def test_a_model_may_be_spelt_or_moved_otherwise(
    model_dir, tmp_path, world, inline, monkeypatch, capsys
):
    """Prevents "m" and "./m" from being two models; the first line says how samples are made."""
    file = write(tmp_path / "p.jsonl", [choice(i) for i in range(2)])
    shutil.copytree(model_dir, tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    ev.evaluate(config("./m", file, tmp_path / "out", limit=1))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("1 problem(s), 1 sample(s) each at temperature 0.0, no forced exit, at")
    for name in ("m", str(model_dir)):
        assert ev.evaluate(config(name, file, tmp_path / "out"))["sets"]["quiz"]["n"] == 2


@pytest.mark.parametrize("rule, right", [("answer", []), ("boxed", ["q/1"]), ("line", ["q/0"])])
def test_rule_decides_where_the_answer_stands(tmp_path, inline, world, rule, right):
    """Prevents a rule that exists in rewards.py and that no flag reaches."""
    problems = [choice(0), choice(1)]
    file = write(tmp_path / "p.jsonl", problems)
    texts = {
        "q/0": [("So:\nAnswer: B", "stop")],
        "q/1": [("So \\boxed{B} <answer>A</answer>\nAnswer: A", "stop")],
    }
    out = make_run(tmp_path / "run", texts, problems)
    result = rescore(out, file, rule=rule)
    assert (out / "solved.txt").read_text().split() == right and result["rules"]["rule"] == rule


def test_accuracy_by_task_has_an_interval(world):
    """Prevents an evaluation while training that mixes data sets, or says nothing of noise."""
    problems = [choice(i, task=t) for t in ("a", "b") for i in range(4)]
    by_task = metrics.accuracy_by("task", problems, [[1, 0]] * 4 + [[1], [1], [1], [0]])
    low, high = scipy.stats.binomtest(3, 4).proportion_ci(method="wilson")
    assert by_task["a"].mean == 0.5 and by_task["b"].mean == 0.75
    assert (by_task["b"].low, by_task["b"].high) == (pytest.approx(low), pytest.approx(high))


def test_torchrun_lets_every_flag_through():
    """Prevents flags that torchrun takes for its own: on Python 3.11 it refuses --n as an
    abbreviation of several."""
    from torch.distributed.run import parse_args

    for flag in (f"--{f.name}" for f in dataclasses.fields(ev.Config)):
        parsed = parse_args(["--nproc_per_node=2", "eval.py", flag, "5"])
        assert parsed.training_script_args == [flag, "5"]


def test_command_line(tmp_path, world):
    """Prevents a command that grades and prints no table."""
    problems = [choice(0), choice(1)]
    file = write(tmp_path / "p.jsonl", problems)
    out = make_run(tmp_path / "run", {"q/0": [say("B")] * 2, "q/1": [say("A")] * 2}, problems)
    command = [sys.executable, str(ROOT / "eval.py"), "--data", str(file), "--out", str(out)]
    command += ["--rescore", "--samples", "2", "--temperature", "0.3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, line = (x.split() for x in done.stdout.splitlines()[:2])
    assert head[:4] == ["metric", "set", "questions", "accuracy"]
    assert line[:4] == ["avg@2", "quiz", "2", "50.0"] and (out / "result.json").is_file()


@needs_real
def test_real_images_and_questions(model_dir, tmp_path, world, inline):
    """Prevents a path that works on noise only: real files of several sizes and modes, five images
    in one question, a
    page that holds the question itself, forced exit."""
    rows = []
    lines = (REAL / "images_mmmu_pro" / "questions.jsonl").read_text().splitlines()
    for i in (0, 1, 5):
        q = json.loads(lines[i])
        names = [str(REAL / "images_mmmu_pro" / q[k]) for k in sorted(q) if k.startswith("image_")]
        rows.append(
            choice(
                i,
                question="<image>" * len(names) + "Which?",
                answer=q["answer"],
                images=names,
                options=[o.replace("<image", "<picture") for o in q["options"]],
            )
        )
    page = sorted((REAL / "images_mmmu_pro" / "vision_pages").glob("*.png"))[0]
    rows.append(
        choice(
            99,
            question="<image>\nThe question and its options are in the image.",
            options=list("ABCD"),
            images=[str(page)],
        )
    )
    file = write(tmp_path / "p.jsonl", rows)
    changes = dict(think_budget=4, max_pixels=28224)
    result = ev.evaluate(config(model_dir, file, tmp_path / "out", **changes))
    assert result["sets"]["quiz"]["n"] == 4 and result["sets"]["quiz"]["forced"] == 1
    assert max(len(r["images"]) for r in rows) == 5
    assert [r["prompt"].count("<image>") for r in stored(tmp_path / "out").values()] == [1, 1, 5, 1]
