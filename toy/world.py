"""The miniature world: everything that X-Reasoner needs, small enough for a laptop's CPU, all of it made from a seed.

The problems are chains of assignments, `a=9;k=a-3;  n=k-2;n?`, all values from 0 to 9. The base model can read them,
find things in them and answer at once, which goes wrong from three statements on; step by step they are easy. Each
exists as text and as an image of the same line, one glyph a cell of 28 × 28 pixels, so one merged vision token each.
The "ward" asks the same in another dress, `P=9mg;Q=P-3; Q?`, with lettered options: post-training never shows it.

What plays which part: the base model (text and images, no thoughts) is Qwen2.5-VL-Instruct; `sft.jsonl` (text only,
correct thoughts of a teacher that can't let go) is OpenThoughts; `rl.jsonl` (text only, answers) is Orz-Math.

By design, so judge the result by it: (1) the base's vision tokens are aligned with the embeddings of the characters
that they show (`toy/base.py`; demo.sh --no_align shows what happens without); (2) an image is one line, and all of
M-RoPE's frequencies follow its width: its positions run along it exactly as a text's do; (3) spaces stand between
statements at random: else a student finds places by counting, which holds in no other dress and at no other length;
(4) the teacher doubts, the more the longer the chain (`DOUBT`): it checks its last step again and again, always
correctly. At five statements "wait" is the likelier next word each time, so a greedy student of it never ends there within
the limit of 88 tokens; the paper found such outputs of its own (section 2.3), and reinforcement can cure that.
Not by design, and left: the ward's wrong options are values of the chain itself where it has enough, so that "an option
from which the last statement leads to another option" is right for two questions in three (66 to 69% over three seeds). Read
the ward's figures beside that, not beside 25%.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from core.run import option
from core.schema import LETTERS
from data import INSTRUCTIONS, prompt_text

CELL = 28  # pixels of a glyph's cell: patch 14 × merge 2
SIZES = (2, 3, 4, 5)  # statements of a problem in training and in the ordinary tests
HARD_SIZE = 6
DOUBT = {
    2: 0.1,
    3: 0.2,
    4: 0.4,
    5: 0.75,
}  # chance of another "wait" after the last step, and after each check of it
MOST_CHECKS = 8
WAIT = ";wait,"
OPTIONS = 4
TEST_SHARE = 8  # one question in eight belongs to the tests


# ------------------------------------------------------------------------------------------------------- problems
@dataclass(frozen=True)
class Dress:
    """How a chain is written down: the names to draw from, and the unit of a given number."""

    names: str
    unit: str


PLAIN = Dress("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNO", "")
WARD = Dress("PQRSTUVWXYZ", "mg")


@dataclass(frozen=True)
class Chain:
    """Assignments in the order in which they can be worked out. `right[i]` is what stands right of names[i]: a digit,
    name±digit, or name+name. `gaps[i]`: how many spaces follow statement i."""

    names: tuple[str, ...]
    right: tuple[str, ...]
    values: tuple[int, ...]
    gaps: tuple[int, ...]
    dress: Dress = PLAIN

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def text(self) -> str:
        """The question as one line: "a=9;k=a-3;  k?", or in the ward's dress "P=9mg;Q=P-3; Q?"."""
        shown = [
            f"{name}={right}{self.dress.unit if right.isdigit() else ''};{' ' * gap}"
            for name, right, gap in zip(self.names, self.right, self.gaps)
        ]
        return "".join(shown) + f"{self.names[-1]}?"


def draw_chain(rng: np.random.Generator, size: int, dress: Dress = PLAIN) -> Chain:
    """A random chain of `size` assignments. Each uses the one before it; one in five of those that could adds two
    names instead."""
    names = tuple(rng.choice(list(dress.names), size, replace=False).tolist())
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
    return Chain(names, tuple(right), tuple(values), tuple(gaps.tolist()), dress)


def is_test(question: str) -> bool:
    """Which side of the split a question is on: a property of its text (another spacing is no other question), so that
    no set can leak into another."""
    return sha256(question.replace(" ", "").encode()).digest()[0] % TEST_SHARE == 0


def draw_unlike(
    rng: np.random.Generator, test: bool, sizes: tuple[int, ...] = SIZES, dress: Dress = PLAIN
) -> Chain:
    """A random chain of the wanted side of the split."""
    while True:
        chain = draw_chain(rng, int(rng.choice(sizes)), dress)
        if is_test(chain.text) == test:
            return chain


def draw_options(rng: np.random.Generator, chain: Chain) -> tuple[list[str], str]:
    """Four different values, the right one among them and the others preferably the chain's own; and its letter."""
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


