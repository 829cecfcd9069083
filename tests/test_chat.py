"""python -m tools.chat on the shipped miniature: streaming, turns, images, Ctrl-C."""

import pytest
from conftest import ROOT
from PIL import Image

from tools import chat as tool

MODEL = ROOT / "toy" / "assets"


@pytest.fixture(scope="module")
def make_chat():
    options = dict(model=str(MODEL), device="cpu", temperature=0.0, context=256)
    return lambda **more: tool.Chat(tool.Config(**options | more))


def test_an_answer_is_streamed_and_equals_the_samplers(make_chat, monkeypatch):
    """What is printed piece by piece is what `generate` returns, and the conversation has it."""
    chat = make_chat(max_new_tokens=8)
    chat.stop = []  # the miniature's own answer is one digit
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *text, **how: pieces.extend(text))
    answer = chat.say("a=9;k=a-3;k?", [])
    assert "".join(pieces) == answer and len(pieces) > 2
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
    shown = []

    def interrupted(*text, **how) -> None:
        print(*text, **how)
        shown.append(text)
        if len(shown) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tool, "print", interrupted, raising=False)
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
