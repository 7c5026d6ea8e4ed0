"""How well a model predicts a text: the one ruler for training, evaluation and comparison.

Shapes: N tokens of the text, T context, B rows, V vocab_size.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE = 512  # logits in float32 at once: many would cost memory, and more time than they save


def score(
    model: Callable[[Tensor], Tensor],
    tokens: Tensor,
    *,
    context: int,
    batch_size: int,
    device: str,
    between: Callable[[], object] = lambda: None,
) -> tuple[float, int]:
    """The negative log-likelihood of a text in nats, summed in float64, and the tokens it is of.

    As `token_nats` without overlap: every token is read once.
    """
    nats = token_nats(
        model,
        tokens,
        context=context,
        stride=context,
        batch_size=batch_size,
        device=device,
        between=between,
    )
    return nats.sum(dtype=torch.float64).item(), len(nats)


@torch.no_grad()
def token_nats(
    model: Callable[[Tensor], Tensor],
    tokens: Tensor,
    *,
    context: int,
    stride: int,
    batch_size: int,
    device: str,
    between: Callable[[], object] = lambda: None,
) -> Tensor:
    """-log p of each token of a text but the first, which has no context: (N,) -> (N - 1,) float32.

    The text is read in windows of T inputs that begin every `stride` tokens. Each token is scored
    once, in the first window that reaches it, so with at least T - stride tokens before it where the
    text has them. Batch size and padding do not enter. `between` is called before each batch.
    Raises ValueError for fewer than 2 tokens, or a stride that would leave tokens out.
    """
    scored = len(tokens) - 1
    if scored < 1:
        raise ValueError(f"a text of {len(tokens)} tokens has nothing to score")
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must be at least 1 and at most context={context}")
    starts = torch.arange(0, max(1, scored - context + stride), stride)
    full = starts[starts + context <= scored]
    batches = [(rows, context) for rows in full.split(batch_size)] if len(full) else []
    if len(full) < len(starts):
        batches.append((starts[-1:], scored - int(starts[-1])))
    nats = torch.empty(scored)
    for rows, length in batches:
        between()
        window = tokens[rows[:, None] + torch.arange(length + 1)].long().to(device)  # (B, T + 1)
        logits = model(window[:, :-1]).flatten(0, 1)  # (B * T, V)
        pieces = zip(logits.split(PIECE), window[:, 1:].flatten().split(PIECE), strict=True)
        losses = torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in pieces])
        place = rows[:, None] + torch.arange(length)  # (B, T)
        new = (rows[:, None] == 0) | (torch.arange(length) >= context - stride)
        nats[place[new]] = losses.view_as(place).cpu()[new]
    return nats


def perplexity(nats: float) -> float:
    """exp of the mean nats per token; infinite where a float ends."""
    return math.exp(nats) if nats < 700 else math.inf


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Summed nats of a text as bits per UTF-8 byte: comparable across tokenizers."""
    return nats / text_bytes / math.log(2)