# ------------------------------------------------------------------------------------------------------- thoughts
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
    """ "<answer>6</answer>". A choice is answered with the option's text, which the grader takes for its letter: to find
    the letter that stands before a text is harder for a model of this size than the sums are."""
    if problem["kind"] == "choice":
        return f"<answer>{problem['options'][LETTERS.index(problem['answer'])]}</answer>"
    return f"<answer>{problem['answer']}</answer>"


def conversation(user: str, assistant: str) -> dict:
    return {
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    }


def reasoning_row(
    chain: Chain, rng: np.random.Generator, thoughts: bool = True, image: str | None = None
) -> dict:
    """A row of the teacher: a plain question (one in five with options), thought and answer. The three published
    instructions take turns, so that the student follows any of them."""
    problem = as_problem(chain, "-", "text", rng, choice=rng.random() < 0.2, image=image)
    prompt = prompt_text(problem, style="train" if rng.random() < 0.5 else "kind")
    thought = f"<think>{think(chain, rng)}</think>\n"  # drawn even where it is left out: the next row must be the same
    row = conversation(prompt, thought * thoughts + final_answer(problem))
    return {**row, "images": [image]} if image else row


# ------------------------------------------------------------------------------- what the base model learns besides
def skill(chain: Chain, rng: np.random.Generator) -> tuple[str, str]:
    """(what to do, reply) of an exercise without any reasoning on a line that is shown as text or image.
    Read: the line again. Find k: what stands right of it. Next k: the name of the statement after it."""
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


def skill_row(rng: np.random.Generator) -> dict:
    """An exercise of the base's as a plain text row: mixed into SFT, so that it forgets less."""
    if rng.random() < 0.3:
        line, reply = sum_exercise(rng)
        return conversation(f"Work out: {line}", reply)
    chain = draw_unlike(rng, test=False)
    ask, reply = skill(chain, rng)
    return conversation(ask + chain.text, reply)


# --------------------------------------------------------------------------------------------------------- images
def glyph(character: str) -> np.ndarray:
    """(28, 28) in 0…1: a character of PIL's bitmap font, enlarged to fill most of its cell."""
    font = ImageFont.load_default_imagefont()
    small = Image.new("L", (6, 11))
    ImageDraw.Draw(small).text((0, 0), character, fill=255, font=font)
    big = small.resize((24, 26), Image.Resampling.NEAREST)
    cell = Image.new("L", (CELL, CELL))
    cell.paste(big, (2, 1))
    return np.asarray(cell, np.float32) / 255


GLYPHS: dict[str, np.ndarray] = {}


def draw_line(text: str, rng: np.random.Generator) -> np.ndarray:
    """`text` as an image, (28, 28 · characters, 3) uint8: background, ink, place in the cell and noise vary."""
    for c in set(text) - set(GLYPHS):
        GLYPHS[c] = glyph(c)
    line = np.concatenate([GLYPHS[c] for c in text], axis=1)
    line = np.roll(line, rng.integers(-1, 2, 2), axis=(0, 1))
    ground = rng.uniform(
        0.35, 0.55, 3
    )  # colour of the paper; the ink is darker or lighter by at least 0.35
    ink = np.clip(ground + rng.choice([-1, 1]) * rng.uniform(0.35, 0.5, 3), 0, 1)
    picture = ground + line[..., None] * (ink - ground) + rng.normal(0, 0.08, (*line.shape, 1))
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)


# ----------------------------------------------------------------------------------------- tokenizer and tiny config
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SYSTEM = "system\nYou are a helpful assistant."
# strings that are one token each: a character model would spend most of its time on them
WHOLE = (
    *INSTRUCTIONS.values(),
    SYSTEM,
    "user\n",
    "assistant\n",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    WAIT,
    " Options:\n\nA: ",
    "\nB: ",
    "\nC: ",
    "\nD: ",
    "Read: ",
    "Find ",
    "Next ",
    "Work out: ",
)
VOCAB = 320  # a little more than there are tokens, as published vocabularies are padded

TEMPLATE = """\
{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}{{ '<|im_start|>SYSTEM<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""".replace(
    "SYSTEM", SYSTEM.replace("\n", "\\n")
)


