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
