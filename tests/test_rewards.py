"""rewards.py: what counts as an answer, and how a completion becomes a score."""

from __future__ import annotations

import ast
import http.server
import importlib.util
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import REAL, needs_real

import rewards
from grading.extraction import choice_letter, extract_answer, last_boxed, stated_letter
from rewards import Grader, part_weights, reward

ROOT = Path(rewards.__file__).parent
OPTIONS = ["fever", "cough", "headache", "rash"]
MATH = {"id": "m", "task": "t", "kind": "math", "question": "What is 6 times 7?", "answer": "42"}
CHOICE = {
    "id": "c",
    "task": "t",
    "kind": "choice",
    "question": "Which?",
    "options": OPTIONS,
    "answer": "B",
}


@pytest.mark.parametrize(
    "completion, score, status",
    [
        ("<think>6*7</think><answer>42</answer>", 1, "ok"),
        (r"<think>a</think> so \boxed{42}", 1, "ok"),
        (r"<think>a</think><answer>It is \boxed{42}.</answer>", 1, "ok"),
        (r"a </think> \boxed{42}", 1, "ok"),
        (r"<think>s</think></think> \boxed{42}", 1, "ok"),
        (r"<think>no</think><answer>41</answer><answer>42</answer>", 1, "ok"),
        (r"\boxed{17}. On reflection \boxed{42}", 1, "ok"),
        (r"<think>\boxed{42}</think> done", 0, "no_answer"),
        (r"<think>the answer is \boxed{42}", 0, "no_answer"),
        (r"<think>a</think><think>b \boxed{42}", 0, "no_answer"),
        (r"<think>\boxed{42}</think> \boxed{43}", 0, "ok"),
        (r"\boxed{42}, \boxed{43}", 0, "ok"),
        (r"\boxed{42} then \boxed{43", 0, "no_answer"),
        (r"\boxed{}", 0, "no_answer"),
        (r"<answer> </answer> \boxed{42}", 0, "no_answer"),
        (r"<answer>42", 0, "no_answer"),
        ("the answer is 42", 0, "no_answer"),
        (r"\boxed{x=41=42}", 0, "ok"),
        (r"\boxed{\boxed{42}}", 1, "ok"),
        ("", 0, "no_answer"),
        ("\\boxed{" * 5000 + "42", 0, "no_answer"),
        (r"\boxed{" + "".join(f"{i}, " for i in range(101)) + "}", 0, "ok"),
    ],
)
def test_only_the_final_answer_counts(completion, score, status):
    """Thoughts, earlier boxes, hedges, shotguns and unclosed boxes must earn nothing; the final
    answer must earn 1."""
    graded = reward(MATH, completion)
    assert (graded.score, graded.status) == (score, status)


@pytest.mark.parametrize("reason", ["length", "forced+length"])
def test_a_cut_completion_scores_zero(reason):
    """Rewarding a truncated completion teaches to run on."""
    assert reward(MATH, r"\boxed{42}", reason)[::3] == (0.0, "truncated")
    assert reward(MATH, r"\boxed{42}", "forced+stop").score == 1.0
    assert reward(MATH, r"\boxed{42}", reason, lenient=True).score == 1.0


def test_an_open_thought_of_the_prompt_must_be_closed():
    """Where the prompt already says <think>, a completion without </think> is all thought."""
    assert reward(MATH, r"so \boxed{42}", open_thought=True).status == "no_answer"
    assert reward(MATH, r"so</think>\boxed{42}", open_thought=True).score == 1.0


