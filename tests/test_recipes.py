"""The recipes run as they stand, their flags exist, the made-up releases are in the published
forms, the paper's numbers and the docs' how-tos are true. RECIPES=full also runs the smoke modes
to their end (some minutes)."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import binomtest
from tiny_model import reference

import data
from convert import conversion as convert
from convert import public, releases
from convert.__main__ import main as convert_main
from core.images import ImageConfig
from scoring import tables
from scoring.stats import wilson
from toy import table as toy_table
from toy import world as toy

sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "results")]
import compare as compare_runs  # noqa: E402
import smoke_data  # noqa: E402

RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
DOCS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "results/README.md",
]


def run_recipe(name: str, folder: Path, *arguments: str, **env) -> str:
    """A recipe, in smoke mode where it has one, with this interpreter; its whole output."""
    env = {
        **os.environ,
        "SMOKE": "1",
        "VENV": "none",
        "RUNS": str(folder),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **env,
    }
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / name), *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


# --------------------------------------------------------------------------------- the scripts run
def test_one_ablation_runs_and_a_second_start_finds_it_done(tmp_path):
    """A step that isn't skipped when it is done would train for days again; one that is skipped
    too early is lost."""
    settings = dict(ONLY="direct", BENCHMARKS="gsm8k")
    first = run_recipe("ablations.sh", tmp_path, **settings)
    assert "+ python train_sft.py" in first and "+ python eval.py" in first
    assert re.search(r"^\| direct \| \d", (tmp_path / "ablations.md").read_text(), re.M)
    (tmp_path / "data/gsm8k.jsonl.info.json").unlink()  # as if stopped while this was made
    second = run_recipe("ablations.sh", tmp_path, **settings)
    assert "train_sft.py" not in second and "eval.py" not in second
    assert re.findall(r"\+ python -m convert (\w+)", second) == ["gsm8k"]
    assert "| direct |" in second


def test_an_ablation_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="error: ONLY=rl_onl: no such row"):
        run_recipe("ablations.sh", tmp_path, ONLY="sft rl_onl")
    assert not (tmp_path / "data").exists()


def files_of(out):
    """{file: when it was written}, without the report, which is drawn again each time."""
    files = [f for f in out.rglob("*") if f.is_file() and f.suffix not in (".html", ".svg")]
    return {f: f.stat().st_mtime_ns for f in files}


def demo(tmp_path, *flags, **settings):
    """(the last line's table, the demo's folder)"""
    said = run_recipe("demo.sh", tmp_path, "--quick", "--from_scratch", *flags, **settings)
    return json.loads(said.splitlines()[-1]), tmp_path / "demo-0-from-scratch-quick"


def test_demo_runs_from_nothing_to_its_report_and_goes_on(tmp_path):
    """The command that everybody tries first: base, both stages, every evaluation, table and
    report, by two ranks. A second start does nothing again."""
    table, out = demo(tmp_path)
    assert table["vision_untouched"] is True
    assert set(table) == {"base", "direct", "sft", "grpo", "blind", "vision_untouched"}
    assert all(set(table[name]) == set(toy.TASKS[:4]) for name in ("base", "direct", "sft", "grpo"))
    assert all("exit_accuracy" in table[name]["image"] for name in ("sft", "grpo"))
    page = (out / "report.html").read_text()
    assert "SFT + GRPO" in page and "Stage two: GRPO" in page
    assert "<svg" in (out / "accuracy.svg").read_text()
    made = files_of(out)
    assert demo(tmp_path)[0] == table and files_of(out) == made
    assert toy_table.same_vision(out / "base", out / "sft" / "final")


@pytest.mark.skipif(os.environ.get("RECIPES") != "full", reason="minutes: set RECIPES=full")
def test_the_demos_controls_add_only_what_is_new(tmp_path):
    """Its SFT without thoughts or with images, and GRPO from the base."""
    table, out = demo(tmp_path)
    made = files_of(out)
    data_files = {f: f.read_bytes() for f in (out / "data").glob("*.jsonl")}
    controls, _ = demo(tmp_path, "--controls", NPROC="1")
    assert {k: v for k, v in controls.items() if k in table} == table
    longer, votes = {"sft-long", "grpo-long"}, {"sft-votes", "grpo-votes"}
    assert set(controls) - set(table) == {"rl_only", "with_images"} | longer | votes
    assert "exit_accuracy" in controls["with_images"]["image"]
    assert "pass@8" in controls["grpo-votes"]["image"]
    assert data_files == {f: f.read_bytes() for f in data_files}  # written again, as they were
    again = files_of(out)
    assert all(again[f] == t for f, t in made.items() if "data" not in f.parts)
    towers = {
        name: toy_table.same_vision(out / "base", out / name / "final")
        for name in ("sft", "direct", "with_images")
    }
    assert towers == {"sft": True, "direct": True, "with_images": False}


@pytest.mark.skipif(os.environ.get("RECIPES") != "full", reason="minutes: set RECIPES=full")
@pytest.mark.parametrize(
    "name, last",
    [
        ("x_reasoner.sh", "x_reasoner  gsm8k"),
        ("x_reasoner_med.sh", "x_reasoner_med  medqa"),
        ("ablations.sh", "| sft_16k_rl |"),
    ],
)
def test_smoke_mode_runs_to_its_table(name, last, tmp_path):
    """A recipe that breaks in its last line costs its user a week."""
    assert last in run_recipe(name, tmp_path)


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.name)
def test_shell_syntax(file):
    assert subprocess.run(["bash", "-n", str(file)], capture_output=True).returncode == 0


def flags_by_script() -> dict[str, set[str]]:
    """The flags of each script, from its Config."""
    import eval as evaluation
    import train_grpo
    import train_sft

    return {
        name: {f.name for f in dataclasses.fields(config)}
        | {a.lstrip("-") for f in dataclasses.fields(config) for a in f.metadata.get("aliases", [])}
        for name, config in (
            ("train_sft", train_sft.Config),
            ("train_grpo", train_grpo.Config),
            ("eval", evaluation.Config),
        )
    }


CALLS = {
    "train_sft": r"train_sft\.py|\bsft\b|SFT_FLAGS|SFT=",
    "train_grpo": r"train_grpo\.py|\bgrpo\b|GRPO_FLAGS|RL=",
    "eval": r"\beval\.py|\bevaluate\b|\bablate \w+ +eval|EVAL_FLAGS|EVAL=|STYLE=|protocol=",
}
OTHERS = r"python -m \w|torchrun --(?!nproc)"  # commands with flags of their own


@pytest.mark.parametrize(
    "file", [p for p in [*RECIPES, *DOCS] if p.name != "demo.sh"], ids=lambda p: p.name
)
def test_every_flag_of_recipes_and_docs_exists(file):
    """A renamed flag would stop a recipe after its most expensive step."""
    known, wrong = flags_by_script(), []
    for line in re.sub(r"\\\n\s*", " ", file.read_text()).splitlines():
        flags = set(re.findall(r"(?<![\w-])--([a-z_]+)", line.partition(" # ")[0])) - {
            "nproc_per_node",
            "help",
        }
        scripts = [s for s, pattern in CALLS.items() if re.search(pattern, line)]
        if scripts and not re.search(OTHERS, line):
            wrong += [
                f"{file.name}: --{flag}"
                for flag in flags
                if not any(flag in known[s] for s in scripts)
            ]
    assert not wrong


# --------------------------------------------------------------------------------- madeup releases
def recipe_sets() -> list[str]:
    """Every data set that a recipe names."""
    text = "\n".join(p.read_text() for p in RECIPES)
    named = (
        re.findall(r"^data (\w+)", text, re.M)
        + " ".join(re.findall(r"(?:BENCHMARKS:-|\ball\+?=\")([\w ]+)", text)).split()
    )
    return sorted(set(named))


def test_made_up_releases_have_the_published_forms(tmp_path):
    """The recipes' converters must meet in smoke mode what they will meet in earnest: a folder for
    each set."""
    smoke_data.write(tmp_path)
    assert len(recipe_sets()) == 18
    for name in recipe_sets():
        release = {
            "openthoughts_direct": "openthoughts",
            "medqa_train": "medqa",
            "geometry3k_test": "geometry3k",
        }.get(name, name)
        out = tmp_path / "data" / f"{name}.jsonl"
        info = convert.convert(name, [str(tmp_path / "releases" / release)], str(out))
        assert info["rows_out"] == info["rows_in"] >= smoke_data.ROWS, name
        good, faults = (data.load_conversations if "openthoughts" in name else data.load_problems)(
            out
        )
        assert len(good) == info["rows_out"] and not faults


def test_the_train_and_test_splits_of_medqa_are_read_apart(tmp_path):
    """Both lie in one zip: reading the wrong one would train on the test set."""

    def row(q):
        options = dict(zip("ABCDE", "12345"))
        return {"question": q, "answer": "1", "options": options, "answer_idx": "A"}

    with zipfile.ZipFile(tmp_path / "data_clean.zip", "w") as archive:
        for split in ("train", "dev", "test"):
            archive.writestr(f"data_clean/questions/US/{split}.jsonl", json.dumps(row(split)))
    for name, split in (("medqa", "test"), ("medqa_train", "train")):
        convert.convert(name, [str(tmp_path)], str(tmp_path / "out.jsonl"))
        assert [p["question"] for p in data.load_problems(tmp_path / "out.jsonl")[0]] == [split]


def test_direct_rows_hold_the_question_and_the_boxed_answer_alone():
    """A thought left in would make the ablation without thoughts another one with thoughts."""
    reply = (
        "<|begin_of_thought|>\n\nhm\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nSo "
        "\\boxed{\\frac{1}{2}}.\n\n"
        "<|end_of_solution|>"
    )
    row = releases.Row(
        conversations=[
            {"from": "user", "value": "Half of 1?"},
            {"from": "assistant", "value": reply},
        ]
    )
    assert [m["content"] for m in public.openthoughts_direct(row)["messages"]] == [
        "Half of 1?",
        "<answer>\n\\frac{1}{2}\n</answer>",
    ]


# ------------------------------------------------------------------------------ rejection sampling
def sample(**changes) -> dict:
    return {
        "id": "q",
        "sample": 0,
        "tokens": [1],
        "prompt": "6·7?",
        "text": "<think>six sevens</think>\n<answer>42</answer>",
        "finish_reason": "stop",
        "reward": 1.0,
        "lenient": 1.0,
        "answer": "42",
        **changes,
    }


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"reward": 0.0}, "wrong"),
        ({"finish_reason": "length"}, "truncated"),
        ({"finish_reason": "forced+stop"}, "forced"),
        ({"text": "<answer>42</answer>"}, "no closed thought"),
        ({"text": "<think> </think><answer>42</answer>"}, "empty"),
        ({"text": "<think>a</think> b</think><answer>42</answer>"}, "tag"),
    ],
)
def test_what_a_student_must_not_learn_is_left_out(changes, reason):
    """Wrong, cut or broken traces in the data teach exactly that."""
    with pytest.raises(releases.Drop, match=reason):
        public.from_samples(releases.Row(sample(**changes)))


@pytest.mark.parametrize(
    "text",
    [
        "<think>six sevens</think>\n<answer>42</answer>",
        "six sevens\n</think>\n\n<answer>42</answer>",
        "<think>\nsix sevens\n</think>\nSo it is \\boxed{42}.",
    ],
)
def test_kept_samples_have_the_form_of_the_first_stage(text):
    """QwQ's template opens the thought in the prompt, so its text has no <think>; other teachers
    box their answers."""
    made = public.from_samples(releases.Row(sample(text=text)))
    assert made["messages"] == [
        {"role": "user", "content": "6·7?"},
        {"role": "assistant", "content": "<think>\nsix sevens\n</think>\n<answer>\n42\n</answer>"},
    ]


def test_from_samples_reads_an_evaluation_and_counts(tmp_path, capsys):
    rows = [
        sample(),
        sample(sample=1),
        sample(sample=2, text="<think>b</think><answer>42</answer>"),
        sample(id="r", reward=0.0),
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    convert_main(["from_samples", str(tmp_path), "--out", str(tmp_path / "traces.jsonl")])
    said = capsys.readouterr().out
    assert "2 rows of 4" in said and "dropped 1: the same as another" in said
    assert "dropped 1: wrong" in said
    good, faults = data.load_conversations(tmp_path / "traces.jsonl")
    assert len(good) == 2 and not faults


def test_images_of_kept_samples_are_found_from_the_new_file(tmp_path):
    """The new jsonl may lie in another folder than the problems: its images lie beside it."""
    image = tmp_path / "1.png"
    image.write_bytes(smoke_data.question(np.random.default_rng(0))["picture"])
    (tmp_path / "samples.jsonl").write_text(
        json.dumps(sample(prompt="What? <image>", images=[str(image)])) + "\n"
    )
    with pytest.raises(ValueError, match="is the source itself"):
        convert.convert("from_samples", [str(tmp_path)], str(tmp_path / "samples.jsonl"))
    convert.convert("from_samples", [str(tmp_path)], str(tmp_path / "new/traces.jsonl"))
    (row,), faults = data.load_conversations(tmp_path / "new/traces.jsonl")
    assert not faults and Path(row["images"][0]).read_bytes() == image.read_bytes()


def test_from_samples_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no table whose name matches .*samples"):
        convert.convert("from_samples", [str(tmp_path)], str(tmp_path / "x"))
    (tmp_path / "samples.jsonl").write_text(
        json.dumps({k: v for k, v in sample().items() if k != "lenient"}) + "\n"
    )
    with pytest.raises(ValueError, match="samples.jsonl row 0: not graded"):
        convert.convert("from_samples", [str(tmp_path)], str(tmp_path / "x"))


# ----------------------------------------------------------------------------- the paper's numbers
def result(temperature=0, compare=None, settings=(), sets=(), **changes) -> dict:
    """A result.json under the paper's protocol, but for `changes`; sets: name → (n, mean, half)."""
    outputs = {"forced": 0.1, "truncated": 0, "unparsed": 0, "words_mean": 9}
    return {
        "settings": {**compare_runs.PROTOCOL, "temperature": temperature, **dict(settings)},
        "rules": {"rule": "answer"},
        "dropped": 0,
        "limit": 0,
        "compare": compare,
        "sets": {
            name: {"n": n, "accuracy": a, "low": a - h, "high": a + h, **outputs}
            for name, (n, a, h) in dict(sets).items()
        },
        **changes,
    }


