"""KV-cached batched generation: prompts → completions with log-probabilities, in one process.

    sampler = Sampler(model, max_len=6144)  # slots=…, kv_gb=…, or what is free
    params = SamplingParams(n=8, max_new_tokens=4096, stop_ids=stop_token_ids(tokenizer))
    completions = sampler.generate(prompts, params)

Two slots, three samples; • marks a stop token:

    step   slot 0   slot 1
    1      A  a1    B  b1•   A and B start from copies of their prompts' KV
    2      A  a2    C  c1    B is handed out and can be graded; C takes over its slot
    3      A  a3•   C  c2
    4      C  c3             nobody waits: C, the last running sample, moves into the hole
    5      C  c4•            the batch is always slots 0 … B-1, so a CUDA graph can replay it

1. A prompt is prefilled once, packed with others; each of its n samples copies its KV. On a GPU,
   attention then reads a long prompt once for all its samples (`samples_sharing`).
2. A token's random number depends on (seed, sample id, position) and nothing else. Neither slots,
   refills nor ranks change what is sampled, up to the rounding of matrix products of other sizes
   and, on a GPU, of attention to prompts.
3. Log-probabilities are the trainer's: `model.head_logits`, fp32, after temperature, before top-p.
4. Forced exit: the paper (arXiv 2505.03981, section 2.1) stops at a length, appends `</think>` and
   generates again; here the tokens are inserted in place, one a step, and never trained on.

Read `generate`, then `Scheduler`, `prefill` and `decode_step`.

Shapes: B running samples, S slots, L layers, C hidden size, Hq / Hkv heads, D head size,
V vocabulary, P prompt tokens, T tokens of packed prompts.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Callable, Sequence

import numpy as np
import torch
from tqdm import tqdm

from core.attention import HALF, attend
from core.decode_kernels import Graphs, as_one_kernel, decode_attend, exp_and_sum, plan_attention
from core.decode_weights import DecodeWeights
from core.random_numbers import sample_key, uniform
from core.samples import sampled_mask
from core.slots import ForcedExit, Slots, force_exit, number_of_slots
from core.vision import mrope_positions
from model import Model, head_logits, rope_cos_sin


@dataclass(frozen=True)
class SamplingParams:
    """How to continue every prompt of a call."""

    n: int = 1  # samples a prompt
    temperature: float = 1.0  # 0: greedy; its log-probabilities are those at temperature 1
    top_p: float = 1.0  # evaluation only: training must sample from what it scores
    max_new_tokens: int = 1024  # inserted tokens count
    stop_ids: Sequence[int] | torch.Tensor = ()  # the stop token is part of the completion
    seed: int = 0
    forced_exit: ForcedExit | None = None

    def __post_init__(self):
        if min(self.n, self.max_new_tokens) < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"{self}: n and max_new_tokens start at 1, temperature at 0; top_p is in (0, 1]"
            )
        if (exit := self.forced_exit) is not None:
            # an exit can be delayed while the model is closing, a token a character at most
            after = len(exit.close_table) - 1 + len(exit.tokens) + (exit.answer_budget or 1)
            if not 0 <= exit.budget <= self.max_new_tokens - after:
                raise ValueError(
                    f"think_budget {exit.budget} with max_new_tokens {self.max_new_tokens}: exit "
                    f"and answer take up to {after} more; lower think_budget (--think_budget 0: "
                    f"none), or raise max_new_tokens to {exit.budget + after}"
                )

    def on(self, device: torch.device) -> SamplingParams:
        """The same with lists as tensors on `device`; None for no stop ids."""
        exit, stop = self.forced_exit, list(self.stop_ids)
        if exit is not None:
            tokens = torch.as_tensor(exit.tokens, device=device)
            exit = replace(exit, tokens=tokens, close_table=exit.close_table.to(device))
        stop = torch.as_tensor(stop, device=device) if stop else None
        return replace(self, stop_ids=stop, forced_exit=exit)


@dataclass
class Completion:
    """A sample of a prompt; tokens and what follows are filled in when it ends."""

    prompt_index: int
    sample_index: int
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)  # the stop token included
    logprobs: np.ndarray | None = None  # (len(tokens),) fp32, of inserted tokens too
    finish_reason: str = ""  # stop | length | forced+stop | forced+length
    forced_at: int | None = None  # index of the first inserted token
    forced_tokens: int = 0

    @property
    def mask(self) -> np.ndarray:
        """(len(tokens),) bool: True sampled, False inserted."""
        return sampled_mask(len(self.tokens), self.forced_at, self.forced_tokens)


# -------------------------------------------------------------------------- sampling one token
def sample_token(
    logits: torch.Tensor, u: torch.Tensor, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, V) fp32, u (B,) in (0, 1) → tokens by inverse CDF, logsumexp(logits), both (B,).

    Token i is taken when u · total lies in [cdf[i-1], cdf[i]): an id of probability 0 never is.
    """
    cuda = logits.is_cuda
    top, best = logits.max(-1, True) if cuda else (logits.amax(-1, True), None)  # (B, 1)
    p, mass = as_one_kernel(exp_and_sum, logits, top)  # (B, V), unnormalised; (B, 1)
    lse = (top + mass.log()).squeeze(1)
    cdf = (nucleus(p, top_p) if top_p < 1 else p).cumsum(-1)
    total = cdf[:, -1:]
    at = torch.minimum(u[:, None] * total, total.nextafter(torch.zeros_like(total)))
    token = torch.searchsorted(cdf, at, right=True).clamp_(max=logits.shape[1] - 1)
    if cuda:  # a parallel scan is monotone up to rounding only: an impossible id could get through
        token = torch.where(p.gather(1, token) > 0, token, best)
    return token.squeeze(1), lse


