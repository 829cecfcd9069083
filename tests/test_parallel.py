"""Several real processes: one gradient whatever the ranks and micro-batches, gathered weights, sharded states."""
import json
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from test_model import load
from tiny_model import make_tiny_vl

LENGTHS = [23, 5, 41, 1, 17, 30, 8, 12]  # documents; document 3 has one token, so nothing to predict


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
    return SimpleNamespace(tokens=torch.cat([t for t, _ in docs]), targets=torch.cat([y for _, y in docs]),
                           position_ids=torch.cat([torch.arange(n) for n in lengths]).expand(3, -1),
                           cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(), pixel_values=None, grid_thw=None)


def whole_gradients(model):
    from torch.distributed.tensor import DTensor
    return {n: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad) for n, p in model.named_parameters()}


def step_on_ranks(world, model_dir, micro, naive, out):
    """All documents over world.size ranks × `micro` micro-batches (empty ones where they run out); rank 0 writes the
    gradient. naive: each rank divides by its own token count, the mistake that this test must notice."""
    from checkpoint import build_model
    from optim import grad_norm
    from train_sft import accumulate_gradients, empty_batch
    model = build_model(model_dir, world)
    docs = documents()
    pieces = [docs[i::world.size * micro] for i in range(world.size * micro)]
    mine = [batch(p) if p else empty_batch() for p in pieces[world.rank::world.size]]
    supervised = sum(int((y != -100).sum()) for _, y in docs)
    if naive:
        supervised = max(1, sum(int((b.targets != -100).sum()) for b in mine)) * world.size
    loss = accumulate_gradients(model, mine, supervised, world)
    from parallel import all_sum
    result = whole_gradients(model), all_sum(loss)[0], float(grad_norm(model))
    if world.is_main:
        torch.save(result, out)


def gradient(tmp_path, model_dir, size, micro, naive=False):
    out = tmp_path / f"{size}_{micro}_{naive}.pt"
    run_ranks(size, step_on_ranks, model_dir, micro, naive, out)
    return torch.load(out)


def distance(a, b):
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-8)).item() for n in b)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_vl(tmp_path_factory.mktemp("m"), tied=True)


@pytest.fixture(scope="module")
def single(model_dir):
    """The gradient of plain autograd on one stream, without FSDP."""
    model = load(model_dir)
    b = batch(documents())
    count = int((b.targets != -100).sum())
    loss = -model(b.tokens, b.position_ids, b.cu_seqlens, targets=b.targets)[0].sum()
    (loss / count).backward()
    return whole_gradients(model), loss.item()


@pytest.mark.parametrize("size, micro", [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 4)])
def test_one_gradient_for_any_ranks_and_micro_batches(tmp_path, model_dir, single, size, micro):
    """(4, 4) has more micro-batches than documents: some ranks run empty ones, and one holds only document 3."""
    grads, loss, norm = gradient(tmp_path, model_dir, size, micro)
    assert distance(grads, single[0]) <= 1e-6
    assert abs(loss - single[1]) <= 1e-6 * abs(single[1])
    exact = torch.stack([g.norm() for g in single[0].values()]).norm().item()
    assert abs(norm - exact) <= 1e-6 * exact  # the norm that clipping uses is the single process' own


def test_a_mean_of_per_rank_means_is_noticed(tmp_path, model_dir, single):
    """The power of the test above: the usual mistake is off by far more than its tolerance."""
    assert distance(gradient(tmp_path, model_dir, 2, 1, naive=True)[0], single[0]) > 0.05


def hsdp_on_ranks(world, model_dir, out):
    from checkpoint import build_model
    from train_sft import accumulate_gradients
    model = build_model(model_dir, world, replicas=2)
    docs = documents()
    accumulate_gradients(model, [batch(docs[world.rank::4])], sum(int((y != -100).sum()) for _, y in docs), world)
    grads = whole_gradients(model)
    if world.is_main:
        torch.save(grads, out)


def test_hsdp_gives_the_same_gradient(tmp_path, model_dir, single):
    run_ranks(4, hsdp_on_ranks, model_dir, tmp_path / "g.pt")
    assert distance(torch.load(tmp_path / "g.pt"), single[0]) <= 1e-6


def gather_on_ranks(world, model_dir, out):
    """Ranks run different numbers of forwards inside `gathered`, train, and gather again."""
    from checkpoint import build_model
    from optim import adamw, guarded_step
    from parallel import gathered
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
    if world.is_main:
        torch.save(read, out)


