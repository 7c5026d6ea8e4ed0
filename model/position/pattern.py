"""Position schemes that differ by layer."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from model.position.base import Position, Positions
from model.shape import Shape


class Pattern(Position):
    """Named schemes in turn: layer i has `pattern[i % len(pattern)]`.

    RoPE in most layers and none in every fourth (SmolLM3, https://huggingface.co/blog/smollm3), or
    two bases (Gemma 3, https://arxiv.org/abs/2503.19786). What a scheme adds to the embeddings it
    adds once, whichever layers name it.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        schemes: Mapping[str, Callable[[Shape], Position]],
        pattern: Sequence[str],
    ) -> None:
        super().__init__(shape)
        self.pattern = list(pattern)
        self.schemes = nn.ModuleDict({name: make(shape) for name, make in schemes.items()})
        used = pattern[: shape.n_layers]
        acting = [s for name, s in self.named() if name in used or "embed" in s.hooks]
        self.max_len = min((s.max_len for s in acting if s.max_len is not None), default=None)

    def named(self) -> list[tuple[str, Position]]:
        """The schemes by name."""
        return [(name, s) for name, s in self.schemes.items() if isinstance(s, Position)]

    @property
    def hooks(self) -> frozenset[str]:
        return frozenset().union(*(scheme.hooks for _, scheme in self.named()))

    def of_layer(self, layer: int) -> Position:
        return dict(self.named())[self.pattern[layer % len(self.pattern)]]

    def embed(self, x: Tensor, pos: Tensor) -> Tensor:
        for _, scheme in self.named():
            x = scheme.embed(x, pos)
        return x

    def at(self, pos: Tensor) -> Positions:
        return PatternPositions(self, pos)


class PatternPositions(Positions):
    """The positions of one forward pass, for each scheme once."""

    def __init__(self, scheme: Pattern, pos: Tensor) -> None:
        super().__init__(scheme, pos)
        self.pattern = scheme.pattern
        self.schemes = {name: part.at(pos) for name, part in scheme.named()}
        for part in self.schemes.values():
            part.shared = self.shared

    def of_layer(self, layer: int) -> Positions:
        return self.schemes[self.pattern[layer % len(self.pattern)]]