def stored(folder: Path, value: dict) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps(value))
    return str(folder)


def test_paper_json_names_known_sets_and_each_number_once():
    rows = compare_runs.PAPER["results"]
    keys = [(r["model"], r["protocol"], r["set"]) for r in rows]
    assert len(set(keys)) == len(keys)
    assert {s.partition(":")[0] for *_, s in keys} <= convert.SPECS.keys()
    assert {s for *_, s in keys} == compare_runs.PAPER["questions"].keys()
    for name, n in compare_runs.PAPER["questions"].items():
        if name in convert.SPECS and name != "omnimedvqa":
            assert convert.SPECS[name].rows == n


def test_a_difference_is_judged_by_both_intervals():
    """Judged by ours alone, half of all honest reproductions of MMMU would be called failures."""
    sets = dict(mmmu=(900, 0.50, 0.033), gsm8k=(1319, 0.75, 0.023), mathvista=(20, 0.1, 0.2))
    by_set = {line[1]: line for line in compare_runs.levels("base", result(sets=sets))}
    ci = binomtest(477, 900).proportion_ci(method="wilson")
    assert by_set["mmmu"][4] == f"53.0 ± {50 * (ci.high - ci.low):.1f}"
    assert by_set["mmmu"][5:7] == ["-3.0 ± 4.6", "within noise"]
    assert by_set["gsm8k"][5].startswith("-9.9 ±") and by_set["gsm8k"][6] == "beyond noise"
    assert by_set["mathvista"][2] == "20 of 1000" and by_set["mathvista"][6] == "too few questions"


