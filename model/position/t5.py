"""The relative position bias of T5."""

import math

import torch
from torch import Tensor, nn

from model.position.base import Position
from model.shape import Shape


class T5(Position):
    """Adds a learned bias per head and bucket of distances to the scores, shared by all layers.

    Half of the buckets hold one distance each, the other half ranges that grow geometrically up to
    `max_distance`; the last bucket holds all larger distances. Raffel et al. 2019, section 2.1,
    https://arxiv.org/abs/1910.10683, in its causal form. Our scores are scaled by 1 / sqrt(Dh), T5's
    are not. Raises ValueError for fewer than 2 buckets, or too short a distance for them.
    """

    by_distance = True

    def __init__(self, shape: Shape, *, n_buckets: int, max_distance: int) -> None:
        super().__init__(shape)
        if n_buckets < 2:
            raise ValueError(f"n_buckets={n_buckets} must be at least 2")
        if max_distance <= n_buckets // 2:
            raise ValueError(
                f"max_distance={max_distance} must be above n_buckets={n_buckets} / 2, "
                "where the buckets of one distance end"
            )
        self.n_buckets, self.max_distance = n_buckets, max_distance
        self.table = nn.Embedding(n_buckets, shape.n_heads)

    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        distance = q_pos[:, None] - k_pos  # (T, S)
        return self.table(self.bucket(distance)).permute(2, 0, 1)  # (H, T, S)

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket of each distance, int64; negative distances, of later keys, are in that of 0."""
        single = self.n_buckets // 2
        growth = math.log(self.max_distance / single)
        octaves = torch.log(distance.clamp(min=1).float() / single) / growth  # 0 to 1
        ranged = single + (octaves * (self.n_buckets - single)).long()
        found = torch.where(distance < single, distance, ranged)
        return found.clamp(0, self.n_buckets - 1)
