"""The weights that the sampler decodes with: the trained model's own, or a copy of them."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Callable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from core.fused_decode import FusedBlock
from core.lora import lora_layers, merged_parameters
from core.parallel import gathered, units, unsharded


class DecodeWeights:
    """A copy decodes on a GPU, where it is fused and CUDA graphs read it, and with LoRA, whose
    adapters are merged into it. Else the model decodes itself."""

    def __init__(self, model: nn.Module, build: Callable[[], nn.Module]):
        """build: a model like this one without LoRA; called on the meta device."""
        self.model, self.build = model, build
        self.copy: nn.Module | None = None
        self.blocks: list[FusedBlock] | None = None  # the copy's, on a GPU
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
        self.copy = self.blocks = None

    @torch.inference_mode(False)  # whose tensors could not be filled again outside it
    @torch.no_grad()
    def _fill_copy(self) -> None:
        for unit, name_of_unit in units(self.model):
            with unsharded(unit):
                if self.copy is None:
                    self._make_copy(self.model.model.embed_tokens.weight)
                parameters = dict(self.copy.named_parameters())
                for name, p in merged_parameters(unit):
                    parameters[name_of_unit + name].copy_(p)

    def _make_copy(self, like: torch.Tensor) -> None:
        """Memory for the copy, like a gathered weight, whose dtype may be smaller than stored."""
        with torch.device("meta"):
            copy = self.build().to(like.dtype)
        self.copy = copy.to_empty(device=like.device).requires_grad_(False)
        self.copy.banned_ids = self.model.banned_ids
        if like.is_cuda:
            self.blocks = [FusedBlock(layer) for layer in copy.model.layers]
