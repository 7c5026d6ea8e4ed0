"""Sizes that all parts of a model share."""

from dataclasses import dataclass

#: Upper bounds: larger values in a config are mistakes, or attacks on memory.
LARGEST = {
    "dim": 2**17,
    "n_heads": 2**12,
    "n_layers": 2**12,
    "max_len": 2**27,
    "vocab_size": 2**24,
    "ff_dim": 2**20,
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder-only Transformer, and the options that all of its layers share.

    Raises ValueError, with the values and what would work, if they do not fit each other.
    """

    dim: int  # width of the residual stream
    n_heads: int  # query heads; each is dim / n_heads wide
    n_layers: int
    max_len: int  # tokens of context in training
    vocab_size: int
    ff_dim: int | None = None  # hidden width of the feed-forward; None: derived from dim
    bias: bool = True  # biases of all Linear layers but the head, and of LayerNorm
    dropout: float = 0.0  # on embeddings, attention weights and both residual branches
    tie_embeddings: bool = False  # the head shares the weights of the token embedding
    latents: int | None = None  # the last positions, which alone pass all blocks (Perceiver AR)
    bottleneck: int | None = None  # trained latents, on which the inner blocks run (Perceiver)

    def __post_init__(self) -> None:
        for name in ("dim", "n_heads", "n_layers", "max_len", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.ff_dim is not None and self.ff_dim < 1:
            raise ValueError(f"ff_dim={self.ff_dim} must be at least 1, or null for its rule")
        for name in ("latents", "bottleneck"):
            number = getattr(self, name)
            if number is not None and not 1 <= number <= self.max_len:
                raise ValueError(
                    f"{name}={number} must be at least 1 and at most max_len={self.max_len}, or null"
                )
        if self.latents is not None and self.bottleneck is not None:
            raise ValueError(
                f"latents={self.latents} and bottleneck={self.bottleneck}: one of them must be null"
            )
        if self.bottleneck is not None and self.n_layers < 2:
            raise ValueError(f"bottleneck={self.bottleneck} needs n_layers of at least 2, not 1")
        for name, largest in LARGEST.items():
            if (getattr(self, name) or 0) > largest:
                raise ValueError(
                    f"{name}={getattr(self, name)} is above {largest}, the largest taken"
                )
        if self.dim % self.n_heads:
            raise ValueError(
                f"dim={self.dim} must be a multiple of n_heads={self.n_heads}; "
                f"n_heads that work: {divisors(self.dim)}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def divisors(n: int) -> str:
    """The divisors of n up to 64, for an error message: '1, 2, 3, 6'."""
    return ", ".join(str(d) for d in range(1, min(n, 64) + 1) if n % d == 0)
