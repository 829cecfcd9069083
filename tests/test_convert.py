"""Converters against small files in each release's published form, written here, and against real
releases where a copy is in XREASONER_TEST_DATA (skipped elsewhere). Every conversion is read back
with the loader of data.py."""

from __future__ import annotations

import base64
import doctest
import hashlib
import io
import json
import re
import sys
import types
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from real_data import REAL, needs_real

import data
from convert import chat, public, releases
from convert import conversion as convert
from convert.__main__ import main


def picture(number: int, form: str = "PNG") -> bytes:
    """Bytes of a small image, different for every number."""
    out = io.BytesIO()
    Image.new("RGB", (30, 28), (number % 256, number // 256 % 256, 77)).save(out, form)
    return out.getvalue()


def embedded(number: int, form: str = "PNG") -> dict:
    """An image as parquet files of the hub hold it."""
    return {"bytes": picture(number, form), "path": f"{number}.png"}


def parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def run(name: str, source: Path | list[Path], tmp_path: Path, **options) -> tuple[list[dict], dict]:
    """Convert, hold the file to what every converted file must be, read it with data.py's own
    loader."""
    out = tmp_path / "out" / f"{name}.jsonl"
    sources = [str(s) for s in (source if isinstance(source, list) else [source])]
    info = convert.convert(name, sources, str(out), **options)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert info == json.loads(out.with_name(out.name + ".info.json").read_text(encoding="utf-8"))
    assert info["rows_out"] == len(rows)
    for row in rows:
        for image in row.get("images", []):
            content = (out.parent / image).read_bytes()
            assert image == f"images/{hashlib.sha256(content).hexdigest()[:16]}{Path(image).suffix}"
    read = data.load_conversations if "messages" in rows[0] else data.load_problems
    good, faults = read(out)
    assert (len(good), faults) == (len(rows), [])
    return rows, info


def bytes_of(row: dict, tmp_path: Path) -> list[bytes]:
    return [(tmp_path / "out" / image).read_bytes() for image in row["images"]]


def test_docstring_examples_are_true():
    """Prevents worked examples that no longer say what the code does."""
    results = [doctest.testmod(module) for module in (convert, public, releases, chat)]
    assert sum(r.failed for r in results) == 0 and sum(r.attempted for r in results) > 3


# -------------------- Text --------------------


def test_gsm8k(tmp_path):
    """Prevents: the worked solution as gold; thousands commas and dollars left in; the socratic
    config read too."""
    rows = [
        {"question": "How many? ", "answer": "He has <<2*3=6>>6.\n#### 1,234"},
        {"question": "Cost?", "answer": "a\n#### $-5"},
    ]
    parquet(tmp_path / "raw/main/test-00000-of-00001.parquet", rows)
    parquet(tmp_path / "raw/main/train-00000-of-00001.parquet", rows * 3)
    parquet(tmp_path / "raw/socratic/test-00000-of-00001.parquet", rows * 2)
    out, info = run("gsm8k", tmp_path / "raw", tmp_path)
    assert out == [
        {
            "id": "gsm8k/0",
            "task": "gsm8k",
            "kind": "math",
            "question": "How many?",
            "answer": "1234",
        },
        {"id": "gsm8k/1", "task": "gsm8k", "kind": "math", "question": "Cost?", "answer": "-5"},
    ]


def test_rows_that_the_loader_would_refuse_are_dropped_here(tmp_path):
    """Prevents one row that quotes the chat template (or holds half a character) from making a
    whole file unusable."""
    good = {"question": "Is a < |b| > c?", "answer": "#### 1"}
    source = jsonl(
        tmp_path / "test.jsonl",
        [
            good,
            {**good, "question": "What does <|im_start|>user do?"},
            {**good, "answer": "#### <|image_pad|>"},
            {**good, "question": "half \ud83d"},
            {**good, "question": "Where is <image>?"},
        ],
    )
    out, info = run("gsm8k", source, tmp_path)
    assert len(out) == 1
    assert {reason: what["rows"] for reason, what in info["dropped"].items()} == {
        "question: holds the control token <|im_start|>": 1,
        "answer: holds the control token <|image_pad|>": 1,
        "question: half of a surrogate pair, not a character": 1,
        "images: N <image> in the text, N images": 1,
    }


def test_orz_takes_the_first_human_turn_and_the_ground_truth(tmp_path):
    """Prevents pass_at_n, which is absent or null in a part of the rows, from stopping the
    conversion."""
    path = tmp_path / "orz_math_57k_collected.json"
    path.write_text(
        json.dumps(
            [
                [
                    {"from": "human", "value": "Find $n$."},
                    {"from": "assistant", "ground_truth": {"value": "n = 4"}},
                ],
                [
                    {"from": "human", "value": "Sum?"},
                    {"from": "assistant", "ground_truth": {"value": "7", "pass_at_n": 0.5}},
                ],
                [
                    {"from": "human", "value": "Empty?"},
                    {"from": "assistant", "ground_truth": {"value": " "}},
                ],
            ]
        )
    )
    out, info = run("orz57k", path, tmp_path)
    assert [(r["question"], r["answer"]) for r in out] == [("Find $n$.", "n = 4"), ("Sum?", "7")]
    assert info["dropped"] == {"the answer is empty": {"rows": 1, "examples": [f"{path} row 2"]}}


def test_mmlu_pro_strips_padding_and_marks_the_health_slice(tmp_path):
    """Prevents N/A as an option that can be chosen, and a health suite that has to be run a second
    time."""
    base = {
        "question_id": 5,
        "question": "Which?",
        "options": ["x", "y", "z", "N/A", "N/A"],
        "answer": "B",
        "answer_index": 1,
        "cot_content": "",
        "category": "health",
        "src": "s",
    }
    parquet(
        tmp_path / "raw/data/test-0.parquet",
        [
            base,
            {
                **base,
                "question_id": 6,
                "category": "law",
                "options": ["x", "N/A"],
                "answer_index": 0,
            },
        ],
    )
    out, info = run("mmlu_pro", tmp_path / "raw", tmp_path)
    assert [
        (r["id"], r["options"], r["answer"], r["subset"], r.get("meta", {}).get("health"))
        for r in out
    ] == [
        ("mmlu_pro/5", ["x", "y", "z"], "B", "health", True),
        ("mmlu_pro/6", ["x", "N/A"], "B", "law", None),
    ]


def test_medqa_knows_its_two_releases_apart(tmp_path):
    """Prevents a 4-option score printed as the paper's 5-option MedQA: the files have the same
    fields."""
    row = {
        "question": "Dx?",
        "answer": "gout",
        "options": {"A": "flu", "B": "gout", "C": "x", "D": "y"},
        "meta_info": "step1",
        "answer_idx": "B",
    }
    four = jsonl(tmp_path / "phrases_no_exclude_test.jsonl", [row])
    out, _ = run("medqa_4ops", four, tmp_path)
    assert out == [
        {
            "id": "medqa_4ops/0",
            "task": "medqa_4ops",
            "subset": "step1",
            "kind": "choice",
            "question": "Dx?",
            "options": ["flu", "gout", "x", "y"],
            "answer": "B",
        }
    ]
    with pytest.raises(ValueError, match=r"row 0: 4 options, not 5: .*medqa_4ops"):
        run("medqa", four, tmp_path)
    row["options"]["E"] = "z"
    member = {
        "data_clean/questions/US/test.jsonl": json.dumps(row).encode(),
        "data_clean/questions/US/train.jsonl": b"not read",
        "data_clean/questions/Mainland/test.jsonl": b"not read",
    }
    out, info = run("medqa", archive(tmp_path / "data_clean.zip", member), tmp_path)
    assert out[0]["options"] == ["flu", "gout", "x", "y", "z"]
    assert info["rows_in"] == 1


def test_medxpertqa_does_not_repeat_its_options(tmp_path):
    """Prevents options twice in the prompt (the question ends with them), and lost or reordered
    images."""
    mm = {
        "id": "MM-26",
        "question": "See A and B.\nAnswer Choices: (A) one (B) two",
        "options": {"A": "one", "B": "two"},
        "label": "B",
        "images": ["MM-26-a.jpeg", "MM-26-b.jpeg"],
        "medical_task": "Diagnosis",
        "body_system": "Skeletal",
        "question_type": "Reasoning",
    }
    jsonl(tmp_path / "raw/MM/test.jsonl", [mm])
    archive(
        tmp_path / "raw/images.zip",
        {"images/MM-26-b.jpeg": picture(2, "JPEG"), "images/MM-26-a.jpeg": picture(1, "JPEG")},
    )
    (row,), _ = run("medxpertqa_mm", tmp_path / "raw", tmp_path)
    assert row["question"] == "<image>\n<image>\nSee A and B."
    assert (row["options"], row["answer"]) == (["one", "two"], "B")
    assert bytes_of(row, tmp_path) == [picture(1, "JPEG"), picture(2, "JPEG")]
    assert row["meta"]["cluster"] == Path(row["images"][0]).stem


# -------------------- Images --------------------


def mmmu_row(**changes) -> dict:
    row = {
        "id": "validation_Pharmacy_3",
        "question": "Which?",
        "options": "['a', \"it's\"]",
        "explanation": "",
        **{f"image_{n}": None for n in range(1, 8)},
        "img_type": "['x']",
        "answer": "A",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "s",
    }
    return {**row, **changes}


def test_mmmu_images_follow_the_text_through_question_and_options(tmp_path):
    """Prevents the loss of repeats and of order, and `<image N>` in options left as text
    (lmms-eval has had both)."""
    three = {"image_1": embedded(1), "image_2": embedded(2), "image_3": embedded(3)}
    parquet(
        tmp_path / "raw/Pharmacy/validation-00000-of-00001.parquet",
        [
            mmmu_row(
                question="Like <image 2>?",
                options="['<image 3>', 'none', '<image 1>', '<image 2>']",
                answer="D",
                **three,
            ),
            mmmu_row(id="validation_Pharmacy_4", question="No tag here.", **three),
            mmmu_row(id="validation_Pharmacy_5", question="Only <image 1>.", **three),
            mmmu_row(id="validation_Pharmacy_6", question="See <image 4>.", **three),
        ],
    )
    parquet(tmp_path / "raw/Pharmacy/dev-00000-of-00001.parquet", [mmmu_row(id="dev_Pharmacy_1")])
    out, info = run("mmmu", tmp_path / "raw", tmp_path)
    assert (out[0]["question"], out[0]["options"]) == (
        "Like <image>?",
        ["<image>", "none", "<image>", "<image>"],
    )
    assert bytes_of(out[0], tmp_path) == [picture(2), picture(3), picture(1), picture(2)]
    assert (
        out[1]["question"] == "<image>\n<image>\n<image>\nNo tag here."
        and len(out[1]["images"]) == 3
    )
    assert bytes_of(out[2], tmp_path) == [picture(1)]
    assert info["notes"] == {"a row has images that its question never names (left out)": 1}
    assert list(info["dropped"]) == ["the text names an image that the row does not have"]
    assert (info["rows_in"], info["rows_out"], info["images"]) == (4, 3, 3)
    assert out[0]["subset"] == "Pharmacy" and out[0]["meta"]["health"] is True


def test_mmmu_open_questions_are_open_and_may_have_several_golds(tmp_path):
    """Prevents open items scored as a choice between the gold and nothing, and list golds taken as
    one string."""
    parquet(
        tmp_path / "raw/Art/validation-0.parquet",
        [
            mmmu_row(
                id="validation_Art_1",
                question_type="open",
                options="[]",
                answer="['24/7', '3.429']",
                image_1=embedded(1),
            ),
            mmmu_row(
                id="validation_Art_2",
                question_type="open",
                options="[]",
                answer="C",
                image_1=embedded(1),
            ),
        ],
    )
    out, _ = run("mmmu", tmp_path / "raw", tmp_path)
    assert [(r["kind"], r["answer"], "options" in r) for r in out] == [
        ("open", ["24/7", "3.429"], False),
        ("open", "C", False),
    ]
    assert out[0]["meta"]["cluster"] == out[1]["meta"]["cluster"]  # two questions on one image
    assert "health" not in out[0]["meta"]


def test_option_lists_are_read_never_run(tmp_path):
    """Prevents code in a data set from running (the official scorer uses eval on this field)."""
    marker = tmp_path / "ran"
    parquet(
        tmp_path / "raw/Art/validation-0.parquet",
        [
            mmmu_row(options=f"[open({str(marker)!r}, 'w')]", image_1=embedded(1)),
            mmmu_row(id="x_1", image_1=embedded(1)),
        ],
    )
    out, info = run("mmmu", tmp_path / "raw", tmp_path)
    assert not marker.exists()
    assert len(out) == 1 and list(info["dropped"]) == ["not a list literal"]
    assert out[0]["options"] == ["a", "it's"]


def test_mmmu_pro_is_the_form_with_ten_options(tmp_path):
    """Prevents the four-option or the vision form counted as the ten-option set; and a row whose
    options are in a list inside the list from being dropped, where other codes score it."""
    base = mmmu_row(
        options=str([f"o{i}" for i in range(12)]),
        answer="L",
        subject="Public_Health",
        image_1=embedded(1),
    )
    base.pop("question_type")
    nested = {**base, "id": "test_Math_7", "options": "[['a', 'b'], 'c', 'd']", "answer": "B"}
    parquet(tmp_path / "raw/standard (10 options)/test-0.parquet", [base, nested])
    four = {**base, "options": "['a','b','c','d']", "answer": "D"}
    parquet(tmp_path / "raw/standard (4 options)/test-0.parquet", [four])
    (ten, opened), info = run("mmmu_pro", tmp_path / "raw", tmp_path)
    assert (ten["task"], ten["answer"], len(ten["options"]), ten["subset"]) == (
        "mmmu_pro",
        "L",
        12,
        "Public_Health",
    )
    assert ten["meta"]["health"] is True
    assert (opened["options"], opened["answer"]) == (["a", "b", "c", "d"], "B")


def test_mmstar_options_leave_the_question_where_they_can_be_read(tmp_path):
    """Prevents options shown twice, options cut at a comma inside them, and `<image 1>` of its
    sources left as text."""
    base = {
        "index": 0,
        "image": embedded(1)["bytes"],
        "answer": "A",
        "category": "math",
        "l2_category": "geometry",
        "meta_info": {"source": "s", "split": "val", "image_path": "p"},
    }
    parquet(
        tmp_path / "raw/mmstar.parquet",
        [
            {**base, "question": "What?\nOptions: A: red, white, B: blue, C: green, D: a, b and c"},
            {
                **base,
                "index": 1,
                "question": "<image 1> Find x.\nChoices:\n(A) 1 \n(B) 2 \n(C) 3 \n(D) 4",
                "answer": "D",
            },
            {**base, "index": 2, "question": "Pick one. A) here B) there"},
        ],
    )
    out, info = run("mmstar", tmp_path / "raw", tmp_path)
    assert [(r["question"], r["options"]) for r in out] == [
        ("<image>\nWhat?", ["red, white", "blue", "green", "a, b and c"]),
        ("<image> Find x.", ["1", "2", "3", "4"]),
        ("<image>\nPick one. A) here B) there", ["A", "B", "C", "D"]),
    ]
    assert info["notes"] == {"options left in the question's text": 1}


def mathvista_row(**changes) -> dict:
    row = {
        "pid": "1",
        "question": "Q?",
        "image": "images/1.jpg",
        "decoded_image": embedded(1, "JPEG"),
        "choices": None,
        "unit": None,
        "precision": None,
        "answer": "3",
        "question_type": "free_form",
        "answer_type": "integer",
        "metadata": {"task": "figure question answering", "language": "english", "category": "c"},
        "query": "Hint",
    }
    return {**row, **changes}


def test_mathvista_gold_text_becomes_a_letter_and_precision_an_integer(tmp_path):
    """Prevents a choice scored against its text; round(x, 1.0), which fails; a right answer in two
    options."""
    choices = {"question_type": "multi_choice", "answer_type": "text"}
    parquet(
        tmp_path / "raw/data/testmini-00000-of-00001-x.parquet",
        [
            mathvista_row(choices=["yes", "No.", "no answer"], answer="No.", **choices),
            mathvista_row(pid="2", answer="1.20", answer_type="float", precision=2.0, unit="g"),
            mathvista_row(pid="3", answer="[2014, 2016]", answer_type="list"),
            mathvista_row(pid="4", choices=["9", "18", "12", "18"], answer="18", **choices),
            mathvista_row(pid="5", choices=["9", "12"], answer="13", **choices),
        ],
    )
    out, info = run("mathvista", tmp_path / "raw", tmp_path)
    assert [(r["kind"], r.get("options"), r["answer"]) for r in out] == [
        ("choice", ["yes", "No.", "no answer"], "B"),
        ("math", None, "1.20"),
        ("open", None, "[2014, 2016]"),
        ("choice", ["9", "18", "12"], "B"),
    ]
    assert out[1]["meta"]["precision"] == 2 and "(Unit: g)" in out[1]["question"]
    assert isinstance(out[1]["meta"]["precision"], int) and out[0]["images"][0].endswith(".jpg")
    assert info["notes"] == {"two options with the gold's own text were merged": 1}
    assert list(info["dropped"]) == ["the answer is no letter or text of the options"]


def test_mathvista_questions_carry_unit_and_form_of_the_answer(tmp_path):
    """Prevents a right value marked wrong because the prompt kept the gold's rounding or unit to
    itself."""
    rows = [
        mathvista_row(),
        mathvista_row(pid="2", answer="1.2", answer_type="float", precision=1.0, unit="cm"),
        mathvista_row(pid="3", answer="[1, 2]", answer_type="list"),
        mathvista_row(pid="4", unit="$", choices=["9", "3"], question_type="multi_choice"),
    ]
    parquet(tmp_path / "raw/data/testmini-00000-of-00001-x.parquet", rows)
    out, _ = run("mathvista", tmp_path / "raw", tmp_path)
    assert [r["question"].removeprefix("<image>\n") for r in out] == [
        "Q?\nAnswer with an integer.",
        "Q? (Unit: cm)\nAnswer with a number with one decimal place.",
        "Q?\nAnswer with a list, as in [1, 2, 3].",
        "Q? (Unit: $)",
    ]


def test_geometry3k_has_a_marker_for_each_image(tmp_path):
    """Prevents a row with fewer markers than images, which the check would refuse; the test split
    read as training data."""
    rows = [
        {"problem": "<image>Find $x$.", "answer": "2 \\sqrt { 3 }", "images": [embedded(1)]},
        {"problem": "Find y.", "answer": "3", "images": [embedded(2), embedded(3)]},
    ]
    parquet(tmp_path / "raw/data/train-0.parquet", rows)
    parquet(tmp_path / "raw/data/test-0.parquet", rows[:1] * 3)
    out, info = run("geometry3k", tmp_path / "raw", tmp_path)
    assert info["rows_in"] == 2 and [len(row["images"]) for row in out] == [1, 2]
    assert [row["question"] for row in out] == ["<image>Find $x$.", "<image>\n<image>\nFind y."]
    assert out[0]["answer"] == "2 \\sqrt { 3 }" and out[0]["kind"] == "math"
    assert run("geometry3k_test", tmp_path / "raw", tmp_path)[1]["rows_in"] == 3


def test_mathvision_has_one_picture_whatever_its_tags_say(tmp_path):
    """Prevents tag counts that no image meets, and options that are bare letters of the picture
    rejected."""
    base = {
        "id": "1",
        "question": "Which of <image1> and <image2>?",
        "options": ["<image2>", "<image3>"],
        "image": "images/1.jpg",
        "decoded_image": embedded(1),
        "answer": "B",
        "solution": "",
        "level": 2,
        "subject": "algebra",
    }
    parquet(
        tmp_path / "raw/data/test-0.parquet",
        [
            base,
            {**base, "id": "2", "question": "No tag", "options": [], "answer": "\\frac{1}{2}"},
            {**base, "id": "3", "options": list("ABCDE"), "answer": "E"},
        ],
    )
    parquet(tmp_path / "raw/data/testmini-0.parquet", [base] * 5)
    out, info = run("mathvision", tmp_path / "raw", tmp_path)
    assert info["rows_in"] == 3
    assert (out[0]["question"], out[0]["options"]) == (
        "Which of <image> and (image 2)?",
        ["(image 2)", "(image 3)"],
    )
    assert (out[1]["kind"], out[1]["question"], out[1]["answer"]) == (
        "math",
        "<image>\nNo tag",
        "\\frac{1}{2}",
    )
    assert (out[2]["options"], out[2]["answer"]) == (list("ABCDE"), "E")


def omnimedvqa_zip(path: Path, tables: dict[str, list[dict]], images: int) -> Path:
    members = {
        f"OmniMedVQA/QA_information/Open-access/{name}.json": json.dumps(rows).encode()
        for name, rows in tables.items()
    }
    members |= {f"OmniMedVQA/Images/set/{i}.png": picture(i) for i in range(images)}
    members["OmniMedVQA/QA_information/Restricted-access/x.json"] = b"not read"
    return archive(path, members)


def omnimedvqa_row(i: int, **changes) -> dict:
    row = {
        "dataset": "set",
        "question_id": f"set_{i:04d}",
        "question_type": "Disease Diagnosis",
        "question": "What is it?",
        "gt_answer": "Gout",
        "image_path": f"Images/set/{i}.png",
        "option_A": "flu",
        "option_B": "gout.",
        "option_C": "x",
        "option_D": "y",
        "modality_type": "CT",
    }
    return {**row, **changes}


def test_omnimedvqa_reads_the_zip_and_finds_the_gold_among_two_to_four_options(tmp_path):
    """Prevents nearest-string golds, empty options C and D offered, and the entry with `modality`
    lost."""
    odd = omnimedvqa_row(1, option_C=None, option_D="", gt_answer="flu", modality="X-Ray")
    del odd["modality_type"]
    path = omnimedvqa_zip(
        tmp_path / "OmniMedVQA.zip",
        {
            "a": [omnimedvqa_row(0), odd],
            "b": [
                omnimedvqa_row(2, gt_answer="goat"),
                omnimedvqa_row(3, image_path="Images/set/99.png"),
                omnimedvqa_row(0),
            ],
        },
        4,
    )
    out, info = run("omnimedvqa", path, tmp_path)
    assert [(r["subset"], r["options"], r["answer"]) for r in out] == [
        ("CT", ["flu", "gout.", "x", "y"], "B"),
        ("X-Ray", ["flu", "gout."], "A"),
    ]
    assert out[0]["question"] == "<image>\nWhat is it?" and bytes_of(out[1], tmp_path) == [
        picture(1)
    ]
    assert {reason: what["rows"] for reason, what in info["dropped"].items()} == {
        "the answer is no letter or text of the options": 1,
        "image not found": 1,
        "id seen before": 1,
    }
    assert info["dropped"]["image not found"]["examples"][0].endswith(
        "b.json row 1: Images/set/99.png"
    )


def test_a_sample_is_seeded_and_independent_of_file_order(tmp_path):
    """Prevents a subset that is only the first file, changes between machines, or drags all images
    along."""
    rows = [omnimedvqa_row(i, modality_type="CT" if i % 4 else "MRI") for i in range(40)]
    one = omnimedvqa_zip(tmp_path / "one.zip", {"a": rows[:25], "b": rows[25:]}, 40)
    two = omnimedvqa_zip(tmp_path / "two.zip", {"a": rows[30:], "b": rows[:30]}, 40)
    out, info = run("omnimedvqa", one, tmp_path, limit=12, seed=3)
    assert info["rows_out"] == info["images"] == 12
    assert len(list((tmp_path / "out/images").iterdir())) == 12
    assert (info["limit"], info["seed"], info["rows_in"]) == (12, 3, 40)
    first = {r["id"] for r in out}
    again, _ = run("omnimedvqa", two, tmp_path, limit=12, seed=3)
    assert {r["id"] for r in again} == first
    other, _ = run("omnimedvqa", one, tmp_path, limit=12, seed=4)
    assert {r["id"] for r in other} != first
    everything, _ = run("omnimedvqa", one, tmp_path, limit=1000)
    assert len(everything) == 40


def test_nejm_from_the_users_own_files(tmp_path):
    """Prevents images lost where the user names the folder, or its json file."""
    base = {
        "image_id": 1,
        "date": "may-02-2013",
        "question": "Diagnosis?",
        "relevant_context": "no",
        "correct_answer": "C",
        **{f"option_{c}": f"text {c}" for c in "ABCDE"},
        **{f"option_{c}_votes": 10 for c in "ABCDE"},
    }
    folder = tmp_path / "mine"
    (folder / "images").mkdir(parents=True)
    (folder / "images/1.jpg").write_bytes(picture(1, "JPEG"))
    (folder / "images/jan-01-2014.png").write_bytes(picture(2))
    (folder / "challenge.json").write_text(
        json.dumps(
            [
                base,
                {**base, "image_id": 2, "date": "jan-01-2014"},
                {**base, "image_id": 3, "date": "jan-01-2015"},
            ]
        )
    )
    for source in (folder, folder / "challenge.json"):
        out, info = run("nejm", source, tmp_path)
        assert [(r["subset"], r["answer"], len(r["options"])) for r in out] == [
            ("2013", "C", 5),
            ("2014", "C", 5),
        ]
        assert [bytes_of(r, tmp_path) for r in out] == [[picture(1, "JPEG")], [picture(2)]]
        assert info["dropped"]["image not found"]["examples"][0].endswith("row 2: 3 or jan-01-2015")
    with pytest.raises(ValueError, match="NEJM.*bring your own"):
        convert.download("nejm", str(tmp_path / "x"))


def test_images_keep_their_bytes_and_get_the_extension_of_those_bytes(tmp_path):
    """Prevents re-encoding (other pixels than everyone else's), and a png called .jpg from being
    refused later."""
    forms = {"PNG": "png", "JPEG": "jpg", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp"}
    rest = {"question": "?", "answer": "a", "options": []}
    rows = [
        {"id": i, "image": {"bytes": picture(i, form), "path": "x.jpg"}, **rest}
        for i, form in enumerate(forms)
    ]
    rows += [
        {**rows[0], "id": 6},
        {"id": 7, "image": {"bytes": b"<html>404", "path": "x.jpg"}, **rest},
        {"id": 8, "image": None, **rest},
    ]
    rows[-1]["image"] = {"bytes": None, "path": None}
    out, info = run("mathvision", parquet(tmp_path / "test.parquet", rows), tmp_path)
    assert [Path(r["images"][0]).suffix[1:] for r in out] == [*forms.values(), "png"]
    assert [bytes_of(r, tmp_path)[0] for r in out[:6]] == [
        picture(i, form) for i, form in enumerate(forms)
    ]
    assert info["images"] == 6  # the same picture twice is one file
    assert set(info["dropped"]) == {"not an image (png, jpg, gif, bmp, tif, webp)", "image missing"}


# -------------------- Conversations --------------------

THOUGHT = (
    "<|begin_of_thought|>\n\nOkay, 1+1.\n\nSo 2.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nIt is \\boxed{2}.\n\n<|end_of_solution|>"
)


def test_openthoughts_gives_the_papers_turns(tmp_path):
    """Prevents: the release's system prompt kept; its markers left in; thoughts that never end
    taken as examples."""
    default = {
        "system": "Your role as an assistant …",
        "conversations": [
            {
                "from": "user",
                "value": "Return your final response within \\boxed{}. What is {question} 1+1?",
            },
            {"from": "assistant", "value": THOUGHT},
        ],
    }
    cut = json.loads(json.dumps(default))
    cut["conversations"][1]["value"] = THOUGHT[:60]
    stray = json.loads(json.dumps(default))
    stray["conversations"][1]["value"] = THOUGHT.replace("So", "</think> So")
    picture_tag = json.loads(json.dumps(default).replace("Okay", "<image> Okay"))
    parquet(tmp_path / "raw/data/train-0.parquet", [default, cut, stray, picture_tag])
    (row,), info = run("openthoughts", tmp_path / "raw", tmp_path)
    assert row == {
        "messages": [
            {
                "role": "user",
                "content": "You will solve a problem/request. You should provide your thoughts "
                "within <think> "
                "</think> tags before providing the answer.\nWrite your final answer within "
                "<answer> </answer> tags. "
                "Here is the question: Return your final response within \\boxed{}. What is "
                "{question} 1+1?",
            },
            {
                "role": "assistant",
                "content": "<think>\nOkay, 1+1.\n\nSo 2.\n</think>\n<answer>\nIt is "
                "\\boxed{2}.\n</answer>",
            },
        ]
    }
    assert {reason: what["rows"] for reason, what in info["dropped"].items()} == {
        "no complete thought and solution markers": 1,
        "a tag of the format is inside the text": 1,
        "messages[N].content: <image> in an assistant turn": 1,
    }


@needs_real
def test_closing_tags_begin_with_the_tokens_of_forced_exit():
    """Prevents ".</" as one token, with which most traces' closing tag would differ from the
    forced one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REAL / "qwen2_5_tokenizer")
    row = public.openthoughts(
        releases.Row(
            {
                "conversations": [
                    {"from": "user", "value": "p"},
                    {"from": "assistant", "value": THOUGHT},
                ]
            }
        )
    )
    ids = tokenizer.encode(row["messages"][1]["content"])
    forced = tokenizer.encode("</think>\n<answer>")
    assert any(ids[i : i + len(forced) - 1] == forced[:-1] for i in range(len(ids)))


# -------------------- The user's mistakes, the report, the command line --------------------


def test_mistakes_are_named_with_file_row_and_mend(tmp_path):
    """Prevents tracebacks, and a conversion of the wrong file that looks like a success."""
    right = {"question": "q", "answer": "#### 1"}
    out = str(tmp_path / "o.jsonl")
    wrong = jsonl(tmp_path / "wrong.jsonl", [right, {"Question": "q", "answer": "#### 2"}])
    truncated = tmp_path / "truncated.jsonl"
    truncated.write_text('{"question": "q", "answer": "#### 1"}\n{"question": "q", "ans')
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"question": "caf\xe9"}\n')
    empty = jsonl(tmp_path / "empty.jsonl", [])
    nothing = jsonl(tmp_path / "nothing.jsonl", [{"question": "q", "answer": "no mark"}])
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "folder/other.jsonl", [{}])
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"PK not really")
    pointer = tmp_path / "pointer.parquet"
    pointer.write_text("version of a large file that was never fetched\n" * 3)
    numbers = tmp_path / "numbers.json"
    numbers.write_text("[1, 2]")
    wrapped = tmp_path / "wrapped.json"
    wrapped.write_text('{"version": 1, "data": []}')
    for source, message in (
        (wrong, r"wrong\.jsonl row 1: field 'question' is missing \(fields: Question, answer\)"),
        (truncated, r"truncated\.jsonl line 2: not JSON"),
        (latin, "latin.jsonl line 1: not JSON .*utf-8.* position 17"),
        (empty, "no row .* could be converted: the tables are empty"),
        (nothing, r"could be converted: no #### in the answer \(.*nothing\.jsonl row 0\)"),
        (tmp_path / "folder", r"no table whose name matches .*here: other\.jsonl"),
        (tmp_path / "absent.jsonl", "absent.jsonl: no such file or folder"),
        (broken, "broken.zip: not a zip, or truncated"),
        (pointer, "pointer.parquet: not parquet, or truncated"),
        (numbers, "row 0: expected an object, found int"),
        (wrapped, "wrapped.json: expected a list of rows, found dict"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.convert("gsm8k", [str(source)], out)
    with pytest.raises(SystemExit, match="unknown data set 'gsm9k'; there are: chat, from_samples"):
        main(["gsm9k", str(wrong), "--out", out])
    with pytest.raises(SystemExit, match=r"error: .*wrong\.jsonl"):
        main(["gsm8k", str(wrong), "--out", f"{wrong}/o.jsonl"])
    with pytest.raises(SystemExit, match="is the source itself"):
        main(["gsm8k", str(wrong), "--out", str(wrong)])
    with pytest.raises(SystemExit, match="--limit 0: must be at least 1"):
        main(["gsm8k", str(wrong), "--out", out, "--limit", "0"])
    assert not Path(out).exists() and not list(tmp_path.glob("*.tmp"))


def test_an_image_path_cannot_leave_the_release(tmp_path):
    """Prevents a data set that reads the user's other files into the images folder."""
    (tmp_path / "secret.png").write_bytes(picture(1))
    row = {"id": 1, "image": "../secret.png", "question": "?", "answer": "a", "options": []}
    table = jsonl(
        tmp_path / "raw/test.jsonl", [row, {**row, "image": str(tmp_path / "secret.png")}]
    )
    with pytest.raises(ValueError, match="image path leaves the release"):
        run("mathvision", table, tmp_path)


def test_the_same_source_gives_the_same_bytes_and_the_report_says_where_they_came_from(
    tmp_path, capsys, monkeypatch
):
    """Prevents results that cannot be traced to a revision: the download's commit goes to the
    conversion's report."""

    def snapshot_download(repo_id, *, repo_type, revision, allow_patterns, local_dir):
        assert (repo_id, repo_type, allow_patterns) == ("openai/gsm8k", "dataset", ["main/test-*"])
        parquet(Path(local_dir) / "main/test-0.parquet", [{"question": "q", "answer": "#### 1"}])

    class HfApi:
        def dataset_info(self, repo_id, revision):
            return types.SimpleNamespace(sha=f"commit-of-{revision}")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download, HfApi=HfApi)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    main(["download", "gsm8k", "--out", str(tmp_path / "raw"), "--revision", "main"])
    for out in ("one", "two"):
        main(["gsm8k", str(tmp_path / "raw"), "--out", str(tmp_path / f"{out}.jsonl")])
    infos = [
        json.loads((tmp_path / f"{out}.jsonl.info.json").read_text()) for out in ("one", "two")
    ]
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert infos[0] == infos[1] and infos[0]["download"]["revision"] == "commit-of-main"
    assert "the whole split has 1,319 rows" in capsys.readouterr().out


def test_the_code_names_no_host():
    """Prevents an address in the code that is wrong on mirrors and blocked machines: the hub
    client knows its host."""
    for file in Path(convert.__file__).parent.glob("*.py"):
        assert not re.search(r"https?://|\bwww\.|huggingface\.co", file.read_text()), file


# -------------------- Real releases --------------------


@needs_real
@pytest.mark.parametrize(
    "name,path,rows",
    [
        ("gsm8k", "gsm8k/test.jsonl", 1319),
        ("medqa", "medqa/test_5options.jsonl", 1273),
        ("medqa_4ops", "medqa/test_4options.jsonl", 1273),
        ("mmlu_pro", "mmlu_pro/mmlu_pro_test_12020.jsonl", 12020),
        ("orz57k", "orz/orz_math_57k_head1967.json", 1967),
        ("mmmu_pro", "images_mmmu_pro/questions.jsonl", 20),
    ],
)
def test_real_releases_convert_without_loss(name, path, rows, tmp_path):
    """Prevents a converter that fits its own fixture only: every row of the real file comes out."""
    out, info = run(name, REAL / path, tmp_path)
    assert (info["rows_in"], info["rows_out"], info["dropped"]) == (rows, rows, {})
    if name == "mmlu_pro":
        assert (
            info["subsets"]["health"] == 817
        )  # of 818: one is among the twelve rows that this copy lacks
    if name == "mmmu_pro":
        assert (info["images"], info["subsets"]) == (24, {"": 20})  # no id, no subject here
        music = next(r for r in out if r["question"].startswith("<image> is a substitution"))
        expected = [REAL / f"images_mmmu_pro/test_Music_251_{n}.png" for n in (1, 4, 2, 5, 3)]
        assert (
            bytes_of(music, tmp_path) == [p.read_bytes() for p in expected]
            and music["options"] == ["<image>"] * 4
        )


@needs_real
def test_real_mathvista(tmp_path):
    """Prevents wrong letters on the real choices. The pictures are stand-ins."""
    rows = json.loads((REAL / "mathvista/testmini_no_images.json").read_text())
    images = archive(
        tmp_path / "images.zip", {row["image"]: picture(i) for i, row in enumerate(rows.values())}
    )
    out, info = run("mathvista", [REAL / "mathvista/testmini_no_images.json", images], tmp_path)
    assert (info["rows_out"], info["kinds"], info["images"]) == (
        1000,
        {"math": 458, "choice": 540, "open": 2},
        1000,
    )
    assert info["notes"] == {"two options with the gold's own text were merged": 1}
    for row in out:
        published = rows[row["id"].removeprefix("mathvista/")]
        gold = row["options"][ord(row["answer"]) - 65] if row["kind"] == "choice" else row["answer"]
        assert gold == published["answer"].strip()
    assert sum("precision" in row["meta"] for row in out) == 40


@needs_real
def test_real_medxpertqa_mm(tmp_path):
    """Prevents lost images in rows with up to six. The pictures are stand-ins under the real
    names."""
    table = REAL / "medxpertqa_mm/medxpertqa_mm_input.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    names = [image["image_path"] for row in rows for image in row["images"]]
    images = archive(
        tmp_path / "images.zip", {f"images/{name}": picture(i) for i, name in enumerate(names)}
    )
    out, info = run("medxpertqa_mm", [table, images], tmp_path)
    assert (info["rows_out"], info["dropped"], info["notes"]) == (2000, {}, {})
    counts = [len(row["images"]) for row in out]
    assert [counts.count(n) for n in range(1, 7)] == [1581, 236, 59, 22, 78, 24]
    assert not any("Answer Choices" in row["question"] for row in out)


@needs_real
def test_real_option_lists_of_mmmu_pro_parse():
    """Prevents list literals of the real release (quotes, backslashes, image tags) from being
    dropped."""
    path = REAL / "mmmu/gpt4o_standard10_cot_250.jsonl"
    for line in path.read_text().splitlines():
        row = json.loads(line)
        options = public.option_texts(row["options"])
        assert row["answer"] in public.letters_of(options)


# -------------------- Chat formats --------------------


def chat_rows(source: Path, tmp_path: Path) -> tuple[list, dict]:
    out, info = run("chat", source, tmp_path)
    return [[(m["role"], m["content"]) for m in row["messages"]] for row in out], info


FORMATS = {
    "ShareGPT": [
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Yes"},
            ]
        },
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}],
        },
    ],
    "Alpaca": [{"instruction": "Hi", "input": "", "output": "Yes", "system": "Be brief."}],
    "prompt": [
        {
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
            ],
            "completion": [{"role": "assistant", "content": "Yes"}],
        },
        {"prompt": "Hi", "completion": "Yes", "system": "Be brief."},
        {"prompt": "Hi", "response": "Yes", "system": "Be brief."},
    ],
    "OpenAI": [
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
            ]
        }
    ],
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_chat_formats_become_the_conversation_schema(name, suffix, tmp_path):
    """Prevents an evening of writing one's own converter for the formats that everybody has."""
    for i, row in enumerate(FORMATS[name]):
        file = tmp_path / f"{i}{suffix}"
        if suffix == ".parquet":
            parquet(file, [row])
        else:
            file.write_text(json.dumps([row] if suffix == ".json" else row) + "\n")
        (turns,), _ = chat_rows(file, tmp_path)
        assert turns == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes")]


