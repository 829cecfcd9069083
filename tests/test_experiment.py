"""The frame around a run: how a user's mistake ends a script."""
import pytest

from experiment import user_errors


@pytest.mark.parametrize("asked", [False, True])
def test_traceback_is_printed_when_asked_for(asked, monkeypatch, capsys):
    """Prevents TRACEBACK=1 from doing nothing (Python prints none for SystemExit), and one that nobody asked for."""
    monkeypatch.delenv("TRACEBACK", raising=False)
    if asked:
        monkeypatch.setenv("TRACEBACK", "1")

    def read_file() -> None:
        raise ValueError("p.jsonl:3: answer: missing")
    with pytest.raises(SystemExit) as end, user_errors():
        read_file()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.splitlines()[-1] == "error: p.jsonl:3: answer: missing"
    assert ("Traceback" in said and "in read_file" in said) == asked
