"""Qwen2.5-VL in plain PyTorch: the language model, its rotary positions, and chunked token log-probabilities.

    model = Model(ModelConfig.from_dir(path), with_vision=False)        # text-only training never builds the tower
    logprobs, entropy = model(tokens, position_ids, cu_seqlens, targets=targets)

What differs from transformers' `Qwen2_5_VLForConditionalGeneration`, whose logits this must equal:
1. One layout: documents lie end to end in a packed stream (T,); there is no batch dimension, padding or mask tensor.
2. Positions (M-RoPE: time, height, width) are arguments, never module state.
3. Training asks for log-probabilities of given targets, and the (T, V) logits never exist at once.
Parameter names are the published checkpoint's own, so that loading is the identity. The text-only Qwen2 / Qwen2.5
family (QwQ-32B too) is the same decoder with one-dimensional positions and no tower.

Shapes: T tokens in the stream, N documents, C hidden size, Hq / Hkv query / KV heads, D head size, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from core.attention import apply_rope, attend
from core.parallel import World, rank0_first, shard
from core.vision import VisionConfig, VisionTower
from core.weights import WeightFiles, load_hf

SUPPORTED = "qwen2_5_vl (Qwen2.5-VL 3B, 7B, 32B, 72B) and qwen2 (text-only Qwen2, Qwen2.5, QwQ-32B)"
CHECKPOINTING = ("none", "matmul", "full")  # what backward recomputes, see `Block.forward`


# ------------------------------------------------------------------------------------------------- configuration
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
    mrope_section: (
        tuple[int, int, int] | None
    )  # frequencies per axis (time, height, width); None: text-only model
    tie_word_embeddings: bool
    image_token_id: int | None
    vision_start_token_id: int | None
    vision: VisionConfig | None
    raw: dict  # the config.json as read, written back unchanged on export

    @staticmethod
    def from_dir(path: str | Path) -> "ModelConfig":
        """Read `path`/config.json. Raises ValueError when it is missing, broken or of another architecture."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise ValueError(
                f"{file}: not found. --model must name a Hugging Face model directory "
                "(config.json, *.safetensors, tokenizer files) or a hub id"
            )
        try:
            raw = json.loads(file.read_text())
        except json.JSONDecodeError as e:
            raise ValueError(
                f"{file}:{e.lineno}: not valid JSON ({e.msg}); fetch the file again"
            ) from e
        try:
            return ModelConfig.from_dict(raw)
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from e

    @staticmethod
    def from_dict(raw: dict) -> "ModelConfig":
        """Both forms of config.json: flat as published, or nested in `text_config` as transformers 5 writes it."""
        kind = raw.get("model_type")
        if kind not in ("qwen2_5_vl", "qwen2"):
            raise ValueError(f"model_type {kind!r} is not supported; supported: {SUPPORTED}")
        text = {**raw, **raw.get("text_config", {})}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        _refuse_unknown_variants(text, rope)
        needed = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
        )
        missing = [k for k in needed if k not in text]
        if missing:
            raise ValueError(f"fields {missing} are missing")
        is_vl = kind == "qwen2_5_vl"
        if is_vl and "mrope_section" not in rope:
            raise ValueError(
                "rope_scaling (or rope_parameters) has no mrope_section, which qwen2_5_vl needs"
            )
        head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        sections = tuple(rope["mrope_section"]) if is_vl else None
        if sections and sum(sections) != head_dim // 2:
            raise ValueError(
                f"mrope_section {sections} must sum to half the head size, {head_dim // 2}"
            )
        return ModelConfig(
            hidden_size=text["hidden_size"],
            num_hidden_layers=text["num_hidden_layers"],
            num_attention_heads=text["num_attention_heads"],
            num_key_value_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
            head_dim=head_dim,
            intermediate_size=text["intermediate_size"],
            vocab_size=text["vocab_size"],
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 1e6),
            mrope_section=sections,
            # the nested form keeps the flag that counts at the top level
            tie_word_embeddings=bool(
                raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
            ),
            image_token_id=raw.get("image_token_id") if is_vl else None,
            vision_start_token_id=raw.get("vision_start_token_id") if is_vl else None,
            vision=VisionConfig.from_dict(raw["vision_config"]) if is_vl else None,
            raw=raw,
        )


