"""Training of all parameters."""

from model.transformer import Transformer
from model.tuning.base import Tuning


class Full(Tuning):
    """All parameters are trained, and none are added."""

    def apply(self, model: Transformer) -> None:
        """Leave the model as it is."""
