"""One short function per public data set: a published row → a row of our schema. `SPECS` and `HUB`
at the end are the registry; a new data set is a function and a line there.

`problem` does what they share. `Drop(reason)` leaves a row out, and the report counts the reasons.
Where the paper is silent: how OpenThoughts becomes <think>/<answer> (see `openthoughts`), and which
MMMU-Pro it used (here the standard one with ten options).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from convert.chat import chat
from convert.releases import Drop, Row
from core.schema import LETTERS
from data import INSTRUCTIONS
from rewards import last_boxed, tagged

HEALTH_SUBJECTS = {
    *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine"),
    *("Pharmacy", "Public_Health"),
}
IMAGE_TAG = re.compile(r"<image\s*_?(\d+)>")
TRACE = re.compile(
    r"\s*<\|begin_of_thought\|>(.*)<\|end_of_thought\|>\s*"
    r"<\|begin_of_solution\|>(.*)<\|end_of_solution\|>\s*",
    re.S,
)
TAG = re.compile(r"</?think>|</?answer>|<\|(?:begin|end)_of_")


# ---------------------------------------------------------------------- what they share
def problem(
    row: Row,
    id: Any,
    question: Any,
    answer: Any,
    options: Any = None,
    images: list | dict[int, Any] = (),
    *,
    kind: str | None = None,
    subset: Any = None,
    answer_is_text: bool = False,
    **meta: Any,
) -> dict:
    """A row of the problem schema; empty parts are left out.

    id: None for the row's number. options: see `option_texts`. kind: by default "choice" with
    options, "math" without. answer: with options a letter, else (or if answer_is_text) the text of
    one of them; an open question may have several. images: see `place_images`.
    """
    options = option_texts(options) if options else []
    if isinstance(answer, list):
        answer = [text_of(a, "the answer") for a in answer]
    else:
        answer = text_of(answer, "the answer")
        if options and (answer_is_text or answer not in letters_of(options)):
            options, answer = letter_of_text(answer, options, row)
    texts, images = place_images([text_of(question, "the question"), *options], images, row)
    made = dict(id=id, task="", kind=kind or ("choice" if options else "math"), question=texts[0])
    meta = {k: v for k, v in meta.items() if v is not None}
    more = dict(subset=subset and str(subset), options=texts[1:], images=images, meta=meta)
    return made | dict(answer=answer) | {k: v for k, v in more.items() if v}


def text_of(value: Any, field: str) -> str:
    text = "" if value is None else str(value).strip()
    if not text:
        raise Drop(f"{field} is empty")
    return text


def letters_of(options: Collection) -> list[str]:
    return list(LETTERS[: len(options)])


def parse_list(text: str) -> list:
    """A list literal (MMMU); no code in a data set is ever run."""
    try:
        return list(ast.literal_eval(text))
    except Exception:  # a syntax error, or whatever else stands there
        raise Drop("not a list literal", text[:60]) from None


def option_texts(value: Any) -> list[str]:
    """Options as texts in the order of their letters; a list inside the list is opened (MMMU-Pro).

    >>> option_texts({"B": "no", "A": "yes"}), option_texts("['1', '2']")
    (['yes', 'no'], ['1', '2'])
    >>> option_texts([["x", "y"], "z"]), option_texts([{"letter": "A", "content": "x"}])
    (['x', 'y', 'z'], ['x'])
    """
    if isinstance(value, str):
        value = parse_list(value)
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):  # MedXpertQA
        value = {v["letter"]: v["content"] for v in value}
    if isinstance(value, dict):  # parquet gives absent letters as null
        value = {k: v for k, v in value.items() if v is not None}
        if sorted(value) != letters_of(value):
            raise Drop("option letters are not A, B, C, …", ", ".join(map(str, value)))
        value = [value[k] for k in sorted(value)]
    while any(isinstance(v, (list, tuple)) for v in value):
        value = [w for v in value for w in (v if isinstance(v, (list, tuple)) else [v])]
    return [text_of(v, "an option") for v in value]


def letter_of_text(gold: str, options: list[str], row: Row) -> tuple[list[str], str]:
    """The letter of a gold that is published as text: exact, then without case and full stop.

    Options with the gold's own text twice are merged: else one right answer would count as wrong.
    """
    for normal in (str, lambda s: s.rstrip(".").strip().casefold()):
        hits = [i for i, option in enumerate(options) if normal(option) == normal(gold)]
        if len({options[i] for i in hits}) > 1:
            raise Drop("the answer's text equals several options", gold[:60])
        if len(hits) > 1:
            row.notes.append("two options with the gold's own text were merged")
            options = [o for i, o in enumerate(options) if i not in hits[1:]]
        if hits:
            return options, LETTERS[hits[0]]
    raise Drop("the answer is no letter or text of the options", gold[:60])


def place_images(texts: list[str], images: list | dict, row: Row) -> tuple[list[str], list]:
    """Texts (question, then options) with one `<image>` per image, and the images in that order.

    Numbered images, {1: a, 2: b, 3: c}, go where `<image 2>` names them; those that are never named
    are left out. ["Like <image 2>?", "<image 1>", "<image 2>"] →
    ["Like <image>?", "<image>", "<image>"], [b, a, b].

    A list has one picture whose parts the tags name: it goes to the first tag, later tags become
    "(image N)". ["See <image1>.", "<image2>"] → ["See <image>.", "(image 2)"].

    Without any tag, all images come in front.
    """
    order = [int(n) for text in texts for n in IMAGE_TAG.findall(text)]
    if order and isinstance(images, dict):
        if absent := [n for n in order if n not in images]:
            raise Drop("the text names an image that the row does not have", f"<image {absent[0]}>")
        if set(order) != set(images):
            row.notes.append("a row has images that its question never names (left out)")
        return [IMAGE_TAG.sub("<image>", text) for text in texts], [images[n] for n in order]
    images = list(images.values() if isinstance(images, dict) else images)
    if order and images:
        whole = IMAGE_TAG.sub("<image>" * len(images), "\0".join(texts), count=1)
        texts = IMAGE_TAG.sub(r"(image \1)", whole).split("\0")
    elif images and texts[0].count("<image>") != len(images):
        texts = ["<image>\n" * len(images) + texts[0], *texts[1:]]
    return texts, images


# ---------------------------------------------------------------------- text
def gsm8k(row: Row) -> dict:
    """`answer` is a worked solution, then "#### 1,234"."""
    _, mark, gold = row["answer"].rpartition("####")
    if not mark:
        raise Drop("no #### in the answer")
    return problem(row, None, row["question"], gold.replace(",", "").replace("$", ""))


def orz57k(row: Row) -> dict:
    """Turns {"from": "human", "value"} and {…, "ground_truth": {"value"}}, as a pair or as columns
    "0" and "1"."""
    human, assistant = map(Row, row["turns"] if "turns" in row else (row["0"], row["1"]))
    return problem(row, None, human["value"], Row(assistant["ground_truth"])["value"])


def mmlu_pro(row: Row) -> dict:
    """Three to ten options; some versions pad with "N/A". The letter is the gold, as officially."""
    options, letter, subset = option_texts(row["options"]), row["answer"], row["category"]
    while options[-1:] == ["N/A"] and letter != LETTERS[len(options) - 1]:
        options.pop()
    more = dict(subset=subset, health=subset == "health" or None)
    return problem(row, row["question_id"], row["question"], letter, options, **more)


def medqa(row: Row, expected: int) -> dict:
    """Published with five options and with four, under the same fields: the number is checked."""
    options, more = option_texts(row["options"]), dict(subset=row.get("meta_info"))
    if len(options) != expected:
        raise ValueError(f"{len(options)} options, not {expected}: medqa has five, medqa_4ops four")
    return problem(row, None, row["question"], row["answer_idx"], options, **more)


# ---------------------------------------------------------------------- images
def medxpertqa_mm(row: Row) -> dict:
    """One to six images a row; the question ends with its options."""
    question = row["question"].rsplit("Answer Choices:", 1)[0]
    label = row["label"][0] if isinstance(row["label"], list) else row["label"]
    images, subset = row["images"] or [None], row.get("medical_task")  # None: refused as missing
    return problem(row, row["id"], question, label, row["options"], images, subset=subset)


def mmmu(row: Row) -> dict:
    """MMMU and MMMU-Pro: `<image 1>` … in question and options, options a list literal.

    Open questions (53 in MMMU val) have one gold, or a list literal of golds that are all right.
    """
    in_id = re.fullmatch(r"(?:validation|dev|test)_(.+)_\d+", str(row.get("id")))
    subset = row.get("subject") or (in_id[1] if in_id else None)
    images = {n: row[f"image_{n}"] for n in range(1, 8) if row.get(f"image_{n}")}
    answer, kind, options = text_of(row["answer"], "the answer"), "choice", None
    if row.get("question_type", "multiple-choice") == "multiple-choice":
        options = option_texts(row["options"])
    else:
        kind, answer = "open", parse_list(answer) if answer.startswith("[") else answer
    more = dict(kind=kind, subset=subset, health=subset in HEALTH_SUBJECTS or None)
    return problem(row, row.get("id"), row["question"], answer, options, images, **more)


def split_options(text: str) -> tuple[str, list[str]] | None:
    """Options in the question's text, cut out of it; None unless they read A, B, C, … in order.

    >>> split_options("What is it?\\nOptions: A: a cat, B: a dog, big, C: both, D: none")
    ('What is it?', ['a cat', 'a dog, big', 'both', 'none'])
    >>> split_options("Find x.\\nChoices:\\n(A) 1\\n(B) 2"), split_options("Which?")
    (('Find x.', ['1', '2']), None)
    """
    head = list(re.finditer(r"\b(?:Options|Choices):", text))
    if not head:
        return None
    question, tail = text[: head[-1].start()].strip(), text[head[-1].end() :].strip()
    for marker in (r"(?:^|,\s*|\n\s*)([A-Z])[:.]\s+", r"(?:^|\s)\(([A-Z])\)\s*"):
        _, *found = re.split(marker, tail)
        options = [p.strip().rstrip(",").strip() for p in found[1::2]]
        if len(options) > 1 and all(options) and question and found[::2] == letters_of(options):
            return question, options
    return None


def mmstar(row: Row) -> dict:
    """Options are split off the question's text where that can be read, else bare letters."""
    split = split_options(row["question"])
    if split is None:
        row.notes.append("options left in the question's text")
    question, options = split or (row["question"], list("ABCD"))
    images, subset = [row["image"]], row["category"]
    return problem(row, row["index"], question, row["answer"], options, images, subset=subset)


