"""The weights that the sampler decodes with: the trained model's own, or a copy of them.

A copy decodes on a GPU, where CUDA graphs read it, and with LoRA, whose adapters are merged into
it. Else the model decodes itself. On a GPU the copy is fused: at a few hundred sequences a kernel
that does nothing but rotate takes as long to start as to run, so q, k, v and gate, up are one
matrix product each, and what follows a product is compiled into one kernel.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from core.decode_kernels import as_one_kernel, rotate, swiglu
from core.lora import lora_layers, merged_parameters
from core.parallel import gathered, units, unsharded


class DecodeWeights:
    """Holds the copy, where there is one, and fills it."""

    def __init__(self, model: nn.Module, build: Callable[[], nn.Module]):
        """build: a model like this one without LoRA; called on the meta device."""
        self.model, self.build = model, build
        self.copy: nn.Module | None = None
        self.holding = False  # inside `held`

    @property
    def copies(self) -> bool:
        return self.model.model.embed_tokens.weight.is_cuda or any(lora_layers(self.model))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the weights of a sharded model as they are now, whole, for calls of `current`.

        Collective at both ends. A copy is made unit by unit, so that never more than one unit is
        whole beside it; without a copy all are gathered while the context lasts.
        """
        if self.copies:
            self._fill_copy()
        with nullcontext() if self.copies else gathered(self.model):
            self.holding = True
            try:
                yield
            finally:
                self.holding = False

    def current(self) -> nn.Module:
        """The model to decode with: as it was when `held` began, or, where it is whole, as it is
        now."""
        sharded = isinstance(self.model.model.embed_tokens.weight, DTensor)
        if sharded and not (self.holding and self.copies):
            raise ValueError("the model is sharded: sample inside `with sampler.weights():`")
        if not self.copies:
            return self.model
        if not self.holding:
            self._fill_copy()
        return self.copy

    def release(self) -> None:
        self.copy = None

    @torch.inference_mode(False)  # whose tensors could not be filled again outside it
    @torch.no_grad()
    def _fill_copy(self) -> None:
        for unit, name_of_unit in units(self.model):
            with unsharded(unit):
                if self.copy is None:
                    self.copy = self._make_copy(self.model.model.embed_tokens.weight)
                parameters = dict(self.copy.named_parameters())
                for name, p in merged_parameters(unit):
                    parameters[name_of_unit + name].copy_(p)

    def _make_copy(self, like: torch.Tensor) -> nn.Module:
        """Memory for the copy, like a gathered weight, whose dtype may be smaller than stored."""
        with torch.device("meta"):
            copy = self.build().to(like.dtype)
        copy.to_empty(device=like.device).requires_grad_(False)
        copy.banned_ids = self.model.banned_ids
        for layer in copy.model.layers if like.is_cuda else []:
            fuse(layer)
        return copy


def fuse(layer: nn.Module) -> None:
    """Give a `model.Block` one product for q, k, v and one for gate, up, and a kernel after each.

    Its parameters become views of the joined matrices, so that they are still filled by name. The
    new functions hold tensors, never the layer: a cycle would outlive `release`, as trainers run
    without the garbage collector.
    """
    a, m = layer.self_attn, layer.mlp
    parts = [a.q_proj, a.k_proj, a.v_proj]
    qkv, bias = join(parts, "weight"), join(parts, "bias")  # ((Hq + 2 Hkv) D, C)
    gate_up, down = join([m.gate_proj, m.up_proj], "weight"), m.down_proj.weight  # (2 I, C), (C, I)
    norms = [getattr(n, "weight", None) for n in (a.q_norm, a.k_norm)]  # None: Identity
    how = *norms, layer.input_layernorm.eps, a.k_proj.out_features // a.head_dim, a.head_dim
    a.qkv = lambda x, cos, sin: as_one_kernel(rotate, F.linear(x, qkv, bias), cos, sin, *how)
    m.forward = lambda x: F.linear(as_one_kernel(swiglu, F.linear(x, gate_up)), down)


@torch.no_grad()
def join(parts: list[nn.Linear], name: str) -> torch.Tensor | None:
    """These layers' weights (or biases, if they have them) one below the other; each layer keeps a
    view."""
    tensors = [getattr(p, name) for p in parts]
    if tensors[0] is None:
        return None
    joined = torch.cat(tensors)
    for part, view in zip(parts, joined.split([len(t) for t in tensors])):
        setattr(part, name, nn.Parameter(view, requires_grad=False))
    return joined
