"""Qwen2.5-VL, Qwen3-VL and their text-only kin in plain PyTorch: the decoder, and how a model is built and loaded.

    model = build_model("Qwen/Qwen2.5-VL-7B-Instruct", world)     # text-only: no vision tower is built
    logprobs, entropy = model(tokens, position_ids, cu_seqlens, targets=targets)

What differs from transformers, whose logits this must equal:
1. One layout: documents lie end to end in a packed stream (T,), without a batch dimension, padding or a mask.
2. Positions (M-RoPE: time, height, width) are arguments, never module state.
3. Training asks for log-probabilities of given targets; the (T, V) logits never exist at once.

Shapes: T tokens in the stream, N documents, C hidden size, Hq / Hkv query / KV heads, D head size, V vocabulary,
M image tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from core.attention import apply_rope, attend
from core.logprobs import ChunkedLogProbs, head_logits, rows_of_logits
from core.lora import LoRA, add_lora, init_lora
from core.parallel import World, rank0_first, shard
from core.vision import VisionConfig
from core.vision3 import Vision3Config
from core.weights import WeightFiles, load_hf

CHECKPOINTING = ("none", "matmul", "full")  # what backward recomputes, see `Block.forward`


# ------------------------------------------------------------------------------------------------- configuration
class Architecture(NamedTuple):
    """What distinguishes the decoders; all are pre-norm, with grouped queries, RoPE and SwiGLU."""

    qkv_bias: bool  # biases of the q, k and v projections; no other matrix has one
    qk_norm: bool  # RMSNorm over each head of q and of k, before the rotation
    mrope_interleaved: bool  # see `axis_of_frequency`
    vision: type | None  # the config of its vision tower


ARCHITECTURES = {  # config.json's model_type
    "qwen2": Architecture(True, False, False, None),  # Qwen2, Qwen2.5, QwQ-32B
    "qwen2_5_vl": Architecture(True, False, False, VisionConfig),  # 3B, 7B, 32B, 72B
    "qwen3": Architecture(False, True, False, None),  # dense Qwen3, 0.6B to 32B
    "qwen3_vl": Architecture(False, True, True, Vision3Config),  # dense: 2B, 4B, 8B, 32B
}


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that shape the model, read from a checkpoint's config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int] | None  # frequencies of (time, height, width); None: text
    tie_word_embeddings: bool
    image_token_id: int | None
    vision_start_token_id: int | None
    vision: VisionConfig | Vision3Config | None
    raw: dict  # config.json as read
    qkv_bias: bool = True
    qk_norm: bool = False
    mrope_interleaved: bool = False

    @staticmethod
    def from_dir(path: str | Path) -> ModelConfig:
        """Read `path`/config.json. Raises ValueError when it is missing, broken or unsupported."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise ValueError(
                f"{file}: not found. --model must name a Hugging Face model directory "
                "(config.json, *.safetensors, tokenizer files) or a hub id"
            )
        try:
            raw = json.loads(file.read_text())
        except json.JSONDecodeError as e:
            raise ValueError(f"{file}:{e.lineno}: not valid JSON ({e.msg}); fetch it again") from e
        try:
            return ModelConfig.from_dict(raw)
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from e

    @staticmethod
    def from_dict(raw: dict) -> ModelConfig:
        """Read a config.json: flat as Qwen2.5-VL's was published, or nested in `text_config`."""
        kind = raw.get("model_type")
        if kind not in ARCHITECTURES:
            raise ValueError(f"model_type {kind!r}: only {', '.join(ARCHITECTURES)} are supported")
        arch = ARCHITECTURES[kind]
        text = {**raw, **raw.get("text_config", {})}
        text |= text.get("rope_parameters") or text.get("rope_scaling") or {}
        _refuse_unknown_variants(arch, text)
        # no defaults here: those of transformers' classes are not those of the published models
        needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        needed += ["intermediate_size", "vocab_size", "rope_theta"]
        needed += ["head_dim"] if arch.qk_norm else []
        images = ["mrope_section", "image_token_id", "vision_start_token_id", "vision_config"]
        if missing := [k for k in needed + (images if arch.vision else []) if k not in text]:
            raise ValueError(f"fields {missing} are missing, which {kind} needs")
        head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        sections = tuple(text["mrope_section"]) if arch.vision else None
        if sections and sum(sections) != head_dim // 2:
            raise ValueError(
                f"mrope_section {sections} must sum to half the head size, {head_dim // 2}"
            )
        return ModelConfig(
            **{k: text[k] for k in needed if k not in ("rope_theta", "head_dim")},
            head_dim=head_dim,
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            rope_theta=float(text["rope_theta"]),
            mrope_section=sections,
            # text_config may repeat it; the one at the top level counts
            tie_word_embeddings=raw.get(
                "tie_word_embeddings", text.get("tie_word_embeddings", False)
            ),
            image_token_id=text["image_token_id"] if arch.vision else None,
            vision_start_token_id=text["vision_start_token_id"] if arch.vision else None,
            vision=arch.vision.from_dict(text["vision_config"]) if arch.vision else None,
            raw=raw,
            qkv_bias=arch.qkv_bias,
            qk_norm=arch.qk_norm,
            mrope_interleaved=arch.mrope_interleaved,
        )


