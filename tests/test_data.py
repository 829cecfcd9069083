"""data.py, core/schema.py, core/token_cache.py and the tools that look at data."""

import json
import os
import random
import unicodedata
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from real_data import REAL
from tiny import make_tiny_tokenizer

import core.token_cache
import data
from core import schema
from core.images import ImageConfig, num_image_tokens
from core.vision import mrope_positions
from tools import check as datacheck

USER, ASSISTANT = (
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n4"},
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = make_tiny_tokenizer(tmp_path_factory.mktemp("tiny_tokenizer"))
    (path / "preprocessor_config.json").write_text(
        json.dumps({"min_pixels": 56 * 56, "max_pixels": 112 * 112})
    )
    return path


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return data.load_tokenizer(model_dir)


@pytest.fixture(scope="module")
def real_tokenizer(tmp_path_factory):
    if REAL is None:
        pytest.skip("Qwen2.5's own tokenizer: set XREASONER_TEST_DATA")
    path = tmp_path_factory.mktemp("real_tokenizer")
    for source in [
        *(REAL / "qwen2_5_tokenizer").iterdir(),
        *(REAL / "qwen2_5_vl_config" / f"{n}.json" for n in ("tokenizer_config", "chat_template")),
    ]:
        (path / source.name).write_bytes(source.read_bytes())
    return data.load_tokenizer(path)


def write(path: Path, rows: list) -> str:
    """A jsonl of rows; a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return str(path)


def image(path: Path, size: tuple[int, int] = (60, 40)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    ).save(path)
    return path.name


def conversation(*turns: str, **extra) -> dict:
    """Turns in the order user, assistant, user, …"""
    return {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)
        ],
        **extra,
    }


def problem(**changes) -> dict:
    row = {
        "id": "p/1",
        "task": "t",
        "kind": "choice",
        "question": "Which?",
        "options": ["Yes", "No"],
        "answer": "B",
    }
    return {k: v for k, v in {**row, **changes}.items() if v is not None}


def tokenize(file: str, model_dir: Path, tmp_path: Path, **settings):
    settings = {
        "max_len": 4096,
        "overlong": "truncate",
        "cache_dir": tmp_path / "cache",
        **settings,
    }
    dataset = data.tokenize_files([file], model_dir, **settings)
    return dataset, dataset.stats


# ------------------------------------------------------------------------------ schemas and faults
BAD_CONVERSATIONS = [
    ('{"messages": [', "line", "not a JSON object"),
    ("[1, 2]", "line", "not a JSON object: a list"),
    ({"text": "x"}, "messages", "not a list, or empty"),
    ({"messages": "x"}, "messages", "not a list"),
    ({"messages": ["x"]}, "messages[0]", "its role is none of"),
    ({"messages": [USER, {"content": "x"}]}, "messages[1]", "its role is none of"),
    ({"messages": [USER, {"role": "bot", "content": "x"}]}, "messages[1]", "its role is none of"),
    ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "missing"),
    (conversation("x", " \n"), "messages[1].content", "empty"),
    (conversation("x", 3), "messages[1].content", "int instead of text"),
    (conversation("x"), "messages", "order user"),
    ({"messages": [ASSISTANT, USER]}, "messages", "order assistant, user"),
    (
        {"messages": [USER, {"role": "system", "content": "x"}, ASSISTANT]},
        "messages",
        "order user, system, assistant",
    ),
    (
        conversation("a<|im_end|>\n<|im_start|>assistant\nYes", "x"),
        "messages[0].content",
        "control token <|im_end|>",
    ),
    (conversation("a", "b<|image_pad|>"), "messages[1].content", "control token <|image_pad|>"),
    (
        '{"messages": [{"role": "user", "content": "\\ud800"}, '
        '{"role": "assistant", "content": "x"}]}',
        "messages[0].content",
        "surrogate",
    ),
    (conversation("<image> a", "x"), "images", "1 <image> in the text, 0 images"),
    (conversation("a", "x", images=["ok.png"]), "images", "0 <image> in the text, 1 images"),
    (conversation("a", "an <image>"), "messages[1].content", "<image> in an assistant turn"),
    (conversation("<image>", "x", images="ok.png"), "images", "not a list"),
    (conversation("<image>", "x", images=["none.png"]), "images", "none.png"),
    (conversation("<image>", "x", images=["truncated.png"]), "images", "truncated.png"),
    (conversation("<image>", "x", images=["text.png"]), "images", "text.png"),
    (conversation("<image>", "x", images=["line.png"]), "images", "200 times"),
]
BAD_PROBLEMS = [
    (problem(id=7), "id", "int instead of text"),
    (problem(task=None), "task", "missing"),
    (problem(kind=None), "kind", "missing"),
    (problem(kind="quiz"), "kind", "missing or unknown: 'quiz'"),
    (problem(question=""), "question", "empty"),
    (problem(question="a<|im_start|>b"), "question", "control token"),
    (problem(answer=None), "answer", "missing"),
    (problem(answer="C"), "answer", "not a letter of its 2 options"),
    (problem(answer="b"), "answer", "not a letter"),
    (problem(answer="AB"), "answer", "not a letter"),
    (problem(answer="No"), "answer", "not a letter"),
    (problem(options=None), "options", "not a list"),
    (problem(options=[]), "options", "1 to 26"),
    (problem(options=["x"] * 27), "options", "1 to 26"),
    (problem(options=["x", 3]), "options[1]", "int instead of text"),
    (problem(kind="math", answer="4"), "options", "given for kind 'math'"),
    (problem(kind="math", options=None, answer=4), "answer", "int instead of text"),
    (problem(kind="math", options=None, answer=" "), "answer", "empty"),
    (problem(kind="open", options=None, answer=["yes", 1]), "answer", "int instead of text"),
    (problem(subset=3), "subset", "int, not str"),
    (problem(meta=[1]), "meta", "list, not dict"),
    (
        problem(question="<image> and <image>", images=["ok.png"]),
        "images",
        "2 <image> in the text, 1 images",
    ),
    (problem(options=["<image>", "No"]), "images", "1 <image> in the text, 0 images"),
    (problem(images=["none.png"]), "images", "none.png"),
]


@pytest.fixture
def folder(tmp_path):
    image(tmp_path / "ok.png")
    image(tmp_path / "line.png", (402, 2))
    whole = (tmp_path / "ok.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


@pytest.mark.parametrize(
    "kind, cases, good, load",
    [
        (
            "conversation",
            BAD_CONVERSATIONS,
            {"messages": [USER, ASSISTANT]},
            data.load_conversations,
        ),
        ("problem", BAD_PROBLEMS, problem(), data.load_problems),
    ],
)
def test_every_kind_of_bad_row_is_named_once(folder, kind, cases, good, load):
    """Prevents a bad row that trains silently, that ends a run by a traceback, or that is reported
    as something else; and good rows between bad ones that get lost."""
    rows = []
    for i, (bad, _, _) in enumerate(cases):
        named = bad if isinstance(bad, str) or bad.get("id") == 7 else {**bad, "id": f"bad{i}"}
        rows += [named, {**good, "id": f"{i}"}]
    path = write(folder / f"{kind}.jsonl", rows)
    kept, faults = load(path, skip_bad_rows=True)
    assert [f.line for f in faults] == [2 * i + 1 for i in range(len(cases))]
    for fault, (_, field, why) in zip(faults, cases):
        assert fault.field == field and why in fault.why and fault.fix, fault
    assert [r["id"] for r in kept] == [str(i) for i in range(len(cases))]
    with pytest.raises(
        ValueError, match=rf"{len(cases)} bad row\(s\), {len(cases)} good(.|\n)*{kind}.jsonl:1: "
    ):
        load(path)


def test_file_level_faults(model_dir, tmp_path):
    """Prevents --skip_bad_rows from hiding a file that is not there, empty, or bad from end to
    end."""
    for name, content, why in (
        ("none", None, "no such file"),
        ("empty", b"\n \n", "the file is empty"),
        ("latin", '{"messages": "é"}\n'.encode("latin-1"), "not a JSON object.*utf-8"),
    ):
        path = tmp_path / f"{name}.jsonl"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=why):
            data.load_conversations([path], skip_bad_rows=True)
        with pytest.raises(ValueError, match=why):
            tokenize(str(path), model_dir, tmp_path)


def test_ids_must_differ_over_all_files(tmp_path):
    """Prevents two problems that share seeds and overwrite each other's result on resume."""
    a, b = (
        write(tmp_path / "a.jsonl", [problem()]),
        write(tmp_path / "b.jsonl", [problem(id="p/2"), problem()]),
    )
    with pytest.raises(ValueError, match=r"b.jsonl:2: id: 'p/1' is already used in .*a.jsonl:1"):
        data.load_problems([a, b])


def test_a_field_that_looks_misspelt_is_warned_of_once(tmp_path, capsys):
    """Prevents `image` for `images` from training without a single image; columns of the user's
    own, empty ones and a near name beside the field itself are normal."""
    rows = [
        problem(),
        problem(id="p/2", image=["a.png"], source="web", idx=3, answers=["B"]),
        problem(id="p/3", Images=["a.png"], subject="law", tasks=["t"]),
        problem(id="p/4", image=["a.png"], metadata={}),
        problem(id="p/5", image=None, n_images=0),
    ]
    file = write(tmp_path / "a.jsonl", rows)
    for _ in range(2):
        assert len(data.load_problems(file)[0]) == 5
    assert capsys.readouterr().out.splitlines() == [
        f"warning: 2 row(s) have a field 'image', the first is {file}:2; it is not read: "
        "did you mean 'images'?",
        f"warning: 1 row(s) have a field 'Images', the first is {file}:3; it is not read: "
        "did you mean 'images'?",
    ]


def test_good_rows_pass_and_image_paths_follow_the_file(folder):
    """Prevents paths that are looked up from where the command was started; and a validator that
    refuses good rows: several turns, a BOM, gold lists, letters beyond D, images in options or
    without a place in the question."""
    rows = [
        conversation("<image> a", "b", "c <image>", "d", images=["ok.png", "ok.png"]),
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                USER,
                ASSISTANT,
                USER,
                ASSISTANT,
            ],
            "other": 1,
        },
    ]
    path = write(folder / "c.jsonl", rows)
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes() + b"\n\n")
    kept, faults = data.load_conversations(path)
    assert not faults and kept[1]["messages"] == rows[1]["messages"]
    assert kept[0]["images"] == [str(folder / "ok.png")] * 2
    problems = [
        problem(
            id="1",
            options=[str(i) for i in range(10)],
            answer="J",
            subset=None,
            meta={"precision": 2},
        ),
        problem(id="2", kind="open", options=None, answer=["yes", "Yes"]),
        problem(id="3", images=["ok.png"]),
        problem(id="4", question="<image>?", options=["<image>", "b"], images=["ok.png", "ok.png"]),
    ]
    assert len(data.load_problems(write(folder / "p.jsonl", problems))[0]) == 4


