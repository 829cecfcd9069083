"""How much memory a run takes on each GPU, before a machine is asked for.

    python -m tools.memory                                       what fits where: docs/memory.md
    python -m tools.memory --model 7B                            a table of machines and modes
    python -m tools.memory --model DIR --ranks 8 --tokens 8192   one setting in detail (or 7B)
    python train_sft.py … --plan                                 a run's own settings and batches

What is counted, and how: core/plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from core.lora import LoRA, add_lora
from core.options import exit_on_value_error, option, parse_config
from core.plan import (
    FASTEST_FIRST,
    GIB,
    Setting,
    count_parameters,
    fits,
    plan_grpo,
    plan_step,
    table,
)
from model import Model, ModelConfig

# name → hidden, layers, heads, KV heads, MLP size, vocabulary, tied, head size: the decoders of
# Qwen2.5-VL and Qwen3-VL as published
PUBLISHED = {
    "3B": (2048, 36, 16, 2, 11008, 151936, True, 128),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 128),
    "32B": (5120, 64, 40, 8, 27648, 152064, False, 128),
    "72B": (8192, 80, 64, 8, 29568, 152064, False, 128),
    "Qwen3-VL-2B": (2048, 28, 16, 8, 6144, 151936, True, 128),
    "Qwen3-VL-4B": (2560, 36, 32, 8, 9728, 151936, True, 128),
    "Qwen3-VL-8B": (4096, 36, 32, 8, 12288, 151936, False, 128),
    "Qwen3-VL-32B": (5120, 64, 64, 8, 25600, 151936, False, 128),
}
MACHINES = {  # GPUs, usable GiB of each
    "1 × 80 GB": (1, 79),
    "4 × 80 GB": (4, 79),
    "8 × 80 GB": (8, 79),
    "1 × H200": (1, 139),
    "8 × H200": (8, 139),
}
COMPARED = ("3B", "7B", "Qwen3-VL-2B", "Qwen3-VL-4B", "Qwen3-VL-8B", "32B", "72B")
SIZES = {  # of GPUs: 24 and 48 GB as they are with ECC on, so L4 and L40S; the last is two nodes
    "1 × 24 GB": (1, 22),
    "1 × 48 GB": (1, 44),
    "1 × 80 GB": (1, 79),
    "1 × 141 GB": (1, 139),
    "2 × 80 GB": (2, 79),
    "4 × 80 GB": (4, 79),
    "8 × 80 GB": (8, 79),
    "16 × 80 GB": (16, 79),
}


def published_config(name: str) -> ModelConfig:
    """The decoder of a published size by its name, or the config.json of a directory."""
    if name not in PUBLISHED:
        return ModelConfig.from_dir(Path(name).parent if name.endswith("config.json") else name)
    keys = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
        "vocab_size tie_word_embeddings head_dim"
    ).split()
    kind = "qwen3" if name.startswith("Qwen3") else "qwen2"
    known = {"model_type": kind, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    return ModelConfig.from_dict({**known, **dict(zip(keys, PUBLISHED[name]))})


def meta_model(config: ModelConfig, with_vision: bool = False, lora_rank: int = 0) -> Model:
    """The model without memory, for its numbers; with adapters on all linear layers."""
    with torch.device("meta"):
        model = Model(config, with_vision)
    if lora_rank:
        add_lora(model, LoRA(lora_rank, 32.0))
    return model


def machines(plan: dict[str, int]) -> str:
    """The GPUs that a plan fits on, as a line."""
    fitting = [f"{gb} GB" for gb in (24, 40, 48, 80, 141) if fits(plan, gb * 10**9)]
    said = ", ".join(fitting) or "none of 24, 40, 48, 80, 141 GB"
    return f"  fits GPUs of: {said} (with 8 % and 1.5 GiB to spare)"


def hardware_table(model: Model) -> str:
    """Markdown: predicted peak GiB a GPU over machines and modes; struck out: does not fit."""
    out = [
        "| machine | tokens a micro-batch | Adam | full | matmul | none |",
        "|---|---|---|---|---|---|",
    ]
    for machine, (ranks, usable) in MACHINES.items():
        for tokens in (8192, 16384, 32768):
            for adam in (4, 2):
                cells = []
                for mode in reversed(FASTEST_FIRST):
                    setting = Setting(ranks, tokens=tokens, adam_bytes=adam, checkpointing=mode)
                    plan = plan_step(model, setting)
                    text = f"{plan['peak'] / GIB:.0f}"
                    cells.append(text if fits(plan, usable * GIB) else f"~~{text}~~")
                moments = "fp32" if adam == 4 else "bf16"
                out.append(f"| {machine} | {tokens} | {moments} | {' | '.join(cells)} |")
    return "\n".join(out)


def cheapest(model: Model, ranks: int, usable: int, grpo: bool) -> str:
    """A cell of `fitting_table`: GiB of the first setting that fits, and its letters; else of the
    last one, struck out. Letters: o, --offload_optimizer; m, --adam_dtype bf16;
    c, --micro_tokens 8192 and (GRPO) --kv_gb 6."""
    lora = count_parameters(model)["adapters"] > 0
    ways = ["", "c"] if lora else ["", "o", "m", "mo", "mc", "moc"] if grpo else ["", "m", "mc"]
    for way in ways:
        setting = Setting(ranks, tokens=8192 if "c" in way else 16384)
        setting = replace(setting, adam_bytes=2 if "m" in way else 4)
        kv_gb = 6.0 if "c" in way else 20.0
        plan = plan_step(model, setting)
        if grpo:
            offload = "o" in way
            plan = plan_grpo(model, setting, reference=True, kv_gb=kv_gb, offload_optimizer=offload)
        if fits(plan, usable * GIB):
            return f"{plan['peak'] / GIB:.0f} {way}".strip()
    return f"~~{plan['peak'] / GIB:.0f}~~"


def fitting_table(grpo: bool, lora_rank: int) -> str:
    """Markdown: models of COMPARED over machines of SIZES."""
    out = [f"| model | {' | '.join(SIZES)} |", "|---" * (len(SIZES) + 1) + "|"]
    for name in COMPARED:
        model = meta_model(published_config(name), lora_rank=lora_rank)
        cells = [cheapest(model, *size, grpo) for size in SIZES.values()]
        name = name if name.startswith("Qwen") else f"Qwen2.5-VL-{name}"
        out.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(out)


def all_tables(lora_rank: int) -> str:
    """SFT and GRPO, all weights and LoRA."""
    parts = []
    for rank in (0, lora_rank):
        for grpo in (False, True):
            how = f"--lora_rank {rank}" if rank else "all weights"
            parts.append(f"{'GRPO' if grpo else 'SFT'}, {how}:\n\n{fitting_table(grpo, rank)}")
    return "\n\n".join(parts)


@dataclass
class Config:
    model: str = option("", f"{', '.join(PUBLISHED)}, or a model directory; default: what fits")
    ranks: int = option(0, "GPUs; 0: print the table of machines", ge=0)
    replicas: int = option(1, "HSDP groups", ge=1)
    tokens: int = option(16384, "tokens of a micro-batch (--pack_len, --micro_tokens)", ge=1)
    checkpointing: Literal["none", "matmul", "full"] = option("full", "as in train_sft.py")
    adam_dtype: Literal["fp32", "bf16"] = option("fp32", "as in train_sft.py")
    reshard: bool = option(True, "as in train_sft.py")
    lora_rank: int = option(0, "as in train_sft.py; without --model: 32", ge=0)
    grpo: bool = option(
        False, "plan train_grpo.py: reference model, weights and KV cache to sample"
    )
    kv_gb: float = option(20.0, "with --grpo: GB of KV cache", gt=0)

    def __post_init__(self):
        if self.ranks % self.replicas:
            raise ValueError(f"--replicas {self.replicas} does not divide --ranks {self.ranks}")
        if self.kv_gb != 20 and not self.grpo:
            raise ValueError("--kv_gb: only with --grpo, which samples")
        if self.model not in ("", *PUBLISHED) and not Path(self.model).exists():
            names = ", ".join(PUBLISHED)
            raise ValueError(f"--model {self.model}: no such directory, and none of {names}")


def main(argv: list[str] | None = None) -> None:
    with exit_on_value_error():
        config = parse_config(Config, __doc__, argv)
        if not config.model:
            return print(all_tables(config.lora_rank or 32))
        model = meta_model(published_config(config.model), lora_rank=config.lora_rank)
        if config.ranks == 0:
            return print(hardware_table(model))
        setting = Setting(
            config.ranks,
            config.replicas,
            config.tokens,
            adam_bytes=2 if config.adam_dtype == "bf16" else 4,
            checkpointing=config.checkpointing,
            reshard=config.reshard,
        )
        if config.grpo:
            plan = plan_grpo(model, setting, reference=True, kv_gb=config.kv_gb)
        else:
            plan = plan_step(model, setting)
        total = count_parameters(model)["total"]
        head = f"{total:,} parameters; on each of {config.ranks} GPU(s)"
        print(f"{head}, {config.tokens} tokens a micro-batch:\n{table(plan)}\n{machines(plan)}")


if __name__ == "__main__":
    main()
