"""How well a model predicts a text: the one ruler for training, evaluation and comparison.

Shapes: N tokens of the text, T context, B rows.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
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

    The text is cut into windows of T inputs. Every token but the first (which has no context) is
    scored exactly once, given the tokens before it in its window; batch size and padding do not
    enter. `between` is called before each batch. Raises ValueError for fewer than 2 tokens.
    """
    scored = len(tokens) - 1
    if scored < 1:
        raise ValueError(f"a text of {len(tokens)} tokens has nothing to score")
    full = scored // context
    batches = []
    if full:
        starts = torch.arange(full) * context
        batches = [(rows, context) for rows in starts.split(batch_size)]
    if rest := scored - full * context:
        batches.append((torch.tensor([full * context]), rest))
    total = 0.0
    for rows, length in batches:
        between()
        window = tokens[rows[:, None] + torch.arange(length + 1)].long().to(device)  # (B, T + 1)
        logits = model(window[:, :-1]).float()  # (B, T, V)
        losses = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none")
        total += losses.double().sum().item()
    return total, scored


def perplexity(nats: float) -> float:
    """exp of the mean nats per token; infinite where a float ends."""
    return math.exp(nats) if nats < 700 else math.inf


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Summed nats of a text as bits per UTF-8 byte: comparable across tokenizers."""
    return nats / text_bytes / math.log(2)
