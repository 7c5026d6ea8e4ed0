"""The bigram baseline."""

import math

import pytest
import torch

from compare.evaluate.bigram import bigram_nats


def test_it_is_the_formula_counted_by_hand() -> None:
    train, text = torch.tensor([0, 1, 0, 1, 0, 2]), torch.tensor([0, 1, 2, 0])
    # p(.) = (3+1, 2+1, 1+1) / (6+3); followers: 0 -> {1: 2, 2: 1}, 1 -> {0: 2}, 2 -> nothing
    p_01 = (2 + 2 * 3 / 9) / (3 + 2)
    p_12 = (0 + 1 * 2 / 9) / (2 + 1)
    p_20 = 4 / 9
    expected = -sum(map(math.log, (p_01, p_12, p_20)))
    assert bigram_nats(train, text, 3) == pytest.approx(expected)


def test_its_probabilities_sum_to_one() -> None:
    train = torch.randint(5, (50,), generator=torch.Generator().manual_seed(0))
    for first in range(6):
        nats = [bigram_nats(train, torch.tensor([first, second]), 6) for second in range(6)]
        assert sum(math.exp(-n) for n in nats) == pytest.approx(1.0)