def nucleus(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """p (B, V) with zeros beyond the smallest set of ids that holds a share top_p of each row; the
    most probable id always stays."""
    ordered, index = p.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # mass of all more probable ids
    ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0)
    return torch.zeros_like(p).scatter_(1, index, ordered)


def sample_next_token(s: Slots, model: Model, p: SamplingParams) -> torch.Tensor:
    """The next token (B,) of every row from its hidden state; records it, its log-probability, and
    whether it ends the sample. p: from `SamplingParams.on`."""
    temperature = p.temperature or 1.0
    logits = head_logits(s.hidden, model.head_weight(), temperature, model.banned_ids)  # (B, V)
    if p.temperature == 0:
        token, lse = logits.argmax(-1), logits.logsumexp(-1)
    else:
        token, lse = sample_token(logits, as_one_kernel(uniform, s.key, s.count), p.top_p)
    forced = None
    if p.forced_exit is not None:
        token, forced = force_exit(s, token, p.forced_exit)
    logprob = logits.gather(1, token[:, None]).squeeze(1) - lse
    rows = torch.arange(len(token), device=token.device)
    column = torch.where(s.done > 0, s.tokens.shape[1] - 1, s.count)
    s.tokens.index_put_((rows, column), token)
    s.logprobs.index_put_((rows, column), logprob)
    s.count += 1 - s.done
    ended = s.count >= s.limit
    if p.stop_ids is not None:
        stopped = (token[:, None] == p.stop_ids).any(1)
        ended |= stopped if forced is None else stopped & ~forced
    s.done |= ended
    return token


# ------------------------------------------------------------------------- prefill, decode step
def positions_of(prompt, c) -> tuple[torch.Tensor, int]:
    """A `data.Prompt`'s positions (3, P), and those of later tokens less their index."""
    if prompt.grid_thw is None:
        return torch.arange(len(prompt.tokens)).expand(3, -1), 0
    ids = dict(image_token_id=c.image_token_id, merge_size=c.vision.spatial_merge_size)
    return mrope_positions(torch.as_tensor(prompt.tokens), prompt.grid_thw, **ids)


