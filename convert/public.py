"""One short function per data set: a published row → a row of ours. `SPECS` and `HUB` at the end
are the registry; a new data set is a function and a line there.

Where the paper is silent: how OpenThoughts becomes <think>/<answer> (see `openthoughts`); which
MMMU-Pro it used (here the standard one with ten options). A row that cannot be converted raises
`Drop` with a reason. All publish a question, options as texts and the answer as a letter or a text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.chat import chat
from convert.releases import Context, Drop, Row
from core.schema import LETTERS
from data import INSTRUCTIONS
from rewards import last_boxed

HEALTH_SUBJECTS = set(
    "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health".split()
)
IMAGE_TAG = re.compile(r"<image\s*_?(\d+)>")
TRACE = re.compile(
    r"\s*<\|begin_of_thought\|>(.*)<\|end_of_thought\|>\s*"
    r"<\|begin_of_solution\|>(.*)<\|end_of_solution\|>\s*",
    re.S,
)


# ---------------------------------------------------------------------- parts that several share
def text_of(value: Any, field: str) -> str:
    text = "" if value is None else str(value).strip()
    if not text:
        raise Drop(f"{field} is empty")
    return text


def parse_list(value: Any) -> list:
    """A list, or a list literal in a string (MMMU); no code in a data set is ever run."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise Drop("options are not a list literal", str(value)[:60]) from None
    if not isinstance(value, (list, tuple)):
        raise Drop("options are not a list", repr(value)[:60])
    return list(value)


def option_texts(value: Any) -> list[str]:
    """Options as texts in the order of their letters; a list inside the list is opened (MMMU-Pro).

    >>> option_texts({"B": "no", "A": "yes"}), option_texts("['1', '2']")
    (['yes', 'no'], ['1', '2'])
    >>> option_texts([["x", "y"], "z"])
    ['x', 'y', 'z']
    >>> option_texts([{"letter": "A", "content": "x"}, {"key": "B", "value": "y"}])
    ['x', 'y']
    """
    if not isinstance(value, dict):
        value = parse_list(value)
        while any(isinstance(v, (list, tuple)) for v in value):
            value = [w for v in value for w in (v if isinstance(v, (list, tuple)) else [v])]
        if value and all(isinstance(v, dict) for v in value):  # MedXpertQA, bigbio's MedQA
            value = {v.get("letter", v.get("key")): v.get("content", v.get("value")) for v in value}
    if isinstance(value, dict):  # parquet gives absent letters as null
        value = {k: v for k, v in value.items() if v is not None}
        if sorted(map(str, value)) != list(LETTERS[: len(value)]):
            raise Drop("option letters are not A, B, C, …", ", ".join(map(str, value)))
        value = [value[k] for k in sorted(value)]
    if not 1 <= len(value) <= len(LETTERS):
        raise Drop("no options" if not value else "more than 26 options")
    return [text_of(v, "an option") for v in value]


def letter_of(label: Any, options: list[str]) -> str:
    """The answer's letter, within the options."""
    label = label[0] if isinstance(label, list) and len(label) == 1 else label
    label = text_of(label, "the answer")
    if label not in list(LETTERS[: len(options)]):
        raise Drop("the answer is not a letter of the options", f"{label[:40]!r} of {len(options)}")
    return label


def letter_of_text(gold: Any, options: list[str], ctx: Context) -> tuple[list[str], str]:
    """The letter of a gold that is published as text: exact, then without case and full stop.

    Options with the gold's own text twice are merged: else one right answer would count as wrong.
    """
    gold = text_of(gold, "the answer")
    for normal in (str.strip, lambda s: s.strip().rstrip(".").strip().casefold()):
        hits = [i for i, option in enumerate(options) if normal(option) == normal(gold)]
        if len({options[i] for i in hits}) > 1:
            raise Drop("the answer's text equals several options", gold[:60])
        if hits:
            if len(hits) > 1:
                ctx.note("two options with the gold's own text were merged")
                options = [o for i, o in enumerate(options) if i not in hits[1:]]
            return options, LETTERS[hits[0]]
    raise Drop("the answer's text equals no option", gold[:60])


