"""convert.py: from the form in which each data set is published to this project's two flat jsonl schemas.

    python data.py download mmmu --out raw/mmmu                 # one hub snapshot; its commit goes to download.json
    python data.py convert mmmu raw/mmmu --out data/mmmu.jsonl  # sources are folders, zips or files
    python data.py convert omnimedvqa OmniMedVQA.zip --out data/omni.jsonl --limit 1000 --seed 0

One short function per data set turns one published row into one row of ours; `SPECS` near the end is the registry.
Everything else is shared: reading (parquet, json, jsonl, csv, in folders or inside zips, which are never unpacked),
images, checks, sampling and the report.

What holds for every converted file:
  * a row that cannot be converted is dropped with a reason, and FILE.info.json counts the reasons; a row without
    a field that its release has stops the conversion (it is another file than it was said to be);
  * images keep their original bytes, are named by the first 16 hex digits of their sha256 with the extension
    that their bytes call for, and lie in images/ beside the jsonl; one `<image>` per occurrence, in reading
    order, in question and options together; a picture that is shown twice is listed twice;
  * choice answers are letters, options are texts without letters;
  * meta.cluster names the first image, so that questions about one image can be clustered in error bars;
    meta.health marks the health slices of MMLU-Pro, MMMU and MMMU-Pro: slices of one run, never runs of their own;
  * the same sources give the same bytes.

Where the paper is silent: how OpenThoughts becomes <think>/<answer> (see `openthoughts`); which MMMU-Pro it used
(we take the ten-option standard one as `mmmu_pro`); which 1,000 questions of OmniMedVQA. There `--limit N --seed S`
keeps a sample in proportion to the modalities, chosen by hash, the same everywhere; it is not the paper's sample.
The NEJM images are copyrighted: the user brings the files, nothing here fetches them.
Reading parquet needs pyarrow, downloading needs huggingface_hub; both are imported only there.
"""
from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import io
import json
import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TABLE_SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")
HEALTH_SUBJECTS = {"Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine",
                   "Pharmacy", "Public_Health"}
# The paper's training prompt (appendix C), word for word; it is the whole user turn.
TRAINING_PROMPT = (
    "You will solve a problem/request. You should provide your thoughts within <think> </think> tags before providing"
    " the answer.\nWrite your final answer within <answer> </answer> tags. Here is the question: {question}")
# Text that Qwen2.5's tokenizer would turn into structure; a row that quotes it is dropped, as the loader refuses it.
CONTROL_TOKEN = re.compile(r"<\|(?:endoftext|im_start|im_end|(?:object_ref|box|quad|vision)_(?:start|end)"
                           r"|(?:vision|image|video)_pad)\|>")
# Our own words: the paper did not use the vision form of MMMU-Pro, whose question and options are in the picture.
VISION_ONLY_QUESTION = "<image>\nThe question and its options are in the image."


class Drop(Exception):
    """This row cannot be converted: `reason` is counted, `detail` is shown for the first few rows."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Row(dict):
    """A published row. A field that is not there means that this is not the release that it was said to be."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"field {key!r} is missing (fields here: {', '.join(sorted(map(str, self)))})")


# -------------------- Reading: files, folders and zips as one tree of named members -------------------------


