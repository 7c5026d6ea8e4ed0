"""The interface of position schemes.

Shapes: B batch, T new tokens, S tokens so far, D dim, H heads, Hkv KV heads, Dh head_dim.
"""

from torch import Tensor, nn

from model.shape import Shape

#: What a scheme may act on: embeddings, queries and keys, scores.
HOOKS = frozenset({"embed", "rotate", "bias"})


class Position(nn.Module):
    """A position scheme: three hooks that change nothing unless overridden.

    `pos`, `q_pos` and `k_pos` are absolute positions, int64, always explicit: cached decoding,
    chunked prefill and evaluation beyond the training length all use the same code.
    """

    #: Longest sequence the scheme is defined for; None if it has no end.
    max_len: int | None = None
    #: True for a scheme whose bias depends on the distance of query and key alone.
    by_distance = False

    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def embed(self, x: Tensor, pos: Tensor) -> Tensor:
        """Add positions to embeddings: x (B, T, D), pos (T,) -> (B, T, D)."""
        return x

    def rotate(self, q: Tensor, k: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries (B, H, T, Dh) and keys (B, Hkv, T, Dh) by their positions pos (T,)."""
        return q, k

    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        """The bias of the scores: q_pos (T,), k_pos (S,) -> (H, T, S), or None for none."""
        return None

    @property
    def hooks(self) -> frozenset[str]:
        """Those of the three hooks that the scheme uses."""
        own, base = type(self), Position
        return frozenset(h for h in HOOKS if getattr(own, h) is not getattr(base, h))

    @property
    def trains_bias(self) -> bool:
        """True for a scheme whose bias has parameters."""
        return "bias" in self.hooks and any(True for _ in self.parameters())

    def of_layer(self, layer: int) -> "Position":
        """The scheme of a layer: this one, unless layers differ."""
        return self

    def at(self, pos: Tensor) -> "Positions":
        """The hooks for one forward pass over tokens at pos (T,).

        A scheme may return a subclass that keeps what all layers share.
        """
        return Positions(self, pos)


class Positions:
    """The positions of one forward pass: `pos` (T,) and the hooks of the scheme, for every layer.

    `shared` is where a layer leaves a tensor for later layers of the same pass.
    """

    def __init__(self, scheme: Position, pos: Tensor) -> None:
        self.scheme = scheme
        self.pos = pos
        self.shared: dict[str, Tensor] = {}

    def of_layer(self, layer: int) -> "Positions":
        """The positions as a layer sees them: these, unless layers differ."""
        return self

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, Dh) and keys (B, Hkv, T, Dh) of these tokens, rotated."""
        return self.scheme.rotate(q, k, self.pos)

    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        """The bias of the scores, (H, T, S), or None."""
        return self.scheme.bias(q_pos, k_pos)
