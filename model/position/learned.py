"""Learned absolute positions."""

from torch import Tensor, nn

from model.position.base import Position
from model.shape import Shape


class Learned(Position):
    """One learned vector per position, added to the embedding (GPT-2); undefined past max_len."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.max_len = shape.max_len
        self.table = nn.Embedding(shape.max_len, shape.dim)

    def embed(self, x: Tensor, pos: Tensor) -> Tensor:
        return x + self.table(pos)
