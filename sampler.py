"""KV-cached batched generation: prompts → completions with log-probabilities, in one process.

    sampler = Sampler(model, max_len=6144)  # slots=…, kv_gb=…, or a share of the free memory
    params = SamplingParams(n=8, max_new_tokens=4096, stop_ids=stop_token_ids(tokenizer))
    completions = sampler.generate(prompts, params)

Two slots, three samples; • marks a stop token:

    step   slot 0   slot 1
    1      A  a1    B  b1•   A and B start from copies of their prompts' KV
    2      A  a2    C  c1    B is handed out and can be graded; C takes over its slot
    3      A  a3•   C  c2
    4      C  c3             nobody waits: C, the last running sample, moves into the hole
    5      C  c4•            the batch is always slots 0 … B-1, so a CUDA graph can replay it

1. A prompt is prefilled once, packed with others; each of its n samples copies its KV.
2. A token's random number depends on (seed, sample id, position) and nothing else. Neither slots,
   refills nor ranks change what is sampled, up to the rounding of matrix products of other sizes.
3. Log-probabilities are the trainer's: `model.head_logits`, fp32, after temperature, before top-k
   and top-p.
4. Forced exit: the paper (arXiv 2505.03981, section 2.1) stops at a length, appends `</think>` and
   generates again; here the tokens are inserted in place, one a step, and never trained on.

Shapes: B running samples, S slots, L layers, C hidden size, Hq / Hkv heads, D head size,
V vocabulary, P prompt tokens.
"""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from core.attention import attend
from core.decode_kernels import Graphs, decode_attend, plan_attention
from core.fused_decode import FusedBlock, as_one_kernel, decode, exp_and_sum, fuse
from core.lora import lora_layers, merged_parameters
from core.parallel import gathered, units, unsharded
from core.samples import sampled_mask
from core.slots import ForcedExit, Slots, force_exit
from core.vision import mrope_positions
from model import Model, head_logits, rope_cos_sin


@dataclass(frozen=True)
class SamplingParams:
    """How to continue every prompt of a call."""

    n: int = 1  # samples a prompt
    temperature: float = 1.0  # 0: greedy; its log-probabilities are those at temperature 1
    top_p: float = 1.0  # evaluation only: training must sample from what it scores
    top_k: int = 0  # 0: off; evaluation only
    max_new_tokens: int = 1024  # inserted tokens count
    stop_ids: Sequence[int] | torch.Tensor = ()  # the stop token is part of the completion
    seed: int = 0
    forced_exit: ForcedExit | None = None
    banned_ids: Sequence[int] | torch.Tensor | None = None  # None: the model's own `banned_ids`

    def __post_init__(self):
        if min(self.n, self.max_new_tokens) < 1 or min(self.temperature, self.top_k) < 0:
            raise ValueError(f"{self}: n and max_new_tokens start at 1, temperature and top_k at 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be in (0, 1]")
        if (exit := self.forced_exit) is not None:
            # an exit can be delayed while the model is closing, a token a character at most
            waits, answer = len(exit.close_table) - 1, exit.answer_budget or 1
            most = self.max_new_tokens - len(exit.tokens) - waits - answer
            if most < 0:
                raise ValueError(
                    f"max_new_tokens {self.max_new_tokens}: too few for a forced exit, which takes "
                    f"{self.max_new_tokens - most} with {answer} of the answer"
                )
            if not 0 <= exit.budget <= most:
                raise ValueError(
                    f"think_budget {exit.budget}: at most {most}, as max_new_tokens "
                    f"{self.max_new_tokens} must also hold {len(exit.tokens)} exit tokens and "
                    f"{answer} of the answer"
                )

    def on(self, device: torch.device, banned_ids: torch.Tensor | None) -> SamplingParams:
        """The same with lists as tensors on `device`, None for empty ones."""

        def tensor(ids):
            return torch.as_tensor(list(ids), device=device) if len(ids) else None

        exit = self.forced_exit and replace(
            self.forced_exit,
            tokens=tensor(self.forced_exit.tokens),
            close_table=self.forced_exit.close_table.to(device),
        )
        banned = banned_ids if self.banned_ids is None else tensor(self.banned_ids)
        return replace(self, stop_ids=tensor(self.stop_ids), forced_exit=exit, banned_ids=banned)


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
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def sample_key(seed: int, prompt_id: int, sample_index: int) -> int:
    """A signed 64-bit number for one sample: splitmix64 over the three numbers."""
    x = 0
    for number in (seed, prompt_id, sample_index):
        x = (x + number + _GOLDEN) % (1 << 64)
        x = (x ^ x >> 30) * _MIX1 % (1 << 64)
        x = (x ^ x >> 27) * _MIX2 % (1 << 64)
        x ^= x >> 31
    return _signed(x)


