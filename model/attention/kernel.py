"""Which kernel computes causal attention; the kernels are in model/ops/attention.py.

matmul     two batched products around a softmax, ours
flash      torch's flash attention, on a CPU and on CUDA
cudnn      cuDNN's, on CUDA
efficient  torch's memory-efficient attention, on CUDA
math       torch's plain one, on CUDA
sdpa       whatever torch takes
flex       torch's FlexAttention, on CUDA in a compiled program, see Attention.in_flex
"""

from typing import Any

import torch

from model.attention import KERNELS

HALF = (torch.bfloat16, torch.float16)
AMPERE = (8, 0)  # the compute capability from which flash attention and bfloat16 exist


def choose_kernel(
    device: str,
    dtype: torch.dtype,
    length: int,
    *,
    width: int,
    biased: bool,
    p: float,
    decoding: bool = False,
    trained: bool = True,
    asked: str = "auto",
) -> str:
    """The kernel for keys of this length and heads of this width, whatever the mechanism.

    The one that is asked for, where it can do it; else the fastest. `biased` is a bias or a mask
    beyond the causal one, `p` dropout on the weights, `decoding` one query per sequence; `trained`
    means that a backward pass may follow.

        CPU   training     matmul with a bias, a mask or dropout, or up to 128 keys (1024 in half
                           precision); else flash
              no backward  flash, but matmul for decoding in float32
        CUDA  flash; where it cannot, matmul for decoding, else efficient, else math
        else  matmul for decoding, which copies no heads; else sdpa

    Measured on 2 cores (AMX, torch 2.13), bfloat16, forward and backward, H = 6, D = 64: at B = 64
    and T = 16, matmul 1.3 ms and flash 14; at T = 256, 60 and 119; at T = 1024 flash is faster.
    Dropout inside torch's call would force its slow math path.
    """

    def able(kernel: str) -> bool:
        return not refusal(kernel, device, dtype, width=width, biased=biased, p=p)

    half = dtype in HALF
    if asked not in ("auto", "fastest") and able(asked):
        return asked
    if device == "cpu":
        if decoding or not trained:
            return "matmul" if decoding and not half else "flash"
        return "matmul" if biased or p > 0 or length <= (1024 if half else 128) else "flash"
    if device == "cuda":
        order = ("flash", "matmul") if decoding else ("flash", "efficient", "math")
        return next(kernel for kernel in order if able(kernel))
    return "matmul" if decoding else "sdpa"


def refusal(
    kernel: str, device: str, dtype: torch.dtype, *, width: int, biased: bool, p: float
) -> str:
    """Why a kernel cannot do it, as the end of a sentence; empty if it can.

    On CUDA by the conditions of torch's dispatcher, which would silently take another kernel.
    """
    if kernel in ("auto", "fastest", "matmul", "sdpa"):
        return ""
    if device == "cpu":
        if kernel != "flash":
            return "exists on CUDA alone"
        return f"has no dropout on a CPU, and dropout is {p}" if p > 0 else ""
    if device != "cuda":
        return f"does not exist on {device}"
    if dtype == torch.bfloat16 and capability() < AMPERE and kernel != "math":
        return f"has no bfloat16 at compute capability {capability_name()}"
    if kernel == "math":
        return ""
    if kernel == "flex":
        if p > 0:
            return f"has no dropout, and dropout is {p}"
        return f"takes heads of at least 16 channels, not {width}" if width < 16 else ""
    if kernel == "efficient":
        align = 8 if dtype in HALF else 4 if capability() >= AMPERE else 1
        return (
            f"takes heads of a multiple of {align} channels, not {width}" if width % align else ""
        )
    if dtype not in HALF:
        return "needs bfloat16 or float16"
    if capability() < AMPERE:
        return f"needs compute capability 8.0, and this GPU has {capability_name()}"
    if kernel == "flash":
        if biased:
            return "takes no bias and no mask on CUDA"
        return f"takes heads of at most 256 channels, not {width}" if width > 256 else ""
    if width > 128 or width % 8:
        return f"takes heads of a multiple of 8 channels, at most 128, not {width}"
    return f"takes dropout of a multiple of 1/16, not {p}" if not (16 * p).is_integer() else ""


def takes_window(
    device: str, dtype: torch.dtype, *, width: int, biased: bool, p: float, asked: str
) -> bool:
    """True where the kernel of full attention can leave out the keys before a window: flash on CUDA."""
    if device != "cuda" or p > 0 or width % 8:
        return False
    about: dict[str, Any] = {"width": width, "biased": biased, "p": p}
    return choose_kernel(device, dtype, 0, **about, asked=asked) == "flash"


def check_kernel(
    asked: str, device: str, dtype: torch.dtype, *, width: int, biased: bool, p: float
) -> None:
    """Raise ValueError if the kernel that is asked for cannot do it."""
    why = refusal(asked, device, dtype, width=width, biased=biased, p=p)
    if why:
        others = [
            name
            for name in KERNELS[2:]
            if not refusal(name, device, dtype, width=width, biased=biased, p=p)
        ]
        raise ValueError(f"kernel={asked} {why}; {', '.join(others)} work")


def capability() -> tuple[int, int]:
    """The compute capability of the GPU."""
    return torch.cuda.get_device_capability()


# As torch.compiler.assume_constant_result marks it, which would load the compiler at every start.
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def capability_name() -> str:
    """The compute capability as NVIDIA writes it: 7.5."""
    return ".".join(map(str, capability()))