def mathvista(row: Row) -> dict:
    """A choice's gold is its TEXT; lists compare as text. The question gets what the official query
    says besides: the unit, and the form of a free answer.

    {"unit": "cm", "answer_type": "float", "precision": 1.0} → " (Unit: cm)\\nAnswer with a number
    with one decimal place." The gold is rounded so; without this a right value is marked wrong.
    """
    question, unit = text_of(row["question"], "the question"), row.get("unit") or None
    kind, precision = row["answer_type"], row.get("precision")
    choices = row["choices"] if row["question_type"] == "multi_choice" else None
    forms = dict(integer="an integer", float="a decimal number", list="a list, as in [1, 2, 3]")
    if precision is not None:
        precision = int(precision)  # a float in the parquet
        words = {1: "one decimal place", 2: "two decimal places", 3: "three decimal places"}
        forms["float"] = f"a number with {words.get(precision, f'{precision} decimal places')}"
    question += f" (Unit: {unit})" if unit else ""
    if kind in forms and not choices:
        question += f"\nAnswer with {forms[kind]}."
    more = dict(precision=precision, subset=Row(row["metadata"])["task"])
    more |= dict(kind="open" if not choices and kind in ("list", "text") else None)
    images = [row.get("decoded_image") or row["image"]]
    return problem(
        row, row["pid"], question, row["answer"], choices, images, answer_is_text=True, **more
    )


