"""GPUs by name, for plans of runs on one that is not here."""

from dataclasses import dataclass

from model.attention.kernel import AMPERE
from train.config.schema import Config, choose
from train.measure.device import fastest_dtype_at
from train.sweep.plan import trains_with


@dataclass(frozen=True)
class Gpu:
    """What decides which kernels run on a GPU, and what fits: the vendor's figures."""

    name: str
    capability: tuple[int, int]
    gigabytes: float  # 10^9 bytes; what a driver leaves of them differs by a few percent

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.gigabytes * 10**9)


#: Capabilities: https://developer.nvidia.com/cuda-gpus. Memory: the vendor's data sheets.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("V100", (7, 0), 16),
        Gpu("T4", (7, 5), 16),
        Gpu("A100", (8, 0), 80),
        Gpu("A100-40", (8, 0), 40),
        Gpu("A10", (8, 6), 24),
        Gpu("3090", (8, 6), 24),
        Gpu("L4", (8, 9), 24),
        Gpu("4090", (8, 9), 24),
        Gpu("H100", (9, 0), 80),
        Gpu("H200", (9, 0), 141),
        Gpu("B200", (10, 0), 180),
        Gpu("5090", (12, 0), 32),
    )
}


def gpu_of(config: Config) -> Gpu | None:
    """The GPU that device=cuda:NAME asks for; None if the device is one of this machine.

    Raises ValueError for a name that is not known, and for a dtype that it does not have.
    """
    kind, _, name = str(config["device"]).partition(":")
    if kind != "cuda" or not name:
        return None
    gpu = choose("device=cuda:NAME, NAME", name, GPUS)
    if config["dtype"] == "bfloat16" and gpu.capability < AMPERE:
        raise ValueError(f"dtype=bfloat16: a {name} has no bfloat16; float16 and float32 work")
    return gpu


def counted_here(config: Config, gpu: Gpu) -> Config:
    """The config of a run on a GPU as a CPU can count its bytes.

    Both half precisions have two bytes, and all of torch's fused kernels keep what flash attention
    keeps, which a CPU has without dropout and without a trained bias.
    """
    dtype = fastest_dtype_at(gpu.capability) if config["dtype"] == "auto" else config["dtype"]
    fused = config["kernel"] not in ("matmul", "math") and not config["model"]["dropout"]
    counted = config | {
        "device": "cpu",
        "dtype": "float32" if dtype == "float32" else "bfloat16",
        "compile": False,
        "force": True,
    }
    kernel = "flash" if fused else "matmul"
    return counted | {"kernel": kernel if trains_with(counted, kernel) else "auto"}
