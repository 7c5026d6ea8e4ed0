"""Low-rank adaptation: a trained product of two narrow matrices beside each frozen one.

Shapes: * any, I and O the widths of a linear layer's input and output, R rank.
"""

import math

import torch
from torch import Tensor, nn

from model.transformer import Transformer
from model.tuning.base import DrawnLinear, ExtendedLinear, Tuning, freeze, replace_linears


class LoRALinear(ExtendedLinear):
    """W x + b + (alpha / R) B A x, where A (R, I) is drawn and B (O, R) is zero at first."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, ratio: float) -> None:
        width_in, width_out = base.in_features, base.out_features
        super().__init__(base)
        self.rank, self.scale = rank, alpha / rank
        std = 1 / math.sqrt(3 * width_in)  # that of the uniform draw in the paper's code
        self.lora_a = DrawnLinear(width_in, rank, std, bias=False)
        self.lora_b = DrawnLinear(rank, width_out, 0.0, bias=False, rate=ratio)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * self.lora_b(self.narrow(x))  # (*, O)

    def narrow(self, x: Tensor) -> Tensor:
        """A x: (*, I) -> (*, R)."""
        return self.lora_a(x)

    def merged(self) -> Tensor:
        """The weight (O, I) of a plain layer that computes the same."""
        return self.weight + self.scale * self.lora_b.weight @ self.lora_a.weight


class DynamicLoRALinear(LoRALinear):
    """In training, a random number of the R channels; in evaluation, the first `rank` of them."""

    def narrow(self, x: Tensor) -> Tensor:
        return self.lora_a(x) * self.kept()

    def merged(self) -> Tensor:
        return self.weight + self.scale * (self.lora_b.weight * self.kept()) @ self.lora_a.weight

    def kept(self) -> Tensor:
        """Which channels count: (R,)."""
        channels = torch.arange(self.lora_a.out_features, device=self.weight.device)
        if self.training:  # from torch's generator, which is seeded by (seed, step)
            return channels <= torch.randint(len(channels), (), device=channels.device)
        return channels < self.rank


class LoRA(Tuning):
    """Low-rank adaptation of linear layers (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    `modules` names the layers, as [q,v]; null takes all of each block. At first the model computes
    what its parent does, because B is zero; A is not, or neither would ever have a gradient. B learns
    at `ratio` times the learning rate: 16 is LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354).
    Raises ValueError for a rank below 1 or above a layer's width, and for names that no layer has.
    """

    layer = LoRALinear

    def __init__(self, *, rank: int, alpha: float, ratio: float, modules: list[str] | None) -> None:
        if rank < 1:
            raise ValueError(f"tune.rank={rank} must be at least 1")
        if not ratio > 0:
            raise ValueError(f"tune.ratio={ratio:g} must be above 0")
        self.rank, self.alpha, self.ratio, self.modules = rank, alpha, ratio, modules

    def apply(self, model: Transformer) -> None:
        names = {
            name.rpartition(".")[2]
            for name, module in model.blocks.named_modules()
            if isinstance(module, nn.Linear)
        }
        wanted = names if self.modules is None else set(self.modules)
        if unknown := sorted(wanted - names):
            raise ValueError(
                f"tune.modules: no layer is called {', '.join(unknown)}; "
                f"there are {', '.join(sorted(names))}"
            )
        if not wanted:
            raise ValueError("tune.modules=[] trains nothing; null takes all layers of each block")
        freeze(model)
        replace_linears(model, wanted.__contains__, self.extend)

    def merged(self, model: Transformer) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {
            n: p for n, p in model.named_parameters() if n not in model.added
        }
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear):
                weights[f"{name}.weight"] = module.merged()
        return weights

    def extend(self, base: nn.Linear) -> LoRALinear:
        """A layer with its low-rank part."""
        width = min(base.in_features, base.out_features)
        if self.rank > width:
            raise ValueError(f"tune.rank={self.rank} exceeds the width {width} of a layer")
        return self.layer(base, self.rank, self.alpha, self.ratio)


class DyLoRA(LoRA):
    """Low-rank adaptation whose every rank up to `rank` works after one training.

    Each step trains the first b channels of each layer, b drawn from 1 to the rank (Valipour et al.
    2022, https://arxiv.org/abs/2210.07558). `eval=rank` measures the ranks below.
    """

    layer = DynamicLoRALinear
