"""A script's command line, from a dataclass: `option` declares a flag, `parse_config` reads it.

@dataclass
class Config:
    model: str = DATA(MISSING, "model directory or hub id")                      # required
    lr: float = OPTIMIZER(1e-5, "peak learning rate", gt=0)
    compile: bool = MEMORY(False, "torch.compile each decoder block")

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
import operator
import os
import re
import sys
import traceback
import types
import typing
from contextlib import contextmanager
from dataclasses import MISSING
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Literal, TypeVar, Union

T = TypeVar("T")
GROUPS = ("data", "objective", "sampling", "optimizer", "memory and speed", "run")
BOUNDS = {
    "ge": ("at least", operator.ge),
    "gt": ("greater than", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("less than", operator.lt),
}


def option(default: Any, help: str, *, group: str = "run", **bounds: float) -> Any:
    """A dataclass field that is a flag: help text, group in --help (see GROUPS), range of a number
    (ge, gt, le, lt). A default of `dataclasses.MISSING` makes the flag required."""
    metadata = {"help": help, "group": group, "bounds": bounds}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


DATA, OBJECTIVE, SAMPLING, OPTIMIZER, MEMORY, RUN = (partial(option, group=g) for g in GROUPS)


def parse_config(cls: type[T], doc: str | None, argv: list[str] | None = None) -> T:
    """Read a command line into the dataclass `cls`; `doc` is the head of --help.

    Exits with code 2 and one line on stderr when a flag is unknown, missing, of the wrong type or
    out of its range. A ValueError of the dataclass's own __post_init__ passes through.
    """
    argv = list(sys.argv[1:] if argv is None else map(str, argv))
    parser = _parser(cls, doc)
    _refuse_unknown(parser, argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    if file := first.parse_known_args(argv)[0].config:
        given = _from_file(parser, Path(file))
        _refuse_unknown(parser, given)
        argv = given + argv
    values = vars(parser.parse_args(argv))
    values.pop("config")
    for field in dataclasses.fields(cls):
        value = values[field.name]
        for kind, bound in field.metadata.get("bounds", {}).items():
            words, holds = BOUNDS[kind]
            if value is not None and not holds(value, bound):
                parser.error(f"--{field.name} {value}: must be {words} {bound}")
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{field.name} {value}: must be a finite number")
    return cls(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line instead of the usage of every flag."""
        self.exit(2, f"error: {message.removeprefix('argument ')} (see --help)\n")


def _parser(cls: type, doc: str | None) -> _Parser:
    """The argparse parser of a dataclass."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=doc, allow_abbrev=False, add_help=False, formatter_class=raw)
    fields, hints = dataclasses.fields(cls), typing.get_type_hints(cls)
    names = [f.metadata.get("group", "run") for f in fields]
    groups = {n: parser.add_argument_group(n) for n in dict.fromkeys((*GROUPS, *names))}
    for field, name in zip(fields, names):
        _add(groups[name], field, hints[field.name])
    run = groups["run"]
    run.add_argument("--config", metavar="FILE", help="json or yaml of settings; flags win")
    run.add_argument("-h", "--help", action="help", help="show this text")
    if spec := getattr(sys.modules["__main__"], "__spec__", None):  # started by python -m
        parser.prog = f"python -m {spec.name.removesuffix('.__main__')}"
    required = [f"--{a.dest} …" for a in parser._actions if a.required]
    parser.usage = " ".join(["%(prog)s", *required, "[option …]"])
    return parser


def _add(group, field: dataclasses.Field, hint: Any) -> None:
    """Add one field's flag to its group; `--no_NAME` too where a bool is on by default."""
    default = field.default
    if field.default_factory is not MISSING:
        default = field.default_factory()
    required, unset = default is MISSING, default in ("", [], None) or default is False
    notes = ["required"] if required else [] if unset else [f"default: {default}"]
    bounds = field.metadata.get("bounds", {})
    notes += [f"{BOUNDS[kind][0]} {bound}" for kind, bound in bounds.items()]
    if default is True:
        notes, off = [f"on; --no_{field.name} turns it off"], f"--no_{field.name}"
        group.add_argument(off, dest=field.name, action="store_false", help=argparse.SUPPRESS)
    text = field.metadata.get("help", "") + (f" ({', '.join(notes)})" if notes else "")
    given = {"help": text.replace("%", "%%")}  # argparse formats help texts
    given |= {"required": True} if required else {"default": default}
    if typing.get_origin(hint) in (Union, types.UnionType):  # X | None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if hint is bool:
        given |= {"type": _bool, "nargs": "?", "const": True, "metavar": "true|false"}
    elif typing.get_origin(hint) is Literal:
        given |= {"choices": typing.get_args(hint)}
    elif typing.get_origin(hint) is list:
        given |= {"type": typing.get_args(hint)[0], "nargs": "+", "metavar": "X"}
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
    known = parser._option_string_actions
    flags = [a.split("=")[0] for a in argv if re.match("--|-[a-z]{2}", a)]
    for flag in flags:
        if flag in known and flags.count(flag) > 1 and known[flag].nargs == "+":
            parser.error(f"{flag} is given {flags.count(flag)} times; name all after one {flag}")
        if flag not in known:
            near = difflib.get_close_matches(f"--{flag.lstrip('-').replace('-', '_')}", known, 1)
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