class Source:
    """The files of a release. Its tables are the files named outright, or else those in the folders and zips whose
    names match `pattern`; where a file is named outright, folders and zips only serve images."""

    def __init__(self, paths: list[str], pattern: str):
        self.members: dict[str, Callable[[], bytes]] = {}  # name inside the release -> its bytes
        self.files: dict[str, Path] = {}  # names that are plain files on disk (parquet is read from there)
        self.on_disk: set[Path] = set()  # what is hashed for the report: tables that were read, and zips
        self.roots: list[Path] = []  # folders of files named outright: images are looked up from here
        named = []
        for path in map(Path, paths):
            if not path.exists():
                raise ValueError(f"{path}: no such file or folder")
            if path.is_dir():
                self._add_folder(path)
            elif path.suffix.lower() == ".zip":
                self._add_zip(path, "")
            elif path.suffix.lower() in TABLE_SUFFIXES:
                self._add_file(path, str(path))
                self.roots.append(path.parent)
                named.append(str(path))
            else:
                raise ValueError(f"{path}: give parquet, json, jsonl, csv, a zip or a folder")
        inside = [name for name in sorted(self.members) if name.lower().endswith(TABLE_SUFFIXES)]
        self.tables = named or [name for name in inside if re.search(pattern, name)]
        if not self.tables:
            raise ValueError(f"{', '.join(paths)}: no table whose name matches {pattern!r} (tables here: "
                             f"{', '.join(inside[:8]) or 'none'}); to read a file of another name, name it itself")
        self._by_basename: dict[str, list[str]] | None = None
        self._by_stem: dict[str, Callable[[], bytes]] | None = None

    def _add_file(self, path: Path, name: str) -> None:
        self.members[name], self.files[name] = path.read_bytes, path

    def _add_folder(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if not path.is_file() or any(part.startswith(".") for part in name.split("/")):
                continue  # .cache of the hub client, .git
            if path.suffix.lower() == ".zip":
                self._add_zip(path, name + "/")
            else:
                self._add_file(path, name)

    def _add_zip(self, path: Path, prefix: str) -> None:
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: not a zip, or cut off ({error}); download it again") from None
        self.on_disk.add(path)
        for info in archive.infolist():
            if not info.is_dir():
                self.members[prefix + info.filename] = lambda a=archive, i=info: a.read(i)

    def rows(self) -> Iterator[tuple[str, int, Row]]:
        """(table, row number from 0 inside it, row), tables in order of their names."""
        for table in self.tables:
            if table in self.files:
                self.on_disk.add(self.files[table])
            where = self.files.get(table) or io.BytesIO(self.members[table]())
            for i, row in enumerate(read_rows(table, where)):
                if isinstance(row, list):  # Orz: a row is a pair of turns
                    row = {"turns": row}
                if not isinstance(row, dict):
                    raise ValueError(f"{table} row {i}: expected an object, found {type(row).__name__}")
                yield table, i, Row(row)

    def find(self, name: str) -> Callable[[], bytes]:
        """The reader of an image: by its path from a named table, its full name, or the end of one member's name."""
        if name.startswith("/") or ".." in name.split("/"):
            raise Drop("image path leaves the release", name)
        for root in self.roots:
            if (root / name).is_file():
                return (root / name).read_bytes
        if name in self.members:
            return self.members[name]
        if self._by_basename is None:
            self._by_basename = {}
            for member in self.members:
                self._by_basename.setdefault(member.rsplit("/", 1)[-1], []).append(member)
        found = [m for m in self._by_basename.get(name.rsplit("/", 1)[-1], []) if m.endswith("/" + name)]
        if len(found) != 1:
            raise Drop("image name is ambiguous" if found else "image not found", " ".join([name, *found[:3]]))
        return self.members[found[0]]

    def find_stem(self, stems: list[str]) -> Callable[[], bytes]:
        """The image file that is called by one of these stems, whatever its extension and folder (NEJM)."""
        if self._by_stem is None:
            beside = {str(path): path.read_bytes for root in self.roots for path in sorted(root.glob("images/*"))}
            self._by_stem = {Path(name).stem: read for name, read in (self.members | beside).items()
                             if not name.lower().endswith(TABLE_SUFFIXES)}
        for stem in stems:
            if stem in self._by_stem:
                return self._by_stem[stem]
        raise Drop("image not found", " or ".join(stems))

    def hashes(self) -> list[dict]:
        return [{"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in sorted(self.on_disk)]


def read_rows(name: str, where: Path | io.BytesIO) -> Iterator[Any]:
    """Rows of one table, streamed. A json file holds a list, or an object of rows (its keys go to "key")."""
    suffix = Path(name).suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet
        try:
            for batch in pyarrow.parquet.ParquetFile(where).iter_batches(batch_size=32):  # few: rows carry images
                yield from batch.to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{name}: not parquet, or cut off ({error}); download it again") from None
        return
    raw = where.read_bytes() if isinstance(where, Path) else where.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not utf-8 at byte {error.start}") from None
    if suffix == ".csv":
        csv.field_size_limit(sys.maxsize)  # the default refuses a field beyond 128 KiB
        yield from csv.DictReader(io.StringIO(text, newline=""))
    elif suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 in a string
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name} line {number}: not JSON ({error.msg}); cut off?") from None
    else:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} line {error.lineno}: not JSON ({error.msg}); cut off?") from None
        if isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
            value = [{"key": key, **row} for key, row in value.items()]
        if not isinstance(value, list):
            raise ValueError(f"{name}: expected a list of rows, or an object of rows, found {type(value).__name__}")
        yield from value


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------- Images --------------------------------------------------------------------------------


def image_extension(data: bytes) -> str:
    """The extension that the bytes call for, whatever the file was called (some of MathVista's .jpg are png)."""
    for magic, extension in ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpg"), (b"GIF8", "gif"),
                             (b"BM", "bmp"), (b"II*\0", "tif"), (b"MM\0*", "tif")):
        if data.startswith(magic):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise Drop("not an image (png, jpg, gif, bmp, tif, webp)", repr(data[:12]))


