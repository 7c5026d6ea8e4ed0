"""What decoding keeps of the tokens already read."""

import torch
from torch import Tensor


class KVCache:
    """What every layer keeps of up to `capacity` tokens, allocated at the first append.

    A mechanism stores what it needs, and nothing wider: (B, Hkv, T, Dh) tensors for grouped heads.
    A layer that looks at the last tokens alone keeps those, in a ring.
    """

    def __init__(self, n_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.slots: list[tuple[Tensor, ...]] = [()] * n_layers
        self.lengths = [0] * n_layers  # tokens read, of which a ring holds the last

    def __len__(self) -> int:
        """Tokens that every layer has read: the position of the next one."""
        return min(self.lengths)

    def append(self, layer: int, *new: Tensor, keep: int | None = None) -> tuple[Tensor, ...]:
        """Store tensors (B, *, T, *) of T new tokens, in a ring of the last `keep` if that is given.

        Returns the positions (S,) of the tokens held before and the new ones, then their tensors
        (B, *, S, *): in order, but for one token that enters a full ring. There it takes the place
        of the oldest, and the whole ring is returned as it lies. Raises ValueError past the capacity.
        """
        T, device = new[0].size(2), new[0].device
        start, end = self.lengths[layer], self.lengths[layer] + T
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, not {end}")
        room = self.capacity if keep is None else min(keep, self.capacity)
        if not self.slots[layer]:
            self.slots[layer] = tuple(
                torch.empty(*x.shape[:2], room, x.size(3), dtype=x.dtype, device=device)
                for x in new
            )
        slots, self.lengths[layer] = self.slots[layer], end
        if end <= room:
            for slot, x in zip(slots, new, strict=True):
                slot[:, :, start:end] = x
            return torch.arange(end, device=device), *(slot[:, :, :end] for slot in slots)
        if T == 1:
            for slot, x in zip(slots, new, strict=True):
                slot[:, :, start % room] = x[:, :, 0]
            place = torch.arange(room, device=device)
            return start - (start - place) % room, *slots
        held = torch.arange(max(0, start - room), start, device=device)
        seen = tuple(
            torch.cat((slot[:, :, held % room], x), 2) for slot, x in zip(slots, new, strict=True)
        )
        kept = torch.arange(max(start, end - room), end, device=device)
        for slot, x in zip(slots, new, strict=True):
            slot[:, :, kept % room] = x[:, :, kept - start]
        return torch.arange(len(held) + T, device=device) + end - len(held) - T, *seen

    @property
    def nbytes(self) -> int:
        """Bytes that the tokens held so far take, over all layers and sequences."""
        return sum(
            slot[:, :, :length].numel() * slot.element_size()
            for slots, length in zip(self.slots, self.lengths, strict=True)
            for slot in slots
        )
