"""The feed-forward half of a block. The last projection of each is `out`, as in attention."""

from torch import Tensor, nn
from torch.nn import functional as F

from model.shape import Shape


class GELU(nn.Module):
    """out(gelu(up(x))), 4 * dim wide by default (Hendrycks & Gimpel 2016)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.ff_dim or 4 * shape.dim
        self.up = nn.Linear(shape.dim, hidden, bias=shape.bias)
        self.out = nn.Linear(hidden, shape.dim, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(x)))


class TanhGELU(GELU):
    """GELU by its approximation with tanh, as GPT-2 has it; on a CPU it takes twice the time."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(x), approximate="tanh"))


class ReLU2(nn.Module):
    """out(relu(up(x))^2), 4 * dim wide by default (So et al. 2021)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.ff_dim or 4 * shape.dim
        self.up = nn.Linear(shape.dim, hidden, bias=shape.bias)
        self.out = nn.Linear(hidden, shape.dim, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.up(x)).square())


class SwiGLU(nn.Module):
    """out(silu(gate(x)) * up(x)) (Shazeer 2020).

    By default 8/3 * dim wide, rounded up to a multiple of 32: about the weights of GELU's two
    matrices in three.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.ff_dim or -(-8 * shape.dim // 96) * 32
        self.gate = nn.Linear(shape.dim, hidden, bias=shape.bias)
        self.up = nn.Linear(shape.dim, hidden, bias=shape.bias)
        self.out = nn.Linear(hidden, shape.dim, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.up(x))


FEEDFORWARDS = {"gelu": GELU, "gelu_tanh": TanhGELU, "relu2": ReLU2, "swiglu": SwiGLU}
