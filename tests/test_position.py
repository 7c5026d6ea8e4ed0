"""Properties of single position schemes."""

import pytest
import torch
from tiny import build, tokens
from torch import Tensor

from model.position.rope import RoPE
from model.position.sinusoidal import Sinusoidal
from model.shape import Shape

SHAPE = Shape(dim=32, n_heads=4, n_layers=1, max_len=16, vocab_size=5)


def scores(rope: RoPE, q: Tensor, k: Tensor, pos: Tensor) -> Tensor:
    q, k = rope.rotate(q, k, pos)
    return q @ k.mT


def test_rope_scores_depend_on_distance_alone() -> None:
    rope = RoPE(SHAPE, base=10000)
    q, k = torch.randn(1, 4, 16, 8), torch.randn(1, 2, 16, 8)
    k = k.repeat_interleave(2, dim=1)
    here = scores(rope, q, k, torch.arange(16))
    there = scores(rope, q, k, torch.arange(16) + 37)
    torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)
    stretched = scores(rope, q, k, 2 * torch.arange(16))
    assert not torch.allclose(stretched, here, atol=1e-2)


def test_rope_turns_pairs_and_keeps_their_length() -> None:
    q = torch.randn(1, 4, 16, 8)
    turned, _ = RoPE(SHAPE, base=10000).rotate(q, q, torch.arange(16))
    lengths = (q[..., :4] ** 2 + q[..., 4:] ** 2, turned[..., :4] ** 2 + turned[..., 4:] ** 2)
    torch.testing.assert_close(*lengths)
    assert torch.equal(turned[:, :, 0], q[:, :, 0])  # position 0 is not turned


def test_rope_angles_are_exact_far_away_in_a_bfloat16_model() -> None:
    rope = RoPE(SHAPE, base=10000)
    pos = torch.tensor([4000])
    exact = 4000 * 10000 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    torch.testing.assert_close(rope.angles(8, pos)[0].double(), exact, rtol=1e-6, atol=0)
    ones = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    turned, _ = rope.to(torch.bfloat16).rotate(ones, ones, pos)
    assert turned.dtype == torch.bfloat16
    expected = torch.cat((exact.cos() - exact.sin(), exact.cos() + exact.sin()))
    torch.testing.assert_close(turned[0, 0, 0].double(), expected, atol=8e-3, rtol=0)


def test_rope_takes_its_width_from_the_tensor() -> None:
    slice_ = torch.randn(1, 1, 16, 4)
    turned, _ = RoPE(SHAPE, base=10000).rotate(slice_, slice_, torch.arange(16))
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
    for pos in ("learned", "sinusoidal", "rope"):
        model = build("mha", pos, "model.n_layers=1")
        assert not torch.allclose(model(x)[0, -1], model(swapped)[0, -1], atol=1e-6), pos
    blind = build("mha", "none", "model.n_layers=1")
    torch.testing.assert_close(blind(x)[0, -1], blind(swapped)[0, -1])


@pytest.mark.parametrize("pos", ["sinusoidal", "rope", "none"])
def test_schemes_without_a_table_go_on_past_the_training_length(pos: str) -> None:
    assert build("mha", pos)(tokens(1, 40)).isfinite().all()


def test_a_learned_table_ends_in_a_clear_error() -> None:
    with pytest.raises(ValueError, match="learned positions end at 16; 17 tokens are too many"):
        build("mha", "learned")(tokens(1, 17))


def test_impossible_choices_are_refused() -> None:
    odd = Shape(dim=36, n_heads=4, n_layers=1, max_len=16, vocab_size=5)
    with pytest.raises(ValueError, match=r"even head_dim.*36 / n_heads=4 = 9"):
        RoPE(odd, base=10000)
    with pytest.raises(ValueError, match="base=0"):
        RoPE(SHAPE, base=0)
    with pytest.raises(ValueError, match="base=1"):
        Sinusoidal(SHAPE, base=1, amplitude=1.0)