@pytest.mark.parametrize(
    "content, letter",
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B: cough", "B"),
        ("B. cough", "B"),
        ("(B) cough", "B"),
        ("Cough.", "B"),
        (r"\text{B}", "B"),
        (r"$\text{(B)}$", "B"),
        ("**B**", "B"),
        ("B: rash", None),
        ("E", None),
        ("A or B", None),
        ("A, B", None),
        ("ABCD", None),
        ("A/B", None),
        ("A. or B.", None),
        ("A. fever B. cough", None),
        ("(A)(B)", None),
        ("b", "B"),
        ("A dog", None),
        ("the answer is B", "B"),
        ("Answer: B", "B"),
        (r"\text{Answer: } B", "B"),
        ("the answer is a dog", None),
        ("co", None),
    ],
)
def test_choice_is_one_strict_rule(content, letter):
    """A guess, the nearest option or the first letter of a list would pay for hedging."""
    assert choice_letter(content, OPTIONS) == letter
    got = extract_answer(f"<think>A</think><answer>{content}</answer>", "choice", OPTIONS)
    assert (got.text if got else None) == letter


def test_choice_texts_must_be_unique_and_letters_come_first():
    """Options ["D", "C", "B", "A"]: "A" is the first option, not the fourth; a text that two
    options share
    names neither.
    """
    assert choice_letter("A", ["D", "C", "B", "A"]) == "A"
    assert choice_letter("x", ["x", "y", "x"]) is None


@pytest.mark.parametrize(
    "text, letter",
    [
        ("…so\n\nAnswer: B", "B"),
        ("The answer is (B).", "B"),
        ("thus\n**Answer: B**", "B"),
        ("x\n\\text{Answer: B}", "B"),
        ("Answer: A\nAnswer: C", "C"),
        ("so\n'Answer: A'", "A"),
        ("x\nAnswer: cough", "B"),
        ("x\nAnswer: B. cough", "B"),
        ("The answer is A or B", None),
        ("The answer is A, B", None),
        ("x\nAnswer: A/B", None),
        ("the answer is A big surprise", None),
        ("x\nThe answer is not A", None),
        ("x\nAnswer: E", None),
        ("it might be A. or B", None),
        ("The answer: D, it doesn't make sense for it to be A or B", "D"),
        ("No letter here", None),
    ],
)
def test_stated_letter(text, letter):
    """The rule for prompts that ask for a last line "Answer: X": articles, hedges and negations are
    no statements."""
    assert stated_letter(text, OPTIONS) == letter
    assert extract_answer(text, "choice", OPTIONS) is None or choice_letter(
        text, OPTIONS
    )  # never part of the strict default


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2} and \boxed{3}", "1, 2, 3"),
        (r"\boxed{1} no no no no no \boxed{2}", "2"),
        (r"$\boxed{12}$ so $\boxed{12}$", "12"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\fbox{3}", "3"),
        (r"\boxed{1+\boxed{2}}", "1+2"),
        (r"\boxed {3}", "3"),
        (r"\\boxed{840}", "840"),
        (r"\boxed{185\}", "185"),
        (r"{{\boxed{7}", "7"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed 5", None),
        ("none", None),
        (r"\boxed{1} \boxed{2", None),
    ],
)
def test_last_boxed(text, content):
    """Brace matching: nested braces, escaped braces, nested boxes, lists of boxes, and boxes that
    are never closed."""
    assert last_boxed(text) == content


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet=st.sampled_from(list("\\boxed{}<answer>/think ABC:.$42\n")), max_size=300),
    st.sampled_from(["math", "choice", "open"]),
)
def test_no_text_makes_extraction_fail(text, kind):
    """A model writes anything; the run must go on."""
    for rule in rewards.RULES:
        extract_answer(text, kind, OPTIONS, rule=rule)
        extract_answer(text, kind, None, rule=rule, lenient=True)


@pytest.mark.parametrize("text", [r"\boxed{\text{Answer: } D}", r"\text{Option (D): }\boxed{ D }"])
def test_a_box_is_a_statement_where_a_line_was_asked_for(text):
    """Models box their letter even when the prompt asks for "Answer: X"; no letter was found."""
    for rule in ("line", "answer", "boxed"):
        assert extract_answer(f"so\n{text}", "choice", OPTIONS, rule=rule).text == "D"


