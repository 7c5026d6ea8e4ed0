"""Prefix tuning: trained keys and values that every query sees.

Shapes: B batch, Hkv KV heads, P tokens of the prefix, S keys, Dh head_dim.
"""

import torch
from torch import Tensor, nn

from model.transformer import Transformer
from model.tuning.base import Tuning, freeze


class KeysValues(nn.Module):
    """P trained keys and values, at the positions -P to -1; no scheme turns them."""

    def __init__(self, heads: int, tokens: int, width: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(heads, tokens, width))
        self.values = nn.Parameter(torch.empty(heads, tokens, width))

    def forward(self, k_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions (S,), keys and values (B, Hkv, S, Dh) with the prefix before them."""
        tokens = self.keys.size(1)
        pos = torch.arange(-tokens, 0, device=k_pos.device)
        keys, values = (p.to(k.dtype).expand(len(k), -1, -1, -1) for p in (self.keys, self.values))
        return torch.cat((pos, k_pos)), torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)


class Prefix(Tuning):
    """P keys and values per layer and KV head (Li and Liang 2021, https://arxiv.org/abs/2101.00190).

    Without the paper's network that makes them, which is P-tuning v2 (Liu et al. 2021,
    https://arxiv.org/abs/2110.07602). They take weight from the first step on: the model does not
    start as its parent. Raises ValueError for fewer than 1, and for an attention that has no place for
    them: they need keys and values that every query sees. So does a model with latents.
    """

    def __init__(self, *, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"tune.tokens={tokens} must be at least 1")
        self.tokens = tokens

    def apply(self, model: Transformer) -> None:
        if model.has_latents:
            raise ValueError(
                "tune=prefix is for models whose layers read the text; latents and bottlenecks cross to it"
            )
        freeze(model)
        for layer in model.attention_layers:
            if not layer.takes_prefix or layer.n_kv_heads is None:
                raise ValueError(
                    f"tune=prefix adds keys and values that every query sees, and "
                    f"{type(layer).__name__} has no place for them; mha, gqa, mqa, gated and others do"
                )
            layer.prefix = KeysValues(layer.n_kv_heads, self.tokens, layer.head_dim)