def uniform(key: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """(B,) int64 keys and positions → (B,) fp32 in (0, 1), equal on every device: splitmix64."""

    def shifted(x, bits):  # logical shift right; torch's >> carries the sign along
        return (x >> bits) & ((1 << 64 - bits) - 1)

    x = key + (position + 1) * _signed(_GOLDEN)
    x = (x ^ shifted(x, 30)) * _signed(_MIX1)
    x = (x ^ shifted(x, 27)) * _signed(_MIX2)
    x = x ^ shifted(x, 31)
    return shifted(x, 41).float() * 2.0**-23 + 2.0**-24  # 23 bits: neither 0 nor 1 can come out


def sample_token(
    logits: torch.Tensor, u: torch.Tensor, top_k: int, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, V) fp32, u (B,) in (0, 1) → tokens by inverse CDF, logsumexp(logits), both (B,).

    Token i is taken when u · total lies in [cdf[i-1], cdf[i]): an id of probability 0 never is.
    """
    cuda = logits.is_cuda
    top, best = logits.max(-1, True) if cuda else (logits.amax(-1, True), None)  # (B, 1)
    p, mass = as_one_kernel(exp_and_sum, logits, top)  # (B, V), unnormalised; (B, 1)
    lse = (top + mass.log()).squeeze(1)
    if top_k or top_p < 1:
        p = truncate(p, top_k, top_p)
    cdf = p.cumsum(-1)
    total = cdf[:, -1:]
    at = torch.minimum(u[:, None] * total, total.nextafter(torch.zeros_like(total)))
    token = torch.searchsorted(cdf, at, right=True).clamp_(max=logits.shape[1] - 1)
    if cuda:  # a parallel scan is monotone up to rounding only: an impossible id could get through
        token = torch.where(p.gather(1, token) > 0, token, best)
    return token.squeeze(1), lse


def truncate(p: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Keep the top_k largest of each row of p (B, V), then the smallest set that holds a share
    top_p of what is left; the most probable token always stays."""
    if top_k and top_k < p.shape[1]:
        p = p.masked_fill(p < p.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        ordered, index = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of all more probable tokens
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0)
        p = torch.zeros_like(p).scatter_(1, index, ordered)
    return p


# ------------------------------------------------------------------------------ the decode step
def sample_next_token(s: Slots, head: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """The next token (B,) of every row from its hidden state; records it, its log-probability, and
    whether it ends the sample. head (V, C); p: from `SamplingParams.on`."""
    logits = head_logits(s.hidden, head, p.temperature or 1.0, p.banned_ids)  # (B, V) fp32
    if p.temperature == 0:
        token, lse = logits.argmax(-1), logits.logsumexp(-1)
    else:
        token, lse = sample_token(logits, uniform(s.key, s.count), p.top_k, p.top_p)
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


def block_forward(
    layer: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attn: Callable
) -> torch.Tensor:
    """`model.Block` with another attention: x (T, C) → (T, C); attn(q (T, Hq, D), k, v (T, Hkv, D))
    → (T, Hq, D). Calls the block's parts, not the block: that call would make FSDP gather."""
    q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), cos, sin)
    x = x + layer.self_attn.o_proj(attn(q, k, v).flatten(1))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def decode_step(
    model: Model,
    angles: tuple[torch.Tensor, torch.Tensor],
    s: Slots,
    p: SamplingParams,
    bounds: list[int] | None = None,
    blocks: list[FusedBlock] | None = None,
) -> None:
    """One token for every row of `s`, in place. The host reads no value: a CUDA graph can hold it.
    angles: cos and sin by position, (max_len, D/2) each; bounds: see `plan_attention`; blocks: the
    model's, fused."""
    x = model.model.embed_tokens(sample_next_token(s, model.head_weight(), p))  # (B, C)
    cos, sin = (a[s.length + s.rope_delta] for a in angles)  # new tokens are text: one position
    plan = plan_attention(s.length, s.kv.shape[3], bounds)
    if blocks is not None:
        s.hidden.copy_(decode(blocks, model.model.norm, x, cos, sin, s.kv, s.length, plan))
        s.length += 1 - s.done
        return
    rows = torch.arange(len(x), device=x.device)
    for layer, keys, values in zip(model.model.layers, *s.kv):  # (B, capacity, Hkv, D) each

        def attn(q, k, v, keys=keys, values=values):
            keys.index_put_((rows, s.length), k)
            values.index_put_((rows, s.length), v)
            return decode_attend(q, keys, values, plan)

        x = block_forward(layer, x, cos, sin, attn)
    s.hidden.copy_(model.model.norm(x))
    s.length += 1 - s.done