def mathvision(row: Row) -> dict:
    """One image a row, whatever the tags say; a free answer where `options` is empty."""
    question, images = row["question"], [row.get("decoded_image") or row["image"]]
    more = dict(subset=row.get("subject"))
    return problem(row, row["id"], question, row["answer"], row["options"], images, **more)


def geometry3k(row: Row) -> dict:
    """`problem` with an <image> for each of `images`, `answer` (hiyouga/geometry3k)."""
    return problem(row, None, row["problem"], row["answer"], images=row["images"])


def omnimedvqa(row: Row) -> dict:
    """Two to four options; the gold is a text; one entry has `modality` for `modality_type`."""
    options = [v for c in "ABCD" if (v := row.get(f"option_{c}")) not in (None, "")]
    if len(options) < 2:
        raise Drop("fewer than two options")
    more = dict(subset=row.get("modality_type") or row["modality"], answer_is_text=True)
    id, gold, images = row["question_id"], row["gt_answer"], [row["image_path"]]
    return problem(row, id, row["question"], gold, options, images, **more)


def nejm(row: Row) -> dict:
    """The user's own files: a json list with option_A … option_E and `correct_answer`, its images
    as images/<image_id>.* or images/<date>.*"""
    id, date, options = row["image_id"], str(row["date"]), [row[f"option_{c}"] for c in "ABCDE"]
    subset = (re.findall(r"(?:19|20)\d\d", date) or [None])[0]
    images = [(str(id), date)]  # the first of these names that there is
    return problem(row, id, row["question"], row["correct_answer"], options, images, subset=subset)


