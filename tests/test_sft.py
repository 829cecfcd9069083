"""train_sft.py as a user runs it: a whole run, mistakes, signals, kills, resume; and its few
functions by themselves."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from stress_resume import (
    SETTINGS,
    history,
    kill_tree,
    lines,
    rows,
    start,
    wait_for,
    weights,
    write_jsonl,
)
from tiny import make_tiny_tokenizer
from tiny_model import make_tiny_vl

import train_sft
from core.packing import repack
from core.throughput import prefetch, speed, train_flops

ROOT = Path(__file__).resolve().parent.parent
RUN = ["--steps", "8", "--save_every", "3", "--val_every", "4"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with model/, train.jsonl, val.jsonl."""
    folder = tmp_path_factory.mktemp("sft")
    make_tiny_tokenizer(make_tiny_vl(folder / "model", dtype=torch.bfloat16))
    write_jsonl(folder / "train.jsonl", rows(40, 0))
    write_jsonl(folder / "val.jsonl", rows(4, 1))
    return folder


def files(inputs):
    flags = {"model": "model", "data": "train.jsonl", "val_data": "val.jsonl"}
    return [x for name, file in flags.items() for x in (f"--{name}", str(inputs / file))]


@pytest.fixture
def sft(inputs, monkeypatch, world, capsys):
    """sft(*flags) runs the script in this process → (exit code, stdout, stderr). Its group and
    handlers stay ours."""
    monkeypatch.setattr("core.run.shutdown", lambda: None)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def run(*flags, model=inputs / "model", data=inputs / "train.jsonl"):
        given = ["--model", str(model), "--data", str(data), *SETTINGS, *map(str, flags)]
        try:
            with pytest.raises(SystemExit) as end:
                train_sft.main(given)
        finally:
            gc.enable()
            gc.unfreeze()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return (end.value.code, *capsys.readouterr())

    return run


def training_data(out):
    """The dataset of 40 rows in OUT/cache (the other one is for validation)."""
    return next(
        d for d in map(train_sft.TokenizedDataset, (out / "cache").iterdir()) if len(d) == 40
    )


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(inputs, world):
    """An uninterrupted run of 8 steps on one rank: its folder."""
    out = inputs / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.run.shutdown", lambda: None)
        with pytest.raises(SystemExit) as end:
            train_sft.main([*files(inputs), *SETTINGS, *RUN, "--out", str(out)])
    gc.enable()
    gc.unfreeze()
    assert end.value.code == 0
    return out


# -------------------------------------------------------------------------------------- a whole run
def test_a_run_leaves_what_is_promised(whole, inputs):
    """The contract of OUT: metrics, header, status, and a model that transformers loads and that
    fits better."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    log = metrics(whole)
    assert [m["step"] for m in log] == list(range(1, 9)) and log[-1]["loss"] < log[0]["loss"] - 0.5
    names = (
        "step loss learning_rate grad_norm tokens tok_per_s mfu memory_gib data_wait_s bad_steps"
    )
    assert set(names.split()) <= set(log[0])
    head = json.loads((whole / "header.json").read_text())
    assert {"command", "commit", "versions", "device", "data", "world_size"} <= set(head)
    assert (whole / "status").read_text() == "finished\n"
    assert len(list((whole / "checkpoints").iterdir())) == 2
    losses = [json.loads(line) for line in (whole / "validation.jsonl").read_text().splitlines()]
    assert [v["step"] for v in losses] == [0, 4, 8]
    assert losses[-1]["val_loss"] < losses[0]["val_loss"]
    assert (whole / "final" / "tokenizer.json").is_file()
    Qwen2_5_VLForConditionalGeneration.from_pretrained(whole / "final")


def test_text_training_leaves_the_vision_tower_byte_equal(whole, inputs):
    from safetensors.torch import load_file

    before, after = (
        load_file(next(p.glob("*.safetensors"))) for p in (inputs / "model", whole / "final")
    )
    assert before.keys() == after.keys()
    for name, old in before.items():
        assert torch.equal(old, after[name]) == name.startswith(("visual", "model.visual")), name
        assert old.dtype == after[name].dtype == torch.bfloat16


def test_first_loss_equals_transformers(whole, inputs, world):
    """The loss of step 1 is the token mean that transformers gives for the same documents, one at a
    time."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = train_sft.parse_config(
        train_sft.Config, None, ["--model", "m", "--data", "d", "--out", "o", *SETTINGS, *RUN]
    )
    data = training_data(whole)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        inputs / "model", dtype=torch.float32
    )
    total = count = 0
    for i in np.concatenate(train_sft.plan_steps(data.lengths, config)[0][0]):
        doc = data.get(i)
        labels = torch.where(
            torch.from_numpy(doc.loss_mask.copy()),
            torch.from_numpy(doc.tokens.astype(np.int64)),
            -100,
        )
        kept = int((labels[1:] != -100).sum())
        with torch.no_grad():
            out = theirs(
                input_ids=torch.from_numpy(doc.tokens.astype(np.int64))[None], labels=labels[None]
            )
        total, count = total + out.loss.item() * kept, count + kept
    assert (
        abs(metrics(whole)[0]["loss"] - total / count) <= 1e-5
        and metrics(whole)[0]["supervised_tokens"] == count
    )


