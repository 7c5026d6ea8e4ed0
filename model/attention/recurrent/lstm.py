"""Long short-term memory.

Shapes: B batch, T new tokens, D dim, R width of the state.
"""

from torch import Tensor

from model.attention.base import weight_of
from model.attention.cache import LayerCache
from model.attention.recurrent.network import Network
from model.ops.recurrence import lstm
from model.position.base import Positions
from model.shape import Shape


class LSTM(Network):
    """c_t = f c_{t-1} + i g and h_t = o tanh(c_t), y_t = W_o h_t, with h_0 = c_0 = 0.

    i, f, o = sigmoid and g = tanh of W [x_t; h_{t-1}] + b, with 1 added for f: Hochreiter and
    Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735, with the forget gate of Gers et al.
    2000, as the mixer of a block. `width` None is dim. 5 D R + 4 R^2 weights.
    Raises ValueError for a width below 1.
    """

    def __init__(self, shape: Shape, layer: int, *, width: int | None) -> None:
        super().__init__(shape, layer, width, gates=4)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        x = self.input(x)  # (B, T, 4 R)
        h, c = self.state_before(x, cache)
        y, c = lstm(x, weight_of(self.recurrent).to(x.dtype), h.to(x.dtype), c)
        self.keep(cache, x.size(1), y[:, -1], c)
        return self.out(y)  # (B, T, D)

    def state_shapes(self) -> list[tuple[int, ...]]:
        return [(self.width,), (self.width,)]