# ------------------------------------------------------------------------------ rendering and mask
def supervised_texts(tokens: np.ndarray, learned: np.ndarray, tokenizer) -> list[str]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], learned, [False]])))
    return [tokenizer.decode(tokens[a:b]) for a, b in edges.reshape(-1, 2)]


MULTI = [
    {"role": "system", "content": "Be brief."},
    USER,
    ASSISTANT,
    {"role": "user", "content": "And 3 + 3?\n\n"},
    {"role": "assistant", "content": "  Six.\n"},
    {"role": "user", "content": "Thanks"},
]


def test_supervised_tokens_decode_to_assistant_turns_and_their_end(tokenizer):
    """Prevents loss on user or system text, on headers or on the line break after a turn; and an
    end token that is never learned (endless generation)."""
    ((tokens, learned),) = data.encode_conversations([{"messages": MULTI}], tokenizer, None)
    assert tokens.dtype == np.int32 and learned.dtype == bool
    assert supervised_texts(tokens, learned, tokenizer) == [
        ASSISTANT["content"] + "<|im_end|>",
        "  Six.\n<|im_end|>",
    ]
    assert tokenizer.decode(tokens) == tokenizer.apply_chat_template(MULTI, tokenize=False)


def test_default_system_turn_is_kept_and_not_learned(tokenizer):
    """Prevents dropping "You are a helpful assistant.", which the published template writes where
    no system turn is."""
    ((tokens, learned),) = data.encode_conversations(
        [{"messages": [USER, ASSISTANT]}], tokenizer, None
    )
    text = tokenizer.decode(tokens)
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n2 + 2?"
    )
    assert supervised_texts(tokens, learned, tokenizer) == [ASSISTANT["content"] + "<|im_end|>"]