# ---------------------------------------------------------------------------------- the sampler
class Sampler:
    """Weights, KV memory and graphs that outlive a call, and where the current call stands."""

    def __init__(
        self,
        model: Model,
        *,
        max_len: int,
        slots: int | None = None,
        kv_gb: float | None = None,
        sync_every: int | None = None,
        prefill_tokens: int | None = None,
        min_rows: int = 1,
    ):
        """max_len: longest prompt + completion. slots: samples decoded at once (256 on CUDA, 64 on
        CPU if they fit). kv_gb: KV memory, by default 80% of the free GPU memory. sync_every:
        decode steps between two looks of the host (8 on CUDA, 1 on CPU). prefill_tokens: prompt
        tokens a prefill pass. min_rows: pad smaller batches; from 16 rows on, CPU matrix products
        give a row the same bits in every batch. Takes no memory yet."""
        if slots is not None and slots < 1:
            raise ValueError(f"slots {slots}: must be at least 1")
        self.model, self.config, self.max_len = model, model.config, max_len
        self.wanted_slots, self.kv_gb, self.min_rows = slots, kv_gb, min_rows
        self.sync_every, self.prefill_tokens = sync_every, prefill_tokens
        self.decoder: Model | None = None  # decodes: `model`, or a copy of it
        self.blocks: list[FusedBlock] | None = None  # the copy's, on a GPU
        self.angles = self.slots = None
        self.held = False  # inside `weights`
        self.graphs: dict[tuple, Graphs] = {}
        self.stats: dict[str, float] = {}  # of the last call: seconds and tokens

    @property
    def copies(self) -> bool:
        """Whether to decode with a copy of the weights: on a GPU, where it is fused and CUDA graphs
        read it, and with LoRA, whose adapters are merged into it. Else they are used in place."""
        weight = self.model.model.embed_tokens.weight
        return weight.is_cuda or any(lora_layers(self.model))

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Hold the weights of a sharded model as they are now, whole, for calls of `generate`.

        Collective at both ends. A copy is made unit by unit, so that never more than one unit is
        whole beside it; without a copy all are gathered while the context lasts.
        """
        if self.copies:
            self._copy_weights()
        with nullcontext() if self.copies else gathered(self.model):
            self.held = True
            try:
                yield
            finally:
                self.held = False

    @torch.inference_mode(False)  # whose tensors could not be filled again outside it
    @torch.no_grad()
    def _copy_weights(self) -> None:
        for unit, name_of_unit in units(self.model):
            with unsharded(unit):
                if self.decoder is None:
                    self._make_copy(self.model.model.embed_tokens.weight.dtype)
                copies = dict(self.decoder.named_parameters())
                for name, p in merged_parameters(unit):
                    copies[name_of_unit + name].copy_(p)

    def _make_copy(self, dtype: torch.dtype) -> None:
        """Memory for the copy; dtype: of the gathered weights, which may be smaller than stored."""
        with torch.device("meta"):
            self.decoder = Model(self.config, self.model.visual is not None)
        device = self.model.model.embed_tokens.weight.device
        self.decoder.to(dtype).to_empty(device=device).requires_grad_(False)
        if device.type == "cuda":
            self.blocks = fuse(self.decoder.model.layers)

    def _load_weights(self) -> None:
        """The weights for a call: those that are held, or the model's where it is whole."""
        weight = self.model.model.embed_tokens.weight
        if isinstance(weight, DTensor) and not (self.held and self.copies):
            raise ValueError("the model is sharded: sample inside `with sampler.weights():`")
        self.device = weight.device
        if not self.copies:
            self.decoder = self.model
        elif not self.held:
            self._copy_weights()

    def release(self) -> None:
        """Give back all memory: KV cache, copied weights, graphs. The next call takes it again."""
        self.decoder = self.slots = self.blocks = None
        self.graphs = {}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _allocate(self) -> None:
        """The slots: as many as asked for, or as memory allows."""
        if self.slots is not None:
            self.slots.done.fill_(1)
            return
        c, cuda = self.config, self.device.type == "cuda"
        dtype = self.decoder.model.embed_tokens.weight.dtype
        slot_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize
        slot_bytes *= self.max_len
        budget = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        if self.kv_gb is not None:
            budget = self.kv_gb * 1e9
        elif cuda:
            torch.cuda.empty_cache()
            budget = 0.8 * torch.cuda.mem_get_info(self.device)[0]
        fitting, wanted = int(budget / slot_bytes), self.wanted_slots or 1
        if wanted > fitting:
            raise ValueError(
                f"{wanted} slot(s) of {self.max_len} tokens take {wanted * slot_bytes / 1e9:.3g} "
                f"GB of KV cache; {fitting} would fit in {budget / 1e9:.3g} GB. Lower --slots or "
                "--max_new_tokens, or raise --kv_gb"
            )
        self.usable = self.wanted_slots or min(fitting, 256 if cuda else 64)
        rows = max(self.usable, self.min_rows)
        self.slots = Slots.allocate(rows, self.max_len, c, dtype, self.device)
        positions = torch.arange(self.max_len, device=self.device).expand(3, -1)
        self.angles = rope_cos_sin(positions, c)  # of every position that a new token can have
        self.graphs = {}

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence,
        params: SamplingParams,
        *,
        sample_ids: Sequence[int] | None = None,
        on_finish: Callable[[Completion], None] | None = None,
        on_step: Callable[[], None] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """params.n completions of each prompt, ordered by (prompt, sample).

        sample_ids: a number a prompt that, with the seed and the sample's index, decides its random
        numbers; by default its index in this call. on_finish: called as soon as the host sees
        that a completion ended; on_step: each time it looks (`slots` holds all tokens so far). Uses
        the model's weights as they are now. Raises ValueError for what can't work before
        computing anything. On Ctrl-C and when memory runs out, the
        exception's `completions` holds the finished ones.
        """
        self.sample_ids = range(len(prompts)) if sample_ids is None else sample_ids
        self._check(prompts, params)
        if not prompts:
            return []
        self._load_weights()
        self._allocate()
        self.prompts, self.params = prompts, params.on(self.device, self.model.banned_ids)
        self.waiting = deque((i, j) for i in range(len(prompts)) for j in range(params.n))
        self.prefilled: dict[int, tuple] = {}  # prompt → its KV, last hidden state, rope delta
        self.running: list[Completion | None] = []  # by slot; None: just ended
        self.lengths: list[int] = []  # by slot: cached tokens, or more after its end
        self.stats = dict.fromkeys(("prefill_seconds", "prefill_tokens", "decode_seconds"), 0.0)
        self.graph = self._graph()
        finished, begin = [], time.perf_counter()
        total = len(self.waiting)
        bar = tqdm(total=total, disable=not progress, unit="sample", dynamic_ncols=True)
        try:
            while len(finished) < total:
                self._admit()
                start = time.perf_counter()
                for _ in range(self.sync_every or (8 if self.device.type == "cuda" else 1)):
                    self._step()
                if on_step is not None:
                    on_step()
                ended = self._collect()
                self.stats["decode_seconds"] += time.perf_counter() - start
                bar.update(len(ended))
                for completion in ended:
                    finished.append(completion)
                    if on_finish is not None:
                        on_finish(completion)
        except (KeyboardInterrupt, torch.OutOfMemoryError) as e:
            if isinstance(e, torch.OutOfMemoryError):
                gb = self.slots.kv.nbytes / 1e9
                half = self.usable // 2
                e.add_note(
                    f"{self.usable} slots of {self.max_len} tokens are {gb:.3g} GB of KV cache; "
                    f"--slots {half} halves it"
                )
            e.completions = finished
            raise
        finally:
            bar.close()
            self.prefilled = self.prompts = None
            self.stats["seconds"] = time.perf_counter() - begin
            self.stats["decode_tokens"] = sum(len(c.tokens) for c in finished)
        return sorted(finished, key=lambda c: (c.prompt_index, c.sample_index))

    def _check(self, prompts: Sequence, params: SamplingParams) -> None:
        vocab = self.config.vocab_size
        if len(self.sample_ids) != len(prompts):
            raise ValueError(f"{len(self.sample_ids)} sample_ids for {len(prompts)} prompts")
        for i, prompt in enumerate(prompts):
            length = len(prompt.tokens)
            if not length:
                raise ValueError(f"prompt {i} is empty; it needs at least one token")
            if length + params.max_new_tokens > self.max_len:
                raise ValueError(
                    f"prompt {i}: {length} tokens + max_new_tokens {params.max_new_tokens} exceed "
                    f"the sampler's max_len {self.max_len}"
                )
            if not 0 <= min(prompt.tokens) <= max(prompt.tokens) < vocab:
                raise ValueError(f"prompt {i}: token ids not in 0 … {vocab - 1}; wrong tokenizer?")
            if prompt.pixel_values is not None and self.model.visual is None:
                raise ValueError(
                    f"prompt {i} has images, but the model was built without its vision tower; "
                    "build it with with_vision=True"
                )

    def _graph(self) -> Graphs | None:
        """The recorded decode step on CUDA; one for each set of parameters that it depends on."""
        if self.device.type != "cuda":
            return None
        p, exit = self.params, self.params.forced_exit
        lists = (p.stop_ids, p.banned_ids, exit and exit.tokens)
        lists = tuple(None if x is None else tuple(x.tolist()) for x in lists)
        key = (p.temperature, p.top_k, p.top_p, *lists)
        key += (exit.budget, exit.answer_budget) if exit else ()
        if key not in self.graphs:

            def step(rows: int) -> None:
                decode_step(
                    self.decoder, self.angles, self.slots.first(rows), p, blocks=self.blocks
                )

            self.graphs[key] = Graphs(step, len(self.slots.done))
        return self.graphs[key]

    def _prefill(self, first: int) -> None:
        """Prefill prompts from `first` on: as many as fit in `prefill_tokens`, at least one."""
        begin, c = time.perf_counter(), self.config
        room = self.prefill_tokens or (16384 if self.device.type == "cuda" else 1024)
        end = first + 1
        room -= len(self.prompts[first].tokens)
        while end < len(self.prompts) and (room := room - len(self.prompts[end].tokens)) >= 0:
            end += 1
        prompts = self.prompts[first:end]
        tokens = torch.cat([torch.as_tensor(p.tokens) for p in prompts])  # (T,)
        positions, deltas = zip(*(self._positions(p) for p in prompts))
        ends = torch.tensor([0, *(len(p.tokens) for p in prompts)]).cumsum(0).int()
        seen = [p for p in prompts if p.pixel_values is not None]
        images = [torch.cat([p.pixel_values for p in seen])] if seen else []
        images += [torch.cat([p.grid_thw for p in seen])] if seen else []
        m, longest, cu = self.decoder.model, int(ends.diff().max()), ends.to(self.device)
        x, deepstack = self.decoder.embed(tokens.to(self.device), *images)  # (T, C)
        x = x.to(self.slots.kv.dtype)
        cos, sin = rope_cos_sin(torch.cat(positions, dim=1).to(self.device), c)
        kv = x.new_empty(2, len(m.layers), len(tokens), c.num_key_value_heads, c.head_dim)
        for i, layer in enumerate(m.layers):

            def attn(q, k, v, i=i):
                kv[0, i], kv[1, i] = k, v
                return attend(q, k, v, cu, longest, causal=True)

            x = block_forward(layer, x, cos, sin, attn)
            if i < len(deepstack):
                rows, extra = deepstack[i]
                x = x.index_add(0, rows, extra.to(x.dtype))
        last = m.norm(x[cu[1:].long() - 1])  # (prompts, C)
        for i, (a, b) in enumerate(zip(ends.tolist(), ends[1:].tolist())):
            self.prefilled[first + i] = (kv[:, :, a:b], last[i], deltas[i])
        self.stats["prefill_seconds"] += time.perf_counter() - begin
        self.stats["prefill_tokens"] += len(tokens)

    def _positions(self, prompt) -> tuple[torch.Tensor, int]:
        if prompt.grid_thw is None:
            return torch.arange(len(prompt.tokens)).expand(3, -1), 0
        return mrope_positions(
            torch.as_tensor(prompt.tokens),
            prompt.grid_thw,
            image_token_id=self.config.image_token_id,
            merge_size=self.config.vision.spatial_merge_size,
        )

    def _admit(self) -> None:
        """Start waiting samples in free slots, then close the holes that are left."""
        s, p, running, new = self.slots, self.params, self.running, []
        free = [i for i, c in enumerate(running) if c is None]
        free += range(len(running), self.usable)
        while free and self.waiting:
            slot, (prompt, sample), free = free[0], self.waiting.popleft(), free[1:]
            if prompt not in self.prefilled:
                self._prefill(prompt)
            kv, hidden, delta = self.prefilled[prompt]  # (2, L, P, Hkv, D), (C,)
            if sample == p.n - 1:
                del self.prefilled[prompt]
            length = kv.shape[2]
            s.kv[:, :, slot, :length], s.hidden[slot] = kv, hidden
            new.append((slot, length, delta, sample_key(p.seed, self.sample_ids[prompt], sample)))
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

    def _step(self) -> None:
        rows = len(self.running)
        if self.graph is not None:
            self.graph.replay(rows)
        else:
            rows = max(rows, self.min_rows)
            bounds = self.lengths + [0] * (rows - len(self.running))
            slots, blocks = self.slots.first(rows), self.blocks
            decode_step(self.decoder, self.angles, slots, self.params, bounds, blocks)
        self.lengths = [n + 1 for n in self.lengths]

    def _collect(self) -> list[Completion]:
        """Take out the samples that ended. The one place where the host waits for the GPU."""
        s, p, rows = self.slots, self.params, len(self.running)
        done, count, exit_at = s.state[:, :rows].cpu()[[7, 2, 6]].tolist()
        ended = [i for i in range(rows) if done[i]]
        if not ended:
            return []
        longest = max(count[i] for i in ended)
        tokens, logprobs = (t[ended, :longest].cpu().numpy() for t in (s.tokens, s.logprobs))
        stops = set() if p.stop_ids is None else set(p.stop_ids.tolist())
        completions = []
        for i, t, l in zip(ended, tokens, logprobs):
            c, self.running[i] = self.running[i], None
            c.tokens, c.logprobs = t[: count[i]].tolist(), l[: count[i]].copy()
            if exit_at[i] >= 0:
                inserted = min(len(p.forced_exit.tokens), count[i] - exit_at[i])
                c.forced_at, c.forced_tokens = exit_at[i], inserted
            stopped = c.tokens[-1] in stops and c.mask[-1]
            c.finish_reason = "forced+" * (exit_at[i] >= 0) + ("stop" if stopped else "length")
            s.free(i, self.lengths[i])
            completions.append(c)
        return completions
