"""Qwen2.5-VL and Qwen3-VL, and their text-only kin: the decoder, and how a model is loaded.

    model = build_model(model_dir, world)  # with_vision=True also builds the vision tower
    logprobs, entropy = model(tokens, position_ids, cu_seqlens, targets=targets)

What differs from transformers, whose logits this must equal:
1. One layout: documents lie end to end in a packed stream (T,); no batch dimension, no padding.
2. Positions (M-RoPE: time, height, width) are arguments, never module state.
3. Training asks for log-probabilities of given targets; the (T, V) logits never exist at once.

Parameter names are the published ones. Config fields and architectures: core/config.py.

Shapes: T tokens in the stream, N documents, C hidden size, Hq / Hkv query / KV heads, D head size,
V vocabulary, M image tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from core.attention import apply_rope, attend
from core.config import ModelConfig, refuse_what_is_no_model
from core.logprobs import ChunkedLogProbs, head_logits, rows_of_logits
from core.lora import LoRA, add_lora, init_lora
from core.parallel import World, rank0_first, shard
from core.weights import WeightFiles, load_hf

CHECKPOINTING = ("none", "matmul", "full")  # what backward recomputes, see `Block.forward`


# ---------------------------------------------------------------------- positions
def axis_of_frequency(config: ModelConfig) -> torch.Tensor:
    """(D/2,) long: which position turns each rotary frequency, 0 time, 1 height or 2 width.

    Sections (2, 1, 1) of four frequencies: contiguous (Qwen2.5-VL) 0 0 1 2; interleaved (Qwen3-VL)
    0 1 2 0, where height and width take every third frequency from 1 and 2 on, as long as their
    section lasts, and time the rest. Text has three equal positions: there this is ordinary RoPE.
    """
    half = config.head_dim // 2
    sections = config.mrope_section or (half, 0, 0)
    if not config.mrope_interleaved:
        return torch.tensor([axis for axis, n in enumerate(sections) for _ in range(n)])
    axis = torch.arange(half) % 3
    return torch.where(torch.arange(half) < 3 * torch.tensor(sections)[axis], axis, 0)


def rope_cos_sin(position_ids: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, ...]:
    """Rotary angles of every token: (cos, sin), each (T, D/2) fp32, from position_ids (3, T)."""
    half, device = config.head_dim // 2, position_ids.device
    inv_freq = config.rope_theta ** (-torch.arange(half, dtype=torch.float32, device=device) / half)
    axis = axis_of_frequency(config).to(device, non_blocking=True)
    angles = position_ids.float().t()[:, axis] * inv_freq  # (T, D/2)
    return angles.cos(), angles.sin()


# ---------------------------------------------------------------------- layers
class Attention(nn.Module):
    """Grouped-query attention. Qwen2: biases on q, k, v. Qwen3: norms on the heads of q and k."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def qkv(self, x, cos, sin) -> tuple[torch.Tensor, ...]:
        """x (T, C) → rotated q (T, Hq, D) and k (T, Hkv, D), and v (T, Hkv, D)."""
        heads = (-1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads))
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads))
        v = self.v_proj(x).unflatten(-1, heads)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def forward(self, x, cos, sin, attn: Callable) -> torch.Tensor:
        """x (T, C) → (T, C); attn(q, k, v) → (T, Hq, D)"""
        return self.o_proj(attn(*self.qkv(x, cos, sin)).flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) · up x)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer, pre-norm."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.checkpointing = "none"

    def forward(self, x, cos, sin, cu_seqlens, max_len) -> torch.Tensor:
        """x (T, C) → (T, C). `checkpointing` is what backward recomputes: nothing (none), all but
        the outputs of attention and matmuls (matmul), or all from the block's input (full).
        Checkpointing inside forward, not in a wrapper, keeps the published parameter names."""

        def attn(q, k, v):
            return attend(q, k, v, cu_seqlens, max_len, causal=True)

        args = (x, cos, sin, attn)
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.run(*args)
        options = {} if self.checkpointing == "full" else {"context_fn": keep_matmuls}
        # no dropout: there is no random state to preserve
        return checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=False, **options)

    def run(self, x, cos, sin, attn: Callable) -> torch.Tensor:
        """With any attention: the sampler's reads its cache. No call of the module, at which FSDP
        would gather its weights."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attn)
        return x + self.mlp(self.post_attention_layernorm(x))


# attention on the CPU, of torch on CUDA (FlashAttention 2 or 3), and of the flash-attn package
ATTENTION_OPS = ("scaled_dot_product", "_flash_attention", "varlen_attn", "flash_attn")


def keep_matmuls():
    """Contexts for `checkpoint` that keep the outputs of attention and matmuls, but for those of
    LoRA's second matrix: as large as its layer's output, and cheap to recompute."""

    def policy(ctx, op, *args, **kwargs):
        keep = any(n in str(op) for n in (*ATTENTION_OPS, "aten.mm", "aten.addmm"))
        if keep and "aten.mm" in str(op):  # (T, rank) @ (rank, out)
            keep = 8 * args[1].shape[0] > args[1].shape[1]
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Decoder(nn.Module):
    """Embedding, blocks, final norm: what the published names call `model`."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)


