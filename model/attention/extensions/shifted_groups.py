"""Attention in groups of neighbours, those of half of the heads shifted by half a group.

Shapes: B batch, T queries, S keys, H query heads, Hkv KV heads, Dh head_dim, G tokens of a group.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.attention.grouped import GQA
from model.ops.attention import Bias
from model.shape import Shape


class ShiftedGroups(GQA):
    """Grouped-query attention in which a token sees those before it in its group of G tokens.

    Half of the heads have groups that begin at multiples of G, the others G / 2 later, so that
    neighbouring groups exchange what they know: the shifted sparse attention of LongLoRA (Chen et al.
    2023, https://arxiv.org/abs/2309.12307), for training at a longer context with `init_from`; the
    tensors are those of `gqa`, which goes on from it with full attention. Unlike there, the first and
    the last half group of shifted heads are not joined: no token sees one after it. `group` None is
    a quarter of the context; with groups of twice the context it is GQA. Raises ValueError for an
    odd number of KV heads and a group below 2.
    """

    heads_see_alike = False

    def __init__(
        self,
        shape: Shape,
        layer: int,
        *,
        group: int | None,
        n_kv_heads: int | None,
        qk_norm: bool,
    ) -> None:
        super().__init__(shape, layer, n_kv_heads=n_kv_heads, qk_norm=qk_norm)
        self.group = max(2, shape.max_len // 4) if group is None else group
        if self.group < 2:
            raise ValueError(
                f"group={group} must be at least 2, or null for a quarter of the context"
            )
        if self.n_kv_heads % 2:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} must be even: half of them are shifted")

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Bias
    ) -> Tensor:
        attend, halves = super().attend, []
        parts = zip(q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1), (0, 1), strict=True)
        for q_half, k_half, v_half, half in parts:
            own = half_of(bias, half)
            if q.size(2) == k.size(2):  # no cache: group by group, without a mask
                sizes = self.sizes(q.size(2), half)
                blocks = zip(
                    *(x.split(sizes, 2) for x in (q_half, k_half, v_half)),
                    *(pos.split(sizes) for pos in (q_pos, k_pos)),
                    strict=True,
                )
                groups = [attend(a, b, c, i, j, own) for a, b, c, i, j in blocks]
                halves.append(torch.cat(groups, dim=2))
            else:
                halves.append(attend(q_half, k_half, v_half, q_pos, k_pos, self.masked(own, half)))
        return torch.cat(halves, dim=1)

    def sizes(self, length: int, half: int) -> list[int]:
        """Tokens of each group of a text, for the heads that are shifted (half 1) or not (0)."""
        first = self.group - half * (self.group // 2)
        starts = [0, *range(min(first, length), length, self.group)]
        return [
            end - start
            for start, end in zip(starts, [*starts[1:], length], strict=True)
            if end > start
        ]

    def masked(self, bias: Bias, half: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The bias, and -inf for keys of other groups."""

        def within(q_pos: Tensor, k_pos: Tensor) -> Tensor:
            shift = half * (self.group // 2)
            mine, theirs = ((pos + shift) // self.group for pos in (q_pos, k_pos))
            mask = torch.zeros(len(q_pos), len(k_pos), device=q_pos.device)
            mask.masked_fill_(mine[:, None] != theirs, -math.inf)
            scheme = bias(q_pos, k_pos)
            return mask if scheme is None else scheme + mask

        return within

    def within(self, bias: Bias) -> Bias:
        """The bias, and -inf for keys of other groups: (H, T, S)."""

        def both(q_pos: Tensor, k_pos: Tensor) -> Tensor:
            halves = [self.masked(half_of(bias, half), half)(q_pos, k_pos) for half in (0, 1)]
            heads = self.n_heads // 2
            return torch.cat([h.expand(heads, -1, -1) for h in halves])

        return both

    # Cost

    def kernel(self, device: str, dtype: torch.dtype, length: int, biased: bool) -> str:
        return super().kernel(device, dtype, min(length, self.group), biased)

    def score_flops(self, length: int, causal: bool) -> float:
        """Pairs within groups, a mean over both halves of the heads."""
        pairs = sum(n * n for half in (0, 1) for n in self.sizes(length, half)) / 2
        return self.pair_flops * pairs / length * (0.5 if causal else 1.0)


def half_of(bias: Bias, half: int) -> Bias:
    """The bias of the first half of the heads (0) or of the second (1)."""

    def own(q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        scheme = bias(q_pos, k_pos)
        return scheme if scheme is None or scheme.dim() < 3 else scheme.chunk(2)[half]

    return own