def _refuse_unknown_variants(text: dict, rope: dict) -> None:
    if text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {text['hidden_act']!r} is not supported (only 'silu')")
    if text.get("use_sliding_window"):
        raise ValueError(
            "use_sliding_window is on; only full attention is supported. Set it to false in config.json"
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise ValueError(f"rope scaling {kind!r} is not supported (only 'default' and 'mrope')")


# ------------------------------------------------------------------------------------------------------ positions
def rope_cos_sin(
    position_ids: torch.Tensor, config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary angles of every token: (cos, sin), each (T, D/2) fp32, from position_ids (3, T).

    M-RoPE gives frequency j of D/2 to one axis: the first mrope_section[0] frequencies turn with time, the next with
    height, the last with width. On text all three positions are equal, and this is ordinary RoPE.
    """
    half = config.head_dim // 2
    device = position_ids.device
    inv_freq = config.rope_theta ** (-torch.arange(half, dtype=torch.float32, device=device) / half)
    sections = config.mrope_section or (half, 0, 0)
    # e.g. mrope_section (1, 2, 1): frequency 0 reads axis 0, 1 and 2 read axis 1, 3 reads axis 2
    angles = torch.cat(
        [
            position_ids[axis, :, None].float() * f  # (T, section)
            for axis, f in enumerate(inv_freq.split(sections))
        ],
        dim=1,
    )
    return angles.cos(), angles.sin()  # (T, D/2)


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
    """Grouped-query attention; q, k, v have biases, o has none."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def qkv(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """x (T, C) → rotated q (T, Hq, D), rotated k (T, Hkv, D), v (T, Hkv, D); the sampler caches k and v."""
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

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
        """x (T, C) → (T, C). `checkpointing` says what the backward pass recomputes: nothing (none), all but the
        outputs of attention and of every matmul (matmul), or all from the block's input (full).
        Checkpointing inside forward, not as a wrapper, keeps the parameters' names as published."""
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.run(x, cos, sin, cu_seqlens, max_len)
        options = {} if self.checkpointing == "full" else {"context_fn": keep_matmuls}
        return checkpoint(
            self.run,
            x,
            cos,
            sin,
            cu_seqlens,
            max_len,
            use_reentrant=False,
            preserve_rng_state=False,
            **options,
        )  # no dropout: there is no random state to preserve

    def run(self, x, cos, sin, cu_seqlens, max_len):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens, max_len)
        return x + self.mlp(self.post_attention_layernorm(x))


# attention on the CPU and of torch on CUDA (FlashAttention 2, or 3 when it is active), and of the flash-attn package
ATTENTION_OPS = ("scaled_dot_product", "_flash_attention", "varlen_attn", "flash_attn")


def keep_matmuls():
    """Contexts for `checkpoint` that keep the outputs of attention and matrix products, and recompute the rest."""

    def policy(ctx, op, *args, **kwargs):
        name = str(op)
        keep = any(n in name for n in (*ATTENTION_OPS, "aten.mm", "aten.addmm"))
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
    """Qwen2.5-VL (or Qwen2). Without `with_vision`, `visual.*` is neither built, nor loaded, sharded or trained."""

    def __init__(self, config: ModelConfig, with_vision: bool = False):
        super().__init__()
        if with_vision and config.vision is None:
            raise ValueError(
                "this model has no vision tower (model_type qwen2); only text can be used with it"
            )
        self.config = config
        self.visual = VisionTower(config.vision) if with_vision else None
        self.model = Decoder(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        # what its files may hold beside its parameters, see `core.weights.WeightFiles.check`
        self.not_built = () if with_vision else ("visual.",)
        self.tied = ("lm_head.",) if config.tie_word_embeddings else ()
        self.loss_chunk = 0  # rows of logits that exist at once, 0: by device, see `rows_of_logits`
        self.banned_ids: torch.Tensor | None = (
            None  # ids that never get probability, see `set_banned_ids`
        )

    def set_banned_ids(self, ids: list[int]) -> None:
        """Give these ids probability zero, in training and sampling alike: vision placeholders and the padded end of
        the vocabulary would otherwise be sampled now and then and break the next forward."""
        device = self.model.embed_tokens.weight.device
        self.banned_ids = (
            torch.tensor(sorted(ids), dtype=torch.long, device=device) if ids else None
        )

    def head_weight(self) -> torch.Tensor:
        """(V, C): the output matrix, which is the embedding itself when the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embed(
        self,
        tokens: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """tokens (T,) → (T, C); each image placeholder takes the next merged vision token of `pixel_values`."""
        x = self.model.embed_tokens(tokens)  # (T, C)
        if pixel_values is None:
            return (
                x + self._no_image() if self.visual is not None and torch.is_grad_enabled() else x
            )
        if self.visual is None:
            raise ValueError(
                "images given, but the model was built without its vision tower (with_vision=True)"
            )
        places = (tokens == self.config.image_token_id).nonzero().squeeze(1)
        image = self.visual(
            pixel_values.to(x.device), torch.as_tensor(grid_thw)
        )  # (number of merged vision tokens, C)
        if len(places) != len(image):
            raise ValueError(
                f"{len(places)} image placeholders in the tokens, {len(image)} tokens from the images"
            )
        return x.index_copy(0, places, image.to(x.dtype))

    def _no_image(self) -> torch.Tensor | float:
        """Zero, through the tower when it is trained: under FSDP every rank must have a gradient for the same
        parameters, also a rank whose micro-batch has no image."""
        weight = self.visual.patch_embed.proj.weight
        if not weight.requires_grad:
            return 0.0
        blank = torch.zeros(
            self.visual.config.spatial_merge_size**2,
            weight.flatten(1).shape[1],
            device=weight.device,
        )
        side = self.visual.config.spatial_merge_size
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
        asked. max_len (bound of the document lengths) and rows (where targets are) spare two waits for the GPU when
        these are CUDA tensors; by default they are read from cu_seqlens and targets.
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
        x = self.embed(tokens, pixel_values, grid_thw)
        cos, sin = rope_cos_sin(position_ids, self.config)
        for layer in self.model.layers:
            x = layer(x, cos, sin, cu, max_len)
        if targets is None:
            return head_logits(self.model.norm(x), self.head_weight(), 1.0, self.banned_ids)
        rows, targets = rows.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        hidden = self.model.norm(x[rows])  # only the rows that are asked for reach the head
        logprobs, entropies = ChunkedLogProbs.apply(
            hidden,
            self.head_weight(),
            targets[rows],
            temperature,
            entropy,
            self.banned_ids,
            self.loss_chunk or rows_of_logits(self),
        )
        full = torch.zeros(len(tokens), device=device)
        return full.index_copy(0, rows, logprobs), full.index_copy(
            0, rows, entropies
        ) if entropy else None


# ------------------------------------------------------------------------------------- log-probabilities in chunks
def rows_of_logits(model: Model) -> int:
    """Rows of one chunk: 4,096 on a GPU (2.5 GB of fp32 logits at V = 152,064; large matmuls run best), 32 MB on CPU,
    where larger blocks miss the cache and fresh pages cost more than the arithmetic."""
    on_gpu = model.model.embed_tokens.weight.is_cuda
    return 4096 if on_gpu else max(16, 2**23 // model.config.vocab_size)


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with an fp32 result that was never rounded to bf16: on CUDA straight from the tensor cores."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: float, banned_ids: torch.Tensor | None
) -> torch.Tensor:
    """hidden (R, C), weight (V, C) → fp32 logits / temperature (R, V). Trainer and sampler both score with this.

    Banned ids get -1e30: probability exactly 0, and no NaN in 0 · log 0.
    """
    logits = matmul_fp32(hidden, weight.t())
    if temperature != 1.0:
        logits = logits.div_(temperature)
    if banned_ids is not None:
        logits = logits.index_fill_(1, banned_ids, -1e30)
    return logits


class ChunkedLogProbs(torch.autograd.Function):
    """Log-probabilities (and entropies) of targets without the (R, V) logits: they exist for `chunk` rows at a time
    and are computed again in backward. The head's weight gradient is summed over chunks in fp32 (summed in bf16 its
    error grows from 2e-3 to 5e-3 over 32 chunks). Must equal log_softmax + gather, and its autograd."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, with_entropy, banned_ids, chunk):
        """hidden (R, C), weight (V, C), targets (R,) → logprobs (R,), entropies (R,), fp32 (zeros when not asked)."""
        logprobs = torch.zeros(len(targets), device=hidden.device)
        entropies = torch.zeros_like(logprobs)
        lse = torch.zeros_like(logprobs)
        for s in _slices(len(targets), chunk):
            logits = head_logits(hidden[s], weight, temperature, banned_ids)  # (chunk, V)
            lse[s] = logits.logsumexp(-1)
            logprobs[s] = logits.gather(1, targets[s, None]).squeeze(1) - lse[s]
            if with_entropy:
                entropies[s] = lse[s] - (logits - lse[s, None]).exp_().mul_(logits).sum(
                    -1
                )  # H = lse - E[logit]
        ctx.save_for_backward(hidden, weight, targets, lse, entropies)
        ctx.options = temperature, with_entropy, banned_ids, chunk
        return logprobs, entropies

    @staticmethod
    def backward(ctx, d_logprobs, d_entropies):
        hidden, weight, targets, lse, entropies = ctx.saved_tensors
        temperature, with_entropy, banned_ids, chunk = ctx.options
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for s in _slices(len(targets), chunk):
            # ∂logp[y]/∂z = onehot(y) - p;  ∂H/∂z = -p (log p + H). In place: a chunk of logits is the largest tensor
            logp = head_logits(hidden[s], weight, temperature, banned_ids).sub_(
                lse[s, None]
            )  # (chunk, V)
            if with_entropy:
                p = logp.exp()
                d_logits = (
                    logp.add_(entropies[s, None])
                    .mul_(d_entropies[s, None])
                    .add_(d_logprobs[s, None])
                    .mul_(p)
                    .neg_()
                )
                del p
            else:
                d_logits = logp.exp_().mul_(-d_logprobs[s, None])
            d_logits.scatter_add_(1, targets[s, None], d_logprobs[s, None])
            d_logits = d_logits.div_(temperature).to(hidden.dtype)
            d_hidden[s] = d_logits @ weight
            if ctx.needs_input_grad[1]:
                add_weight_gradient(d_weight, d_logits, hidden[s])
        return (
            d_hidden,
            d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
            None,
            None,
        )


def add_weight_gradient(total: torch.Tensor, d_logits: torch.Tensor, hidden: torch.Tensor) -> None:
    """total (V, C) fp32 += d_logitsᵀ (V, R) @ hidden (R, C), in fp32 whatever the inputs' dtype."""
    if hidden.dtype == torch.float32:
        total.addmm_(d_logits.t(), hidden)
    else:
        total += matmul_fp32(d_logits.t(), hidden)


def _slices(rows: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, rows)) for i in range(0, rows, chunk)]


