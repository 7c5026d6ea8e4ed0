"""Linear attention by chunks, each form next to its recurrence.

Within a chunk all pairs of tokens are compared at once; between chunks a state is handed on. FLOPs
grow linearly with the length, and the loop over tokens becomes one over chunks. Inputs are float32:
a gate near 1 or a sum over a long text would be lost in fewer digits.

Shapes: B batch, H heads, T tokens, c tokens of a chunk, Dk width of keys, Dv width of values.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F


def without_autocast(kind: str) -> AbstractContextManager[object]:
    """A region whose products are in the dtype of their factors, on a device of this type."""
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def chunks_of(chunk: int, *inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The chunks of tensors (B, H, T, *)."""
    return zip(*(x.split(chunk, dim=2) for x in inputs), strict=True)


# Gated linear attention


def gla_reference(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = diag(a_t) S_{t-1} + k_t^T v_t and y_t = q_t S_t, with a = exp(log_gate).

    q, k and log_gate (B, H, T, Dk), v (B, H, T, Dv), state (B, H, Dk, Dv) -> y like v, last state.
    """
    outputs = []
    for t in range(q.size(2)):
        gate = log_gate[:, :, t].exp()[..., None]
        state = gate * state + k[:, :, t, :, None] * v[:, :, t, None]
        outputs.append((q[:, :, t, None] @ state).squeeze(2))
    return torch.stack(outputs, dim=2), state


def gla(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None, chunk: int, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """`gla_reference` by chunks; state None is zeros, and the last state is made only to `keep` it.

    With b the sum of log gates from the chunk's start, token i reads token j by
    (q_i exp(b_i)) . (k_j exp(-b_j)). exp(-b) must not overflow: b must stay above -88 in a chunk.
    """
    outputs, last = [], -(-q.size(2) // chunk) - 1
    for i, (q_c, k_c, v_c, gate) in enumerate(chunks_of(chunk, q, k, v, log_gate)):
        b = gate.cumsum(dim=2)  # (B, H, c, Dk)
        q_c = q_c * b.exp()
        y = (q_c @ (k_c * (-b).exp()).mT).tril() @ v_c  # (B, H, c, Dv)
        outputs.append(y if state is None else y + q_c @ state)
        if keep or i < last:
            end = b[:, :, -1:]  # (B, H, 1, Dk)
            added = (k_c * (end - b).exp()).mT @ v_c
            state = added if state is None else end.exp().mT * state + added
    return torch.cat(outputs, dim=2), state


# The gated delta rule


def delta_reference(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = a_t (I - b_t k_t^T k_t) S_{t-1} + b_t k_t^T v_t and y_t = q_t S_t, with a = exp(log_gate).

    Each step takes the value at key k_t a share b_t of the way to v_t. q and k (B, H, T, Dk), v
    (B, H, T, Dv), log_gate and rate b (B, H, T), state (B, H, Dk, Dv) -> y like v, last state.
    """
    outputs = []
    for t in range(q.size(2)):
        key = k[:, :, t, :, None]  # (B, H, Dk, 1)
        state = log_gate[:, :, t, None, None].exp() * state
        missing = v[:, :, t, None] - key.mT @ state  # (B, H, 1, Dv)
        state = state + rate[:, :, t, None, None] * key * missing
        outputs.append((q[:, :, t, None] @ state).squeeze(2))
    return torch.stack(outputs, dim=2), state


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    rate: Tensor,
    state: Tensor | None,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """`delta_reference` by chunks; state None is zeros, and the last state is made only to `keep` it.

    What a token adds at its key depends on what those before it added: (I + L) u = b (v - k S), where
    L compares keys below the diagonal. With u known this is linear attention of values u (Yang et al.
    2024, https://arxiv.org/abs/2406.06484, with the gates of https://arxiv.org/abs/2412.06464).
    """
    outputs, last = [], -(-q.size(2) // chunk) - 1
    for i, (q_c, k_c, v_c, gate, b) in enumerate(chunks_of(chunk, q, k, v, log_gate, rate)):
        b, total = b[..., None], gate.cumsum(dim=2)[..., None]  # (B, H, c, 1)
        decay = (total - total.mT).tril().exp().tril()  # (B, H, c, c), from one token to another
        inverse = unit_lower_inverse((decay * ((b * k_c) @ k_c.mT)).tril(-1))
        values = v_c if state is None else v_c - (k_c * total.exp()) @ state
        u = inverse @ (b * values)  # (B, H, c, Dv)
        y = (decay * (q_c @ k_c.mT)) @ u
        outputs.append(y if state is None else y + (q_c * total.exp()) @ state)
        if keep or i < last:
            end = total[:, :, -1:]  # (B, H, 1, 1)
            added = (k_c * (end - total).exp()).mT @ u
            state = added if state is None else end.exp() * state + added
    return torch.cat(outputs, dim=2), state


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 of a strictly lower triangular L (..., c, c), by blocks of doubling size.

    [[A, 0], [C, D]]^-1 = [[A^-1, 0], [-D^-1 C A^-1, D^-1]]: as stable as forward substitution, where
    the series of powers of L loses all digits for keys that resemble each other, and made of products,
    which are counted.
    """
    c = lower.size(-1)
    size = padded(c)
    lower = F.pad(lower, (0, size - c, 0, size - c))
    inverse = torch.eye(2, device=lower.device) - diagonal_blocks(lower, 2)
    while (half := inverse.size(-1)) < size:
        corner = diagonal_blocks(lower, 2 * half)[..., half:, :half]
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        below = torch.cat((-(second @ corner @ first), second), dim=-1)
        inverse = torch.cat((F.pad(first, (0, half)), below), dim=-2)
    return inverse[..., 0, :c, :c]


def diagonal_blocks(x: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal of x (..., c, c): (..., c / size, size, size)."""
    blocks = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # (..., n, size, n, size)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def padded(c: int) -> int:
    """The power of two from 2 on that `unit_lower_inverse` fills a chunk of c tokens up to."""
    return max(2, 1 << (c - 1).bit_length())
