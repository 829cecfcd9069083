"""The numbers that shape a model, read from config.json; what distinguishes the architectures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from core.files import read_json
from core.vision import VisionConfig


class Architecture(NamedTuple):
    """What distinguishes the decoders; all are pre-norm, with grouped queries, RoPE and SwiGLU."""

    qkv_bias: bool  # biases of the q, k and v projections; no other matrix has one
    qk_norm: bool  # RMSNorm over each head of q and of k, before the rotation
    mrope_interleaved: bool  # see `axis_of_frequency`
    images: bool  # has a vision tower


ARCHITECTURES = {  # config.json's model_type
    "qwen2": Architecture(True, False, False, False),  # Qwen2, Qwen2.5, QwQ-32B
    "qwen2_5_vl": Architecture(True, False, False, True),  # 3B, 7B, 32B, 72B
    "qwen3": Architecture(False, True, False, False),  # dense Qwen3, 0.6B to 32B
    "qwen3_vl": Architecture(False, True, True, True),  # dense: 2B, 4B, 8B, 32B
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
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    mrope_interleaved: bool
    raw: dict  # config.json as read
    # None in text-only models; mrope_section: frequencies of (time, height, width)
    mrope_section: tuple[int, int, int] | None = None
    image_token_id: int | None = None
    vision: VisionConfig | None = None

    @staticmethod
    def from_dir(path: str | Path) -> ModelConfig:
        """Read `path`/config.json. Raises ValueError when it is missing, broken or unsupported."""
        raw = read_json(file := Path(path) / "config.json")
        try:
            return ModelConfig.from_dict(raw)
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from e

    def room_for(self, prompt: int, new_tokens: int) -> int:
        """prompt + new_tokens: the longest prompt, and what may be sampled after it. Raises
        ValueError where the model has fewer positions."""
        text = self.raw.get("text_config", self.raw)
        if prompt + new_tokens > (most := text.get("max_position_embeddings", 10**9)):
            raise ValueError(
                f"the longest prompt ({prompt} tokens) and {new_tokens} new ones exceed the model's"
                f" context of {most}; lower --max_new_tokens, or leave out long prompts"
            )
        return prompt + new_tokens

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
        images = ["mrope_section", "image_token_id"] if arch.images else []
        wanted = [*needed, *images, "vision_config"] if arch.images else needed
        if missing := [k for k in wanted if k not in text]:
            raise ValueError(f"fields {missing} are missing, which {kind} needs")
        values = {k: text[k] for k in needed + images} | arch._asdict()
        if values.pop("images"):
            values["vision"] = VisionConfig.from_dict(text["vision_config"], qwen3=arch.qk_norm)
            values["mrope_section"] = tuple(text["mrope_section"])
        heads = text["num_attention_heads"]
        values["head_dim"] = text.get("head_dim") or text["hidden_size"] // heads
        sections, half = values.get("mrope_section"), values["head_dim"] // 2
        if sections and sum(sections) != half:
            raise ValueError(f"mrope_section {sections} must sum to half the head size, {half}")
        # text_config may repeat it; the one at the top level counts
        tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        eps = text.get("rms_norm_eps", 1e-6)
        return ModelConfig(**values, rms_norm_eps=eps, tie_word_embeddings=tied, raw=raw)


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


def refuse_what_is_no_model(path: Path) -> None:
    """Raise ValueError unless `path` is a directory with a config.json of a model: what it is
    instead, and what to do."""
    needed = "config.json, *.safetensors and tokenizer files"
    if path.is_file():
        raise ValueError(f"--model {path}: a file; name a directory with {needed}")
    places = ("", "step_*/", "checkpoints/step_*/")
    saved = [file.parent for place in places for file in path.glob(f"{place}complete.json")]
    inside = [*path.glob("*/config.json"), *path.glob("snapshots/*/config.json")]
    weights = any(path.glob("*.safetensors"))
    if path / "final" / "config.json" in inside and not weights:
        why = f"a run directory; its model is {path / 'final'}"
    elif saved and not weights:
        last = max(saved, key=lambda folder: folder.stat().st_mtime)
        why = f"checkpoints, of which `python -m tools.export {last} --out DIR` makes a model"
    elif (path / "config.json").is_file():
        return
    elif (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        why = f"a LoRA adapter: train with --model {base} --adapter {path}, or evaluate OUT/final"
    elif inside:
        why = f"no model, but {inside[0].parent} may be one"
    elif gguf := next(path.glob("*.gguf"), None):
        why = f"{gguf.name} is not supported; fetch the weights as published, *.safetensors"
    else:
        why = "no config.json" if any(path.iterdir()) else "an empty directory"
        why += f"; a model directory has {needed}"
    raise ValueError(f"--model {path}: {why}")