# ---------------------------------------------------------------------- conversations
def openthoughts(row: Row) -> dict:
    """OpenThoughts-114k: a user turn, and an assistant turn with <|begin_of_thought|> …

    The paper does not say how it mapped these. Here the user turn is the paper's training prompt
    around the published one, unchanged, without the release's system prompt; the assistant turn is
    "<think>\\n…\\n</think>\\n<answer>\\n…\\n</answer>" with the whole solution in the answer. The
    line breaks are for the tokenizer: after a full stop on the same line Qwen's joins ".</" into
    one token, and most closing tags would begin with another token than that of forced exit.
    """
    question, thought, solution = thought_and_solution(row)
    return conversation(INSTRUCTIONS["train"] + question, solution, thought)


def openthoughts_direct(row: Row) -> dict:
    """The same without thoughts, for the ablation: the bare question, and the last \\boxed{} of the
    solution, else all of it. The paper gives no prompt for it."""
    question, _, solution = thought_and_solution(row)
    return conversation(question, last_boxed(solution) or solution)


def from_samples(row: Row) -> dict:
    """A stored sample of eval.py: rejection sampling.

    Kept is what is right and whole: reward 1, ended by itself (neither truncated nor forced to
    exit), one closed thought with something in it, and an answer after it. The user turn is the
    prompt that the teacher had, so the student learns to think when asked in these words. The paper
    kept the correct samples of QwQ-32B; it does not say how many of a question, nor in which form.
    """
    if "lenient" not in row:
        raise ValueError("not graded yet; run the same eval.py to its end")
    if row["reward"] < 1:
        raise Drop("wrong, or no answer")
    if row["finish_reason"] != "stop":
        raise Drop("truncated, or forced to exit")
    # QwQ's template opens the thought in the prompt: its text has no <think>
    whole = re.fullmatch(r"\s*(?:<think>)?(.*)</think>(.*)", row["text"], re.S)
    if whole is None:
        raise Drop("no closed thought")
    thought = whole[1].strip()
    answer = tagged(whole[2]) or row.get("answer")  # a teacher without these tags: as extracted
    if not thought or not answer:
        raise Drop("empty thought or answer")
    if TAG.search(thought + answer):
        raise Drop("a tag of the format is inside the text")
    made = conversation(row["prompt"], answer, thought)
    images = [Path(image).absolute() for image in row.get("images") or ()]
    return {**made, "images": images} if images else made


def thought_and_solution(row: Row) -> tuple[str, str, str]:
    """Question, thought and solution of a row of OpenThoughts."""
    turns = [Row(t) for t in row["conversations"]]
    if [t["from"] for t in turns] not in (["user", "assistant"], ["human", "gpt"]):
        raise Drop("not one user and one assistant turn", str([t["from"] for t in turns]))
    trace = TRACE.fullmatch(turns[1]["value"])
    if trace is None:
        raise Drop("no complete thought and solution markers")
    question, thought = text_of(turns[0]["value"], "the question"), text_of(trace[1], "the thought")
    solution = text_of(trace[2], "the solution")
    if TAG.search(question + thought + solution):
        raise Drop("a tag of the format is inside the text")
    return question, thought, solution


def conversation(question: str, answer: str, thought: str = "") -> dict:
    thought = f"<think>\n{thought}\n</think>\n" if thought else ""
    reply = {"role": "assistant", "content": f"{thought}<answer>\n{answer}\n</answer>"}
    return {"messages": [{"role": "user", "content": question}, reply]}


# ---------------------------------------------------------------------- registry
@dataclass(frozen=True)
class Spec:
    """One data set: its converter, which tables of its release are read, and their rows."""

    convert_row: Callable[[Row], dict]
    tables: str  # regular expression on the file's name inside the release
    rows: int | None = None  # of the whole split, to tell it from a part
    release: str = ""  # key in HUB, where it is not the data set's own name
    distinct: bool = False  # keep rows that come out equal once


