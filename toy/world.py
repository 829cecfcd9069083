"""The miniature's world: chains of sums, as text and as images, all from one seed.

The problems are chains of assignments, `a=9;k=a-3;  n=k-2;n?`, all values from 0 to 9. The base
model can read them, find things in them and answer at once, which goes wrong from three statements
on; step by step they are easy. Each exists as text and as an image of the same line, one glyph in
each cell of 28 × 28 pixels, so one merged vision token each. The "ward" asks the same in another
format, `P=9mg;Q=P-3; Q?`, with lettered options: post-training never shows it.

What plays which part: the base model (text and images, no thoughts) is Qwen2.5-VL-Instruct;
sft.jsonl (text only, correct thoughts of a teacher that can't let go) is OpenThoughts; rl.jsonl
(text only, answers) is Orz-Math.

By design, so judge the result by it: (1) the base's vision tokens are aligned with the embeddings
of the characters that they show (toy/base.py; `demo.sh --no_align` shows what happens without);
(2) an image is one line, and all of M-RoPE's frequencies follow its width: its positions run along
it exactly as a text's do; (3) spaces stand between statements at random: without them a student
counts positions, which fails in any other format and at any other length; (4) the teacher doubts,
the more the longer the chain (`DOUBT`): it checks its last step again and again, always correctly.
At five statements "wait" is the likelier next word each time, so a greedy student of it never ends
there within the limit of 88 tokens; the paper found such outputs of its own (section 2.3), and
reinforcement can cure that.
Not by design: the ward's wrong options are values of the chain itself where it has enough, so that
"an option from which the last statement leads to another option" is right for two questions in
three (66 to 69% over three seeds). Read the ward's accuracies beside that, not beside 25%.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Collection, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from core.options import option
from core.schema import LETTERS
from data import prompt_text

CELL = 28  # pixels of a glyph's cell: patch 14 × merge 2
SIZES = (2, 3, 4, 5)  # statements of a problem in training and in the ordinary tests
HARD_SIZE = 6
DOUBT = {2: 0.1, 3: 0.2, 4: 0.4, 5: 0.75}  # chance of another "wait" after each check
MOST_CHECKS = 8
WAIT = ";wait,"
OPTIONS = 4
TEST_SHARE = 8  # one question in eight belongs to the tests
TASKS = ("text", "image", "ward_text", "ward_image", "hard_text", "hard_image")


# --------------------------------------------------------------------------------------- problems
class Format(NamedTuple):
    """How a chain is written: the names to draw from, and the unit of a given number."""

    names: str
    unit: str


PLAIN = Format("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNO", "")
WARD = Format("PQRSTUVWXYZ", "mg")


@dataclass(frozen=True)
class Chain:
    """Assignments in the order in which they can be worked out. right[i] is what stands right of
    names[i]: a digit, name±digit, or name+name. gaps[i]: how many spaces follow statement i."""

    names: tuple[str, ...]
    right: tuple[str, ...]
    values: tuple[int, ...]
    gaps: tuple[int, ...]
    format: Format = PLAIN

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def text(self) -> str:
        """The question as one line: "a=9;k=a-3;  k?", or in the ward's format "P=9mg;Q=P-3; Q?"."""
        line = ""
        for name, right, gap in zip(self.names, self.right, self.gaps):
            line += f"{name}={right}{self.format.unit * right.isdigit()};{' ' * gap}"
        return f"{line}{self.names[-1]}?"


def draw_chain(rng: np.random.Generator, size: int, format: Format = PLAIN) -> Chain:
    """A random chain of `size` assignments. Each uses the one before it; one in five of those that
    could adds two names instead."""
    names = tuple(rng.choice(list(format.names), size, replace=False).tolist())
    values = [int(rng.integers(0, 10))]
    right = [str(values[0])]
    for i in range(1, size):
        before = values[i - 1]
        other = int(rng.integers(0, i - 1)) if i >= 2 else None
        if other is not None and before + values[other] <= 9 and rng.random() < 0.2:
            right.append(f"{names[i - 1]}+{names[other]}")
            values.append(before + values[other])
            continue
        value = int(rng.integers(0, 10))
        right.append(f"{names[i - 1]}{'+' if value >= before else '-'}{abs(value - before)}")
        values.append(value)
    gaps = rng.choice(3, size, p=(0.6, 0.25, 0.15))
    return Chain(names, tuple(right), tuple(values), tuple(gaps.tolist()), format)


def is_test(question: str) -> bool:
    """Which side of the split a question is on: a property of its text (another spacing is no other
    question), so that no set can leak into another."""
    return sha256(question.replace(" ", "").encode()).digest()[0] % TEST_SHARE == 0


def draw_from_split(
    rng: np.random.Generator, test: bool, sizes: tuple[int, ...] = SIZES, format: Format = PLAIN
) -> Chain:
    """A random chain of the wanted side of the split."""
    while True:
        chain = draw_chain(rng, int(rng.choice(sizes)), format)
        if is_test(chain.text) == test:
            return chain