def test_mask_equals_transformers_own_generation_mask(tokenizer, model_dir):
    """Prevents a mask that is shifted by a token: transformers finds the same one by template
    marks."""
    marked = data.load_tokenizer(model_dir)
    marked.chat_template = """\
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' -%}
{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}
{%- else -%}{{ m.content + '<|im_end|>' }}{%- endif -%}{{ '\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
    theirs = marked.apply_chat_template(MULTI, return_dict=True, return_assistant_tokens_mask=True)
    ((tokens, learned),) = data.encode_conversations([{"messages": MULTI}], marked, None)
    assert tokens.tolist() == theirs["input_ids"]
    assert learned.astype(int).tolist() == theirs["assistant_masks"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=2, max_size=4
    )
)
def test_any_text_survives(tokenizer, turns):
    """Prevents text lost or learned in the wrong place for odd characters: line breaks at a turn's
    ends, emoji, NUL."""
    turns = turns[: len(turns) // 2 * 2]
    ((tokens, learned),) = data.encode_conversations([conversation(*turns)], tokenizer, None)
    assert supervised_texts(tokens, learned, tokenizer) == [
        unicodedata.normalize("NFC", t + "<|im_end|>") for t in turns[1::2]
    ]


def test_prompt_of_a_row_has_the_tokens_of_generation(tokenizer):
    """Prevents training on prompt tokens that generation never sees: with a leading line break in
    the answer, a joint tokenisation would merge it with the header's."""
    ((tokens, learned),) = data.encode_conversations([conversation("Hi", "\nYes")], tokenizer, None)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )["input_ids"]
    assert tokens[: int(learned.argmax())].tolist() == prompt


@pytest.mark.parametrize(
    "change, turns, why",
    [
        (
            (
                "{{ m.content }}",
                "{{ m.content if loop.last else m.content.split('</think>')[-1] }}",
            ),
            4,
            "differently",
        ),
        (
            ("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"),
            2,
            "assistant turn 1 loses a part",
        ),
        (
            ("{{ '<|im_end|>\n' }}\n{%- endfor", "{{ '\n' }}\n{%- endfor"),
            2,
            "without a special token",
        ),
    ],
)
def test_templates_that_cannot_be_trained_on_are_refused(model_dir, change, turns, why):
    """Prevents silent nonsense with templates that strip the thoughts, or that end a turn with
    nothing."""
    tokenizer = data.load_tokenizer(model_dir)
    assert change[0] in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(*change)
    with pytest.raises(ValueError, match=why):
        data.chat_segments(
            conversation(*["Q", ASSISTANT["content"]] * (turns // 2))["messages"], tokenizer
        )


def test_tiny_template_is_the_published_one_in_other_words(tokenizer, real_tokenizer):
    """Prevents tests on a template that says something else than Qwen2.5-VL's."""
    parts = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}]
    for messages in (MULTI, [USER, ASSISTANT], [{"role": "user", "content": parts}, ASSISTANT]):
        for header in (True, False):
            ours, theirs = (
                t.apply_chat_template(messages, tokenize=False, add_generation_prompt=header)
                for t in (tokenizer, real_tokenizer)
            )
            assert ours == theirs


def test_real_tokenizer_on_real_thoughts(real_tokenizer):
    """Prevents tokens other than the published tokenizer's on real long chains of thought."""
    with open(REAL / "long_cot" / "qwq32b_medical_traces.jsonl") as f:
        rows = [json.loads(line) for line in f][:40]
    rows = [conversation(r["question"], r["completion"]) for r in rows]
    for row, (tokens, learned) in zip(rows, data.encode_conversations(rows, real_tokenizer, None)):
        assert tokens.tolist() == real_tokenizer.apply_chat_template(row["messages"])["input_ids"]
        assert supervised_texts(tokens, learned, real_tokenizer) == [
            row["messages"][1]["content"] + "<|im_end|>"
        ]


# --------------------------------------------------------------------------------- the token cache
ROWS = [conversation("Hi", "Yes"), conversation("Hi", "Yes " * 40), conversation("Why " * 60, "No")]