def test_gathered_weights_allow_unequal_forwards_and_are_fresh_after_a_step(tmp_path, model_dir):
    """Under FSDP a forward is a collective: ranks that decode different lengths would hang. The second gathering must
    see the updated weights."""
    run_ranks(2, gather_on_ranks, model_dir, tmp_path / "r.pt")
    first, second = torch.load(tmp_path / "r.pt")
    b = batch(documents())
    assert (first - load(model_dir)(b.tokens, b.position_ids, b.cu_seqlens)).abs().max() <= 1e-5
    assert (first - second).abs().max() > 1e-2


def mixed_on_ranks(world, model_dir, out):
    from checkpoint import build_model
    from parallel import gathered
    from train_sft import accumulate_gradients
    model = build_model(model_dir, world, compute_dtype=torch.bfloat16)
    accumulate_gradients(model, [batch(documents())], 100, world)
    grads = {p.grad.dtype for p in model.parameters()}
    masters = {p.dtype for p in model.parameters()}
    with gathered(model):
        compute = {p.dtype for p in model.parameters()}
    if world.is_main:
        torch.save((grads, masters, compute), out)


def test_bf16_compute_keeps_fp32_masters_and_fp32_gradients(tmp_path, model_dir):
    """bf16 masters at lr 1e-6 would leave 98% of the weights unchanged by a step."""
    run_ranks(2, mixed_on_ranks, model_dir, tmp_path / "d.pt")
    grads, masters, compute = torch.load(tmp_path / "d.pt")
    assert grads == masters == {torch.float32} and compute == {torch.bfloat16}


def save_on_ranks(world, model_dir, root):
    from checkpoint import build_model, save_state
    from optim import adamw, guarded_step
    from train_sft import accumulate_gradients
    model = build_model(model_dir, world)
    optimizer = adamw(model, lr=1e-2, weight_decay=0.0)
    for step in (1, 2, 3):
        loss = accumulate_gradients(model, [batch(documents())], 100, world)
        guarded_step(model, optimizer, lr=1e-2, max_norm=1.0, loss=loss)
        save_state(root, step, model, optimizer, {"step": step}, world, keep_last=2)


def resume_on_ranks(world, model_dir, root, out):
    from checkpoint import build_model, load_state, newest_state
    from optim import adamw, guarded_step
    from train_sft import accumulate_gradients
    model = build_model(model_dir, world)
    optimizer = adamw(model, lr=1e-2, weight_decay=0.0)
    folder = newest_state(root, world)
    at = load_state(folder, model, optimizer)["step"] if folder else 0
    for _ in range(at, 3):
        loss = accumulate_gradients(model, [batch(documents())], 100, world)
        guarded_step(model, optimizer, lr=1e-2, max_norm=1.0, loss=loss)
    from torch.distributed.tensor import DTensor
    whole = {n: p.detach().full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    if world.is_main:
        torch.save((at, whole), out)


def test_state_at_another_number_of_ranks_and_behind_torn_checkpoints(tmp_path, model_dir):
    """Saved by 2 ranks, read by 1; a newest checkpoint without its marker, or with a torn file, is passed over."""
    root = tmp_path / "ck"
    run_ranks(2, save_on_ranks, model_dir, root)
    assert sorted(p.name for p in root.iterdir()) == ["step_2", "step_3"]  # keep_last
    run_ranks(1, resume_on_ranks, model_dir, root, tmp_path / "whole.pt")
    at, expected = torch.load(tmp_path / "whole.pt")
    assert at == 3
    shard = next((root / "step_3").glob("__1_*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1  # one flipped bit
    shard.write_bytes(data)
    run_ranks(2, resume_on_ranks, model_dir, root, tmp_path / "fell_back.pt")
    at, again = torch.load(tmp_path / "fell_back.pt")
    assert at == 2 and all(torch.equal(again[n], expected[n]) for n in expected)  # step 3 done again, bit for bit
    (root / "step_2" / "complete.json").unlink()
    run_ranks(1, resume_on_ranks, model_dir, root, tmp_path / "from_start.pt")
    assert torch.load(tmp_path / "from_start.pt")[0] == 0


def test_the_marker_lists_every_file(tmp_path, model_dir):
    run_ranks(2, save_on_ranks, model_dir, tmp_path / "ck")
    folder = tmp_path / "ck" / "step_3"
    listed = set(json.loads((folder / "complete.json").read_text())["files"])
    assert listed == {p.name for p in folder.iterdir()} - {"complete.json"}
