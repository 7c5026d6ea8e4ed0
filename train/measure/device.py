"""The device, dtype and threads of a run, and how a process is set up for them."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.attention.kernel import AMPERE, capability, capability_name
from train.config.schema import choose

JOBS_VARIABLE = "HEAD_TO_HEAD_JOBS"  # how a sweep tells a run how many share the machine
CUDA_GRAPH_BELOW = 50_000_000  # parameters of a model
COMPILE_PAYS_AFTER = 2000  # steps on CUDA: a guess, not measured
DRIVER = Path("/proc/driver/nvidia/version")
ALL_THREADS = torch.get_num_threads()  # cores, or OMP_NUM_THREADS
GRAIN = 32_768  # elements: torch runs elementwise operations on fewer of them on one thread
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VOLTA = (7, 0)  # the compute capability from which float16 is multiplied fast


@dataclass(frozen=True)
class Device:
    """A torch device and the dtype of activations and matrix products; parameters stay float32."""

    name: str  # cpu, cuda or mps
    dtype: torch.dtype
    compiled: bool = False  # by torch.compile

    def autocast(self) -> AbstractContextManager[object]:
        """Activations and matrix products in the run's dtype."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.name, self.dtype)

    def synchronize(self) -> None:
        """Wait for all work queued on the device."""
        if self.name != "cpu":
            torch.accelerator.synchronize()

    def seed(self, seed: int) -> None:
        """Seed torch's generator on this device (`torch.manual_seed` seeds all devices: 0.4 ms)."""
        if self.name == "cuda":
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
        elif self.name == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def move(self, x: Tensor) -> Tensor:
        """A CPU tensor on this device; on CUDA the copy is asynchronous."""
        if self.name == "cuda":
            return x.pin_memory().to(self.name, non_blocking=True)
        return x.to(self.name)

    def compile(self, model: nn.Module, accumulate: int) -> None:
        """Have a model compiled at its first call, if `compiled`."""
        if self.compiled:
            graphs = self.uses_graphs(model, accumulate)
            model.compile(mode="reduce-overhead" if graphs else None)

    def uses_graphs(self, model: nn.Module, accumulate: int) -> bool:
        """True if a model's kernels become one CUDA graph: a small one is bound by their launches.

        Not with gradient accumulation: a graph reuses its memory, and would overwrite the gradients.
        """
        small = sum(p.numel() for p in model.parameters()) < CUDA_GRAPH_BELOW
        return self.compiled and self.name == "cuda" and small and accumulate == 1

    def eager(self) -> AbstractContextManager[object]:
        """Context without compilation, for decoding: its shapes change at each token."""
        if not self.compiled:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def select_device(device: str, dtype: str, compiled: bool | str = False, steps: int = 0) -> Device:
    """The device and dtype of a run with this many steps; `auto` selects the fastest.

    CUDA before MPS before the CPU; bfloat16, or else float16, where the hardware multiplies it; compiled on CUDA only,
    for runs long enough to repay it (on a CPU compilation does not pay).
    Raises ValueError for what this machine does not have.
    """
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    present = [name for name in ("cuda", "mps", "cpu") if available[name]]
    choose("device", device, dict.fromkeys(["auto", *available]))
    choose("dtype", dtype, dict.fromkeys(["auto", *DTYPES]))
    name = present[0] if device == "auto" else device
    if name not in present:
        why = (name == "cuda" and unusable_gpu()) or "this machine has none"
        raise ValueError(f"device={name}: {why}; it has {', '.join(present)}")
    if isinstance(compiled, str):
        choose("compile", compiled, dict.fromkeys(["auto"]))
        triton = importlib.util.find_spec("triton") is not None
        compiled = name == "cuda" and triton and steps >= COMPILE_PAYS_AFTER
    if compiled and name == "cpu" and not (shutil.which("c++") or shutil.which("g++")):
        raise ValueError("compile=true needs a C++ compiler (g++) on a CPU; there is none")
    if name == "cuda" and dtype == "bfloat16" and not has_bfloat16_units(name):
        raise ValueError(
            f"dtype=bfloat16: this GPU, of compute capability {capability_name()}, has no bfloat16; "
            "float16 and float32 work"
        )
    if name != "cuda" and dtype == "float16":
        raise ValueError(f"dtype=float16 is for CUDA, not for {name}; bfloat16 and float32 work")
    if dtype == "auto":
        dtype = fastest_dtype(name)
    return Device(name, DTYPES[dtype], compiled)