def place_numbered(texts: list[str], available: Collection[int]) -> tuple[list[str], list[int]]:
    """Turn `<image 3>` into `<image>`; return the texts and the images' numbers in reading order.

    >>> place_numbered(["Which is like <image 2>?", "<image 1>", "<image 2>"], {1, 2, 3})
    (['Which is like <image>?', '<image>', '<image>'], [2, 1, 2])

    Images that no tag names are left out (MMMU's explanations may have their own), except where
    there is no tag at all: then all images come first.
    """
    order = [int(n) for text in texts for n in IMAGE_TAG.findall(text)]
    if not order:
        order = sorted(available)
        return ["<image>\n" * len(order) + texts[0], *texts[1:]], order
    absent = [n for n in order if n not in available]
    if absent:
        raise Drop("the text names an image that the row does not have", f"<image {absent[0]}>")
    return [IMAGE_TAG.sub("<image>", text) for text in texts], order


def place_single(texts: list[str]) -> list[str]:
    """One picture per row: at the first tag (else in front); later tags become "(image N)".

    >>> place_single(["See <image1>.", "<image2>"])
    ['See <image>.', '(image 2)']
    """
    whole = "\0".join(texts)
    first = IMAGE_TAG.search(whole)
    if first is None:
        return ["<image>\n" + texts[0], *texts[1:]]
    after = IMAGE_TAG.sub(r"(image \1)", whole[first.end() :])
    return f"{whole[: first.start()]}<image>{after}".split("\0")


def problem(
    ctx: Context,
    id: Any,
    kind: str,
    question: str,
    answer: Any,
    options: list[str] | None = None,
    images: list[str] | None = None,
    subset: Any = None,
    **meta: Any,
) -> dict:
    """One row of the problem schema; empty parts are left out. meta.cluster names the first image,
    so that error bars can group questions about one image."""
    if images:
        meta["cluster"] = Path(images[0]).stem
    meta = {k: v for k, v in meta.items() if v is not None and v != ""}
    row = dict(id=f"{ctx.name}/{id}", task=ctx.name, kind=kind, question=question, answer=answer)
    if subset is not None:
        row["subset"] = str(subset)
    return row | {k: v for k, v in dict(options=options, images=images, meta=meta).items() if v}


# ---------------------------------------------------------------------- text
def gsm8k(row: Row, i: int, ctx: Context) -> dict:
    """`question`, `answer` = worked solution, then "#### 1,234"."""
    _, mark, gold = row["answer"].rpartition("####")
    if not mark:
        raise Drop("no #### in the answer")
    gold = text_of(gold, "the answer").replace(",", "").replace("$", "")
    return problem(ctx, i, "math", text_of(row["question"], "question"), gold)


def orz57k(row: Row, i: int, ctx: Context) -> dict:
    """Two turns: {"from": "human", "value"}, {…, "ground_truth": {"value", "pass_at_n"?}}; a pair,
    or columns "0" and "1"."""
    human, assistant = map(Row, row["turns"] if "turns" in row else (row["0"], row["1"]))
    gold, question = Row(assistant["ground_truth"]), text_of(human["value"], "the problem")
    answer = text_of(gold["value"], "the answer")
    return problem(ctx, i, "math", question, answer, pass_at_n=gold.get("pass_at_n"))


def mmlu_pro(row: Row, i: int, ctx: Context) -> dict:
    """Three to ten options; some versions pad with "N/A". The letter is the gold, as officially."""
    options = option_texts(row["options"])
    letter = letter_of(row["answer"], options)
    while len(options) > LETTERS.index(letter) + 1 and options[-1] == "N/A":
        options.pop()
        ctx.note("N/A padding removed from the options")
    if LETTERS.index(letter) != row.get("answer_index", LETTERS.index(letter)):
        ctx.note("answer_index disagrees with the answer's letter (the letter is kept)")
    question, subset = text_of(row["question"], "question"), row["category"]
    more = dict(src=row.get("src"), health=subset == "health" or None)
    return problem(
        ctx, row["question_id"], "choice", question, letter, options, None, subset, **more
    )