class Context:
    """What a converter may use besides its row: the release's files, the image store, the report's notes."""

    def __init__(self, source: Source, folder: Path | None):
        self.source, self.folder = source, folder  # folder None: a dry pass that writes no images
        self.written: set[str] = set()
        self.notes: Counter[str] = Counter()
        self.dropped: dict[str, list[str]] = {}  # reason -> where, one entry a row
        self.rows_in = 0

    def note(self, text: str) -> None:
        """Count something that was mended or left as it was; it stands in the report."""
        self.notes[text] += 1

    def image(self, value: Any) -> str:
        """Store an image (parquet struct, bytes, name in the release, or reader); return its path in the jsonl."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path") or value.get("image_path")
        if not value:
            raise Drop("image missing")
        if isinstance(value, str):
            value = self.source.find(value)
        if self.folder is None:
            return "images/dry"
        data = value() if callable(value) else value
        name = f"images/{hashlib.sha256(data).hexdigest()[:16]}.{image_extension(data)}"
        target = self.folder / name
        if name not in self.written:
            if not (target.is_file() and target.stat().st_size == len(data)):
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(target.name + f".{os.getpid()}.tmp")
                partial.write_bytes(data)
                partial.replace(target)
            self.written.add(name)
        return name


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
        value = {k: v for k, v in value.items() if v is not None}  # parquet gives absent letters as null
        if sorted(map(str, value)) != list(LETTERS[:len(value)]):
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
    if label not in list(LETTERS[:len(options)]):
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


def problem(id: str, task: str, kind: str, question: str, answer: Any, *, options: list[str] | None = None,
            images: list[str] | None = None, subset: Any = None, **meta: Any) -> dict:
    """One row of the problem schema; empty parts left out."""
    if images:
        meta["cluster"] = Path(images[0]).stem
    row = {"id": f"{task}/{id}", "task": task, "subset": None if subset is None else str(subset), "kind": kind,
           "question": question, "options": options, "answer": answer, "images": images or None,
           "meta": {k: v for k, v in meta.items() if v is not None and v != ""} or None}
    return {k: v for k, v in row.items() if v is not None}


def check_row(row: dict) -> None:
    """What a converter must never write. The loader in data.py checks the same and more, from the file."""
    if "messages" in row:
        texts = [m["content"] for m in row["messages"]]
    else:
        texts = [row["question"], *row.get("options", [])]
        if row["kind"] == "choice":
            assert row["answer"] in list(LETTERS[:len(row["options"])]), row["id"]
    for text in [*texts, str(row.get("answer", ""))]:
        if found := CONTROL_TOKEN.search(text):
            raise Drop("a control token of the model stands in the text", found[0])
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise Drop("half of a surrogate pair, not a character")
    tags = sum(text.count("<image>") for text in texts)
    if tags != len(row.get("images", [])):
        raise Drop("literal <image> in the text", f"{tags} tags, {len(row.get('images', []))} images")


# -------------------- Text: (published row, its number in the release, context) -> our row --------------------


def gsm8k(row: Row, i: int, ctx: Context) -> dict:
    """`question`, `answer` = worked solution, then "#### 1,234"."""
    solution, mark, gold = row["answer"].rpartition("####")
    if not mark:
        raise Drop("no #### in the answer")
    return problem(str(i), "gsm8k", "math", text_of(row["question"], "question"),
                   text_of(gold, "the answer").replace(",", "").replace("$", ""))


def math500(row: Row, i: int, ctx: Context) -> dict:
    return problem(str(row["unique_id"]), "math500", "math", text_of(row["problem"], "problem"),
                   text_of(row["answer"], "the answer"), subset=row["subject"], level=row["level"])


def orz57k(row: Row, i: int, ctx: Context) -> dict:
    """Two turns: {"from": "human", "value"}, {"from": "assistant", "ground_truth": {"value", "pass_at_n"?}}."""
    human, assistant = map(Row, row["turns"])
    gold = Row(assistant["ground_truth"])
    return problem(str(i), "orz57k", "math", text_of(human["value"], "the problem"),
                   text_of(gold["value"], "the answer"), pass_at_n=gold.get("pass_at_n"))


def mmlu_pro(row: Row, i: int, ctx: Context) -> dict:
    """Three to ten options; some versions pad with "N/A". The letter is the gold, as in the official scorer."""
    options = option_texts(row["options"])
    letter = letter_of(row["answer"], options)
    while len(options) > LETTERS.index(letter) + 1 and options[-1] == "N/A":
        options.pop()
        ctx.note("N/A padding removed from the options")
    if LETTERS.index(letter) != row.get("answer_index", LETTERS.index(letter)):
        ctx.note("answer_index disagrees with the answer's letter (the letter is kept)")
    return problem(str(row["question_id"]), "mmlu_pro", "choice", text_of(row["question"], "question"),
                   letter, options=options, subset=row["category"], src=row.get("src"),
                   health=True if row["category"] == "health" else None)


def medqa_with(count: int, task: str) -> Callable[[Row, int, Context], dict]:
    """MedQA is published with five options and with four, under the same fields: the count is checked."""
    def medqa(row: Row, i: int, ctx: Context) -> dict:
        options = option_texts(row["options"])
        if len(options) != count:
            raise ValueError(f"{len(options)} options where {task} has {count}: medqa is the five-option "
                             "release, medqa_4ops the four-option one")
        letter = letter_of(row["answer_idx"], options)
        if options[LETTERS.index(letter)] != text_of(row["answer"], "the answer"):
            ctx.note("the answer's text is not the text of its letter (the letter is kept)")
        return problem(str(i), task, "choice", text_of(row["question"], "question"), letter, options=options,
                       subset=row.get("meta_info"))
    return medqa


def medxpertqa(row: Row, i: int, ctx: Context) -> dict:
    """The question already ends with "Answer Choices: (A) …": cut, or the options would be in the prompt twice."""
    question, mark, _ = row["question"].rpartition("Answer Choices:")
    if not mark:
        question = row["question"]
        ctx.note("no Answer Choices: in the question")
    options = option_texts(row["options"])
    images = [ctx.image(v) for v in row.get("images") or []]
    return problem(str(row["id"]), "medxpertqa_mm" if images else "medxpertqa_text", "choice",
                   "<image>\n" * len(images) + text_of(question, "question"),
                   letter_of(row["label"], options), options=options, images=images,
                   subset=row.get("medical_task"), body_system=row.get("body_system"),
                   question_type=row.get("question_type"))


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
        return problem(name, task, "open" if is_open else "choice", texts[0], answer,
                       options=texts[1:] or None, images=[ctx.image(available[n]) for n in order],
                       subset=subset, difficulty=row.get("topic_difficulty"),
                       health=True if subset in HEALTH_SUBJECTS else None)
    return convert_row


def mmmu_pro_vision(row: Row, i: int, ctx: Context) -> dict:
    """Question and options are in the picture: options here are the bare letters, their texts are in meta."""
    options = option_texts(row["options"])
    return problem(str(row.get("id", i)), "mmmu_pro_vision", "choice", VISION_ONLY_QUESTION,
                   letter_of(row["answer"], options), options=list(LETTERS[:len(options)]),
                   images=[ctx.image(row["image"])], subset=row.get("subject"), option_texts=options,
                   health=True if row.get("subject") in HEALTH_SUBJECTS else None)


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
    question, tail = text[:head[-1].start()].strip(), text[head[-1].end():].strip()
    for marker in (r"(?:^|,\s*|\n\s*)([A-Z])[:.]\s+", r"(?:^|\s)\(([A-Z])\)\s*"):
        _, *parts = re.split(marker, tail)
        letters, options = "".join(parts[0::2]), [p.strip().rstrip(",").strip() for p in parts[1::2]]
        if len(options) > 1 and letters == LETTERS[:len(options)] and all(options) and question:
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
    return problem(str(row["index"]), "mmstar", "choice", question, letter_of(row["answer"], options),
                   options=options, images=[ctx.image(row["image"])], subset=row["category"],
                   l2_category=row.get("l2_category"))


def mathvista(row: Row, i: int, ctx: Context) -> dict:
    """A choice's gold is its TEXT; `precision` is a float in the parquet; lists are compared as text."""
    question, = place_single([text_of(row["question"], "question")])
    meta = Row(row["metadata"])
    options, kind, answer = None, "math", text_of(row["answer"], "the answer")
    if row["question_type"] == "multi_choice":
        options, answer = letter_of_text(answer, option_texts(row["choices"]), ctx)
        kind = "choice"
    elif row["answer_type"] in ("list", "text"):
        kind = "open"
    precision = row.get("precision")
    return problem(str(row["pid"]), "mathvista", kind, question, answer, options=options,
                   images=[ctx.image(row.get("decoded_image") or row["image"])], subset=meta["task"],
                   precision=None if precision is None else int(precision), unit=row.get("unit"),
                   answer_type=row["answer_type"], language=meta.get("language"), category=meta.get("category"))