def test_protocols_are_not_mixed(tmp_path, capsys):
    """Five samples against greedy, or filtered questions against all, differ by the protocol."""
    assert compare_runs.protocol_of(result()) == "greedy"
    assert compare_runs.protocol_of(result(temperature=0.3)) == "avg@5"
    filtered = result(dropped=308, temperature=0.3, sets=dict(mmmu=(592, 0.4, 0.04)))
    assert compare_runs.levels("base", filtered)[0][2:4] == ["592", "40.0 ± 4.0"]
    runs = [
        stored(tmp_path / n, result(t, sets={"mmmu": (9, 0.5, 0.1)}))
        for n, t in (("a", 0), ("b", 0.3))
    ]
    with pytest.raises(SystemExit) as end:
        compare_runs.main([f"base={runs[0]}", f"x_reasoner={runs[1]}"])
    assert end.value.code == 2 and "different protocols" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"settings": {"think_budget": 0}}, "--think_budget 0 (paper: 3800)"),
        ({"settings": {"prompt_style": "train"}}, "--prompt_style train (paper: kind)"),
        ({"settings": {"max_pixels": 100_000}}, "--max_pixels 100000"),
        ({"temperature": 0.6}, "--temperature 0.6 (paper: 0 or 0.3)"),
        ({"limit": 100}, "--limit 100"),
        ({"bad_rows": 3}, "3 rows left out"),
        ({"rules": {"rule": "line"}}, "--rule line"),
    ],
)
def test_a_protocol_that_departs_is_named_in_the_first_line(changes, named):
    """A run without forced exit, on 100 questions or at another temperature read as a
    reproduction."""
    sets = dict(mmmu=(900, 0.5, 0.03))
    assert "NOT THE PAPER" not in compare_runs.report([("base", result(sets=sets))])
    line = compare_runs.report([("base", result(sets=sets, **changes))]).splitlines()[0]
    assert "NOT THE PAPER'S PROTOCOL: base: " in line and named in line


