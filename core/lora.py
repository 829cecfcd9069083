"""LoRA (arXiv 2106.09685): frozen weights W, each with a trained product of two thin fp32 matrices.

    y = x Wᵀ + (alpha / rank) · (x Aᵀ) Bᵀ        A (rank, in), B (out, rank), B = 0 at the start

    add_lora(model, LoRA(rank=32, alpha=64))                before sharding
    with lora_disabled(model): ...                          the starting model: GRPO's reference
    for name, weight in merged_parameters(model): ...       W + (alpha / rank) · B A, for sampling
    save_adapter(model, "OUT/adapter", ...)                 PEFT's format; `LoRA.start` reads it

Parameter names stay as published: beside `q_proj.weight` stand `q_proj.lora_A` and `q_proj.lora_B`.
Only the language model's blocks get adapters. Must equal PEFT's `LoraConfig` with the same values.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from core.files import read_json, write_json

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {"all-linear": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}


@dataclass(frozen=True)
class LoRA:
    """What --lora_rank, --lora_alpha, --lora_targets and --adapter say."""

    rank: int
    alpha: float
    targets: str = "all-linear"
    seed: int = 0  # of the initial values
    start: str = ""  # a PEFT adapter to start from instead

    @staticmethod
    def from_flags(config) -> LoRA | None:
        """From the flags that both trainers share; None: every weight is trained. Rank and alpha of
        an adapter to start from are its own."""
        rank, alpha = config.lora_rank, config.lora_alpha
        if config.adapter:
            if rank or alpha != 32:
                raise ValueError(
                    "--adapter: has a rank and alpha; leave --lora_rank, --lora_alpha out"
                )
            saved = read_adapter_config(config.adapter)
            rank, alpha = saved["r"], saved["lora_alpha"]
        elif not rank:
            if alpha != 32 or config.lora_targets != "all-linear":
                raise ValueError("--lora_alpha, --lora_targets: no effect without --lora_rank")
            return None
        if config.train_vision:
            raise ValueError("--train_vision: LoRA trains the language model; leave one out")
        return LoRA(rank, alpha, config.lora_targets, config.seed, config.adapter)


class LoRALinear(nn.Linear):
    """A linear layer with an adapter, which `add_lora` makes of one in place: beside the weight it
    has lora_A, lora_B, scaling (alpha / rank) and adapter_on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)  # (T, out)
        if not self.adapter_on:
            return y
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling

    def merged_weight(self) -> torch.Tensor:
        """(out, in): W + scaling · B A, summed in fp32, rounded to W's dtype; sharded if W is."""
        a, b = self.lora_A.detach(), self.lora_B.detach()
        if isinstance(a, DTensor):  # B has W's rows on each rank; A is needed whole
            a = a.redistribute(placements=[Replicate()] * a.device_mesh.ndim)
        delta = (b.float() @ a.float()) * self.scaling
        return (self.weight.detach().float() + delta).to(self.weight.dtype)


def is_adapter(parameter_name: str) -> bool:
    return parameter_name.endswith((".lora_A", ".lora_B"))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(published module name, layer) of every layer with an adapter."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear))


def add_lora(model: nn.Module, lora: LoRA) -> None:
    """Freeze the model and give the language model's layers adapters, in fp32 and without values
    (`init_lora`). Call on the meta device, before sharding."""
    model.requires_grad_(False)
    for name, layer in model.model.layers.named_modules():
        if name.split(".")[-1] not in TARGETS[lora.targets]:
            continue
        layer.__class__ = LoRALinear
        layer.scaling, layer.adapter_on = lora.alpha / lora.rank, True
        options = dict(dtype=torch.float32, device=layer.weight.device)
        layer.lora_A = nn.Parameter(torch.empty(lora.rank, layer.in_features, **options))
        layer.lora_B = nn.Parameter(torch.empty(layer.out_features, lora.rank, **options))


