"""The report tells the truth about its runs, survives what they lack, lets no model write HTML."""

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from core.samples import Sample, write_samples
from report import page as report
from report.runs import choose_lines, evenly, find_runs, load_run
from scoring.tables import COLUMNS

ATTACK = "</script></script ><script>alert(1)</script><img src=x onerror=alert(2)><!--'\"&amp;"
ATTACK += " @@TITLE@@ $\\frac$ é 🂡"


def samples_of(n: int, text: str = "so 6·7 = 42", **more) -> list[Sample]:
    """n samples, eight a problem; their second token was forced."""
    fields = dict(tokens=[1, 2, 3], forced_at=1, forced_tokens=1, finish_reason="stop", text=text)
    fields |= dict(prompt="<|im_start|>user\n6·7?<|im_end|>\n", task="sums", gold="42", answer="42")
    logprobs = np.array([-1, -2, -3], np.float32)
    return [
        Sample(id=f"q{i // 8}", sample=i % 8, problem=i // 8, logprobs=logprobs, **fields, **more)
        for i in range(n)
    ]


def grpo_run(path, steps: int = 3, samples: int = 16, metrics=None, settings=None, **more):
    """A GRPO run directory, its rollouts written by the project's own writer."""
    path.mkdir(parents=True, exist_ok=True)
    settings, metrics = settings or {}, metrics or {}
    (path / "config.json").write_text(
        json.dumps({"script": "train_grpo", "group": 8, "model": "nowhere"} | settings)
    )
    (path / "header.json").write_text(json.dumps({"command": "train_grpo.py --x", "commit": "abc"}))
    (path / "status").write_text("finished\n")
    with open(path / "metrics.jsonl", "w") as f:
        for step in range(1, steps + 1):
            row = {"step": step, "reward": 0.1 * step, "loss": None, **metrics}
            f.write(json.dumps(row) + "\n")
            rows = samples_of(samples, **more)
            for i, s in enumerate(rows):
                s.reward, s.advantage = float(i % 2), 1.0 if i % 2 else -1.0
            write_samples(path / "rollouts" / f"step_{step}.jsonl", rows)
    return path


def eval_run(path, accuracy: float = 0.5, rows=(), settings=None, suites=("text", "image")):
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"script": "eval"}')
    metrics = dict(n=60, metric="greedy", accuracy=accuracy, low=accuracy - 0.1)
    metrics |= dict(high=accuracy + 0.1, forced=0.25, tokens_mean=31.0)
    result = {"settings": settings or {}, "rules": {}, "budgets": {}, "compare": None}
    result["sets"] = {s: metrics for s in suites}
    (path / "result.json").write_text(json.dumps(result))
    (path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def page_of(*arguments, most: int = 1000, title: str = "T") -> tuple[str, dict]:
    """The page's HTML and the data in it, read back as a browser would."""
    runs = [load_run(n, p) for n, p in find_runs([str(a) for a in arguments])]
    text = report.build_page(runs, title, most)
    return text, json.loads(Elements(text).scripts[0])


class Elements(html.parser.HTMLParser):
    """Tags with attributes, contents of scripts, and text outside of them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts, self.text, self.open = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open == "script":
            self.scripts[-1] += data
        elif self.open != "style":
            self.text.append(data)


# ---- untrusted text
def attacked(tmp_path):
    """A training run and an evaluation with the attack wherever a model, a data file or a user
    can put text."""
    grpo = grpo_run(tmp_path / "grpo", steps=1, text=ATTACK)
    (grpo / "header.json").write_text(json.dumps({"command": ATTACK, ATTACK: ATTACK}))
    keys = "id task prompt text finish_reason answer status why"
    row = dict.fromkeys(keys.split(), ATTACK)
    row |= dict(sample=0, gold=[ATTACK], images=[ATTACK], reward=0.0)
    evaluation = eval_run(tmp_path / "e", rows=[row], suites=[ATTACK])
    return page_of(f"{ATTACK.replace('=', '')}={evaluation}", grpo, title=ATTACK)


def test_no_text_of_a_run_becomes_html(tmp_path):
    """A response with </script> would end the page's data, and anything after it would run in
    the reader's browser."""
    text, data = attacked(tmp_path)
    seen = Elements(text.encode(errors="replace").decode())
    assert [t for t, _ in seen.tags].count("script") == 2
    assert not [a for t, attrs in seen.tags for a in attrs if a.startswith("on")]
    assert all(
        attrs["src"].startswith("data:image/svg+xml;base64,")
        for t, attrs in seen.tags
        if t == "img"
    )
    assert not set("<>&") & set(seen.scripts[0]), "HTML ends a script at </script, whatever follows"
    assert ATTACK in [s["text"] for s in data["samples"]] and ATTACK in data["prompts"]
    svg = [base64.b64decode(attrs["src"].split(",")[1]) for t, attrs in seen.tags if t == "img"]
    assert not any(b"<script" in s or b"<img" in s for s in svg)
    assert "@@TITLE@@" in "".join(seen.text), "a run's text was taken for a place of the template"


def test_the_pages_policy_names_its_own_script_and_nothing_from_outside(tmp_path):
    """With a wrong hash the browser refuses the page's script and shows nothing; without a
    policy, a slip in escaping would be enough; with an address in it, the page would need a
    network."""
    text, _ = page_of(grpo_run(tmp_path / "r"))
    seen = Elements(text)
    policy = next(
        a["content"] for t, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(seen.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    links = [v for _, a in seen.tags for k, v in a.items() if k in ("src", "href")]
    assert links and all(v.startswith(("data:", "#")) for v in links)


def test_a_browser_shows_it_without_errors(tmp_path):
    """The script itself, and the escaping as a real browser sees it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    (tmp_path / "r.html").write_text(attacked(tmp_path)[0], errors="replace")
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    flags += f" --user-data-dir={tmp_path / 'profile'} --enable-logging=stderr --v=0 --dump-dom"
    command = [browser, *flags.split(), (tmp_path / "r.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    dom = Elements(done.stdout)
    assert [t for t, _ in dom.tags].count("figure") == 1
    label = next(a["aria-label"] for t, a in dom.tags if t == "svg" and "aria-label" in a)
    assert label == "reward: 0 reward 0.1 to 0.1"
    assert len([a for t, a in dom.tags if t == "article"]) == 10, "first page of samples"
    assert [t for t, _ in dom.tags].count("script") == 2 and not [
        a for _, attrs in dom.tags for a in attrs if a == "onerror"
    ]
    assert "CONSOLE" not in done.stderr


# ---- broken, unfinished, missing
def test_a_truncated_line_costs_itself_and_is_said(tmp_path):
    """A run that is going on, or was killed, ends in half a line: the report must not fail, nor
    hide it."""
    run = grpo_run(tmp_path / "r", steps=2)
    for file in (run / "metrics.jsonl", run / "rollouts" / "step_2.jsonl"):
        with open(file, "a") as f:
            f.write('{"step": 3, "reward": 0.')
    (run / "status").write_text("running\n")
    text, data = page_of(run)
    assert len(data["samples"]) == 32
    assert (
        "metrics.jsonl: line 3 is truncated, left out" in text
        and "step_2.jsonl: line 17 is truncated" in text
    )
    assert "running; 2 steps" in text


@pytest.mark.parametrize("gone", ["header.json", "metrics.jsonl", "status", "rollouts"])
def test_a_missing_file_is_said_and_the_rest_is_shown(tmp_path, gone):
    run = grpo_run(tmp_path / "r")
    shutil.rmtree(run / gone) if gone == "rollouts" else (run / gone).unlink()
    text, data = page_of(run)
    assert f"{gone}/ is missing" in text if gone == "rollouts" else f"{gone} is missing" in text
    assert (len(data["samples"]) == 0) == (gone == "rollouts")
    lines = [line for g in data["charts"] for p in g["panels"] for line in p["lines"]]
    assert (len(lines) == 1) == (gone != "metrics.jsonl")


def test_an_evaluation_in_progress_shows_what_it_has(tmp_path):
    """Its rows are in part files, without a grade, and there is no result.json."""
    (tmp_path / "e").mkdir()
    for name in ("config", "header"):
        (tmp_path / "e" / f"{name}.json").write_text('{"script": "eval"}')
    (tmp_path / "e" / "samples.part0.jsonl").write_text(
        json.dumps({"id": "q", "text": "x", "finish_reason": "length", "reward": 0.0}) + "\n"
    )
    text, data = page_of(tmp_path / "e")
    assert "reward" not in data["samples"][0] and "no result.json yet" in text


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for argument in ("nowhere", "empty"):
        with pytest.raises(SystemExit) as e:
            report.main([str(tmp_path / argument), "--out", str(tmp_path / "r.html")])
        assert e.value.code == 2 and argument in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_runs_are_found_below_a_directory_and_named_apart(tmp_path):
    """Two seeds with the same directory names would be one curve in one colour."""
    for seed in ("s0", "s1"):
        grpo_run(tmp_path / seed / "grpo", steps=1)
    (tmp_path / "s0" / "final").mkdir()
    (tmp_path / "s0" / "final" / "config.json").write_text("{}")  # a model's directory is no run
    assert [n for n, _ in find_runs([str(tmp_path)])] == ["s0/grpo", "s1/grpo"]
    assert find_runs([f"mine={tmp_path / 's0' / 'grpo'}"]) == [("mine", tmp_path / "s0" / "grpo")]
    assert [n for n, _ in find_runs([f"a={tmp_path / 's0'}", f"b={tmp_path / 's1'}"])] == [
        "a/grpo",
        "b/grpo",
    ]
    with pytest.raises(ValueError, match="another run is named a/grpo"):
        find_runs([f"a={tmp_path / 's0'}", f"a={tmp_path / 's1'}"])


# ---- figures
def test_accuracy_figure_and_table_hold_the_results_numbers(tmp_path):
    """Alt text and table are what a reader copies from; an interval of another run would be a
    false claim."""
    text, _ = page_of(
        f"base={eval_run(tmp_path / 'a', 0.25)}", f"SFT={eval_run(tmp_path / 'b', 0.8)}"
    )
    assert (
        "greedy: base text 25.0 ± 10.0; base image 25.0 ± 10.0; SFT text 80.0 ± 10.0; SFT image "
        "80.0 ± 10.0" in text
    )
    assert "<td>80.0 ± 10.0" in text


def test_figure_alone_is_that_of_the_first_measure(tmp_path):
    """A README's picture that mixes protocols, or an empty one that nobody notices."""
    runs = [
        f"base={eval_run(tmp_path / 'a', 0.25)}",
        f"forced={eval_run(tmp_path / 'b', 0.8, settings={'think_budget': 90})}",
    ]
    report.main([*runs, "--out", str(tmp_path / "r.html"), "--figure", str(tmp_path / "r.svg")])
    drawn = (tmp_path / "r.svg").read_text()
    assert drawn.count(">25.0<") == 2 and ">80.0<" not in drawn
    run = str(grpo_run(tmp_path / "g", steps=1))
    with pytest.raises(SystemExit) as e:
        report.main([run, "--out", str(tmp_path / "r.html"), "--figure", "x.svg"])
    assert e.value.code == 2


def test_other_protocols_are_other_figures(tmp_path):
    """A bar with forced exit beside one without would show the protocol, not the model."""
    text, _ = page_of(
        eval_run(tmp_path / "plain"),
        eval_run(tmp_path / "forced", settings={"think_budget": 90}),
        eval_run(tmp_path / "blind", settings={"blind": True}),
    )
    assert re.findall(r"<h3>(greedy[^<]*)</h3>", text) == [
        "greedy",
        "greedy, forced exit at 90 tokens",
        "greedy, images removed",
    ]


def test_a_resumed_step_counts_once_and_null_is_a_gap(tmp_path):
    """Rows of a step that was done again after a crash, and NaN that was logged as null."""
    run = grpo_run(tmp_path / "r", steps=2)
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "reward": 0.9, "kl": null}\n')
    series = load_run("r", run).series
    assert series["reward"] == {1: 0.1, 2: 0.9} and "kl" not in series and "loss" not in series


METRICS = {  # the names that the trainers log, see core/samples.py and train_grpo.py
    "panels": "reward_std frac_reward_zero_std solved_all solved_any completions/mean_length "
    "completions/max_length completions/mean_length_right completions/mean_length_wrong "
    "completions/clipped_ratio forced no_answer reward_timeouts reward_errors policy_loss entropy "
    "kl clip_ratio/low_mean clip_ratio/high_mean sampling/logp_difference_mean grad_norm "
    "sampling/logp_difference_max learning_rate tok_per_s sample_tok_per_s step_time rollout_s "
    "update_s memory_gib rewards/correct/mean rewards/format/mean",
    "others": "solved samples trained_samples tokens ratio logprob_s bad_steps something_new",
}


def test_every_logged_metric_is_a_curve(tmp_path):
    """A metric that was renamed, or that no panel names, must not vanish from the page; failures of
    rewards and named parts of rewards have panels of their own."""
    names = " ".join(METRICS.values()).split()
    _, data = page_of(grpo_run(tmp_path / "r", metrics=dict.fromkeys(names, 0.5)))
    main, other = (g["panels"] for g in data["charts"])
    assert {m for p in main for m in p["metrics"]} == {"reward", *METRICS["panels"].split()}
    assert {m for p in other for m in p["metrics"]} == set(METRICS["others"].split())
    panels = {p["title"]: p for p in main}
    assert panels["failed rewards, share"]["metrics"] == ["reward_errors", "reward_timeouts"]
    parts = panels["named parts of the reward"]
    assert parts["metrics"] == ["rewards/correct/mean", "rewards/format/mean"]
    assert parts["lines"][0]["points"] == [[1, 2, 3], [0.5] * 3]
    assert panels["sampler against trainer, |Δ log-prob|"]["log"]


def test_evaluations_during_training_are_shown_by_data_set_with_their_intervals(tmp_path):
    run, both = grpo_run(tmp_path / "r"), {"greedy": 0.5, "low": 0.3, "high": 0.7}
    row = {"step": 2, "n": 8, **both, "tasks": {"text": {**both, "n": 4}, "image": {"greedy": 0.1}}}
    (run / "eval.jsonl").write_text(json.dumps(row) + "\n")
    panels = {p["title"]: p for p in page_of(run)[1]["charts"][0]["panels"]}
    assert panels["evaluation: accuracy"]["lines"][0]["points"] == [[2], [0.5], [0.3], [0.7]]
    text, image = panels["evaluation by data set"]["lines"]
    assert text["metric"] == "eval/text/greedy" and text["points"] == [[2], [0.5], [0.3], [0.7]]
    assert image["points"] == [[2], [0.1]], "no interval: no band"


def test_settings_that_differ_are_a_table(tmp_path):
    """Two runs beside each other mean nothing to a reader who can't see what was changed."""
    for name, settings in (("a", {"lr": 1e-5, "seed": 0}), ("b", {"lr": 3e-5, "seed": 0})):
        grpo_run(tmp_path / name, settings={**settings, "out": name}, steps=1)
    text, _ = page_of(tmp_path / "a", tmp_path / "b")
    part = text.split("Settings that differ")[1].split("</table>")[0]
    cells = re.findall(r"<t[hd]>([^<]*)", part)
    assert cells == ["setting (grpo)", "a", "b", "lr", "1e-05", "3e-05"]
    assert "Settings that differ" not in page_of(tmp_path / "a")[0]


def test_every_column_and_field_is_explained_where_it_is_shown(tmp_path):
    """eval.py's own metrics, with votes: each has a heading in the table and a meaning below it."""
    from scoring.metrics import set_metrics

    samples = [[Sample("q", i, [1], "stop", "x", reward=1.0, lenient=1.0) for i in range(2)]] * 2
    problems = [{"id": "q"}, {"id": "r"}]
    metrics = set_metrics(problems, samples, {"samples": 2, "temperature": 0.3})
    run = eval_run(tmp_path / "e")
    (run / "result.json").write_text(json.dumps({"settings": {}, "sets": {"s": metrics}}))
    text, data = page_of(run)
    part = text.split("What became of the outputs")[1].split("</dl>")[0]
    heads, means = re.findall(r"<th>([^<]*)", part), re.findall(r"<dt>([^<]*)<dd>[^<]+", part)
    assert heads[5:8] == ["pass@1", "pass@2", "maj@2"]
    assert means[:2] == ["pass@k", "maj@n"] and set(heads[8:]) == set(means[2:])
    known = {"n", "clusters", "metric", "accuracy", "low", "high", "se", "method"}
    assert metrics.keys() - known == COLUMNS.keys(), "a metric that no table shows"
    template = report.TEMPLATE.read_text()
    facts = set(re.findall(r'fact\("([^"]+)"', template))
    assert facts == set(data["labels"]), "a field of a sample without its meaning"


def test_long_names_fit_into_the_figure(tmp_path):
    """A legend in one line was cut off at the figure's edge."""
    metrics = {"text": {"accuracy": 0.5, "low": 0.4, "high": 0.6}}
    rows = {f"a run with quite a long name, {i}": metrics for i in range(6)}
    figure = report.accuracy_figure(rows)
    figure.savefig(tmp_path / "f.png")
    box, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and box.y1 <= page.y1


def test_out_that_is_no_page_is_refused(tmp_path, capsys):
    """--out RUN/metrics.jsonl overwrote the run's metrics with the page."""
    run = grpo_run(tmp_path / "r")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as e:
        report.main([str(run), "--out", str(run / "metrics.jsonl")])
    assert e.value.code == 2 and "name it metrics.html" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


# ---- samples
def test_ten_thousand_long_rollouts_make_a_bounded_page(tmp_path):
    """A 7B run's rollouts are gigabytes: whole groups from some steps are taken, memory and page
    stay small, and the page says so."""
    run = grpo_run(tmp_path / "r", steps=1)
    row = json.loads((run / "rollouts" / "step_1.jsonl").read_text().splitlines()[0])
    for step in range(1, 41):
        with open(run / "rollouts" / f"step_{step}.jsonl", "w") as f:
            for i in range(256):
                changes = {"id": f"q{i // 8}", "sample": i % 8, "text": "x" * 4000}
                f.write(json.dumps(row | changes) + "\n")
    tracemalloc.start()
    text, data = page_of(run, most=400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        300 <= len(data["samples"]) <= 400 and len(text) < 3e6 and peak < 15e6
    )  # the files are 45 MB
    groups = {(s["where"], s["id"]): 0 for s in data["samples"]}
    for s in data["samples"]:
        groups[s["where"], s["id"]] += 1
    assert set(groups.values()) == {8}, "an advantage can't be judged without the rest of its group"
    assert {"step 1", "step 40"} <= {w for w, _ in groups} and len({w for w, _ in groups}) == 24
    assert data["notes"] == ["r: 384 of 6,144 samples of 24 steps, out of 40"]


def test_line_choice_is_bounded_and_even(tmp_path):
    (tmp_path / "f").write_text("x\n" * 20)
    lines, total = choose_lines(tmp_path / "f", 8, 4)
    assert (
        total == 20
        and len(lines) == 8
        and {n - n % 4 + i for n in lines for i in range(4)} == lines
    )
    assert choose_lines(tmp_path / "f", 100, 1)[0] == set(range(20))
    assert evenly(3, 24) == [0, 1, 2] and evenly(100, 4) == [0, 33, 66, 99]


def test_images_are_embedded_and_bad_ones_named(tmp_path):
    """The prompt without its image can't be judged; a file that is no image, too large or gone
    must not end the page, and an SVG, which can hold scripts, must not get in."""
    Image.new("RGB", (2000, 100), "red").save(tmp_path / "big.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    (tmp_path / "evil.svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    )
    names = [
        str(tmp_path / n)
        for n in ("big.png", "bad.png", "evil.svg", "gone.png", "big.png", "x" * 5000, "\0")
    ]
    _, data = page_of(eval_run(tmp_path / "e", rows=[{"id": "q", "text": "t", "images": names}]))
    assert data["samples"][0]["images"] == [0, 1, 2, 3, 0, 4, 5]
    assert data["images"][1:] == [None] * 5
    image = data["images"][0]
    assert image["src"].startswith("data:image/webp;base64,") and (
        image["width"],
        image["height"],
    ) == (640, 32)
    assert "5 images missing, unreadable" in data["notes"][-1]


def test_the_page_counts_as_the_files_do(tmp_path):
    """Right and wrong on the page against the rewards on disk; all samples are there when they
    fit."""
    _, data = page_of(grpo_run(tmp_path / "r", steps=3, samples=16))
    assert len(data["samples"]) == 48 and sum(s["reward"] for s in data["samples"]) == 24
    assert data["notes"] == ["r: all 48 samples"] and len(data["prompts"]) == 1
