"""Attention as a lookup: copying, averaging, undoing a sum, and noisy keys read by one head or two.

The exercises of CS224n's assignment on pretraining, computed by `attend`, without a model. Keys are
orthonormal, or noisy versions of orthonormal vectors, and a query sees all of them.

Shapes: N queries or draws, S keys, D channels, Dv width of values.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compare.report.style import COLOURS, Drawing, canvas, legend, pictured
from model.attention.attend import attend

BETAS = (5.0, 10.0, 20.0)  # norms of queries
NOISY_KEYS = 8
VARIANCE = 0.5  # of the length of the noisy key
INNER = (0.1, 0.9)  # a share outside tells that one value was lost
UNSEEN = 1e-2  # the weight that copying leaves to all other keys


def lookup(q: Tensor, k: Tensor, v: Tensor, kernel: str = "auto") -> Tensor:
    """softmax(q k^T) v of each query (N, D) over its own keys (N, S, D) or all of (S, D): (N, Dv).

    Values are (S, Dv). Each query is a sequence of its own in the batch, behind all keys. The
    kernels divide scores by sqrt(D), so queries are multiplied by it.
    """
    k, v = k.expand(len(q), -1, -1)[:, None], v.expand(len(q), 1, -1, -1)
    pos = torch.arange(k.size(2))
    q = math.sqrt(q.size(-1)) * q[:, None, None]  # (N, 1, 1, D)
    return attend(q, k, v, pos[-1:], pos, lambda *_: None, kernel=kernel)[:, 0, 0]


def weights(q: Tensor, k: Tensor, kernel: str = "auto") -> Tensor:
    """Attention weights (N, S) of a `lookup`: what it returns where values are unit vectors."""
    return lookup(q, k, torch.eye(k.size(-2), dtype=k.dtype), kernel)


def orthonormal(n: int, seed: int = 0) -> Tensor:
    """n orthonormal vectors, rows of (n, n), in float64."""
    drawn = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn)[0]


@dataclass(frozen=True)
class Exercise:
    """A number by formula, and the same by attention."""

    name: str
    setting: str
    formula: float
    attention: float


def copy(n: int) -> Exercise:
    """Copy one value: the gap between its score and the others' for a weight of 0.99 among n keys.

    The weight is 1 / (1 + (n - 1) exp(-gap)).
    """
    keys, gap = orthonormal(n), math.log((n - 1) * (1 - UNSEEN) / UNSEEN)
    found = weights(gap * keys[:1], keys)[0, 0].item()
    return Exercise("copy one value", f"{n} keys, scores {gap:.3f} apart", 1 - UNSEEN, found)


def average(n: int, beta: float) -> Exercise:
    """Average two values with q = beta (k_a + k_b): e^beta / (n - 2 + 2 e^beta) on each."""
    keys = orthonormal(n)
    found = weights(beta * keys[:2].sum(dim=0, keepdim=True), keys)[0, 1].item()
    formula = 1 / ((n - 2) * math.exp(-beta) + 2)
    return Exercise("average two values", f"{n} keys, beta {beta:g}", formula, found)


def undo_sum(n: int = 8) -> Exercise:
    """Recover v_a from v_a + v_b, of orthogonal subspaces with bases A and B: M = A A^T.

    A head does it with values A^T v and an output projection A. A^T alone gives the coordinates
    of v_a in the basis. The largest error of a channel.
    """
    vectors, drawn = orthonormal(n), orthonormal(n, seed=1)
    A, B = vectors[: n // 2].T, vectors[n // 2 :].T  # (D, D / 2)
    v = torch.stack((A @ drawn[0, : n // 2], B @ drawn[1, : n // 2]))  # (2, D)
    keys = orthonormal(2)
    half = lookup(keys.sum(dim=0, keepdim=True), keys, v @ A) @ A.T  # (1, D)
    return Exercise("undo a sum", "M = A A^T, error", 0.0, (2 * half - v[0]).abs().max().item())


def order(n: int = 8) -> Exercise:
    """Permute pairs of keys and values, and queries: the outputs stay, and are permuted alike."""
    q, k, v = 3 * orthonormal(n, seed=1), orthonormal(n), orthonormal(n, seed=2)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    y = lookup(q, k, v)
    pairs = lookup(q, k[shuffled], v[shuffled]) - y
    queries = lookup(q[shuffled], k, v) - y[shuffled]
    error = torch.stack((pairs, queries)).abs().max().item()
    return Exercise("order of keys and queries", "permuted, error", 0.0, error)


def exercises() -> list[Exercise]:
    """The exercises that have one answer."""
    return [
        *(copy(n) for n in (8, 16, 128)),
        *(average(8, beta) for beta in BETAS[:2]),
        undo_sum(),
        order(),
    ]


def lengths(draws: int, seed: int = 0) -> Tensor:
    """Lengths of the noisy key: gamma (N,) from N(1, 1/2)."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + math.sqrt(VARIANCE) * torch.randn(draws, dtype=torch.float64, generator=generator)


def shares(queries: Tensor, keys: Tensor, gamma: Tensor) -> Tensor:
    """Weight on the first key (N,), the mean over heads with queries (H, D).

    Of keys (S, D) the first has the length gamma (N,) times its own.
    """
    noisy = keys.repeat(len(gamma), 1, 1)  # (N, S, D)
    noisy[:, 0] *= gamma[:, None]
    heads = [weights(q.expand(len(gamma), -1), noisy)[:, 0] for q in queries]
    return torch.stack(heads).mean(dim=0)


def one_head(keys: Tensor, beta: float) -> Tensor:
    """The query of a head that averages the first two values: (1, D)."""
    return beta * keys[:2].sum(dim=0, keepdim=True)


def two_heads(keys: Tensor, beta: float) -> Tensor:
    """The queries of two heads that copy a value each: (2, D)."""
    return beta * keys[:2]


HEADS = {"one head": one_head, "two heads": two_heads}


def noise(draws: int) -> dict[tuple[float, str], Tensor]:
    """Shares of v_a (N,) in the average of v_a and v_b where key a varies in length: by beta and heads."""
    keys, gamma = orthonormal(NOISY_KEYS), lengths(draws)
    return {
        (beta, name): shares(queries(keys, beta), keys, gamma)
        for beta in BETAS
        for name, queries in HEADS.items()
    }


def inner(share: Tensor) -> float:
    """The fraction of draws in which both values are present."""
    return ((share > INNER[0]) & (share < INNER[1])).double().mean().item()


@pictured("lookup")
def draw_noise(found: dict[tuple[float, str], Tensor]) -> Drawing:
    """Histograms of the share of v_a: a panel for each beta, one head against two."""
    figure, panels = canvas(len(BETAS), 3.0)
    for axes, beta in zip(panels, BETAS, strict=True):
        for name, colour in zip(HEADS, COLOURS, strict=False):
            share = found[beta, name].numpy()
            axes.hist(share, bins=40, range=(0, 1), weights=[1 / len(share)] * len(share),
                      color=colour, alpha=0.6, label=name)  # fmt: skip
        axes.set(title=f"beta {beta:g}", xlabel="weight on the first value")
    panels[0].set_ylabel("fraction of draws")
    legend(panels[0], len(HEADS))
    caption = (
        "Weight on the first of two values that attention is to average, where the length of "
        "its key varies: one head attends to both keys, two heads to one each."
    )
    return figure, caption
