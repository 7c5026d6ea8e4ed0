"""The decoder-only Transformer.

Shapes: B batch, T tokens, D dim, V vocab_size.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention.base import Attention
from model.cache import KVCache, LayerCache
from model.ops.dropout import dropout
from model.position.base import Position, Positions
from model.shape import Shape


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)): pre-norm, as in GPT-2."""

    def __init__(
        self,
        shape: Shape,
        attention: Attention,
        feedforward: nn.Module,
        norm: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.attention_norm = norm(shape.dim, shape.bias)
        self.attention = attention
        self.feedforward_norm = norm(shape.dim, shape.bias)
        self.feedforward = feedforward

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        y = self.attention(self.attention_norm(x), positions, cache)
        x = x + dropout(y, self.dropout, self.training)
        y = self.feedforward(self.feedforward_norm(x))
        return x + dropout(y, self.dropout, self.training)


class Transformer(nn.Module):
    """Decoder-only Transformer: next-token logits from tokens, its parts made by factories.

    `attention(shape, layer)`, `position(shape)`, `feedforward(shape)` and `norm(dim, bias)` build
    the parts. Parameters stay uninitialised until `init_weights`.
    """

    #: Recompute each block in the backward pass of training, instead of keeping its activations.
    activation_checkpointing = False

    def __init__(
        self,
        shape: Shape,
        *,
        attention: Callable[..., Attention],
        position: Callable[..., Position],
        feedforward: Callable[..., nn.Module],
        norm: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab_size, shape.dim)
        self.position = position(shape)
        self.blocks = nn.ModuleList(
            Block(shape, attention(shape, layer), feedforward(shape), norm)
            for layer in range(shape.n_layers)
        )
        self.norm = norm(shape.dim, shape.bias)
        self.head = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        if shape.tie_embeddings:
            self.head.weight = self.embed.weight
        check_hooks(self.position, self.attention_layers)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the token after each one: (B, T) -> (B, T, V). With a cache, T are the new ones.

        Raises ValueError past the end of a position scheme that has one.
        """
        return self.head(self.hidden(tokens, cache))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The input of the head, after the last norm: (B, T) -> (B, T, D). Raises as `forward`."""
        start = 0 if cache is None else len(cache)
        end = start + tokens.size(1)
        if self.position.max_len is not None and end > self.position.max_len:
            raise ValueError(
                f"a sequence of {end} tokens exceeds max_len={self.position.max_len} of "
                f"{type(self.position).__name__.lower()} positions"
            )
        positions = self.position.at(torch.arange(start, end, device=tokens.device))
        x = self.position.embed(self.embed(tokens), positions.pos)  # (B, T, D)
        # Under autocast the residual stream is bfloat16 too; nanoGPT and others keep it in float32.
        x = dropout(x.to(compute_dtype(x)), self.shape.dropout, self.training)
        recompute = self.activation_checkpointing and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[layer]
            inputs = (x, positions.of_layer(layer), layer_cache)
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return self.norm(x)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`nn.Module.compile`, for `hidden` too: the loss of a large vocabulary calls it alone."""
        super().compile(*args, **kwargs)
        self.hidden = torch.compile(self.hidden, *args, **kwargs)  # type: ignore[method-assign]

    def new_cache(self, capacity: int) -> KVCache:
        """An empty KV cache for up to `capacity` tokens."""
        return KVCache([layer.new_cache(capacity) for layer in self.attention_layers])

    def init_weights(self, seed: int, *, scaled: str = "out.weight") -> None:
        """Draw every parameter from a CPU generator seeded by (seed, its name).

        Variants that share a tensor, by name and shape, therefore start from the same values.
        Matrices N(0, 0.02); those whose name ends in `scaled`, the last of a residual branch,
        N(0, 0.02 / sqrt(2 n_layers)) (GPT-2); biases 0, norms 1. A module with an `init_std` has its
        matrices N(0, init_std).
        """
        own = {
            f"{module}.{name}": std
            for module, part in self.named_modules()
            if (std := getattr(part, "init_std", None)) is not None
            for name, _ in part.named_parameters(recurse=False)
        }
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
                continue
            std = 0.02 / math.sqrt(2 * self.shape.n_layers) if name.endswith(scaled) else 0.02
            std = own.get(name, std)
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            with torch.no_grad():
                parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))

    @property
    def attention_layers(self) -> list[Attention]:
        """The attention of each layer."""
        return [block.attention for block in self.blocks.children() if isinstance(block, Block)]


class PairRefused(ValueError):
    """An attention has no use for a position scheme."""


def check_hooks(position: Position, layers: list[Attention]) -> None:
    """Raise PairRefused for a scheme with a hook that none of its layers has a use for."""
    for scheme in dict.fromkeys(position.of_layer(i) for i in range(len(layers))):
        its = [a for i, a in enumerate(layers) if position.of_layer(i) is scheme]
        heeded = frozenset[str]().union(*(attention.heeds for attention in its))
        if unused := sorted(scheme.hooks - heeded):
            kinds = " and ".join(dict.fromkeys(type(attention).__name__ for attention in its))
            raise PairRefused(
                f"{type(scheme).__name__} acts through `{unused[0]}`, which {kinds} has no use for; "
                f"schemes that act through {' or '.join(sorted(heeded)) or 'nothing'} alone work, "
                "and pos=none"
            )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is enabled, else that of x."""
    kind = x.device.type
    within = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if within else x.dtype


def derive_seed(*parts: object) -> int:
    """A seed of 63 bits from all parts, as (seed, name) or (seed, step), the same on every machine.

    torch's CPU generator uses its last 32 bits.
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
