"""Tiny random models, made and saved by transformers, so that ours is compared with what we
did not write."""

from pathlib import Path

import torch

VOCAB = 320  # the tiny tokenizer has fewer tokens: the rest is the padded end of the vocabulary
IDS = dict(
    image_token_id=302,
    video_token_id=303,
    vision_start_token_id=300,
    vision_end_token_id=301,
    bos_token_id=305,
    eos_token_id=304,
)
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    max_position_embeddings=4096,
)
TOWERS = {
    "qwen2_5_vl": dict(
        depth=3,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        fullatt_block_indexes=[1],
        window_size=112,
    ),
    "qwen3_vl": dict(
        depth=4,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        deepstack_visual_indexes=[0, 1, 3],
    ),
}
# Qwen3: heads that are no fraction of hidden_size, and sections of which the last is the shortest
HEADS = {"qwen2_5_vl": {}, "qwen3_vl": dict(head_dim=24)}
SECTIONS = {"qwen2_5_vl": [2, 3, 3], "qwen3_vl": [6, 4, 2]}
PATCH = {"qwen2_5_vl": 3 * 2 * 14 * 14, "qwen3_vl": 3 * 2 * 16 * 16}  # values in a flattened patch
VL = tuple(TOWERS)


def make_tiny_vl(
    path: Path,
    tied: bool = False,
    seed: int = 0,
    dtype=torch.float32,
    kind: str = "qwen2_5_vl",
    sections: list[int] | None = None,
    **ids,
) -> Path:
    """Save a tiny vision model with random weights (biases and norms random too, or their use
    would go untested)."""
    import transformers

    name = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
    torch.manual_seed(seed)
    ids = {**IDS, **ids}
    special = {k: ids[k] for k in ("bos_token_id", "eos_token_id")}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections or SECTIONS[kind]}
    config = getattr(transformers, f"{name}Config")(
        text_config=dict(
            **TEXT, **special, **HEADS[kind], tie_word_embeddings=tied, rope_parameters=rope
        ),
        vision_config=TOWERS[kind],
        tie_word_embeddings=tied,
        **ids,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    randomise(model)
    model.to(dtype).save_pretrained(path)
    return Path(path)


def make_tiny_text(path: Path, tied: bool = True, seed: int = 0, kind: str = "qwen2") -> Path:
    """Save a tiny text-only Qwen2 or Qwen3 with random weights."""
    import transformers

    name = kind.capitalize()
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(
        **TEXT,
        **({"head_dim": 24} if kind == "qwen3" else {}),
        tie_word_embeddings=tied,
        bos_token_id=305,
        eos_token_id=304,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    randomise(model)
    model.save_pretrained(path)
    return Path(path)


make_tiny_qwen2 = make_tiny_text


def make_tiny(path: Path, kind: str, **options) -> Path:
    """A tiny model of any supported model_type."""
    return (
        make_tiny_vl(path, kind=kind, **options)
        if kind in VL
        else make_tiny_text(path, kind=kind, **options)
    )


def reference(path: Path) -> torch.nn.Module:
    """transformers' own model of a directory. Fails if it misses a tensor, finds one that it
    does not know, or would fill one with random numbers."""
    import transformers

    kind = transformers.AutoConfig.from_pretrained(path).model_type
    auto = transformers.AutoModelForImageTextToText if kind in VL else None
    model, info = (auto or transformers.AutoModelForCausalLM).from_pretrained(
        path, attn_implementation="eager", output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    return model.eval()


def randomise(model: torch.nn.Module) -> None:
    """Give every parameter a size at which a mistake shows: weights of 1/√fan-in, biases 0.1,
    norms around 1."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, p[0].numel() ** -0.5)
            else:
                p.add_(torch.randn_like(p) * 0.1)
