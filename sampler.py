"""The sampler: prompts → completions with log-probabilities, for rollouts and evaluation. One process, no server.

    sampler = Sampler(model, max_len=6144)  # KV memory: slots=…, or kv_gb=…, or a share of what is free
    rollouts = sampler.generate(prompts, SamplingParams(n=8, max_new_tokens=4096, stop_ids=[151645, 151643]))

Read in this order: `decode_step` (choose a token from the last hidden state, run it through the decoder), `choose`
(sampling, forced exit, stopping), `Sampler.generate` (prefill → admit → steps → collect, until nothing is left).

1. A prompt is prefilled once, packed with others, its images encoded once; each of its n samples gets a copy of its KV.
2. Live samples always fill slots 0 … B - 1. A slot whose sample ended takes the next one; when none is left, the last
   live sample moves into the hole. So a batch is a slice, and on CUDA one graph per batch size replays the whole step.
3. A token's random number depends on (seed, sample id, position) and on nothing else: neither batch, slot, order of
   refills nor number of ranks change what is sampled, up to the rounding of matrix products of another size.
4. Log-probabilities are those of the trainer: `model.head_logits`, fp32, after temperature, before top-k and top-p.
5. Forced exit: where the paper (arXiv 2505.03981, section 2.1) stops at a length, appends `</think>` and generates
   anew, the tokens are inserted in place, one a step, marked in `mask` and never trained on.

Shapes: B live samples, S slots, L layers, C hidden size, Hq / Hkv heads, D head size, V vocabulary, P prompt tokens.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Callable, Protocol, Sequence

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from core.attention import attend
from core.decode_kernels import Graphs, decode_attend, plan_attention
from core.vision import mrope_positions
from model import Model, head_logits, rope_cos_sin
from sampling import force_exit, sample_key, sample_token, uniform


class PromptLike(Protocol):
    """What the sampler continues (`data.Prompt`)."""

    tokens: list[int]  # image placeholders already repeated
    pixel_values: torch.Tensor | None  # (patches, 1176)
    grid_thw: torch.Tensor | None  # (images, 3)


@dataclass(frozen=True)
class SamplingParams:
    """How to continue every prompt of a call."""

    n: int = 1  # samples a prompt
    temperature: float = 1.0  # 0: greedy; its log-probabilities are those at temperature 1
    top_p: float = 1.0  # for evaluation only: training must sample what it scores
    top_k: int = 0  # 0: off; for evaluation only
    max_new_tokens: int = 1024  # forced tokens count
    stop_ids: Sequence[int] = ()  # the stop token is part of the completion
    seed: int = 0
    think_budget: int | None = None  # sampled tokens before thinking is ended by force; None: never
    exit_tokens: Sequence[int] = ()  # what is then inserted; see `sampling.think_exit`
    close_table: torch.Tensor | None = field(
        default=None, repr=False, compare=False
    )  # finds the model's own close
    answer_budget: int | None = (
        None  # tokens reserved for the answer after a forced exit; None: what is left
    )
    banned_ids: Sequence[int] | None = None  # never sampled; None: the model's own `banned_ids`

    def __post_init__(self):
        for name, ok, rule in [
            ("n", self.n >= 1, "≥ 1"),
            ("temperature", self.temperature >= 0, "≥ 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "≥ 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "≥ 1"),
        ]:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}, must be {rule}")
        if self.think_budget is None:
            return
        if self.think_budget < 0 or not len(self.exit_tokens) or self.close_table is None:
            raise ValueError(
                "think_budget must be ≥ 0 and needs exit_tokens and close_table: "
                "SamplingParams(think_budget=…, **sampling.think_exit(tokenizer, vocab_size))"
            )
        # an exit can be held up while the model is closing by itself, a token a character of the close at most
        held, answer = (
            len(self.close_table) - 1,
            1 if self.answer_budget is None else self.answer_budget,
        )
        most = self.max_new_tokens - len(self.exit_tokens) - held - answer
        if self.think_budget > most:
            raise ValueError(
                f"think_budget {self.think_budget} leaves no room in max_new_tokens {self.max_new_tokens} "
                f"for {len(self.exit_tokens)} exit tokens and {answer} of the answer; at most {most}"
            )


@dataclass
class Rollout:
    """One finished completion."""

    prompt_index: int
    sample_index: int
    tokens: list[int]  # the stop token included
    logprobs: (
        np.ndarray
    )  # (len(tokens),) fp32, the model's own at the sampling temperature, forced tokens too
    mask: np.ndarray  # (len(tokens),) bool: True sampled, False forced
    finish_reason: str  # stop | length | forced+stop | forced+length
    prompt_tokens: int

    @property
    def sampled_tokens(self) -> int:
        return int(self.mask.sum())


# ------------------------------------------------------------------------------------------------ the decode step
STATE = (
    "length",  # tokens whose KV is cached
    "delta",  # M-RoPE: position of a new token - its index
    "count",
    "limit",  # tokens of the completion, and the most it may have
    "close",
    "hold",  # characters of the close at the end of the text; 1: and the last token added to them
    "exit_at",  # token at which the forced exit began, -1: none
    "done",  # 1: finished or empty, the row runs along and changes nothing
    "key",
)  # of its random numbers


class Slots:
    """The samples being decoded, one slot each: KV cache, last hidden state, what has been sampled so far."""

    def __init__(self, slots: int, capacity: int, config, dtype: torch.dtype, device: torch.device):
        c = config
        size = (2, c.num_hidden_layers, slots, capacity, c.num_key_value_heads, c.head_dim)
        if (
            device.type == "cpu"
        ):  # the same order of dimensions, but each head's rows side by side: SDPA is faster
            size = (*size[:3], size[4], size[3], size[5])
        # zeros, since a masked NaN would still reach the output through 0 · NaN
        kv = torch.zeros(size, dtype=dtype, device=device)
        self.kv = kv.transpose(3, 4) if device.type == "cpu" else kv  # (2, L, S, capacity, Hkv, D)
        self.hidden = torch.zeros(
            slots, c.hidden_size, dtype=dtype, device=device
        )  # after the final norm
        self.state = torch.zeros(len(STATE), slots, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(
            slots, capacity + 1, dtype=torch.int64, device=device
        )  # the last column is scratch:
        self.logprobs = torch.zeros(slots, capacity + 1, device=device)  # finished rows write there
        self.rows = torch.arange(slots, device=device)
        self.reach = [
            0
        ] * slots  # how much of each row's KV may not be zero: of a live row, its limit
        self.clear()

    def clear(self) -> None:
        self.state[STATE.index("done")] = 1

    def first(self, rows: int) -> SimpleNamespace:
        """Views of slots 0 … rows - 1, the fields of the state by their names."""
        return SimpleNamespace(
            **dict(zip(STATE, self.state[:, :rows].unbind(0))),
            kv=self.kv[:, :, :rows],
            hidden=self.hidden[:rows],
            tokens=self.tokens[:rows],
            logprobs=self.logprobs[:rows],
            rows=self.rows[:rows],
        )

    def set_kv(self, slot: int, kv: torch.Tensor, reach: int) -> None:
        """Start a row with kv (2, L, P, Hkv, D); its sample will write up to `reach`. No trace of the last sample may
        stay, above all no NaN."""
        length = kv.shape[2]
        self.kv[:, :, slot, :length] = kv
        self.kv[:, :, slot, length : self.reach[slot]] = 0
        self.reach[slot] = reach

    def ended(self, slot: int, length: int) -> None:
        """Its sample is gone, after `length` cached tokens at most: the next need not zero what was never written (up to
        the limit, that was 8% of all time for 32 tokens a sample of at most 4,096)."""
        self.reach[slot] = length + 1  # where a finished row, running along, writes

    def move(self, source: int, target: int, length: int, count: int) -> None:
        """A live sample with `length` cached and `count` sampled tokens into a free slot."""
        self.set_kv(target, self.kv[:, :, source, :length], self.reach[source])
        self.ended(source, length)
        self.tokens[target, :count] = self.tokens[source, :count]
        self.logprobs[target, :count] = self.logprobs[source, :count]
        self.hidden[target] = self.hidden[source]
        self.state[:, target] = self.state[:, source]
        self.state[STATE.index("done"), source] = 1


def choose(s: SimpleNamespace, head: torch.Tensor, p: SimpleNamespace) -> torch.Tensor:
    """The next token (B,) of every row from its hidden state; records it, its log-probability, and whether it ends the
    sample. p: SamplingParams with its lists as tensors (`Sampler._constants`)."""
    logits = head_logits(s.hidden, head, p.temperature or 1.0, p.banned)  # (B, V) fp32
    if p.temperature == 0:
        token, lse = logits.argmax(-1), logits.logsumexp(-1)
    else:
        token, lse = sample_token(logits, uniform(s.key, s.count), p.top_k, p.top_p)
    forced = None
    if p.think_budget is not None:
        token, forced = force_exit(s, token, p)
    logprob = logits.gather(1, token[:, None]).squeeze(1) - lse
    live = 1 - s.done
    column = torch.where(s.done > 0, s.tokens.shape[1] - 1, s.count)
    s.tokens.index_put_((s.rows, column), token)
    s.logprobs.index_put_((s.rows, column), logprob)
    s.count += live
    ended = s.count >= s.limit
    if p.stop is not None:
        stopped = (token[:, None] == p.stop).any(1)
        ended |= stopped if forced is None else stopped & ~forced
    s.done |= ended
    return token


def through(
    layer: torch.nn.Module,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attention: Callable,
) -> torch.Tensor:
    """`model.Block` with another attention: x (R, C) → (R, C); attention(q (R, Hq, D), k, v (R, Hkv, D)) → (R, Hq, D).
    Calls the block's parts and not the block, on whose call FSDP would gather."""
    q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), cos, sin)
    x = x + layer.self_attn.o_proj(attention(q, k, v).flatten(1))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def decode_step(
    model: Model,
    angles: tuple[torch.Tensor, torch.Tensor],
    s: SimpleNamespace,
    p: SimpleNamespace,
    bounds: list[int] | None = None,
) -> None:
    """One token for every row of `s`, in place; no value is read by the host, so a CUDA graph can hold all of it.
    angles: cos and sin by position, (max_len, D/2) each; p: constants of the call; bounds: see `plan_attention`."""
    x = model.model.embed_tokens(choose(s, model.head_weight(), p))  # (B, C)
    cos, sin = (
        a[s.length + s.delta] for a in angles
    )  # one position for all three axes: the new token is text
    plan = plan_attention(s.length, s.kv.shape[3], bounds)
    for layer, keys, values in zip(model.model.layers, *s.kv):  # (B, capacity, Hkv, D) each

        def attention(q, k, v, keys=keys, values=values):
            keys.index_put_((s.rows, s.length), k)
            values.index_put_((s.rows, s.length), v)
            return decode_attend(q, keys, values, plan)

        x = through(layer, x, cos, sin, attention)
    s.hidden.copy_(model.model.norm(x))
    s.length += 1 - s.done