def mathvision(row: Row, i: int, ctx: Context) -> dict:
    """One image a row, whatever the tags say; a free answer where `options` is empty; some are bare letters."""
    options = option_texts(row["options"]) if row["options"] else []
    question, *placed = place_single([text_of(row["question"], "question"), *options])
    answer = text_of(row["answer"], "the answer")
    if options and answer not in list(LETTERS[:len(options)]):
        placed, answer = letter_of_text(answer, placed, ctx)
    return problem(str(row["id"]), "mathvision", "choice" if options else "math", question, answer,
                   options=placed or None, images=[ctx.image(row.get("decoded_image") or row["image"])],
                   subset=row.get("subject"), level=row.get("level"))


def omnimedvqa(row: Row, i: int, ctx: Context) -> dict:
    """Two to four options; the gold is a text; one entry of the release has `modality` for `modality_type`."""
    options = [str(row[f"option_{c}"]).strip() for c in "ABCD" if row.get(f"option_{c}") not in (None, "")]
    if len(options) < 2:
        raise Drop("fewer than two options")
    options, letter = letter_of_text(row["gt_answer"], options, ctx)
    return problem(text_of(row["question_id"], "question_id"), "omnimedvqa", "choice",
                   "<image>\n" + text_of(row["question"], "question"), letter, options=options,
                   images=[ctx.image(text_of(row["image_path"], "image_path"))],
                   subset=row.get("modality_type") or row["modality"], dataset=row["dataset"],
                   question_type=row.get("question_type"))


