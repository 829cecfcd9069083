"""What both trainers share of an optimizer step: AdamW, learning rate, the guarded update."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from core.bf16_moments import step_with_bf16_moments
from core.parallel import grad_norm


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


class Offload:
    """AdamW's moments in host memory while sampling needs the GPU's; nothing unless `on`.

    The buffers are pinned, made once. A moment stays the same tensor, sharded or not; only its
    storage is emptied, so that all who hold it see it come back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, on: bool = True):
        self.optimizer, self.on, self.buffers, self.away = optimizer, on, [], False

    def _moments(self) -> list[torch.Tensor]:
        states = self.optimizer.state.values()
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        return [m.to_local() if isinstance(m, DTensor) else m for m in moments]

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