# ---------------------------------------------------------------------------------------------------- the sampler
@dataclass
class Staged:
    """A prefilled prompt whose samples have not all started."""

    prompt: int
    kv: torch.Tensor  # (2, L, P, Hkv, D)
    hidden: torch.Tensor  # (C,) of its last token
    delta: int
    started: int = 0


@dataclass
class Live:
    """The host's knowledge of a slot's sample."""

    prompt: int
    sample: int
    length: int  # cached tokens, exact until the sample has ended
    prompt_tokens: int


class Sampler:
    """Weights, KV memory and graphs that outlive a call. See the module's docstring."""

    def __init__(
        self,
        model: Model,
        *,
        max_len: int,
        slots: int | None = None,
        kv_gb: float | None = None,
        dtype: torch.dtype | None = None,
        sync_every: int | None = None,
        prefill_tokens: int | None = None,
        min_rows: int = 1,
    ):
        """max_len: longest prompt + completion. slots: samples decoded at once (256 on CUDA, 64 on CPU if they fit).
        kv_gb: KV memory, by default 80% of what is free. dtype: of weights and cache, by default the model's own.
        sync_every: decode steps between two looks of the host (8 on CUDA, 1 on CPU). prefill_tokens: prompt tokens a
        prefill pass. min_rows: pad smaller batches; from 16 rows on, CPU matrix products give a row the same bits in
        every batch. Takes no weights and no memory yet, so `model` may still be sharded."""
        self.model, self.config, self.capacity = model, model.config, max_len
        self.wanted_slots, self.kv_gb, self.dtype, self.min_rows = slots, kv_gb, dtype, min_rows
        self.sync_every, self.prefill_tokens = sync_every, prefill_tokens
        self.decoder: Model | None = (
            None  # whose weights decode: `model` itself, or a copy of its language model
        )
        self.angles = self.slots = self.graphs = self.graphs_for = self.addresses = None
        self.stats: dict[
            str, float
        ] = {}  # of the last call: seconds and tokens of prefill and decode

    # weights ------------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def update_weights(self) -> None:
        """Take the model's weights as they are now; `generate` does it by itself. They are used where they are, but for
        two cases that get a copy: another dtype, and CUDA graphs of a sharded model, whose gathered tensors do not last.
        """
        weight = self.model.model.embed_tokens.weight
        if isinstance(weight, DTensor):
            raise ValueError("the model is sharded: sample inside `with parallel.gathered(model):`")
        self.device, dtype = weight.device, self.dtype or weight.dtype
        if dtype == weight.dtype and not (
            self.device.type == "cuda" and isinstance(self.model, FSDPModule)
        ):
            self.decoder = self.model
        else:
            if self.decoder in (None, self.model):
                with torch.device("meta"):
                    self.decoder = Model(self.config)
                self.decoder.to(dtype).to_empty(device=self.device)
            for name, p in self.decoder.named_parameters():
                p.copy_(self.model.get_parameter(name))
        addresses = [p.data_ptr() for p in self.decoder.parameters()]
        if addresses != self.addresses:
            self.addresses, self.graphs = addresses, None  # they read the old ones
        if self.angles is None:  # of every position that a new token can have
            self.angles = rope_cos_sin(
                torch.arange(self.capacity, device=self.device).expand(3, -1), self.config
            )

    def release(self) -> None:
        """Give back all memory: KV cache, copied weights, graphs. The next `generate` takes it again."""
        self.decoder = self.slots = self.graphs = self.graphs_for = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # memory -------------------------------------------------------------------------------------------------------
    def _allocate(self) -> None:
        """The slots, as many as were asked for or as memory allows. Raises ValueError that says how many would fit."""
        if self.slots is not None:
            self.slots.clear()
            return
        c, dtype, cuda = (
            self.config,
            self.dtype or self.model.model.embed_tokens.weight.dtype,
            self.device.type == "cuda",
        )
        token_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize
        budget = math.inf  # on a CPU pages that are never touched cost nothing
        if self.kv_gb is not None:
            budget = self.kv_gb * 1e9
        elif cuda:
            budget = 0.8 * torch.cuda.mem_get_info(self.device)[0]
        fitting = int(min(budget / (token_bytes * self.capacity), 256 if cuda else 64))
        if (self.wanted_slots or 1) * token_bytes * self.capacity > budget:
            raise ValueError(
                f"{self.wanted_slots or 1} slot(s) of {self.capacity} tokens, {token_bytes} bytes of KV each: "
                f"{fitting} would fit in {budget / 1e9:.3g} GB. Pass fewer slots, a smaller max_len "
                "or more kv_gb"
            )
        self.usable = self.wanted_slots or fitting
        self.slots = Slots(max(self.usable, self.min_rows), self.capacity, c, dtype, self.device)
        self.graphs = None

    def _constants(self, params: SamplingParams) -> SimpleNamespace:
        """The call's parameters as `choose` wants them: lists as tensors on the device."""

        def ids(x):
            return torch.tensor(list(x), device=self.device) if len(x) else None

        thinks = params.think_budget is not None
        return SimpleNamespace(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            stop=ids(params.stop_ids),
            banned=self.model.banned_ids if params.banned_ids is None else ids(params.banned_ids),
            think_budget=params.think_budget,
            answer_budget=params.answer_budget,
            exit=ids(params.exit_tokens),
            close_table=params.close_table.to(self.device) if thinks else None,
            closed=len(params.close_table) - 1 if thinks else 0,
        )

    # one call -----------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[PromptLike],
        params: SamplingParams,
        *,
        sample_ids: Sequence[int] | None = None,
        on_finish: Callable[[Rollout], None] | None = None,
        progress: bool = False,
    ) -> list[Rollout]:
        """params.n completions of each prompt, ordered by (prompt, sample).

        sample_ids: a number a prompt that, with the seed and the sample's index, decides its random numbers; by default
        the prompt's place in this call. on_finish: called with each rollout as soon as the host sees that it ended.
        Uses the model's weights as they are now. Raises ValueError for what cannot work, before anything is computed.
        On Ctrl-C and when memory runs out, the exception's `rollouts` holds what has been finished.
        """
        ids = list(range(len(prompts))) if sample_ids is None else [int(i) for i in sample_ids]
        self._check(prompts, params, ids)
        if not prompts:
            return []
        self.update_weights()
        self._allocate()
        run = Run(
            prompts,
            params,
            ids,
            self._constants(params),
            on_finish,
            tqdm(
                total=len(prompts) * params.n,
                disable=not progress,
                unit="sample",
                dynamic_ncols=True,
            ),
        )
        every = self.sync_every or (8 if self.device.type == "cuda" else 1)
        try:
            self._record_graphs(run)
            while run.unfinished:
                self._admit(run)
                begin = time.perf_counter()
                for _ in range(every):
                    self._step(run)
                self._collect(run)
                run.decode_seconds += time.perf_counter() - begin
        except (KeyboardInterrupt, torch.OutOfMemoryError) as e:
            if isinstance(e, torch.OutOfMemoryError):
                e.add_note(
                    f"sampling with {self.usable} slots of {self.capacity} tokens, "
                    f"{self.slots.kv.nbytes / 1e9:.3g} GB of KV cache; slots={self.usable // 2} frees half of it"
                )
            e.rollouts = run.finished
            raise
        finally:
            run.bar.close()
            self.stats = run.stats()
        return sorted(run.finished, key=lambda r: (r.prompt_index, r.sample_index))

    def _check(self, prompts, params, ids) -> None:
        vocab, images = self.config.vocab_size, self.model.visual is not None
        if len(ids) != len(prompts):
            raise ValueError(f"{len(ids)} sample_ids for {len(prompts)} prompts; give one a prompt")
        for i, prompt in enumerate(prompts):
            if not len(prompt.tokens):
                raise ValueError(f"prompt {i} is empty; it needs one token at least")
            if len(prompt.tokens) + params.max_new_tokens > self.capacity:
                raise ValueError(
                    f"prompt {i}: {len(prompt.tokens)} tokens + max_new_tokens {params.max_new_tokens} "
                    f"are more than the sampler's max_len {self.capacity}"
                )
            if not 0 <= min(prompt.tokens) <= max(prompt.tokens) < vocab:
                raise ValueError(
                    f"prompt {i} holds token ids outside 0 … {vocab - 1}; wrong tokenizer?"
                )
            if prompt.pixel_values is not None and not images:
                raise ValueError(
                    f"prompt {i} has images, but the model was built without its vision tower; build it "
                    "with with_vision=True"
                )

    def _record_graphs(self, run: "Run") -> None:
        if self.device.type != "cuda":
            return
        values = [
            x.tolist() if isinstance(x, torch.Tensor) else x for x in vars(run.constants).values()
        ]
        if self.graphs is None or self.graphs_for[0] != values:
            self.graphs, self.graphs_for = (
                None,
                (values, run.constants),
            )  # whose tensors the graphs read
            self.graphs = Graphs(
                lambda rows: decode_step(
                    self.decoder, self.angles, self.slots.first(rows), run.constants
                ),
                len(self.slots.rows),
            )

    def _prefill(self, run: "Run") -> None:
        """Stage the next prompts: as many as fit a packed pass of `prefill_tokens`, one at least."""
        begin, c = time.perf_counter(), self.config
        budget = self.prefill_tokens or (16384 if self.device.type == "cuda" else 1024)
        chosen, room = [run.next_prompt], budget - len(run.prompts[run.next_prompt].tokens)
        while (n := chosen[-1] + 1) < len(run.prompts) and (
            room := room - len(run.prompts[n].tokens)
        ) >= 0:
            chosen.append(n)
        run.next_prompt = n
        prompts = [run.prompts[i] for i in chosen]
        tokens = torch.cat([torch.as_tensor(p.tokens) for p in prompts])  # (T,)
        positions, deltas = zip(*(self._positions(p) for p in prompts))
        cu = torch.tensor([0, *(len(p.tokens) for p in prompts)]).cumsum(0).int()
        pictured = [p for p in prompts if p.pixel_values is not None]
        images = [
            torch.cat([getattr(p, name) for p in pictured])
            for name in ("pixel_values", "grid_thw")
            if pictured
        ]
        m, longest, on_device = self.decoder.model, int(cu.diff().max()), cu.to(self.device)
        x, deepstack = self.model.embed(tokens.to(self.device), *images)  # (T, C)
        x = x.to(self.slots.kv.dtype)
        cos, sin = rope_cos_sin(torch.cat(positions, dim=1).to(self.device), c)
        kv = x.new_empty(2, len(m.layers), len(tokens), c.num_key_value_heads, c.head_dim)
        for i, layer in enumerate(m.layers):

            def attention(q, k, v, i=i):
                kv[0, i], kv[1, i] = k, v
                return attend(q, k, v, on_device, longest, causal=True)

            x = through(layer, x, cos, sin, attention)
            if i < len(deepstack):
                rows, extra = deepstack[i]
                x = x.index_add(0, rows, extra.to(x.dtype))
        last = m.norm(x[on_device[1:].long() - 1])  # (prompts, C)
        run.staged.extend(
            Staged(i, kv[:, :, a:b], h, d)
            for i, a, b, h, d in zip(chosen, cu[:-1].tolist(), cu[1:].tolist(), last, deltas)
        )
        run.prefill_seconds += time.perf_counter() - begin
        run.prefill_tokens += len(tokens)

    def _positions(self, prompt: PromptLike) -> tuple[torch.Tensor, int]:
        if prompt.grid_thw is None:
            return torch.arange(len(prompt.tokens)).expand(3, -1), 0
        return mrope_positions(
            torch.as_tensor(prompt.tokens),
            prompt.grid_thw,
            image_token_id=self.config.image_token_id,
            merge_size=self.config.vision.spatial_merge_size,
        )

    def _admit(self, run: "Run") -> None:
        """Fill free slots with waiting samples, then close the holes that are left."""
        s, rows, p = self.slots, [], run.params
        free = [i for i, x in enumerate(run.live) if x is None] + list(
            range(len(run.live), self.usable)
        )
        while free and run.waiting:
            if not run.staged:
                self._prefill(run)
            staged = run.staged[0]
            length = staged.kv.shape[2]
            slot, free = free[0], free[1:]
            s.set_kv(slot, staged.kv, length + p.max_new_tokens)
            s.hidden[slot] = staged.hidden
            key = sample_key(p.seed, run.ids[staged.prompt], staged.started)
            rows.append(
                (
                    slot,
                    dict(
                        length=length,
                        delta=staged.delta,
                        count=0,
                        limit=p.max_new_tokens,
                        close=0,
                        hold=0,
                        exit_at=-1,
                        done=0,
                        key=key,
                    ),
                )
            )
            if slot == len(run.live):
                run.live.append(None)
            run.live[slot] = Live(staged.prompt, staged.started, length, length)
            staged.started += 1
            if staged.started == p.n:
                run.staged.popleft()
        if rows:
            at = torch.tensor([slot for slot, _ in rows], device=self.device)
            s.state[:, at] = torch.tensor(
                [[r[name] for _, r in rows] for name in STATE], device=self.device
            )
        while None in run.live:
            hole, last = run.live.index(None), run.live.pop()
            if last is not None:
                s.move(len(run.live), hole, last.length, last.length - last.prompt_tokens)
                run.live[hole] = last

    def _step(self, run: "Run") -> None:
        rows = len(run.live)
        if self.graphs is not None:
            self.graphs.replay(rows)
        else:
            rows = max(rows, self.min_rows)
            bounds = [x.length for x in run.live] + [0] * (rows - len(run.live))
            decode_step(self.decoder, self.angles, self.slots.first(rows), run.constants, bounds)
        for x in run.live:
            x.length += 1

    def _collect(self, run: "Run") -> None:
        """Hand out the samples that have ended and free their slots. The one place where the host waits for the GPU."""
        s = self.slots.first(len(run.live))
        done, count, exit_at = torch.stack([s.done, s.count, s.exit_at]).tolist()
        ended = [i for i, d in enumerate(done) if d]
        if not ended:
            return
        at, longest = torch.tensor(ended, device=self.device), max(count[i] for i in ended)
        tokens, logprobs = (
            s.tokens[at, :longest].cpu().numpy(),
            s.logprobs[at, :longest].cpu().numpy(),
        )
        for i, t, l in zip(ended, tokens, logprobs):
            run.finish(run.live[i], t[: count[i]], l[: count[i]], exit_at[i])
            self.slots.ended(i, run.live[i].length)
            run.live[i] = None


