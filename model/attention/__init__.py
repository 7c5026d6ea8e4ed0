"""Attention mechanisms, one file each.

A mechanism is a class built as `Mechanism(shape, layer, *, <its own choices>)` that offers

    forward(x, pos, rotate, bias, cache=None) -> x       x (B, T, D), pos (T,)
    cache_elements: int                                  numbers it caches per token
    n_kv_heads: int                                      key/value heads it keeps
    score_flops(length, causal) -> float                 FLOPs of scores and values, forward, for
                                                         one token of a sequence of this length
    kernel(device, dtype, length, biased) -> str         which kernel `attend` takes for it

`rotate` and `bias` are the hooks of the position scheme. The last projection is called `out`:
the scaled initialisation finds it by that name.
"""