def test_lenient_score_is_separate():
    """The last number of the prose is a figure for reports, never the training reward."""
    assert reward(MATH, "so it is 42.").score == 0.0
    assert reward(MATH, "so it is 42.", lenient=True).score == 1.0


def test_precision_comes_from_meta():
    """MathVista's floats are compared at the item's precision, with a unit or without."""
    problem = {"kind": "math", "answer": "1.3", "meta": {"precision": 1}}
    assert reward(problem, "<answer>1.34 years</answer>").score == 1.0
    assert reward(problem, "<answer>1.36</answer>").score == 0.0
    assert reward(MATH, "<answer>42.04</answer>").score == 0.0


def test_open_answers_are_exact_up_to_case_and_punctuation():
    """Open answers: normalised exact match or the same number, with several golds allowed; no
    nearest match."""
    problem = {"kind": "open", "answer": ["Type-II error", "a type II error"]}
    assert reward(problem, "<answer>type II  error.</answer>").score == 1.0
    assert reward(problem, "<answer>type I error</answer>").score == 0.0


def test_the_question_restated_is_no_answer():
    r"""Asked for \sum k, the policy must not be paid for answering \sum k."""
    problem = {"kind": "math", "question": r"Compute $\sum_{k=1}^{3} k$.", "answer": "6"}
    assert reward(problem, r"\boxed{\sum_{k=1}^{3} k}").score == 0.0
    assert reward(problem, r"\boxed{6}").score == 1.0


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "math", "answer": ""},
        {"kind": "math"},
        {"kind": "choice", "answer": "E", "options": OPTIONS},
        {"kind": "essay", "answer": "x"},
        {"kind": "choice", "answer": "A", "options": "['a', 'b']"},
    ],
)
def test_a_bad_row_is_an_error_not_a_crash_and_not_a_point(row):
    """An empty gold must not equal an empty box; a letter beyond the options can't be right."""
    assert reward(row, r"\boxed{}")[::3] == (0.0, "error")
    assert rewards.unverifiable(row)


def test_a_row_that_breaks_the_schema_costs_itself_only():
    """An exception in the cheap path would end the run from inside the training loop."""
    assert reward(MATH | {"meta": ["not", "a", "dict"]}, r"\boxed{42}").status == "error"
    with Grader(workers=1) as grader:
        assert grader.submit(MATH | {"meta": 3}, r"\boxed{42}").result().status == "error"


@pytest.mark.parametrize(
    "question, gold, copied, right",
    [
        (r"Simplify $\sqrt{242}$.", r"11\sqrt{2}", r"\sqrt{242}", r"11 \sqrt2"),
        ("Factor $ab+5b+2a+10$.", "(a+5)(b+2)", "ab + 5b+2a+10", "(b+2)(a+5)"),
        (r"Compute $\sum_{k=1}^{3} k$.", "6", r"\sum_{k=1}^{3} k", "6.0"),
        (r"Write $\frac{3}{4}$ as a decimal.", "0.75", None, "3/4"),
    ],
)
def test_a_formula_copied_from_the_question_never_pays(question, gold, copied, right):
    """Algebra would call the copy equal: a policy that repeats the question would be paid."""
    problem = {"kind": "math", "question": question, "answer": gold}
    assert copied is None or reward(problem, rf"\boxed{{{copied}}}").score == 0.0
    assert reward(problem, rf"\boxed{{{right}}}").score == 1.0


def test_all_options_in_one_box_are_no_letter():
    """The gold (A) stands in "(A) 1 (B) 2 (C) 3": whoever lists all options would always be
    right."""
    for gold in ("(A)", "A", r"\text{(A)}"):
        problem = {"kind": "math", "question": "", "answer": gold}
        assert reward(problem, r"\boxed{(A) 1 (B) 2 (C) 3}").score == 0.0
        assert reward(problem, r"\boxed{\textbf{(A) } 1}").score == 1.0


