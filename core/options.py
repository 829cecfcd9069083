"""A script's command line, from a dataclass: `option` declares a flag, `parse_config` reads it.

@dataclass
class Config:
    model: str = option(MISSING, "model directory or hub id", group="data")      # required
    lr: float = option(1e-5, "peak learning rate", group="optimizer", gt=0)
    compile: bool = option(False, "torch.compile each decoder block", group="memory and speed")

python train.py --model DIR --lr 3e-6 --compile
python train.py --lr 0          error: --lr 0.0: must be greater than 0
python train.py --modle DIR     error: unknown option --modle; did you mean --model?
python train.py --config runs/a/config.json --lr 3e-6      another run's settings, one changed
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import traceback
import types
from contextlib import contextmanager
from pathlib import Path
from typing import (
    Any,
    Callable,
    Iterator,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

T = TypeVar("T")
GROUPS = ("data", "objective", "sampling", "optimizer", "memory and speed", "run")
BOUNDS = {
    "ge": ("at least", lambda x, bound: x >= bound),
    "gt": ("greater than", lambda x, bound: x > bound),
    "le": ("at most", lambda x, bound: x <= bound),
    "lt": ("less than", lambda x, bound: x < bound),
}


def option(
    default: Any,
    help: str,
    *,
    group: str = "run",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A dataclass field that is a flag: help text, group in --help (see GROUPS), range of a number.
    A default of `dataclasses.MISSING` makes the flag required."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {
        "help": help,
        "group": group,
        "bounds": {k: v for k, v in bounds.items() if v is not None},
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_config(cls: type[T], doc: str | None, argv: list[str] | None = None) -> T:
    """Read a command line into the dataclass `cls`; `doc` is the head of --help.

    Exits with code 2 and one line on stderr when a flag is unknown, missing, of the wrong type or
    out of its range. A ValueError of the dataclass's own __post_init__ passes through.
    """
    argv = list(sys.argv[1:] if argv is None else map(str, argv))
    parser, required = _parser(cls, doc)
    _refuse_unknown(parser, argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    if file := first.parse_known_args(argv)[0].config:
        given = _from_file(parser, Path(file))
        _refuse_unknown(parser, given)
        argv = given + argv
    values = vars(parser.parse_args(argv))
    values.pop("config")
    missing = [f"--{name}" for name in required if values[name] is None]
    if missing:
        parser.error(f"{', '.join(missing)} required")
    for field in dataclasses.fields(cls):
        if fault := _out_of_range(field, values[field.name]):
            parser.error(fault)
    return cls(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line instead of the usage of every flag."""
        self.exit(2, f"error: {message.removeprefix('argument ')} (see --help)\n")


