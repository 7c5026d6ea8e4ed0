"""Properties of every attention with every position scheme, on any device and in any dtype.

The tests check all of them; `python -m cli.doctor` checks them on a user's machine.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from compare.cost.counts import weights_outside_attention
from model.attention.base import PairRefused
from model.cost import flops_per_token
from model.loss import next_token_loss
from model.position.base import Position
from model.transformer import Transformer
from train.config.compose import choices_of, compose
from train.config.schema import Config
from train.measure.device import Device
from train.setup.build import build_model, init_model

TINY = [
    "model.dim=32",
    "model.n_layers=3",
    "model.n_heads=4",
    "model.max_len=16",
    "data=text",
    "data.path=none",
    "data.tokenizer=char",
]
VOCAB = 17
LENGTH = 16
CPU = Device("cpu", torch.float32)


@functools.cache
def composed(*overrides: str) -> Config:
    """The config of a tiny model."""
    return compose([*TINY, *overrides])


class PropertyViolated(AssertionError):
    """A property does not hold for a variant."""


@dataclass(frozen=True)
class TinyVariant:
    """A tiny model with an attention and a position scheme, on a device, in a dtype."""

    attn: str
    pos: str
    device: Device = CPU
    overrides: tuple[str, ...] = ()  # further keys of train.py

    def config(self, *overrides: str) -> Config:
        """The config of the model; `overrides` are keys of other groups than attn and pos.

        Composing takes longer than building, so an attention and a scheme are composed once each,
        unless keys of theirs are set.
        """
        if self.overrides:
            return composed(f"attn={self.attn}", f"pos={self.pos}", *self.overrides, *overrides)
        config, pos = composed(f"attn={self.attn}", *overrides), composed(f"pos={self.pos}")
        return config | {"pos": pos["pos"], "choices": config["choices"] | {"pos": self.pos}}

    def model(self, *overrides: str, seed: int = 0, spread: float = 5.0) -> Transformer:
        """An initialised model in evaluation mode, its matrices multiplied by `spread`.

        At the usual initialisation attention is nearly uniform, which hides mistakes. Modules with a
        spread of their own, `init_std`, keep it: the matrix of a recurrence would have a spectral
        radius far above 1, where rounding errors grow from token to token.
        """
        config = self.config(*overrides)
        model = build_model(config, VOCAB)
        init_model(model, config, seed)
        own = [m.parameters(recurse=False) for m in model.modules() if hasattr(m, "init_std")]
        kept = {id(parameter) for parameters in own for parameter in parameters}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and id(parameter) not in kept:
                    parameter.mul_(spread)
        return model.to(self.device.name).eval()

    def tokens(self, *shape: int, seed: int = 0) -> Tensor:
        """Random token ids on the variant's device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(VOCAB, shape, generator=generator).to(self.device.name)

    def loss(self, model: Transformer, rows: int = 2) -> Tensor:
        """Cross-entropy of random tokens, in the variant's dtype, as in training."""
        with self.device.autocast():
            return next_token_loss(
                model, self.tokens(rows, LENGTH), self.tokens(rows, LENGTH, seed=1)
            )

    def require_close(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """Raise PropertyViolated unless logits agree: within 1e-4, or 5 % of their spread in a half dtype."""
        error = (actual.float() - expected.float()).abs().max().item()
        allowed = (
            1e-4 if self.device.dtype == torch.float32 else 0.05 * expected.float().std().item()
        )
        require(error <= allowed, f"{what}: logits differ by {error:.2g}, {allowed:.2g} allowed")


@functools.cache
def pairs() -> dict[tuple[str, str], str | None]:
    """Every attention with every position scheme by name, and the reason where one is refused."""
    refused: dict[tuple[str, str], str | None] = {}
    for attn, pos in itertools.product(choices_of("attn"), choices_of("pos")):
        refused[attn, pos] = None
        try:
            with torch.device("meta"):
                build_model(TinyVariant(attn, pos).config(), VOCAB)
        except PairRefused as error:
            refused[attn, pos] = str(error)
    return refused


def require(condition: bool, message: str) -> None:
    """Raise PropertyViolated unless a condition holds."""
    if not condition:
        raise PropertyViolated(message)


def causality(variant: TinyVariant) -> None:
    """A changed token leaves all earlier logits bit for bit the same, and changes its own.

    With gradients and without, which may run different kernels.
    """
    model, x = variant.model(), variant.tokens(2, LENGTH)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), variant.device.autocast():
            before = model(x)
            for t in (1, 7, 15):
                changed = x.clone()
                changed[:, t] = (changed[:, t] + 1) % VOCAB
                after = model(changed)
                same = torch.equal(after[:, :t], before[:, :t])
                require(same, f"token {t} changes earlier logits")
                require(not torch.equal(after[:, t], before[:, t]), f"token {t} changes nothing")


