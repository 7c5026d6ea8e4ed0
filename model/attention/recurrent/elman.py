"""The Elman network.

Shapes: B batch, T new tokens, D dim, R width of the state.
"""

from torch import Tensor

from model.attention.base import weight_of
from model.attention.cache import LayerCache
from model.attention.recurrent.network import Network
from model.ops.recurrence import ACTIVATIONS, elman
from model.position.base import Positions
from model.shape import Shape


class Elman(Network):
    """h_t = activation(W_x x_t + W_h h_{t-1} + b), y_t = W_o h_t, with h_0 = 0.

    Elman 1990, https://doi.org/10.1207/s15516709cog1402_1, as the mixer of a block. `activation` is
    tanh, or slide(a) = min(1, max(0, a)); `width` None is dim. 2 D R + R^2 weights.
    Raises ValueError for a width below 1 and an unknown activation.
    """

    def __init__(self, shape: Shape, layer: int, *, width: int | None, activation: str) -> None:
        super().__init__(shape, layer, width, gates=1)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation} must be {' or '.join(ACTIVATIONS)}")
        self.activation = activation

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        x = self.input(x)  # (B, T, R)
        (h,) = self.state_before(x, cache)
        y = elman(x, weight_of(self.recurrent).to(x.dtype), h.to(x.dtype), self.activation)
        self.keep(cache, x.size(1), y[:, -1])
        return self.out(y)  # (B, T, D)

    def state_shapes(self) -> list[tuple[int, ...]]:
        return [(self.width,)]
