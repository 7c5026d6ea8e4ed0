"""Properties of single position schemes."""

import pytest
import torch
from tiny import build, tokens

from compare.check.properties import VOCAB, composed
from model.ops import rotary
from model.position.alibi import slopes
from model.position.rope import RoPE
from model.position.rope_linear import LinearRoPE
from model.position.rope_ntk import NTKRoPE
from model.position.rope_yarn import YaRN
from model.position.sinusoidal import Sinusoidal
from model.position.t5 import T5
from model.shape import Shape
from train.config.compose import choices_of
from train.setup.build import build_model, init_model

SHAPE = Shape(dim=32, n_heads=4, n_layers=1, max_len=16, vocab_size=5)


ROPE = {"base": 10000, "rotary_fraction": 1.0}
CPU = torch.device("cpu")
YARN = {"original_max_len": 64, "beta_fast": 4, "beta_slow": 1}


def test_rope_turns_pairs_and_keeps_their_length() -> None:
    q = torch.randn(1, 4, 16, 8)
    turned, _ = RoPE(SHAPE, **ROPE).rotate(q, q, torch.arange(16))
    lengths = (q[..., :4] ** 2 + q[..., 4:] ** 2, turned[..., :4] ** 2 + turned[..., 4:] ** 2)
    torch.testing.assert_close(*lengths)
    assert torch.equal(turned[:, :, 0], q[:, :, 0])  # position 0 is not turned


def test_rope_angles_are_the_papers() -> None:
    exact = 3999 * 10000 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = RoPE(SHAPE, **ROPE).to(torch.bfloat16).angles(8, torch.tensor([3999]))
    torch.testing.assert_close(angles[0].double(), exact, rtol=1e-6, atol=0)


def test_partial_rope_leaves_the_other_channels_alone() -> None:
    q = torch.randn(1, 4, 16, 8)
    turned, _ = RoPE(SHAPE, base=10000, rotary_fraction=0.5).rotate(q, q, torch.arange(16))
    alone, _ = RoPE(SHAPE, **ROPE).rotate(q[..., :4], q[..., :4], torch.arange(16))
    assert torch.equal(turned[..., 4:], q[..., 4:])
    assert torch.equal(turned[..., :4], alone)


def test_linear_scaling_is_rope_at_divided_positions() -> None:
    q, pos = torch.randn(1, 4, 16, 8), torch.arange(16)
    scaled, _ = LinearRoPE(SHAPE, **ROPE, factor=4).rotate(q, q, 4 * pos)
    torch.testing.assert_close(scaled, RoPE(SHAPE, **ROPE).rotate(q, q, pos)[0])


def test_ntk_scaling_slows_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all() -> None:
    ratio = NTKRoPE(SHAPE, **ROPE, factor=4).inv_freq(8, CPU)
    ratio = ratio / RoPE(SHAPE, **ROPE).inv_freq(8, CPU)
    torch.testing.assert_close(ratio[[0, -1]], torch.tensor([1.0, 0.25]))
    assert (ratio.diff() < 0).all()


def test_yarn_keeps_fast_pairs_interpolates_slow_ones_and_joins_them_by_a_ramp() -> None:
    wide = Shape(dim=256, n_heads=4, n_layers=1, max_len=64, vocab_size=5)
    own = RoPE(wide, **ROPE).inv_freq(64, CPU)
    yarn = YaRN(wide, **ROPE, factor=4, **YARN)
    ratio = yarn.inv_freq(64, CPU) / own
    turns = 64 * own / (2 * torch.pi)  # of each pair within the original length
    torch.testing.assert_close(ratio[turns > 4.5], torch.ones(int((turns > 4.5).sum())))
    torch.testing.assert_close(ratio[turns < 0.9], torch.full((int((turns < 0.9).sum()),), 0.25))
    between = ratio[(turns < 3.5) & (turns > 1.1)]
    assert len(between) >= 3
    assert ((between < 1) & (between > 0.25)).all()
    assert yarn.attention_factor == pytest.approx(0.1 * 1.3862943611 + 1)


@pytest.mark.parametrize("scheme", [LinearRoPE, NTKRoPE])
def test_a_factor_of_one_scales_nothing(scheme: type) -> None:
    plain = RoPE(SHAPE, **ROPE).inv_freq(8, CPU)
    assert torch.equal(scheme(SHAPE, **ROPE, factor=1).inv_freq(8, CPU), plain)
    assert torch.equal(YaRN(SHAPE, **ROPE, factor=1, **YARN).inv_freq(8, CPU), plain)