def test_overlong_policies_are_counted(model_dir, tokenizer, tmp_path):
    """Prevents silent loss of data, and documents with nothing to learn in the packs."""
    file = write(tmp_path / "a.jsonl", ROWS)
    whole = [t for t, _ in data.encode_conversations(ROWS, tokenizer, None)]
    cut = len(whole[0]) + 10
    dataset, stats = tokenize(file, model_dir, tmp_path, max_len=cut)
    assert (
        stats["truncated"] == 1
        and stats["dropped_nothing_to_learn"] == 1
        and stats["documents"] == 2
    )
    assert dataset.lengths.tolist() == [len(whole[0]), cut]
    assert (
        np.array_equal(dataset.get(1).tokens, whole[1][:cut])
        and dataset.get(1).source == f"{file}:2"
    )
    dataset, stats = tokenize(file, model_dir, tmp_path, max_len=cut, overlong="drop")
    assert (
        stats["dropped_overlong"] == 2
        and stats["truncated"] == 0
        and dataset.lengths.tolist() == [len(whole[0])]
    )
    _, stats = tokenize(file, model_dir, tmp_path, max_len=max(map(len, whole)), overlong="drop")
    assert stats["documents"] == stats["rows"] == 3 and stats["tokens"] == sum(map(len, whole))
    with pytest.raises(ValueError, match="no document has anything to learn within max_len"):
        tokenize(file, model_dir, tmp_path, max_len=8)


def test_supervised_counts_the_targets_of_the_batches(model_dir, tmp_path):
    """Prevents a wrong loss denominator: it comes from these counts, not from the batches."""
    dataset, stats = tokenize(write(tmp_path / "a.jsonl", ROWS), model_dir, tmp_path, max_len=60)
    for i in range(len(dataset)):
        assert int((data.collate([dataset.get(i)]).targets != -100).sum()) == dataset.supervised[i]
    assert stats["supervised"] == dataset.supervised.sum()


def test_bad_rows_stop_before_tokenising_unless_skipped(model_dir, tmp_path, monkeypatch):
    """Prevents a run that finds its bad row after an hour of tokenising, or that skips rows
    without saying which."""
    file = write(tmp_path / "a.jsonl", [ROWS[0], conversation("x", ""), ROWS[0]])
    with monkeypatch.context() as m:
        m.setattr(data, "build_cache", lambda *a, **k: pytest.fail("tokenised"))
        with pytest.raises(ValueError, match=r"a.jsonl:2: messages\[1\].content: missing or empty"):
            tokenize(file, model_dir, tmp_path)
    dataset, stats = tokenize(file, model_dir, tmp_path, skip_bad_rows=True)
    assert len(dataset) == 2 and stats["bad_rows"] == 1 and "a.jsonl:2" in stats["faults"][0]
    with pytest.raises(
        ValueError, match="1 bad row"
    ):  # not excused by the cache of the run that skipped
        tokenize(file, model_dir, tmp_path)


def test_tokens_that_only_this_tokenizer_calls_special_are_refused(model_dir, tmp_path):
    """Prevents forged turns with a tokenizer whose control tokens are not Qwen's."""
    other = tmp_path / "model"
    other.mkdir()
    for f in model_dir.iterdir():
        (other / f.name).write_bytes(f.read_bytes())
    raw = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(raw.replace("<|video_pad|>", "[STOP]"))
    config = (other / "tokenizer_config.json").read_text()
    (other / "tokenizer_config.json").write_text(config.replace("<|video_pad|>", "[STOP]"))
    file = write(tmp_path / "a.jsonl", [conversation("a [STOP] b", "x")])
    assert len(data.load_conversations(file)[0]) == 1
    with pytest.raises(ValueError, match=r"control token \[STOP\]"):
        tokenize(file, other, tmp_path)
    with pytest.raises(ValueError, match=r"p/1.*control token \[STOP\]"):
        data.render_problem(problem(question="[STOP]?"), data.load_tokenizer(other), None)


def test_cache_is_reused_and_renewed(model_dir, tmp_path, monkeypatch):
    """Prevents tokenising again at each start, and the worse: training on tokens of another file,
    tokenizer or cut."""
    built = []
    original = data.build_cache
    monkeypatch.setattr(
        data, "build_cache", lambda *a, **k: (built.append(1), original(*a, **k))[1]
    )
    file, other_dir = write(tmp_path / "a.jsonl", ROWS), make_tiny_tokenizer(tmp_path / "model")
    first, _ = tokenize(file, model_dir, tmp_path)
    again, stats = tokenize(file, model_dir, tmp_path)
    assert len(built) == 1 and stats["documents"] == 3
    assert all(np.array_equal(first.get(i).tokens, again.get(i).tokens) for i in range(3))
    tokenize(file, model_dir, tmp_path, max_len=100)
    tokenize(file, model_dir, tmp_path, overlong="drop")
    assert len(built) == 3
    template = other_dir / "chat_template.jinja"
    template.write_text(template.read_text().replace("helpful", "kind"))
    kind, _ = tokenize(file, other_dir, tmp_path)
    assert len(built) == 4 and kind.lengths[0] != first.lengths[0]
    write(tmp_path / "a.jsonl", ROWS[:2])
    shorter, _ = tokenize(file, model_dir, tmp_path)
    assert len(built) == 5 and len(shorter) == 2
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_killed_build_continues_where_it_was(model_dir, tmp_path, monkeypatch):
    """Prevents hours of tokenising that a kill or a time limit throws away; and parts of a killed
    build that make other data than a build in one go."""
    rows = [conversation(f"{i}?", "Yes " * (i % 7 + 1)) for i in range(10)]
    file, encoded, original = write(tmp_path / "a.jsonl", rows), [], data.encode_conversations
    whole, stats = tokenize(file, model_dir, tmp_path, cache_dir=tmp_path / "other")
    monkeypatch.setattr(core.token_cache, "ROWS_PER_PART", 3)

    def encode(rows, **rest):
        encoded.append(len(rows))
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return original(rows, **rest)

    monkeypatch.setattr(data, "encode_conversations", encode)
    with pytest.raises(KeyboardInterrupt):
        tokenize(file, model_dir, tmp_path)
    dataset, again = tokenize(file, model_dir, tmp_path)
    assert encoded == [3, 3, 3, 3, 1] and again == stats
    assert dataset.data_hash == whole.data_hash
    assert [dataset.get(i).source for i in range(10)] == [f"{file}:{i + 1}" for i in range(10)]
    assert all(np.array_equal(dataset.get(i).tokens, whole.get(i).tokens) for i in range(10))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_rows_in_a_row_without_a_document(model_dir, tmp_path, monkeypatch):
    """Prevents a crash, or documents of other rows, where a whole part was dropped."""
    monkeypatch.setattr(core.token_cache, "ROWS_PER_PART", 1)
    file = write(tmp_path / "a.jsonl", [conversation("?", t) for t in ("Yes", "Yes " * 99, "No")])
    dataset, stats = tokenize(file, model_dir, tmp_path, max_len=99, overlong="drop")
    assert [dataset.get(i).source for i in range(2)] == [f"{file}:1", f"{file}:3"]
    assert len(dataset) == 2 and stats["dropped_overlong"] == 1
    assert [len(dataset.get(i).tokens) for i in range(2)] == dataset.lengths.tolist()