def test_gains_are_paired_where_eval_paired_them():
    base, ours = (result(sets=dict(mmmu=(900, a, 0.03))) for a in (0.53, 0.56))
    (line,) = compare_runs.gains("x_reasoner", ours, base)
    assert line[2] == "+3.0 ± 4.2" and line[3].startswith("+3.4 ±")
    ours["compare"] = {"sets": {"mmmu": {"low": 0.01, "high": 0.05}}}
    assert compare_runs.gains("x_reasoner", ours, base)[0][2] == "+3.0 ± 2.0"


def test_comparison_refuses_what_it_does_not_know(tmp_path):
    """A traceback, or a table without a meaning, for a wrong folder, name or kind of run."""
    with pytest.raises(ValueError, match="no result.json"):
        compare_runs.load(f"base={tmp_path}")
    with pytest.raises(ValueError, match="no such model"):
        compare_runs.load(f"mine={tmp_path}")
    blind = stored(tmp_path / "blind", result(settings={"blind": True}, sets={"mmmu": (9, 0.1, 0)}))
    with pytest.raises(ValueError, match="--blind; the paper has no number"):
        compare_runs.load(blind)
    for text in ("[]", "{", '{"sets": {}}'):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(ValueError, match="result.json: not written by eval.py"):
            compare_runs.load(f"base={tmp_path}")


