"""The run directory: whose it is, who holds it, what a failure leaves; how a script ends."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import Mock

import pytest
from conftest import ROOT

from core.run import Run, _same, claim, command, script
from core.throughput import describe_evaluation
from core.training import Training, TrainingOptions


@dataclass
class Settings:
    CHANGEABLE: ClassVar[set[str]] = {"micro_tokens", "val_data"}
    lr: float = 1.0
    micro_tokens: int = 10
    val_data: tuple = ()
    model: str = "m"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def begun(folder: Path, world, **settings) -> Run:
    """A run of this module that has done one step."""
    run = Run(folder, Settings(**settings), world)
    run.start({}, 0, 40)
    run.log({"step": 1, "loss": 2.0})
    return run


# ------------------------------------------------------------------------------------ whose it is
FOREIGN = {
    "a model": {"config.json": '{"model_type": "qwen2"}', "model.safetensors": "x"},
    "a list for a config": {"config.json": "[1]"},
    "somebody's notes": {"notes.txt": "mine"},
    "another script's run": {"config.json": '{"script": "eval", "lr": 1.0}', "samples.jsonl": "{}"},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_this_scripts_run_is_refused_and_not_touched(kind, world, tmp_path):
    """Prevents a mistyped --out from overwriting a model's config.json, and advice to delete it."""
    for name, text in FOREIGN[kind].items():
        (tmp_path / name).write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="holds .*, no run of test_run; name a new") as error:
        Run(tmp_path, Settings(), world)
    assert snapshot(tmp_path) == before
    assert "remove" not in str(error.value) and "delete" not in str(error.value)


