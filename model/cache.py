"""What decoding keeps of the tokens already read."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, room for `capacity` tokens, allocated at the first append.

    A mechanism stores what it needs, and nothing wider: (B, Hkv, T, Dh) tensors for grouped heads.
    """

    def __init__(self, n_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.slots: list[tuple[Tensor, ...]] = [()] * n_layers
        self.lengths = [0] * n_layers

    def __len__(self) -> int:
        """Tokens held by every layer: the position of the next one."""
        return min(self.lengths)

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Store tensors (B, *, T, *) of T new tokens; return views of all so far (B, *, S, *).

        Raises ValueError if they do not fit.
        """
        start, end = self.lengths[layer], self.lengths[layer] + new[0].size(2)
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, not {end}")
        if not self.slots[layer]:
            self.slots[layer] = tuple(
                torch.empty(*x.shape[:2], self.capacity, x.size(3), dtype=x.dtype, device=x.device)
                for x in new
            )
        for slot, x in zip(self.slots[layer], new, strict=True):
            slot[:, :, start:end] = x
        self.lengths[layer] = end
        return tuple(slot[:, :, :end] for slot in self.slots[layer])

    @property
    def nbytes(self) -> int:
        """Bytes that the tokens held so far take, over all layers and sequences."""
        return sum(
            slot[:, :, :length].numel() * slot.element_size()
            for slots, length in zip(self.slots, self.lengths, strict=True)
            for slot in slots
        )
