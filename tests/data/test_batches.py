"""The batch of a step is a pure function of (seed, step)."""

import numpy as np
import pytest
import torch

from data.batches import Batches

TOKENS = torch.arange(1000).to(torch.uint16)


def batches(sampling: str, *, rows: int = 8, length: int = 16, seed: int = 0) -> Batches:
    return Batches(TOKENS, rows=rows, length=length, seed=seed, sampling=sampling)


@pytest.mark.parametrize("sampling", ["crops", "epochs"])
def test_a_batch_depends_on_seed_and_step_alone(sampling: str) -> None:
    one, other = batches(sampling), batches(sampling)
    later = [other(step) for step in (7, 3, 0)]  # any order
    for step, (x, y) in zip((7, 3, 0), later, strict=True):
        assert torch.equal(one(step)[0], x)
        assert torch.equal(one(step)[1], y)
    assert not torch.equal(one(0)[0], one(1)[0])
    assert not torch.equal(one(0)[0], batches(sampling, seed=1)(0)[0])


@pytest.mark.parametrize("sampling", ["crops", "epochs"])
def test_targets_are_the_next_tokens(sampling: str) -> None:
    x, y = batches(sampling)(5)
    assert x.shape == y.shape == (8, 16)
    assert x.dtype == torch.int64
    assert torch.equal(x + 1, y)  # the tokens are 0, 1, 2, ...


def test_crops_reach_the_first_and_the_last_token() -> None:
    made = Batches(TOKENS[:18], rows=64, length=16, seed=0, sampling="crops")
    x, y = made(0)
    assert x.min() == 0
    assert y.max() == 17


def test_an_epoch_shows_every_row_once_in_a_new_order() -> None:
    made = batches("epochs", rows=7)  # 62 rows: epochs begin inside batches
    seen = torch.cat([made(step)[0][:, 0] for step in range(62)]).view(7, 62)
    everything = torch.arange(62) * 16
    for epoch in seen:
        assert torch.equal(epoch.sort().values, everything)
    assert not torch.equal(seen[0], seen[1])


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every step: a permutation of all rows takes longer than a small model's step."""
    shuffled = []
    real = Batches.random

    def counted(self: Batches, epoch: int) -> np.random.Generator:
        shuffled.append(epoch)
        return real(self, epoch)

    monkeypatch.setattr(Batches, "random", counted)
    made = batches("epochs", rows=7)
    for step in range(25):  # 175 rows, 62 an epoch
        made(step)
    assert shuffled == [0, 1, 2]


def test_a_batch_may_be_larger_than_an_epoch() -> None:
    x, _ = batches("epochs", rows=200)(3)
    assert x.shape == (200, 16)


def test_too_little_text_and_unknown_samplings_are_refused() -> None:
    with pytest.raises(ValueError, match="has 16 tokens; a context of 16 needs at least 17"):
        Batches(TOKENS[:16], rows=1, length=16, seed=0, sampling="crops")
    with pytest.raises(ValueError, match="sampling=random is not one of crops, epochs"):
        batches("random")