# ---------------------------------------------------------------------- model
class Model(nn.Module):
    """The decoder with its output head and, only if asked for, the vision tower `visual`."""

    def __init__(self, config: ModelConfig, with_vision: bool = False):
        super().__init__()
        if with_vision and config.vision is None:
            raise ValueError("this model has no vision tower: only text can be used with it")
        self.config = config
        self.visual = config.vision.tower() if with_vision else None
        self.model = Decoder(config)
        tied, sizes = config.tie_word_embeddings, (config.hidden_size, config.vocab_size)
        self.lm_head = None if tied else nn.Linear(*sizes, bias=False)
        # what its files may hold beside its parameters, see `core.weights.WeightFiles.check`
        self.not_built = () if with_vision else ("visual.",)
        self.tied = ("lm_head.",) if tied else ()
        self.loss_chunk = 0  # rows of logits that exist at once; 0: `rows_of_logits`
        self.banned_ids: torch.Tensor | None = None  # see `set_banned_ids`

    def set_banned_ids(self, ids: list[int]) -> None:
        """Give these ids probability zero, in training and sampling alike: vision placeholders and
        the padded end of the vocabulary would otherwise be sampled and break the next forward."""
        device = self.model.embed_tokens.weight.device
        self.banned_ids = torch.tensor(sorted(ids), device=device) if ids else None

    def head_weight(self) -> torch.Tensor:
        """(V, C): the output matrix, which is the embedding itself when the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, tokens, pixel_values=None, grid_thw=None) -> tuple[torch.Tensor, list]:
        """tokens (T,) → x (T, C) and what DeepStack adds to it later.

        Each image placeholder takes the next vector of the tower. Qwen3-VL's tower has more for it
        (DeepStack): after layer k the caller adds the k-th, x = x.index_add(0, *deepstack[k]).
        deepstack is a list of (placeholders' rows (M,), vectors (M, C)), empty for Qwen2.5-VL.
        """
        x = self.model.embed_tokens(tokens)  # (T, C)
        if pixel_values is None:
            needs_gradient = self.visual is not None and torch.is_grad_enabled()
            return (x + self._no_image() if needs_gradient else x), []
        if self.visual is None:
            raise ValueError("images given, but the model was built without with_vision=True")
        image = self.visual(pixel_values.to(x.device), torch.as_tensor(grid_thw)).to(x.dtype)
        # as many as `mrope_positions` has found; `nonzero` would wait for the GPU to count them
        found = tokens == self.config.image_token_id
        rows = torch.nonzero_static(found, size=len(image)).squeeze(1)
        image, *deepstack = image.split(x.shape[1], dim=1)  # (M, C) each
        return x.index_copy(0, rows, image), [(rows, extra) for extra in deepstack]

    def _no_image(self) -> torch.Tensor | float:
        """Zero, through the whole tower when it is trained: under FSDP every rank must have a
        gradient for the same parameters, also one whose micro-batch has no image."""
        weight, side = self.visual.patch_embed.proj.weight, self.visual.config.spatial_merge_size
        if not weight.requires_grad:
            return 0.0
        blank = torch.zeros(side**2, weight[0].numel(), device=weight.device)
        return self.visual(blank, torch.tensor([[1, side, side]])).sum() * 0.0

    def forward(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        *,
        targets: torch.Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        pixel_values: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
        max_len: int | None = None,
        rows: torch.Tensor | None = None,
    ):
        """One packed stream through the model.

        tokens (T,) long; position_ids (3, T) long; cu_seqlens (N+1,) int32; targets (T,) long, -100
        where nothing is asked; pixel_values and grid_thw: see the tower. max_len (bound of the
        document lengths) and rows (where targets are), if given, spare two waits for the GPU.
        Returns fp32 logits (T, V) without targets, which have no gradient in bf16 on CUDA; else
        (logprobs (T,), entropies (T,) or None), fp32, zero where the target is -100: log
        softmax(logits / temperature)[target], and the entropy of the same distribution.
        """
        device = self.model.embed_tokens.weight.device
        max_len = max_len or int(cu_seqlens.diff().max())
        if targets is not None and rows is None:
            rows = (targets != -100).nonzero().squeeze(1)
        tokens, position_ids, cu = (
            t.to(device, non_blocking=True) for t in (tokens, position_ids, cu_seqlens)
        )
        x, deepstack = self.embed(tokens, pixel_values, grid_thw)
        cos, sin = rope_cos_sin(position_ids, self.config)
        for k, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, cu, max_len)
            if k < len(deepstack):
                x = x.index_add(0, *deepstack[k])
        if targets is None:
            return head_logits(self.model.norm(x), self.head_weight(), 1.0, self.banned_ids)
        rows, targets = rows.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        logprobs, entropies = ChunkedLogProbs.apply(
            self.model.norm(x[rows]),  # only the rows that are asked for reach the head
            self.head_weight(),
            targets[rows],
            temperature,
            entropy,
            self.banned_ids,
            self.loss_chunk or rows_of_logits(self.head_weight()),
        )
        full = torch.zeros(len(tokens), device=device)
        entropies = full.index_copy(0, rows, entropies) if entropy else None
        return full.index_copy(0, rows, logprobs), entropies


# ---------------------------------------------------------------------- from a model directory
def resolve_model_dir(name: str, world: World) -> Path:
    """A local directory as it is, or the local copy of a hub id (downloaded by rank 0 first).
    Raises ValueError where neither holds a model."""
    path = Path(name).expanduser()
    if path.exists():
        refuse_what_is_no_model(path)
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"--model {name}: no such directory (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download

    with rank0_first(world):
        try:
            patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
            return Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as e:  # the hub client raises a dozen kinds of exceptions
            raise ValueError(
                f"--model {name}: no such directory, and the hub does not give it "
                f"({type(e).__name__}: {' '.join(str(e).split())})"
            ) from e


def meta_model(config: ModelConfig, with_vision: bool = False, lora: LoRA | None = None) -> Model:
    """The model without memory for its weights: what a plan is made from."""
    with torch.device("meta"):
        model = Model(config, with_vision)
    if lora:
        add_lora(model, lora)
    return model


def check_model_dir(model_dir: str | Path) -> None:
    """Raise ValueError unless this directory holds a supported model with all weights in shape.

    Reads headers only, so that a broken directory shows before minutes of preparing data."""
    WeightFiles(model_dir).check(meta_model(ModelConfig.from_dir(model_dir)))


def build_model(
    model_dir: str | Path,
    world: World,
    *,
    with_vision: bool = False,
    train_vision: bool = False,
    compute_dtype: torch.dtype = torch.float32,
    master_dtype: torch.dtype = torch.float32,
    checkpointing: str = "none",
    compile_blocks: bool = False,
    lora: LoRA | None = None,
    replicas: int = 1,
) -> Model:
    """The model of a directory, sharded over the ranks and filled, without a full copy on any rank.

    With `lora` everything but the fp32 adapters is frozen in the compute dtype. replicas: see
    `core.parallel.shard`.
    """
    model = meta_model(ModelConfig.from_dir(model_dir), with_vision)
    model.to(compute_dtype if lora else master_dtype)
    if with_vision:
        model.visual.requires_grad_(train_vision)
        for block in model.visual.blocks:
            block.recompute = train_vision and checkpointing != "none"
    if lora:
        add_lora(model, lora)
    for block in model.model.layers:
        block.checkpointing = checkpointing
        if compile_blocks:
            block.compile()
    shard(model, world, compute_dtype=compute_dtype, replicas=replicas)
    model.to_empty(device=world.device)
    load_hf(model, model_dir)
    if lora:
        init_lora(model, lora)
    # mixed precision would be silently lost if the masters were not what was asked for
    trained = torch.float32 if lora else master_dtype
    assert all(p.dtype == trained for p in model.parameters() if p.requires_grad)
    return model
