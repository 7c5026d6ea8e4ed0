"""A CUDA device that computes on the CPU: `device=cuda` with its real numbers, without a GPU.

PRETENDED_DEVICE=mps makes it an Apple one, which knows no float64 and has the operations that torch lists.

A tensor there is a wrapper that says cuda:0 and holds a tensor of the CPU. What mixes the two is
refused as CUDA refuses it; what makes the host wait is counted, with the line that asked for it; of
each fused attention, the kernel that torch would run on such a GPU is noted. It has no streams, no
graphs, no atomics and no Triton, and rounds as the CPU does.

It must be imported before torch, so pytest loads it as a plugin: `pytest -p pretended`. It needs g++,
once.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any, Self
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
DEVICE = os.environ.get("PRETENDED_DEVICE", "cuda")  # or mps


def load_stub() -> None:
    """Build stub.cpp, unless it is built, and load it. Raises CalledProcessError without g++."""
    source, torch_folder = Path(__file__).with_name("stub.cpp"), Path(torch_at())
    version = (torch_folder / "version.py").read_text()
    name = hashlib.sha256((source.read_text() + version).encode()).hexdigest()[:16]
    library = ROOT / f"outputs/cache/pretended/{name}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        include, lib = torch_folder / "include", torch_folder / "lib"
        with tempfile.NamedTemporaryFile(dir=library.parent, suffix=".so", delete=False) as built:
            command = [
                "g++",
                "-O0",
                "-std=c++20",
                "-shared",
                "-fPIC",
                "-w",
                source,
                "-o",
                built.name,
            ]
            command += [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{lib}"]
            command += ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
            subprocess.run(command, check=True, capture_output=True)
        Path(built.name).rename(library)  # at once: other processes may build it too
    ctypes.CDLL(str(library))


def torch_at() -> str:
    """The folder of torch, which is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent)


load_stub()

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
#: Operations that CUDA lets mix its tensors with those of the CPU.
MIXING = {
    aten.copy_, aten._to_copy, aten.index, aten.index_put_, aten._index_put_impl_,
}  # fmt: skip
#: Operations whose result the host needs, or whose shape it does.
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero,
}  # fmt: skip
PACKAGES = ("model", "data", "train", "compare")


def asked_at() -> str:
    """The line of ours that is running: train/step.py:81."""
    for frame, line in traceback.walk_stack(sys._getframe()):
        package, _, rest = frame.f_code.co_filename.removeprefix(f"{ROOT}/").partition("/")
        if package in PACKAGES:
            return f"{package}/{rest}:{line}"
    return "elsewhere"


class DeviceTensor(Tensor):
    """A tensor that says it is on the device; `inner` is where it is."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{DEVICE}:0",
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None  # with it, Module.to swaps parameters instead of setting their data

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> "DeviceTensor":
        return DeviceTensor(inner["inner"])

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return Machine.current.run(func, args, kwargs or {})


class Event:
    """A moment."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = perf_counter()

    def elapsed_time(self, later: "Event") -> float:
        """Milliseconds."""
        return 1e3 * (later.at - self.at)


