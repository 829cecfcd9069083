"""The samples being decoded, a KV slot each, and the forced end of a thought that is too long.

Shapes: B running samples, S slots, L layers, C hidden size, Hkv KV heads, D head size,
V vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Sequence

import torch
import torch.nn.functional as F

from core.plan import GIB, kv_bytes


@dataclass
class Slots:
    """The samples being decoded, one a slot. `first(B)` gives views of slots 0 … B-1."""

    state: torch.Tensor  # (9, S) int64, by name below
    kv: torch.Tensor | None = None  # (2, L, S, capacity, Hkv, D)
    hidden: torch.Tensor | None = None  # (S, C) of the last token, after the final norm
    tokens: torch.Tensor | None = None  # (S, capacity + 1); finished rows write to the last column
    logprobs: torch.Tensor | None = None  # (S, capacity + 1) fp32
    groups: torch.Tensor | None = None  # (7, S + 1) int32, see `group`

    def __post_init__(self):
        (
            self.length,  # tokens whose KV is cached
            self.rope_delta,  # M-RoPE: position of a new token - its index
            self.count,  # tokens of the completion so far
            self.limit,  # the most it may have
            self.matched,  # characters of the thought's close at the end of the text
            self.closing,  # 1: the last token added to them
            self.exit_at,  # token at which the forced exit began, -1: none
            self.done,  # 1: ended or empty; the row runs along and changes nothing
            self.key,  # of its random numbers
        ) = self.state.unbind(0)

    @classmethod
    def allocate(cls, slots: int, capacity: int, c, dtype, device: torch.device) -> Slots:
        size = (2, c.num_hidden_layers, slots, capacity, c.num_key_value_heads, c.head_dim)
        if device.type == "cpu":  # same dimensions, but each head contiguous: SDPA is faster
            size = (*size[:3], size[4], size[3], size[5])
        kv = torch.zeros(size, dtype=dtype, device=device)  # a masked NaN would still do: 0 · NaN
        state = torch.zeros(9, slots, dtype=torch.int64, device=device)
        hidden = torch.zeros(slots, c.hidden_size, dtype=dtype, device=device)
        logprobs = torch.zeros(slots, capacity + 1, device=device)
        kv = kv.transpose(3, 4) if device.type == "cpu" else kv
        groups = torch.zeros(7, slots + 1, dtype=torch.int32, device=device)
        return cls(state, kv, hidden, logprobs.long(), logprobs, groups)

    def first(self, rows: int) -> Slots:
        tensors = [t[:rows] for t in (self.hidden, self.tokens, self.logprobs)]
        state, groups = self.state[:, :rows], self.groups[:, : rows + 1]
        return Slots(state, self.kv[:, :, :rows], *tensors, groups)

    def start(self, slots: list[int], lengths, deltas, limit: int, keys) -> None:
        """Set the state of new samples whose KV and hidden state are in place."""
        zero, limits, no_exit = ([x] * len(slots) for x in (0, limit, -1))
        values = [lengths, deltas, zero, limits, zero, zero, no_exit, zero, keys]
        self.state[:, slots] = torch.tensor(values, device=self.state.device)

    def free(self, slot: int, length: int) -> None:
        """Zero what a sample of `length` cached tokens wrote: the next must see no trace of it,
        above all no NaN. The row goes on writing at position 0, which every prompt overwrites."""
        self.kv[:, :, slot, : length + 1] = 0
        self.length[slot] = 0
        self.done[slot] = 1

    def group(self, running: list[tuple[int, int]], c) -> None:
        """Tell attention which slots hold the same prompt, for a decode step that reads it once.
        running: (prompt, its tokens) of slots 0, 1, …; the others are empty. c: the configuration.

        `order` lists the slots with samples of a prompt side by side. In it, the first slot of a
        prompt begins a sequence of queries, over that slot's copy of the prompt; the sequences of
        the others are empty. Slots of prompts A, B, A and none: order 0 2 1 3, edges 0 2 2 3 4,
        times the query heads that read a KV head.
        """
        slots, capacity = self.kv.shape[2:4]
        last = max((prompt for prompt, _ in running), default=0)
        running = running + [(last + 1 + i, 0) for i in range(slots - len(running))]
        prompt, shared = torch.tensor(running).unbind(1)
        prompt, order = prompt.sort(stable=True)
        ends = torch.searchsorted(prompt, prompt, right=True)
        rows = [
            order * capacity,  # in the flat cache: where a sequence's prompt begins
            torch.arange(slots) * capacity + shared,  # by slot: where the sample's own tokens begin
            shared[order],  # how many tokens a sequence's prompt has
            order,
            order.argsort(),  # by slot: its index in `order`
            shared,  # by slot
        ]
        edges = ends * (c.num_attention_heads // c.num_key_value_heads)
        rows = [F.pad(edges, (1, 0)), *(F.pad(row, (0, 1)) for row in rows)]
        self.groups.copy_(torch.stack(rows))

    def move(self, source: int, target: int, length: int, count: int) -> None:
        """A running sample with `length` cached and `count` new tokens into a free slot."""
        self.kv[:, :, target, :length] = self.kv[:, :, source, :length]
        for t in (self.tokens, self.logprobs):
            t[target, :count] = t[source, :count]
        self.hidden[target] = self.hidden[source]
        self.state[:, target] = self.state[:, source]
        self.free(source, length)


def prefill_bytes(c, tokens: int, compute_bytes: int) -> int:
    """Bytes that prefilling a pack of this many tokens takes for a moment: its KV and that of the
    pack before, whose last samples may wait; tensors of the MLP, of attention and of the residual.
    The 7B in bf16, 16,384 tokens: 4.1 GiB."""
    sizes = 3 * c.intermediate_size + 6 * c.hidden_size
    return tokens * (2 * kv_bytes(c, compute_bytes) + compute_bytes * sizes)


def number_of_slots(
    wanted: int | None, kv_gb: float | None, capacity: int, prefill_tokens: int, c, dtype, device
) -> int:
    """How many slots to allocate: those wanted, else as many as the KV memory holds, at most 256 on
    CUDA and 64 on CPU. Raises ValueError where not even those wanted, or one, would fit.

    On CUDA the KV memory is, unless kv_gb is given, what is free but for a prefill of
    `prefill_tokens`, 2 GiB (recorded graphs, workspaces of matrix products) and 5 % (a step's
    logits, the allocator's loss). The cache itself is one tensor, which fragments nothing.
    """
    cuda = device.type == "cuda"
    slot_bytes = kv_bytes(c, dtype.itemsize) * capacity
    budget = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if kv_gb is not None:
        budget = kv_gb * 1e9
    elif cuda:
        torch.cuda.empty_cache()
        budget = 0.95 * torch.cuda.mem_get_info(device)[0] - 2 * GIB
        budget -= prefill_bytes(c, prefill_tokens, dtype.itemsize)
    fitting, least = max(0, int(budget / slot_bytes)), wanted or 1
    if least > fitting:
        raise ValueError(
            f"{least} slot(s) of {capacity} tokens take {least * slot_bytes / 1e9:.3g} GB of KV "
            f"cache; {fitting} would fit in {max(0, budget) / 1e9:.3g} GB. Lower --slots or "
            "--max_new_tokens, or raise --kv_gb"
        )
    return wanted or min(fitting, 256 if cuda else 64)


# -------------------------------------------------------------------------------- forced exit
@dataclass(frozen=True)
class ForcedExit:
    """End a thought that is still open after `budget` sampled tokens (from_tokenizer builds it)."""

    budget: int
    tokens: Sequence[int] | torch.Tensor  # what is inserted
    close_table: torch.Tensor = field(repr=False)  # finds the model's own close in its tokens
    answer_budget: int | None = None  # tokens left for the answer; None: up to max_new_tokens

    @classmethod
    def from_tokenizer(
        cls, tokenizer, vocab_size: int, budget: int, answer_budget: int | None = None
    ) -> ForcedExit:
        """Inserts "</think>" and the newline that training data have behind it: in Qwen's
        vocabulary the newline belongs to the last token of the close."""
        pieces = [tokenizer.decode([i]) for i in range(min(len(tokenizer), vocab_size))]
        pieces += [""] * (vocab_size - len(pieces))
        tokens = tokenizer.encode("</think>\n", add_special_tokens=False)
        return cls(budget, tokens, close_table(pieces, "</think>"), answer_budget)


def close_table(pieces: list[str], close: str) -> torch.Tensor:
    """(len(close) + 1, V) uint8: characters of `close` at the end of the text after each token,
    given how many there were before it. The last state, closed, is final.

    `</think>` is several tokens, and which ones depends on its neighbours (" </" and ">\\n" are
    tokens of their own), so it is followed as text. For close "</t>" and pieces "</", "t", ">\\n",
    "a": from state 0 "</" leads to 2, "t" then to 3, ">\\n" then to 4 (closed); "a" leads to 0.
    """

    def advance(state: int, piece: str) -> int:
        text = close[:state] + piece
        if close in text:
            return len(close)
        return next(k for k in range(len(close) - 1, -1, -1) if text.endswith(close[:k]))

    table = torch.zeros(len(close) + 1, len(pieces), dtype=torch.uint8)
    for i, piece in enumerate(pieces):
        if not piece:  # says nothing: the state stays
            table[:, i] = torch.arange(len(close) + 1)
        elif piece[-1] in close or piece[0] in close or close in piece:  # all others lead to 0
            table[:, i] = torch.tensor([advance(s, piece) for s in range(len(close) + 1)])
    table[-1] = len(close)
    return table


def force_exit(
    s: Slots, token: torch.Tensor, exit: ForcedExit
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace sampled tokens (B,) where thinking is over its budget → (tokens, inserted (B,) bool).

    Thinking lasts until the close has been written, whether prompt or completion opened it. The
    exit waits while the model is closing by itself: each token must bring the close further, so it
    waits for len(close) - 1 tokens at most. After the exit `answer_budget` tokens are left.
    """
    closed, inserted = len(exit.close_table) - 1, len(exit.tokens)
    is_open = (s.matched < closed) & (s.closing == 0) & (s.exit_at < 0) & (s.done == 0)
    starts = (s.count >= exit.budget) & is_open
    s.exit_at.copy_(torch.where(starts, s.count, s.exit_at))
    if exit.answer_budget is not None:
        s.limit.copy_(torch.where(starts, s.count + inserted + exit.answer_budget, s.limit))
    index = s.count - s.exit_at
    forced = (s.exit_at >= 0) & (index < inserted)
    token = torch.where(forced, exit.tokens[index.clamp(0, inserted - 1)], token)
    matched = exit.close_table[s.matched, token].long()
    s.closing.copy_((matched > s.matched) & (matched < closed))
    s.matched.copy_(matched)
    return token, forced


def exit_positions(
    completions: Sequence[Sequence[int]], unfinished: Sequence[bool], exit: ForcedExit
) -> list[int | None]:
    """Where a forced exit would have begun in stored completions (evaluation's budget curve): index
    of its first token, or None where the thought was closed before.

    unfinished: the completion was cut at its end, where an exit may still begin. "a b c d", budget
    2, never closed → 2; "a </think> c d" → None; "a" that ended by itself → None.
    """
    lengths = torch.tensor([len(c) for c in completions])
    tokens = torch.zeros(len(lengths), int(lengths.max()) + 1, dtype=torch.int64)
    for row, c in zip(tokens, completions):
        row[: len(c)] = torch.as_tensor(c)
    ends, s = torch.tensor(unfinished), Slots(torch.zeros(9, len(lengths), dtype=torch.int64))
    s.exit_at.fill_(-1)
    exit = replace(exit, tokens=torch.as_tensor(exit.tokens), answer_budget=None)
    for t in range(tokens.shape[1]):
        s.count.fill_(t)
        s.done.copy_((t > lengths) | ((t == lengths) & ~ends))
        s.closing.masked_fill_(t >= lengths, 0)  # it was cut while closing: nothing to wait for
        force_exit(s, tokens[:, t], exit)
    return [None if at < 0 else at for at in s.exit_at.tolist()]