@torch.no_grad()
def fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor, the same on every rank, into a parameter that may be sharded."""
    if isinstance(parameter, DTensor):  # no rank is the source: each cuts its own part
        mesh, value = parameter.device_mesh, value.to(parameter.device)
        value = distribute_tensor(value, mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def init_lora(model: nn.Module, lora: LoRA) -> None:
    """Values of the adapter it starts from, or A uniform in ±1/√in (PEFT's Kaiming initialisation
    with a = √5) and B zero: training starts at the base model. The random values depend on the seed
    and the layer's name, not on the number of ranks."""
    if lora.start:
        return load_adapter(model, lora.start)
    for name, layer in lora_layers(model):
        digest = hashlib.sha256(f"{lora.seed}|{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        bound = layer.in_features**-0.5
        a = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        fill(layer.lora_A, a)
        fill(layer.lora_B, torch.zeros(layer.lora_B.shape))


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Compute without adapters: the model that training started from."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.adapter_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapter_on = True


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(published name, tensor) of every parameter of the base model that is not sharded at the
    moment, adapters merged."""
    layers = dict(lora_layers(model))
    for name, p in model.named_parameters():
        if isinstance(p, DTensor) or is_adapter(name):
            continue
        layer = layers.get(name.removesuffix(".weight"))
        yield name, p.detach() if layer is None else layer.merged_weight()


# ---------------------------------------------------------------- PEFT's format
def save_adapter(
    model: nn.Module, out_dir: str | Path, *, base_model: str | Path, is_main: bool
) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT does, under the module names
    of transformers. Nothing without adapters. Collective; rank 0 writes."""
    prefix = "model.language_model." if model.config.vision else "model."
    layers, tensors = dict(lora_layers(model)), {}
    for name, layer in layers.items():
        for leaf in ("lora_A", "lora_B"):
            p = getattr(layer, leaf).detach()
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            key = f"base_model.model.{prefix}{name.removeprefix('model.')}.{leaf}.weight"
            tensors[key] = whole.cpu().contiguous()
    if not is_main or not layers:
        return
    leaves = sorted({name.split(".")[-1] for name in layers})
    rank = layer.lora_A.shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": rank,
        "lora_alpha": layer.scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        # a pattern, since the vision tower has layers of the same names
        "target_modules": rf"{prefix.replace('.', '[.]')}layers[.].*[.]({'|'.join(leaves)})",
    }
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out_dir / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(out_dir / "adapter_config.json", config)


def read_adapter_config(adapter_dir: str | Path) -> dict:
    """adapter_config.json of a PEFT LoRA adapter. Raises ValueError for unsupported kinds."""
    file = Path(adapter_dir) / "adapter_config.json"
    for needed in (file, file.with_name("adapter_model.safetensors")):
        if not needed.is_file():
            raise ValueError(f"{adapter_dir}: not a PEFT adapter ({needed.name} is missing)")
    config = read_json(file)
    plain = dict(peft_type="LORA", bias="none", modules_to_save=[], use_dora=False)
    plain |= dict(use_rslora=False, rank_pattern={}, alpha_pattern={})
    for key, value in plain.items():
        if (config.get(key) or value) != value:
            raise ValueError(f"{file}: {key} = {config[key]!r} is not supported")
    return config


def load_adapter(model: nn.Module, adapter_dir: str | Path) -> None:
    """Fill a model's adapters from a PEFT adapter of the same rank and targets, else ValueError."""
    file = Path(adapter_dir) / "adapter_model.safetensors"
    stored = {
        k.removeprefix("base_model.model.").replace("model.language_model.", "model."): tensor
        for k, tensor in load_file(file).items()
    }
    wanted = {f"{n}.weight": p for n, p in model.named_parameters() if is_adapter(n)}
    found, asked = ({(n, tuple(t.shape)) for n, t in d.items()} for d in (stored, wanted))
    if differ := sorted(found ^ asked):
        raise ValueError(
            f"{file}: {len(differ)} tensors do not match this model and --lora_targets, the first "
            f"is {differ[0]}"
        )
    for name, p in wanted.items():
        fill(p, stored[name].float())
