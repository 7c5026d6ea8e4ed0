"""The bigram model: what a language model must beat to have learned more than pairs of tokens."""

import numpy as np
from torch import Tensor


def bigram_nats(train: Tensor, text: Tensor, vocab_size: int) -> float:
    """Summed nats of a text (N,), but its first token, under bigram counts of the training text.

    p(b | a) = (c(a, b) + t(a) p(b)) / (c(a) + t(a)), where t(a) is how many different tokens follow
    a (Witten & Bell 1991), and p(b) = (c(b) + 1) / (n + V). Nothing is tuned.
    """
    known, asked = (x.numpy().astype(np.int64) for x in (train, text))
    single = np.bincount(known, minlength=vocab_size)
    p_single = (single + 1) / (len(known) + vocab_size)
    pairs, counts = np.unique(known[:-1] * vocab_size + known[1:], return_counts=True)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)
    leading = np.bincount(known[:-1], minlength=vocab_size)

    first, second = asked[:-1], asked[1:]
    wanted = first * vocab_size + second
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, counts[at], 0)
    weight = np.maximum(followers[first], 1)
    p = (seen + weight * p_single[second]) / (leading[first] + weight)
    return float(-np.log(p).sum())