def nejm(row: Row, i: int, ctx: Context) -> dict:
    """The user's own files: the json list with option_A … option_E and `correct_answer`, its images beside it as
    images/<image_id>.* or images/<date>.*; or a parquet with `image`, `options`, `answer`. Subset: the year."""
    date = str(row["date"])
    if "options" in row:
        options, label, image = option_texts(row["options"]), row["answer"], row["image"]
    else:
        options = [text_of(row[f"option_{c}"], f"option_{c}") for c in "ABCDE"]
        label, image = row["correct_answer"], None
    if str(label).strip() in list(LETTERS[:len(options)]):
        letter = str(label).strip()
    else:
        options, letter = letter_of_text(label, options, ctx)
    if image is None:
        image = ctx.source.find_stem([str(row["image_id"]), date])
    year = re.search(r"(?:19|20)\d\d", date)
    votes = {c: row[f"option_{c}_votes"] for c in "ABCDE" if row.get(f"option_{c}_votes") is not None}
    return problem(str(row["image_id"]), "nejm", "choice", "<image>\n" + text_of(row["question"], "question"),
                   letter, options=options, images=[ctx.image(image)], subset=year[0] if year else None,
                   date=date, votes=votes or None)


def vqa(task: str) -> Callable[[Row, int, Context], dict]:
    """SLAKE, PathVQA, VQA-RAD: a yes/no question becomes a choice of two (subset "closed"), others stay open."""
    def convert_row(row: Row, i: int, ctx: Context) -> dict:
        if row.get("q_lang", "en") != "en":
            raise Drop("not English")
        answer = text_of(row["answer"], "the answer")
        closed = answer.lower() in ("yes", "no")
        image = row.get("image") or row["img_name"]
        letter = "AB"[answer.lower() == "no"] if closed else None
        return problem(str(row.get("qid", i)), task, "choice" if closed else "open",
                       "<image>\n" + text_of(row["question"], "question"), letter or answer,
                       options=["yes", "no"] if closed else None, images=[ctx.image(image)],
                       subset="closed" if closed else "open", answer_type=row.get("answer_type"),
                       modality=row.get("modality"))
    return convert_row


# -------------------- Conversations -------------------------------------------------------------------------