FIVE, FOUR = partial(medqa, expected=5), partial(medqa, expected=4)
SPECS: dict[str, Spec] = {
    "chat": Spec(chat, r"\.(parquet|jsonl?)$"),
    "from_samples": Spec(from_samples, r"^samples\.jsonl$", distinct=True),
    "openthoughts": Spec(openthoughts, r"(^|/)data/train\b", 113957),
    "openthoughts_direct": Spec(openthoughts_direct, r"(^|/)data/train\b", 113957, "openthoughts"),
    "orz57k": Spec(orz57k, r"orz_math_57k", 56878),
    "medqa_train": Spec(FIVE, r"questions/US/train\.jsonl$", 10178, "medqa"),
    "gsm8k": Spec(gsm8k, r"main/test\b|(^|/)test\.jsonl$", 1319),
    "mmlu_pro": Spec(mmlu_pro, r"(^|/)test\b", 12032),
    "medqa": Spec(FIVE, r"questions/US/test\.jsonl$", 1273),
    "medqa_4ops": Spec(FOUR, r"phrases_no_exclude_test\.jsonl$", 1273),
    "medxpertqa_mm": Spec(medxpertqa_mm, r"(?i)mm/test\b", 2000),
    "mmmu": Spec(mmmu, r"(^|/)validation\b", 900),
    "mmmu_pro": Spec(mmmu, r"standard \(10 options\)/test\b", 1730),
    "mmstar": Spec(mmstar, r"(^|/)(mmstar\.parquet$|val\b)", 1500),
    "mathvista": Spec(mathvista, r"(^|/)testmini\b", 1000),
    "mathvision": Spec(mathvision, r"(^|/)test\b", 3040),
    "geometry3k": Spec(geometry3k, r"(^|/)train\b", 2101),
    "geometry3k_test": Spec(geometry3k, r"(^|/)test\b", 601, "geometry3k"),
    "omnimedvqa": Spec(omnimedvqa, r"Open-access/[^/]*\.json$", 88996),
    "nejm": Spec(nejm, r"\.(json|parquet)$", 947),
}
# Where the releases are on the hub: name@commit, then the files that are read. The commits are
# those that public evaluation code pins. For the three without one no public pin was found: the
# newest is taken and download.json says which; pass --revision to repeat it.
HUB: dict[str, tuple[str, ...]] = {
    "openthoughts": ("open-thoughts/OpenThoughts-114k", "data/train-*"),
    "orz57k": ("Open-Reasoner-Zero/orz_math_57k_collection", "*.json", "*.parquet"),
    "gsm8k": ("openai/gsm8k@cc7b047b6e5bb11b4f1af84efc572db110a51b3c", "main/test-*"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro@3373e0b32277875b8db2aa555a333b78a08477ea", "data/test-*"),
    "medqa": ("bigbio/med_qa@ddef95d268cdad413693d634279a9a679d468469", "data_clean.zip"),
    "medqa_4ops": (
        "GBaker/MedQA-USMLE-4-options@0fb93dd23a7339b6dcd27e241cb9b5eca62d4d18",
        "phrases_no_exclude_test.jsonl",
    ),
    "medxpertqa_mm": (
        "TsinghuaC3I/MedXpertQA@7e7c465a68eb2b866926bfa59c8c9d17a8daba65",
        "MM/test*",
        "images.zip",
    ),
    "mmmu": ("MMMU/MMMU@171b0ef74cd1704464e6940860968009d8cdd59a", "*/validation-*"),
    "mmmu_pro": (
        "MMMU/MMMU_Pro@563f3e84bb3b90893083a1f039cfa13077f2302b",
        "standard (10 options)/test-*",
    ),
    "mmstar": ("Lin-Chen/MMStar@bc98d668301da7b14f648724866e57302778ab27", "mmstar.parquet"),
    "mathvista": ("AI4Math/MathVista@2b6ad69445fbb5695c9b165475e8decdbeb97747", "data/testmini-*"),
    "mathvision": ("MathLLMs/MathVision@0c681f39d3dacd336abf62ceb833e40320c8599f", "data/test-*"),
    "geometry3k": ("hiyouga/geometry3k", "data/train-*", "data/test-*"),
    "omnimedvqa": (
        "foreverbeliever/OmniMedVQA@1ba51c28fc0773bdf7efb8396e5bcfd4227e22da",
        "OmniMedVQA.zip",
    ),
}
