"""AdamW with moments in bf16: computed in fp32, rounded at random so that the mean is right."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

CHUNK = 2**26  # elements updated at a time: 0.8 GB of fp32 copies and noise


@torch.no_grad()
def step_with_bf16_moments(optimizer: torch.optim.AdamW) -> None:
    """One AdamW step, its moments rounded to bf16 at random, up or down.

    Rounded to the nearest, v · 0.999 is v again (bf16 has 8 bits, a step of at least 0.4%): the
    second moment could only grow, and updates shrink to 0.4 of what they should be within 4,000
    steps. The noise is a function of step and shard: a resumed run repeats it, and the replicas of
    HSDP stay equal.
    """
    count = int(next(iter(optimizer.state.values()))["step"])
    generators: dict[torch.device, torch.Generator] = {}
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        settings = {k: group[k] for k in ("lr", "eps", "weight_decay", "amsgrad", "maximize")}
        for p in (p for p in group["params"] if p.grad is not None):
            state = optimizer.state[p]
            shard = p.device_mesh.get_coordinate()[-1] if isinstance(p, DTensor) else 0
            tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
            flat = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
            for x, g, m, v in zip(*(t.view(-1).split(CHUNK) for t in flat)):
                wide, step = (m.float(), v.float()), state["step"].clone()
                update = ([x], [g], [wide[0]], [wide[1]], [], [step])
                adamw(*update, fused=True, beta1=beta1, beta2=beta2, **settings)
                if x.device not in generators:
                    seed = 1_000_003 * count + shard
                    generators[x.device] = torch.Generator(x.device).manual_seed(seed)
                for narrow, full in zip((m, v), wide):
                    narrow.copy_(round_to_bf16(full, generators[x.device]))
            state["step"] += 1


def round_to_bf16(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 → one of the two bf16 neighbours, the nearer the likelier: the expectation is x.

    bf16 is the upper half of fp32's bits: 0x3F80_4000 is a quarter of the way from 0x3F80 to
    0x3F81; adding 16 random bits carries into the upper half in a quarter of all cases.
    """
    noise = torch.randint(
        0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator
    )
    return ((x.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)
