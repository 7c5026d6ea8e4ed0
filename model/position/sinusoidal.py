"""Fixed sine and cosine positions."""

import torch
from torch import Tensor

from model.position.base import Position
from model.shape import Shape


class Sinusoidal(Position):
    """Adds amplitude * PE, with PE(p, 2i) = sin(p / base^(2i/D)), PE(p, 2i+1) = cos(the same).

    Vaswani et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762. The paper adds waves of
    amplitude 1 to embeddings with a standard deviation of 1; ours are initialised with 0.02, so an
    `amplitude` of 0.02 keeps the ratio. Raises ValueError if dim is odd.
    """

    def __init__(self, shape: Shape, *, base: float, amplitude: float) -> None:
        super().__init__(shape)
        if shape.dim % 2:
            raise ValueError(f"sinusoidal positions need an even dim, not dim={shape.dim}")
        if not base > 1:
            raise ValueError(f"base={base} must be above 1")
        self.base = base
        self.amplitude = amplitude

    def embed(self, x: Tensor, pos: Tensor) -> Tensor:
        return x + self.amplitude * self.encoding(x.size(-1), pos).to(x.dtype)

    def encoding(self, dim: int, pos: Tensor) -> Tensor:
        """PE, float32: pos (T,) -> (T, dim)."""
        even = torch.arange(0, dim, 2, device=pos.device, dtype=torch.float32)
        angles = pos[:, None].float() * self.base ** (-even / dim)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
