"""The decoder-only Transformer.

Shapes: B batch, T tokens, D dim, V vocab_size.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention.base import Attention, check_hooks
from model.attention.cache import KVCache, LayerCache
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
    the parts. `model.init.init_weights` draws the parameters.
    """

    #: Recompute each block in the backward pass of training, instead of keeping its activations.
    activation_checkpointing = False
    #: Names of the parameters that finetuning added: no other model has weights for them.
    added: frozenset[str] = frozenset()
    #: True if some blocks run on latents instead of all tokens: no KV cache, no attention to read.
    has_latents = False

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
        self.prompt: nn.Module | None = None  # vectors before a text, see model/tuning/prompt.py
        self.prompt_tokens = 0  # of them
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
        x, positions = self.read(tokens, 0 if cache is None else cache.position)
        x = self.through(range(len(self.blocks)), x, positions, cache)
        return self.norm(x[:, x.size(1) - tokens.size(1) :])  # without the prompt

    def read(self, tokens: Tensor, start: int) -> tuple[Tensor, Positions]:
        """The input of the first block, and its positions: tokens (B, T) from `start` on, after the
        prompt if there is one."""
        x = self.embed(tokens)  # (B, T, D)
        if self.prompt is not None and start == 0:
            x = torch.cat((self.prompt().to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        end = start + x.size(1)
        if self.position.max_len is not None and end > self.position.max_len:
            raise ValueError(
                f"a sequence of {end} tokens exceeds max_len={self.position.max_len} of "
                f"{type(self.position).__name__.lower()} positions"
            )
        positions = self.position.at(torch.arange(start, end, device=tokens.device))
        x = self.position.embed(x, positions.pos)
        # Under autocast the residual stream is bfloat16 too; nanoGPT and others keep it in float32.
        return dropout(x.to(compute_dtype(x)), self.shape.dropout, self.training), positions

    def through(
        self, layers: Iterable[int], x: Tensor, positions: Positions, cache: KVCache | None = None
    ) -> Tensor:
        """x (B, T, D) after these blocks, in order."""
        for layer in layers:
            block, its = self.blocks[layer], positions.of_layer(layer)
            x = (
                self.recomputed(block, x, its, None)
                if cache is None
                else block(x, its, cache.layers[layer])
            )
        return x

    def recomputed(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`block(*inputs)`, computed again in the backward pass where activations are not kept."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def with_loss(self, loss: Callable[..., Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
        """`loss(model, tokens, targets)`: with the model one program, where that is compiled."""
        return loss(self, tokens, targets)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`nn.Module.compile`, for `with_loss` and `hidden` too: training calls one of them, validation `hidden`."""
        super().compile(*args, **kwargs)
        for name in ("with_loss", "hidden"):
            setattr(self, name, torch.compile(getattr(self, name), *args, **kwargs))

    def rows(self, layer: int, length: int) -> tuple[int, int]:
        """Queries and keys of a layer's attention in a text of this length."""
        return length, length

    def new_cache(self, capacity: int) -> KVCache:
        """An empty KV cache for up to `capacity` tokens of text."""
        capacity += self.prompt_tokens
        layers = [layer.new_cache(capacity) for layer in self.attention_layers]
        return KVCache(layers, self.prompt_tokens)

    @property
    def attention_layers(self) -> list[Attention]:
        """The attention of each layer."""
        return [block.attention for block in self.blocks.children() if isinstance(block, Block)]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is enabled, else that of x."""
    kind = x.device.type
    within = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if within else x.dtype