def _refuse_unknown_variants(arch: Architecture, text: dict) -> None:
    """Raise ValueError for settings that load but would be computed wrongly."""
    allowed = {
        "hidden_act": ("silu",),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
        "partial_rotary_factor": (1.0, None),
        "attention_bias": (arch.qkv_bias, None),
        "mrope_interleaved": (arch.mrope_interleaved, None),
        "rope_type": ("default", "mrope", None),
        "type": ("default", "mrope", None),  # an older name of rope_type
    }
    for field, values in allowed.items():
        if text.get(field, values[0]) not in values:
            raise ValueError(f"{field} {text[field]!r} is not supported, only {values[0]!r}")
    if other := set(text.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types {sorted(other)} are not supported, only 'full_attention'")


# ------------------------------------------------------------------------------------------------------ positions
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


def rope_cos_sin(
    position_ids: torch.Tensor, config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary angles of every token: (cos, sin), each (T, D/2) fp32, from position_ids (3, T)."""
    half, device = config.head_dim // 2, position_ids.device
    inv_freq = config.rope_theta ** (-torch.arange(half, dtype=torch.float32, device=device) / half)
    axis = axis_of_frequency(config).to(device, non_blocking=True)
    angles = position_ids.float().t()[:, axis] * inv_freq  # (T, D/2)
    return angles.cos(), angles.sin()


# --------------------------------------------------------------------------------------------------------- layers
class RMSNorm(nn.Module):
    """x / rms(x) · weight, over the last dimension, in fp32 inside."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def qkv(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """x (T, C) → rotated q (T, Hq, D) and k (T, Hkv, D), and v (T, Hkv, D); the sampler caches k and v."""
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin), v

    def forward(self, x, cos, sin, cu_seqlens, max_len) -> torch.Tensor:
        q, k, v = self.qkv(x, cos, sin)
        return self.o_proj(attend(q, k, v, cu_seqlens, max_len, causal=True).flatten(1))  # (T, C)


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
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.checkpointing = "none"

    def forward(self, x, cos, sin, cu_seqlens, max_len) -> torch.Tensor:
        """x (T, C) → (T, C). `checkpointing` says what the backward pass recomputes: nothing (none),
        all but the outputs of attention and matmuls (matmul), or all from the block's input (full).
        Checkpointing inside forward, not in a wrapper, keeps the parameters' names as published."""
        args = (x, cos, sin, cu_seqlens, max_len)
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.run(*args)
        options = {} if self.checkpointing == "full" else {"context_fn": keep_matmuls}
        # no dropout: there is no random state to preserve
        return checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=False, **options)

    def run(self, x, cos, sin, cu_seqlens, max_len):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens, max_len)
        return x + self.mlp(self.post_attention_layernorm(x))


# attention on the CPU and of torch on CUDA (FlashAttention 2, or 3 when it is active), and of the flash-attn package
ATTENTION_OPS = ("scaled_dot_product", "_flash_attention", "varlen_attn", "flash_attn")