# ----------------------------------------------------------------------------------------- from a model directory
def resolve_model_dir(name: str, world: World) -> Path:
    """A local directory as it is; a hub id is downloaded (by rank 0 first) and its local copy returned."""
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
    """Raise ValueError unless this directory holds a supported model with all of its weights in shape. Reads headers
    only, so that a broken directory shows before minutes of preparing data."""
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
) -> Model:
    """The model of a directory, sharded over the ranks and filled, without a full copy on any rank.

    Order: build on meta → checkpointing inside blocks → compile blocks → shard → allocate → load.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing {checkpointing!r}: one of {', '.join(CHECKPOINTING)}")
    with torch.device("meta"):
        model = Model(ModelConfig.from_dir(model_dir), with_vision).to(master_dtype)
    if with_vision:
        model.visual.requires_grad_(train_vision)
    for block in model.model.layers:
        block.checkpointing = checkpointing
        if compile_blocks:
            block.compile()
    shard(
        model,
        world,
        compute_dtype=compute_dtype,
        reshard_after_forward=reshard_after_forward,
        replicas=replicas,
    )
    model.to_empty(device=world.device)
    load_hf(model, model_dir)
    # mixed precision would be silently lost if the masters were not what was asked for
    assert all(p.dtype == master_dtype for p in model.parameters())
    return model


# ------------------------------------------------------------------------------------------------ cost of training
def train_flops(config: ModelConfig, lengths: list[int] | torch.Tensor) -> tuple[float, float]:
    """FLOPs of forward + backward over documents of these lengths: (strict, PaLM convention).

    Both: 6 · (parameters in matmuls, head included, embedding lookup excluded) a token. Attention: strict counts the
    causal half within each document, 6·L·Hq·D·len² a document; PaLM counts 12·L·Hq·D·T a token at the full stream
    length T, as most published MFUs do. Recomputation is never counted.
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