def draw_options(rng: np.random.Generator, chain: Chain) -> tuple[list[str], str]:
    """Four different values, the right one and preferably the chain's own; and its letter."""
    wrong = [v for v in dict.fromkeys(chain.values) if v != chain.answer]
    wrong += [v for v in rng.permutation(10).tolist() if v != chain.answer and v not in wrong]
    values = [chain.answer, *wrong[: OPTIONS - 1]]
    shown = rng.permutation(OPTIONS).tolist()
    return [str(values[i]) for i in shown], LETTERS[shown.index(0)]


def as_problem(
    chain: Chain, name: str, task: str, rng: np.random.Generator, choice: bool, image: str | None
) -> dict:
    """A row of the problem schema."""
    row = {
        "id": name,
        "task": task,
        "subset": f"{chain.size} statements",
        "kind": "choice" if choice else "math",
        "question": "<image>" if image else chain.text,
    }
    if choice:
        row["options"], row["answer"] = draw_options(rng, chain)
    else:
        row["answer"] = str(chain.answer)
    if image:
        row["images"] = [image]
    return {**row, "meta": {"size": chain.size, "line": chain.text}}


# --------------------------------------------------------------------------- thoughts and exercises
def work_out(chain: Chain, i: int) -> str:
    """Step i of a thought: "k=a-3=9-3=6"; a given number has nothing to work out: "a=9"."""
    right, steps = chain.right[i], [chain.right[i]]
    if not right.isdigit():
        values = dict(zip(chain.names, chain.values))
        steps += ["".join(str(values.get(c, c)) for c in right), str(chain.values[i])]
    return "=".join([chain.names[i], *steps])


def think(chain: Chain, rng: np.random.Generator) -> str:
    """The teacher's thought: every step, then its doubts. "a=9;k=a-3=9-3=6;wait,k=a-3=9-3=6"."""
    last = work_out(chain, chain.size - 1)
    thought = ";".join(work_out(chain, i) for i in range(chain.size))
    for _ in range(MOST_CHECKS):
        if rng.random() >= DOUBT[chain.size]:
            break
        thought += WAIT + last
    return thought


def final_answer(problem: dict) -> str:
    """ "<answer>6</answer>". A choice is answered with the option's text, which the grader takes
    for its letter: finding the letter before a text is harder for so small a model."""
    answer = problem["answer"]
    if problem["kind"] == "choice":
        answer = problem["options"][LETTERS.index(answer)]
    return f"<answer>{answer}</answer>"


def conversation(user: str, assistant: str) -> dict:
    turns = (("user", user), ("assistant", assistant))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def reasoning_row(
    chain: Chain, rng: np.random.Generator, thoughts: bool = True, image: str | None = None
) -> dict:
    """A row of the teacher: question (one in five with options), thought and answer. The published
    instructions take turns, so that the student follows any of them."""
    problem = as_problem(chain, "-", "text", rng, choice=rng.random() < 0.2, image=image)
    prompt = prompt_text(problem, style="train" if rng.random() < 0.5 else "kind")
    thought = f"<think>{think(chain, rng)}</think>\n"  # also advances rng for the next row
    row = conversation(prompt, thought * thoughts + final_answer(problem))
    return {**row, "images": [image]} if image else row


def read_exercise(chain: Chain, rng: np.random.Generator) -> tuple[str, str]:
    """(what to do, reply) of an exercise without any reasoning on a line shown as text or image.
    Read: the line again. Find k: what stands right of it. Next k: the next statement's name."""
    which, i = rng.random(), int(rng.integers(chain.size))
    if which < 0.4:
        return "Read: ", chain.text
    if which < 0.7 or i + 1 == chain.size:
        return f"Find {chain.names[i]}: ", chain.right[i]
    return f"Next {chain.names[i]}: ", chain.names[i + 1]


def sum_exercise(rng: np.random.Generator) -> tuple[str, str]:
    """(line, reply) of a single sum: "9-3", "9-3=6"."""
    value, other = (int(v) for v in rng.integers(0, 10, 2))
    line = f"{other}{'+' if value >= other else '-'}{abs(value - other)}"
    return line, f"{line}={value}"


def exercise_row(rng: np.random.Generator) -> dict:
    """An exercise of the base's as a plain text row: mixed into SFT, so that it forgets less."""
    if rng.random() < 0.3:
        line, reply = sum_exercise(rng)
        return conversation(f"Work out: {line}", reply)
    chain = draw_from_split(rng, test=False)
    ask, reply = read_exercise(chain, rng)
    return conversation(ask + chain.text, reply)


# ----------------------------------------------------------------------------------------- images
def draw_glyph(character: str) -> np.ndarray:
    """(28, 28) in 0…1: a character of PIL's bitmap font, enlarged to fill most of its cell."""
    font = ImageFont.load_default_imagefont()
    small = Image.new("L", (6, 11))
    ImageDraw.Draw(small).text((0, 0), character, fill=255, font=font)
    big = small.resize((24, 26), Image.Resampling.NEAREST)
    cell = Image.new("L", (CELL, CELL))
    cell.paste(big, (2, 1))
    return np.asarray(cell, np.float32) / 255


