"""The KV cache of autoregressive decoding.

Shapes: B batch, T new tokens, S tokens returned.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """What one layer keeps of the tokens it has read.

    `buffers` hold tensors (B, *, T, *) by token, allocated at the first append. `state` holds tensors
    whose size does not grow with the text: a mechanism reads and replaces them itself. A layer that
    keeps its state alone uses this class as it is, and counts its tokens with `advance`.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity  # tokens that may be read
        self.size = capacity  # tokens that the buffers hold
        self.length = 0  # tokens read so far
        self.buffers: tuple[Tensor, ...] = ()
        self.state: tuple[Tensor, ...] = ()

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store T new tokens: the positions (S,) of all that a query may need, then their tensors."""
        raise NotImplementedError

    def advance(self, tokens: int) -> tuple[int, int]:
        """The positions, from and to, of new tokens. Raises ValueError past the capacity."""
        start, self.length = self.length, self.length + tokens
        if self.length > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, not {self.length}")
        return start, self.length

    def allocate(self, *new: Tensor) -> None:
        """Make buffers for tensors like these, unless they exist."""
        if not self.buffers:
            self.buffers = tuple(x.new_empty(*x.shape[:2], self.size, x.size(3)) for x in new)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held so far, over all sequences, and of the state."""
        held = sum(buffer[:, :, : self.length].nbytes for buffer in self.buffers)
        return held + sum(x.nbytes for x in self.state)


class FullCache(LayerCache):
    """A cache of all tokens, in order."""

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        start, end = self.advance(new[0].size(2))
        self.allocate(*new)
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[:, :, start:end] = x
        return torch.arange(end, device=new[0].device), *(b[:, :, :end] for b in self.buffers)


class RingCache(FullCache):
    """A cache of the last `window` tokens: the token at position p is in slot p % size."""

    def __init__(self, capacity: int, window: int) -> None:
        super().__init__(capacity)
        self.size = min(window, capacity)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """As a full cache, until the ring is full.

        Then one token replaces the oldest, and the ring is returned as it is, out of order. Several
        are returned in order, after the ring as it was: the first ones need what the last replace.
        """
        if self.length + new[0].size(2) <= self.size:
            return super().append(*new)
        start, end = self.advance(new[0].size(2))
        self.allocate(*new)
        device = new[0].device
        if end == start + 1:
            for buffer, x in zip(self.buffers, new, strict=True):
                buffer[:, :, start % self.size] = x[:, :, 0]
            slots = torch.arange(self.size, device=device)
            return start - (start - slots) % self.size, *self.buffers  # the newest p of each slot
        first = max(0, start - self.size)
        held = torch.arange(first, start, device=device) % self.size
        seen = [
            torch.cat((buffer[:, :, held], x), dim=2)
            for buffer, x in zip(self.buffers, new, strict=True)
        ]
        kept = torch.arange(max(start, end - self.size), end, device=device)
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[:, :, kept % self.size] = x[:, :, kept - start]
        return torch.arange(first, end, device=device), *seen


class KVCache:
    """One cache per layer; `model.new_cache(capacity)` makes it."""

    def __init__(self, layers: Sequence[LayerCache], prompt: int = 0) -> None:
        self.layers = layers
        self.prompt = prompt  # vectors that the model puts before a text

    @property
    def position(self) -> int:
        """The position of the next token: all that every layer has read."""
        return min(layer.length for layer in self.layers)

    def __len__(self) -> int:
        """Tokens of the text that every layer has read."""
        return max(0, self.position - self.prompt)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)
