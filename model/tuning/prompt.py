"""Prompt tuning: trained vectors before the embeddings of a text.

Shapes: P vectors, D dim, W width of the network that makes them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.transformer import Transformer
from model.tuning.base import Tuning, freeze


class SoftPrompt(nn.Module):
    """P trained vectors."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(tokens, dim))

    def forward(self) -> Tensor:
        """(P, D)."""
        return self.vectors


class MadePrompt(SoftPrompt):
    """P trained vectors through a small network."""

    def __init__(self, tokens: int, dim: int, width: int) -> None:
        super().__init__(tokens, dim)
        self.prompt_in = nn.Linear(dim, width)
        self.prompt_out = nn.Linear(width, dim)

    def forward(self) -> Tensor:
        return self.prompt_out(F.gelu(self.prompt_in(self.vectors)))


class Prompt(Tuning):
    """P trained vectors before the text (Lester et al. 2021, https://arxiv.org/abs/2104.08691).

    They take the positions 0 to P - 1, the text those after: a table of learned positions must reach
    so far. The model does not start as its parent. Raises ValueError for fewer than 1.
    """

    def __init__(self, *, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"tune.tokens={tokens} must be at least 1")
        self.tokens = tokens

    def apply(self, model: Transformer) -> None:
        end, needed = model.position.max_len, model.shape.max_len + self.tokens
        if end is not None and needed > end:
            raise ValueError(
                f"tune.tokens={self.tokens} come before a context of {model.shape.max_len}, but "
                f"{type(model.position).__name__.lower()} positions end at {end}"
            )
        freeze(model)
        model.prompt, model.prompt_tokens = self.made(model.shape.dim), self.tokens

    def made(self, dim: int) -> SoftPrompt:
        """What gives the vectors."""
        return SoftPrompt(self.tokens, dim)


class PTuning(Prompt):
    """The same vectors, made by a small trained network (Liu et al. 2021, https://arxiv.org/abs/2103.10385).

    `width` is that of its hidden layer. Raises ValueError for a width below 1.
    """

    def __init__(self, *, tokens: int, width: int) -> None:
        super().__init__(tokens=tokens)
        if width < 1:
            raise ValueError(f"tune.width={width} must be at least 1")
        self.width = width

    def made(self, dim: int) -> SoftPrompt:
        return MadePrompt(self.tokens, dim, self.width)
