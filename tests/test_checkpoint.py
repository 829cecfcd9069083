"""Which training states are kept, and what damage to them is noticed."""

import shutil

import pytest
import torch
from test_model import text_stream

from core.checkpoint import load_state, newest_state, save_state
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


def test_a_torn_newer_state_does_not_push_out_the_good_one(training, world, tmp_path):
    """keep_last 1, newest torn, the run goes on from the older: its next save must survive, the torn one not."""
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


@pytest.mark.parametrize("damage", ["gone", "shorter", "marker gone", "marker torn"])
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
