"""What training lowers: the mean cross-entropy of the next token.

Shapes: B batch, T tokens, R = B T rows, D dim, V vocab_size.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from model.transformer import Transformer, compute_dtype

AT_ONCE = 2**25  # logits of a piece: 128 MiB in float32


def next_token_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, float32, of targets (B, T) after tokens (B, T).

    Where all logits at once would take much memory, as a vocabulary of 50,000 makes them, they are
    made, scored and turned into their own gradient in pieces of rows.
    """
    rows, vocab_size = tokens.numel(), model.shape.vocab_size
    if rows * vocab_size <= AT_ONCE:
        logits = model(tokens)  # (B, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    x = model.hidden(tokens).flatten(0, 1)  # (R, D)
    x = x.to(compute_dtype(x))
    weight = model.head.weight.to(x.dtype)
    return score_pieces(x, weight, targets.flatten(), max(1, AT_ONCE // vocab_size))


class Pieces(torch.autograd.Function):
    """Mean cross-entropy of targets (R,) under softmax(x W^T), x (R, D) and W (V, D), by pieces.

    The gradients are computed beside the loss, so that no piece's logits outlive it (the idea of
    Liger Kernel, Hsu et al. 2024, https://arxiv.org/abs/2410.10989).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        total = torch.zeros((), device=x.device)
        of_x = torch.empty_like(x)
        of_weight = torch.zeros_like(weight, dtype=torch.float32)
        pieces = zip(x.split(rows), targets.split(rows), of_x.split(rows), strict=True)
        for part, wanted, of_part in pieces:
            scores = (part @ weight.T).float().log_softmax(-1)  # (rows, V)
            total -= scores.gather(1, wanted[:, None]).sum()
            gradient = scores.exp_()
            gradient[torch.arange(len(part), device=x.device), wanted] -= 1
            gradient = gradient.div_(len(x)).to(x.dtype)
            torch.mm(gradient, weight, out=of_part)
            of_weight += gradient.T @ part
        ctx.save_for_backward(of_x, of_weight.to(weight.dtype))
        return total / len(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_x, of_weight = ctx.saved_tensors
        return of_x * grad, of_weight * grad, None, None


score_pieces = cast(Callable[[Tensor, Tensor, Tensor, int], Tensor], Pieces.apply)