def test_the_cache_knows_the_versions_and_the_data_has_a_hash(model_dir, tmp_path, monkeypatch):
    """Prevents training on tokens of another tokenizers release, and a changed data file that
    nobody notices on resume: the hash goes into the checkpoint. It does not depend on the place."""
    file = write(tmp_path / "a.jsonl", ROWS)
    first = data.cache_key([file], model_dir)
    for library in ("transformers", "tokenizers"):
        with monkeypatch.context() as m:
            m.setattr(
                core.token_cache, "version", lambda n, old=library: "0" if n == old else version(n)
            )
            assert data.cache_key([file], model_dir) != first
    assert data.cache_key([file], model_dir) == first
    here = tokenize(file, model_dir, tmp_path)[0].data_hash
    moved = write(tmp_path / "b" / "c.jsonl", ROWS)
    assert tokenize(moved, model_dir, tmp_path)[0].data_hash == here
    changed = write(tmp_path / "a.jsonl", [*ROWS[:2], conversation("Why", "Yes")])
    assert tokenize(changed, model_dir, tmp_path)[0].data_hash != here


def test_two_processes_may_build_the_cache_at_once(model_dir, tmp_path, monkeypatch):
    """Prevents half-written tokens when a second process finds no cache while the first one writes
    it; and a cache with a missing or truncated part from being trained on."""
    file, original, inner = write(tmp_path / "a.jsonl", ROWS), core.token_cache.write_whole, []

    def slow(path, content):
        if not inner and path.suffix == ".json":  # the tokens are there, what they are is not
            inner.append(1)
            with monkeypatch.context() as m:
                m.setattr(os, "getpid", lambda: 999_999)
                inner.append(tokenize(file, model_dir, tmp_path)[0])
        original(path, content)

    monkeypatch.setattr(core.token_cache, "write_whole", slow)
    dataset, _ = tokenize(file, model_dir, tmp_path)
    assert dataset.lengths.tolist() == inner[1].lengths.tolist()
    assert dataset.data_hash == inner[1].data_hash
    (cache,) = (tmp_path / "cache").iterdir()
    assert sorted(f.name for f in cache.iterdir()) == ["000000.bin", "000000.json", "meta.json"]
    part = cache / "000000.bin"
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(ValueError, match="corrupt token cache; remove this directory"):
        tokenize(file, model_dir, tmp_path)
    part.unlink()
    with pytest.raises(FileNotFoundError):
        tokenize(file, model_dir, tmp_path)


