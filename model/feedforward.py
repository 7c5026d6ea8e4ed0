"""The feed-forward layers of a block. The last projection of each is `out`, as in attention."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from model.shape import Shape


class MLP(nn.Module):
    """out(activation(up(x))), 4 * dim wide by default."""

    def __init__(self, shape: Shape, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        hidden = shape.ff_dim or 4 * shape.dim
        self.activation = activation
        self.up = nn.Linear(shape.dim, hidden, bias=shape.bias)
        self.out = nn.Linear(hidden, shape.dim, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.up(x)))


class GatedMLP(nn.Module):
    """out(activation(gate(x)) * up(x)) (Shazeer 2020).

    By default 8/3 * dim wide, rounded up to a multiple of 32: three matrices with about as many
    weights as the two of `MLP`.
    """

    def __init__(self, shape: Shape, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        hidden = shape.ff_dim or -(-8 * shape.dim // 96) * 32
        self.activation = activation
        self.gate = nn.Linear(shape.dim, hidden, bias=shape.bias)
        self.up = nn.Linear(shape.dim, hidden, bias=shape.bias)
        self.out = nn.Linear(hidden, shape.dim, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.gate(x)) * self.up(x))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as in GPT-2; on a CPU it takes twice the time."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (So et al. 2021)."""
    y = F.relu(x)
    return y * y  # CUDA's autocast would compute its square in float32


FEEDFORWARDS: dict[str, Callable[[Shape], nn.Module]] = {
    "gelu": lambda shape: MLP(shape, F.gelu),  # Hendrycks & Gimpel 2016
    "gelu_tanh": lambda shape: MLP(shape, gelu_tanh),
    "relu2": lambda shape: MLP(shape, relu2),
    "swiglu": lambda shape: GatedMLP(shape, F.silu),
}
