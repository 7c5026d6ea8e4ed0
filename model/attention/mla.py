"""Multi-head latent attention.

Shapes: B batch, T new tokens, S tokens so far, D dim, H heads, Dh head_dim, C latent_dim, R rope_dim.
"""

import math

import torch
from torch import Tensor, nn

from model.attention.attend import attend, choose_kernel
from model.attention.base import Bias, Rotate
from model.cache import KVCache
from model.norm import RMSNorm
from model.shape import Shape


class MLA(nn.Module):
    """Keys and values of all heads are made from one latent of C numbers a token.

    DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1, queries uncompressed as in its Lite
    model. A head's query and key have Dh channels without position and R more that are turned; the
    turned key is one for all heads. The cache holds the latent and that key. Decoding absorbs the
    up-projections into query and output, so cached latents are attended to as they are.
    `latent_dim` None is 4 Dh, `rope_dim` None the even number below Dh / 2: the paper's choice.
    Raises ValueError for a latent below 1, or a turned key that is odd or empty.
    """

    n_kv_heads = None

    def __init__(
        self, shape: Shape, layer: int, *, latent_dim: int | None, rope_dim: int | None
    ) -> None:
        super().__init__()
        self.layer, self.dropout = layer, shape.dropout
        self.n_heads, self.head_dim = shape.n_heads, shape.head_dim
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
        self.down = nn.Linear(shape.dim, self.latent_dim + self.rope_dim, bias=shape.bias)
        self.norm = RMSNorm(self.latent_dim, shape.bias)
        self.up = nn.Linear(self.latent_dim, 2 * shape.dim, bias=False)  # a key and a value a head
        self.out = nn.Linear(shape.dim, shape.dim, bias=shape.bias)

    def forward(
        self, x: Tensor, pos: Tensor, rotate: Rotate, bias: Bias, cache: KVCache | None = None
    ) -> Tensor:
        q = self.q(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, T, Dh + R)
        q, q_turned = q.split((self.head_dim, self.rope_dim), dim=-1)
        latent, k_turned = self.down(x).unsqueeze(1).split((self.latent_dim, self.rope_dim), dim=-1)
        q_turned, k_turned = rotate(q_turned, k_turned, pos)
        kept = torch.cat((self.norm(latent), k_turned), dim=-1)  # (B, 1, T, C + R)
        k_pos = pos
        if cache is not None:
            k_pos, kept = cache.append(self.layer, kept)  # (B, 1, S, C + R)
        first = kept.size(2) == x.size(1)
        q, k, v = (self.expanded if first else self.absorbed)(q, q_turned, kept)
        y = attend(q, k, v, pos, k_pos, bias, self.dropout if self.training else 0.0)
        if not first:
            y = y @ self.up_heads[1].mT  # (B, H, T, Dh)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)

    def expanded(self, q: Tensor, q_turned: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A key and a value for every head: the cheaper form while each latent is used once."""
        latent, k_turned = kept.split((self.latent_dim, self.rope_dim), dim=-1)
        heads = self.up(latent.squeeze(1)).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k, v = heads.chunk(2, dim=-1)  # (B, H, T, Dh)
        k = torch.cat((k, k_turned.expand(-1, self.n_heads, -1, -1)), dim=-1)
        return torch.cat((q, q_turned), dim=-1), k, v

    def absorbed(self, q: Tensor, q_turned: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the cache holds as the one key, its latent as the one value; queries to match.

        q . (U c) = (q U) . c: the up-projection of keys moves to the query, that of values waits for
        the weighted latents. `attend` divides by the root of C + R where Dh + R is due.
        """
        q = torch.cat((q @ self.up_heads[0], q_turned), dim=-1)  # (B, H, T, C + R)
        scale = math.sqrt(q.size(-1) / (self.head_dim + self.rope_dim))
        return q * scale, kept, kept[..., : self.latent_dim]

    @property
    def up_heads(self) -> tuple[Tensor, Tensor]:
        """The up-projections of keys and of values, each (H, Dh, C)."""
        k, v = self.up.weight.view(self.n_heads, 2, self.head_dim, -1).unbind(dim=1)
        return k, v

    def cache_elements(self, length: int) -> int:
        """A latent and one turned key for each token."""
        return (self.latent_dim + self.rope_dim) * length

    def score_flops(self, length: int, causal: bool) -> float:
        """Of q k^T over Dh + R channels and weights v over Dh."""
        channels = 2 * self.head_dim + self.rope_dim
        return 2 * self.n_heads * channels * length * (0.5 if causal else 1.0)

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """All projections once (absorbed or not, a token costs the same), then scores over latents."""
        weights = sum(p.weight.numel() for p in (self.q, self.down, self.up, self.out))
        again = 0 if cached else self.down.weight.numel() * length
        channels = 2 * self.latent_dim + self.rope_dim
        return 2 * (weights + again) + 2 * self.n_heads * channels * (length + 1)

    def kernel(self, device: str, dtype: torch.dtype, length: int, biased: bool) -> str:
        """The kernel that `attend` takes, given the dropout on its weights."""
        return choose_kernel(device, dtype, length, biased=biased, p=self.dropout)