def test_numbers_of_any_library_and_no_others(tmp_path, monkeypatch):
    """A torch scalar is a number; 10**400 raised OverflowError in a callback and hung the run."""
    (tmp_path / "odd.py").write_text(
        "import numpy as np, torch\n"
        "VALUES = dict(np=np.float32(0.5), np64=np.int64(1), torch=torch.tensor(0.25),\n"
        "              big=10**400, huge=10**9999, bool=True, array=np.zeros(3),\n"
        "              parts={'parts': [1]},\n"
        "              nested={'score': np.float64(2), 'parts': {'a': torch.tensor(2)}})\n"
        "def score(problem, completion, finish_reason):\n    return VALUES[completion]\n"
    )
    names = ("np", "np64", "torch", "big", "huge", "bool", "array", "parts", "nested")
    with Grader(workers=1, deadline=20, memory_gb=16, reward=f"{tmp_path}/odd.py:score") as grader:
        got = {n: grader.submit(MATH, n).result(60) for n in names}
    scores = {n: g.score for n, g in got.items() if g.status == "ok"}
    assert scores == {"np": 0.5, "np64": 1, "torch": 0.25, "bool": 1, "nested": 2}
    assert got["nested"].parts == {"a": 2.0} and got["big"].status == "error"


def test_named_parts_and_a_class_from_a_file(tmp_path):
    """A reward in parts: each is kept by name; without a score it is their sum."""
    (tmp_path / "mine.py").write_text(
        "from neighbour import WEIGHT\n"
        "class Score:\n"
        "    def __init__(self):\n        self.calls = 0\n"
        "    def __call__(self, problem, completion, finish_reason):\n"
        "        self.calls += 1\n"
        "        parts = {'correct': 1, 'format': WEIGHT * self.calls}\n"
        "        return {'parts': parts} if completion == 'sum' else {'score': 3, 'parts': parts}\n"
    )
    (tmp_path / "neighbour.py").write_text("WEIGHT = 0.5\n")
    with Grader(workers=1, reward=f"{tmp_path / 'mine.py'}:Score") as grader:
        first, second = (grader.submit(MATH, text).result() for text in ("", "sum"))
        assert grader.trial(MATH).endswith("the right answer to m: 3, correct 1, format 1.5")
    assert first.score == 3 and first.parts == {"correct": 1, "format": 0.5}
    assert second.score == 2 and second.parts == {"correct": 1, "format": 1.0}


def test_weights_of_named_parts(tmp_path):
    """With weights the score is their sum, whatever the function says; a misspelt part fails."""
    (tmp_path / "mine.py").write_text(
        "def score(problem, completion, finish_reason):\n"
        "    return {'score': 9, 'parts': {'correct': 1, 'format': 1}}\n"
    )
    function = f"{tmp_path / 'mine.py'}:score"
    for flags, expected in ((["format=0.5"], 1.5), (["format=0", "correct=2"], 2), ([], 9)):
        with Grader(workers=1, reward=function, weights=part_weights(flags, function)) as grader:
            assert grader.submit(MATH, "").result().score == expected
    with Grader(workers=1, reward=function, weights={"formt": 1.0}) as grader:
        said = "--reward_weights names 'formt'; parts of the reward: correct, format"
        assert grader.submit(MATH, "").result().why == said
        with pytest.raises(ValueError, match=said):  # before any sampling
            grader.trial(MATH)
    for flags, reward_function in ((["format"], "x"), (["a=b"], "x"), (["a=1"], "")):
        with pytest.raises(ValueError, match="--reward_weights"):
            part_weights(flags, reward_function)


def test_the_table_at_the_head_of_rewards():
    """The first thing that a reader sees must be what the code does."""
    rows = [re.split(r"\s{2,}", r) for r in rewards.__doc__.splitlines() if r.startswith("    ")]
    assert len(rows) == 8
    for completion, extracted, score, *_ in (r[1:] for r in rows[1:]):
        text, _, gold = completion.partition(", gold ")
        problem = CHOICE if gold else MATH
        graded = reward(problem, text, "length" if "cut at" in text else "stop")
        assert graded.score == float(score), text
        assert graded.answer == (None if extracted == "nothing" else extracted)


