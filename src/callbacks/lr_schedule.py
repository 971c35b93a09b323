from collections.abc import Sequence
from typing import Any

import gin
from poutyne import Callback


@gin.register
class LRSchedule(Callback):
    """Piecewise constant learning rate: a function of the epoch alone.

    base_lr: learning rate that the factors multiply; None: the optimizer's own. schedule: pairs [last epoch, factor] in
    rising order: [[2, 1.0], [10, 0.1]] gives base_lr in epochs 1 and 2, and a tenth of it from then on.
    """

    stateless = True

    def __init__(self, base_lr: float | None = None, schedule: Sequence[Sequence[float]] = ((1, 1.0),)) -> None:
        super().__init__()
        epochs = [epoch for epoch, _ in schedule]
        if not epochs or epochs != sorted(set(epochs)):
            raise ValueError(f"schedule = {schedule}: its epochs must rise")
        self.base_lr, self.schedule = base_lr, schedule

    def factor(self, epoch: int) -> float:
        """What the base rate is multiplied by in an epoch; epochs count from 1."""
        return next((factor for last, factor in self.schedule if epoch <= last), self.schedule[-1][1])

    def on_epoch_begin(self, epoch_number: int, logs: dict[str, Any]) -> None:
        for group in self.model.optimizer.param_groups:
            base = group.setdefault("initial_lr", group["lr"]) if self.base_lr is None else self.base_lr
            group["lr"] = base * self.factor(epoch_number)
