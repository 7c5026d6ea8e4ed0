"""Text from a model, one token at a time.

Shapes: B texts at once, T tokens so far, V vocab_size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.transformer import Transformer, derive_seed


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How a token is chosen from logits. Raises ValueError for impossible choices."""

    temperature: float = 1.0  # 0 takes the likeliest
    top_k: int | None = None  # of so many likeliest
    top_p: float | None = None  # of the fewest likeliest that hold so much of the probability
    repetition_penalty: float = 1.0  # above 1: tokens of the text so far become less likely

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or null for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1, or null for all")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0")

    def __call__(
        self, logits: Tensor, text: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Next tokens (B,) by logits (B, V), given the text (B, T) so far; a generator for each."""
        logits = self.penalised(logits, text)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        weights = self.kept(logits / self.temperature).softmax(dim=-1)
        rows = zip(weights, generators, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in rows])

    def penalised(self, logits: Tensor, text: Tensor) -> Tensor:
        """Logits of tokens that the text has, divided by the penalty; multiplied where negative.

        Keskar et al. 2019, section 4.1, https://arxiv.org/abs/1909.05858.
        """
        penalty = self.repetition_penalty
        if penalty == 1:
            return logits
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, text, True)
        less = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(seen, less, logits)

    def kept(self, logits: Tensor) -> Tensor:
        """Logits with -inf for what top-k, then top-p (Holtzman et al. 2019) leave out."""
        if self.top_k is not None and self.top_k < logits.size(-1):
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            weights = ordered.softmax(dim=-1)
            late = weights.cumsum(dim=-1) - weights >= self.top_p  # enough before it
            logits = logits.masked_fill(late.scatter(1, order, late), -torch.inf)
        return logits


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Sequence[int],
    n: int,
    *,
    draw: Draw,
    seed: int,
    rows: int = 1,
    context: int | None = None,
    cached: bool = True,
    end: int | None = None,
) -> Iterator[list[int | None]]:
    """Up to n times the next token of each of B texts that continue a prompt; None after its end.

    A text ends with the token `end`, which is still given; when all have, nothing more is. Text b
    draws from (seed, b), whatever B is. The model looks back on `context` tokens, the length of its
    training by default: when they are full, it goes on from the last half of them, so that any
    position scheme may write for ever. Without a cache all of them are read again for each token.
    Raises ValueError for an empty prompt, or a context that the positions do not reach.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    room = context or model.shape.max_len
    if model.position.max_len is not None and room > model.position.max_len:
        raise ValueError(f"context={room}: its positions end at {model.position.max_len} tokens")
    generators = [torch.Generator().manual_seed(derive_seed(seed, row)) for row in range(rows)]
    device = model.embed.weight.device
    text = torch.tensor([prompt] * rows, device=device)  # (B, T)
    start, cache = max(0, len(prompt) - room), model.new_cache(room)
    going = [True] * rows
    for _ in range(n):
        if text.size(1) - start > room:
            start = text.size(1) - max(1, room // 2)
            cache = model.new_cache(room)
        unread = text[:, start + len(cache) :]
        x = model.hidden(unread, cache if cached else None)[:, -1]  # (B, D)
        logits = model.head(x).float().cpu()  # (B, V)
        new = draw(logits, text.cpu(), generators)
        text = torch.cat((text, new[:, None].to(device)), dim=1)
        yield [token if on else None for token, on in zip(new.tolist(), going, strict=True)]
        going = [on and token != end for token, on in zip(new.tolist(), going, strict=True)]
        if not any(going):
            return