def gradients(variant: TinyVariant) -> None:
    """Every parameter gets a finite gradient."""
    model = variant.model("model.bias=true", "model.tie_embeddings=false").train()
    variant.loss(model).backward()
    for name, parameter in model.named_parameters():
        require(parameter.grad is not None, f"{name} gets no gradient")
        assert parameter.grad is not None
        require(bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite")


@torch.no_grad()
def decoding(variant: TinyVariant) -> None:
    """Decoding with a cache equals the full forward pass: token by token, after a prefill, in chunks."""
    model, x = variant.model(), variant.tokens(3, LENGTH)
    with variant.device.autocast():
        full = model(x)
        for chunks in ([1] * 16, [8, *[1] * 8], [5, 4, 1, 6], [3, 13]):
            cache = model.new_cache(LENGTH)
            pieces = torch.cat([model(part, cache) for part in x.split(chunks, dim=1)], dim=1)
            variant.require_close(pieces, full, f"read in chunks of {chunks}")
            require(len(cache) == LENGTH, f"the cache counts {len(cache)} of {LENGTH} tokens")


@torch.no_grad()
def cache_bytes(variant: TinyVariant) -> None:
    """The cache holds exactly the bytes that the attention layers state, at every length."""
    model = variant.model()
    cache, dtype = model.new_cache(LENGTH), variant.device.dtype
    with variant.device.autocast():
        for length, part in zip(
            (5, 6, LENGTH), variant.tokens(3, LENGTH).split([5, 1, 10], 1), strict=True
        ):
            model(part, cache)
            stated = 3 * sum(m.cache_bytes(length, dtype) for m in model.attention_layers)
            require(
                cache.nbytes == stated, f"{length} tokens take {cache.nbytes} bytes, not {stated}"
            )


def flops(variant: TinyVariant) -> None:
    """Training and decoding take exactly the stated FLOPs, by torch's count."""
    variant = replace(variant, device=CPU)  # counts do not depend on the device
    model = variant.model().train()
    with FlopCounterMode(display=False) as training:
        variant.loss(model).backward()
    stated = 2 * LENGTH * flops_per_token(model, LENGTH, causal=False)
    counted = training.get_total_flops()
    require(counted == stated, f"a training step takes {counted:,} FLOPs, not {stated:,.0f}")

    x, cache = variant.tokens(1, LENGTH), model.new_cache(LENGTH)
    with torch.no_grad():
        model.eval()(x[:, :-1], cache)
        with FlopCounterMode(display=False) as decoding:
            model(x[:, -1:], cache)
    stated = 2 * weights_outside_attention(model)
    stated += sum(m.decode_flops(LENGTH - 1) for m in model.attention_layers)
    counted = decoding.get_total_flops()
    require(counted == stated, f"a decoded token takes {counted:,} FLOPs, not {stated:,.0f}")


def visible_pairs(variant: TinyVariant) -> None:
    """Causal score FLOPs count the pairs that queries attend to, each query's own key half."""
    variant = replace(variant, device=CPU)
    model = variant.model()
    for layer, attention in enumerate(model.attention_layers):
        if not attention.has_weights or not attention.heads_see_alike:
            continue  # it compares no pairs of tokens, or its output does not show each head's
        x = torch.randn(1, LENGTH, model.shape.dim, requires_grad=True)
        y = attention(x, model.position.at(torch.arange(LENGTH)).of_layer(layer))
        seen = 0
        for t in range(LENGTH):
            (gradient,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
            seen += int((gradient[0].abs().sum(dim=-1) > 0).sum())
        per_pair = attention.score_flops(1, causal=False)
        counted = round(LENGTH * attention.score_flops(LENGTH, causal=True) / per_pair, 6)
        require(
            counted == seen - LENGTH / 2,
            f"{seen} pairs are visible, {LENGTH} of them a query with its own key; {counted} counted",
        )


def rotation(variant: TinyVariant) -> None:
    """Rotary scores depend on i - j alone, at distant positions and in a bfloat16 model too."""
    position = variant.model().to(torch.bfloat16).position.of_layer(0)
    if type(position).rotate is Position.rotate:
        return
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 4, LENGTH, 8, generator=generator).to(variant.device.name)
    pos = torch.arange(LENGTH, device=variant.device.name)

    def scores(pos: Tensor) -> Tensor:
        rotated_q, rotated_k = position.rotate(q, k, pos)
        return rotated_q @ rotated_k.mT

    for shift, allowed in (
        (37, 1e-4),
        (4000, 5e-3),
    ):  # a float32 angle is exact to 6e-8 of its size
        change = (scores(pos + shift) - scores(pos)).abs().max().item()
        require(change < allowed, f"scores change by {change:.2g} when positions shift by {shift}")
    require(
        not torch.allclose(scores(2 * pos), scores(pos), atol=1e-2), "scores ignore the distance"
    )


def one_graph(variant: TinyVariant) -> None:
    """torch.compile captures the forward pass as one graph, of two layers: each is traced."""
    few = [] if "pattern" in (variant.attn, variant.pos) else ["model.n_layers=2"]
    model, x = variant.model(*few), variant.tokens(2, LENGTH)
    torch.compiler.reset()
    with torch.no_grad(), variant.device.autocast():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
        variant.require_close(compiled, model(x), "compiled")


def real_compiler(variant: TinyVariant) -> None:
    """The compiled model has the loss of the eager one, and its backward pass runs."""
    model = variant.model().train()
    torch.compiler.reset()
    eager = variant.loss(model)
    model.compile(fullgraph=True)
    compiled = variant.loss(model)
    compiled.backward()
    error = abs(compiled.item() - eager.item())
    allowed = 1e-5 if variant.device.dtype == torch.float32 else 1e-2
    require(error <= allowed, f"the compiled loss differs by {error:.2g}, {allowed:g} allowed")


def training(variant: TinyVariant) -> None:
    """Two optimizer steps lower the loss."""
    model = variant.model(spread=1.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        loss = variant.loss(model, rows=4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    require(losses[0] > losses[1] > losses[2], f"losses of three steps: {losses}")


def same_start(variant: TinyVariant) -> None:
    """Tensors shared with plain attention start equal; with another seed they differ."""
    model, baseline = variant.model(), TinyVariant("mha", "none", variant.device).model()
    plain = dict(baseline.named_parameters())
    shared = [n for n, p in model.named_parameters() if n in plain and plain[n].shape == p.shape]
    require(
        {"embed.weight", "blocks.1.feedforward.up.weight"} <= set(shared), "no tensor is shared"
    )
    for name in shared:
        require(torch.equal(model.get_parameter(name), plain[name]), f"{name} starts differently")
    other = variant.model(seed=1)
    require(not torch.equal(other.embed.weight, model.embed.weight), "the seed changes nothing")


PROPERTIES: list[Callable[[TinyVariant], None]] = [
    causality,
    gradients,
    decoding,
    cache_bytes,
    flops,
    visible_pairs,
    rotation,
    one_graph,
    training,
    same_start,
]
