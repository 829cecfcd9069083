"""The miniature's task: problems that need a thought, as text and as images, all from one seed.

A problem is a chain of statements, `a=9;k=a#;  n=k%;n?`. Each of the six operations `!#%&*~` is a
fixed, random permutation of the ten digits. The base model reads the line and knows every operation
("9#" → "9#=8"), but answers at once, which is a guess. A thought, `a=9;k=9#=8;n=8%=0`, turns each
step into one look-up. Composing permutations is serial work, which a transformer of constant depth
cannot do at once (docs/miniature.md has the papers). Sums would need no thought: attention adds in
parallel.

Each problem exists as text and as an image of the same line, one glyph and so one merged vision
token per 28 × 28 pixels. The "ward" asks the same in another format, `a:9,k:a#,  k?`, with
lettered options; post-training never shows it. Its chains have at least four statements and its
wrong options are random digits: knowing the first digit and the length, but no operation, is worth
no more than a guess (tests/test_toy.py).

Which part stands for what: the base model for Qwen2.5-VL-Instruct; sft.jsonl (text only, a
teacher's thoughts) for OpenThoughts; rl.jsonl (text only, answers) for Orz-Math.

Choices that favour the result: (1) the base's vision tokens are aligned with the embeddings of the
characters that they show (`demo.sh --no_align` goes without); (2) an image is one line, and all of
M-RoPE's frequencies follow its width, so that its positions are a text's; (3) random spaces between
statements keep a student from counting positions.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from string import ascii_letters

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from core.files import write_whole
from core.options import option
from core.schema import LETTERS
from data import prompt_text

CELL = 28  # pixels of a glyph's cell: patch 14 × merge 2
SFT_SIZES = 4 * (2, 3, 4, 5) + (6, 7)  # statements: long chains are for GRPO
SIZES = (2, 3, 4, 5, 6, 7)  # in SFT's exercises and in the test sets
WARD_SIZES = (4, 5, 6, 7)  # shorter ones can be guessed from the first digit
RL_SIZES = (2, 3, 4, 5, 6, 7, 8)
HARD_SIZE = 8
OPERATIONS = {
    c: np.random.default_rng([i, 7]).permutation(10).tolist() for i, c in enumerate("!#%&*~")
}
NAMES = ascii_letters
OPTIONS = 4
REPLAY = 0.25  # share of the base's text exercises in SFT
TEST_SHARE = 8  # one question in eight belongs to the tests
TASKS = ("text", "image", "ward_text", "ward_image", "hard_text", "hard_image")


PLAIN, WARD = "=;", ":,"  # formats: "a=9;k=a#;k?", "a:9,k:a#,k?"


@dataclass(frozen=True)
class Chain:
    """Statements in order. right[i] is what stands right of names[i]: a digit in the first one,
    then the name before and an operation. gaps[i]: how many spaces follow statement i."""

    names: tuple[str, ...]
    right: tuple[str, ...]
    values: tuple[int, ...]
    gaps: tuple[int, ...]
    format: str = PLAIN

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def text(self) -> str:
        """The question as one line: "a=9;k=a#;  k?", or in the ward's format "a:9,k:a#,  k?"."""
        equals, end = self.format
        statements = zip(self.names, self.right, self.gaps)
        line = "".join(f"{name}{equals}{right}{end}{' ' * gap}" for name, right, gap in statements)
        return f"{line}{self.names[-1]}?"


def draw_chain(rng: np.random.Generator, size: int, format: str = PLAIN) -> Chain:
    """A random chain of `size` statements."""
    names = tuple(rng.choice(list(NAMES), size, replace=False).tolist())
    values = [int(rng.integers(0, 10))]
    right = [str(values[0])]
    for before in names[:-1]:
        operation = str(rng.choice(list(OPERATIONS)))
        right.append(before + operation)
        values.append(OPERATIONS[operation][values[-1]])
    gaps = rng.choice(3, size, p=(0.6, 0.25, 0.15))
    return Chain(names, tuple(right), tuple(values), tuple(gaps.tolist()), format)


def is_test(question: str) -> bool:
    """Which side of the split a question is on: a property of its text without spaces, so that no
    set can leak into another."""
    return sha256(question.replace(" ", "").encode()).digest()[0] % TEST_SHARE == 0


