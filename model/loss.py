"""Training loss: mean next-token cross-entropy.

Shapes: B batch, T tokens, N = B T rows, D dim, V vocab_size.
"""

from torch import Tensor
from torch.nn import functional as F

from model.ops.cross_entropy import chunked_cross_entropy
from model.transformer import Transformer, compute_dtype

CHUNK = 2**25  # logits at once: 128 MiB in float32


def next_token_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, float32, of targets (B, T) after tokens (B, T).

    Where all logits would take much memory, as with a vocabulary of 50,000, they are computed and
    turned into their gradient by chunks of rows.
    """
    rows, vocab_size = tokens.numel(), model.shape.vocab_size
    if rows * vocab_size <= CHUNK:
        logits = model(tokens)  # (B, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    x = model.hidden(tokens).flatten(0, 1)  # (N, D)
    x = x.to(compute_dtype(x))
    weight = model.head.weight.to(x.dtype)
    return chunked_cross_entropy(x, weight, targets.flatten(), max(1, CHUNK // vocab_size))
