"""A model spread over the processes of a run, so that it may be larger than what one of them can hold.

Every process keeps a part of each parameter, of its gradient and of the optimizer's state: torch's
`fully_shard` (Zhao et al. 2023, https://arxiv.org/abs/2304.11277). A block is gathered when it computes
and freed afterwards, in the forward and the backward pass.
"""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from model.perceiver import Perceiver
from model.transformer import Transformer


def shard(model: Transformer, device: str) -> None:
    """Spread a model over all processes, from the host's memory to theirs, a block at a time.

    Its gradients are then summed over the processes by the backward pass. What is outside of blocks,
    and blocks whose parts are called one by one, is gathered for the whole of a step.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    everyone: Any = dist.group.WORLD
    mesh = DeviceMesh.from_group(everyone, device)
    apart = model.crossing if isinstance(model, Perceiver) else ()
    blocks = [block for layer, block in enumerate(model.blocks) if layer not in apart]
    for module in (*blocks, model):
        part: Any = fully_shard(module, mesh=mesh)
        part.set_gradient_divide_factor(1.0)  # a sum; torch's default is the mean
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    register_fsdp_forward_method(model, "hidden")  # which the loss calls alone


def free(model: Any) -> None:
    """Free what a sharded model keeps gathered after a forward pass that no backward pass follows."""
    if hasattr(model, "reshard"):
        model.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """True for a tensor of which each process has a part: torch's DTensor, whose import takes a second."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """A tensor in one piece. A sharded one is gathered, by all processes together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part_of(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor on the device of another; of it this process's part, where the other is sharded."""
    tensor = tensor.to(like.device)
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """All tensors in one piece, in the host's memory where they were sharded, to `keep`; else none.

    One is gathered after the other, by all processes together.
    """
    kept = {}
    for name, tensor in tensors.items():
        one = whole(tensor)
        if keep:
            kept[name] = one.cpu() if is_sharded(tensor) else one
    return kept


def bytes_here(tensor: Any) -> int:
    """Bytes of a tensor that this process holds."""
    return tensor.to_local().nbytes if is_sharded(tensor) else tensor.nbytes
