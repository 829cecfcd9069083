"""A part of a converted file by length and difficulty."""

import json

import pytest

from convert.select import select
from core.samples import Sample, write_samples

PROBLEMS = [{"id": f"q{i}", "task": "t", "kind": "math", "question": "x" * i} for i in range(1, 9)]


@pytest.fixture
def problems(tmp_path):
    """Eight problems; q1 to q4 asked twice, q2 and q3 solved once, q4 twice."""
    file, asked = tmp_path / "problems.jsonl", tmp_path / "asked"
    file.write_text("".join(json.dumps(p) + "\n" for p in PROBLEMS))
    asked.mkdir()
    solved = {"q1": (0, 0), "q2": (1, 0), "q3": (0, 1), "q4": (1, 1)}
    write_samples(
        asked / "samples.jsonl",
        [
            Sample(id=i, sample=n, prompt="", text="", tokens=[1], finish_reason="stop", reward=r)
            for i, rewards in solved.items()
            for n, r in enumerate(map(float, rewards))
        ],
    )
    (asked / "result.json").write_text("{}")
    return file, asked


def ids(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_problems_that_are_sometimes_solved_are_kept(problems, tmp_path):
    file, asked = problems
    out = tmp_path / "out.jsonl"
    info = select(str(file), str(out), samples=str(asked), solved="0.25,0.75")
    assert ids(out) == ["q2", "q3"]
    counts = {reason: what["rows"] for reason, what in info["dropped"].items()}
    assert counts == {"difficulty": 2, "not asked": 4}
    assert json.loads((tmp_path / "out.jsonl.info.json").read_text())["rows_out"] == 2


def test_length_and_a_stable_limit(problems, tmp_path):
    file, _ = problems
    out, again = tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    select(str(file), str(out), chars="3,6")
    assert ids(out) == ["q3", "q4", "q5", "q6"]
    select(str(file), str(out), limit=3)
    select(str(file), str(again), limit=3)
    assert (
        len(ids(out)) == 3
        and ids(out) == ids(again)
        and set(ids(out)) < {f"q{i}" for i in range(9)}
    )


def test_what_cannot_be_chosen_is_said(problems, tmp_path):
    file, asked = problems
    with pytest.raises(ValueError, match="no row is left"):
        select(str(file), str(tmp_path / "o.jsonl"), chars="90,99")
    with pytest.raises(ValueError, match="--chars 90.*LOW,HIGH"):
        select(str(file), str(tmp_path / "o.jsonl"), chars="90")
    (asked / "result.json").unlink()
    with pytest.raises(ValueError, match="finished eval.py"):
        select(str(file), str(tmp_path / "o.jsonl"), samples=str(asked))


def test_images_are_found_from_the_new_folder(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img/1.png").write_bytes(b"an image")
    file, out = tmp_path / "all.jsonl", tmp_path / "new/part.jsonl"
    file.write_text(json.dumps(PROBLEMS[0] | {"images": ["img/1.png"]}) + "\n")
    select(str(file), str(out))
    (name,) = json.loads(out.read_text())["images"]
    assert (out.parent / name).read_bytes() == b"an image"
    select(str(file), str(tmp_path / "part.jsonl"))
    assert (tmp_path / "part.jsonl").read_text() == file.read_text()
