"""What both trainers share of an optimizer step: AdamW, learning rate, the guarded update, moments
in bf16 or, while sampling, in host memory."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw as adamw_update

from core.parallel import grad_norm

CHUNK = 2**26  # elements that bf16 moments update at a time: 0.8 GB of fp32 copies and noise


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    state_dtype: torch.dtype = torch.float32,
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters; norms and biases (1-D) get no weight decay.

    The moments are made here, not at the first step, so that a checkpoint can be loaded into them.
    state_dtype bf16 halves them (28 GiB less at 7B on one GPU); see `step_with_bf16_moments`.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    for p in trainable:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, dtype=state_dtype),
            "exp_avg_sq": torch.zeros_like(p, dtype=state_dtype),
        }
    return optimizer


def lr_at(
    step: int,
    *,
    lr: float,
    schedule: str,
    total_steps: int,
    warmup_steps: int = 0,
    steps_per_epoch: int = 1,
) -> float:
    """Learning rate of optimizer step `step` (0-based).

    Warmup: (step + 1) / warmup_steps of lr. Then by `schedule`: epoch_decay (the paper's SFT: × 0.8
    an epoch), constant, linear or cosine (to 0 at the last step).
    epoch_decay, lr 1e-5, 10 steps an epoch: steps 0–9 1e-5, 10–19 8e-6, 20–29 6.4e-6.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    if schedule == "epoch_decay":
        return lr * 0.8 ** (step // steps_per_epoch)
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return lr * (1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def guarded_step(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    *,
    lr: float,
    max_norm: float | None,
    loss: float,
) -> tuple[float, bool]:
    """Clip and step; nothing changes when loss or gradient norm is not finite. Clears gradients.

    loss: already summed over ranks. Every rank sees the same norm, so all ranks step or none does.
    Returns (gradient norm before clipping, stepped).
    """
    norm = grad_norm(model)
    value = norm.item()  # the one wait for the GPU
    stepped = math.isfinite(value) and math.isfinite(loss)
    if stepped:
        if max_norm:
            trained = [p for p in model.parameters() if p.grad is not None]
            nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if next(iter(optimizer.state.values()))["exp_avg"].dtype == torch.bfloat16:
            step_with_bf16_moments(optimizer)
        else:
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value, stepped


@torch.no_grad()
def step_with_bf16_moments(optimizer: torch.optim.AdamW) -> None:
    """One AdamW step computed in fp32, its moments rounded to bf16 at random, up or down.

    Rounded to the nearest, v · 0.999 is v again (bf16 has 8 bits, a step of at least 0.4%): the
    second moment could only grow, and updates shrink to 0.4 of what they should be within 4,000
    steps. The noise is a function of step and shard: a resumed run repeats it, and the replicas of
    HSDP stay equal.
    """
    first, state = next(iter(optimizer.state.items()))
    shard = first.device_mesh.get_coordinate()[-1] if isinstance(first, DTensor) else 0
    generator = torch.Generator(first.device).manual_seed(1_000_003 * int(state["step"]) + shard)
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        settings = {k: group[k] for k in ("lr", "eps", "weight_decay", "amsgrad", "maximize")}
        for p in (p for p in group["params"] if p.grad is not None):
            state = optimizer.state[p]
            tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
            flat = (_local(t).view(-1).split(CHUNK) for t in tensors)
            for x, g, m, v in zip(*flat):
                wide, step = (m.float(), v.float()), state["step"].clone()
                update = ([x], [g], [wide[0]], [wide[1]], [], [step])
                adamw_update(*update, fused=True, beta1=beta1, beta2=beta2, **settings)
                for narrow, full in zip((m, v), wide):
                    narrow.copy_(round_to_bf16(full, generator))
            state["step"] += 1


def _local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def round_to_bf16(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 → one of the two bf16 neighbours, the nearer the likelier: the expectation is x.

    bf16 is the upper half of fp32's bits: 0x3F80_4000 is a quarter of the way from 0x3F80 to
    0x3F81; adding 16 random bits carries into the upper half in a quarter of all cases.
    """
    how = dict(dtype=torch.int32, device=x.device, generator=generator)
    noise = torch.randint(0, 2**16, x.shape, **how)
    return ((x.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)


class Offload:
    """AdamW's moments in host memory while sampling needs the GPU's; nothing unless `on`.

    The buffers are pinned, made once. A moment stays the same tensor, sharded or not; only its
    storage is emptied, so that all who hold it see it come back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, on: bool = True):
        self.optimizer, self.on, self.buffers, self.away = optimizer, on, [], False

    def _moments(self) -> list[torch.Tensor]:
        states = self.optimizer.state.values()
        return [_local(state[name]) for state in states for name in ("exp_avg", "exp_avg_sq")]

    @torch.no_grad()
    def to_host(self) -> None:
        if not self.on or self.away:
            return
        moments = self._moments()
        on_gpu = moments[0].is_cuda
        if not self.buffers:
            how = dict(device="cpu", pin_memory=on_gpu)
            self.buffers = [torch.empty(m.shape, dtype=m.dtype, **how) for m in moments]
        for buffer, m in zip(self.buffers, moments):
            buffer.copy_(m, non_blocking=on_gpu)
        if on_gpu:  # all copies, before their sources are freed
            torch.cuda.current_stream().synchronize()
        for m in moments:
            m.untyped_storage().resize_(0)
        self.away = True

    @torch.no_grad()
    def to_device(self) -> None:
        if self.away:
            for buffer, m in zip(self.buffers, self._moments()):
                m.untyped_storage().resize_(m.nbytes)
                m.copy_(buffer, non_blocking=m.is_cuda)
        self.away = False
