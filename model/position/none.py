"""No positions at all: the causal mask alone tells the model about order."""

from model.position.base import Position


class NoPE(Position):
    """No position encoding (Kazemnejad et al. 2023, https://arxiv.org/abs/2305.19466)."""