# ------------------------------------------------------------------------------ packing, balancing
def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each pack, by trying all packs for each document."""
    rooms: list[int] = []
    for n in sorted(lengths, reverse=True):
        fitting = [i for i, r in enumerate(rooms) if r >= n]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= n
        else:
            rooms.append(capacity - n)
    return sorted(rooms)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(0, 5), st.integers(0, 5))
def test_pack_plan_is_best_fit_decreasing(lengths, seed, epoch):
    """Prevents documents lost, doubled or cut, packs over capacity, and a fast plan that fills
    worse than the slow."""
    packs = data.pack_plan(np.array(lengths, dtype=np.int64), 50, seed=seed, epoch=epoch)
    assert sorted(i for p in packs for i in p.tolist()) == list(range(len(lengths)))
    assert sorted(50 - sum(lengths[i] for i in p) for p in packs) == naive_best_fit(lengths, 50)


def test_pack_plan_fills_is_pure_and_changes_by_epoch():
    """Prevents under-filled packs on lengths like R1's, an order that a resumed run cannot
    rebuild, and the same packs in every epoch."""
    lengths = np.clip(
        np.random.default_rng(0).lognormal(np.log(4800), 0.75, 5000), 50, 16384
    ).astype(int)
    plan = data.pack_plan(lengths, 16384, seed=1, epoch=0)
    assert lengths.sum() / (len(plan) * 16384) >= 0.99
    same = data.pack_plan(lengths.copy(), 16384, seed=1, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(plan, same, strict=True))
    for seed, epoch in ((1, 1), (2, 0)):
        other = data.pack_plan(lengths, 16384, seed=seed, epoch=epoch)
        assert {tuple(sorted(p)) for p in other} != {tuple(sorted(p)) for p in plan}
    sizes = [int(lengths[p].max()) for p in plan]
    assert sizes != sorted(sizes, reverse=True)  # long documents come at all times
    with pytest.raises(ValueError, match="document 1 has 9 tokens, a pack holds 8"):
        data.pack_plan(np.array([3, 9]), 8, seed=0, epoch=0)
    assert data.pack_plan(np.array([], dtype=int), 8, seed=0, epoch=0) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e9), max_size=40), st.integers(1, 9))
def test_balance_gives_every_item_once_and_equal_numbers(costs, world):
    """Prevents a rank with more forwards than the others (every forward is a collective), and lost
    packs."""
    shares = data.balance(costs, world)
    assert len(shares) == world and sorted(i for s in shares for i in s) == list(range(len(costs)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_balance_evens_out_the_work():
    """Prevents seven ranks waiting for the one that got the longest documents: 0.5 % over the mean
    at most."""
    assert data.balance([9, 5, 4, 1], 2) == [[0, 3], [1, 2]]
    lengths = np.clip(
        np.random.default_rng(0).lognormal(np.log(4800), 0.75, 4000), 50, 32768
    ).astype(int)
    plan = data.pack_plan(lengths, 32768, seed=0, epoch=0)
    costs = np.array([data.attention_cost(lengths[p]) for p in plan])
    balanced, as_they_come = [], []
    for i in range(0, len(plan) - 31, 32):
        loads = [costs[i : i + 32][s].sum() for s in data.balance(costs[i : i + 32], 8)]
        balanced.append(max(loads) / np.mean(loads))
        as_they_come.append(costs[i : i + 32].reshape(8, 4).sum(1).max() / np.mean(loads))
    assert np.mean(balanced) < 1.005 < np.mean(as_they_come)
    assert data.attention_cost(np.array([1000, 1000])) < data.attention_cost(np.array([2000]))


# ----------------------------------------------------------------------------------------- batches
def document(tokens: list[int], learned: list[int]) -> data.Document:
    return data.Document(np.array(tokens, np.int32), np.array(learned, bool), [], 302, "x:1")


def test_collate_shifts_inside_documents():
    """Prevents the last token of a document from being trained to predict the first of the next,
    and positions that run on over documents."""
    batch = data.collate(
        [document([10, 11, 12], [0, 1, 1]), document([13], [1]), document([14, 15], [1, 1])]
    )
    assert batch.tokens.tolist() == [10, 11, 12, 13, 14, 15] and batch.tokens.dtype == torch.long
    assert batch.targets.tolist() == [11, 12, -100, -100, 15, -100]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]] * 3
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6] and batch.cu_seqlens.dtype == torch.int32
    assert batch.pixel_values is None and batch.grid_thw is None


def test_documents_with_images(model_dir, tokenizer, folder):
    """Prevents placeholders, patches and positions that do not belong together, in training data
    with images."""
    image(folder / "wide.png", (200, 50))
    rows = [
        conversation("a", "b"),
        conversation("<image>What, and <image>?", "x", images=["ok.png", "wide.png"]),
    ]
    dataset, stats = tokenize(write(folder / "i.jsonl", rows), model_dir, folder)
    assert dataset.has_images and stats["documents"] == 2
    config = ImageConfig.from_dir(model_dir)
    batch = data.collate([dataset.get(i) for i in (0, 1)], config)
    counts = [num_image_tokens(g, config.merge_size) for g in batch.grid_thw.tolist()]
    start = int(batch.cu_seqlens[1])
    assert int((batch.tokens == 302).sum()) == sum(counts) and batch.pixel_values.shape == (
        4 * sum(counts),
        1176,
    )
    expected, _ = mrope_positions(
        batch.tokens[start:], batch.grid_thw, image_token_id=302, merge_size=2
    )
    assert torch.equal(batch.position_ids[:, start:], expected) and not torch.equal(
        expected[0], expected[2]
    )
    assert not (batch.targets == 302).any()
    image(folder / "wide.png", (50, 50))
    with pytest.raises(ValueError, match="i.jsonl:2: an image has another size"):
        data.collate([dataset.get(1)], config)


def test_a_cut_through_an_image_drops_the_document(model_dir, tokenizer, folder):
    """Prevents a document with fewer placeholders than its image has tokens, at which the forward
    would fail."""
    rows = [conversation("a", "b", "<image>", "x", images=["ok.png"]), conversation("a", "b" * 80)]
    file = write(folder / "i.jsonl", rows)
    kept, config = data.load_conversations(file)[0], ImageConfig.from_dir(model_dir)
    (tokens, _), _ = data.encode_conversations(kept, tokenizer, config)
    dataset, stats = tokenize(
        file, model_dir, folder, max_len=int(np.flatnonzero(tokens == 302)[-1])
    )
    assert stats["dropped_cut_image"] == 1 and stats["documents"] == 1 and not dataset.has_images


# ----------------------------------------------------------------------------------------- prompts
def test_prompts_are_the_papers():
    """Prevents other words than those of the published model's training and evaluation."""
    assert data.prompt_text(problem(), "train") == (
        "You will solve a problem/request. You should provide your thoughts within <think> "
        "</think> tags before "
        "providing the answer.\nWrite your final answer within <answer> </answer> tags. Here is "
        "the question: "
        "Which? Options:\n\nA: Yes\nB: No"
    )
    assert (
        data.prompt_text(problem())
        == data.prompt_text(problem(), "mcq")
        == (
            "You should provide your thoughts within <think> </think> tags, then answer with "
            "just one of the options below "
            "within <answer> </answer> tags (For example, if the question is \n'Is the earth "
            "flat?\n A: Yes \nB: No', you "
            "should answer with <think>...</think> <answer>B: No </answer>). Here is the "
            "question: Which? "
            "Options:\n\nA: Yes\nB: No"
        )
    )
    math = problem(kind="math", options=None, answer="2", question="1+1?")
    text = data.prompt_text(math)
    assert text.startswith(
        "A conversation between User and Assistant. The user asks a question, and you as the "
    )
    assert text.endswith(
        "you should answer with <think> your reasoning </think> <answer>2 </answer>).\n\n"
        "Here is the question: 1+1?"
    )
    assert data.prompt_text({**math, "kind": "open"}).startswith("You will solve")
    with pytest.raises(ValueError, match="prompt style 'poem'"):
        data.prompt_text(math, "poem")


