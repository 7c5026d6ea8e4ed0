"""Autoregressive generation.

Shapes: B samples, T tokens so far, V vocab_size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.cache import KVCache
from model.init import derive_seed
from model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Sampling of the next token from logits. Raises ValueError for impossible parameters."""

    temperature: float = 1.0  # 0: the most likely token
    top_k: int | None = None  # from the k most likely tokens; None: from all
    top_p: float | None = None  # from the fewest most likely tokens with this much probability
    repetition_penalty: float = 1.0  # above 1 penalises tokens already in the text

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
        """Next tokens (B,) from logits (B, V) after text (B, T), with a generator for each sample."""
        logits = self.apply_repetition_penalty(logits, text)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        weights = self.filter_top_k_top_p(logits / self.temperature).softmax(dim=-1)
        rows = zip(weights, generators, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in rows])

    def apply_repetition_penalty(self, logits: Tensor, text: Tensor) -> Tensor:
        """Logits of tokens already in the text, divided by the penalty; multiplied where negative.

        Keskar et al. 2019, section 4.1, https://arxiv.org/abs/1909.05858.
        """
        penalty = self.repetition_penalty
        if penalty == 1:
            return logits
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, text, True)
        less = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(seen, less, logits)

    def filter_top_k_top_p(self, logits: Tensor) -> Tensor:
        """Logits with -inf for tokens outside top-k, then top-p (Holtzman et al. 2019)."""
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
    max_new_tokens: int,
    *,
    sampler: Sampler,
    seed: int,
    num_samples: int = 1,
    context_length: int | None = None,
    use_cache: bool = True,
    eos_id: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of each of B samples that continue a prompt; None after a sample's end.

    A sample ends with `eos_id`, which is still yielded; generation stops when all have ended. Sample
    b draws from (seed, b), whatever B is. The model sees at most `context_length` tokens, max_len by
    default: when they are full, generation continues from the last half of them, so that any
    position scheme can generate without end. Without a cache, as with latents always, all of them are read for
    each token.
    Raises ValueError for an empty prompt, or a context that the positions do not reach.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    context = context_length or model.shape.max_len
    if model.position.max_len is not None and context > model.position.max_len:
        raise ValueError(
            f"context={context} exceeds max_len={model.position.max_len} of the positions"
        )
    seeds = [derive_seed(seed, sample) for sample in range(num_samples)]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    device, use_cache = model.embed.weight.device, use_cache and not model.has_latents

    def new_cache() -> KVCache | None:
        return model.new_cache(context) if use_cache else None

    text = torch.tensor([prompt] * num_samples, device=device)  # (B, T)
    start, cache = max(0, len(prompt) - context), new_cache()
    unfinished = [True] * num_samples
    for _ in range(max_new_tokens):
        if text.size(1) - start > context:
            start = text.size(1) - max(1, context // 2)
            cache = new_cache()
        read = 0 if cache is None else len(cache)
        x = model.hidden(text[:, start + read :], cache)[:, -1:]  # (B, 1, D)
        logits = model.head(x)[:, 0].float().cpu()  # (B, V)
        new = sampler(logits, text.cpu(), generators)
        text = torch.cat((text, new[:, None].to(device)), dim=1)
        tokens = list(zip(new.tolist(), unfinished, strict=True))
        yield [token if going else None for token, going in tokens]
        unfinished = [going and token != eos_id for token, going in tokens]
        if not any(unfinished):
            return