GLYPHS: dict[str, np.ndarray] = {}


def draw_line(text: str, rng: np.random.Generator) -> Image.Image:
    """`text` as an image, 28 × 28 a character; colours, position in the cell and noise vary."""
    for c in set(text) - set(GLYPHS):
        GLYPHS[c] = draw_glyph(c)
    line = np.concatenate([GLYPHS[c] for c in text], axis=1)
    line = np.roll(line, rng.integers(-1, 2, 2), axis=(0, 1))
    ground = rng.uniform(0.35, 0.55, 3)  # the paper; the ink is darker or lighter by at least 0.35
    ink = np.clip(ground + rng.choice([-1, 1]) * rng.uniform(0.35, 0.5, 3), 0, 1)
    picture = ground + line[..., None] * (ink - ground) + rng.normal(0, 0.08, (*line.shape, 1))
    return Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))


# ------------------------------------------------------------------------------------- data files
@dataclass
class DataConfig:
    out: str = option(MISSING, "directory for the files")
    seed: int = option(0, "everything is a function of it", ge=0)
    conversations: int = option(
        24_000, "rows of sft.jsonl, sft_direct.jsonl and sft_images.jsonl", ge=1
    )
    problems: int = option(6_000, "rows of rl.jsonl", ge=1)
    test: int = option(200, "problems of each test set", ge=1)
    replay: float = option(
        0.25, "share of text exercises of the base's kind in the SFT files", ge=0, le=1
    )
    images: bool = option(False, "also sft_images.jsonl: every second question as an image")


def take_folder(out: Path, own: Collection[str]) -> None:
    """Make the folder `out`. Raises ValueError where that fails, and, with nothing changed, where
    it holds anything whose name matches no pattern of `own`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"--out {out}: cannot be written ({e.strerror})") from None
    other = [p.name for p in out.iterdir() if not any(p.match(pattern) for pattern in own)]
    if other:
        raise ValueError(f"--out {out}: holds other files ({min(other)}, …); name a new directory")


def write_jsonl(path: Path, rows) -> None:
    """Write all rows or no file: one that is there is complete."""
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.rename(path)


def conversations(config: DataConfig, thoughts: bool = True, images: bool = False) -> list[dict]:
    """The SFT rows, the same chains in each of their forms. images: every second question is
    written to img/."""
    rng = np.random.default_rng([config.seed, 1])
    picture_rng = np.random.default_rng([config.seed, 6])
    rows = []
    for i in range(config.conversations):
        if rng.random() < config.replay:
            rows.append(exercise_row(rng))
            continue
        chain = draw_from_split(rng, test=False)
        image = f"img/sft-{i}.png" if images and i % 2 else None
        rows.append(reasoning_row(chain, rng, thoughts, image))
        if image:
            draw_line(chain.text, picture_rng).save(Path(config.out) / image)
    return rows


def test_set(out: Path, task: str, config: DataConfig) -> list[dict]:
    """The test set `task` of TASKS; images are written on the way. The text and the image form of a
    set hold the same chains."""
    domain, image = task.rpartition("_")[0], task.endswith("image")
    rng = np.random.default_rng([config.seed, 2, ("", "ward", "hard").index(domain)])
    picture_rng = np.random.default_rng([config.seed, 3])
    sizes = (HARD_SIZE,) if domain == "hard" else SIZES
    rows, seen = [], set()
    while len(rows) < config.test:
        chain = draw_from_split(rng, True, sizes, WARD if domain == "ward" else PLAIN)
        question = chain.text.replace(" ", "")
        if question in seen:
            continue
        seen.add(question)
        name = f"{task}-{len(rows)}"
        file = f"img/{name}.png" if image else None
        rows.append(as_problem(chain, name, task, rng, domain == "ward", file))
        if image:
            draw_line(chain.text, picture_rng).save(out / file)
    return rows


def write_data(config: DataConfig) -> None:
    """sft.jsonl, sft_direct.jsonl (the same without thoughts), rl.jsonl, test_TASK.jsonl with img/;
    with --images also sft_images.jsonl."""
    out = Path(config.out)
    take_folder(out, own=("sft*.jsonl", "rl.jsonl", "test_*.jsonl", "*.tmp", "img"))
    (out / "img").mkdir(exist_ok=True)
    write_jsonl(out / "sft.jsonl", conversations(config))
    write_jsonl(out / "sft_direct.jsonl", conversations(config, thoughts=False))
    if config.images:
        write_jsonl(out / "sft_images.jsonl", conversations(config, images=True))
    rng = np.random.default_rng([config.seed, 4])
    chains = (draw_from_split(rng, test=False) for _ in range(config.problems))
    problems = (as_problem(c, f"rl-{i}", "text", rng, False, None) for i, c in enumerate(chains))
    write_jsonl(out / "rl.jsonl", problems)
    for task in TASKS:
        write_jsonl(out / f"test_{task}.jsonl", test_set(out, task, config))
    print(f"{out}: sft.jsonl, sft_direct.jsonl, rl.jsonl, {len(TASKS)} test sets of {config.test}")
