"""Cross-entropy of a large vocabulary without all logits in memory.

Shapes: N rows, D dim, V vocab_size.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # target of a row that does not count, torch's own default


def cross_entropy_reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(x W^T)[target] over rows that count: x (N, D), W (V, D), targets (N,)."""
    return F.cross_entropy((x @ weight.T).float(), targets)


class ChunkedCrossEntropy(torch.autograd.Function):
    """`cross_entropy_reference` by chunks of rows.

    The gradients are computed with the loss, so that no chunk's logits outlive it (the idea of Liger
    Kernel, Hsu et al. 2024, https://arxiv.org/abs/2410.10989).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        total = torch.zeros((), device=x.device)
        counts = targets != IGNORED
        number = counts.sum()
        classes = targets.where(counts, 0)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        pieces = (tensor.split(rows) for tensor in (x, classes, counts, grad_x))
        for x_chunk, target, count, grad_chunk in zip(*pieces, strict=True):
            log_p = (x_chunk @ weight.T).float().log_softmax(-1)  # (rows, V)
            total -= (log_p.gather(1, target[:, None])[:, 0] * count).sum()
            grad = log_p.exp_()
            grad[torch.arange(len(x_chunk), device=x.device), target] -= 1
            grad = grad.mul_(count[:, None]).to(x.dtype)  # divided later: float16 would lose it
            torch.mm(grad, weight, out=grad_chunk)
            grad_weight += grad.T @ x_chunk
        ctx.dtype = weight.dtype
        kept = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        ctx.save_for_backward(grad_x, (grad_weight / number).to(kept), number)
        return total / number

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight, number = ctx.saved_tensors
        return grad_x * (grad / number), (grad_weight * grad).to(ctx.dtype), None, None


chunked_cross_entropy = cast(
    Callable[[Tensor, Tensor, Tensor, int], Tensor], ChunkedCrossEntropy.apply
)