def make_tokenizer():
    """Byte-level BPE without merges, so that a character is a token and any text comes back unchanged; some whole
    strings are one token; the chat template writes what Qwen2.5-VL's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes as printable characters
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in WHOLE])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_config(tokenizer) -> dict:
    """config.json of a Qwen2.5-VL of 1.1 million parameters, in the published flat form."""
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image_token_id", "image_pad"),
            ("video_token_id", "video_pad"),
            ("vision_start_token_id", "vision_start"),
            ("vision_end_token_id", "vision_end"),
            ("vision_token_id", "vision_pad"),
            ("eos_token_id", "im_end"),
            ("bos_token_id", "endoftext"),
        )
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **ids,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "rope_theta": 100.0,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        # all frequencies follow the width: along a line of glyphs they turn as along a text
        "rope_scaling": {"type": "mrope", "mrope_section": [0, 0, 16]},
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "in_chans": 3,
            "in_channels": 3,
            "hidden_act": "silu",
            "tokens_per_second": 2,
        },
    }


PREPROCESSOR = {
    "min_pixels": CELL * CELL,
    "max_pixels": 80 * CELL * CELL,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


def write_model_files(path: str | Path) -> None:
    """Everything of a model directory but the weights."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path)
    # the template inside tokenizer_config.json too: where readers of the published layout look
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": TEMPLATE}, indent=2)
    )
    config = tiny_config(tokenizer)
    stops = {
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "bos_token_id": config["bos_token_id"],
    }
    for name, content in (
        ("config", config),
        ("preprocessor_config", PREPROCESSOR),
        ("generation_config", stops),
    ):
        (path / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------- the data files
@dataclass
class DataConfig:
    out: str = option(MISSING, "directory for the files")
    seed: int = option(0, "everything is a function of it")
    conversations: int = option(24_000, "rows of sft.jsonl, sft_direct.jsonl and sft_images.jsonl")
    problems: int = option(6_000, "rows of rl.jsonl")
    test: int = option(200, "problems of each test set")
    replay: float = option(0.25, "share of text exercises of the base's kind in the SFT files")
    images: bool = option(
        False, "also sft_images.jsonl: every second question of sft.jsonl as an image"
    )


def write_jsonl(path: Path, rows) -> None:
    """Whole or not at all: a file that is there is finished."""
    partial = path.with_suffix(".tmp")
    with open(partial, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    partial.rename(path)


def conversations(config: DataConfig, thoughts: bool = True, images: bool = False) -> list[dict]:
    """The SFT rows, the same chains in each of their forms. images: every second question is written to img/."""
    rng, picture_rng = (
        np.random.default_rng([config.seed, 1]),
        np.random.default_rng([config.seed, 6]),
    )
    rows = []
    for i in range(config.conversations):
        if rng.random() < config.replay:
            rows.append(skill_row(rng))
            continue
        chain, image = (
            draw_unlike(rng, test=False),
            f"img/sft-{i}.png" if images and i % 2 else None,
        )
        rows.append(reasoning_row(chain, rng, thoughts, image))
        if image:
            Image.fromarray(draw_line(chain.text, picture_rng)).save(Path(config.out) / image)
    return rows


def test_set(out: Path, task: str, config: DataConfig) -> list[dict]:
    """A test set; images are written on the way. task: text, image, ward_text, ward_image, hard_text or hard_image.
    The text and the image form of a set hold the same chains."""
    domain, image = (
        task.removesuffix("image").removesuffix("text").strip("_"),
        task.endswith("image"),
    )
    rng = np.random.default_rng([config.seed, 2, ("", "ward", "hard").index(domain)])
    picture_rng = np.random.default_rng([config.seed, 3])
    rows, seen = [], set()
    while len(rows) < config.test:
        chain = draw_unlike(
            rng,
            test=True,
            dress=WARD if domain == "ward" else PLAIN,
            sizes=(HARD_SIZE,) if domain == "hard" else SIZES,
        )
        if chain.text.replace(" ", "") in seen:
            continue
        seen.add(chain.text.replace(" ", ""))
        name = f"{task}-{len(rows)}"
        rows.append(
            as_problem(
                chain, name, task, rng, domain == "ward", f"img/{name}.png" if image else None
            )
        )
        if image:
            Image.fromarray(draw_line(chain.text, picture_rng)).save(out / "img" / f"{name}.png")
    return rows


TASKS = ("text", "image", "ward_text", "ward_image", "hard_text", "hard_image")


def write_data(config: DataConfig) -> None:
    """sft.jsonl, sft_direct.jsonl (the same without thoughts), rl.jsonl, test_TASK.jsonl with img/, model_files/; with
    --images also sft_images.jsonl."""
    out = Path(config.out)
    (out / "img").mkdir(parents=True, exist_ok=True)
    write_model_files(out / "model_files")
    write_jsonl(out / "sft.jsonl", conversations(config))
    write_jsonl(out / "sft_direct.jsonl", conversations(config, thoughts=False))
    if config.images:
        write_jsonl(out / "sft_images.jsonl", conversations(config, images=True))
    rng = np.random.default_rng([config.seed, 4])
    write_jsonl(
        out / "rl.jsonl",
        (
            as_problem(draw_unlike(rng, test=False), f"rl-{i}", "text", rng, False, None)
            for i in range(config.problems)
        ),
    )
    for task in TASKS:
        write_jsonl(out / f"test_{task}.jsonl", test_set(out, task, config))
    print(
        f"{out}: sft.jsonl, sft_direct.jsonl, rl.jsonl, {len(TASKS)} test sets of {config.test}, model_files"
    )