def test_alpaca_input_follows_the_instruction(tmp_path):
    row = {"instruction": "Add.", "input": "1 1", "output": "2"}
    (turns,), _ = chat_rows(jsonl(tmp_path / "a.jsonl", [row]), tmp_path)
    assert turns == [("user", "Add.\n\n1 1"), ("assistant", "2")]
    row["history"] = [["Hi", "Hello"]]  # LLaMA-Factory's earlier turns
    (turns,), _ = chat_rows(jsonl(tmp_path / "b.jsonl", [row]), tmp_path)
    assert turns == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add.\n\n1 1"),
        ("assistant", "2"),
    ]


def test_chat_images_from_urls_files_and_parquet(tmp_path):
    """Prevents lost or swapped images: as data: URLs in parts, as files beside the row, without a
    place in the text, as bytes in parquet."""
    url = "data:image/png;base64," + base64.b64encode(picture(1)).decode()
    (tmp_path / "img").mkdir()
    (tmp_path / "img/2.png").write_bytes(picture(2))
    reply = {"role": "assistant", "content": "x"}
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": " or "},
        {"type": "image", "image": "img/2.png"},
    ]
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "x"}]
    web = [{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]
    rows = [
        {"messages": [{"role": "user", "content": parts}, reply]},
        {"conversations": turns, "image": "img/2.png"},
        {"messages": [{"role": "user", "content": "<image>?"}, reply], "images": [url]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, reply], "images": [url]},
        {"messages": [{"role": "user", "content": web}, reply]},
    ]
    out, info = run("chat", jsonl(tmp_path / "a.jsonl", rows), tmp_path)
    assert [row["messages"][0]["content"] for row in out] == [
        "<image> or <image>",
        "<image>What?",
        "<image>?",
        "<image>",
    ]
    pictures = [[picture(1), picture(2)], [picture(2)], [picture(1)], [picture(1)]]
    assert [bytes_of(row, tmp_path) for row in out] == pictures
    assert list(info["dropped"]) == ["image is a web address: download it first"]
    table = parquet(
        tmp_path / "b.parquet",
        [{"messages": [{"role": "user", "content": "?"}, reply], "images": [embedded(3)]}],
    )
    (row,), _ = run("chat", table, tmp_path)
    assert bytes_of(row, tmp_path) == [picture(3)]