def test_an_out_that_cannot_be_made_is_one_line(world, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be written"):
            Run(out, Settings(), world)


def test_settings_that_do_not_change_the_method_may_change(world, tmp_path):
    """After running out of memory one resumes with smaller micro-batches; --val_data may come."""
    begun(tmp_path, world)
    run = Run(tmp_path, Settings(micro_tokens=5, val_data=("v",)), world)
    assert json.loads((run.out / "config.json").read_text())["micro_tokens"] == 5
    before = snapshot(tmp_path)
    with pytest.raises(
        ValueError, match=r"a run whose lr is 1.0, now 2.0 \(.*differ: lr\)"
    ) as error:
        Run(tmp_path, Settings(lr=2.0), world)
    assert "remove" not in str(error.value)
    after = snapshot(tmp_path)
    assert {k: v for k, v in after.items() if k != "lock"} == {
        k: v for k, v in before.items() if k != "lock"
    }


def test_another_spelling_of_a_path_is_the_same_setting(tmp_path, monkeypatch):
    """`--model m` today, `--model ./m` tomorrow; but another file is another setting."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).touch()
    assert _same(["a", "b"], ["./a", str(tmp_path / "b")]) and _same("gone", "gone")
    assert not _same(["a"], ["b"]) and not _same("a", "./gone") and not _same(["a"], ["a", "b"])


def test_a_start_that_did_no_step_does_not_hold_the_directory(world, tmp_path):
    """A bad --reward fails after set-up, with header, status and a step-0 evaluation written: the
    corrected command must run, and must not take that evaluation for its own."""
    run = Run(tmp_path, Settings(), world)
    run.start({}, 0, 40)
    run.log({"step": 0, "greedy": 0.5}, "eval")
    (tmp_path / "cache").mkdir()
    run = Run(tmp_path, Settings(lr=2.0), world)
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 2.0
    assert run.logged("eval") == []
    run.start({}, 0, 40)
    run.log({"step": 1})
    with pytest.raises(ValueError, match="whose lr is 2.0, now 3.0"):
        Run(tmp_path, Settings(lr=3.0), world)


def test_a_kill_within_the_very_first_write_does_not_hold_the_directory(world, tmp_path):
    """The rerun was told that --out holds other files."""
    (tmp_path / "config.json.4711.tmp").write_text('{"scr')
    Run(tmp_path, Settings(), world)


def test_rollouts_of_steps_to_come_and_what_a_kill_left_of_some_are_removed(world, tmp_path):
    """Each kill within a write left another part of a file, as it has the process in its name."""
    run, folder = Run(tmp_path, Settings(), world), tmp_path / "rollouts"
    folder.mkdir()
    for file in ("step_9.jsonl", "step_10.jsonl", "step_11.jsonl", "step_10.jsonl.4711.tmp"):
        (folder / file).touch()
    run.start({}, 10, 40)
    assert sorted(file.name for file in folder.iterdir()) == ["step_10.jsonl", "step_9.jsonl"]


def test_a_plan_may_leave_its_token_cache(world, tmp_path):
    (tmp_path / "cache").mkdir()
    Run(tmp_path, Settings(), world)


# ------------------------------------------------------------------------------------- who holds it
HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from core.run import claim
claim({out!r}, "test_run", {{}})
print("held", flush=True)
time.sleep(60)
"""


def hold(out: Path) -> subprocess.Popen:
    program = HOLD.format(root=str(ROOT), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_holds_the_directory(tmp_path):
    """Prevents two runs that mix their files: 50 rows of metrics for 40 steps."""
    first = hold(tmp_path)
    try:
        before = snapshot(tmp_path)
        with pytest.raises(
            ValueError, match=rf"in use by process {first.pid} on {os.uname().nodename};"
        ):
            claim(tmp_path, "test_run", {})
        assert snapshot(tmp_path) == before
    finally:
        first.kill()
        first.wait()
    claim(tmp_path, "test_run", {})  # a dead process holds nothing


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    assert claim(tmp_path, "test_run", {})[0] is None
    assert claim(tmp_path, "test_run", {})[0] is None, "this process's own lock"
    (tmp_path / "lock").write_text(f"process {os.getppid()} on {os.uname().nodename}\nabc\n")
    with pytest.raises(ValueError, match=f"in use by process {os.getppid()}"):
        claim(tmp_path, "test_run", {})
    (tmp_path / "lock").write_text("process 4194305 on here\nabc\n")  # above any pid: it is gone
    assert claim(tmp_path, "test_run", {})[0] is None


# ---------------------------------------------------------------------------------- how a run ends
def test_a_failure_is_written_to_the_status(world, tmp_path, monkeypatch, capsys):
    """Prevents a run that died of a full disk and says `running` ever after."""
    monkeypatch.setattr("core.run.shutdown", lambda: None)
    run = begun(tmp_path, world)
    assert (tmp_path / "status").read_text() == "running\n"
    with pytest.raises(SystemExit) as end, script():
        raise ValueError("no room\nfor step 2")
    assert end.value.code == 2 and "error: no room" in capsys.readouterr().err
    assert (tmp_path / "status").read_text() == "failed: no room\n"
    with pytest.raises(ZeroDivisionError), script():
        raise ZeroDivisionError("division by zero")
    assert (tmp_path / "status").read_text() == "failed: ZeroDivisionError division by zero\n"
    with script():
        run.finished()
    assert (tmp_path / "status").read_text() == "finished\n"


def test_a_failure_of_a_full_disk_is_written_to_the_status(world, tmp_path, monkeypatch):
    """Where no second file fits beside the old one, that one is written over."""
    run = begun(tmp_path, world)
    monkeypatch.setattr("core.files.replacing", Mock(side_effect=OSError(28, "No space left")))
    run.set_status("failed: No space left")
    assert (tmp_path / "status").read_text() == "failed: No space left\n"


@pytest.mark.parametrize(
    "body, code, said",
    [
        ("pass", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(75)", 75, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("raise KeyboardInterrupt", 130, "rerun the same command"),
    ],
)
def test_a_script_ends_with_its_code_and_its_words(body, code, said):
    """Prevents an early exit that loses last lines, a traceback, or the code schedulers read."""
    program = f"""
from core.run import run_and_exit
def main():
    print('last words')
    {body}
run_and_exit(main)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (code, "last words\n") and said in done.stderr


def test_after_an_exception_the_traceback_comes_first_and_nothing_collective(tmp_path):
    """A rank that failed alone must not wait in destroy_process_group (NCCL flushes, and may block)
    before it says why: here that call would block for ever."""
    program = """
import time
import torch.distributed as dist
from core import parallel
from core.run import run_and_exit, script
def main():
    with script():
        parallel.init("cpu")
        dist.destroy_process_group = parallel.barrier = lambda *a: time.sleep(1000)
        raise RuntimeError("rank 3 is out of memory")
run_and_exit(main)"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert done.returncode == 1 and "RuntimeError: rank 3 is out of memory" in done.stderr


def test_the_best_model_is_kept_whatever_comes_later(world, tmp_path):
    """A collapse late in a run leaves a model behind; a resumed run compares with what it keeps."""
    run, seen = begun(tmp_path, world), []

    def evaluated(run, step, score):
        training = SimpleNamespace(run=run, export=lambda folder: seen.append(step))
        whole = {"greedy": score, "low": 0.0, "high": 1.0}
        Training.log_evaluation(training, {"step": step, **whole, "tasks": {}})

    for step, score in ((0, 0.25), (10, 0.5), (20, 0.5), (30, 0.75), (40, 0.6)):
        evaluated(run, step, score)
    assert seen == [0, 10, 30]
    again = Run(tmp_path, Settings(), world)
    again.start({}, 20, 40)  # the kill took step 30 with it
    evaluated(again, 30, 0.45)
    evaluated(again, 40, 0.7)
    assert seen == [0, 10, 30, 40]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 40, "score": 0.7}


def test_exports_still_to_come_need_room_and_a_missing_one_is_made_up_for(
    world, tmp_path, monkeypatch
):
    """Counted in full again, a run that filled its disk as planned could not go on; and a kill
    between a save and the export of that step would leave a hole."""
    asked, made = [], []
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    state = {"step": 90, "bad_steps": 0, "bad_in_a_row": 0}
    monkeypatch.setattr("core.training.resume", lambda *_: state)
    monkeypatch.setattr("core.training.require_space", lambda *_, **room: asked.append(room))
    monkeypatch.setattr(
        "core.training.export_hf", lambda m, s, folder, w: folder.mkdir(parents=True)
    )
    monkeypatch.setattr("core.training.StopRequest", lambda: None)
    monkeypatch.setattr("core.training.adamw", Mock())
    monkeypatch.setattr("core.training.gc", Mock())
    options = TrainingOptions("m", ["d"], "o", export_every=10)
    options.save_every = options.lr = options.weight_decay = 0
    for _ in range(2):
        run = begun(tmp_path / "o", world)
        Training(run, options, None, source=tmp_path, total=120, data={}, best=True)
        made.append(sorted(p.name for p in (tmp_path / "o" / "exports").iterdir()))
    assert made == [["step_90"], ["step_90"]]
    sizes = [room["export_bytes"] for room in asked]
    assert sizes == [5000, 4000], "best, final, steps 90 (once), 100 and 110"


def test_the_command_in_the_header_starts_as_many_processes(monkeypatch):
    """Prevents a run of 16 GPUs whose model card says that `python` repeats it."""
    monkeypatch.setattr(sys, "argv", ["train_sft.py", "--out", "my runs/a"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert command() == f"{sys.executable} train_sft.py --out 'my runs/a'"
    found = dict(TORCHELASTIC_RUN_ID="x", GROUP_WORLD_SIZE="1", LOCAL_WORLD_SIZE="8")
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    assert command() == "torchrun --nproc_per_node=8 train_sft.py --out 'my runs/a'"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert command().startswith("torchrun --nnodes=2 --nproc_per_node=8 train_sft.py")


def test_time_left_is_in_the_log_without_a_terminal(world, tmp_path, monkeypatch, capsys):
    """Under a scheduler there is no progress bar: the step line says how long it will take."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    run = Run(tmp_path, Settings(), world)
    run.start({}, 2, 42)
    clock[0] += 90
    run.log_step({"step": 3}, "step 3/42 | loss 1")
    clock[0] += 70  # 160 s for two steps
    run.log_step({"step": 4}, "step 4/42 | loss 1")
    run.log_step({"step": 42}, "last")
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 3/42 | loss 1 | 0:58:30 left, until ")
    assert second.startswith("step 4/42 | loss 1 | 0:50:40 left, until ")
    assert last == "last" and [r["step"] for r in run.logged("metrics")] == [3, 4, 42]


def test_an_evaluation_is_printed_by_data_set_with_its_interval():
    score = {"n": 4, "greedy": 0.5, "low": 0.25, "high": 0.75}
    assert describe_evaluation({"step": 2, **score, "tasks": {"text": score}}).splitlines() == [
        "step 2 | n 4 | greedy 0.500 [0.250, 0.750]",
        "  text | n 4 | greedy 0.500 [0.250, 0.750]",
    ]