class Machine(TorchDispatchMode):
    """The device. Counters by operation and line: `waits` of the host, asynchronous `copies`, `casts`;
    `kernels` counts attention by kernel, `launches` all that is computed."""

    current: "Machine"

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.capability = capability
        self.waits, self.copies, self.casts, self.kernels = (Counter[str]() for _ in range(4))
        self.launches = 0
        Machine.current = self

    def forget(self) -> None:
        """Start counting again."""
        for counter in (self.waits, self.copies, self.casts, self.kernels):
            counter.clear()
        self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operation gives, on the device if it is of a tensor there or asks for one."""
        op, asked = func.overloadpacket, kwargs.get("device")
        to = None if asked is None else torch.device(asked).type
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = any(isinstance(x, DeviceTensor) for x in tensors)
        if op is aten.is_pinned:
            return False
        if op is aten._pin_memory:
            return args[0].clone()
        if not here and to != DEVICE:
            return func(*args, **kwargs)
        self.note(func, args, kwargs, tensors, to)
        if to:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        bare = pytree.tree_map_only(DeviceTensor, lambda x: x.inner, (args, kwargs))
        out = func(*bare[0], **bare[1])
        if to == "cpu" or (op is aten.copy_ and not isinstance(args[0], DeviceTensor)):
            return out
        if func._schema.is_mutable and isinstance(out, Tensor):
            return args[0]
        if DEVICE == "mps":
            refuse_on_mps(func, out)
        wrapped = pytree.tree_map_only(Tensor, DeviceTensor, out)
        if any(r.alias_info for r in func._schema.returns) and not func._schema.is_mutable:
            return return_and_correct_aliasing(func, args, kwargs, wrapped)
        return wrapped

    def note(
        self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], to: str | None
    ) -> None:
        """Count an operation. Raises RuntimeError if it mixes the device with the CPU."""
        op = func.overloadpacket
        here = any(isinstance(x, DeviceTensor) for x in tensors)
        others = [x for x in tensors if not isinstance(x, DeviceTensor) and x.dim() > 0]
        indexed = op is aten.index and not isinstance(args[0], DeviceTensor)
        if here and others and (op not in MIXING or indexed):
            raise RuntimeError(f"{func} mixes {DEVICE}:0 and the CPU at {asked_at()}")
        by_mask = op is aten.index and any(
            isinstance(x, Tensor) and x.dtype is torch.bool for x in args[1]
        )
        if here and (op in WAITING or by_mask or (others and op is not aten._to_copy)):
            self.waits[f"{op.__name__} at {asked_at()}"] += 1
        if op is aten._to_copy:
            if to and to != (DEVICE if here else "cpu"):
                counter = self.copies if kwargs.get("non_blocking") else self.waits
                counter[f"copy to {to} at {asked_at()}"] += 1
            elif kwargs.get("dtype") not in (None, args[0].dtype):
                self.casts[asked_at()] += 1
        views = any(r.alias_info for r in func._schema.returns) and not func._schema.is_mutable
        self.launches += not views and op not in (aten._local_scalar_dense, aten.detach)


@functools.cache
def on_mps() -> frozenset[str]:
    """The operations that torch has a kernel for on MPS, or that are made of others, by its own list."""
    import torchgen
    import yaml

    listed = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {
        entry["func"].partition("(")[0]: entry for entry in yaml.safe_load(listed.read_text())
    }

    def has(entry: dict[str, Any]) -> bool:
        if delegate := entry.get("structured_delegate"):
            return has(entries[delegate])
        keys = {key.strip() for keys in entry.get("dispatch", {}) for key in keys.split(",")}
        composite = {"CompositeExplicitAutograd", "CompositeImplicitAutograd", "MPS"}
        non_functional = "CompositeExplicitAutogradNonFunctional"
        return not keys or bool(keys & {*composite, non_functional})

    return frozenset(name for name, entry in entries.items() if has(entry))


def refuse_on_mps(func: Any, out: Any) -> None:
    """Raise what torch raises on MPS for float64 and for operations without a kernel there."""
    if any(x.dtype is torch.float64 for x in pytree.tree_leaves(out) if isinstance(x, Tensor)):
        raise TypeError(f"MPS has no float64: {func} at {asked_at()}")
    name = func._schema.name.removeprefix("aten::")
    name += f".{func._overloadname}" if func._overloadname != "default" else ""
    if func.namespace == "aten" and name not in on_mps():
        raise NotImplementedError(f"{func} has no kernel on MPS, at {asked_at()}")


def backend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, gqa: bool,
    capability: tuple[int, int],
) -> str:  # fmt: skip
    """The kernel of scaled_dot_product_attention on a GPU of this capability.

    By the conditions of torch's sdp_utils.cpp, for the kernels that are enabled. Raises RuntimeError
    if none of those can do it.
    """
    half = q.dtype is torch.float16 or (q.dtype is torch.bfloat16 and capability >= (8, 0))
    widths, same_heads = (q.size(-1), v.size(-1)), q.size(1) == k.size(1)
    plain = mask is None or (not mask.requires_grad and mask.dim() in (2, 4))
    align = 8 if half else 4 if capability >= (8, 0) else 1
    able = {
        "cudnn": half and plain and (same_heads or gqa) and capability >= (8, 0)
        and max(widths) <= 128 and not any(n % 8 for n in widths)
        and (16 * p).is_integer() and k.size(2) > 1,
        "flash": capability >= (8, 0) and half and mask is None and (same_heads or gqa)
        and widths[0] == widths[1] <= 256,
        "efficient": same_heads and not any(n % align for n in widths)
        and (q.dtype is not torch.bfloat16 or capability >= (8, 0)),
        "math": True,
    }  # fmt: skip
    cuda = torch.backends.cuda
    enabled = {
        "cudnn": cuda.cudnn_sdp_enabled(),
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    first = (
        ("cudnn", "flash") if capability[0] in (9, 10) else ("flash", "efficient", "math", "cudnn")
    )
    for name in dict.fromkeys((*first, *able)):
        if able[name] and enabled[name]:
            return name
    raise RuntimeError("No available kernel. Aborting execution.")


@contextlib.contextmanager
def patched(machine: Machine, memory: int = 80 << 30) -> Iterator[None]:
    """Within it torch says that it has one CUDA device, of so many bytes."""
    capability = machine.capability

    def wait(*_: object) -> None:
        machine.waits[f"synchronize at {asked_at()}"] += 1

    about = SimpleNamespace(
        total_memory=memory, major=capability[0], minor=capability[1], name="pretended"
    )
    replaced = {
        "cuda.is_available": lambda: True,
        "cuda.device_count": lambda: 1,
        "cuda.current_device": lambda: 0,
        "cuda.default_generators": (torch.default_generator,),
        "cuda.get_device_properties": lambda *_: about,
        "cuda.get_device_name": lambda *_: about.name,
        "cuda.get_device_capability": lambda *_: capability,
        "cuda.is_bf16_supported": lambda including_emulation=True: (
            capability >= (8, 0) or including_emulation
        ),
        "cuda._lazy_init": lambda: None,
        "cuda.amp.common.amp_definitely_not_available": lambda: False,
        "cuda.Event": Event,
        "cuda.synchronize": wait,
        "accelerator.synchronize": wait,
        "cuda.manual_seed_all": lambda seed: None,
        "cuda.get_rng_state": lambda *_: torch.get_rng_state(),
        "cuda.set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "cuda.max_memory_allocated": lambda *_: 1,
        "cuda.max_memory_reserved": lambda *_: 1,
        "cuda.memory_allocated": lambda *_: 0,
        "cuda.reset_peak_memory_stats": lambda *_: None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(f"torch.{name}", value))
        yield


@contextlib.contextmanager
def patched_mps(machine: Machine) -> Iterator[None]:
    """Within it torch says that it has an Apple GPU."""

    def wait(*_: object) -> None:
        machine.waits[f"synchronize at {asked_at()}"] += 1

    replaced = {
        "backends.mps.is_available": lambda: True,
        "mps.manual_seed": lambda seed: None,
        "mps.synchronize": wait,
        "accelerator.synchronize": wait,
    }
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(f"torch.{name}", value))
        yield


@contextlib.contextmanager
def pretended(capability: tuple[int, int] = (8, 0), memory: int = 80 << 30) -> Iterator[Machine]:
    """Within it there is one device; of CUDA, with this compute capability and so many bytes."""
    machine, real = Machine(capability), F.scaled_dot_product_attention

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        options = {"is_causal": is_causal, "scale": scale}
        if q.device.type == "cpu":
            return real(q, k, v, attn_mask, dropout_p, enable_gqa=enable_gqa, **options)
        if DEVICE == "cuda":
            kernel = backend(q, k, v, attn_mask, dropout_p, enable_gqa, capability)
            machine.kernels[kernel] += 1
        group = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mathematics = aten._scaled_dot_product_attention_math
        return mathematics(q, k, v, attn_mask, dropout_p, is_causal, None, scale=scale)[0]

    def window_attention(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_of_keys: Tensor, length: int, keys: int,
        *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        """Of texts of one length."""
        assert capability >= (8, 0)
        assert q.dtype == k.dtype == v.dtype
        assert q.dtype in (torch.bfloat16, torch.float16)
        assert not q.size(-1) % 8
        assert enable_gqa or q.size(1) == k.size(1)
        machine.kernels["flash"] += 1
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        group, pos = q.size(1) // k.size(1), torch.arange(length)
        back = pos[:, None] - pos
        hidden = (back < 0) | (back > window_size[0])
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -math.inf).to("cuda")
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mathematics = aten._scaled_dot_product_attention_math
        y = mathematics(q, k, v, mask, 0.0, False, None, scale=scale)[0]
        return y.transpose(1, 2).flatten(0, 1)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(machine, memory) if DEVICE == "cuda" else patched_mps(machine))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(patch("torch.nn.attention.varlen.varlen_attn", window_attention))
        stack.enter_context(machine)
        lifted = torch._C._only_lift_cpu_tensors()
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(..., device="cuda") goes through `to`
        yield machine