def test_chat_rows_that_cannot_be_used_are_counted_and_unknown_fields_named(tmp_path):
    good = {"prompt": "Hi", "completion": "Yes"}
    rows = [
        good,
        {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
    ]
    _, info = chat_rows(jsonl(tmp_path / "a.jsonl", rows), tmp_path)
    assert set(info["dropped"]) == {
        "a turn that is not system, user or assistant",
        "tool calls: the schema has no place for them",
    }
    with pytest.raises(ValueError, match=r"row 0: not a chat format.*fields: text"):
        convert.convert(
            "chat", [str(jsonl(tmp_path / "b.jsonl", [{"text": "x"}]))], str(tmp_path / "o.jsonl")
        )


@needs_real
def test_real_prompt_and_response_file(tmp_path):
    """Every row of a real file in the prompt/response form comes out."""
    turns, info = chat_rows(REAL / "math_short_cot/r1zero_format_sft_1767.jsonl", tmp_path)
    assert len(turns) + sum(w["rows"] for w in info["dropped"].values()) == 1767
    assert len(turns) > 1700


# -------------------- What was written is checked; downloads --------------------


def test_a_conversion_that_training_would_refuse_is_not_kept(tmp_path, monkeypatch):
    """Prevents a new converter with a kind that there isn't that reports success: every row of its
    file would be refused by training."""

    def aime(row):
        return public.problem(row, row["ID"], row["Problem"], row["Answer"], kind="quiz")

    monkeypatch.setitem(public.SPECS, "aime", public.Spec(aime, "aime", 30))
    source = jsonl(tmp_path / "aime.jsonl", [{"ID": "1", "Problem": "How many?", "Answer": 204}])
    with pytest.raises(ValueError, match="no row .*: kind: missing or unknown: 'quiz'"):
        convert.convert("aime", [str(source)], str(tmp_path / "out.jsonl"))
    assert not list(tmp_path.glob("out*"))


def test_downloads_offline_and_of_unknown_names_say_what_to_do(tmp_path, monkeypatch):
    """Prevents a traceback of 60 lines without a connection."""

    def offline(*_, **__):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setitem(
        sys.modules,
        "huggingface_hub",
        types.SimpleNamespace(snapshot_download=offline, HfApi=offline),
    )
    for name in ("gsm8k", "orz57k"):  # with and without a pinned commit
        with pytest.raises(SystemExit, match="could not be downloaded .*no route to host"):
            main(["download", name, "--out", str(tmp_path / name)])
        assert not (tmp_path / name / "download.json").exists()
    with pytest.raises(
        SystemExit, match="download gsm9k: unknown; these can be downloaded: openth"
    ):
        main(["download", "gsm9k", "--out", str(tmp_path / "x")])


def test_every_release_is_pinned_or_its_commit_is_recorded():
    """Prevents scores on another version of a data set than the one that was named."""
    pinned = {n: re.search("@[0-9a-f]{40}$", hub[0]) for n, hub in public.HUB.items()}
    assert {n for n, commit in pinned.items() if commit is None} == {
        "openthoughts",
        "orz57k",
        "geometry3k",
    }
    assert {s.release or n for n, s in public.SPECS.items()} - {
        "chat",
        "from_samples",
        "nejm",
    } == set(public.HUB)
    assert public.HUB["orz57k"][0].startswith("Open-Reasoner-Zero/")


def test_orz_as_columns(tmp_path):
    """The hub's own viewer gives a pair of turns as columns "0" and "1"."""
    pair = [{"from": "human", "value": "q"}, {"ground_truth": {"value": "1"}}]
    table = jsonl(tmp_path / "orz_math_57k.jsonl", [{"0": pair[0], "1": pair[1]}])
    (row,), _ = run("orz57k", table, tmp_path)
    assert (row["question"], row["answer"]) == ("q", "1")