def draw_from_split(
    rng: np.random.Generator, test: bool, sizes: tuple[int, ...] = SIZES, format: str = PLAIN
) -> Chain:
    """A random chain of the wanted side of the split."""
    while True:
        chain = draw_chain(rng, int(rng.choice(sizes)), format)
        if is_test(chain.text) == test:
            return chain


def draw_options(rng: np.random.Generator, chain: Chain) -> tuple[list[str], str]:
    """Four random digits, the right one among them; and its letter."""
    wrong = [v for v in rng.permutation(10).tolist() if v != chain.answer]
    values = [chain.answer, *wrong[: OPTIONS - 1]]
    shown = rng.permutation(OPTIONS).tolist()
    return [str(values[i]) for i in shown], LETTERS[shown.index(0)]


def as_problem(
    chain: Chain, name: str, task: str, rng: np.random.Generator, choice: bool, image: str | None
) -> dict:
    """A row of the problem schema."""
    row = {"id": name, "task": task, "subset": f"{chain.size} statements"}
    row["kind"] = "choice" if choice else "math"
    row["question"] = "<image>" if image else chain.text
    if choice:
        row["options"], row["answer"] = draw_options(rng, chain)
    else:
        row["answer"] = str(chain.answer)
    if image:
        row["images"] = [image]
    return {**row, "meta": {"size": chain.size, "line": chain.text}}


# --------------------------------------------------------------------------- thoughts and exercises
def think(chain: Chain) -> str:
    """The teacher's thought, one look-up a step: "a=9;k=9#=8;n=8%=0"."""
    steps = [f"{chain.names[0]}={chain.values[0]}"]
    for i in range(1, chain.size):
        operation = chain.right[i][-1]
        steps.append(f"{chain.names[i]}={chain.values[i - 1]}{operation}={chain.values[i]}")
    return ";".join(steps)


def final_answer(problem: dict) -> str:
    """ "<answer>6</answer>". A choice is answered with the option's text, which the grader takes
    for its letter: naming the letter itself is harder for so small a model."""
    answer = problem["answer"]
    if problem["kind"] == "choice":
        answer = problem["options"][LETTERS.index(answer)]
    return f"<answer>{answer}</answer>"


def conversation(user: str, assistant: str) -> dict:
    turns = {"user": user, "assistant": assistant}
    return {"messages": [{"role": role, "content": text} for role, text in turns.items()]}


def reasoning_row(
    chain: Chain, rng: np.random.Generator, thoughts: bool = True, image: str | None = None
) -> dict:
    """A row of the teacher: question (every second one with options), thought, answer. Both
    published instructions occur, so that the student follows either."""
    problem = as_problem(chain, "-", "text", rng, choice=rng.random() < 0.5, image=image)
    prompt = prompt_text(problem, style="train" if rng.random() < 0.5 else "kind")
    thought = f"<think>{think(chain)}</think>\n" if thoughts else ""
    row = conversation(prompt, thought + final_answer(problem))
    return {**row, "images": [image]} if image else row


def read_exercise(chain: Chain, rng: np.random.Generator) -> tuple[str, str]:
    """(instruction, reply) of an exercise without reasoning on a line shown as text or image.
    Read: the line again. Find k: what stands right of it. Next k: the next statement's name."""
    which, i = rng.random(), int(rng.integers(chain.size))
    if which < 0.4:
        return "Read: ", chain.text
    if which < 0.7 or i + 1 == chain.size:
        return f"Find {chain.names[i]}: ", chain.right[i]
    return f"Next {chain.names[i]}: ", chain.names[i + 1]


def single_step(rng: np.random.Generator) -> tuple[str, str]:
    """(line, reply) of a single operation: "9#", "9#=8"."""
    value, operation = int(rng.integers(0, 10)), str(rng.choice(list(OPERATIONS)))
    line = f"{value}{operation}"
    return line, f"{line}={OPERATIONS[operation][value]}"


def exercise_row(rng: np.random.Generator) -> dict:
    """One of the base's exercises as text: mixed into SFT, so that it forgets less."""
    if rng.random() < 0.3:
        line, reply = single_step(rng)
        return conversation(f"Work out: {line}", reply)
    chain = draw_from_split(rng, test=False)
    ask, reply = read_exercise(chain, rng)
    return conversation(ask + chain.text, reply)


