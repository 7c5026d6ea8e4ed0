"""Costs of a model, counted from its config: nothing is allocated and nothing is trained."""

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.cost import count_parameters, flops_per_token
from model.loss import next_token_loss
from model.transformer import Transformer
from train.config.schema import Config
from train.measure.device import Device
from train.setup.build import build_model, build_optimizer


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Counts for one variant; decoding counts are for one sequence after `length` tokens."""

    length: int  # the model's max_len
    params: int
    params_non_embedding: int
    flops_per_token: float  # training, forward and backward
    decode_flops: float  # the whole model, next token, with the KV cache
    attention_flops: float  # its part in the attention layers
    attention_flops_uncached: float  # the same, recomputing keys and values of all tokens
    cache_elements: int  # in the KV cache
    cache_bytes: int  # in the run's compute dtype
    caches: bool  # False: no KV cache, and what is said of decoding does not hold


def cost(config: Config, vocab_size: int, device: Device) -> Cost:
    """Count a config's model. Every attention layer states its own part, see model/attention/base.py."""
    with torch.device("meta"):
        model = build_model(config, vocab_size)
    length = model.shape.max_len
    params, inner = count_parameters(model)
    attention, uncached, elements = attention_costs(model, length)
    return Cost(
        length=length,
        params=params,
        params_non_embedding=inner,
        flops_per_token=flops_per_token(model, length),
        decode_flops=attention + 2 * weights_outside_attention(model),
        attention_flops=attention,
        attention_flops_uncached=uncached,
        cache_elements=elements,
        cache_bytes=sum(m.cache_bytes(length, device.dtype) for m in model.attention_layers),
        caches=not model.has_latents,
    )


@dataclass(frozen=True)
class DecodingCost:
    """The cost of the next token after `length` others, in all attention layers."""

    length: int
    multiply_adds: float
    multiply_adds_uncached: float
    cache_elements: int

    @property
    def saved(self) -> float:
        """The fraction of multiply-adds that the cache saves."""
        return 1 - self.multiply_adds / self.multiply_adds_uncached


def attention_costs(model: Transformer, length: int) -> tuple[float, float, int]:
    """All attention layers after `length` tokens: FLOPs of the next one with and without the KV
    cache, and the elements of the cache."""
    layers = model.attention_layers
    return (
        sum(layer.decode_flops(length) for layer in layers),
        sum(layer.decode_flops(length, cached=False) for layer in layers),
        sum(layer.cache_elements(length) for layer in layers),
    )


def decoding_costs(config: Config, points: int = 32) -> list[DecodingCost]:
    """The cost of decoding at lengths up to a model's context."""
    with torch.device("meta"):
        model = build_model(config, vocab_size=1)
    if model.has_latents:
        model.new_cache(model.shape.max_len)
    end, costs = model.shape.max_len, []
    for length in sorted({max(1, round(i * end / points)) for i in range(points + 1)}):
        flops, uncached, elements = attention_costs(model, length)
        costs.append(DecodingCost(length, flops / 2, uncached / 2, elements))
    return costs


def weights_outside_attention(model: Transformer) -> int:
    """Weights of all linear layers outside attention that every token is multiplied with."""
    apart = {id(m) for layer in model.attention_layers for m in layer.modules()}
    apart |= {id(m) for m in model.prompt.modules()} if model.prompt else set()
    linear = (m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in apart)
    return sum(m.weight.numel() for m in linear)


def training_bytes(config: Config, vocab_size: int, device: Device) -> dict[str, int]:
    """Peak tensor bytes of a training step, in total and by kind.

    The step runs on tensors without storage (`FakeTensorMode`), so all that a variant allocates is
    counted. Not counted: scratch memory inside fused kernels and in Muon's step.
    """
    from compare.cost.peak_memory import PeakTracker  # takes a second to import

    rows = -(-config["batch_size"] // config["accumulate"])  # of the largest micro-batch
    with FakeTensorMode(), torch.device(device.name):
        model = build_model(config, vocab_size).train()
        optimizer, _ = build_optimizer(config, model, config["steps"])
        tokens = torch.zeros(rows, model.shape.max_len, dtype=torch.int64)
        if config["accumulate"] > 1:  # later micro-batches add to existing gradients
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        tracker = PeakTracker()
        tracker.track_external(model)
        with tracker:
            with device.autocast():
                loss = next_token_loss(model, tokens, tokens)
            loss.backward()
        optimizer.step(0.0)
    peaks = tracker.get_tracker_snapshot("peak")
    (peak,) = (peak for where, peak in peaks.items() if where.type == device.name)
    kinds: dict[str, int] = {getattr(kind, "value", kind): size for kind, size in peak.items()}
    return {
        "total": kinds["Total"] + optimizer.nbytes,
        "parameters": kinds["Parameter"],
        "optimizer": optimizer.nbytes,
        "activations": kinds["Activation"] + kinds["Temp"],
    }
