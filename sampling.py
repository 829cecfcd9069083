"""How one token is chosen: counter-based random numbers, inverse-CDF sampling, and the forced exit from thinking.

    u = uniform(sample_key(seed, prompt_id, sample_index), position)     # depends on these four numbers alone
    token, lse = sample_token(logits, u, top_k=0, top_p=1.0)
    SamplingParams(think_budget=3500, **think_exit(tokenizer, vocab_size))

Functions of tensors; no generator, no value that the host must read. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

# --------------------------------------------------------------------------------------- random numbers, sampling
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def sample_key(seed: int, prompt_id: int, sample_index: int) -> int:
    """A signed 64-bit number for one sample, by splitmix64 over the three numbers."""
    x = 0
    for number in (seed, prompt_id, sample_index):
        x = (x + number + _GOLDEN) % (1 << 64)
        x = (x ^ x >> 30) * _MIX1 % (1 << 64)
        x = (x ^ x >> 27) * _MIX2 % (1 << 64)
        x ^= x >> 31
    return _signed(x)


def uniform(key: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """(B,) int64 keys and positions → (B,) fp32 in (0, 1), the same on every device: splitmix64 at `position`."""

    def shifted(x, bits):  # logical shift right: torch's own carries the sign along
        return (x >> bits) & ((1 << 64 - bits) - 1)

    x = key + (position + 1) * _signed(_GOLDEN)
    x = (x ^ shifted(x, 30)) * _signed(_MIX1)
    x = (x ^ shifted(x, 27)) * _signed(_MIX2)
    x = x ^ shifted(x, 31)
    return (
        shifted(x, 41).float() * 2.0**-23 + 2.0**-24
    )  # 23 bits, so that neither 0 nor 1 comes out


def sample_token(
    logits: torch.Tensor, u: torch.Tensor, top_k: int, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, V) fp32, u (B,) in (0, 1) → tokens (B,) by inverse CDF, and logsumexp(logits) (B,).

    Token i is taken when u · total lies in [cdf[i-1], cdf[i]): one random number a row, and an id of probability 0,
    whose interval is empty, is never taken. Overwrites nothing of the caller's.
    """
    top = logits.amax(-1, keepdim=True)
    p = (logits - top).exp_()  # (B, V), unnormalised
    lse = (top + p.sum(-1, keepdim=True).log()).squeeze(1)
    if top_k or top_p < 1:
        p = truncate(p, top_k, top_p)
    cdf = p.cumsum(-1)
    total = cdf[:, -1:]
    at = torch.minimum(
        u[:, None] * total, total.nextafter(torch.zeros_like(total))
    )  # rounding must not reach the end
    token = torch.searchsorted(cdf, at, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    if (
        p.is_cuda
    ):  # a parallel scan is monotone up to rounding only, which could let an impossible id through
        token = torch.where(p.gather(1, token[:, None]).squeeze(1) > 0, token, p.argmax(-1))
    return token, lse


def truncate(p: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Zero all but the top_k largest of each row of p (B, V), then all beyond the smallest set that holds a share top_p
    of what is left; the most probable token always stays."""
    if top_k and top_k < p.shape[1]:
        p = p.masked_fill(p < p.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        ordered, index = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of all more probable tokens
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0)
        p = torch.zeros_like(p).scatter_(1, index, ordered)
    return p


# -------------------------------------------------------------------------------------------------- forced exit
def think_exit(
    tokenizer, vocab_size: int, text: str = "</think>\n", close: str = "</think>"
) -> dict:
    """What SamplingParams needs for a forced exit: {"exit_tokens": ids of `text`, "close_table": finder of `close`}.
    The newline stands where training data have it; in Qwen's vocabulary it belongs to the last token of the close."""
    pieces = [tokenizer.decode([i]) for i in range(min(len(tokenizer), vocab_size))]
    pieces += [""] * (vocab_size - len(pieces))
    return {
        "exit_tokens": tokenizer.encode(text, add_special_tokens=False),
        "close_table": close_table(pieces, close),
    }


def close_table(pieces: list[str], close: str) -> torch.Tensor:
    """(len(close) + 1, V) uint8: how many characters of `close` stand at the end of the text after each token, given
    how many stood there before. The last state is for good: closed.

    `</think>` is several tokens, and which ones depends on its neighbours (" </" and ">\\n" are tokens of their own),
    so it is followed as text. For close "</t>", pieces ["</", "t", ">\\n", "a"]: from state 0 "</" leads to 2,
    from 2 "t" to 3, from 3 ">\\n" to 4 (closed); "a" leads back to 0 from everywhere but 4.
    """

    def advance(state: int, piece: str) -> int:
        text = close[:state] + piece
        if close in text:
            return len(close)
        return next(k for k in range(len(close) - 1, -1, -1) if text.endswith(close[:k]))

    table = torch.zeros(len(close) + 1, len(pieces), dtype=torch.uint8)
    letters = set(close)
    for i, piece in enumerate(pieces):
        if not piece:  # says nothing: the state stays
            table[:, i] = torch.arange(len(close) + 1)
        elif (
            piece[-1] in letters or piece[0] in letters
        ):  # no other piece can lead anywhere but to 0
            table[:, i] = torch.tensor([advance(s, piece) for s in range(len(close) + 1)])
        elif close in piece:
            table[:, i] = len(close)
    table[-1] = len(close)
    return table


def force_exit(
    s: SimpleNamespace, token: torch.Tensor, p: SimpleNamespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace sampled tokens (B,) by the exit's where thinking is over its budget → (tokens, which are forced (B,)).

    Thinking is everything until the close has been written, whether prompt or completion opened it. The exit waits
    while the model is closing by itself: each token must bring the close further, so it waits len(close) - 1 tokens
    at most. After the exit `answer_budget` tokens are left.
    """
    starts = (
        (s.count >= p.think_budget)
        & (s.close < p.closed)
        & (s.hold == 0)
        & (s.exit_at < 0)
        & (s.done == 0)
    )
    s.exit_at.copy_(torch.where(starts, s.count, s.exit_at))
    if p.answer_budget is not None:
        s.limit.copy_(torch.where(starts, s.count + len(p.exit) + p.answer_budget, s.limit))
    place = s.count - s.exit_at
    forced = (s.exit_at >= 0) & (place < len(p.exit))
    token = torch.where(forced, p.exit[place.clamp(0, len(p.exit) - 1)], token)
    close = p.close_table[s.close, token].long()
    s.hold.copy_((close > s.close) & (close < p.closed))
    s.close.copy_(close)
    return token, forced