def _parser(cls: type, doc: str | None) -> tuple[_Parser, list[str]]:
    """The argparse parser of a dataclass, and the names of its required flags."""
    parser = _Parser(
        description=doc,
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fields, hints = dataclasses.fields(cls), get_type_hints(cls)
    names = [f.metadata.get("group", "run") for f in fields]
    groups = {n: parser.add_argument_group(n) for n in dict.fromkeys((*GROUPS, *names))}
    required = []
    for field in fields:
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING:
            required.append(field.name)
        group = groups[field.metadata.get("group", "run")]
        _add(group, field, hints[field.name], default)
    run = groups["run"]
    run.add_argument("--config", metavar="FILE", help="json or yaml of settings; flags win")
    run.add_argument("-h", "--help", action="help", help="show this text")
    parser.usage = " ".join(["%(prog)s", *(f"--{n} …" for n in required), "[option …]"])
    return parser, required


def _add(group, field: dataclasses.Field, hint: Any, default: Any) -> None:
    """Add one field's flag to its group; `--no_NAME` too where a bool is on by default."""
    unset = default in ("", [], None) or default is False
    notes = [] if unset else [f"default: {default}"]
    notes = ["required"] if default is dataclasses.MISSING else notes
    bounds = field.metadata.get("bounds", {})
    notes += [f"{BOUNDS[kind][0]} {bound}" for kind, bound in bounds.items()]
    if default is True:
        notes = [f"on; --no_{field.name} turns it off"]
        group.add_argument(
            f"--no_{field.name}", dest=field.name, action="store_false", help=argparse.SUPPRESS
        )
    text = field.metadata.get("help", "") + (f" ({', '.join(notes)})" if notes else "")
    given = {
        "default": None if default is dataclasses.MISSING else default,
        "help": text.replace("%", "%%"),  # argparse formats help texts
    }
    if get_origin(hint) in (Union, types.UnionType):  # X | None
        hint = next(t for t in get_args(hint) if t is not type(None))
    if hint is bool:
        given |= {"type": _bool, "nargs": "?", "const": True, "metavar": "true|false"}
    elif get_origin(hint) is Literal:
        given |= {"choices": get_args(hint)}
    elif get_origin(hint) is list:
        given |= {"type": get_args(hint)[0], "nargs": "+", "metavar": "X"}
    else:
        given |= {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}
    aliases = field.metadata.get("aliases", [])
    group.add_argument(f"--{field.name}", *aliases, dest=field.name, **given)


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _refuse_unknown(parser: _Parser, argv: list[str]) -> None:
    """Exit when a flag does not exist, with the one that is spelt most like it, and when a list
    is given twice, of which the first would be lost."""
    known = list(parser._option_string_actions)
    flags = [a.split("=")[0] for a in argv if re.match("--|-[a-z]{2}", a)]
    for flag in flags:
        action = parser._option_string_actions.get(flag)
        if flags.count(flag) > 1 and action is not None and action.nargs == "+":
            parser.error(f"{flag} is given {flags.count(flag)} times; name all after one {flag}")
        if flag not in known:
            near = difflib.get_close_matches(flag.replace("-", "_"), known, 1, 0.7)
            near = near or difflib.get_close_matches(
                f"--{flag.lstrip('-').replace('-', '_')}", known, 1
            )
            parser.error(f"unknown option {flag}" + (f"; did you mean {near[0]}?" if near else ""))


def _from_file(parser: _Parser, file: Path) -> list[str]:
    """A file's settings as flags: {"lr": 1e-5, "data": ["a", "b"]} → --lr=1e-5 --data a b."""
    try:
        if file.suffix in (".yaml", ".yml"):
            import yaml

            settings = yaml.safe_load(file.read_text())
        else:
            settings = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        parser.error(f"--config {file}: {e}")
    if not isinstance(settings, dict):
        parser.error(f"--config {file}: not an object of settings")
    settings.pop("script", None)  # a run's config.json says whose it is
    flags = []
    for name, value in settings.items():
        if isinstance(value, list) and value:
            flags += [f"--{name}", *map(str, value)]
        elif value not in (None, []):
            flags.append(f"--{name}={value}")
    return flags


def _out_of_range(field: dataclasses.Field, value: Any) -> str | None:
    """What is wrong with a number, as a sentence; None when it is in its range."""
    for kind, bound in field.metadata.get("bounds", {}).items():
        words, holds = BOUNDS[kind]
        if value is not None and not holds(value, bound):
            return f"--{field.name} {value}: must be {words} {bound}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"--{field.name} {value}: must be a finite number"
    return None


@contextmanager
def exit_on_value_error(told: Callable[[ValueError], None] = lambda e: None) -> Iterator[None]:
    """Turn a ValueError (a user's mistake: it says what is wrong, where, how to fix it) into one
    line and exit code 2; TRACEBACK=1 in the environment prints a traceback before that line.
    told(e) is called first."""
    try:
        yield
    except ValueError as e:
        told(e)
        sys.stdout.flush()
        if os.environ.get("TRACEBACK"):  # Python prints none for a SystemExit, whatever its cause
            traceback.print_exc()
        print(f"error: {e}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
