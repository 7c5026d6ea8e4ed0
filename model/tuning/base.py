"""Finetuning: which parameters of a model are trained, and which are added for it."""

from collections.abc import Callable

from torch import Tensor, nn

from model.transformer import Transformer


class Tuning:
    """A way of finetuning, built as `Tuning(*, <options of its config>)`.

    The parameters that it adds start from the run's own seed; all others keep the names that they
    have without it, and start from the weights of another run.
    """

    def apply(self, model: Transformer) -> None:
        """Freeze and extend a model that has just been built. Raises ValueError for what cannot be."""
        raise NotImplementedError

    def merged(self, model: Transformer) -> dict[str, Tensor]:
        """Weights by name of a plain model that computes the same. Raises ValueError if there is none."""
        raise ValueError(
            f"{type(self).__name__.lower()} cannot be merged into the weights of a plain model"
        )


def freeze(model: nn.Module) -> None:
    """Train no parameter of a model."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def replace_linears(
    model: Transformer, chosen: Callable[[str], bool], make: Callable[[nn.Linear], nn.Linear]
) -> None:
    """Replace the linear layers of the blocks whose own name is chosen: q, v, out, ..."""
    for block in model.blocks:
        for name, module in list(block.named_modules()):
            parent, _, own = name.rpartition(".")
            if isinstance(module, nn.Linear) and chosen(own):
                setattr(block.get_submodule(parent), own, make(module))


class DrawnLinear(nn.Linear):
    """A linear layer whose weight starts N(0, init_std), and is trained at `rate` times the learning rate."""

    def __init__(
        self, width_in: int, width_out: int, init_std: float, *, bias: bool, rate: float = 1.0
    ) -> None:
        super().__init__(width_in, width_out, bias=bias)
        self.init_std, self.rate = init_std, rate


class ExtendedLinear(nn.Linear):
    """A linear layer with the parameters of another, to add to."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