def medqa(row: Row, i: int, ctx: Context) -> dict:
    """Published with five options and with four, under the same fields: the number is checked."""
    options, expected = option_texts(row["options"]), 4 if "4ops" in ctx.name else 5
    if len(options) != expected:
        raise ValueError(
            f"{len(options)} options where {ctx.name} has {expected}: medqa is the release with "
            "five options, medqa_4ops that with four"
        )
    letter = letter_of(row["answer_idx"], options)
    if options[LETTERS.index(letter)] != text_of(row["answer"], "the answer"):
        ctx.note("the answer's text is not the text of its letter (the letter is kept)")
    question = text_of(row["question"], "question")
    return problem(ctx, i, "choice", question, letter, options, None, row.get("meta_info"))


# ---------------------------------------------------------------------- images
def medxpertqa_mm(row: Row, i: int, ctx: Context) -> dict:
    """The question ends with "Answer Choices: (A) …": removed, else the prompt has it twice."""
    question, mark, _ = row["question"].rpartition("Answer Choices:")
    if not mark:
        question = row["question"]
        ctx.note("no Answer Choices: in the question")
    options, images = option_texts(row["options"]), [ctx.image(v) for v in row["images"] or []]
    if not images:
        raise Drop("no images")
    question = "<image>\n" * len(images) + text_of(question, "question")
    more = {k: row.get(k) for k in ("body_system", "question_type")}
    letter, subset = letter_of(row["label"], options), row.get("medical_task")
    return problem(ctx, row["id"], "choice", question, letter, options, images, subset, **more)


def mmmu(row: Row, i: int, ctx: Context) -> dict:
    """MMMU and MMMU-Pro: `<image 1>` … in question and options, options a list literal.

    Open questions (53 in MMMU val) have one gold, or a list literal of golds that are all right.
    """
    name = str(row.get("id", i))
    from_id = re.fullmatch(r"(?:validation|dev|test)_(.+)_\d+", name)
    subset = row.get("subject") or (from_id[1] if from_id else None)
    is_open = row.get("question_type", "multiple-choice") != "multiple-choice"
    options = [] if is_open else option_texts(row["options"])
    if not is_open and "[[" in str(row["options"]).replace(" ", ""):
        ctx.note("options in a list inside the list were opened")
    available = {n: row[f"image_{n}"] for n in range(1, 8) if row.get(f"image_{n}")}
    texts, order = place_numbered([text_of(row["question"], "question"), *options], available)
    if set(order) != set(available):
        ctx.note("a row has images that its question never names (left out)")
    answer = text_of(row["answer"], "the answer")
    if not is_open:
        answer = letter_of(answer, options)
    elif answer.startswith("["):
        answer = [text_of(a, "an answer") for a in parse_list(answer)]
    images, kind = [ctx.image(available[n]) for n in order], "open" if is_open else "choice"
    more = dict(difficulty=row.get("topic_difficulty"), health=subset in HEALTH_SUBJECTS or None)
    return problem(ctx, name, kind, texts[0], answer, texts[1:], images, subset, **more)


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
        _, *parts = re.split(marker, tail)
        options = [p.strip().rstrip(",").strip() for p in parts[1::2]]
        in_order = "".join(parts[0::2]) == LETTERS[: len(options)]
        if len(options) > 1 and in_order and all(options) and question:
            return question, options
    return None


def mmstar(row: Row, i: int, ctx: Context) -> dict:
    """Options are split off the question's text where that can be read, else bare letters."""
    question = text_of(row["question"], "question")
    split = split_options(question)
    if split is None:
        ctx.note("options left in the question's text")
        split = question, list("ABCD")
    question, *options = place_single([split[0], *split[1]])
    letter, images, subset = (
        letter_of(row["answer"], options),
        [ctx.image(row["image"])],
        row["category"],
    )
    more = dict(l2_category=row.get("l2_category"))
    return problem(ctx, row["index"], "choice", question, letter, options, images, subset, **more)


PLACES = {1: "one decimal place", 2: "two decimal places", 3: "three decimal places"}