def test_table_has_a_row_per_run_and_all_their_sets(tmp_path):
    a, b = (
        stored(tmp_path / name, result(sets=sets))
        for name, sets in (("a", dict(gsm8k=(9, 0.5, 0.25))), ("b", dict(mmmu=(9, 0.25, 0.1))))
    )
    assert tables.summary([a, f"GRPO={b}"]).splitlines() == [
        "| run | gsm8k | mmmu | forced | truncated | unparsed | words |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| a | 50.0 ± 25.0 |  | 10% | 0% | 0% | 9 |",
        "| GRPO |  | 25.0 ± 10.0 | 10% | 0% | 0% | 9 |",
    ]


def test_the_noise_table_is_true():
    """A user decides by it whether a gap is worth a week."""
    listed = re.findall(
        r"^\| ([\w:]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (ROOT / "results/README.md").read_text(),
        re.M,
    )
    assert {name: int(n.replace(",", "")) for name, n, *_ in listed} == compare_runs.PAPER[
        "questions"
    ]
    for _, n, width, visible in listed:
        n = int(n.replace(",", ""))
        low, high = wilson(0.5, n)
        assert float(width) == pytest.approx(50 * (high - low), abs=0.051)
        assert float(visible) == pytest.approx(100 * (1.96 + 0.8416) * (0.25 / n) ** 0.5, abs=0.06)


