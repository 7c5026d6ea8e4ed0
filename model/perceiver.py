"""Transformers whose inner blocks run on fewer positions than the text has.

Shapes: B batch, T tokens, D dim, m latents, R rows that ask, S rows that are read.
"""

from typing import NoReturn, cast

import torch
from torch import Tensor, nn

from model.attention.cache import KVCache
from model.ops.dropout import dropout
from model.position.base import Positions
from model.shape import Shape
from model.transformer import Block, Transformer


class Perceiver(Transformer):
    """A Transformer of which some blocks ask from other rows than they read."""

    has_latents = True
    crossing: tuple[int, ...]  # those blocks

    def __init__(self, shape: Shape, **parts: object) -> None:
        super().__init__(shape, **parts)  # type: ignore[arg-type]
        for layer in self.crossing:
            attention = self.attention_layers[layer]
            if not attention.crosses:
                raise ValueError(
                    f"latents and bottleneck need attention by plain queries, keys and values in the "
                    f"{'first layer' if layer == 0 else 'last layer'}, not {type(attention).__name__}; "
                    "mha, gqa, mqa, key_shift and short_conv work"
                )

    def block(self, layer: int) -> Block:
        """The block of a layer."""
        return cast(Block, self.blocks[layer])

    def cross(
        self, layer: int, x: Tensor, x_places: Positions, y: Tensor, y_places: Positions
    ) -> Tensor:
        """x (B, R, D) after a block in which it asks y (B, S, D)."""
        return self.recomputed(cross, self.block(layer), x, x_places, y, y_places)

    def new_cache(self, capacity: int) -> NoReturn:
        """Raises ValueError: which rows a block runs on changes with every token."""
        raise ValueError("a model with latents or a bottleneck has no KV cache")


class PerceiverAR(Perceiver):
    """The last m positions of a text pass all blocks, and are all that is predicted.

    They ask, in the first block, all positions before them, which are no more than keys and values
    there; the others attend among the m. Hawthorne et al. 2022, https://arxiv.org/abs/2202.07765.
    A text of at most m tokens is read as by the ordinary model.
    """

    crossing = (0,)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The input of the head at the last positions: (B, T) -> (B, min(T, m), D)."""
        m = self.shape.latents
        assert m is not None
        assert cache is None
        if tokens.size(1) + self.prompt_tokens <= m:
            return super().hidden(tokens)
        x, positions = self.read(tokens, 0)
        last, its = x[:, -m:], self.position.at(positions.pos[-m:])
        last = self.cross(0, last, its.of_layer(0), x, positions.of_layer(0))
        last = self.through(range(1, len(self.blocks)), last, its)
        return self.norm(last[:, -tokens.size(1) :])  # without the prompt

    def rows(self, layer: int, length: int) -> tuple[int, int]:
        m = min(length, self.shape.latents or length)
        return m, length if layer == 0 else m


class Bottleneck(Perceiver):
    """m trained latents ask the text, the inner blocks run on them, the text asks them.

    The Perceiver of the CS224n assignment on pretraining. Latent i sees tokens 0 to i, and a token
    sees the latents up to its own place, so that no token sees a later one. It follows that **no
    token from m on reaches another**: they enter no latent. Use m below the context to see what that
    costs, not to save.
    """

    def __init__(self, shape: Shape, **parts: object) -> None:
        self.crossing = (0, shape.n_layers - 1)
        super().__init__(shape, **parts)
        assert shape.bottleneck is not None
        self.latents = nn.Parameter(torch.empty(shape.bottleneck, shape.dim))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The input of the head, after the last norm: (B, T) -> (B, T, D)."""
        assert cache is None
        x, positions = self.read(tokens, 0)
        m = min(x.size(1), len(self.latents))
        places, last = self.position.at(positions.pos[:m]), len(self.blocks) - 1
        latents = self.latents[:m].to(x.dtype).expand(len(x), -1, -1)
        first = places.of_layer(0)
        latents = self.cross(0, latents, first, x[:, :m], first)
        latents = self.through(range(1, last), latents, places)
        x = self.cross(last, x, positions.of_layer(last), latents, places.of_layer(last))
        return self.norm(x[:, x.size(1) - tokens.size(1) :])

    def rows(self, layer: int, length: int) -> tuple[int, int]:
        m = min(length, len(self.latents))
        return length if layer == len(self.blocks) - 1 else m, m


def cross(block: Block, x: Tensor, x_places: Positions, y: Tensor, y_places: Positions) -> Tensor:
    """A block in which x (B, R, D) asks y (B, S, D); each row sees those at its place and before."""
    norm, drop = block.attention_norm, (block.dropout, block.training)
    x = x + dropout(block.attention.cross(norm(x), x_places, norm(y), y_places), *drop)
    return x + dropout(block.feedforward(block.feedforward_norm(x)), *drop)


def kind_of(shape: Shape) -> type[Transformer]:
    """The class that reads a text as a shape says."""
    if shape.latents is not None:
        return PerceiverAR
    return Transformer if shape.bottleneck is None else Bottleneck