def test_starting_a_finished_run_again_ends_at_once(whole, inputs, sft, monkeypatch):
    """A queue that restarts jobs must not train or export again."""
    monkeypatch.setattr(train_sft, "make_plan", None)
    before = weights(whole)
    code, said, _ = sft("--val_data", inputs / "val.jsonl", *RUN, "--out", whole)
    assert code == 0 and "finished" in said and weights(whole) == before


def test_a_finished_run_can_be_made_longer(whole, inputs, sft, tmp_path):
    shutil.copytree(whole, tmp_path / "o")
    code, said, _ = sft(
        "--val_data", inputs / "val.jsonl", *RUN, "--steps", 10, "--out", tmp_path / "o"
    )
    assert code == 0 and "resuming" in said and len(metrics(tmp_path / "o")) == 10


def test_a_run_can_branch_off_another_runs_checkpoint(whole, inputs, sft, tmp_path):
    """A copied step_N in a new --out: that step, optimizer and data position."""
    step = Path("checkpoints", "step_6")
    shutil.copytree(whole / step, tmp_path / "o" / step)
    code, said, _ = sft("--val_data", inputs / "val.jsonl", *RUN, "--out", tmp_path / "o")
    assert code == 0 and "step_6" in said and metrics(tmp_path / "o")[0]["step"] == 7
    assert weights(tmp_path / "o") == weights(whole)
    shutil.copytree(whole / step, tmp_path / "q" / step)
    code, _, error = sft(*RUN, "--steps", 5, "--out", tmp_path / "q")
    assert code == 2 and "of step 6, this run has 5: raise --steps" in error


def test_a_plan_starts_nothing_and_does_not_stand_in_the_way(sft, monkeypatch, tmp_path):
    """--plan needs no weights, leaves the token cache alone, and the run may follow in the same
    directory."""
    out = tmp_path / "o"
    with monkeypatch.context() as patch:
        patch.setattr(train_sft, "build_model", None)
        code, said, _ = sft("--plan", "--steps", 2, "--out", out)
        assert code == 0 and "each of 1 rank(s)" in said
        assert "peak" in said and "2 steps, " in said
    assert [p.name for p in out.iterdir()] == ["cache"]
    assert sft("--steps", 2, "--out", out)[0] == 0


# --------------------------------------------------------------------------- signals, kills, resume
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_says_so(
    whole, inputs, sft, monkeypatch, tmp_path, number
):
    """Exit code 75, status `stopped`, state of that very step; the same command ends as if nothing
    had been."""
    real, calls = train_sft.guarded_step, []

    def step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # in the middle of step 2
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    out = tmp_path / "o"
    monkeypatch.setattr(train_sft, "guarded_step", step)
    flags = ["--val_data", inputs / "val.jsonl", *RUN, "--out", out]
    code, said, _ = sft(*flags)
    stopped_at = len(metrics(out))
    assert code == 75 and (out / "status").read_text() == "stopped\n" and "same command" in said
    assert stopped_at in (2, 3) and (out / "checkpoints" / f"step_{stopped_at}").is_dir()
    assert sft(*flags)[0] == 0 and history(out) == history(whole) and weights(out) == weights(whole)