@pytest.mark.parametrize(
    ("n_heads", "expected"),
    [
        (8, [2.0**-i for i in range(1, 9)]),
        (2, [2.0**-4, 2.0**-8]),
        (1, [2.0**-8]),
        (6, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]),
    ],
)
def test_alibi_slopes_are_the_papers(n_heads: int, expected: list[float]) -> None:
    assert slopes(n_heads) == expected


def test_alibi_falls_by_the_slope_for_each_token_of_distance() -> None:
    bias = build("mha", "alibi").position.bias(torch.arange(10, 16), torch.arange(16))
    assert bias.shape == (4, 6, 16)
    assert (bias[:, 0, 10] == 0).all()
    torch.testing.assert_close(
        bias[:, 2, 5], -7 * torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    )


def test_t5_buckets_hold_one_distance_then_ranges_that_grow() -> None:
    t5 = T5(SHAPE, n_buckets=8, max_distance=64)
    expected = [0, 1, 2, 3, *[4] * 4, *[5] * 8, *[6] * 16, *[7] * 200]
    assert t5.bucket(torch.arange(len(expected))).tolist() == expected
    assert t5.bucket(torch.tensor([-3])).item() == 0


def test_t5_adds_the_number_of_the_head_and_bucket() -> None:
    t5 = T5(SHAPE, n_buckets=8, max_distance=64)
    bias = t5.bias(torch.tensor([20]), torch.arange(21))
    assert bias.shape == (4, 1, 21)
    torch.testing.assert_close(bias[:, 0, 18], t5.table.weight[2])
    torch.testing.assert_close(bias[:, 0, 4], t5.table.weight[6])


def test_rope_takes_its_width_from_the_tensor() -> None:
    slice_ = torch.randn(1, 1, 16, 4)
    turned, _ = RoPE(SHAPE, **ROPE).rotate(slice_, slice_, torch.arange(16))
    assert turned.shape == slice_.shape


@pytest.mark.parametrize("shift", [1, 37])
def test_sinusoidal_shifts_by_a_fixed_linear_map(shift: int) -> None:
    encoding = Sinusoidal(SHAPE, base=10000, amplitude=1.0).encoding(32, torch.arange(200))
    sin, cos = encoding[:, 0::2], encoding[:, 1::2]
    # The map turns each pair by an angle that depends on the shift alone.
    turned_sin = sin[:-shift] * cos[shift] + cos[:-shift] * sin[shift]
    turned_cos = cos[:-shift] * cos[shift] - sin[:-shift] * sin[shift]
    torch.testing.assert_close(turned_sin, sin[shift:], atol=1e-4, rtol=0)
    torch.testing.assert_close(turned_cos, cos[shift:], atol=1e-4, rtol=0)


def test_positions_tell_order_apart() -> None:
    """With one layer, only a position scheme can tell which of two earlier tokens came first."""
    x = tokens(1, 8)
    swapped = x.clone()
    swapped[0, [1, 2]] = x[0, [2, 1]]
    assert x[0, 1] != x[0, 2]
    for pos in set(choices_of("pos")) - {"none"}:
        model = build("mha", pos, "model.n_layers=1")
        assert not torch.allclose(model(x)[0, -1], model(swapped)[0, -1], atol=1e-6), pos
    blind = build("mha", "none", "model.n_layers=1")
    torch.testing.assert_close(blind(x)[0, -1], blind(swapped)[0, -1])


@pytest.mark.parametrize("pos", sorted(set(choices_of("pos")) - {"learned"}))
def test_schemes_without_a_table_go_on_past_the_training_length(pos: str) -> None:
    assert build("mha", pos)(tokens(1, 40)).isfinite().all()


def test_a_learned_table_ends_in_a_clear_error() -> None:
    with pytest.raises(ValueError, match="17 tokens exceeds max_len=16 of learned positions"):
        build("mha", "learned")(tokens(1, 17))