def mathvista_form(row: Row) -> str:
    """What the official query says besides the question: the unit, and the form of a free answer.
    {"unit": "cm", "answer_type": "float", "precision": 1.0} → " (Unit: cm)\\nAnswer with a number
    with one decimal place." The gold is rounded so; without this a right value is marked wrong."""
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    kind, precision = row["answer_type"], row.get("precision")
    if row["question_type"] == "multi_choice" or kind not in ("integer", "float", "list"):
        return unit
    if kind == "float" and precision is not None:
        places = PLACES.get(int(precision), f"{int(precision)} decimal places")
        return f"{unit}\nAnswer with a number with {places}."
    forms = dict(integer="an integer", float="a decimal number", list="a list, as in [1, 2, 3]")
    return f"{unit}\nAnswer with {forms[kind]}."


def mathvista(row: Row, i: int, ctx: Context) -> dict:
    """A choice's gold is its TEXT; `precision` is a float in the parquet; lists compare as text."""
    (question,) = place_single([text_of(row["question"], "question")])
    question += mathvista_form(row)
    meta, options, kind = Row(row["metadata"]), None, "math"
    answer, precision = text_of(row["answer"], "the answer"), row.get("precision")
    if row["question_type"] == "multi_choice":
        options, answer = letter_of_text(answer, option_texts(row["choices"]), ctx)
        kind = "choice"
    elif row["answer_type"] in ("list", "text"):
        kind = "open"
    images, more = [ctx.image(row.get("decoded_image") or row["image"])], dict(unit=row.get("unit"))
    more |= dict(precision=None if precision is None else int(precision))
    more |= dict(answer_type=row["answer_type"], language=meta.get("language"))
    more |= dict(category=meta.get("category"))
    return problem(ctx, row["pid"], kind, question, answer, options, images, meta["task"], **more)


def mathvision(row: Row, i: int, ctx: Context) -> dict:
    """One image a row, whatever the tags say; a free answer where `options` is empty."""
    options = option_texts(row["options"]) if row["options"] else []
    question, *options = place_single([text_of(row["question"], "question"), *options])
    answer = text_of(row["answer"], "the answer")
    if options and answer not in list(LETTERS[: len(options)]):
        options, answer = letter_of_text(answer, options, ctx)
    images, kind = (
        [ctx.image(row.get("decoded_image") or row["image"])],
        "choice" if options else "math",
    )
    subset, level = row.get("subject"), row.get("level")
    return problem(ctx, row["id"], kind, question, answer, options, images, subset, level=level)


def geometry3k(row: Row, i: int, ctx: Context) -> dict:
    """`problem` with an <image> for each of `images`, `answer` (hiyouga/geometry3k)."""
    images = [ctx.image(image) for image in row["images"]]
    question = text_of(row["problem"], "problem")
    if question.count("<image>") != len(images):
        question = "<image>" * len(images) + question.replace("<image>", "")
    answer = text_of(row["answer"], "the answer")
    return problem(ctx, i, "math", question, answer, images=images)


def omnimedvqa(row: Row, i: int, ctx: Context) -> dict:
    """Two to four options; the gold is a text; one entry has `modality` for `modality_type`."""
    options = [str(v).strip() for c in "ABCD" if (v := row.get(f"option_{c}")) not in (None, "")]
    if len(options) < 2:
        raise Drop("fewer than two options")
    options, letter = letter_of_text(row["gt_answer"], options, ctx)
    question = "<image>\n" + text_of(row["question"], "question")
    images = [ctx.image(text_of(row["image_path"], "image_path"))]
    id, subset = (
        text_of(row["question_id"], "question_id"),
        row.get("modality_type") or row["modality"],
    )
    more = dict(dataset=row["dataset"], question_type=row.get("question_type"))
    return problem(ctx, id, "choice", question, letter, options, images, subset, **more)