def keep_matmuls():
    """Contexts for `checkpoint` that keep the outputs of attention and matmuls, and recompute the rest."""

    def policy(ctx, op, *args, **kwargs):
        keep = any(n in str(op) for n in (*ATTENTION_OPS, "aten.mm", "aten.addmm"))
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Decoder(nn.Module):
    """Embedding, blocks, final norm: what the published names call `model`."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


# ---------------------------------------------------------------------------------------------------------- model
class Model(nn.Module):
    """The decoder with its output head and, only if asked for, the vision tower `visual`."""

    def __init__(self, config: ModelConfig, with_vision: bool = False):
        super().__init__()
        if with_vision and config.vision is None:
            raise ValueError("this model has no vision tower: only text can be used with it")
        self.config = config
        self.visual = config.vision.tower() if with_vision else None
        self.model = Decoder(config)
        tied = config.tie_word_embeddings
        self.lm_head = (
            None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        # what its files may hold beside its parameters, see `core.weights.WeightFiles.check`
        self.not_built = () if with_vision else ("visual.",)
        self.tied = ("lm_head.",) if tied else ()
        self.loss_chunk = 0  # rows of logits that exist at once; 0: `rows_of_logits`
        self.banned_ids: torch.Tensor | None = None  # see `set_banned_ids`

    def set_banned_ids(self, ids: list[int]) -> None:
        """Give these ids probability zero, in training and sampling alike: vision placeholders and the padded end of
        the vocabulary would otherwise be sampled now and then and break the next forward."""
        device = self.model.embed_tokens.weight.device
        self.banned_ids = torch.tensor(sorted(ids), device=device) if ids else None

    def head_weight(self) -> torch.Tensor:
        """(V, C): the output matrix, which is the embedding itself when the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embed(
        self,
        tokens: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
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
        rows = (tokens == self.config.image_token_id).nonzero().squeeze(1)
        image = self.visual(pixel_values.to(x.device), torch.as_tensor(grid_thw)).to(x.dtype)
        if len(rows) != len(image):
            raise ValueError(
                f"{len(rows)} image placeholders in the tokens, {len(image)} tokens from the images"
            )
        image, *deepstack = image.split(x.shape[1], dim=1)  # (M, C) each
        return x.index_copy(0, rows, image), [(rows, extra) for extra in deepstack]

    def _no_image(self) -> torch.Tensor | float:
        """Zero, through the whole tower when it is trained: under FSDP every rank must have a gradient for the same
        parameters, also a rank whose micro-batch has no image."""
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

        tokens (T,) long; position_ids (3, T) long; cu_seqlens (N+1,) int32; targets (T,) long, -100 where nothing is
        asked; pixel_values and grid_thw: see the tower. max_len (bound of the document lengths) and rows (where targets
        are) spare two waits for the GPU when these are CUDA tensors; by default they are read from the others.
        Returns fp32 logits (T, V) without targets; else (logprobs (T,), entropies (T,) or None), fp32, zero where the
        target is -100: log softmax(logits / temperature)[target], and the entropy of the same distribution.
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


# ----------------------------------------------------------------------------------------- from a model directory
def resolve_model_dir(name: str, world: World) -> Path:
    """A local directory as it is; a hub id: its local copy, downloaded (by rank 0 first) if need be."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"--model {name}: no such directory (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download

    with rank0_first(world):
        try:
            patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
            return Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as e:  # the hub client raises a dozen kinds of exceptions
            raise ValueError(
                f"--model {name}: no such directory, and it could not be downloaded from the hub "
                f"({type(e).__name__}: {e})"
            ) from e


def check_model_dir(model_dir: str | Path) -> None:
    """Raise ValueError unless this directory holds a supported model with all weights in shape.

    Reads headers only, so that a broken directory shows before minutes of preparing data."""
    with torch.device("meta"):
        model = Model(ModelConfig.from_dir(model_dir))
    WeightFiles(model_dir).check(model)


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
    reshard_after_forward: bool = True,
    replicas: int = 1,
    lora: LoRA | None = None,
) -> Model:
    """The model of a directory, sharded over the ranks and filled, without a full copy on any rank.

    Order: build on meta → adapters → checkpointing inside blocks → compile blocks → shard →
    allocate → load. With `lora` everything but the fp32 adapters is frozen in the compute dtype.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing {checkpointing!r}: one of {', '.join(CHECKPOINTING)}")
    with torch.device("meta"):
        model = Model(ModelConfig.from_dir(model_dir), with_vision)
        model.to(compute_dtype if lora else master_dtype)
    if with_vision:
        model.visual.requires_grad_(train_vision)
    if lora:
        add_lora(model, lora)
    for block in model.model.layers:
        block.checkpointing = checkpointing
        if compile_blocks:
            block.compile()
    fsdp = dict(reshard_after_forward=reshard_after_forward, replicas=replicas)
    shard(model, world, compute_dtype=compute_dtype, **fsdp)
    model.to_empty(device=world.device)
    load_hf(model, model_dir)
    if lora:
        init_lora(model, lora)
    # mixed precision would be silently lost if the masters were not what was asked for
    trained = torch.float32 if lora else master_dtype
    assert all(p.dtype == trained for p in model.parameters() if p.requires_grad)
    return model


# ------------------------------------------------------------------------------------------------ cost of training
def train_flops(config: ModelConfig, lengths: list[int] | torch.Tensor) -> tuple[float, float]:
    """FLOPs of forward + backward over documents of these lengths: (strict, PaLM convention).

    Both: 6 · (parameters in matmuls, head included, embedding lookup excluded) a token. Attention:
    strict counts the causal half within each document, 6·L·Hq·D·len² a document; PaLM counts
    12·L·Hq·D·T a token at the full stream length T. Recomputation is never counted.
    """
    lens = torch.as_tensor(lengths, dtype=torch.float64)
    c, tokens = config, float(lens.sum())
    attention_size = c.num_attention_heads * c.head_dim
    per_layer = (
        c.hidden_size * (2 * attention_size + 2 * c.num_key_value_heads * c.head_dim)
        + 3 * c.hidden_size * c.intermediate_size
    )
    matmul = 6 * (c.num_hidden_layers * per_layer + c.vocab_size * c.hidden_size) * tokens
    per_pair = 6 * c.num_hidden_layers * attention_size
    return matmul + per_pair * float((lens**2).sum()), matmul + 2 * per_pair * tokens**2