def fastest_dtype(device: str) -> str:
    """The dtype that a device multiplies fastest: bfloat16 where it has units for it."""
    if device == "cuda":
        return fastest_dtype_at(capability())
    return "bfloat16" if has_bfloat16_units(device) else "float32"


def fastest_dtype_at(capability: tuple[int, int]) -> str:
    """The same for a GPU of this compute capability."""
    if capability >= AMPERE:
        return "bfloat16"
    return "float16" if capability >= VOLTA else "float32"


def unusable_gpu() -> str | None:
    """What keeps torch from an NVIDIA GPU whose driver is here, in words; None if there is no such."""
    try:
        driver = DRIVER.read_text().partition("\n")[0]
    except OSError:
        return None
    if torch.cuda.is_available():
        return None
    version = re.search(r"\d+\.\d+(\.\d+)?", driver)
    here = f"this machine has an NVIDIA driver{f', {version[0]},' if version else ''} that"
    if torch.version.cuda is None:
        return f"{here} this torch cannot use: it is built without CUDA"
    return (
        f"{here} is too old for this torch, built for CUDA {torch.version.cuda}: update the driver, "
        "or install a torch for an older CUDA"
    )


def has_bfloat16_units(device: str) -> bool:
    """True if the hardware multiplies bfloat16: AMX or AVX512-BF16 on x86, Ampere or later on CUDA."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def check_memory(least: int, device: Device) -> None:
    """Raise ValueError if a run that needs at least `least` bytes cannot fit in the device."""
    available = memory_bytes(device)
    if available is not None and least > available:
        raise ValueError(
            f"this needs at least {least / 2**30:,.1f} GiB of memory, and {device.name} has "
            f"{available / 2**30:,.1f}: make the model, its context or the batch smaller (plan=true "
            "counts exactly), or set force=true to try"
        )


def memory_bytes(device: Device) -> int | None:
    """Memory of a device in bytes; None if unknown."""
    if device.name == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def choose_threads(device: Device, elements: int) -> int:
    """CPU threads of a run whose residual stream has so many elements in a micro-batch.

    One for a tiny model, where others have little to do and cost more to wake; otherwise all.
    """
    return 1 if device.name == "cpu" and elements < GRAIN else ALL_THREADS


def set_up_process(threads: int | None, tf32: bool = False, deterministic: bool = False) -> None:
    """Set threads, TF32 and the allocator's options: once per process, before any tensor.

    glibc returns large blocks to the system at every free, and the page faults that follow cost
    10 to 35 % of a small model's step on a CPU. `tf32` allows CUDA to multiply float32 with 10 bits
    of mantissa. CUDA adds gradients up in any order unless it is to be `deterministic`.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    if deterministic or torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)  # imports the compiler: about a second
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow
    if threads is not None:
        torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
        libc.mallopt(m_top_pad, 256 << 20)


def describe(device: Device) -> Mapping[str, object]:
    """The hardware and versions that a run's numbers depend on."""
    packages = ("numpy", "datasets", "tokenizers", "safetensors", "hydra-core", "wandb")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device": device.name,
        "dtype": device.dtype_name,
        "compiled": device.compiled,
        "deterministic": device.name == "cpu" or torch.are_deterministic_algorithms_enabled(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device.name == "cuda" else None,
        "threads": torch.get_num_threads(),
        "spin_count": os.environ.get("GOMP_SPINCOUNT"),  # see cli/__init__.py
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "side_by_side": int(os.environ.get(JOBS_VARIABLE, "1")),  # runs of a sweep; 0: not known
        "command": sys.argv,
    }


def cpu_name() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