TRACE = re.compile(r"\s*<\|begin_of_thought\|>(.*)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*)"
                   r"<\|end_of_solution\|>\s*", re.S)


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
        question, thought, solution = row["problem"], row["deepseek_reasoning"], row["deepseek_solution"]
        if row.get("starter_code"):
            question = f"{question}\n\n{row['starter_code']}"
    question, thought = text_of(question, "the question"), text_of(thought, "the thought")
    solution = text_of(solution, "the solution")
    if re.search(r"</?think>|</?answer>|<\|(?:begin|end)_of_", question + thought + solution):
        raise Drop("a tag of the format stands inside the text")
    return {"messages": [{"role": "user", "content": TRAINING_PROMPT.replace("{question}", question)},
                         {"role": "assistant",
                          "content": f"<think>\n{thought}\n</think>\n<answer>\n{solution}\n</answer>"}]}


def openthoughts_direct(row: Row, i: int, ctx: Context) -> dict:
    """The same rows for the ablation without thoughts: the bare question and the answer alone. The answer is the last
    \\boxed{} of the solution where it has one, else the whole solution. The paper gives no prompt for it."""
    from rewards import last_boxed
    question, reply = (m["content"] for m in openthoughts(row, i, ctx)["messages"])
    solution = reply.rpartition("<answer>\n")[2].removesuffix("\n</answer>")
    head, _, _ = TRAINING_PROMPT.partition("{question}")
    return {"messages": [{"role": "user", "content": question.removeprefix(head)}, {
        "role": "assistant", "content": f"<answer>\n{last_boxed(solution) or solution}\n</answer>"}]}


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
    "mmlu_pro": Spec(mmlu_pro, TEST, 12032, "TIGER-Lab/MMLU-Pro", ("data/test-*",),
                     "3373e0b32277875b8db2aa555a333b78a08477ea"),
    "medqa": Spec(medqa_with(5, "medqa"), r"questions/US/test\.jsonl$", 1273, "bigbio/med_qa",
                  ("data_clean.zip",)),
    "medqa_4ops": Spec(medqa_with(4, "medqa_4ops"), r"phrases_no_exclude_test\.jsonl$", 1273,
                       "GBaker/MedQA-USMLE-4-options", ("phrases_no_exclude_test.jsonl",)),
    "medqa_train": Spec(medqa_with(5, "medqa_train"), r"questions/US/train\.jsonl$", 10178, "bigbio/med_qa",
                        ("data_clean.zip",)),
    "medqa_4ops_train": Spec(medqa_with(4, "medqa_4ops_train"), r"phrases_no_exclude_train\.jsonl$", 10178,
                             "GBaker/MedQA-USMLE-4-options", ("phrases_no_exclude_train.jsonl",)),
    "medxpertqa_text": Spec(medxpertqa, r"(?i)text/test\b", 2450, "TsinghuaC3I/MedXpertQA", ("Text/test*",),
                            "7e7c465a68eb2b866926bfa59c8c9d17a8daba65"),
    "medxpertqa_mm": Spec(medxpertqa_mm, r"(?i)mm/test\b", 2000, "TsinghuaC3I/MedXpertQA",
                          ("MM/test*", "images.zip"), "7e7c465a68eb2b866926bfa59c8c9d17a8daba65"),
    "mmmu": Spec(numbered("mmmu"), r"(^|/)validation\b", 900, "MMMU/MMMU", ("*/validation-*",),
                 "171b0ef74cd1704464e6940860968009d8cdd59a"),
    "mmmu_pro": Spec(numbered("mmmu_pro"), r"standard \(10 options\)/test\b", 1730, "MMMU/MMMU_Pro",
                     ("standard (10 options)/test-*",)),
    "mmmu_pro_4ops": Spec(numbered("mmmu_pro_4ops"), r"standard \(4 options\)/test\b", 1730, "MMMU/MMMU_Pro",
                          ("standard (4 options)/test-*",)),
    "mmmu_pro_vision": Spec(mmmu_pro_vision, r"vision/test\b", 1730, "MMMU/MMMU_Pro", ("vision/test-*",)),
    "mmstar": Spec(mmstar, r"(^|/)(mmstar\.parquet$|val\b)", 1500, "Lin-Chen/MMStar", ("mmstar.parquet",),
                   "bc98d668301da7b14f648724866e57302778ab27"),
    "mathvista": Spec(mathvista, r"(^|/)testmini\b", 1000, "AI4Math/MathVista", ("data/testmini-*",)),
    "mathvision": Spec(mathvision, TEST, 3040, "MathLLMs/MathVision", ("data/test-*",),
                       "0c681f39d3dacd336abf62ceb833e40320c8599f"),
    "omnimedvqa": Spec(omnimedvqa, r"Open-access/[^/]*\.json$", 88996, "foreverbeliever/OmniMedVQA",
                       ("OmniMedVQA.zip",), "1ba51c28fc0773bdf7efb8396e5bcfd4227e22da"),
    "nejm": Spec(nejm, r"\.(json|parquet)$", 947),
    "slake": Spec(vqa("slake"), TEST, 2094, "BoKelvin/SLAKE", ("test.json", "imgs.zip")),
    "pathvqa": Spec(vqa("pathvqa"), TEST, 6719, "flaviagiammarino/path-vqa", ("data/test-*",)),
    "vqarad": Spec(vqa("vqarad"), TEST, 451, "flaviagiammarino/vqa-rad", ("data/test-*",)),
    "openthoughts": Spec(openthoughts, r"(^|/)data/train\b", 113957, "open-thoughts/OpenThoughts-114k",
                         ("data/train-*",)),
    "openthoughts_direct": Spec(openthoughts_direct, r"(^|/)data/train\b", 113957, "open-thoughts/OpenThoughts-114k",
                                ("data/train-*",)),
    "openthoughts_metadata": Spec(openthoughts, r"(^|/)metadata/train\b", 113957,
                                  "open-thoughts/OpenThoughts-114k", ("metadata/train-*",)),
}


