"""python -m tools.chat on the shipped miniature: streaming, turns, images, Ctrl-C."""

import argparse

import pytest
from conftest import ROOT
from PIL import Image

from tools import chat as tool

MODEL = ROOT / "toy" / "assets"


@pytest.fixture(scope="module")
def make_chat():
    options = {name: default for name, (default, _) in tool.OPTIONS.items()}
    options |= dict(model=str(MODEL), device="cpu", temperature=0.0, context=256, image=[])
    return lambda **more: tool.Chat(argparse.Namespace(**options | more))


DIM, PLAIN = "\033[2m", "\033[0m"


@pytest.mark.parametrize("opened", [False, True])
def test_a_thought_is_dimmed_in_whatever_pieces_it_comes(opened, capsys):
    """Tags come in several tokens: before the last of them nobody knows that a thought begins."""
    text = "6·7</think>\n42" if opened else "<think>6·7</think>\n42"
    for size in range(1, 12):
        stream = tool.Stream(opened, colour=True)
        for end in [*range(size, len(text), size), len(text)]:
            stream.show(text[:end])
        said = capsys.readouterr().out.replace(f"{PLAIN}{DIM}", "")
        assert said == f"{DIM}{text.removesuffix(chr(10) + '42')}{PLAIN}\n42"
    tool.Stream(False, colour=True).show("no thought, half a character: \ufffd")
    assert capsys.readouterr().out == "no thought, half a character: "


def test_an_answer_is_streamed_and_equals_the_samplers(make_chat, capsys, monkeypatch):
    """What is printed piece by piece is what `generate` returns, and the conversation has it."""
    chat = make_chat(max_new_tokens=8)
    chat.stop = []  # the miniature's own answer is one digit
    pieces, show = [], tool.Stream.show
    spy = lambda self, text: (pieces.append(text), show(self, text))  # noqa: E731
    monkeypatch.setattr(tool.Stream, "show", spy)
    answer = chat.say("a=9;k=a-3;k?", [])
    assert capsys.readouterr().out.split() == answer.split() and len(set(pieces)) > 2
    del chat.messages[1:]
    params = tool.SamplingParams(temperature=0, max_new_tokens=8, stop_ids=chat.stop)
    with tool.gathered(chat.model):
        tokens = chat.sampler.generate([chat.prompt()], params)[0].tokens
    assert answer == chat.tokenizer.decode([t for t in tokens if t not in chat.stop])


def test_turns_and_images_are_part_of_the_next_prompt(make_chat, tmp_path, capsys):
    Image.new("RGB", (56, 28), "red").save(tmp_path / "a.png")
    chat = make_chat(max_new_tokens=4, context=512)
    chat.say("What?", [str(tmp_path / "a.png")])
    first = len(chat.prompt().tokens)
    chat.say("And now?", [])
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert len(chat.prompt().tokens) > first and chat.prompt().grid_thw.shape == (1, 3)
    with pytest.raises(ValueError, match="--context 512; /new"):
        chat.say("a" * 600, [])
    assert len(chat.messages) == 4, "a refused message is not part of the conversation"
    chat.new()
    assert not chat.messages and not chat.files


def test_ctrl_c_stops_the_answer_and_the_next_one_is_whole(make_chat, capsys, monkeypatch):
    chat = make_chat(max_new_tokens=8)
    chat.stop = []  # the miniature's own answer is one digit
    whole = chat.say("a=9;k=a-3;k?", [])
    chat.new()
    show, shown = tool.Stream.show, []

    def interrupted(self, text: str) -> None:
        show(self, text)
        shown.append(text)
        if len(shown) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tool.Stream, "show", interrupted)
    cut = chat.say("a=9;k=a-3;k?", [])
    assert whole.startswith(cut) and len(cut) < len(whole)
    assert " [stopped]\n" in capsys.readouterr().out
    chat.new()
    assert chat.say("a=9;k=a-3;k?", []) == whole
    lines = iter(["/new", "a=9;k=a-3;k?", "/nonsense"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or eof())
    tool.converse(chat)
    said = capsys.readouterr().out
    assert said.count(whole) == 2 and "no such command or file: /nonsense" in said


def eof():
    raise EOFError
