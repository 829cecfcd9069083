"""The files of a tiny Qwen2.5-VL model directory but its weights: tokenizer, template, config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data import INSTRUCTIONS

ASSETS = Path(__file__).parent / "assets"
SPECIAL = "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad".split()
SYSTEM = "system\nYou are a helpful assistant."
# strings that are one token each: a character model would spend most of its time on them
WHOLE = (
    *INSTRUCTIONS.values(),
    *(SYSTEM, "user\n", "assistant\n", "<think>", "</think>", "<answer>", "</answer>"),
    *(" Options:\n\nA: ", "\nB: ", "\nC: ", "\nD: ", "Read: ", "Find ", "Next ", "Work out: "),
)
VOCAB = 320  # a little more than there are tokens, as published vocabularies are padded


def make_tokenizer():
    """Byte-level BPE without merges, so that a character is a token and any text comes back
    unchanged; some whole strings are one token; the template writes what Qwen2.5-VL's does."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes as printable characters
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{t}|>", normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in WHOLE])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (ASSETS / "chat_template.jinja").read_text()
    return fast


def write_model_files(path: str | Path) -> None:
    """Everything of a model directory but the weights. The shipped config.json (1.1 million
    parameters, in the published flat form) gives all of M-RoPE's frequencies to the width: along a
    line of glyphs they turn as along a text."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path)
    # the template inside tokenizer_config.json too: where readers of the published layout look
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"chat_template": tokenizer.chat_template}
    file.write_text(json.dumps(settings, indent=2))
    for name in ("config.json", "preprocessor_config.json", "generation_config.json"):
        shutil.copy(ASSETS / name, path / name)