def test_validation_that_a_kill_prevented_is_made_up_for(whole, inputs, sft, monkeypatch, tmp_path):
    """State is saved before validating; a kill in between must not leave a hole in the curve."""
    out, real, calls = tmp_path / "o", train_sft.validation_loss, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_sft, "validation_loss", dies)
    flags = ["--val_data", inputs / "val.jsonl", *RUN, "--save_every", 2, "--out", out]
    with pytest.raises(KeyboardInterrupt):
        sft(*flags)
    assert lines(out / "validation.jsonl") == 1
    assert sft(*flags)[0] == 0 and history(out) == history(whole)


@pytest.fixture(scope="module")
def on_two_ranks(inputs):
    """Folders of two runs on two ranks under torchrun: `alone`, and `killed` in a step and in a
    save, then finished;
    `left` is a copy of what the first kill left behind."""
    if sys.platform != "linux":
        pytest.skip("finds the processes to kill in /proc")
    flags = [*files(inputs), *SETTINGS, *RUN, "--out"]
    alone, killed, left, log = (inputs / n for n in ("alone", "killed", "left", "log"))
    assert start([*flags, str(alone)], log=log).wait() == 0, log.read_text()
    moments = (
        lambda: lines(killed / "metrics.jsonl") >= 4,
        lambda: any((killed / "checkpoints").glob("step_6.tmp")),
    )
    for moment in moments:
        process = start([*flags, str(killed)], log=log)
        assert wait_for(process, moment), log.read_text()
        kill_tree(process)
        if not left.exists():
            shutil.copytree(killed, left)
    assert start([*flags, str(killed)], log=log).wait() == 0, log.read_text()
    return inputs


def test_kills_leave_no_trace(on_two_ranks):
    """Every figure and weight bit-equal to a run left alone. (tests/stress_resume.py does it at
    many random moments.)"""
    alone, killed = on_two_ranks / "alone", on_two_ranks / "killed"
    assert history(killed) == history(alone) and weights(killed) == weights(alone)


def test_one_rank_goes_on_where_two_were_killed(on_two_ranks, inputs, sft):
    """Another number of ranks: the same documents in each step, losses equal up to the order of
    sums."""
    left = on_two_ranks / "left"
    code, said, _ = sft("--val_data", inputs / "val.jsonl", *RUN, "--out", left)
    assert code == 0 and "resuming" in said
    ours, theirs = metrics(left), metrics(on_two_ranks / "alone")
    assert [(m["step"], m["learning_rate"], m["tokens"], m["supervised_tokens"]) for m in ours] == [
        (m["step"], m["learning_rate"], m["tokens"], m["supervised_tokens"]) for m in theirs
    ]
    assert np.allclose([m["loss"] for m in ours], [m["loss"] for m in theirs], rtol=1e-5)


def test_non_finite_steps_change_nothing_are_counted_and_end_the_run(
    inputs, sft, monkeypatch, tmp_path
):
    """One NaN loss: skipped, counted, the next step goes on. As many in a row as allowed: the run
    stops and says so."""
    real, calls = train_sft.accumulate_gradients, []

    def nan_at(bad):
        def accumulate(*args):
            calls.append(1)
            return real(*args) * (float("nan") if len(calls) in bad else 1.0)

        calls.clear()
        monkeypatch.setattr(train_sft, "accumulate_gradients", accumulate)

    nan_at({2})
    assert sft("--steps", 3, "--out", tmp_path / "one")[0] == 0
    log = metrics(tmp_path / "one")
    assert (
        [m["bad_steps"] for m in log] == [0, 1, 1]
        and log[1]["loss"] is None
        and log[2]["loss"] < log[0]["loss"]
    )
    nan_at({1, 2, 3})
    monkeypatch.setattr("core.training.MAX_BAD_STEPS", 2)
    code, said, error = sft("--steps", 5, "--out", tmp_path / "two")
    assert code == 2 and "not finite in 2 steps in a row" in error and "bad steps 2" in said


def test_no_tensor_waits_for_the_garbage_collector(inputs, sft, monkeypatch, tmp_path):
    """The collector is off inside the run: a reference cycle that holds a tensor would leak memory
    until a save."""
    found = []
    real = train_sft.guarded_step

    def step(*args, **kwargs):
        out = real(*args, **kwargs)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.extend(o for o in gc.garbage if isinstance(o, torch.Tensor))
        gc.set_debug(0)
        gc.garbage.clear()
        return out

    monkeypatch.setattr(train_sft, "guarded_step", step)
    assert sft("--steps", 4, "--out", tmp_path / "o")[0] == 0
    assert not found


