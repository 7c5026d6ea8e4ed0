"""Text from a model, one token at a time, with a cache."""

import torch
from torch import Tensor

from model.cache import KVCache
from model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: list[int],
    n: int,
    *,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
) -> list[int]:
    """Up to n tokens that continue a prompt, sampled with a CPU generator.

    Temperature 0 takes the likeliest token. The context is the training length: when it is full, it
    starts again from its second half, so that any position scheme may write for ever.
    Raises ValueError for an empty prompt or impossible choices.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or null for all tokens")
    room = model.shape.max_len
    device = model.embed.weight.device
    tokens = list(prompt)
    unread = tokens[-room:]
    cache = KVCache(model.shape.n_layers, room)
    for _ in range(n):
        if len(cache) + len(unread) > room:
            cache = KVCache(model.shape.n_layers, room)
            unread = tokens[-max(1, room // 2) :]
        logits = model(torch.tensor([unread], device=device), cache)[0, -1].float().cpu()  # (V,)
        unread = [pick(logits, temperature, top_k, generator)]
        tokens += unread
    return tokens[len(prompt) :]


def pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    weights = (logits / temperature).softmax(dim=-1)
    return int(torch.multinomial(weights, 1, generator=generator))