# ----------------------------------------------------------------------------------------- images
@cache
def draw_glyph(character: str) -> np.ndarray:
    """(28, 28) in 0…1: a character of PIL's bitmap font, enlarged to fill most of its cell."""
    small = Image.new("L", (6, 11))
    font = ImageFont.load_default_imagefont()
    ImageDraw.Draw(small).text((0, 0), character, fill=255, font=font)
    cell = Image.new("L", (CELL, CELL))
    cell.paste(small.resize((24, 26), Image.Resampling.NEAREST), (2, 1))
    return np.asarray(cell, np.float32) / 255


def draw_line(text: str, rng: np.random.Generator) -> Image.Image:
    """`text` as an image, 28 × 28 a character; colours, position in the cell and noise vary."""
    line = np.concatenate([draw_glyph(c) for c in text], axis=1)
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
    conversations: int = option(4_000, "rows of each SFT file", ge=1)
    problems: int = option(2_000, "rows of rl.jsonl", ge=1)
    test: int = option(400, "problems of each test set", ge=1)
    images: bool = option(False, "also sft_images.jsonl: every second question as an image")


def take_folder(out: Path, *own: str) -> None:
    """Make the folder `out`. Raises ValueError where it holds files that match none of `own`."""
    out.mkdir(parents=True, exist_ok=True)
    other = [p.name for p in out.iterdir() if not any(p.match(pattern) for pattern in own)]
    if other:
        raise ValueError(f"--out {out}: holds other files ({min(other)}, …); name a new directory")


def write_jsonl(path: Path, rows) -> None:
    """Write all rows or no file: one that is there is complete."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def conversations(config: DataConfig, thoughts: bool = True, images: bool = False) -> list[dict]:
    """The SFT rows, the same chains in each of their forms."""
    rng = np.random.default_rng([config.seed, 1])
    picture_rng = np.random.default_rng([config.seed, 6])
    rows = []
    for i in range(config.conversations):
        if rng.random() < REPLAY:
            rows.append(exercise_row(rng))
            continue
        chain = draw_from_split(rng, False, SFT_SIZES)
        image = f"img/sft-{i}.png" if images and i % 2 else None
        rows.append(reasoning_row(chain, rng, thoughts, image))
        if image:
            draw_line(chain.text, picture_rng).save(Path(config.out) / image)
    return rows


def test_set(out: Path, task: str, config: DataConfig) -> list[dict]:
    """The test set `task` of TASKS, with its images. Text and image form hold the same chains."""
    domain, image = task.rpartition("_")[0], task.endswith("image")
    rng = np.random.default_rng([config.seed, 2, ("", "ward", "hard").index(domain)])
    picture_rng = np.random.default_rng([config.seed, 3])
    sizes = {"": SIZES, "ward": WARD_SIZES, "hard": (HARD_SIZE,)}[domain]
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
    """sft.jsonl, sft_direct.jsonl (the same without thoughts), rl.jsonl, test_TASK.jsonl, img/."""
    out = Path(config.out)
    take_folder(out, "sft*.jsonl", "rl.jsonl", "test_*.jsonl", "*.tmp", "img")
    (out / "img").mkdir(exist_ok=True)
    write_jsonl(out / "sft.jsonl", conversations(config))
    write_jsonl(out / "sft_direct.jsonl", conversations(config, thoughts=False))
    if config.images:
        write_jsonl(out / "sft_images.jsonl", conversations(config, images=True))
    rng = np.random.default_rng([config.seed, 4])
    chains = (draw_from_split(rng, False, RL_SIZES) for _ in range(config.problems))
    problems = (as_problem(c, f"rl-{i}", "text", rng, False, None) for i, c in enumerate(chains))
    write_jsonl(out / "rl.jsonl", problems)
    for task in TASKS:
        write_jsonl(out / f"test_{task}.jsonl", test_set(out, task, config))
    print(f"{out}: sft.jsonl, sft_direct.jsonl, rl.jsonl, {len(TASKS)} test sets of {config.test}")
