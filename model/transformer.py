"""The decoder-only Transformer.

Shapes: B batch, T tokens, D dim, V vocab_size.
"""

import hashlib
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention.base import Mechanism
from model.cache import KVCache
from model.ops.dropout import dropout
from model.position.base import Position
from model.shape import Shape


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)): pre-norm, as in GPT-2."""

    def __init__(
        self,
        shape: Shape,
        attention: Mechanism,
        feedforward: nn.Module,
        norm: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.attention_norm = norm(shape.dim, shape.bias)
        self.attention = attention
        self.feedforward_norm = norm(shape.dim, shape.bias)
        self.feedforward = feedforward

    def forward(self, x: Tensor, pos: Tensor, position: Position, cache: KVCache | None) -> Tensor:
        y = self.attention(self.attention_norm(x), pos, position.rotate, position.bias, cache)
        x = x + dropout(y, self.dropout, self.training)
        y = self.feedforward(self.feedforward_norm(x))
        return x + dropout(y, self.dropout, self.training)


class Transformer(nn.Module):
    """Next-token logits from tokens. Its parts are given as factories, so it knows no variant.

    `attention(shape, layer)`, `position(shape)`, `feedforward(shape)` and `norm(dim, bias)` build
    the parts. Parameters stay uninitialised until `init`.
    """

    #: Whether training computes each block again in its backward pass, rather than keep it all.
    recompute = False

    def __init__(
        self,
        shape: Shape,
        *,
        attention: Callable[..., Mechanism],
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

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        *,
        last: bool = False,
        head: bool = True,
    ) -> Tensor:
        """Logits of the token after each one: (B, T) -> (B, T, V). With a cache, T are the new ones.

        With `last`, those after the last token alone: (B, 1, V). Without `head`, what the head
        reads: (B, T, D).
        Raises ValueError past the end of a position scheme that has one.
        """
        start = 0 if cache is None else len(cache)
        end = start + tokens.size(1)
        if self.position.max_len is not None and end > self.position.max_len:
            raise ValueError(
                f"{type(self.position).__name__.lower()} positions end at {self.position.max_len}; "
                f"{end} tokens are too many"
            )
        pos = torch.arange(start, end, device=tokens.device)
        x = self.position.embed(self.embed(tokens), pos)  # (B, T, D)
        x = dropout(x.to(working_dtype(x)), self.shape.dropout, self.training)
        again = self.recompute and cache is None and torch.is_grad_enabled()
        for block in self.blocks:
            inputs = (x, pos, self.position, cache)
            x = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
        x = self.norm(x[:, -1:] if last else x)
        return self.head(x) if head else x

    def init(self, seed: int, *, scaled: str = "out.weight") -> None:
        """Draw every parameter from a CPU generator seeded by (seed, its name).

        So two variants that share a tensor, by name and shape, share its start. Matrices N(0, 0.02);
        those whose name ends in `scaled`, the last of a residual branch, N(0, 0.02 / sqrt(2 n_layers))
        (GPT-2); biases 0, norms 1.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
                continue
            std = 0.02 / math.sqrt(2 * self.shape.n_layers) if name.endswith(scaled) else 0.02
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            with torch.no_grad():
                parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))

    @property
    def mechanisms(self) -> list[Mechanism]:
        """The attention of each layer."""
        return [cast(Block, block).attention for block in self.blocks]

    def flops_per_token(self, length: int, *, causal: bool = True) -> float:
        """FLOPs of training on one token of a sequence of this length, forward and backward.

        2 for each weight of a matrix product plus each mechanism's scores, times 3: a backward pass
        is two products for each one of the forward. Embedding look-ups and elementwise work are not
        counted; causal scores count half of the full square.
        """
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        scores = sum(mechanism.score_flops(length, causal) for mechanism in self.mechanisms)
        return 3 * (2 * weights + scores)

    def count_parameters(self) -> tuple[int, int]:
        """(all parameters, those outside token and position tables and a tied head)."""
        total = sum(p.numel() for p in self.parameters())
        tables = self.embed.weight.numel() + sum(p.numel() for p in self.position.parameters())
        return total, total - tables

    def kernels(self, device: str, dtype: torch.dtype, length: int) -> list[str]:
        """The attention kernel of each layer in training at this length."""
        pos = torch.arange(1, device=self.embed.weight.device)
        biased = self.position.bias(pos, pos) is not None
        return [m.kernel(device, dtype, length, biased) for m in self.mechanisms]


def working_dtype(x: Tensor) -> torch.dtype:
    """What matrix products compute in: autocast's dtype within it, else that of x."""
    kind = x.device.type
    within = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if within else x.dtype


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts, (seed, name) or (seed, step), and is the same everywhere.

    It has 63 bits; torch's CPU generator heeds the last 32 of them.
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
