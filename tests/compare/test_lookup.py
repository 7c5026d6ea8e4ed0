"""Attention as a lookup: closed forms to 1e-6, and random keys to three standard errors."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cli import lab as command
from cli.entry import run_command
from compare.lab.lookup import (
    BETAS,
    HEADS,
    NOISY_KEYS,
    exercises,
    inner,
    lengths,
    lookup,
    noise,
    one_head,
    orthonormal,
    shares,
    two_heads,
    weights,
)

KERNELS = pytest.mark.parametrize("kernel", ["matmul", "flash", "sdpa"])


@KERNELS
def test_weights_are_a_categorical_distribution(kernel: str) -> None:
    keys = orthonormal(8)
    found = weights(5 * orthonormal(8, seed=1), keys, kernel)
    assert found.shape == (8, 8)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(dim=1), torch.ones(8, dtype=torch.float64))


@KERNELS
@pytest.mark.parametrize(("n", "gap"), [(8, 6.541), (16, 7.303), (128, 9.439)])
def test_a_copy_takes_a_gap_that_grows_with_the_keys(n: int, gap: float, kernel: str) -> None:
    assert math.log((n - 1) * 99) == pytest.approx(gap, abs=5e-4)
    keys = orthonormal(n)
    for g in (0.0, 1.0, math.log((n - 1) * 99)):
        found = weights(g * keys[3:4], keys, kernel)[0]
        assert found[3].item() == pytest.approx(1 / (1 + (n - 1) * math.exp(-g)), abs=1e-6)
    assert found[3].item() == pytest.approx(0.99, abs=1e-6)


@KERNELS
@pytest.mark.parametrize(("beta", "expected"), [(5, 0.490093), (10, 0.499932)])
def test_an_average_of_two_values_is_a_sum_of_their_keys(
    beta: float, expected: float, kernel: str
) -> None:
    keys = orthonormal(8)
    found = weights(beta * keys[[2, 4]].sum(dim=0, keepdim=True), keys, kernel)[0]
    assert found[[2, 4]].tolist() == pytest.approx([expected] * 2, abs=1e-6)
    assert expected == pytest.approx(math.exp(beta) / (6 + 2 * math.exp(beta)), abs=1e-6)


def test_a_sum_is_undone_by_a_projection_and_not_by_coordinates() -> None:
    vectors, drawn = orthonormal(8), orthonormal(8, seed=1)
    A, B = vectors[:4].T, vectors[4:].T
    v_a, v_b = A @ drawn[0, :4], B @ drawn[1, :4]
    torch.testing.assert_close(A @ A.T @ (v_a + v_b), v_a)
    torch.testing.assert_close(A.T @ (v_a + v_b), drawn[0, :4])  # coordinates in the basis


def test_every_exercise_comes_out_as_its_formula_says() -> None:
    found = exercises()
    assert len({(exercise.name, exercise.setting) for exercise in found}) == len(found) == 7
    for exercise in found:
        assert exercise.attention == pytest.approx(exercise.formula, abs=1e-6), exercise.name


@KERNELS
def test_keys_and_values_have_no_order_and_queries_have(kernel: str) -> None:
    q, k, v = 3 * orthonormal(8, seed=1), orthonormal(8), orthonormal(8, seed=2)
    shuffled = torch.tensor([3, 1, 4, 0, 5, 7, 2, 6])
    y = lookup(q, k, v, kernel)
    torch.testing.assert_close(lookup(q, k[shuffled], v[shuffled], kernel), y)
    torch.testing.assert_close(lookup(q[shuffled], k, v, kernel), y[shuffled])
    assert not torch.allclose(lookup(q, k[shuffled], v, kernel), y)


@pytest.mark.parametrize(("gamma", "expected"), [(0.5, 0.006693), (1.5, 0.993307)])
def test_one_head_follows_the_length_of_a_key(gamma: float, expected: float) -> None:
    keys, lengths = orthonormal(2), torch.tensor([gamma], dtype=torch.float64)
    found = shares(one_head(keys, 10), keys, lengths).item()
    assert found == pytest.approx(expected, abs=1e-6)
    assert found == pytest.approx(1 / (1 + math.exp(10 * (1 - gamma))), abs=1e-6)


def test_two_equal_heads_are_one_head() -> None:
    keys, gamma = orthonormal(8), lengths(100)
    query = one_head(keys, 10)
    assert torch.equal(shares(query.repeat(2, 1), keys, gamma), shares(query, keys, gamma))
    assert not torch.allclose(shares(two_heads(keys, 10), keys, gamma), shares(query, keys, gamma))


DENSITY = torch.linspace(-8, 8, 40_001, dtype=torch.float64)  # of the normal distribution
MASS = torch.exp(-(DENSITY**2) / 2) / torch.exp(-(DENSITY**2) / 2).sum()
GAMMA = 1 + math.sqrt(0.5) * DENSITY


def test_a_length_is_often_small_and_sometimes_negative() -> None:
    found = lengths(10_000)
    for inside, expected in (
        (lambda gamma: (gamma > 0.5) & (gamma < 1.5), 0.52),
        (lambda gamma: gamma < 0, 0.079),
        (lambda gamma: 1 / (1 + 7 * torch.exp(-10 * gamma)) < 0.5, 0.127),  # head 1 loses v_a
    ):
        exact = MASS[inside(GAMMA)].sum().item()
        assert exact == pytest.approx(expected, abs=6e-4)
        error = 3 * math.sqrt(exact * (1 - exact) / len(found))
        assert inside(found).double().mean().item() == pytest.approx(exact, abs=error)


def share_by_formula(heads: str, beta: float, gamma: Tensor) -> Tensor:
    """Weight on v_a among 8 keys, as a function of its key's length."""
    others = NOISY_KEYS - 1
    if heads == "one head":
        return 1 / (1 + torch.exp(beta * (1 - gamma)) + (others - 1) * torch.exp(-beta * gamma))
    return (1 / (1 + others * torch.exp(-beta * gamma)) + 1 / (math.exp(beta) + others)) / 2