def test_impossible_choices_are_refused() -> None:
    odd = Shape(dim=36, n_heads=4, n_layers=1, max_len=16, vocab_size=5)
    with pytest.raises(ValueError, match=r"even head_dim.*36 / n_heads=4 = 9"):
        RoPE(odd, **ROPE)
    for base in (0, 1):
        with pytest.raises(ValueError, match=f"base={base}"):
            RoPE(SHAPE, base=base, rotary_fraction=1.0)
    with pytest.raises(ValueError, match="base=1"):
        Sinusoidal(SHAPE, base=1, amplitude=1.0)
    for fraction in (0, 1.5):
        with pytest.raises(ValueError, match=f"rotary_fraction={fraction} must be above 0"):
            RoPE(SHAPE, base=10000, rotary_fraction=fraction)
    wide = Shape(dim=200, n_heads=4, n_layers=1, max_len=16, vocab_size=5)
    assert RoPE(wide, base=10000, rotary_fraction=0.28).rotary_dim(50) == 14  # 14.000000000000002
    with pytest.raises(ValueError, match=r"rotary_fraction=0.3 of 8 channels is 2.4"):
        RoPE(SHAPE, base=10000, rotary_fraction=0.3)
    for scheme in (LinearRoPE, NTKRoPE):
        with pytest.raises(ValueError, match="factor=0.5 must be at least 1"):
            scheme(SHAPE, **ROPE, factor=0.5)
    with pytest.raises(ValueError, match="factor=0.5 must be at least 1"):
        YaRN(SHAPE, **ROPE, factor=0.5, **YARN)
    with pytest.raises(ValueError, match="beta_slow=5 must be above 0 and below beta_fast=4"):
        YaRN(SHAPE, **ROPE, factor=2, **YARN | {"beta_slow": 5})
    with pytest.raises(ValueError, match="original_max_len=0"):
        YaRN(SHAPE, **ROPE, factor=2, **YARN | {"original_max_len": 0})
    with pytest.raises(ValueError, match="n_buckets=1"):
        T5(SHAPE, n_buckets=1, max_distance=128)
    with pytest.raises(ValueError, match="max_distance=16 must be above n_buckets=32 / 2"):
        T5(SHAPE, n_buckets=32, max_distance=16)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_gradient_of_a_rotation_is_its_own(
    fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary, "IN_CACHE", 3 * 2 * 5 * 8)  # three rows at once, then the fourth
    x = torch.randn(4, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    positions = RoPE(SHAPE, base=10000, rotary_fraction=fraction).at(torch.arange(5))
    cos, sin = positions.cos_sin(int(8 * fraction), x.dtype)
    assert torch.autograd.gradcheck(lambda x: rotary.apply_rotary(x, cos, sin), x)


def test_layers_of_other_widths_share_positions_but_not_their_angles() -> None:
    """As in a pattern of layers, one of which rotates a slice of its heads."""
    scheme, pos = RoPE(SHAPE, **ROPE), torch.arange(16)
    positions = scheme.at(pos)
    for width in (8, 4, 8):
        q = torch.randn(1, 4, 16, width)
        shared, _ = positions.rotate(q, q)
        alone, _ = scheme.rotate(q, q, pos)
        assert torch.equal(shared, alone)


def test_a_forward_pass_computes_its_angles_once_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calls = build("mha", "rope"), []
    angles = RoPE.angles
    monkeypatch.setattr(RoPE, "angles", lambda *args: calls.append(1) or angles(*args))
    before = dict(vars(model.position))
    model(tokens(2, 16))
    assert len(calls) == 1
    assert vars(model.position) == before


def test_a_pattern_of_one_scheme_is_that_scheme() -> None:
    for pos in sorted(set(choices_of("pos")) - {"pattern"}):
        alone = build("mha", pos)
        node = composed(f"pos={pos}")["pos"]
        config = composed("pos=pattern") | {"pos": {"only": node, "pattern": ["only"]}}
        pattern = build_model(config, VOCAB)
        init_model(pattern, config, 0)
        for name, value in pattern.named_parameters():
            value.data.copy_(alone.get_parameter(name.replace("schemes.only.", "")))
        x = tokens(2, 16)
        assert torch.equal(alone(x), pattern.eval()(x)), pos


def test_a_pattern_gives_each_layer_its_own_scheme() -> None:
    two_bases = ["pos@pos.global=rope", "pos.global.base=1e6", "pos.pattern=[local,global,local]"]
    model = build("mha", "pattern", *two_bases)
    positions = model.position.at(torch.arange(16))
    q = torch.randn(1, 4, 16, 8)
    rotated = [positions.of_layer(layer).rotate(q, q)[0] for layer in range(3)]
    assert torch.equal(rotated[0], rotated[2])
    assert torch.equal(
        rotated[0], build("mha", "rope").position.at(torch.arange(16)).rotate(q, q)[0]
    )
    assert not torch.allclose(rotated[0], rotated[1])


def test_a_pattern_ends_where_its_shortest_scheme_does() -> None:
    learned = build("mha", "pattern", "pos@pos.global=learned")
    with pytest.raises(ValueError, match="17 tokens exceeds max_len=16"):
        learned(tokens(1, 17))
    assert learned.position.hooks == {"embed", "rotate"}
    shallow = build("mha", "pattern", "pos@pos.global=learned", "model.n_layers=2")
    with pytest.raises(ValueError, match="17 tokens exceeds max_len=16"):
        shallow(tokens(1, 17))  # what no layer of two names is added all the same
    with pytest.raises(ValueError, match=r"pos\.pattern=\[local\] leaves out global"):
        build("mha", "pattern", "pos.pattern=[local]")