def test_what_a_step_leaves_behind_is_collected_after_it(sft, monkeypatch, tmp_path):
    """Selective checkpointing leaves cycles without tensors, at the 7B 47,000 objects a step and
    rank: collected only when saving, they took gigabytes, and with --save_every 0 all memory."""
    left, calls, real = [], [], train_sft.accumulate_gradients

    def step(*args):
        calls.append(1)
        if len(calls) == 6:
            left.append(gc.collect())
        return real(*args)

    monkeypatch.setattr(train_sft, "accumulate_gradients", step)
    flags = "--checkpointing", "matmul", "--save_every", 0
    assert sft("--steps", 6, *flags, "--out", tmp_path / "o")[0] == 0
    print("unreachable objects after five steps:", left)
    assert left[0] < 300


# ----------------------------------------------------------------------------------------- mistakes
def conversation(content="answer", role="assistant", **more):
    question = "<image>" * len(more.get("images", [])) + "q"
    turns = [{"role": "user", "content": question}, {"role": role, "content": content}]
    return json.dumps({"messages": turns, **more})


BAD_FILES = {  # what line 2 of the data holds → words of the message
    "invalid JSON": ('{"messages": [', "not a JSON object"),
    "missing field": ('{"message": []}', "messages"),
    "wrong role": (conversation(role="bot"), "its role is none of system, user"),
    "empty assistant turn": (conversation(" "), "messages[1].content: missing or empty"),
    "image that does not exist": (conversation(images=["nowhere.png"]), "nowhere.png"),
    "unreadable image": (conversation(images=["broken.png"]), "broken.png"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_rows_are_named_before_the_model_is_built(sft, monkeypatch, tmp_path, kind):
    """File, line, field, how to fix it; exit code 2; nothing built."""
    line, words = BAD_FILES[kind]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    (tmp_path / "bad.jsonl").write_text(f"{conversation()}\n{line}\n")
    monkeypatch.setattr(train_sft, "build_model", None)
    code, _, error = sft("--out", tmp_path / "o", data=tmp_path / "bad.jsonl")
    assert (
        code == 2
        and f"{tmp_path / 'bad.jsonl'}:2" in error
        and words in error
        and "fix them" in error
    )


def test_bad_rows_are_skipped_only_when_asked_and_each_is_logged(sft, tmp_path):
    (tmp_path / "bad.jsonl").write_text(
        "\n".join([conversation()] * 3 + [c for c, _ in BAD_FILES.values()]) + "\n"
    )
    code, said, _ = sft(
        "--out", tmp_path / "o", "--steps", 1, "--skip_bad_rows", data=tmp_path / "bad.jsonl"
    )
    logged = [line for line in said.splitlines() if line.startswith("skipped ")]
    assert code == 0 and "6 bad rows skipped" in said and len(logged) == 6
    assert all(f"bad.jsonl:{number}: " in line for number, line in enumerate(logged, 4))


def test_missing_files_and_impossible_settings(sft, inputs, monkeypatch, tmp_path):
    """Also a missing validation file is noticed before the training data is tokenised."""
    monkeypatch.setattr(train_sft, "tokenize_files", None)
    for flags, words in (
        ({"data": tmp_path / "no.jsonl"}, "no.jsonl: no such file"),
        ({"model": tmp_path / "no"}, "no such"),
    ):
        code, _, error = sft("--out", tmp_path / str(len(words)), **flags)
        assert code == 2 and words in error
    for i, (flags, words) in enumerate(
        (
            (["--val_data", tmp_path / "no.jsonl"], "no such file"),
            (["--replicas", 2], "--replicas 2"),
            (["--max_len", 1024], "--pack_len 512 is below --max_len 1024"),
            (["--pack_len", 0], "--pack_len 0: must be at least"),
            (["--steps", 0], "--steps 0: must be at least 1"),
            (["--batch_tokens", 100], "--batch_tokens 100 is below --pack_len 512"),
            (["--lora_alpha", 16], "no effect without --lora_rank"),
            (["--lora_targets", "mlp"], "no effect without --lora_rank"),
            (["--lr", "1e5"], "--lr 100000.0: must be at most 1"),
            (["--micro_tokens", 100], "--micro_tokens 100 is below --max_len 256"),
            (["--warmup_ratio", 5], "--warmup_ratio 5.0: must be at most 1"),
            (["--epochs", 0], "--epochs"),
        )
    ):
        code, _, error = sft(*flags, "--out", tmp_path / f"o{i}")
        assert code == 2 and words in error, flags


def test_max_len_too_small(sft, tmp_path):
    code, _, error = sft("--max_len", 8, "--out", tmp_path / "o")
    assert code == 2 and "raise --max_len" in error


@pytest.mark.parametrize(
    "kind",
    ["no weights", "pickle", "truncated", "other architecture", "no config", "missing tensor"],
)
def test_bad_model_directories_are_named_before_tokenising(
    sft, inputs, monkeypatch, tmp_path, kind
):
    shutil.copytree(inputs / "model", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    if kind in ("no weights", "pickle"):
        file.rename(tmp_path / "m" / "pytorch_model.bin") if kind == "pickle" else file.unlink()
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "no config":
        (tmp_path / "m" / "config.json").unlink()
    elif kind == "other architecture":
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    else:
        config["text_config"]["num_hidden_layers"] += 1
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    words = {
        "no weights": "no *.safetensors",
        "pickle": "convert pickles",
        "truncated": "missing or truncated",
        "other architecture": "qwen3_vl are supported",
        "no config": "no config.json; a model directory has",
        "missing tensor": "parameters are missing",
    }[kind]
    monkeypatch.setattr(train_sft, "tokenize_files", None)
    code, _, error = sft("--out", tmp_path / "o", model=tmp_path / "m")
    assert code == 2 and words in error and str(tmp_path / "m") in error


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(sft, inputs, tmp_path):
    """Prevents an index error in the first forward pass, after all the tokenising."""
    shutil.copytree(inputs / "model", tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    word = {**tokenizer["added_tokens"][0], "special": False}
    last = max(t["id"] for t in tokenizer["added_tokens"])
    tokenizer["added_tokens"] += [
        {**word, "id": last + 1 + i, "content": f"word{i}"} for i in range(100)
    ]
    file.write_text(json.dumps(tokenizer))
    code, _, error = sft("--out", tmp_path / "o", model=tmp_path / "m")
    assert code == 2 and "vocab_size of 320" in error


def test_a_step_larger_than_the_data_is_warned_of(sft, tmp_path):
    code, said, _ = sft("--steps", 1, "--batch_tokens", 524288, "--out", tmp_path / "o")
    assert code == 0 and "warning: --batch_tokens: above the data's" in said


def test_settings_without_effect_are_warned_of(sft, inputs, tmp_path):
    same, model = inputs / "train.jsonl", tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    shutil.copy(ROOT / "toy/assets/preprocessor_config.json", model)
    flags = ["--out", tmp_path / "o", "--plan", "--train_vision", "--val_data", same]
    _, said, error = sft(*flags, model=model)
    assert not error
    assert "warning: --train_vision: no row of --data has an image" in said
    assert f"warning: --val_data {same}: is trained on too" in said


def test_data_that_changed_under_the_same_name_is_refused(sft, inputs, tmp_path):
    """Prevents: the run goes on in another plan of packs, silently. The reason is in the
    message."""
    shutil.copy(inputs / "train.jsonl", tmp_path / "d.jsonl")
    flags = ["--out", tmp_path / "o", "--save_every", 1]
    assert sft("--steps", 1, *flags, data=tmp_path / "d.jsonl")[0] == 0
    lines_now = (tmp_path / "d.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "d.jsonl").write_text("".join(lines_now[::-1]))
    code, _, error = sft("--steps", 2, *flags, data=tmp_path / "d.jsonl")
    assert code == 2 and "d.jsonl" in error and "changed" in error
    assert len(metrics(tmp_path / "o")) == 1


def test_what_leaves_the_method_alone_may_change_on_resume(sft, inputs, tmp_path):
    """After running out of memory: smaller micro-batches and more recomputation, the same steps. A
    validation set may be added. pack_len decides which documents share a step, and may not
    change."""
    for name in ("same", "other"):
        assert sft("--steps", 2, "--out", tmp_path / name)[0] == 0
    assert sft("--steps", 4, "--out", tmp_path / "same")[0] == 0
    changed = ["--micro_tokens", 256, "--checkpointing", "full", "--val_data", inputs / "val.jsonl"]
    code, said, _ = sft("--steps", 4, *changed, "--out", tmp_path / "other")
    assert code == 0 and "256 tokens a micro-batch" in said and "val_loss" in said
    for ours, theirs in zip(metrics(tmp_path / "other"), metrics(tmp_path / "same")):
        assert ours["supervised_tokens"] == theirs["supervised_tokens"]
        assert abs(ours["loss"] - theirs["loss"]) <= 1e-5 * theirs["loss"]
    code, _, error = sft("--steps", 6, "--pack_len", 1024, "--out", tmp_path / "other")
    assert code == 2 and "pack_len" in error


def test_models_are_exported_during_the_run(sft, inputs, tmp_path):
    """A run that collapses late leaves models behind; each is what a run of that length ends
    with."""
    assert sft("--steps", 3, "--export_every", 2, "--out", tmp_path / "o")[0] == 0
    assert sft("--steps", 2, "--schedule", "constant", "--out", tmp_path / "p")[0] == 0
    assert [p.name for p in (tmp_path / "o" / "exports").iterdir()] == ["step_2"]
    train_sft.check_model_dir(tmp_path / "o" / "exports" / "step_2")


def test_checkpointing_changes_no_bit_on_the_cpu(sft, tmp_path):
    """What --checkpointing auto takes on another machine must not change a run."""
    for mode in ("none", "matmul", "full"):
        assert sft("--steps", 2, "--checkpointing", mode, "--out", tmp_path / mode)[0] == 0
    assert weights(tmp_path / "none") == weights(tmp_path / "full") == weights(tmp_path / "matmul")


def test_mfu_counts_attention_of_each_pack(sft, monkeypatch, tmp_path):
    """PaLM's convention takes a stream as one document: each micro-batch, not the step over all
    ranks
    (which printed 675% where 62% was right)."""
    peak = 1e9
    monkeypatch.setattr("core.throughput.peak_flops", lambda: peak)
    assert sft("--steps", 1, "--out", tmp_path / "o")[0] == 0
    (m,) = metrics(tmp_path / "o")
    data = next(map(train_sft.TokenizedDataset, (tmp_path / "o" / "cache").iterdir()))
    settings = config(max_len=256, pack_len=512, batch_tokens=2048, steps=1)
    (packs,), _ = train_sft.plan_steps(data.lengths, settings)
    assert len(packs) == 4 and max(map(len, packs)) > 1
    shape = train_sft.ModelConfig.from_dir(tmp_path / "o" / "final")
    strict = train_flops(shape, data.lengths[np.concatenate(packs)])[0]
    palm = sum(train_flops(shape, [int(data.lengths[p].sum())])[1] for p in packs)
    assert m["mfu_palm"] / m["mfu"] == pytest.approx(palm / strict, rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 4])
def test_mfu_is_the_share_of_all_ranks_peak(inputs, monkeypatch, ranks):
    """Four ranks with equal micro-batches are as busy as one alone, not four times as busy."""
    monkeypatch.setattr("core.throughput.peak_flops", lambda: 1e12)
    shape = train_sft.ModelConfig.from_dir(inputs / "model")
    here = train_sft.World(0, ranks, 0, torch.device("cpu"))
    m = speed(shape, [np.array([100, 50])] * ranks, seconds=2.0, waited=0.0, world=here)
    assert m["mfu"] == pytest.approx(train_flops(shape, [100, 50])[0] / 2e12)
    assert m["mfu_palm"] == pytest.approx(train_flops(shape, [150])[1] / 2e12)
    assert (m["tokens"], m["tok_per_s"]) == (150 * ranks, 75.0 * ranks)


def test_a_directory_of_another_run_is_left_alone(whole, inputs, sft, tmp_path):
    """Another setting, or somebody's files: nothing is overwritten."""
    before = sorted(p.name for p in whole.iterdir())
    code, _, error = sft(*RUN, "--val_data", inputs / "val.jsonl", "--lr", 5e-4, "--out", whole)
    assert (
        code == 2
        and "a run whose lr is 0.001, now 0.0005" in error
        and sorted(p.name for p in whole.iterdir()) == before
    )
    (tmp_path / "notes.txt").write_text("mine")
    code, _, error = sft("--out", tmp_path)
    assert code == 2 and "notes.txt, no run of train_sft" in error


def test_mistakes_reach_the_shell(inputs, tmp_path):
    """The same as a user sees it: one line on stderr, no traceback, exit code 2; an unknown flag
    too."""
    for flags, words in (
        (["--data", "nowhere.jsonl"], "error: nowhere.jsonl: no such file"),
        (["--data", "d", "--learning_rate", "1"], "unknown option --learning_rate"),
    ):
        command = [sys.executable, ROOT / "train_sft.py", "--model", inputs / "model", *flags]
        done = subprocess.run(
            [*command, "--out", tmp_path / "o"], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit):
        train_sft.parse_config(train_sft.Config, train_sft.__doc__, ["--help"])
    said = capsys.readouterr().out
    assert all(
        f"--{field.name} " in said and len(field.metadata["help"]) > 10
        for field in fields(train_sft.Config)
    )


# -------------------------------------------------------------------------------- its few functions
def config(**changes):
    plain = dict(model="m", data=["d"], out="o", max_len=100, pack_len=300, batch_tokens=900)
    return train_sft.Config(**plain | changes)


def test_a_plan_has_every_document_once_an_epoch_and_is_pure():
    """What a step trains on depends on nothing but lengths, seed and budgets: that is what resume
    rests on."""
    lengths = np.random.default_rng(0).integers(1, 100, 200)
    steps, steps_per_epoch = train_sft.plan_steps(lengths, config(epochs=3))
    assert len(steps) == 3 * steps_per_epoch
    for epoch in range(3):
        packs = [
            p
            for step in steps[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch]
            for p in step
        ]
        assert sorted(np.concatenate(packs)) == list(range(200)) and all(
            lengths[p].sum() <= 300 for p in packs
        )
    again, _ = train_sft.plan_steps(lengths, config(steps=len(steps) - 1))
    assert all(np.array_equal(np.concatenate(a), np.concatenate(b)) for a, b in zip(again, steps))
    assert not all(
        np.array_equal(np.concatenate(a), np.concatenate(b))
        for a, b in zip(steps, train_sft.plan_steps(lengths, config(epochs=3, seed=1))[0])
    )


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_tokens", [512, 256])
def test_ranks_share_a_step_without_overlap(whole, size, micro_tokens):
    """Any number of ranks, any size of micro-batches: all documents of the step exactly once,
    equally
    many micro-batches on each, none too large."""
    data = training_data(whole)
    settings = config(max_len=256, pack_len=512, batch_tokens=2048)
    step = train_sft.plan_steps(data.lengths, settings)[0][0]
    packs = [repack(data.lengths, step, micro_tokens)]
    assert (len(packs[0]) > len(step)) == (micro_tokens < 512)
    worlds = [train_sft.World(r, size, r, torch.device("cpu")) for r in range(size)]
    shares = [train_sft.my_batches(data, packs, w, None, 0) for w in worlds]
    assert len({len(s) for s in shares}) == 1
    assert all(len(b.tokens) <= micro_tokens for share in shares for b in share)
    seen = sorted(
        tuple(b.tokens[a:z].tolist())
        for s in shares
        for b in s
        for a, z in zip(b.cu_seqlens[:-1], b.cu_seqlens[1:])
        if z - a > 1
    )
    assert seen == sorted(tuple(data.get(i).tokens.tolist()) for i in np.concatenate(step))


def test_batches_are_made_ahead_and_in_order(world):
    """The next step's data is being made while this one computes; an error in it reaches the main
    thread."""
    made = []

    def make(step):
        made.append(step)
        if step == 3:
            raise ValueError("step 3")
        return [torch.tensor(step)]

    steps = prefetch(make, range(1, 5), world.device)
    assert next(steps)[:2] == (1, [torch.tensor(1)])
    deadline = time.monotonic() + 10
    while made != [1, 2] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made == [1, 2] and next(steps)[:2] == (2, [torch.tensor(2)])
    with pytest.raises(ValueError, match="step 3"):
        next(steps)