# -------------------- One conversion ------------------------------------------------------------------------


def converted(spec: Spec, ctx: Context, keep: Collection[int] | None = None) -> Iterator[tuple[int, str, dict]]:
    """(number, key, row) of every published row that can be converted; the others' reasons go to ctx.dropped.

    keep: numbers of the rows to convert, None for all.
    """
    seen: set[str] = set()
    for i, (table, number, published) in enumerate(ctx.source.rows()):
        ctx.rows_in = i + 1
        if keep is not None and i not in keep:
            continue
        try:
            row = spec.convert_row(published, i, ctx)
            key = row.get("id", str(i))
            if key in seen:
                raise Drop("id seen before", key)
            check_row(row)
        except Drop as drop:
            where = f"{table} row {number}" + (f": {drop.detail}" if drop.detail else "")
            ctx.dropped.setdefault(drop.reason, []).append(where)
            continue
        except ValueError as error:
            raise ValueError(f"{table} row {number}: {error}") from None
        seen.add(key)
        yield i, key, row


def sample_keys(subsets: dict[str, str], limit: int, seed: int) -> set[str]:
    """`limit` keys, in proportion to their subsets (largest remainder), in a subset by sha256 of "seed/key".

    subsets: key -> subset. Does not depend on the order of the rows.

    >>> len(sample_keys({"a": "x", "b": "x", "c": "x", "d": "y"}, 3, 0) - {"d"})  # 2.25, 0.75: 2 and 1
    2
    """
    groups: dict[str, list[str]] = {}
    for key, subset in subsets.items():
        groups.setdefault(subset, []).append(key)
    limit = min(limit, len(subsets))
    share = {subset: limit * len(keys) / len(subsets) for subset, keys in groups.items()}
    take = {subset: int(x) for subset, x in share.items()}
    by_remainder = sorted(share, key=lambda subset: (take[subset] - share[subset], subset))
    for subset in by_remainder[:limit - sum(take.values())]:
        take[subset] += 1
    chosen = set()
    for subset, keys in groups.items():
        keys.sort(key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
        chosen.update(keys[:take[subset]])
    return chosen


def source_revision(paths: list[str]) -> dict | None:
    """What `download` wrote beside the sources: the hub's name and the commit."""
    for path in map(Path, paths):
        for folder in (path, *path.resolve().parents[:3]):
            if (folder / "download.json").is_file():
                return json.loads((folder / "download.json").read_text(encoding="utf-8"))
    return None


def write_rows(rows: Iterator[dict], path: Path) -> tuple[Counter, Counter, int]:
    """Write the jsonl; return how many rows of each kind, of each subset, and how many <image> tags there are."""
    kinds, subsets, tags = Counter(), Counter(), 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            kinds[row.get("kind", "conversation")] += 1
            subsets[row.get("subset", "")] += 1
            tags += len(row.get("images", []))
    return kinds, subsets, tags


def convert(name: str, sources: list[str], out: str, limit: int | None = None, seed: int = 0) -> dict:
    """Convert `sources` to the jsonl `out`, write the report to `out`.info.json and return it.

    Raises ValueError for what the user can mend: unknown name, missing or foreign files, nothing converted.
    """
    if name not in SPECS:
        raise ValueError(f"unknown data set {name!r}; there are: {', '.join(SPECS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, not {limit}")
    spec, target = SPECS[name], Path(out)
    source = Source(sources, spec.tables)
    ctx, keep = Context(source, target.parent), None
    if limit is not None:  # a dry pass first: the sample is drawn from the rows that can be converted
        dry = Context(source, None)
        rows = {key: (i, row.get("subset", "")) for i, key, row in converted(spec, dry)}
        chosen = sample_keys({key: subset for key, (_, subset) in rows.items()}, limit, seed)
        keep, ctx.dropped = {rows[key][0] for key in chosen}, dry.dropped
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".tmp")
    try:
        kinds, subsets, tags = write_rows((row for _, _, row in converted(spec, ctx, keep)), partial)
        if not kinds:
            reasons = "; ".join(f"{reason} ({examples[0]})" for reason, examples in ctx.dropped.items())
            raise ValueError(f"no row of {', '.join(sources)} could be converted: {reasons or 'tables are empty'}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    info = {"name": name, "rows_in": ctx.rows_in, "rows_expected": spec.rows, "rows_out": kinds.total(),
            "limit": limit, "seed": seed if limit is not None else None,
            "dropped": {reason: {"rows": len(examples), "examples": examples[:3]}
                        for reason, examples in ctx.dropped.items()},
            "notes": dict(ctx.notes), "kinds": dict(kinds), "subsets": dict(sorted(subsets.items())),
            "image_tags": tags, "images": len(ctx.written), "sha256": file_sha256(target),
            "download": source_revision(sources), "source_files": source.hashes()}
    text = json.dumps(info, indent=1, ensure_ascii=False) + "\n"
    target.with_name(target.name + ".info.json").write_text(text, encoding="utf-8")
    return info