def test_image_places():
    """Prevents images that move: at their place where the question has one, else between
    instruction and question."""
    head = data.INSTRUCTIONS["mcq"]
    assert data.prompt_text(problem(images=["a", "b"])).startswith(head + "<image><image>Which?")
    assert data.prompt_text(problem(question="In <image>?", images=["a"])).startswith(
        head + "In <image>?"
    )
    inside = data.prompt_text(problem(options=["<image>", "No"], images=["a"]))
    assert inside == head + "Which? Options:\n\nA: <image>\nB: No"


def test_prompts_equal_transformers_processor(model_dir, tokenizer, folder):
    """Prevents a prompt whose tokens or pixels are not what transformers' own processor makes of
    the same turn."""
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Processor(Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(
            self, *args
        ):  # the video processor would need torchvision
            pass

    config = ImageConfig.from_dir(model_dir)
    theirs = Processor(
        Qwen2VLImageProcessorPil(min_pixels=config.min_pixels, max_pixels=config.max_pixels),
        tokenizer,
        None,
        chat_template=tokenizer.chat_template,
    )
    image(folder / "wide.png", (200, 50))
    row = problem(question="Left <image> or right <image>?", images=["ok.png", "wide.png"])
    (row,), _ = data.load_problems(write(folder / "p.jsonl", [row]))
    prompt = data.render_problem(row, tokenizer, config, "kind")
    turn = [{"role": "user", "content": data.with_image_parts(data.prompt_text(row))}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    expected = theirs(
        text=[text], images=[Image.open(f) for f in row["images"]], return_tensors="pt"
    )
    assert prompt.tokens == expected["input_ids"][0].tolist()
    assert torch.equal(prompt.grid_thw, expected["image_grid_thw"])
    assert torch.equal(prompt.pixel_values, expected["pixel_values"])


def test_text_prompt_ends_with_the_assistant_header(tokenizer):
    """Prevents a prompt that the model has to open its own turn for."""
    prompt = data.render_problem(problem(), tokenizer, None, "train")
    text = tokenizer.decode(prompt.tokens)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        + data.prompt_text(problem(), "train")
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.pixel_values is None and prompt.grid_thw is None


def test_images_for_a_text_model_are_refused(model_dir, tokenizer, folder):
    """Prevents a model that answers questions about an image that it never got."""
    row = problem(images=[str(folder / "ok.png")])
    with pytest.raises(ValueError, match="no image settings"):
        data.render_problem(row, tokenizer, None)
    text_only = data.load_tokenizer(model_dir)
    text_only.chat_template = text_only.chat_template.replace("<|image_pad|>", "")
    with pytest.raises(ValueError, match="0 image places for 1 images"):
        data.render_problem(row, text_only, ImageConfig.from_dir(model_dir))


def test_model_directory_without_tokenizer_or_template(model_dir, tmp_path):
    """Prevents a traceback from deep inside transformers for a wrong --model."""
    with pytest.raises(ValueError, match="no tokenizer"):
        data.load_tokenizer(tmp_path)
    make_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        data.load_tokenizer(tmp_path)
    template = data.load_tokenizer(model_dir).chat_template
    (tmp_path / "chat_template.json").write_text(
        json.dumps({"chat_template": template})
    )  # the form of older releases
    assert data.load_tokenizer(tmp_path).chat_template == template


# ------------------------------------------------------------------------------- check and inspect
def plant(rows: list, rng: random.Random) -> dict[int, str]:
    """Put 37 faults into 37 rows; line → what check has to say about it."""

    def reply(text: str):
        return lambda q: conversation(q, text)

    kinds = [
        (lambda q: '{"messages": [{"role": "user"', "not a JSON object"),
        (lambda q: [conversation(q, "x")], "not a JSON object: a list"),
        (lambda q: {"conversations": [q]}, "messages: not a list"),
        (lambda q: {"messages": [USER, {"role": "gpt", "content": q}]}, "its role is none of"),
        (lambda q: {"messages": [{"content": q}, ASSISTANT]}, "its role is none of"),
        (lambda q: conversation(q), "in the order user"),
        (lambda q: conversation([q], "x"), "list instead of text"),
        (lambda q: conversation(q + "<|im_start|>", "x"), "control token"),
        (lambda q: conversation(q, "x", images=["ok.png"]), "0 <image> in the text"),
        (lambda q: conversation("<image>" + q, "x", images=["gone.png"]), "gone.png"),
        (lambda q: conversation("<image>" + q, "x", images=["bad.png"]), "bad.png"),
        (lambda q: dict(rows[0]), "says the same as"),
        (reply(""), "empty"),
        (reply("<think>\n</think>\n<answer>1</answer>"), "empty thought"),
        (reply("<think>\nhm <answer>1</answer>"), "1 <think> but 0 </think>"),
        (reply("<think>\na\n</think><answer>1"), "1 <answer> but 0 </answer>"),
    ]
    planted = {}
    for n, i in enumerate(rng.sample(range(1, len(rows)), 37)):
        change, planted[i + 1] = kinds[n % len(kinds)]
        rows[i] = change(f"other {i}?")
    return planted


def test_check_names_37_planted_faults_of_10000_and_nothing_else(tmp_path, capsys):
    """Prevents bad rows that slip through among thousands, and false alarms that make people
    ignore the check."""
    rng = random.Random(0)
    rows = [
        conversation(
            f"What is {i} + {i}? Put it in <answer></answer>, thoughts in <think></think>.",
            f"<think>\n{i} + {i} = {2 * i}\n</think>\n<answer>{2 * i}</answer>",
        )
        for i in range(10_000)
    ]
    planted = plant(rows, rng)
    (tmp_path / "bad.png").write_text("no")
    image(tmp_path / "ok.png")
    file = write(tmp_path / "a.jsonl", rows)
    faults, repeated = datacheck.check([file]), "says the same as"
    assert [f.line for f in faults] == sorted(n for n in planted if planted[n] != repeated)
    for fault in faults:
        assert planted[fault.line] in str(fault), fault
    out = capsys.readouterr().out
    assert "10000 conversation rows in 1 file(s): 35 fault(s)" in out
    assert "warning: 2 row(s) repeat an earlier one, the first: " in out


def test_check_of_problems_tries_the_golds(tmp_path):
    """Prevents golds that no answer can match, which would be zero reward for ever."""
    pytest.importorskip("rewards")
    rows = [
        problem(id="1", kind="math", options=None, answer=r"\frac{1}{2}"),
        problem(id="2"),
        problem(id="3", kind="math", options=None, question="x", answer=r"\frac{1}{"),
        problem(id="2", question="new"),
    ]
    faults = datacheck.check([write(tmp_path / "p.jsonl", rows)])
    assert [(f.line, f.field) for f in faults] == [(3, "answer"), (4, "id")]


def test_check_counts_tokens(model_dir, tmp_path):
    """Prevents rows over max_len that nobody knew of; the count is that of the whole rendered
    conversation."""
    file = write(tmp_path / "a.jsonl", ROWS)
    dataset, _ = tokenize(file, model_dir, tmp_path)
    faults = datacheck.check([file], str(model_dir), int(dataset.lengths[1]) - 1)
    assert [(f.line, f"{dataset.lengths[f.line - 1]} tokens" in f.why) for f in faults] == [
        (i + 1, True) for i in range(3) if dataset.lengths[i] >= dataset.lengths[1]
    ]
    with pytest.raises(ValueError, match="--model"):
        datacheck.check([file], None, 10)


def test_command_line(model_dir, tmp_path, capsys):
    """Prevents an exit code 0 for bad data."""
    good, bad = (
        write(tmp_path / "good.jsonl", ROWS),
        write(tmp_path / "bad.jsonl", [*ROWS, conversation("x", "")]),
    )
    datacheck.main([good])
    with pytest.raises(SystemExit) as e:
        datacheck.main([good, bad])
    assert (
        e.value.code == 1
        and f"{bad}:4: messages[1].content: missing or empty" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit) as e:
        datacheck.main([str(tmp_path / "none.jsonl")])
    assert e.value.code == 2 and "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        datacheck.main([good, "--model", str(model_dir), "--max_len", "100"])
    out = capsys.readouterr().out
    assert "⟦Yes<|im_end|>⟧" in out and "max_len 100: 2 rows are longer" in out
    assert "3 conversation rows in 1 file(s): 2 fault(s)" in out
    datacheck.main([write(tmp_path / "p.jsonl", [problem()]), "--model", str(model_dir)])
    assert "A: Yes\nB: No<|im_end|>" in (out := capsys.readouterr().out) and "⟧" not in out


def test_schema_constants_agree_with_the_real_tokenizer(real_tokenizer):
    """Prevents a control token of the published tokenizer that only the second, tokenizer-aware
    look would refuse."""
    assert set(real_tokenizer.all_special_tokens) <= set(schema.CONTROL_TOKENS)


# ---------------------------------------------------------------------- files in other formats
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}
PARTS = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT]}
DATA_URL = conversation("<image>?", "x", images=["data:image/png;base64," + "A" * 300_000])


