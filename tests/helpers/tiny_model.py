"""Tiny random models, made and saved by transformers, so that ours is compared with what we did not write."""

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


def make_tiny_vl(path: Path, tied: bool = False, seed: int = 0, dtype=torch.float32, **ids) -> Path:
    """Save a tiny Qwen2.5-VL with random weights (biases and norms random too, or their use would go untested)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    ids = {**IDS, **ids}
    special = {k: ids[k] for k in ("bos_token_id", "eos_token_id")}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            **TEXT,
            **special,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        ),
        vision_config=dict(
            depth=3,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=64,
            fullatt_block_indexes=[1],
            window_size=112,
        ),
        tie_word_embeddings=tied,
        **ids,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    randomise(model)
    model.to(dtype).save_pretrained(path)
    return Path(path)


def make_tiny_qwen2(path: Path, tied: bool = True, seed: int = 0) -> Path:
    """Save a tiny text-only Qwen2 with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **TEXT,
            tie_word_embeddings=tied,
            bos_token_id=305,
            eos_token_id=304,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        )
    )
    randomise(model)
    model.save_pretrained(path)
    return Path(path)


def randomise(model: torch.nn.Module) -> None:
    """Give every parameter a size at which a mistake shows: weights of 1/√fan-in, biases 0.1, norms around 1."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, p[0].numel() ** -0.5)
            else:
                p.add_(torch.randn_like(p) * 0.1)
