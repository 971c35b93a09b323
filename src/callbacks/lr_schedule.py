"""Learning rate by epochs."""

from collections.abc import Sequence
from typing import Any

import gin
from poutyne import Callback


@gin.register
class LRSchedule(Callback):
    """Piecewise constant learning rate: a function of the epoch alone.

    Args:
        base_lr: learning rate that the factors multiply.
        schedule: pairs [last epoch, factor] in rising order: [[2, 1.0], [10, 0.1]] gives base_lr in
            epochs 1 and 2, a tenth of it in 3 to 10, and the last factor after that.

    Raises ValueError if the epochs do not rise.
    """

    stateless = True

    def __init__(self, base_lr: float, schedule: Sequence[Sequence[float]] = ((1, 1.0),)) -> None:
        super().__init__()
        epochs = [epoch for epoch, _ in schedule]
        if not epochs or epochs != sorted(set(epochs)):
            raise ValueError(f"schedule = {schedule}: its epochs must rise")
        self.base_lr = base_lr
        self.schedule = schedule

    def lr(self, epoch: int) -> float:
        """The learning rate of an epoch; epochs count from 1."""
        factors = [factor for last, factor in self.schedule if epoch <= last]
        return self.base_lr * (factors[0] if factors else self.schedule[-1][1])

    def on_epoch_begin(self, epoch_number: int, logs: dict[str, Any]) -> None:
        for group in self.model.optimizer.param_groups:
            group["lr"] = self.lr(epoch_number)
