"""The code's own CUDA paths without a GPU: fake tensors on a fake "cuda" device, with FSDP2's real
hooks and any number of fake ranks.

    import fake_cuda                                   # before torch, in a process of its own
    with fake_cuda.ranks(8), fake_cuda.Watch() as seen:
        ...build on meta, shard, to_empty("cuda"), forward, backward, optimizer step...
    seen.waits, seen.operations

Real: shapes, dtypes, devices, autograd, selective checkpointing, which collectives run, memory (by
torch's MemTracker), the number of operations and of waits for the GPU. Not real: values, speed,
NCCL, streams, graph capture, Triton. Needs a C++ compiler (once per version of torch).
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

if "torch" in sys.modules:
    raise ImportError("import fake_cuda before torch, which looks for CUDA hooks once, at import")
sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1, 0)]


def _build() -> Path:
    """The shared library that makes torch believe in a CUDA device; compiled on first use."""
    torch_dir = Path(importlib.util.find_spec("torch").origin).parent
    name = f"fake_cuda-{version('torch')}-{sys.version_info[0]}.{sys.version_info[1]}.so"
    library = Path(tempfile.gettempdir()) / name
    if not library.is_file():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / name
            includes = (
                torch_dir / "include",
                torch_dir / "include/torch/csrc/api/include",
                sysconfig.get_paths()["include"],
            )
            source = Path(__file__).with_suffix(".cpp")
            command = ["c++", "-shared", "-fPIC", "-std=c++20", "-O0", source, "-o", made]
            command += [f"-I{i}" for i in includes]
            command += [f"-L{torch_dir / 'lib'}", f"-Wl,-rpath,{torch_dir / 'lib'}"]
            command += ["-lc10", "-ltorch_cpu", "-ltorch"]
            subprocess.run(list(map(str, command)), check=True)
            made.rename(library)
    return library


_library = ctypes.CDLL(str(_build()), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402


def _no_kernel(*args):
    raise AssertionError("a fake tensor reached a kernel")


# A torch without CUDA would take these apart into small operations; with it each is one kernel
# that keeps less for the backward pass.
_kernels = torch.library.Library("aten", "IMPL")
for _name in ("_fused_rms_norm", "_fused_rms_norm_backward", "silu_backward"):
    _kernels.impl(_name, _no_kernel, "CUDA")


def _logsumexp(self: torch.Tensor, dim: int) -> torch.Tensor:
    """As torch's own does it, with a temporary of the input's size that would not be seen."""
    top = self.amax(dim, keepdim=True)
    return (self - top).exp_().sum(dim).log_() + top.squeeze(dim)


torch.Tensor.logsumexp = _logsumexp


class _Event:
    def __init__(self, *args, **kwargs): ...
    def record(self, *args): ...
    def wait(self, *args): ...
    def synchronize(self): ...
    def query(self):
        return True


class _Stream:
    def __init__(self, *args, **kwargs):
        self.device = torch.device("cuda", 0)

    def wait_stream(self, *args): ...
    def wait_event(self, *args): ...
    def record_event(self, *args):
        return _Event()

    def synchronize(self): ...
    def __enter__(self):
        return self

    def __exit__(self, *args): ...


_stream = _Stream()
torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
torch.cuda.current_stream = lambda *args, **kwargs: _stream
torch.cuda.stream = lambda s: contextlib.nullcontext()
torch.cuda.current_device, torch.cuda.set_device = lambda: 0, lambda *args: None
torch.cuda.device_count, torch.cuda.is_initialized = lambda: 8, lambda: True
torch.cuda._is_in_bad_fork = lambda: False
torch.cuda.get_device_capability = lambda *args: (9, 0)
torch.Tensor.record_stream = lambda self, s: None
torch.Tensor.pin_memory = lambda self: self


@contextlib.contextmanager
def ranks(size: int):
    """A process group of `size` ranks of which this process is rank 0 and the others do not exist;
    yields core.parallel's World. Tensors made inside are fake."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from core import parallel

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    mesh = init_device_mesh("cuda", (size,), mesh_dim_names=("shard",))  # outside the fake mode
    parallel.init_device_mesh = lambda *args, **kwargs: mesh
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield parallel.World(0, size, 0, torch.device("cuda", 0))
    finally:
        dist.destroy_process_group()


class Watch(TorchDispatchMode):
    """Counts operations, and those that make the host wait for the GPU; values read are 1."""

    def __init__(self):
        super().__init__()
        self.operations, self.waits = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(op)
        self.operations[name] += 1
        on_gpu = bool(args) and torch.is_tensor(args[0]) and args[0].device.type == "cuda"
        if name == "aten._local_scalar_dense.default":
            self.waits[name] += on_gpu
            return 1.0 if args[0].is_floating_point() else 1
        if on_gpu and name.startswith(("aten.nonzero.", "aten.masked_select", "aten._unique")):
            self.waits[name] += 1
        if name == "aten._to_copy.default" and "device" in kwargs:
            moved = kwargs["device"] is not None and kwargs["device"].type != args[0].device.type
            self.waits["copy"] += moved and (on_gpu or not kwargs.get("non_blocking"))
        if name == "aten.copy_.default" and torch.is_tensor(args[1]):
            moved = args[0].device.type != args[1].device.type
            self.waits["copy"] += moved and not (len(args) > 2 and args[2])
        return op(*args, **kwargs)
