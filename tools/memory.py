"""How much memory a run takes on each GPU, before a machine is asked for.

    python -m tools.memory                                       what fits where: docs/memory.md
    python -m tools.memory --model DIR                           the same of one model (or 7B)
    python -m tools.memory --model DIR --ranks 8 --tokens 8192   one setting in detail
    python train_sft.py … --plan                                 a run's own settings and batches

What is counted, and how: core/plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Sequence

from core.lora import LoRA
from core.options import exit_on_value_error, option, parse_config
from core.plan import GIB, Setting, count_parameters, fits, in_gib, plan_grpo, plan_step
from model import Model, ModelConfig, meta_model

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
MACHINES = {  # GPUs, usable GiB of each: 24 and 48 GB as they are with ECC on, so L4 and L40S
    "1 × 24 GB": (1, 22),
    "1 × 48 GB": (1, 44),
    "1 × 80 GB": (1, 79),
    "1 × 141 GB": (1, 139),
    "2 × 80 GB": (2, 79),
    "4 × 80 GB": (4, 79),
    "8 × 80 GB": (8, 79),
    "16 × 80 GB": (16, 79),
    "8 × 141 GB": (8, 139),
}
SHOWN = ("3B", "7B", "Qwen3-VL-2B", "Qwen3-VL-4B", "Qwen3-VL-8B", "32B", "72B")


def published_config(name: str) -> ModelConfig:
    """A published size by its name (3B and 7B with their vision tower), or the config.json of a
    directory."""
    if name not in PUBLISHED:
        return ModelConfig.from_dir(Path(name).parent if name.endswith("config.json") else name)
    keys = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
        "vocab_size tie_word_embeddings head_dim"
    ).split()
    raw = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, **dict(zip(keys, PUBLISHED[name]))}
    if name not in ("3B", "7B"):
        raw["model_type"] = "qwen3" if name.startswith("Qwen3") else "qwen2"
        return ModelConfig.from_dict(raw)
    tower = {"hidden_size": 1280, "num_heads": 16, "out_hidden_size": raw["hidden_size"]}
    ids = {"image_token_id": 151655}
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    return ModelConfig.from_dict(
        {"model_type": "qwen2_5_vl", "vision_config": tower, **raw, **ids, **rope}
    )


def cheapest(model: Model, ranks: int, usable: int, grpo: bool) -> str:
    """A cell of `fitting_tables`: GiB of the first setting that fits, and its letters; else of the
    last one, struck out. Letters: o, --offload_optimizer; m, --adam_dtype bf16;
    c, --micro_tokens 8192 and (GRPO) --kv_gb 6."""
    lora = count_parameters(model)["adapters"] > 0
    ways = ["", "c"] if lora else ["", "o", "m", "mo", "mc", "moc"] if grpo else ["", "m", "mc"]
    for way in ways:
        tokens, adam_bytes = (8192 if "c" in way else 16384), (2 if "m" in way else 4)
        setting = Setting(ranks, tokens=tokens, adam_bytes=adam_bytes)
        plan = plan_step(model, setting)
        if grpo:
            more = dict(kv_gb=6.0 if "c" in way else 20.0, offload_optimizer="o" in way)
            plan = plan_grpo(model, setting, reference=True, **more)
        if fits(plan, usable * GIB):
            return f"{plan['peak'] / GIB:.0f} {way}".strip()
    return f"~~{plan['peak'] / GIB:.0f}~~"


def fitting_tables(names: Sequence[str], lora_rank: int) -> str:
    """Markdown: SFT and GRPO, all weights and LoRA, of these models on MACHINES."""
    parts = []
    for rank in (0, lora_rank):
        for grpo in (False, True):
            how = f"--lora_rank {rank}" if rank else "all weights"
            out = [
                f"{'GRPO' if grpo else 'SFT'}, {how}:",
                "",
                f"| model | {' | '.join(MACHINES)} |",
            ]
            out.append("|---" * (len(MACHINES) + 1) + "|")
            for name in names:
                model = meta_model(published_config(name), lora=LoRA(rank, 32.0) if rank else None)
                cells = [cheapest(model, *machine, grpo) for machine in MACHINES.values()]
                name = f"Qwen2.5-VL-{name}" if name in ("3B", "7B", "32B", "72B") else name
                out.append(f"| {name} | {' | '.join(cells)} |")
            parts.append("\n".join(out))
    return "\n\n".join(parts)


@dataclass
class Config:
    model: str = option("", f"{', '.join(PUBLISHED)}, or a model directory; default: what fits")
    ranks: int = option(0, "GPUs; 0: print the tables of machines", ge=0)
    tokens: int = option(16384, "tokens of a micro-batch (--pack_len, --micro_tokens)", ge=1)
    checkpointing: Literal["none", "matmul", "full"] = option("full", "as in train_sft.py")
    adam_dtype: Literal["fp32", "bf16"] = option("fp32", "as in train_sft.py")
    lora_rank: int = option(0, "as in train_sft.py; in the tables: 32", ge=0)
    grpo: bool = option(False, "train_grpo.py: reference model, weights and 20 GB of KV cache")

    def __post_init__(self):
        if self.model not in ("", *PUBLISHED) and not Path(self.model).exists():
            names = ", ".join(PUBLISHED)
            raise ValueError(f"--model {self.model}: no such directory, and none of {names}")


def main(argv: list[str] | None = None) -> None:
    with exit_on_value_error():
        c = parse_config(Config, __doc__, argv)
        if not c.model or c.ranks == 0:
            return print(fitting_tables([c.model] if c.model else SHOWN, c.lora_rank or 32))
        lora = LoRA(c.lora_rank, 32.0) if c.lora_rank else None
        model = meta_model(published_config(c.model), lora=lora)
        more = dict(adam_bytes=2 if c.adam_dtype == "bf16" else 4, checkpointing=c.checkpointing)
        setting = Setting(c.ranks, tokens=c.tokens, **more)
        plan = plan_step(model, setting)
        if c.grpo:
            plan = plan_grpo(model, setting, reference=True, kv_gb=20.0)
        print(
            f"{count_parameters(model)['total']:,} parameters; on each of {c.ranks} GPU(s), "
            f"{c.tokens} tokens a micro-batch, GiB:\n  {in_gib(plan)}"
        )
        fitting = [f"{gb} GB" for gb in (24, 40, 48, 80, 141) if fits(plan, gb * 10**9)]
        said = ", ".join(fitting) or "none of 24, 40, 48, 80, 141 GB"
        print(f"  fits GPUs of: {said} (with 8 % and 1.5 GiB to spare)")


if __name__ == "__main__":
    main()
