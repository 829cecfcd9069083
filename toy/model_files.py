"""The files of every miniature's model directory but its weights: tokenizer, template, config.

The tokenizer makes a token of every byte, and one of each string that all prompts or answers share,
on which a model of characters would spend most of its time; the template writes what Qwen2.5-VL's
does. config.json (1.1 million parameters, in the published flat form) gives all of M-RoPE's
frequencies to the width: along a line of glyphs they turn as along a text.
"""

import shutil
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"  # the shipped base model


def write_model_files(path: str | Path) -> None:
    """Copy all but the weights of the shipped base into the folder `path`."""
    weights = shutil.ignore_patterns("model.safetensors", "made_by.json")
    shutil.copytree(ASSETS, path, ignore=weights, dirs_exist_ok=True)
