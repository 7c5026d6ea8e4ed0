"""Multi-head latent attention.

Shapes: B batch, T new tokens, S tokens so far, D dim, H heads, Dh head_dim, C latent_dim, R rope_dim.
"""

import math

import torch
from torch import Tensor, nn

from model.attention.base import Attention, weight_of
from model.attention.cache import LayerCache
from model.ops.attention import attention_weights
from model.ops.norm import RMSNorm
from model.position.base import Positions
from model.shape import Shape


class MLA(Attention):
    """Multi-head latent attention: keys and values of all heads from one latent of C numbers a token.

    DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1, queries uncompressed as in its Lite
    model. Each head's query and key concatenate Dh position-free and R rotary channels; the rotary
    key is shared by all heads. The cache holds the latent and the rotary key. Decoding absorbs the
    up-projections into query and output, so cached latents are attended to directly.
    `latent_dim` None is 4 Dh, `rope_dim` None the even number below Dh / 2: the paper's choice.
    Raises ValueError for a latent below 1, or an odd or empty rotary key.
    """

    def __init__(
        self, shape: Shape, layer: int, *, latent_dim: int | None, rope_dim: int | None
    ) -> None:
        super().__init__(shape, layer)
        self.latent_dim = 4 * shape.head_dim if latent_dim is None else latent_dim
        self.rope_dim = max(2, shape.head_dim // 4 * 2) if rope_dim is None else rope_dim
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim={latent_dim} must be at least 1, or null for 4 head_dim")
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise ValueError(
                f"rope_dim={rope_dim} must be even and at least 2, or null for head_dim / 2"
            )
        self.q = nn.Linear(
            shape.dim, shape.n_heads * (shape.head_dim + self.rope_dim), bias=shape.bias
        )
        # kv_down, kv_norm and kv_up: wkv_a, kv_norm and wkv_b of DeepSeek's code
        self.down = nn.Linear(shape.dim, self.latent_dim + self.rope_dim, bias=shape.bias)
        self.norm = RMSNorm(self.latent_dim, shape.bias)
        self.up = nn.Linear(self.latent_dim, 2 * shape.dim, bias=False)  # key and value per head
        self.out = nn.Linear(shape.dim, shape.dim, bias=shape.bias)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        q, q_rope, latent_kv = self.project(x, positions)
        k_pos = positions.pos
        if cache is not None:
            k_pos, latent_kv = cache.append(latent_kv)  # (B, 1, S, C + R)
        absorb = latent_kv.size(2) > x.size(1)  # cached latents would be expanded at every step
        q, k, v = (self.absorbed if absorb else self.expanded)(q, q_rope, latent_kv)
        y = self.attend(q, k, v, positions.pos, k_pos, positions.bias)
        if absorb:
            y = y @ self.up_heads[1].mT  # (B, H, T, Dh)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)

    def project(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, Dh), their rotary part (B, H, T, R), and latent_kv (B, 1, T, C + R)."""
        q = self.q(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, T, Dh + R)
        q, q_rope = q.split((self.head_dim, self.rope_dim), dim=-1)
        latent, k_rope = self.down(x).unsqueeze(1).split((self.latent_dim, self.rope_dim), dim=-1)
        q_rope, k_rope = positions.rotate(q_rope, k_rope)
        return q, q_rope, torch.cat((self.norm(latent), k_rope), dim=-1)

    def expanded(
        self, q: Tensor, q_rope: Tensor, latent_kv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and a key and a value per head: cheaper while each latent is used once."""
        latent, k_rope = latent_kv.split((self.latent_dim, self.rope_dim), dim=-1)
        heads = self.up(latent.squeeze(1)).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k, v = heads.chunk(2, dim=-1)  # (B, H, T, Dh)
        k = torch.cat((k, k_rope.expand(-1, self.n_heads, -1, -1)), dim=-1)
        return torch.cat((q, q_rope), dim=-1), k, v

    def absorbed(
        self, q: Tensor, q_rope: Tensor, latent_kv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries to match latent_kv as the only key, and the latent as the only value.

        q . (U c) = (q U) . c: the up-projection of keys moves to the query, that of values is
        applied to the weighted latents. `attend` divides by sqrt(C + R) instead of sqrt(Dh + R).
        """
        q = torch.cat((q @ self.up_heads[0], q_rope), dim=-1)  # (B, H, T, C + R)
        scale = math.sqrt(q.size(-1) / (self.head_dim + self.rope_dim))
        return q * scale, latent_kv, latent_kv[..., : self.latent_dim]

    def weights(self, x: Tensor, positions: Positions) -> Tensor:
        q, k, _ = self.expanded(*self.project(x, positions))
        pos = positions.pos
        return attention_weights(q.float(), k.float(), pos, pos, positions.bias(pos, pos))

    @property
    def up_heads(self) -> tuple[Tensor, Tensor]:
        """The up-projections of keys and of values, each (H, Dh, C)."""
        k, v = weight_of(self.up).view(self.n_heads, 2, self.head_dim, -1).unbind(dim=1)
        return k, v

    # Cost

    @property
    def kernel_width(self) -> int:
        return self.head_dim + self.rope_dim

    def cache_elements(self, length: int) -> int:
        """One latent and one rotary key per token."""
        return (self.latent_dim + self.rope_dim) * length

    def score_flops(self, length: int, causal: bool) -> float:
        """q k^T over Dh + R channels, and weights v over Dh."""
        channels = 2 * self.head_dim + self.rope_dim
        return 2 * self.n_heads * channels * length * (0.5 if causal else 1.0)

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """All projections once (absorbed or not, a token costs the same), then scores over latents."""
        weights = sum(p.weight.numel() for p in (self.q, self.down, self.up, self.out))
        again = 0 if cached else self.down.weight.numel() * length
        channels = 2 * self.latent_dim + self.rope_dim
        return 2 * (weights + again) + 2 * self.n_heads * channels * (length + 1)