@pytest.mark.parametrize(
    ("heads", "beta", "mean", "deviation", "within"),
    [
        ("one head", 5, 0.496, 0.386, 0.47),
        ("one head", 10, 0.500, 0.442, 0.24),
        ("one head", 20, 0.500, 0.471, 0.12),
        ("two heads", 5, 0.393, 0.156, None),
        ("two heads", 10, 0.433, 0.147, None),
        ("two heads", 20, 0.449, 0.141, None),
    ],
)
def test_two_heads_keep_an_average_that_one_head_tosses_a_coin_for(
    heads: str, beta: float, mean: float, deviation: float, within: float | None
) -> None:
    """By integration to the digits given, and by draws to three standard errors of that."""
    share = share_by_formula(heads, beta, GAMMA)
    exact = (MASS * share).sum().item()
    spread = (MASS * (share - exact) ** 2).sum().sqrt().item()
    assert (exact, spread) == (
        pytest.approx(mean, abs=6e-4),
        pytest.approx(deviation, abs=6e-4),
    )
    draws = 10_000
    drawn = noise(draws)[beta, heads]
    torch.testing.assert_close(drawn, share_by_formula(heads, beta, lengths(draws)))
    assert drawn.mean().item() == pytest.approx(exact, abs=3 * spread / math.sqrt(draws))
    fourth = (MASS * (share - exact) ** 4).sum().item()
    error = math.sqrt((fourth - spread**4) / draws) / (2 * spread)
    assert drawn.std().item() == pytest.approx(spread, abs=3 * error)
    if within is not None:
        part = MASS[(share > 0.1) & (share < 0.9)].sum().item()
        assert part == pytest.approx(within, abs=6e-3)
        error = 3 * math.sqrt(part * (1 - part) / draws)
        assert inner(drawn) == pytest.approx(part, abs=error)


def test_the_command_prints_the_numbers_and_draws_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(["lookup"]) == 0
    printed = capsys.readouterr().out
    assert "0.490093   0.490093" in printed
    assert printed.count("one head") == printed.count("two heads") == len(BETAS)
    picture = (tmp_path / "outputs/lookup.svg").read_text()
    assert all(heads in picture for heads in HEADS)
    assert all(f"beta {beta:g}" in picture for beta in BETAS)


@pytest.mark.parametrize("given", [[], ["draws=5"], ["lookup", "scores"]])
def test_the_command_takes_one_exercise(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(command.main, given) == 2
    said = " ".join(given) or "no exercise"
    assert capsys.readouterr().err == f"error: {said}: give one of lookup, scores\n"
