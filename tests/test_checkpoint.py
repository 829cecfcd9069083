"""Which training states are kept, and what damage to them is noticed."""

import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_model import text_stream

from core.checkpoint import load_state, newest_state, require_space, resume, save_state, state_bytes
from core.lora import LoRA
from core.optim import adamw, guarded_step
from model import build_model


@pytest.fixture
def training(tiny_vl, world):
    model = build_model(tiny_vl, world)
    return model, adamw(model, lr=1e-2, weight_decay=0.0)


def steps_in(root):
    return sorted(int(p.name[5:]) for p in root.iterdir())


def test_the_last_k_states_are_kept(training, world, tmp_path):
    for step in (1, 2, 3, 10):
        save_state(tmp_path, step, *training, {"step": step}, world, keep_last=2)
    assert steps_in(tmp_path) == [3, 10]
    assert load_state(newest_state(tmp_path, world), *training) == {"step": 10}


def test_a_truncated_newer_state_does_not_push_out_the_good_one(training, world, tmp_path):
    """keep_last 1, the newest truncated, the run resumes from the older: its next save survives,
    the truncated one does not."""
    save_state(tmp_path, 5, *training, {}, world, keep_last=2)
    save_state(tmp_path, 10, *training, {}, world, keep_last=2)
    next((tmp_path / "step_10").glob("*.distcp")).write_bytes(b"")
    assert newest_state(tmp_path, world).name == "step_5"
    save_state(tmp_path, 7, *training, {}, world, keep_last=1)
    assert steps_in(tmp_path) == [7] and newest_state(tmp_path, world).name == "step_7"


def test_what_a_kill_left_half_written_is_no_state_and_is_cleared(training, world, tmp_path):
    save_state(tmp_path, 1, *training, {}, world)
    shutil.copytree(tmp_path / "step_1", tmp_path / "step_2.tmp")
    assert newest_state(tmp_path, world).name == "step_1"
    save_state(tmp_path, 3, *training, {}, world)
    assert steps_in(tmp_path) == [1, 3]


@pytest.mark.parametrize("damage", ["gone", "shorter", "marker gone", "marker truncated"])
def test_every_damage_is_noticed(training, world, tmp_path, damage):
    """A state that loads but is wrong would be the worst: training would go on from it."""
    folder = save_state(tmp_path, 1, *training, {}, world)
    file = next(folder.glob("*.distcp")) if "marker" not in damage else folder / "complete.json"
    data = bytearray(file.read_bytes())
    if damage.endswith("gone"):
        file.unlink()
    else:
        file.write_bytes(data[:-7])
    assert newest_state(tmp_path, world) is None


def test_a_state_gives_weights_moments_and_counts_back_bit_for_bit(
    training, tiny_vl, world, tmp_path
):
    model, optimizer = training
    tokens, positions, cu = text_stream([12])
    for _ in range(2):
        (-model(tokens, positions, cu, targets=tokens)[0].sum()).backward()
        guarded_step(model, optimizer, lr=1e-2, max_norm=1.0, loss=1.0)
    save_state(tmp_path, 2, model, optimizer, {"step": 2, "bad_steps": 1}, world)
    other = build_model(tiny_vl, world)
    second = adamw(other, lr=1e-2, weight_decay=0.0)
    assert load_state(newest_state(tmp_path, world), other, second) == {"step": 2, "bad_steps": 1}
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a.full_tensor(), b.full_tensor())
        for slot in ("step", "exp_avg", "exp_avg_sq"):
            x, y = (o.state[p][slot] for o, p in ((optimizer, a), (second, b)))
            assert torch.equal(
                *(t.full_tensor() if hasattr(t, "full_tensor") else t for t in (x, y))
            )
        assert float(optimizer.state[a]["step"]) == 2


# ------------------------------------------------------------------------------- data, disk, resume
def test_a_data_file_that_changed_under_its_name_is_refused(training, world, tmp_path):
    """Another file gives another plan of rows: a resumed run would train on the wrong ones."""
    save_state(tmp_path, 4, *training, {"step": 4}, world, data={"a.jsonl": "x", "b.jsonl": "y"})
    same = {"moved/a.jsonl": "x", "b.jsonl": "y"}
    assert resume(tmp_path, *training, world, same) == {"step": 4}
    with pytest.raises(ValueError, match="--data b.jsonl has changed since .*step_4 was saved"):
        resume(tmp_path, *training, world, {"a.jsonl": "x", "b.jsonl": "z"})


def test_a_copied_checkpoint_is_resumed_from(training, world, tmp_path):
    """How to branch off a run: the copy counts until this run has a newer one of its own."""
    other, here = save_state(tmp_path / "other", 4, *training, {"step": 4}, world), tmp_path / "new"
    assert resume(here, *training, world, {}) is None
    shutil.copytree(other, here / "step_4")
    assert resume(here, *training, world, {}) == {"step": 4}
    save_state(here, 5, *training, {"step": 5}, world)
    assert resume(here, *training, world, {}) == {"step": 5}


def free_bytes(monkeypatch, n):
    monkeypatch.setattr("shutil.disk_usage", lambda p: SimpleNamespace(free=n))


def test_room_for_all_checkpoints_and_exports_is_asked_for(
    training, tiny_vl, world, tmp_path, monkeypatch
):
    size = state_bytes(*training)
    assert size == sum(12 * p.numel() + 4 for p in training[0].parameters())
    export = (tiny_vl / "model.safetensors").stat().st_size
    kept = dict(copies=3, export_bytes=export)
    free_bytes(monkeypatch, 3 * size + export)
    require_space(tmp_path / "new" / "checkpoints", *training, world, **kept)
    free_bytes(monkeypatch, 3 * size + export - 1)
    with pytest.raises(
        ValueError, match="save 3 checkpoints .* are free. Make room, lower --keep_last"
    ):
        require_space(tmp_path / "new" / "checkpoints", *training, world, **kept)
    save_state(tmp_path, 1, *training, {}, world)
    require_space(tmp_path, *training, world, **kept)  # one of the three is there


def test_a_save_that_fails_half_way_says_why_and_leaves_the_one_before(training, world, tmp_path):
    """A real failing write (a limit on file sizes): torch says `unexpected pos 704 vs 598`."""
    save_state(tmp_path, 1, *training, {}, world)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(
            ValueError, match="step_2 could not be saved: .*GB needed\\). Make room"
        ):
            save_state(tmp_path, 2, *training, {}, world)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert steps_in(tmp_path) == [1] and newest_state(tmp_path, world).name == "step_1"
    save_state(tmp_path, 2, *training, {}, world)
    assert steps_in(tmp_path) == [1, 2]


def test_a_checkpoint_with_other_trained_weights_is_a_clear_error(
    tiny_vl, training, world, tmp_path
):
    """All weights against adapters, and another rank: a traceback of torch's planner before."""
    full = save_state(tmp_path / "full", 1, *training, {}, world)
    lora = []
    for rank in (2, 4):
        model = build_model(tiny_vl, world, lora=LoRA(rank, 32.0))
        lora.append((model, adamw(model, lr=1e-2, weight_decay=0.0)))
    small = save_state(tmp_path / "small", 1, *lora[0], {}, world)
    for folder, state in ((full, lora[0]), (small, lora[1]), (small, training)):
        with pytest.raises(ValueError, match="does not fit this run .*--lora_rank"):
            load_state(folder, *state)
