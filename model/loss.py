"""Cross-entropy: the loss of training, and the likelihood of a text, one measure for all comparisons.

Targets of -100 do not count. Shapes: B rows, T tokens of context, N tokens or rows in all, D dim, V
vocab_size.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from model.ops.cross_entropy import IGNORED, chunked_cross_entropy
from model.transformer import Transformer, compute_dtype

LOGITS = 2**25  # at once, in training: 128 MiB in float32
ROWS = 512  # of logits in float32 at once, without a gradient: more take memory and are no faster


def next_token_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, float32, of targets (B, T) after tokens (B, T).

    Of the last targets alone where the model predicts no others. Where all logits would take much
    memory, as with a large vocabulary, they become their gradient by chunks of rows. Where the model is
    compiled, so is the loss of all logits at once.
    """
    rows, vocab_size = tokens.numel(), model.shape.vocab_size
    if rows * vocab_size <= LOGITS:
        return model.with_loss(mean_nll, tokens, targets)
    x = model.hidden(tokens)  # (B, T, D)
    targets, x = targets[:, -x.size(1) :].flatten(), x.flatten(0, 1).to(compute_dtype(x))
    weight = model.head.weight.to(x.dtype)
    return chunked_cross_entropy(x, weight, targets, max(1, LOGITS // vocab_size))


def mean_nll(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in float32, from all logits at once."""
    logits = model(tokens)  # (B, T, V)
    return logits_loss(logits, targets[:, -logits.size(1) :])


def logits_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in float32: logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def counted(targets: Tensor) -> Tensor:
    """The number of targets that count."""
    return (targets != IGNORED).sum()


@torch.no_grad()
def token_nll(
    model: Transformer,
    tokens: Tensor,
    *,
    context: int,
    stride: int,
    batch_size: int,
    device: str,
    predicted: int | None = None,
    share: tuple[int, int] = (0, 1),
    on_batch: Callable[[], object] = lambda: None,
) -> Tensor:
    """-log p of each token of a text but the first, which has no context: (N,) -> (N - 1,) float32.

    The text is read in windows of T inputs that begin every `stride` tokens. Each token is scored
    once, in the first window that reaches it, so with at least T - stride tokens before it where the
    text has them. Batch size and padding do not affect the result. `on_batch` is called before each.
    Of a model that predicts the last `predicted` tokens of its input alone, windows begin no farther
    apart, and the first tokens are read in shorter ones. `share` (i, n) scores every n-th batch alone,
    from the i-th, and leaves 0 elsewhere; all n shares compute equally many batches, some in vain, so
    that a model whose parts are in n processes can gather them.
    Raises ValueError for fewer than 2 tokens, or a stride that would leave tokens out.
    """
    scored = len(tokens) - 1
    if scored < 1:
        raise ValueError(f"a text of {len(tokens)} tokens has nothing to score")
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must be at least 1 and at most context={context}")
    reach = min(predicted or context, context)
    stride = min(stride, reach)
    starts = torch.arange(0, max(1, scored - context + stride), stride)
    full = starts[starts + context <= scored]
    batches = [(starts[:1], end) for end in range(reach, min(context, scored), reach)]
    if len(full):
        batches += [(rows, context) for rows in full.split(batch_size)]
    if len(full) < len(starts):
        batches.append((starts[-1:], scored - int(starts[-1])))
    nats = torch.zeros(scored)
    for i in range(share[0], -(-len(batches) // share[1]) * share[1], share[1]):
        rows, length = batches[min(i, len(batches) - 1)]
        on_batch()
        window = tokens[rows[:, None] + torch.arange(length + 1)].long().to(device)  # (B, T + 1)
        losses = row_losses(model, window[:, :-1], window[:, 1:])
        ends = torch.arange(length)[-losses.size(1) :]
        place = rows[:, None] + ends  # (B, T)
        new = (rows[:, None] == 0) | (ends >= context - stride)
        if i < len(batches):
            nats[place[new]] = losses.cpu()[new]
    return nats


@torch.no_grad()
def nll_of_rows(
    model: Transformer,
    inputs: Tensor,
    targets: Tensor,
    *,
    batch_size: int,
    device: str,
    on_batch: Callable[[], object] = lambda: None,
) -> tuple[float, int]:
    """-log p of the targets (N, T) after inputs (N, T) in nats, summed in float64, and their number.

    Targets of -100 do not count.
    """
    nats = torch.zeros((), dtype=torch.float64)
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        on_batch()
        losses = row_losses(model, x.to(device), y.to(device))
        nats += losses.cpu().sum(dtype=torch.float64)  # MPS has no float64
    return nats.item(), int((targets != IGNORED).sum())


def row_losses(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target (B, T) after tokens (B, T), in nats: (B, T); 0 where it does not count.

    Of the last targets alone where the model predicts no others. Logits of a few rows at a time.
    """
    x = model.hidden(tokens)
    targets = targets[:, -x.size(1) :]
    rows = ROWS if x.device.type == "cpu" else max(ROWS, LOGITS // model.shape.vocab_size)
    chunks = zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    losses = [F.cross_entropy(model.head(h).float(), y, reduction="none") for h, y in chunks]
    return torch.cat(losses).view_as(targets)


def perplexity(nats: float) -> float:
    """exp of the mean nats per token; infinite above the range of a float, and for NaN."""
    return math.exp(nats) if nats < 700 else math.inf


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Summed nats of a text as bits per UTF-8 byte: comparable across tokenizers."""
    return nats / text_bytes / math.log(2)
