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
import errno
import math
import operator
import os
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
# what a user can fix: a full disk or quota, one that is read only, a file of somebody else's
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def option(default: Any, help: str, *, group: str = "run", **bounds: float) -> Any:
    """A dataclass field that is a flag: help text, group in --help (see GROUPS), range of a number
    (ge, gt, le, lt). A default of `dataclasses.MISSING` makes the flag required."""
    metadata = {"help": help, "group": group, "bounds": bounds}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


DATA, OBJECTIVE, SAMPLING, OPTIMIZER, MEMORY, RUN = (partial(option, group=g) for g in GROUPS)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line instead of the usage of every flag."""
        self.exit(2, f"error: {message.removeprefix('argument ')} (see --help)\n")


def parse_config(cls: type[T], doc: str | None, argv: list[str] | None = None) -> T:
    """Read a command line into the dataclass `cls`; `doc` is the head of --help.

    Exits with code 2 and one line on stderr when a flag is unknown, missing, of the wrong type or
    out of its range. A ValueError of the dataclass's own __post_init__ passes through.
    """
    argv = list(map(str, sys.argv[1:] if argv is None else argv))
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=doc, allow_abbrev=False, add_help=False, formatter_class=raw)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    add = groups["run"].add_argument
    add("-h", "--help", action="help", help="show this text")
    text = "json or yaml of settings; flags add to them and win; --no_X turns X off"
    add("--config", metavar="FILE", help=text)
    fields, hints = dataclasses.fields(cls), typing.get_type_hints(cls)
    flags = {_add(groups[f.metadata["group"]], f, hints[f.name]): f for f in fields}
    if spec := getattr(sys.modules["__main__"], "__spec__", None):  # started by python -m
        parser.prog = f"python -m {spec.name.removesuffix('.__main__')}"
    required = [f"{flag} …" for flag, f in flags.items() if _default(f) is MISSING]
    parser.usage = " ".join(["%(prog)s", *required, "[option …]"])

    given = [a.partition("=")[0] for a in argv if a.startswith("--")]
    switches = [f"--{no}{f.name}" for f in fields if hints[f.name] is bool for no in ("", "no_")]
    known = ["--help", "--config", *flags, *switches]
    for flag in given:  # argparse would complain about what is missing first
        if flag not in known:
            near = difflib.get_close_matches(f"--{flag[2:].replace('-', '_')}", known, 1)
            parser.error(f"unknown option {flag}" + (f"; did you mean {near[0]}?" if near else ""))
    if "--config" in given:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        argv = _flags_of(first.parse_known_args(argv)[0].config, parser, flags, given) + argv
    values = vars(parser.parse_args(argv))
    del values["config"]
    for field in fields:
        value = values[field.name]
        for kind, bound in field.metadata["bounds"].items():
            words, holds = BOUNDS[kind]
            if value is not None and not holds(value, bound):
                parser.error(f"--{field.name} {value}: must be {words} {bound}")
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{field.name} {value}: must be a finite number")
    return cls(**values)


def _flags_of(file: str, parser: _Parser, flags: dict, given: list[str]) -> list[str]:
    """A file's settings as flags, without those that are given: {"lr": 1e-5, "data": ["a", "b"],
    "compile": true, "steps": null} → --lr=1e-5 --data a b --compile."""
    import yaml  # only here: most commands give no file

    try:
        settings = dict(yaml.safe_load(Path(file).read_text()))  # json is yaml
    except (OSError, TypeError, ValueError, yaml.YAMLError) as e:
        parser.error(f"--config {file}: {e}")
    settings.pop("script", None)  # a run's config.json says whose it is
    flag_of, out = {f.name: flag for flag, f in flags.items()}, []
    for name, value in settings.items():
        if name not in flag_of:
            parser.error(f"--config {file}: unknown option {name}")
        flag = flag_of[name]
        if flag in given or value is None or value == []:
            continue
        if isinstance(value, bool):
            out += [flag] if value != _default(flags[flag]) else []
        else:
            out += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return out


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is MISSING else made()


def _add(group, field: dataclasses.Field, hint: Any) -> str:
    """Add a field's flag to its group, and return it: --NAME; of a bool what changes its default,
    --NAME or --no_NAME. The other one is there too, against a --config, but not in --help."""
    default, text = _default(field), field.metadata["help"].replace("%", "%%")
    if hint is bool:
        on, off = f"--{field.name}", f"--no_{field.name}"
        flag, other, text = (off, on, f"turn off: {text}") if default else (on, off, text)
        how = dict(dest=field.name, action="store_const", default=default)
        group.add_argument(flag, const=not default, help=text, **how)
        group.add_argument(other, const=default, help=argparse.SUPPRESS, **how)
        return flag
    notes = ["required"] if default is MISSING else []
    notes += [f"default: {default}"] if default not in ("", [], None, MISSING) else []
    notes += [f"{BOUNDS[kind][0]} {bound}" for kind, bound in field.metadata["bounds"].items()]
    text += f" ({', '.join(notes)})" if notes else ""
    given = {"required": True} if default is MISSING else {"default": default}
    if typing.get_origin(hint) in (Union, types.UnionType):  # X | None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if typing.get_origin(hint) is Literal:
        given |= {"choices": typing.get_args(hint)}
    elif typing.get_origin(hint) is list:
        given |= {"type": typing.get_args(hint)[0], "nargs": "+", "action": "extend"}
    else:
        given |= {"type": hint}
    names = {int: "N", float: "X", str: "TEXT"}
    group.add_argument(f"--{field.name}", metavar=names.get(given.get("type")), help=text, **given)
    return f"--{field.name}"


@contextmanager
def exit_on_value_error(told: Callable[[Exception], None] = lambda e: None) -> Iterator[None]:
    """Turn a ValueError (a user's mistake: it says what is wrong, where, how to fix it) or one of
    DISK_ERRORS into one line and exit code 2; TRACEBACK=1 in the environment prints a traceback
    before that line. told(e) is called first."""
    try:
        yield
    except (ValueError, OSError) as e:
        said = str(e)
        if isinstance(e, OSError):
            if e.errno not in DISK_ERRORS:
                raise
            said = f"{e.filename or 'while writing'}: {e.strerror}; fix that and rerun the command"
        told(e)
        sys.stdout.flush()
        if os.environ.get("TRACEBACK"):  # Python prints none for a SystemExit, whatever its cause
            traceback.print_exc()
        print(f"error: {said}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
