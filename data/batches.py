"""The batch of a step: a pure function of (seed, step).

Shapes: B rows, T tokens of context.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SAMPLINGS = ("crops", "epochs")


class Batches:
    """Inputs and targets of any training step, drawn from 1-D tokens.

    `crops` draws each row's start anywhere, with replacement. `epochs` cuts the tokens into rows
    and visits all of them, in an order shuffled for each epoch, before any comes again.
    No step depends on the ones before: resuming, evaluating or sampling cannot shift the data.
    Raises ValueError if the tokens do not fill one row.
    """

    def __init__(self, tokens: Tensor, *, rows: int, length: int, seed: int, sampling: str) -> None:
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling={sampling} is not one of {', '.join(SAMPLINGS)}")
        if len(tokens) < length + 1:
            raise ValueError(
                f"the training text has {len(tokens)} tokens; a context of {length} needs at least "
                f"{length + 1}: shorten model.max_len or bring more text"
            )
        self.tokens, self.rows, self.length, self.seed = tokens, rows, length, seed
        self.starts = self.crops if sampling == "crops" else self.epochs
        self.order = lru_cache(maxsize=2)(self.shuffled)  # a batch may reach into the next epoch
        self.window = torch.arange(length + 1)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (B, T) and targets (B, T), int64, of step 0, 1, ..."""
        rows = self.tokens[self.starts(step)[:, None] + self.window].long()  # (B, T + 1)
        return rows[:, :-1], rows[:, 1:]

    def crops(self, step: int) -> Tensor:
        """First token of each row of a step, drawn with replacement: (B,)."""
        last = len(self.tokens) - self.length - 1
        return torch.from_numpy(self.random(step).integers(last + 1, size=self.rows))

    def epochs(self, step: int) -> Tensor:
        """First token of each row of a step, each row once per epoch: (B,)."""
        per_epoch = (len(self.tokens) - 1) // self.length
        drawn = np.arange(step * self.rows, (step + 1) * self.rows)  # rows since the first step
        epoch, place = np.divmod(drawn, per_epoch)
        needed = range(epoch[0], epoch[-1] + 1)
        rows = np.concatenate([self.order(e, per_epoch)[place[epoch == e]] for e in needed])
        return torch.from_numpy(rows * self.length)

    def shuffled(self, epoch: int, rows: int) -> NDArray[np.int64]:
        """The order in which an epoch visits so many rows."""
        return self.random(epoch).permutation(rows)

    def random(self, index: int) -> np.random.Generator:
        # Not torch's generator: on a CPU it uses 32 bits of its seed, too few for two numbers.
        return np.random.default_rng((self.seed, index))
