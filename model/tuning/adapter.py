"""Adapters: small trained networks after the frozen layers.

Shapes: * any, D dim, M width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from model.transformer import Transformer
from model.tuning.base import DrawnLinear, ExtendedLinear, Tuning, freeze, replace_linears


class AdaptedLinear(ExtendedLinear):
    """y + up(gelu(down(y))) of a linear layer's output y (*, D); `up` is zero at first."""

    def __init__(self, base: nn.Linear, width: int) -> None:
        super().__init__(base)
        self.adapter_down = nn.Linear(base.out_features, width)
        self.adapter_up = DrawnLinear(width, base.out_features, 0.0, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.adapter_up(F.gelu(self.adapter_down(y)))


class Adapter(Tuning):
    """Bottleneck adapters before each residual sum (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751).

    Two in a block, M channels wide: after the last projection of attention and of the feed-forward.
    `norms` trains the norms too, as the paper does. At first the model computes what its parent does.
    Raises ValueError for a width below 1.
    """

    def __init__(self, *, width: int, norms: bool) -> None:
        if width < 1:
            raise ValueError(f"tune.width={width} must be at least 1")
        self.width, self.norms = width, norms

    def apply(self, model: Transformer) -> None:
        freeze(model)
        replace_linears(model, "out".__eq__, lambda base: AdaptedLinear(base, self.width))
        for name, parameter in model.named_parameters():
            if self.norms and "norm" in name.rpartition(".")[0].rpartition(".")[2]:
                parameter.requires_grad_(True)
