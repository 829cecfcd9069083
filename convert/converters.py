"""One short function per data set: a published row → a row of ours. `SPECS` at the end is the registry; a new data set is a
function and a line there.

Where the paper is silent: how OpenThoughts becomes <think>/<answer> (see `openthoughts`); which MMMU-Pro it used (we take
the ten-option standard one as `mmmu_pro`). A row that cannot be converted raises `Drop` with a reason.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.releases import Context, Drop, Row
from core.schema import LETTERS

HEALTH_SUBJECTS = {
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
}
# The paper's training prompt (appendix C), word for word; it is the whole user turn.
TRAINING_PROMPT = (
    "You will solve a problem/request. You should provide your thoughts within <think> </think> tags before providing"
    " the answer.\nWrite your final answer within <answer> </answer> tags. Here is the question: {question}"
)
# Text that Qwen2.5's tokenizer would turn into structure; a row that quotes it is dropped, as the loader refuses it.
CONTROL_TOKEN = re.compile(
    r"<\|(?:endoftext|im_start|im_end|(?:object_ref|box|quad|vision)_(?:start|end)"
    r"|(?:vision|image|video)_pad)\|>"
)
# Our own words: the paper did not use the vision form of MMMU-Pro, whose question and options are in the picture.
VISION_ONLY_QUESTION = "<image>\nThe question and its options are in the image."

IMAGE_TAG = re.compile(r"<image\s*_?(\d+)>")


def place_numbered(texts: list[str], available: Collection[int]) -> tuple[list[str], list[int]]:
    """Turn `<image 3>` into `<image>`; return the texts and the images' numbers in reading order.

    >>> place_numbered(["Which is like <image 2>?", "<image 1>", "<image 2>"], {1, 2, 3})
    (['Which is like <image>?', '<image>', '<image>'], [2, 1, 2])
    >>> place_numbered(["No tag."], {1})
    (['<image>\\nNo tag.'], [1])

    Images that no tag names stay out (MMMU's explanations may have their own), except where there is no tag at
    all: then all images come first.
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
    """One picture per row: it goes where the first tag stands (else in front); later tags become "(image N)".

    >>> place_single(["See <image1>.", "<image2>"])
    ['See <image>.', '(image 2)']
    """
    placed = False

    def replace(match: re.Match) -> str:
        nonlocal placed
        first, placed = not placed, True
        return "<image>" if first else f"(image {match[1]})"

    texts = [IMAGE_TAG.sub(replace, text) for text in texts]
    return texts if placed else ["<image>\n" + texts[0], *texts[1:]]


# -------------------- Parts that several data sets share ----------------------------------------------------


def text_of(value: Any, field: str) -> str:
    text = "" if value is None else str(value).strip()
    if not text:
        raise Drop(f"{field} is empty")
    return text


def parse_list(value: Any) -> list:
    """A list, or a list literal in a string (MMMU): literal_eval, so that no code in a data set ever runs."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise Drop("options are not a list literal", str(value)[:60]) from None
    if not isinstance(value, (list, tuple)):
        raise Drop("options are not a list", repr(value)[:60])
    return list(value)


def option_texts(value: Any) -> list[str]:
    """Options as texts in order of their letters.

    >>> option_texts({"B": "no", "A": "yes"}), option_texts("['1', '2']")
    (['yes', 'no'], ['1', '2'])
    >>> option_texts([{"letter": "A", "content": "x"}, {"key": "B", "value": "y"}])  # MedXpertQA, bigbio's MedQA
    ['x', 'y']
    """
    if not isinstance(value, dict):
        value = parse_list(value)
        if value and all(isinstance(v, dict) for v in value):
            value = {v.get("letter", v.get("key")): v.get("content", v.get("value")) for v in value}
    if isinstance(value, dict):
        value = {
            k: v for k, v in value.items() if v is not None
        }  # parquet gives absent letters as null
        if sorted(map(str, value)) != list(LETTERS[: len(value)]):
            raise Drop("option letters are not A, B, C, …", ", ".join(map(str, value)))
        value = [value[k] for k in sorted(value)]
    if not value:
        raise Drop("no options")
    return [text_of(v, "an option") for v in value]


def letter_of(label: Any, options: list[str]) -> str:
    """The answer's letter, within the options."""
    if isinstance(label, list) and len(label) == 1:
        label = label[0]
    label = text_of(label, "the answer")
    if label not in list(LETTERS[: len(options)]):
        raise Drop("the answer is not a letter of the options", f"{label[:40]!r} of {len(options)}")
    return label


def letter_of_text(gold: Any, options: list[str], ctx: Context) -> tuple[list[str], str]:
    """The letter of a gold that is published as text: exact match, then without case, outer space and full stop.

    Options with the gold's own text twice are merged: with both kept, one right answer would be marked wrong.
    """
    gold = text_of(gold, "the answer")
    for normal in (lambda s: s.strip(), lambda s: s.strip().rstrip(".").strip().casefold()):
        hits = [i for i, option in enumerate(options) if normal(option) == normal(gold)]
        if len({options[i] for i in hits}) > 1:
            raise Drop("the answer's text equals several options", gold[:60])
        if hits:
            if len(hits) > 1:
                ctx.note("two options with the gold's own text were merged")
                options = [o for i, o in enumerate(options) if i not in hits[1:]]
            return options, LETTERS[hits[0]]
    raise Drop("the answer's text equals no option", gold[:60])


def problem(
    id: str,
    task: str,
    kind: str,
    question: str,
    answer: Any,
    *,
    options: list[str] | None = None,
    images: list[str] | None = None,
    subset: Any = None,
    **meta: Any,
) -> dict:
    """One row of the problem schema; empty parts left out."""
    if images:
        meta["cluster"] = Path(images[0]).stem
    row = {
        "id": f"{task}/{id}",
        "task": task,
        "subset": None if subset is None else str(subset),
        "kind": kind,
        "question": question,
        "options": options,
        "answer": answer,
        "images": images or None,
        "meta": {k: v for k, v in meta.items() if v is not None and v != ""} or None,
    }
    return {k: v for k, v in row.items() if v is not None}


def check_row(row: dict) -> None:
    """What a converter must never write. The loader in data.py checks the same and more, from the file."""
    if "messages" in row:
        texts = [m["content"] for m in row["messages"]]
    else:
        texts = [row["question"], *row.get("options", [])]
        if row["kind"] == "choice":
            assert row["answer"] in list(LETTERS[: len(row["options"])]), row["id"]
    for text in [*texts, str(row.get("answer", ""))]:
        if found := CONTROL_TOKEN.search(text):
            raise Drop("a control token of the model stands in the text", found[0])
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise Drop("half of a surrogate pair, not a character")
    tags = sum(text.count("<image>") for text in texts)
    if tags != len(row.get("images", [])):
        raise Drop(
            "literal <image> in the text", f"{tags} tags, {len(row.get('images', []))} images"
        )


# -------------------- Text: (published row, its number in the release, context) -> our row --------------------


def gsm8k(row: Row, i: int, ctx: Context) -> dict:
    """`question`, `answer` = worked solution, then "#### 1,234"."""
    solution, mark, gold = row["answer"].rpartition("####")
    if not mark:
        raise Drop("no #### in the answer")
    return problem(
        str(i),
        "gsm8k",
        "math",
        text_of(row["question"], "question"),
        text_of(gold, "the answer").replace(",", "").replace("$", ""),
    )


def math500(row: Row, i: int, ctx: Context) -> dict:
    return problem(
        str(row["unique_id"]),
        "math500",
        "math",
        text_of(row["problem"], "problem"),
        text_of(row["answer"], "the answer"),
        subset=row["subject"],
        level=row["level"],
    )


def orz57k(row: Row, i: int, ctx: Context) -> dict:
    """Two turns: {"from": "human", "value"}, {"from": "assistant", "ground_truth": {"value", "pass_at_n"?}}."""
    human, assistant = map(Row, row["turns"])
    gold = Row(assistant["ground_truth"])
    return problem(
        str(i),
        "orz57k",
        "math",
        text_of(human["value"], "the problem"),
        text_of(gold["value"], "the answer"),
        pass_at_n=gold.get("pass_at_n"),
    )


def mmlu_pro(row: Row, i: int, ctx: Context) -> dict:
    """Three to ten options; some versions pad with "N/A". The letter is the gold, as in the official scorer."""
    options = option_texts(row["options"])
    letter = letter_of(row["answer"], options)
    while len(options) > LETTERS.index(letter) + 1 and options[-1] == "N/A":
        options.pop()
        ctx.note("N/A padding removed from the options")
    if LETTERS.index(letter) != row.get("answer_index", LETTERS.index(letter)):
        ctx.note("answer_index disagrees with the answer's letter (the letter is kept)")
    return problem(
        str(row["question_id"]),
        "mmlu_pro",
        "choice",
        text_of(row["question"], "question"),
        letter,
        options=options,
        subset=row["category"],
        src=row.get("src"),
        health=True if row["category"] == "health" else None,
    )


def medqa_with(count: int, task: str) -> Callable[[Row, int, Context], dict]:
    """MedQA is published with five options and with four, under the same fields: the count is checked."""

    def medqa(row: Row, i: int, ctx: Context) -> dict:
        options = option_texts(row["options"])
        if len(options) != count:
            raise ValueError(
                f"{len(options)} options where {task} has {count}: medqa is the five-option "
                "release, medqa_4ops the four-option one"
            )
        letter = letter_of(row["answer_idx"], options)
        if options[LETTERS.index(letter)] != text_of(row["answer"], "the answer"):
            ctx.note("the answer's text is not the text of its letter (the letter is kept)")
        return problem(
            str(i),
            task,
            "choice",
            text_of(row["question"], "question"),
            letter,
            options=options,
            subset=row.get("meta_info"),
        )

    return medqa


def medxpertqa(row: Row, i: int, ctx: Context) -> dict:
    """The question already ends with "Answer Choices: (A) …": cut, or the options would be in the prompt twice."""
    question, mark, _ = row["question"].rpartition("Answer Choices:")
    if not mark:
        question = row["question"]
        ctx.note("no Answer Choices: in the question")
    options = option_texts(row["options"])
    images = [ctx.image(v) for v in row.get("images") or []]
    return problem(
        str(row["id"]),
        "medxpertqa_mm" if images else "medxpertqa_text",
        "choice",
        "<image>\n" * len(images) + text_of(question, "question"),
        letter_of(row["label"], options),
        options=options,
        images=images,
        subset=row.get("medical_task"),
        body_system=row.get("body_system"),
        question_type=row.get("question_type"),
    )


def medxpertqa_mm(row: Row, i: int, ctx: Context) -> dict:
    if not row["images"]:
        raise Drop("no images in an MM row")
    return medxpertqa(row, i, ctx)


# -------------------- Images --------------------------------------------------------------------------------


def numbered(task: str) -> Callable[[Row, int, Context], dict]:
    """MMMU and the standard forms of MMMU-Pro: `<image 1>` … in question and options, options a list literal.

    Open questions (53 in MMMU val) have one gold, or a list literal of golds each of which is right.
    """

    def convert_row(row: Row, i: int, ctx: Context) -> dict:
        name = str(row.get("id", i))
        from_id = re.fullmatch(r"(?:validation|dev|test)_(.+)_\d+", name)
        subset = row.get("subject") or (from_id[1] if from_id else None)
        is_open = row.get("question_type", "multiple-choice") != "multiple-choice"
        options = [] if is_open else option_texts(row["options"])
        available = {n: row[f"image_{n}"] for n in range(1, 8) if row.get(f"image_{n}")}
        texts, order = place_numbered([text_of(row["question"], "question"), *options], available)
        if set(order) != set(available):
            ctx.note("a row has images that its question never names (left out)")
        answer = text_of(row["answer"], "the answer")
        if not is_open:
            answer = letter_of(answer, options)
        elif answer.startswith("["):
            answer = [text_of(a, "an answer") for a in parse_list(answer)]
        return problem(
            name,
            task,
            "open" if is_open else "choice",
            texts[0],
            answer,
            options=texts[1:] or None,
            images=[ctx.image(available[n]) for n in order],
            subset=subset,
            difficulty=row.get("topic_difficulty"),
            health=True if subset in HEALTH_SUBJECTS else None,
        )

    return convert_row


def mmmu_pro_vision(row: Row, i: int, ctx: Context) -> dict:
    """Question and options are in the picture: options here are the bare letters, their texts are in meta."""
    options = option_texts(row["options"])
    return problem(
        str(row.get("id", i)),
        "mmmu_pro_vision",
        "choice",
        VISION_ONLY_QUESTION,
        letter_of(row["answer"], options),
        options=list(LETTERS[: len(options)]),
        images=[ctx.image(row["image"])],
        subset=row.get("subject"),
        option_texts=options,
        health=True if row.get("subject") in HEALTH_SUBJECTS else None,
    )


def split_options(text: str) -> tuple[str, list[str]] | None:
    """Options that stand in the question's text, cut out of it; None unless they read A, B, C, … in order.

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
        letters, options = (
            "".join(parts[0::2]),
            [p.strip().rstrip(",").strip() for p in parts[1::2]],
        )
        if len(options) > 1 and letters == LETTERS[: len(options)] and all(options) and question:
            return question, options
    return None


def mmstar(row: Row, i: int, ctx: Context) -> dict:
    """Options are in the question's text: split off where that can be read, else left there, with bare letters."""
    question = text_of(row["question"], "question")
    split = split_options(question)
    if split is None:
        ctx.note("options left in the question's text")
        split = question, list("ABCD")
    question, *options = place_single([split[0], *split[1]])
    return problem(
        str(row["index"]),
        "mmstar",
        "choice",
        question,
        letter_of(row["answer"], options),
        options=options,
        images=[ctx.image(row["image"])],
        subset=row["category"],
        l2_category=row.get("l2_category"),
    )


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
    forms = {
        "integer": "an integer",
        "float": "a decimal number",
        "list": "a list, as in [1, 2, 3]",
    }
    return f"{unit}\nAnswer with {forms[kind]}."


def mathvista(row: Row, i: int, ctx: Context) -> dict:
    """A choice's gold is its TEXT; `precision` is a float in the parquet; lists are compared as text."""
    (question,) = place_single([text_of(row["question"], "question")])
    meta = Row(row["metadata"])
    options, kind, answer = None, "math", text_of(row["answer"], "the answer")
    if row["question_type"] == "multi_choice":
        options, answer = letter_of_text(answer, option_texts(row["choices"]), ctx)
        kind = "choice"
    elif row["answer_type"] in ("list", "text"):
        kind = "open"
    precision = row.get("precision")
    return problem(
        str(row["pid"]),
        "mathvista",
        kind,
        question + mathvista_form(row),
        answer,
        options=options,
        images=[ctx.image(row.get("decoded_image") or row["image"])],
        subset=meta["task"],
        precision=None if precision is None else int(precision),
        unit=row.get("unit"),
        answer_type=row["answer_type"],
        language=meta.get("language"),
        category=meta.get("category"),
    )


def mathvision(row: Row, i: int, ctx: Context) -> dict:
    """One image a row, whatever the tags say; a free answer where `options` is empty; some are bare letters."""
    options = option_texts(row["options"]) if row["options"] else []
    question, *placed = place_single([text_of(row["question"], "question"), *options])
    answer = text_of(row["answer"], "the answer")
    if options and answer not in list(LETTERS[: len(options)]):
        placed, answer = letter_of_text(answer, placed, ctx)
    return problem(
        str(row["id"]),
        "mathvision",
        "choice" if options else "math",
        question,
        answer,
        options=placed or None,
        images=[ctx.image(row.get("decoded_image") or row["image"])],
        subset=row.get("subject"),
        level=row.get("level"),
    )


def omnimedvqa(row: Row, i: int, ctx: Context) -> dict:
    """Two to four options; the gold is a text; one entry of the release has `modality` for `modality_type`."""
    options = [
        str(row[f"option_{c}"]).strip() for c in "ABCD" if row.get(f"option_{c}") not in (None, "")
    ]
    if len(options) < 2:
        raise Drop("fewer than two options")
    options, letter = letter_of_text(row["gt_answer"], options, ctx)
    return problem(
        text_of(row["question_id"], "question_id"),
        "omnimedvqa",
        "choice",
        "<image>\n" + text_of(row["question"], "question"),
        letter,
        options=options,
        images=[ctx.image(text_of(row["image_path"], "image_path"))],
        subset=row.get("modality_type") or row["modality"],
        dataset=row["dataset"],
        question_type=row.get("question_type"),
    )


def nejm(row: Row, i: int, ctx: Context) -> dict:
    """The user's own files: the json list with option_A … option_E and `correct_answer`, its images beside it as
    images/<image_id>.* or images/<date>.*; or a parquet with `image`, `options`, `answer`. Subset: the year."""
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
    if image is None:
        image = ctx.source.find_stem([str(row["image_id"]), date])
    year = re.search(r"(?:19|20)\d\d", date)
    votes = {
        c: row[f"option_{c}_votes"] for c in "ABCDE" if row.get(f"option_{c}_votes") is not None
    }
    return problem(
        str(row["image_id"]),
        "nejm",
        "choice",
        "<image>\n" + text_of(row["question"], "question"),
        letter,
        options=options,
        images=[ctx.image(image)],
        subset=year[0] if year else None,
        date=date,
        votes=votes or None,
    )


def vqa(task: str) -> Callable[[Row, int, Context], dict]:
    """SLAKE, PathVQA, VQA-RAD: a yes/no question becomes a choice of two (subset "closed"), others stay open."""

    def convert_row(row: Row, i: int, ctx: Context) -> dict:
        if row.get("q_lang", "en") != "en":
            raise Drop("not English")
        answer = text_of(row["answer"], "the answer")
        closed = answer.lower() in ("yes", "no")
        image = row.get("image") or row["img_name"]
        letter = "AB"[answer.lower() == "no"] if closed else None
        return problem(
            str(row.get("qid", i)),
            task,
            "choice" if closed else "open",
            "<image>\n" + text_of(row["question"], "question"),
            letter or answer,
            options=["yes", "no"] if closed else None,
            images=[ctx.image(image)],
            subset="closed" if closed else "open",
            answer_type=row.get("answer_type"),
            modality=row.get("modality"),
        )

    return convert_row


# -------------------- Conversations -------------------------------------------------------------------------

TRACE = re.compile(
    r"\s*<\|begin_of_thought\|>(.*)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*)"
    r"<\|end_of_solution\|>\s*",
    re.S,
)


def openthoughts(row: Row, i: int, ctx: Context) -> dict:
    """OpenThoughts-114k to one user and one assistant turn; the system prompt of the release is dropped.

    default:  `conversations`, a user turn and an assistant turn with <|begin_of_thought|> …
    metadata: `problem`, `deepseek_reasoning`, `deepseek_solution`, `starter_code`

    The paper does not say how it mapped these. Here: the user turn is the paper's training prompt around the
    published user turn, unchanged; the assistant turn is "<think>\\n…\\n</think>\\n<answer>\\n…\\n</answer>" with
    the whole solution in the answer. The line breaks are there for the tokenizer: after a full stop on the same
    line Qwen's would join ".</" into one token, and the closing tag of most traces would begin with another token
    than the one that forced exit writes.
    """
    if "conversations" in row:
        turns = [Row(t) for t in row["conversations"]]
        if [t["from"] for t in turns] not in (["user", "assistant"], ["human", "gpt"]):
            raise Drop("not one user and one assistant turn", str([t["from"] for t in turns]))
        question, trace = turns[0]["value"], TRACE.fullmatch(turns[1]["value"])
        if trace is None:
            raise Drop("no complete thought and solution markers")
        thought, solution = trace.groups()
    else:
        question, thought, solution = (
            row["problem"],
            row["deepseek_reasoning"],
            row["deepseek_solution"],
        )
        if row.get("starter_code"):
            question = f"{question}\n\n{row['starter_code']}"
    question, thought = text_of(question, "the question"), text_of(thought, "the thought")
    solution = text_of(solution, "the solution")
    if re.search(r"</?think>|</?answer>|<\|(?:begin|end)_of_", question + thought + solution):
        raise Drop("a tag of the format stands inside the text")
    return {
        "messages": [
            {"role": "user", "content": TRAINING_PROMPT.replace("{question}", question)},
            {
                "role": "assistant",
                "content": f"<think>\n{thought}\n</think>\n<answer>\n{solution}\n</answer>",
            },
        ]
    }


def openthoughts_direct(row: Row, i: int, ctx: Context) -> dict:
    """The same rows for the ablation without thoughts: the bare question and the answer alone. The answer is the last
    \\boxed{} of the solution where it has one, else the whole solution. The paper gives no prompt for it."""
    from rewards import last_boxed

    question, reply = (m["content"] for m in openthoughts(row, i, ctx)["messages"])
    solution = reply.rpartition("<answer>\n")[2].removesuffix("\n</answer>")
    head, _, _ = TRAINING_PROMPT.partition("{question}")
    return {
        "messages": [
            {"role": "user", "content": question.removeprefix(head)},
            {
                "role": "assistant",
                "content": f"<answer>\n{last_boxed(solution) or solution}\n</answer>",
            },
        ]
    }


# -------------------- The registry --------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """One data set: its converter, which tables of a whole release are read, where the release is on the hub."""

    convert_row: Callable[[Row, int, Context], dict]
    tables: str  # regular expression on the file's name inside the release
    rows: int | None  # rows of that split, to tell a whole file from a part
    hub: str | None = None
    files: tuple[str, ...] = ()  # globs of the snapshot
    revision: str | None = None  # commit; None: the newest, whose commit download.json then holds


TEST = r"(^|/)test\b"
SPECS: dict[str, Spec] = {
    "gsm8k": Spec(gsm8k, r"main/test\b|(^|/)test\.jsonl$", 1319, "openai/gsm8k", ("main/test-*",)),
    "math500": Spec(math500, TEST, 500, "HuggingFaceH4/MATH-500", ("test.jsonl",)),
    "orz57k": Spec(orz57k, r"orz_math_57k", 56878, "Tonic/OpenReasonerZero", ("*.json",)),
    "mmlu_pro": Spec(
        mmlu_pro,
        TEST,
        12032,
        "TIGER-Lab/MMLU-Pro",
        ("data/test-*",),
        "3373e0b32277875b8db2aa555a333b78a08477ea",
    ),
    "medqa": Spec(
        medqa_with(5, "medqa"),
        r"questions/US/test\.jsonl$",
        1273,
        "bigbio/med_qa",
        ("data_clean.zip",),
    ),
    "medqa_4ops": Spec(
        medqa_with(4, "medqa_4ops"),
        r"phrases_no_exclude_test\.jsonl$",
        1273,
        "GBaker/MedQA-USMLE-4-options",
        ("phrases_no_exclude_test.jsonl",),
    ),
    "medqa_train": Spec(
        medqa_with(5, "medqa_train"),
        r"questions/US/train\.jsonl$",
        10178,
        "bigbio/med_qa",
        ("data_clean.zip",),
    ),
    "medqa_4ops_train": Spec(
        medqa_with(4, "medqa_4ops_train"),
        r"phrases_no_exclude_train\.jsonl$",
        10178,
        "GBaker/MedQA-USMLE-4-options",
        ("phrases_no_exclude_train.jsonl",),
    ),
    "medxpertqa_text": Spec(
        medxpertqa,
        r"(?i)text/test\b",
        2450,
        "TsinghuaC3I/MedXpertQA",
        ("Text/test*",),
        "7e7c465a68eb2b866926bfa59c8c9d17a8daba65",
    ),
    "medxpertqa_mm": Spec(
        medxpertqa_mm,
        r"(?i)mm/test\b",
        2000,
        "TsinghuaC3I/MedXpertQA",
        ("MM/test*", "images.zip"),
        "7e7c465a68eb2b866926bfa59c8c9d17a8daba65",
    ),
    "mmmu": Spec(
        numbered("mmmu"),
        r"(^|/)validation\b",
        900,
        "MMMU/MMMU",
        ("*/validation-*",),
        "171b0ef74cd1704464e6940860968009d8cdd59a",
    ),
    "mmmu_pro": Spec(
        numbered("mmmu_pro"),
        r"standard \(10 options\)/test\b",
        1730,
        "MMMU/MMMU_Pro",
        ("standard (10 options)/test-*",),
    ),
    "mmmu_pro_4ops": Spec(
        numbered("mmmu_pro_4ops"),
        r"standard \(4 options\)/test\b",
        1730,
        "MMMU/MMMU_Pro",
        ("standard (4 options)/test-*",),
    ),
    "mmmu_pro_vision": Spec(
        mmmu_pro_vision, r"vision/test\b", 1730, "MMMU/MMMU_Pro", ("vision/test-*",)
    ),
    "mmstar": Spec(
        mmstar,
        r"(^|/)(mmstar\.parquet$|val\b)",
        1500,
        "Lin-Chen/MMStar",
        ("mmstar.parquet",),
        "bc98d668301da7b14f648724866e57302778ab27",
    ),
    "mathvista": Spec(
        mathvista, r"(^|/)testmini\b", 1000, "AI4Math/MathVista", ("data/testmini-*",)
    ),
    "mathvision": Spec(
        mathvision,
        TEST,
        3040,
        "MathLLMs/MathVision",
        ("data/test-*",),
        "0c681f39d3dacd336abf62ceb833e40320c8599f",
    ),
    "omnimedvqa": Spec(
        omnimedvqa,
        r"Open-access/[^/]*\.json$",
        88996,
        "foreverbeliever/OmniMedVQA",
        ("OmniMedVQA.zip",),
        "1ba51c28fc0773bdf7efb8396e5bcfd4227e22da",
    ),
    "nejm": Spec(nejm, r"\.(json|parquet)$", 947),
    "slake": Spec(vqa("slake"), TEST, 2094, "BoKelvin/SLAKE", ("test.json", "imgs.zip")),
    "pathvqa": Spec(vqa("pathvqa"), TEST, 6719, "flaviagiammarino/path-vqa", ("data/test-*",)),
    "vqarad": Spec(vqa("vqarad"), TEST, 451, "flaviagiammarino/vqa-rad", ("data/test-*",)),
    "openthoughts": Spec(
        openthoughts,
        r"(^|/)data/train\b",
        113957,
        "open-thoughts/OpenThoughts-114k",
        ("data/train-*",),
    ),
    "openthoughts_direct": Spec(
        openthoughts_direct,
        r"(^|/)data/train\b",
        113957,
        "open-thoughts/OpenThoughts-114k",
        ("data/train-*",),
    ),
    "openthoughts_metadata": Spec(
        openthoughts,
        r"(^|/)metadata/train\b",
        113957,
        "open-thoughts/OpenThoughts-114k",
        ("metadata/train-*",),
    ),
}