# -------------------------------------------------------------------------------- the docs' howtos
def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), re.S)


def test_the_documented_reward_works(tmp_path):
    (source,) = [b for b in blocks("CONTRIBUTING.md", "python") if "def score" in b]
    space: dict = {}
    exec(source, space)
    problem = {"id": "q", "task": "t", "kind": "math", "question": "6·7?", "answer": "42"}
    assert space["score"](problem, "<think>x</think><answer>42</answer>", "stop") == 1
    assert space["score"](problem, f"<think>{'x' * 2000}</think><answer>42</answer>", "stop") == 0.5


def test_the_documented_data_set_converts(tmp_path, monkeypatch):
    """A how-to that doesn't work costs each of its readers an evening."""
    (source,) = [b for b in blocks("CONTRIBUTING.md", "python") if "def aime" in b]
    monkeypatch.setattr(convert, "SPECS", dict(convert.SPECS))
    exec(source, vars(public).copy() | {"SPECS": convert.SPECS})
    (tmp_path / "aime_2024.jsonl").write_text(
        json.dumps({"ID": "2024-I-1", "Problem": "How many?", "Answer": 204}) + "\n"
    )
    convert.convert("aime", [str(tmp_path)], str(tmp_path / "out.jsonl"))
    (row,) = data.load_problems(tmp_path / "out.jsonl")[0]
    assert (row["id"], row["kind"], row["answer"]) == ("aime/2024-I-1", "math", "204")


def test_the_worked_ablation_applies_and_its_test_can_fail(tmp_path):
    """The tutorial's diff fits the file as it is now, in the promised number of lines; its own
    test passes with it."""
    if shutil.which("patch") is None:
        pytest.skip("no patch command")
    (change,) = blocks("docs/ablation.md", "diff")
    assert sum(line.startswith("+") for line in change.splitlines()) <= 10
    shutil.copy(ROOT / "train_grpo.py", tmp_path / "changed_grpo.py")
    done = subprocess.run(
        ["patch", str(tmp_path / "changed_grpo.py")], input=change, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (test,) = [b for b in blocks("docs/ablation.md", "python") if "def test_" in b]
    name = re.search(r"def (test_\w+)", test)[1]
    call = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\nimport torch\n"
        "from types import SimpleNamespace\n"
        f"from changed_grpo import Config, grpo_loss\n{test}\n{name}()"
    )
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_of_the_docs_can_be_split():
    """A quote that is never closed, a typo in a loop."""
    for file in DOCS:
        for block in blocks(str(file.relative_to(ROOT)), "bash"):
            assert (
                subprocess.run(
                    ["bash", "-n"], input=block, text=True, capture_output=True
                ).returncode
                == 0
            ), block
            for line in re.sub(r"\\\n", " ", block).splitlines():
                script = next(
                    (w for w in shlex.split(line, comments=True) if w.endswith((".py", ".sh"))),
                    None,
                )
                assert script is None or (ROOT / script).is_file(), line


def test_the_tiny_qwen3_vl_is_one_for_transformers_too(tmp_path):
    """Keys, sizes or settings of another architecture: the smoke run of a Qwen3-VL would show
    nothing."""
    smoke_data.write_qwen3_vl(tmp_path / "base")
    config = reference(tmp_path / "base").config
    assert config.model_type == "qwen3_vl" and config.text_config.head_dim == 48
    images = ImageConfig.from_dir(tmp_path / "base")
    assert (images.patch_size, images.image_mean) == (16, (0.5,) * 3)


def test_a_python_that_is_too_old_is_named_before_anything_is_installed(tmp_path):
    """pip would find no numpy for it, after torch's gigabytes."""
    (tmp_path / "python3").write_text("#!/bin/sh\n[ $1 != -c ] && echo Python 3.10.12\n")
    (tmp_path / "python3").chmod(0o755)
    command = ["bash", "-ec", f". {ROOT}/recipes/env.sh requirements.txt"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Python 3.10.12 is too old" in done.stderr
    assert not (tmp_path / ".venv").exists()
