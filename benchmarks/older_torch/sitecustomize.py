"""Code for torch 2.13 on a machine that has torch 2.11: PYTHONPATH=benchmarks/older_torch python …

`varlen_attn` has no enable_gqa, seqused_k and num_splits there. The kernel below it reads grouped
heads and seqused_k all the same; how often it splits a sequence it chooses by the batch, so the
last bits of a sample depend on its neighbours. Where torch has the arguments nothing is changed.
Python imports a module of this name at its start, so torchrun's processes have it too.
"""

import importlib.abc
import importlib.util
import inspect
import sys

NAME = "torch.nn.attention.varlen"


def extend(module) -> None:
    """Give `module.varlen_attn` the arguments that it lacks."""
    import torch

    old = module.varlen_attn
    if "seqused_k" in inspect.signature(old).parameters:
        return

    def varlen_attn(
        *tensors_and_lengths, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
        seqused_k=None, num_splits=None,
    ):  # fmt: skip
        if seqused_k is None:
            how = dict(return_aux=return_aux, scale=scale, window_size=window_size)
            return old(*tensors_and_lengths, **how)
        left, right = window_size
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *tensors_and_lengths, 0.0, (left, right) == (-1, 0), False, scale=scale,
            window_size_left=left, window_size_right=right, seqused_k=seqused_k,
        )  # fmt: skip
        return (out, lse) if return_aux is not None and return_aux.lse else out

    module.varlen_attn = varlen_attn


class Finder(importlib.abc.MetaPathFinder):
    """Extends the module when it is imported: importing torch here would slow every program."""

    def find_spec(self, name, path=None, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            extend(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