def test_the_exact_rule_inside_a_users_reward(tmp_path):
    """Algebra runs in that worker itself: loading sympy must not count against the answer."""
    (tmp_path / "rewards.py").write_text(  # its name doesn't hide ours
        "import rewards\ndef score(*args):\n    return rewards.reward(*args).score\n"
    )
    problem = {"kind": "math", "answer": r"2\sqrt{3}"}
    with Grader(workers=1, deadline=60, reward=f"{tmp_path}/rewards.py:score") as grader:
        got = [grader.submit(problem, rf"\boxed{{\sqrt{{{n}}}}}").result() for n in (12, 12, 13)]
    assert [(g.score, g.status) for g in got] == [(1, "ok"), (1, "ok"), (0, "ok")]


class _Judge(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"equal": asked["answer"] == "forty-two"}).encode())

    def log_message(self, *_):
        pass


def test_the_examples_of_the_page_on_rewards(tmp_path, monkeypatch):
    """docs/rewards.md: each block is a file that --reward takes, and scores what the page says."""
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    bonus, length, judge = re.findall(r"```python\n(.*?)```", page, re.S)
    full, long = "<think>6*7</think><answer>42</answer>", "x" * 3000 + r"\boxed{42}"
    server = http.server.ThreadingHTTPServer(("localhost", 0), _Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("JUDGE_URL", f"http://localhost:{server.server_port}")
    monkeypatch.setenv("no_proxy", "localhost")
    for code, name, texts, scores in (
        (bonus, "score", [full, r"\boxed{42}", r"\boxed{41}"], [1.1, 1.0, 0.0]),
        (length, "score", [r"\boxed{42}", long, long.replace("42", "41")], [1.0, 0.7475, 0.0]),
        (
            judge,
            "Judge",
            [full, "<answer>forty-two</answer>", "<answer>41</answer>", "?"],
            [1, 1, 0, 0],
        ),
    ):
        (tmp_path / "mine.py").write_text(code)
        with Grader(workers=1, reward=f"{tmp_path}/mine.py:{name}") as grader:
            got = [grader.submit(MATH, text).result(60) for text in texts]
        assert [g.status for g in got] == ["ok"] * len(texts)
        assert [g.score for g in got] == pytest.approx(scores) and all(g.parts for g in got)
    server.shutdown()


def test_where_a_reward_is_looked_for_is_said(tmp_path, monkeypatch):
    """`--reward path/file.py` in another folder ended in "No module named path/file"."""
    monkeypatch.chdir(tmp_path)
    for name, said in (
        ("not_here:score", str(tmp_path)),
        ("sub/mine.py:score", str(tmp_path / "sub" / "mine.py")),
        ("sub/mine.py", "file.py:function"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            Grader(workers=1, reward=name)


def test_rules_of_a_user(tmp_path, monkeypatch):
    """--reward module:function: exceptions, NaN and None are counted, never fatal, and cost one
    answer each."""
    (tmp_path / "mine.py").write_text(
        "import time\ndef score(problem, completion, finish_reason):\n"
        "    if completion == 'raise': 1 / 0\n    if completion == 'hang': time.sleep(99)\n"
        "    odd = {'none': None, 'nan': float('nan'), 'text': 'x'}\n"
        "    odd['dict'] = {'score': 0.5, 'answer': 7}\n"
        "    return odd.get(completion, len(completion) / 10)\n"
    )
    monkeypatch.chdir(tmp_path)
    with Grader(workers=1, deadline=4, reward="mine:score") as grader:
        got = {
            c: grader.submit(MATH, c).result()
            for c in ("raise", "hang", "none", "nan", "text", "dict", "12345")
        }
        kills = grader.pool.kills
    assert {c: (g.score, g.status) for c, g in got.items()} == {
        "raise": (0.0, "error"),
        "hang": (0.0, "timeout"),
        "none": (0.0, "error"),
        "nan": (0.0, "error"),
        "text": (0.0, "error"),
        "dict": (0.5, "ok"),
        "12345": (0.5, "ok"),
    }
    assert got["dict"].answer == "7" and "ZeroDivisionError" in got["raise"].why
    assert kills == 1


HANGING = (  # guards refuse the first two; the others take minutes of algebra
    r"\boxed{10^{9^{9}}}",
    r"\boxed{\binom{10^8}{5*10^7}}",
    r"\boxed{\sin(\sin(\sin(\sin(10^{5000}))))}",
    r"\boxed{((x+1)^{900}+y)^{900}-((x+1)^{900}+y)^{901}}",
)


def test_hanging_answers_cost_themselves_only():
    """Innocent answers among hanging ones must keep their score, from several threads, in any
    order."""
    innocent = [
        (r"\frac{x+1}{2}", "0.5x+0.5", 1.0),
        (r"2\sqrt3", r"\sqrt{12}", 1.0),
        (r"\sqrt{3}", r"\sqrt{5}", 0.0),
        ("42", "42", 1.0),
    ]
    jobs = [
        ({"kind": "math", "answer": gold}, rf"\boxed{{{pred}}}", score)
        for pred, gold, score in innocent * 25
    ]
    golds = ("42", "42", r"\sqrt{2}", "x^2")
    jobs[10:10] = [({"answer": g}, text, 0.0) for g, text in zip(golds, HANGING)]
    with Grader(workers=2, deadline=5) as grader:
        with ThreadPoolExecutor(4) as threads:
            futures = list(threads.map(lambda job: grader.submit(*job[:2]), jobs))
        results = [f.result(60) for f in futures]
    assert [r.score for r in results] == [s for *_, s in jobs]


def test_reward_and_is_equal_work_off_the_main_thread():
    """math-verify alone raises there, and the usual `except: return 0` turns every answer into a
    wrong one."""
    out = []
    thread = threading.Thread(
        target=lambda: out.extend(
            [
                rewards.is_equal(r"2\sqrt3", r"\sqrt{12}"),
                reward(MATH, r"\boxed{2\cdot 3\cdot 7}").score,
            ]
        )
    )
    thread.start()
    thread.join(60)
    assert out == [True, 1.0]


@needs_real
def test_labelled_rows_keep_their_agreement():
    """Rows of public graders' suites: two hedges and two texts missed, nothing wrong is paid."""
    path = ROOT / "benchmarks" / "rewards.py"
    spec = importlib.util.spec_from_file_location("grading_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    missed = {}
    for name, rows in benchmark.development(REAL / "rewards_dev.jsonl").items():
        with_box = [reward(p, text, rule="boxed").score > 0 for p, text, _ in rows]
        assert not [r for r, paid in zip(rows, with_box) if paid and not r[2]]
        missed[name] = sum(right and not paid for (*_, right), paid in zip(rows, with_box))
    assert missed == {"dev: bare math": 2, "dev: whole text": 2, "dev: attacks": 0}


@needs_real
def test_mmmu_pro_outputs_agree_with_the_official_letters():
    """250 real GPT-4o outputs: the "Answer: X" rule differs from the official parser in two ("A.
    (D)", and no
    letter at all).
    """
    rows = [json.loads(line) for line in (REAL / "mmmu/gpt4o_standard10_cot_250.jsonl").open()]
    differ = []
    for row in rows:
        answer = extract_answer(
            row["response"], "choice", ast.literal_eval(row["options"]), rule="line"
        )
        if (answer.text if answer else None) != row["pred_indexs"]:
            differ.append(row["id"])
    assert differ == ["test_Chemistry_362", "test_Accounting_13"]