def nejm(row: Row, i: int, ctx: Context) -> dict:
    """The user's own files: the json list with option_A … option_E and `correct_answer`, its images
    as images/<image_id>.* or images/<date>.*; or a parquet with `image`, `options`, `answer`."""
    date = str(row["date"])
    if "options" in row:
        options, label, image = option_texts(row["options"]), row["answer"], row["image"]
    else:
        options = [text_of(row[f"option_{c}"], f"option_{c}") for c in "ABCDE"]
        label, image = row["correct_answer"], None
    if str(label).strip() in list(LETTERS[: len(options)]):
        letter = str(label).strip()
    else:
        options, letter = letter_of_text(label, options, ctx)
    images = [ctx.image(image or ctx.source.find_stem([str(row["image_id"]), date]))]
    question, year = (
        "<image>\n" + text_of(row["question"], "question"),
        re.search(r"(?:19|20)\d\d", date),
    )
    votes = {c: v for c in "ABCDE" if (v := row.get(f"option_{c}_votes")) is not None}
    subset, more = year[0] if year else None, dict(date=date, votes=votes or None)
    return problem(
        ctx, row["image_id"], "choice", question, letter, options, images, subset, **more
    )


# ---------------------------------------------------------------------- conversations
def openthoughts(row: Row, i: int, ctx: Context) -> dict:
    """OpenThoughts-114k: a user turn, and an assistant turn with <|begin_of_thought|> …

    The paper does not say how it mapped these. Here the user turn is the paper's training prompt
    around the published one, unchanged, without the release's system prompt; the assistant turn is
    "<think>\\n…\\n</think>\\n<answer>\\n…\\n</answer>" with the whole solution in the answer. The
    line breaks are for the tokenizer: after a full stop on the same line Qwen's joins ".</" into
    one token, and most closing tags would begin with another token than that of forced exit.
    """
    turns = [Row(t) for t in row["conversations"]]
    if [t["from"] for t in turns] not in (["user", "assistant"], ["human", "gpt"]):
        raise Drop("not one user and one assistant turn", str([t["from"] for t in turns]))
    trace = TRACE.fullmatch(turns[1]["value"])
    if trace is None:
        raise Drop("no complete thought and solution markers")
    question, thought = text_of(turns[0]["value"], "the question"), text_of(trace[1], "the thought")
    solution = text_of(trace[2], "the solution")
    if re.search(r"</?think>|</?answer>|<\|(?:begin|end)_of_", question + thought + solution):
        raise Drop("a tag of the format stands inside the text")
    return conversation(
        INSTRUCTIONS["train"] + question,
        f"<think>\n{thought}\n</think>\n<answer>\n{solution}\n</answer>",
    )


def openthoughts_direct(row: Row, i: int, ctx: Context) -> dict:
    """The same for the ablation without thoughts: the bare question, and the last \\boxed{} of the
    solution, else the whole solution. The paper gives no prompt for it."""
    question, reply = (m["content"] for m in openthoughts(row, i, ctx)["messages"])
    solution = reply.rpartition("<answer>\n")[2].removesuffix("\n</answer>")
    answer = last_boxed(solution) or solution
    question = question.removeprefix(INSTRUCTIONS["train"])
    return conversation(question, f"<answer>\n{answer}\n</answer>")


def conversation(user: str, assistant: str) -> dict:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": turns}


# ---------------------------------------------------------------------- registry
@dataclass(frozen=True)
class Spec:
    """One data set: its converter, which tables of its release are read, and their rows."""

    convert_row: Callable[[Row, int, Context], dict]
    tables: str  # regular expression on the file's name inside the release
    rows: int | None = None  # of the whole split, to tell it from a part
    release: str = ""  # key in HUB, where it is not the data set's own name


SPECS: dict[str, Spec] = {
    "chat": Spec(chat, r"\.(parquet|jsonl?|csv)$"),
    "openthoughts": Spec(openthoughts, r"(^|/)data/train\b", 113957),
    "openthoughts_direct": Spec(openthoughts_direct, r"(^|/)data/train\b", 113957, "openthoughts"),
    "orz57k": Spec(orz57k, r"orz_math_57k", 56878),
    "medqa_train": Spec(medqa, r"questions/US/train\.jsonl$", 10178, "medqa"),
    "gsm8k": Spec(gsm8k, r"main/test\b|(^|/)test\.jsonl$", 1319),
    "mmlu_pro": Spec(mmlu_pro, r"(^|/)test\b", 12032),
    "medqa": Spec(medqa, r"questions/US/test\.jsonl$", 1273),
    "medqa_4ops": Spec(medqa, r"phrases_no_exclude_test\.jsonl$", 1273),
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