def print_report(info: dict, out: str) -> None:
    print(f"{out}: {info['rows_out']:,} rows of {info['rows_in']:,} read, {info['images']:,} images, "
          f"sha256 {info['sha256'][:16]}")
    for reason, what in info["dropped"].items():
        print(f"  dropped {what['rows']:,}: {reason}; first: {what['examples'][0]}")
    for note, count in info["notes"].items():
        print(f"  {count:,} times: {note}")
    if info["rows_expected"] not in (None, info["rows_in"]):
        print(f"  the whole split has {info['rows_expected']:,} rows: this is a part or another version")


# -------------------- Download and command line -------------------------------------------------------------


def download(name: str, out: str, revision: str | None = None) -> dict:
    """Fetch one snapshot of a data set into the folder `out` and write its commit to download.json there."""
    spec = SPECS.get(name)
    if spec is None or spec.hub is None:
        raise ValueError(f"{name!r} cannot be downloaded (NEJM's images are copyrighted: bring your own files);"
                         f" these can: {', '.join(n for n, s in SPECS.items() if s.hub)}")
    from huggingface_hub import HfApi, snapshot_download
    revision = revision or spec.revision
    commit = HfApi().dataset_info(spec.hub, revision=revision).sha
    snapshot_download(spec.hub, repo_type="dataset", revision=commit, allow_patterns=list(spec.files),
                      local_dir=out)
    what = {"name": name, "hub": spec.hub, "revision": commit, "files": list(spec.files)}
    (Path(out) / "download.json").write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    return what


def main(argv: list[str]) -> None:
    """`convert NAME SRC... --out FILE` or `download NAME --out DIR`; argv without the program's name."""
    parser = argparse.ArgumentParser(prog="data.py", epilog=f"data sets: {', '.join(SPECS)}")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("convert", help="a public release -> flat jsonl, images beside it",
                              epilog=f"data sets: {', '.join(SPECS)}")
    one.add_argument("name")
    one.add_argument("src", nargs="+", help="files, folders or zips of the release")
    one.add_argument("--out", required=True, help="the jsonl to write; images go to images/ beside it")
    one.add_argument("--limit", type=int, help="keep a sample of so many rows, in proportion to the subsets")
    one.add_argument("--seed", type=int, default=0, help="which sample")
    two = commands.add_parser("download", help="a snapshot from the hub")
    two.add_argument("name")
    two.add_argument("--out", required=True, help="folder")
    two.add_argument("--revision", help="branch, tag or commit (default: the pinned commit, else the newest)")
    args = parser.parse_args(argv)
    try:
        if args.command == "convert":
            print_report(convert(args.name, args.src, args.out, args.limit, args.seed), args.out)
        else:
            what = download(args.name, args.out, args.revision)
            print(f"{args.out}: {what['hub']} at {what['revision']}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