def prefill(model: Model, prompts: Sequence) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Prompts packed into one stream → for each its KV (2, L, P, Hkv, D), its last hidden state
    (C,) after the final norm, and its rope delta (see `Slots`)."""
    c, decoder, device = model.config, model.model, model.head_weight().device
    tokens = torch.cat([torch.as_tensor(p.tokens) for p in prompts])  # (T,)
    positions, deltas = zip(*(positions_of(p, c) for p in prompts))
    ends = torch.tensor([0, *(len(p.tokens) for p in prompts)]).cumsum(0).int()
    longest, cu = int(ends.diff().max()), ends.to(device)
    seen = [(p.pixel_values, p.grid_thw) for p in prompts if p.pixel_values is not None]
    images = [torch.cat(tensors) for tensors in zip(*seen)]
    x, deepstack = model.embed(tokens.to(device), *images)  # (T, C)
    cos, sin = rope_cos_sin(torch.cat(positions, dim=1).to(device), c)
    kv = x.new_empty(2, len(decoder.layers), len(tokens), c.num_key_value_heads, c.head_dim)
    for i, layer in enumerate(decoder.layers):

        def attn(q, k, v, i=i):
            kv[0, i], kv[1, i] = k, v
            return attend(q, k, v, cu, longest, causal=True)

        x = layer.run(x, cos, sin, attn)
        if i < len(deepstack):
            x = x.index_add(0, *deepstack[i])
    last = decoder.norm(x[cu[1:].long() - 1])  # (prompts, C)
    return list(zip(kv.split(ends.diff().tolist(), dim=2), last, deltas))


def decode_step(
    model: Model,
    angles: tuple[torch.Tensor, torch.Tensor],
    s: Slots,
    p: SamplingParams,
    bounds: list[int] | None = None,
    sharing: int = 0,
) -> None:
    """One token for every row of `s`, in place. The host reads no value: a CUDA graph can hold it.
    angles: cos and sin by position, (max_len, D/2) each; bounds: see `plan_attention`. sharing: the
    most samples a prompt in `s.groups`, 0: each reads its own copy."""
    x = model.model.embed_tokens(sample_next_token(s, model, p))  # (B, C)
    cos, sin = (a[s.length + s.rope_delta] for a in angles)  # new tokens are text: one position
    plan = plan_attention(s.length, s.kv.shape[3], bounds, s.groups, sharing)
    rows = torch.arange(len(x), device=x.device)
    for layer, keys, values in zip(model.model.layers, *s.kv):  # (B, capacity, Hkv, D) each

        def attn(q, k, v, keys=keys, values=values):
            keys.index_put_((rows, s.length), k)
            values.index_put_((rows, s.length), v)
            return decode_attend(q, keys, values, plan)

        x = layer.run(x, cos, sin, attn)
    s.hidden.copy_(model.model.norm(x))
    s.length += 1 - s.done


# ---------------------------------------------------------------------------------- one call
class Scheduler:
    """The samples of one call: which wait, and which runs in which slot."""

    def __init__(self, slots: Slots, usable: int, prompts, params: SamplingParams, ids, indices):
        """usable: how many slots hold samples. ids, indices: see `generate`."""
        self.slots, self.usable = slots, usable
        self.prompts, self.params, self.ids = prompts, params, ids
        self.ends = np.cumsum([0, *(len(p.tokens) for p in prompts)])  # of prompts laid end to end
        self.waiting = deque((i, j) for i in range(len(prompts)) for j in indices)
        self.prefilled: dict[int, tuple] = {}  # prompt → what `prefill` returns for it
        self.running: list[Completion | None] = []  # by slot; None: just ended
        self.lengths: list[int] = []  # by slot: cached tokens, or more after its end
        self.stop_ids = {int(i) for i in params.stop_ids}

    def admit(self, model: Model, prefill_tokens: int, sharing: bool) -> None:
        """Start waiting samples in free slots, then close the holes that are left. Prompts are
        prefilled in packs of up to `prefill_tokens`. sharing: attention reads them together."""
        s, p, running, new = self.slots, self.params, self.running, []
        free = [i for i, c in enumerate(running) if c is None]
        free += range(len(running), self.usable)
        for slot in free[: len(self.waiting)]:
            prompt, sample = self.waiting.popleft()
            if prompt not in self.prefilled:
                fitting = np.searchsorted(self.ends, self.ends[prompt] + prefill_tokens, "right")
                pack = self.prompts[prompt : max(prompt + 1, int(fitting) - 1)]
                self.prefilled |= enumerate(prefill(model, pack), prompt)
            kv, hidden, delta = self.prefilled[prompt]
            if not self.waiting or self.waiting[0][0] != prompt:  # the last to need it
                del self.prefilled[prompt]
            length = kv.shape[2]
            s.kv[:, :, slot, :length], s.hidden[slot] = kv, hidden
            new.append((slot, length, delta, sample_key(p.seed, self.ids[prompt], sample)))
            running[slot : slot + 1] = [Completion(prompt, sample, length)]
            self.lengths[slot : slot + 1] = [length]
        if new:
            slots, lengths, deltas, keys = (list(x) for x in zip(*new))
            s.start(slots, lengths, deltas, p.max_new_tokens, keys)
        while None in running:
            hole, last, length = running.index(None), running.pop(), self.lengths.pop()
            if last is not None:
                s.move(len(running), hole, length, length - last.prompt_tokens)
                running[hole], self.lengths[hole] = last, length
        if sharing:
            s.group([(c.prompt_index, c.prompt_tokens) for c in running], model.config)

    def collect(self) -> list[Completion]:
        """Take out the samples that ended. The one place where the host waits for the GPU."""
        s, completions = self.slots, []
        ended = [i for i, done in enumerate(s.done[: len(self.running)].tolist()) if done]
        if not ended:
            return []
        count, exit_at = s.count[ended].tolist(), s.exit_at[ended].tolist()
        tokens, logprobs = (t[ended, : max(count)].cpu().numpy() for t in (s.tokens, s.logprobs))
        for slot, n, exit, t, l in zip(ended, count, exit_at, tokens, logprobs):
            c, self.running[slot] = self.running[slot], None
            c.tokens, c.logprobs = t[:n].tolist(), l[:n].copy()
            if exit >= 0:
                inserted = min(len(self.params.forced_exit.tokens), n - exit)
                c.forced_at, c.forced_tokens = exit, inserted
            stopped = c.tokens[-1] in self.stop_ids and c.mask[-1]
            c.finish_reason = "forced+" * (exit >= 0) + ("stop" if stopped else "length")
            s.free(slot, self.lengths[slot])
            completions.append(c)
        return completions


# ---------------------------------------------------------------------------------- the sampler
def check_prompts(prompts: Sequence, ids, new_tokens: int, max_len: int, model: Model) -> None:
    """Raise ValueError for what would fail, or go wrong, later."""
    if len(ids) != len(prompts):
        raise ValueError(f"{len(ids)} sample_ids for {len(prompts)} prompts")
    vocab = model.config.vocab_size
    for i, prompt in enumerate(prompts):
        length, fault = len(prompt.tokens), None
        if not length:
            fault = "it is empty"
        elif length + new_tokens > max_len:
            fault = f"its {length} tokens + max_new_tokens {new_tokens} exceed max_len {max_len}"
        elif not 0 <= min(prompt.tokens) <= max(prompt.tokens) < vocab:
            fault = f"it has token ids not in 0 … {vocab - 1}; wrong tokenizer?"
        elif prompt.pixel_values is not None and model.visual is None:
            fault = "it has images, but the model was built without its vision tower"
        if fault:
            raise ValueError(f"prompt {i}: {fault}")


# Reading prompts once gains 15 % from here on, by the model in BENCHMARKS.md.
SHARED_ROWS = 64  # slots of a step, see `BUCKETS`: fewer samples' prompts do not fill a GPU
SHARED_TOKENS = 448  # prompt tokens a sample that go unread: 512 in a group of 8, of which 7 gain


def samples_sharing(prompts: Sequence, samples: int, weight: torch.Tensor) -> int:
    """How many samples' decode attention reads a prompt together: these samples of each prompt, or
    0 where each reads its own copy. weight: says device and dtype."""
    unread = sum(len(p.tokens) for p in prompts) * (samples - 1)
    pays = unread >= SHARED_TOKENS * len(prompts) * samples
    return samples if weight.is_cuda and weight.dtype in HALF and pays else 0


class Sampler:
    """Weights, KV memory and recorded graphs, which outlive a call."""

    def __init__(
        self,
        model: Model,
        *,
        max_len: int,
        slots: int | None = None,
        kv_gb: float | None = None,
        min_rows: int = 1,
    ):
        """max_len: longest prompt + completion. slots: samples decoded at once (256 on CUDA, 64 on
        CPU if they fit). kv_gb: KV memory; by default see `number_of_slots`. min_rows: pad smaller
        batches; from 16 rows on, CPU matrix products give a row the same bits in every batch."""
        if slots is not None and slots < 1:
            raise ValueError(f"slots {slots}: must be at least 1")
        self.model, self.config, self.max_len = model, model.config, max_len
        self.wanted_slots, self.kv_gb, self.min_rows = slots, kv_gb, min_rows
        cuda = model.head_weight().is_cuda
        self.sync_every = 8 if cuda else 1  # decode steps between two looks of the host
        self.prefill_tokens = 16384 if cuda else 1024  # of a pack of prompts
        self.decoder = DecodeWeights(model, lambda: Model(model.config, model.visual is not None))
        self.slots: Slots | None = None
        self.graphs: dict[str, Graphs] = {}  # by the parameters that a recorded step depends on
        self.stats: dict[str, float] = {}  # of the last call

    def weights(self) -> AbstractContextManager:
        """Hold a sharded model's present weights for `generate`. Collective at both ends."""
        return self.decoder.held()

    def release(self) -> None:
        """Give back all memory: KV cache, copied weights, graphs. The next call takes it again."""
        self.decoder.release()
        self.slots, self.graphs = None, {}
        torch.cuda.empty_cache()  # nothing happens without CUDA

    def _allocate(self, weight: torch.Tensor) -> None:
        """The slots, all empty: as many as asked for, or as memory allows."""
        if self.slots is None:
            form = self.config, weight.dtype, weight.device
            wanted = self.wanted_slots, self.kv_gb, self.max_len, self.prefill_tokens
            self.usable = number_of_slots(*wanted, *form)
            self.slots = Slots.allocate(max(self.usable, self.min_rows), self.max_len, *form)
            positions = torch.arange(self.max_len, device=weight.device).expand(3, -1)
            self.angles = rope_cos_sin(positions, self.config)  # of every position of a new token
        self.slots.done.fill_(1)
        self.slots.group([], self.config)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence,
        params: SamplingParams,
        *,
        sample_ids: Sequence[int] | None = None,
        indices: Sequence[int] | None = None,
        on_finish: Callable[[Completion], None] | None = None,
        on_step: Callable[[], None] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """params.n completions of each prompt, ordered by (prompt, sample).

        sample_ids: a number a prompt that, with the seed and the sample's index, decides its random
        numbers; by default its index in this call. indices: make only these samples of a prompt.
        on_finish: called as soon as the host sees that a completion ended; on_step: each time it
        looks (`slots` holds all tokens so far). Uses the model's weights as they are now. Raises
        ValueError for what can't work before computing anything.
        """
        ids = range(len(prompts)) if sample_ids is None else sample_ids
        indices = range(params.n) if indices is None else indices
        check_prompts(prompts, ids, params.max_new_tokens, self.max_len, self.model)
        if not prompts:
            return []
        model = self.decoder.current()
        weight = model.model.embed_tokens.weight
        self._allocate(weight)
        sharing = samples_sharing(prompts, len(indices), weight)
        step = self._step(model, params, sharing)
        call = Scheduler(self.slots, self.usable, prompts, params, ids, indices)
        finished, self.stats = [], {"decode_seconds": 0.0, "decode_tokens": 0}
        try:
            with tqdm(total=len(call.waiting), disable=not progress, unit="sample") as bar:
                while call.waiting or any(call.running):
                    call.admit(model, self.prefill_tokens, sharing > 0)
                    start = time.perf_counter()
                    for _ in range(self.sync_every):
                        step(call.lengths + [0] * (self.min_rows - len(call.lengths)))
                        call.lengths = [n + 1 for n in call.lengths]
                    if on_step is not None:
                        on_step()
                    ended = call.collect()
                    self.stats["decode_seconds"] += time.perf_counter() - start
                    self.stats["decode_tokens"] += sum(len(c.tokens) for c in ended)
                    bar.update(len(ended))
                    for completion in ended:
                        finished.append(completion)
                        if on_finish is not None:
                            on_finish(completion)
        except torch.OutOfMemoryError as e:
            gb, half = self.slots.kv.nbytes / 1e9, self.usable // 2
            e.add_note(f"The KV cache takes {gb:.3g} GB; --slots {half} halves it")
            raise
        return sorted(finished, key=lambda c: (c.prompt_index, c.sample_index))

    def _step(self, model: Model, params: SamplingParams, sharing: int) -> Callable:
        """One decode step, as a function of `Scheduler.lengths`. On CUDA it is recorded once for
        all calls with the parameters that it depends on. sharing: from `samples_sharing`."""
        p = params.on(model.head_weight().device)

        def step(rows: int, bounds: list[int] | None = None) -> None:
            slots = self.slots.first(rows)
            decode_step(model, self.angles, slots, p, bounds, sharing * (rows >= SHARED_ROWS))

        if not model.head_weight().is_cuda:
            return lambda bounds: step(len(bounds), bounds)
        key = repr((p.temperature, p.top_p, list(params.stop_ids), params.forced_exit, sharing))
        if key not in self.graphs:
            self.graphs[key] = Graphs(step, len(self.slots.done))
        return lambda bounds: self.graphs[key].replay(len(bounds))
