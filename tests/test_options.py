"""The command line: ranges, misspelt flags, --help, settings from a file."""

import errno
import json
from dataclasses import MISSING, dataclass
from typing import Literal

import pytest

from core.options import exit_on_value_error, option, parse_config

DOC = """What it does.

    python train.py --model DIR      # an example
    python train.py --model OTHER    # 100% as written
"""


@dataclass
class Settings:
    model: str = option(MISSING, "where it starts from", group="data")
    data: list[str] = option(MISSING, "jsonl file(s)", group="data")
    lr: float = option(
        1e-5, "peak learning rate, 50% of it at first", group="optimizer", gt=0, le=1
    )
    steps: int = option(-1, "optimizer steps", ge=-1)
    kind: Literal["a", "b"] = option("a", "which one", group="objective")
    compile: bool = option(False, "compile it", group="memory and speed")
    reshard: bool = option(True, "free blocks", group="memory and speed")
    more: list[str] = option([], "further files")


GIVEN = ["--model", "m", "--data", "a", "b"]


def parse(*argv):
    return parse_config(Settings, DOC, [*GIVEN, *argv])


def test_types_and_defaults():
    got = parse("--lr", "0.5", "--no_reshard", "--compile", "--kind=b")
    assert got == Settings("m", ["a", "b"], 0.5, -1, "b", True, False, [])
    assert parse() == Settings("m", ["a", "b"])
    assert parse("--steps", -1).steps == -1  # numbers too, as tests pass them


def test_a_list_that_is_given_twice_is_joined():
    """Prevents the loss of the first files."""
    assert parse("--data", "c").data == ["a", "b", "c"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--lr", "0"], "--lr 0.0: must be greater than 0"),
        (["--lr", "2"], "--lr 2.0: must be at most 1"),
        (["--lr", "nan"], "--lr nan: must be greater than 0"),
        (["--steps", "-2"], "--steps -2: must be at least -1"),
        (["--steps", "x"], "--steps: invalid int value: 'x'"),
        (["--kind", "c"], "--kind: invalid choice: 'c'"),
        (["--stpes", "3"], "unknown option --stpes; did you mean --steps?"),
        (["--no-reshard"], "unknown option --no-reshard; did you mean --no_reshard?"),
        (["--compil=true"], "unknown option --compil; did you mean --compile?"),
        (["--zzz"], "unknown option --zzz (see"),
        (["--config", "nowhere.json"], "--config nowhere.json: [Errno 2]"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    said = capsys.readouterr().err
    assert end.value.code == 2 and words in said and said.count("\n") == 1


def test_a_misspelt_required_flag_is_named(capsys):
    with pytest.raises(SystemExit):
        parse_config(Settings, DOC, ["--modle", "m", "--data", "d"])
    assert "unknown option --modle; did you mean --model?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_config(Settings, DOC, ["--data", "d"])
    assert "required: --model" in capsys.readouterr().err


def test_help_keeps_lines_and_groups_and_says_what_is_required(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    said = capsys.readouterr().out
    assert end.value.code == 0 and DOC.strip() in said and "None" not in said
    groups = ["data:", "objective:", "optimizer:", "memory and speed:", "run:"]
    at = [said.index(f"\n{g}\n") for g in groups]
    assert at == sorted(at) and "\nsampling:\n" not in said
    assert at[0] < said.index("where it starts from (required)") < at[1]
    said = " ".join(said.split())
    assert (
        "50% of it" in said and "default: 1e-05" in said and "--no_reshard turn off: free" in said
    )


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_settings_from_a_file_and_flags_win(suffix, tmp_path, capsys):
    """A run's config.json holds its script's name too, which is no setting."""
    file = tmp_path / f"config.{suffix}"
    settings = {"script": "train", "model": "-x", "data": ["a", "b"], "lr": 1e-4, "reshard": False}
    file.write_text(json.dumps({**settings, "compile": True, "more": []}))  # yaml reads json
    got = parse_config(Settings, DOC, ["--config", str(file), "--lr", "0.5"])
    assert got == Settings("-x", ["a", "b"], 0.5, compile=True, reshard=False)
    got = parse_config(Settings, DOC, [f"--config={file}", "--data", "b", "c", "--steps", "4"])
    assert got == Settings("-x", ["b", "c"], 1e-4, 4, compile=True, reshard=False)
    got = parse_config(Settings, DOC, ["--no_compile", "--config", str(file), "--reshard"])
    assert (got.compile, got.reshard) == (False, True), "a switch that the file has on goes off"
    file.write_text('{"learning_rate": 1}')
    with pytest.raises(SystemExit):
        parse("--config", str(file))
    assert "unknown option learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, "No space left"), "while writing: No space left; fix that"),
        (OSError(errno.EROFS, "Read-only", "o/x"), "o/x: Read-only; fix that and rerun"),
        (PermissionError(errno.EACCES, "No", "d.jsonl"), "d.jsonl: No; fix that and rerun"),
    ],
)
def test_a_disk_that_cannot_be_written_is_one_line(error, said, capsys):
    with pytest.raises(SystemExit) as end, exit_on_value_error():
        raise error
    assert end.value.code == 2 and capsys.readouterr().err.startswith(f"error: {said}")
    with pytest.raises(ConnectionResetError), exit_on_value_error():
        raise ConnectionResetError(errno.ECONNRESET, "reset")


@pytest.mark.parametrize("asked", [False, True])
def test_traceback_is_printed_when_asked_for(asked, monkeypatch, capsys):
    """Prevents TRACEBACK=1 from doing nothing (Python prints none for SystemExit), and one that
    nobody asked for."""
    monkeypatch.delenv("TRACEBACK", raising=False)
    if asked:
        monkeypatch.setenv("TRACEBACK", "1")

    def read_file() -> None:
        raise ValueError("p.jsonl:3: answer: missing")

    with pytest.raises(SystemExit) as end, exit_on_value_error():
        read_file()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.splitlines()[-1] == "error: p.jsonl:3: answer: missing"
    assert ("Traceback" in said and "in read_file" in said) == asked
