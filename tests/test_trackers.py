"""--report_to: what Weights & Biases and TensorBoard have after a run that was resumed."""

import importlib
import importlib.util
import json
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest

from core import trackers
from core.run import Run
from core.samples import Sample

TEXT = "<think>6·7</think>42"
SAMPLE = Sample("q1", 0, [1], "stop", TEXT, prompt="6·7?", gold="42", answer="42")
SETTINGS = {"lr": 1e-5, "report_to": "tensorboard"}


def needs(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed (pip install {package})")


@dataclass
class Config:
    CHANGEABLE: ClassVar[set] = {"report_to"}
    lr: float = 1e-5
    report_to: str = "none"


def two_starts(out, kind: str, world) -> None:
    """Steps 1 to 3, then a stop; resumed from a checkpoint of step 2: steps 3 and 4."""
    for first, step_after in ((0, 4), (2, 5)):
        run = Run(out, Config(report_to=kind), world)
        run.start({}, first, 4)
        for step in range(first + 1, step_after):
            metrics = {"loss": 10.0 * (first + 1) + step, "nothing": None, "bad": float("nan")}
            run.log({"step": step, **metrics})
            run.log_samples(step, [SAMPLE])
        run.log({"step": step, "tasks": {"text": {"greedy": 0.5}}}, "eval")
        run.finished() if first else run.stopped(step)


@needs("tensorboard")
def test_tensorboard_has_every_metric_once_after_a_resume(tmp_path, world):
    """Without the purge, step 3 of the killed start stays in the curve beside the second's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_starts(tmp_path / "run", "tensorboard", world)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    loss = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert loss == [(1, 11.0), (2, 12.0), (3, 33.0), (4, 34.0)]
    assert [e.value for e in events.Scalars("eval/tasks/text/greedy")] == [0.5]
    assert "train/nothing" not in events.Tags()["scalars"]
    texts = {t: events.Tensors(t)[0].tensor_proto.string_val[0] for t in events.Tags()["tensors"]}
    settings, samples = (texts[f"{k}/text_summary"].decode() for k in ("settings", "samples"))
    assert json.loads(settings.strip("`")) == {"lr": 1e-5, "report_to": "tensorboard"}
    assert "text: <think>6·7</think>42" in samples and "id: q1" in samples


def wandb_records(data: bytes):
    """The records of an offline run's file: a 7-byte head, then LevelDB's log format, i.e. blocks
    of 32 KiB with pieces of checksum (4 bytes), length (2), type (1: whole, 2, 3, 4: parts)."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, text = 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        text += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(text)
            text = b""


@needs("wandb")
def test_wandb_continues_one_run_and_has_every_metric(tmp_path, monkeypatch, world):
    """Offline: both starts write under one id, which a later `wandb sync` joins."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    two_starts(tmp_path / "run", "wandb", world)
    importlib.import_module("wandb").teardown()  # its service process has written everything
    found, ids, keys = [], set(), set()
    for file in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(file.read_bytes()):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config = {c.key: c.value_json for c in record.run.config.update}
            row = {i.nested_key[0] if i.nested_key else i.key: i.value_json
                   for i in record.history.item}  # fmt: skip
            keys |= row.keys()
            if "train/loss" in row:
                found.append((int(row["step"]), float(row["train/loss"])))
    assert ids == {(tmp_path / "run" / "wandb_id.txt").read_text()}
    assert found == [(1, 11.0), (2, 12.0), (3, 13.0), (3, 33.0), (4, 34.0)]
    assert {"eval/tasks/text/greedy", "samples"} <= keys and "train/bad" not in keys
    assert json.loads(config["lr"]) == 1e-5


def test_a_missing_package_is_one_line_and_none_imports_nothing(tmp_path, monkeypatch, world):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report_to wandb: not installed; pip install wandb"):
        trackers.check_installed("wandb")
    trackers.check_installed("none")
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    two_starts(tmp_path / "run", "none", world)
    assert not list((tmp_path / "run").glob("*b*rd"))


def test_flat_keeps_finite_numbers():
    values = {"a": 1, "b": {"c": 2.5, "d": None}, "e": "x", "f": float("inf")}
    assert trackers.flat(values, "t/") == {"t/a": 1, "t/b/c": 2.5}