@pytest.mark.parametrize(
    "row, lines",
    [
        (SHAREGPT, 1),
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, 1),
        ({"prompt": "1+1?", "completion": "2"}, 1),
        (PARTS, 13),
        (DATA_URL, 13),
    ],
)
def test_a_file_in_another_format_is_refused_with_the_command(row, lines, tmp_path):
    """Prevents 151 faults, or 300 KB of base64, where a few lines say what to run."""
    file = write(tmp_path / "a.jsonl", [row] * 151)
    with pytest.raises(ValueError, match="`python -m convert chat FILE --out NEW.jsonl`") as e:
        data.load_conversations(file, skip_bad_rows=True)
    assert len(str(e.value).splitlines()) == lines
    assert max(map(len, str(e.value).splitlines())) < 400 + len(file)


@pytest.mark.parametrize(
    "content, why",
    [
        (b"\x93NUMPY\x01\0\n" * 6000, "not a JSON object.*utf-8"),
        (json.dumps([SHAREGPT]).encode(), "not a JSON object: a list.*convert chat"),
        (
            json.dumps(problem(), indent=1).encode(),
            "not a JSON object.*write one JSON object on each line",
        ),
        (b'{"text": "x"}\n', r"\(fields text; no 'messages'\)"),
    ],
)
def test_a_file_that_is_no_jsonl_is_named(content, why, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=why):
        data.load_conversations(tmp_path / "a.jsonl", skip_bad_rows=True)


def test_the_other_schema_is_named(tmp_path):
    """Prevents "messages: missing" on every row for a file that was meant for the other script."""
    problems = write(tmp_path / "p.jsonl", [problem(id=str(i)) for i in range(3)])
    with pytest.raises(ValueError, match="a file of problems, where one of conversations"):
        data.load_conversations(problems)
    with pytest.raises(ValueError, match="a file of conversations, where one of problems"):
        data.load_problems(write(tmp_path / "c.jsonl", ROWS))
    with pytest.raises(ValueError, match="a folder, not a file"):
        data.load_problems(tmp_path)


def test_one_data_url_among_good_rows_is_a_short_fault(tmp_path):
    """Prevents a fault that prints 300 KB of base64."""
    faults = data.load_conversations(
        write(tmp_path / "a.jsonl", [*ROWS, DATA_URL]), skip_bad_rows=True
    )[1]
    assert len(faults) == 1 and len(str(faults[0])) < 500 and "convert chat" in faults[0].fix