class Run:
    """Where a call of `generate` stands."""

    def __init__(
        self,
        prompts,
        params: SamplingParams,
        ids: list[int],
        constants: SimpleNamespace,
        on_finish,
        bar,
    ):
        self.prompts, self.params, self.ids, self.constants = prompts, params, ids, constants
        self.on_finish, self.bar = on_finish, bar
        self.next_prompt = 0  # the first that has not been prefilled
        self.staged: deque[Staged] = deque()
        self.live: list[Live | None] = []  # by slot; None: ended, to be refilled or closed
        self.finished: list[Rollout] = []
        self.start = time.perf_counter()
        self.prefill_seconds = self.decode_seconds = 0.0
        self.prefill_tokens = self.decode_tokens = 0

    @property
    def waiting(self) -> bool:
        """Is there a sample that has not started?"""
        return bool(self.staged) or self.next_prompt < len(self.prompts)

    @property
    def unfinished(self) -> bool:
        return self.waiting or any(x is not None for x in self.live)

    def finish(self, live: Live, tokens: np.ndarray, logprobs: np.ndarray, exit_at: int) -> None:
        """tokens, logprobs (count,) of an ended sample; exit_at: where its forced tokens begin, -1: none."""
        mask = np.ones(len(tokens), dtype=bool)
        if exit_at >= 0:
            mask[exit_at : exit_at + len(self.params.exit_tokens)] = False
        reason = "stop" if tokens[-1] in self.params.stop_ids and mask[-1] else "length"
        rollout = Rollout(
            live.prompt,
            live.sample,
            tokens.tolist(),
            logprobs.copy(),
            mask,
            reason if exit_at < 0 else "forced+" + reason,
            live.prompt_tokens,
        )
        self.finished.append(rollout)
        self.decode_tokens += len(tokens)
        speed = self.decode_tokens / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{speed:.0f} tok/s, {len(self.live)} slots busy", refresh=False)
        self.bar.update()
        if self.on_finish is not None:
            self.on_finish(rollout)

    def stats(self) -> dict[str, float]:
        return {
            "seconds": time.perf_counter() - self.start,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "prefill_tokens": self.prefill_tokens,
            "decode_tokens": self.decode_tokens,
        }
