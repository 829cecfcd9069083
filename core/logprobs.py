"""Log-probabilities of given tokens from hidden states, without ever holding all logits.

    logprobs, entropies = ChunkedLogProbs.apply(hidden, weight, targets, 1.0, False, None, rows)

At V = 152,064 the fp32 logits of a stream of 16,384 tokens would take 10 GB, their gradient too.
Trainer and sampler both score with `head_logits`.

Shapes: R rows (token positions that are asked for), C hidden size, V vocabulary.
"""

from __future__ import annotations

import torch


def rows_of_logits(weight: torch.Tensor) -> int:
    """Rows of one chunk, for a head weight (V, C).

    4,096 on a GPU (2.5 GB of fp32 logits at V = 152,064; large matmuls run best). 32 MB on a CPU,
    where larger blocks miss the cache and fresh pages cost more than the arithmetic.
    """
    return 4096 if weight.is_cuda else max(16, 2**23 // len(weight))


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with an fp32 result that was never rounded to bf16. Call it without a graph: on CUDA
    `mm(out_dtype=…)` has no gradient, and `ChunkedLogProbs` computes its own."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: float, banned_ids: torch.Tensor | None
) -> torch.Tensor:
    """hidden (R, C), weight (V, C) → fp32 logits / temperature (R, V).

    Banned ids get -1e30: probability exactly 0, and no NaN in 0 · log 0.
    """
    logits = matmul_fp32(hidden, weight.t())
    if temperature != 1.0:
        logits = logits.div_(temperature)
    if banned_ids is not None:
        logits = logits.index_fill_(1, banned_ids, -1e30)
    return logits


class ChunkedLogProbs(torch.autograd.Function):
    """Log-probabilities (and entropies) of targets, whose logits exist for `chunk` rows at a time.

    They are computed again in backward. The head's weight gradient is summed over chunks in fp32
    (in bf16 its error would grow from 2e-3 to 5e-3 over 32 chunks). Equals log_softmax + gather.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, with_entropy, banned_ids, chunk):
        """hidden (R, C), weight (V, C), targets (R,) → logprobs (R,) and entropies (R,), fp32;
        entropies are zeros unless asked for."""
        logprobs = torch.zeros(len(targets), device=hidden.device)
        entropies = torch.zeros_like(logprobs)
        lse = torch.zeros_like(logprobs)
        for i in range(0, len(targets), chunk):
            s = slice(i, i + chunk)
            logits = head_logits(hidden[s], weight, temperature, banned_ids)  # (chunk, V)
            lse[s] = logits.logsumexp(-1)
            logprobs[s] = logits.gather(1, targets[s, None]).squeeze(1) - lse[s]
            if with_entropy:
                p = (logits - lse[s, None]).exp_()
                entropies[s] = lse[s] - p.mul_(logits).sum(-1)  # H = lse - E[logit]
                del p
            del logits  # else it lives on beside the next chunk's
        ctx.save_for_backward(hidden, weight, targets, lse, entropies)
        ctx.options = temperature, with_entropy, banned_ids, chunk
        ctx.set_materialize_grads(False)  # None, not zeros, where no loss depends on an output
        return logprobs, entropies

    @staticmethod
    def backward(ctx, d_logprobs, d_entropies):
        hidden, weight, targets, lse, entropies = ctx.saved_tensors
        temperature, with_entropy, banned_ids, chunk = ctx.options
        with_entropy = with_entropy and d_entropies is not None
        d_logprobs = torch.zeros_like(lse) if d_logprobs is None else d_logprobs
        d_hidden, d_weight = torch.zeros_like(hidden), None
        if ctx.needs_input_grad[1]:  # with LoRA it is not: 2.2 GB at the 7B
            d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for i in range(0, len(targets), chunk):
            s = slice(i, i + chunk)
            # ∂logp[y]/∂z = onehot(y) - p;  ∂H/∂z = -p (log p + H)
            # in place, since a chunk of logits is the largest tensor
            logp = head_logits(hidden[s], weight, temperature, banned_ids)  # (chunk, V)
            logp.sub_(lse[s, None])
            if with_entropy:
                p = logp.exp()
                d_logits = logp.add_(entropies[s, None]).mul_(d_entropies[s, None])
                d_logits.add_(d_logprobs[s, None]).mul_(p).neg_()
                del p
            else:
                d_logits = logp.exp_().mul_(-d_logprobs[s, None])
            d_logits.scatter_add_(1, targets[s, None], d_logprobs[s, None])
            d_logits = d_logits.div_(temperature).to(hidden.dtype)
            d_hidden[s] = d_logits @ weight
            if d_weight is not None:
                add_weight_gradient(d_weight, d_logits, hidden[s])
            del logp, d_logits
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, *[None] * 5


def add_weight_gradient(total: torch.Tensor, d_logits: torch.Tensor, hidden: torch.Tensor) -> None:
    """total (V, C) fp32 += d_logitsᵀ (V, R) @ hidden (R, C), in fp32 for any inputs."""
    if hidden.dtype == torch.float32:
        total.addmm_(d_logits.t(), hidden)
    else:
        total += matmul_fp32(d_logits.t(), hidden)
