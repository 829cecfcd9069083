"""Several real processes: one gradient for any ranks, gathered weights, sharded states.

Processes are dear to start, so each number of ranks is started once: `on_two_ranks` and
`on_four_ranks` do everything that needs them and write what they saw, the tests read it."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from test_model import load
from tiny_model import make_tiny_vl

from data import Batch

LENGTHS = [
    23,
    5,
    41,
    1,
    17,
    30,
    8,
    12,
]  # documents; document 3 has one token, so nothing to predict


def documents():
    g = torch.Generator().manual_seed(7)
    out = []
    for n in LENGTHS:
        tokens = torch.randint(0, 290, (n,), generator=g)
        targets = tokens.roll(-1)
        targets[-1] = -100
        targets[: n // 3] = -100  # an unsupervised prompt
        out.append((tokens, targets))
    return out


def batch(docs):
    """A packed stream of (tokens, targets) documents."""
    lengths = [len(t) for t, _ in docs]
    return Batch.of(
        torch.cat([t for t, _ in docs]),
        torch.cat([y for _, y in docs]),
        torch.cat([torch.arange(n) for n in lengths]).expand(3, -1),
        torch.tensor([0, *lengths]).cumsum(0).int(),
    )


def whole(tensor):
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_gradients(model):
    return {n: whole(p.grad) for n, p in model.named_parameters()}


def one_step(world, model_dir, micro, naive=False, replicas=1):
    """All documents over world.size ranks × `micro` micro-batches (empty ones where they run out) →
    gradients, loss sum, norm. naive: each rank divides by its own token count, the mistake that
    these tests must notice."""
    from core.parallel import all_sum, grad_norm
    from data import collate
    from model import build_model
    from train_sft import accumulate_gradients

    model = build_model(model_dir, world, replicas=replicas)
    docs = documents()
    pieces = [docs[i :: world.size * micro] for i in range(world.size * micro)]
    mine = [batch(p) if p else collate([]) for p in pieces[world.rank :: world.size]]
    supervised = sum(int((y != -100).sum()) for _, y in docs)
    if naive:
        supervised = max(1, sum(int((b.targets != -100).sum()) for b in mine)) * world.size
    loss = accumulate_gradients(model, mine, supervised, world)
    return whole_gradients(model), all_sum(loss)[0], float(grad_norm(model))


def bf16_steps(world, model_dir):
    """The local weights of every rank after three steps with bf16 moments on 2 × 2 ranks."""
    from core.optim import adamw, guarded_step
    from core.parallel import all_gather_objects
    from model import build_model
    from train_sft import accumulate_gradients

    model = build_model(model_dir, world, replicas=2)
    optimizer = adamw(model, lr=1e-2, weight_decay=0.0, state_dtype=torch.bfloat16)
    for _ in range(3):
        accumulate_gradients(model, [batch(documents())], 100, world)
        guarded_step(model, optimizer, lr=1e-2, max_norm=1.0, loss=1.0)
    mine = torch.cat([p.to_local().detach().flatten() for p in model.parameters()])
    return all_gather_objects(mine)


def gather_twice(world, model_dir):
    """Ranks run different numbers of forwards inside `gathered`, train, gather again → both
    logits."""
    from core.optim import adamw, guarded_step
    from core.parallel import gathered
    from model import build_model
    from train_sft import accumulate_gradients

    model = build_model(model_dir, world)
    optimizer = adamw(model, lr=1e-2, weight_decay=0.0)
    b = batch(documents())
    read = []
    for _ in range(2):
        with torch.no_grad(), gathered(model):
            assert all(type(p) is torch.nn.Parameter for p in model.parameters())
            for _ in range(1 + 3 * world.rank):
                logits = model(b.tokens, b.position_ids, b.cu_seqlens)
            read.append(logits)
        loss = accumulate_gradients(model, [b], 100, world)
        guarded_step(model, optimizer, lr=1e-2, max_norm=1.0, loss=loss)
    return read


def dtypes_in_bf16(world, model_dir):
    from core.parallel import gathered
    from model import build_model
    from train_sft import accumulate_gradients

    model = build_model(model_dir, world, compute_dtype=torch.bfloat16)
    accumulate_gradients(model, [batch(documents())], 100, world)
    with gathered(model):
        compute = {p.dtype for p in model.parameters()}
    return (
        {p.grad.dtype for p in model.parameters()},
        {p.dtype for p in model.parameters()},
        compute,
    )


def train_from_newest(world, model_dir, root, save=False):
    """Three steps, or what is left of them after the newest whole checkpoint → (where it began,
    weights at the end)."""
    from core.checkpoint import load_state, newest_state, save_state
    from core.optim import adamw, guarded_step
    from model import build_model
    from train_sft import accumulate_gradients

    model = build_model(model_dir, world)
    optimizer = adamw(model, lr=1e-2, weight_decay=0.0)
    folder = newest_state(root, world)
    at = load_state(folder, model, optimizer)["step"] if folder else 0
    for step in range(at, 3):
        loss = accumulate_gradients(
            model, [batch(documents()[world.rank :: world.size])], 100, world
        )
        guarded_step(model, optimizer, lr=1e-2, max_norm=1.0, loss=loss)
        if save:
            save_state(root, step + 1, model, optimizer, {"step": step + 1}, world, keep_last=2)
    return at, {n: whole(p.detach()) for n, p in model.named_parameters()}


def cut_one_byte(file):
    file.write_bytes(file.read_bytes()[:-1])


def export_after_training(world, model_dir, folder):
    """What OUT/final would be after step_3."""
    from core.checkpoint import load_state
    from core.optim import adamw
    from core.weights import export_hf
    from model import build_model

    model = build_model(model_dir, world)
    load_state(folder / "ck" / "step_3", model, adamw(model, lr=1e-2, weight_decay=0.0))
    export_hf(model, model_dir, folder / "final", world)


def on_two_ranks(world, model_dir, folder):
    from core.parallel import barrier

    seen = {f"gradient_{micro}": one_step(world, model_dir, micro) for micro in (1, 2)}
    seen["naive"] = one_step(world, model_dir, 1, naive=True)
    seen["gathered"] = gather_twice(world, model_dir)
    seen["dtypes"] = dtypes_in_bf16(world, model_dir)
    seen["trained"] = train_from_newest(world, model_dir, folder / "ck", save=True)
    export_after_training(world, model_dir, folder)
    if world.is_main:
        shutil.copytree(folder / "ck", folder / "cut")
        cut_one_byte(next((folder / "cut" / "step_3").glob("__1_*.distcp")))
    barrier()
    seen["fell_back"] = train_from_newest(world, model_dir, folder / "cut")
    if world.is_main:
        torch.save(seen, folder / "seen.pt")


def on_four_ranks(world, model_dir, folder):
    seen = {f"gradient_{micro}": one_step(world, model_dir, micro) for micro in (1, 4)}
    seen["hsdp"] = one_step(world, model_dir, 1, replicas=2)
    seen["replicas"] = bf16_steps(world, model_dir)
    if world.is_main:
        torch.save(seen, folder / "seen.pt")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_vl(tmp_path_factory.mktemp("m"), tied=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory, model_dir):
    folder = tmp_path_factory.mktemp("two")
    run_ranks(2, on_two_ranks, model_dir, folder)
    return SimpleNamespace(folder=folder, **torch.load(folder / "seen.pt"))


@pytest.fixture(scope="module")
def four(tmp_path_factory, model_dir):
    folder = tmp_path_factory.mktemp("four")
    run_ranks(4, on_four_ranks, model_dir, folder)
    return SimpleNamespace(**torch.load(folder / "seen.pt"))


@pytest.fixture(scope="module")
def single(model_dir):
    """The gradient of plain autograd on one stream, without FSDP."""
    model = load(model_dir)
    b = batch(documents())
    count = int((b.targets != -100).sum())
    loss = -model(b.tokens, b.position_ids, b.cu_seqlens, targets=b.targets)[0].sum()
    (loss / count).backward()
    return whole_gradients(model), loss.item()


def distance(a, b):
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-8)).item() for n in b)


def assert_same_step(result, single):
    grads, loss, norm = result
    assert distance(grads, single[0]) <= 1e-6
    assert abs(loss - single[1]) <= 1e-6 * abs(single[1])
    exact = torch.stack([g.norm() for g in single[0].values()]).norm().item()
    assert (
        abs(norm - exact) <= 1e-6 * exact
    )  # the norm that clipping uses is the single process' own


@pytest.mark.parametrize("micro", [1, 4])
def test_one_rank_gives_the_gradient_of_plain_autograd(world, model_dir, single, micro):
    assert_same_step(one_step(world, model_dir, micro), single)


@pytest.mark.parametrize("micro", [1, 2])
def test_two_ranks_give_the_same_gradient(two, single, micro):
    assert_same_step(vars(two)[f"gradient_{micro}"], single)


@pytest.mark.parametrize("micro", [1, 4])
def test_four_ranks_give_the_same_gradient(four, single, micro):
    """With 4 micro-batches each there are more than documents: some ranks run empty ones, one holds
    only document 3."""
    assert_same_step(vars(four)[f"gradient_{micro}"], single)


def test_hsdp_gives_the_same_gradient(four, single):
    """2 × 2: sharded in pairs, replicated over pairs; a missing reduction over replicas would
    show."""
    assert_same_step(four.hsdp, single)


def test_replicas_stay_equal_with_bf16_moments(four):
    """Ranks 0 and 2 hold the same shards, as do 1 and 3. Rounded by other random numbers, they
    would part, each replica training a model of its own."""
    zero, one, two, three = four.replicas
    assert torch.equal(zero, two) and torch.equal(one, three)


def test_a_mean_of_per_rank_means_is_noticed(two, single):
    """The power of the tests above: the usual mistake is off by far more than their tolerance."""
    assert distance(two.naive[0], single[0]) > 0.05


def test_gathered_weights_allow_unequal_forwards_and_are_fresh_after_a_step(two, model_dir):
    """Under FSDP a forward is a collective: ranks that decode different lengths would hang. The
    second gathering must see the updated weights."""
    first, second = two.gathered
    b = batch(documents())
    assert (first - load(model_dir)(b.tokens, b.position_ids, b.cu_seqlens)).abs().max() <= 1e-5
    assert (first - second).abs().max() > 1e-2


def test_bf16_compute_keeps_fp32_weights_and_fp32_gradients(two):
    """bf16 master weights at lr 1e-6 would leave 98% of the weights unchanged by a step."""
    grads, weights, compute = two.dtypes
    assert grads == weights == {torch.float32} and compute == {torch.bfloat16}


def test_a_state_of_two_ranks_is_read_by_one(two, world, model_dir):
    """Sharded over 2, read by 1, bit for bit; only keep_last checkpoints are left."""
    assert sorted(p.name for p in (two.folder / "ck").iterdir()) == ["step_2", "step_3"]
    at, weights = train_from_newest(world, model_dir, two.folder / "ck")
    assert at == 3 and all(torch.equal(weights[n], w) for n, w in two.trained[1].items())


def test_a_truncated_newest_checkpoint_is_passed_over(two, world, model_dir):
    """One byte less in step 3, in the file of rank 1 alone: both ranks resume from step 2, and step
    3 done again is the same bit for bit. Without its marker step 2 does not count either."""
    at, weights = two.fell_back
    assert at == 2 and all(torch.equal(weights[n], w) for n, w in two.trained[1].items())
    (two.folder / "cut" / "step_2" / "complete.json").unlink()
    assert train_from_newest(world, model_dir, two.folder / "cut")[0] == 0


def test_the_marker_lists_every_file(two):
    """A file that it does not list could be truncated unnoticed."""
    folder = two.folder / "ck" / "step_3"
    listed = set(json.loads((folder / "complete.json").read_text())["files"])
    assert listed == {p.name for p in folder.iterdir()} - {"complete.json"}


# ------------------------------------------------------------------------------------- tools.export
def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_a_checkpoint_of_two_ranks_is_exported_by_one_process(two, model_dir, tmp_path, capsys):
    """Byte for byte what the two ranks exported: names, dtypes, what was not trained, tokenizer."""
    from tools.export import main

    run = tmp_path / "run"
    shutil.copytree(two.folder / "ck", run / "checkpoints")
    (run / "header.json").write_text(json.dumps({"model": str(model_dir)}))
    settings = dict(lora_rank=0, lora_alpha=32, lora_targets="all-linear", adapter="")
    (run / "config.json").write_text(json.dumps({**settings, "train_vision": False}))
    main([str(run / "checkpoints" / "step_3"), "--out", str(tmp_path / "a" / "hf")])
    assert files(tmp_path / "a" / "hf") == files(two.folder / "final")
    main(
        [
            str(run / "checkpoints" / "step_2"),
            "--out",
            str(tmp_path / "two"),
            "--model",
            str(model_dir),
        ]
    )
    assert files(tmp_path / "two").keys() == files(two.folder / "final").keys()
    assert files(tmp_path / "two") != files(two.folder / "final")
    (run / "header.json").unlink()
    for arguments, words in (
        (
            [str(run / "checkpoints" / "step_3"), "--out", str(tmp_path / "b")],
            "name a checkpoint in its",
        ),
        (
            [str(run / "checkpoints" / "step_9"), "--out", str(tmp_path / "b")],
            "not a whole checkpoint",
        ),
        ([str(run / "checkpoints" / "step_3"), "--out", str(run)], "is not empty; name a new"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_cuda_is_refused_in_a_sentence_where_there_is_none(monkeypatch):
    """--device cuda on a machine without GPU, or more processes than GPUs: not a traceback."""
    from core import parallel

    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match="--device cuda: process 0 of this machine has no GPU"):
        parallel.init("cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 .* torch sees 2; start fewer processes"):
        parallel.init("cuda")
