"""Stops when a metric no longer gets better."""

from typing import Literal

import gin
import poutyne


@gin.register
class EarlyStopping(poutyne.EarlyStopping):
    """Poutyne's own: stops after `patience` epochs without an improvement of more than `min_delta`.

    Args:
        monitor: column of history.csv, e.g. val_loss.
        mode: 'min' or 'max'.
        patience: epochs.
        min_delta: in the metric's unit.
    """

    def __init__(
        self, monitor: str = "val_loss", mode: Literal["min", "max"] = "min", patience: int = 5, min_delta: float = 0.0
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, patience=patience, min_delta=min_delta, verbose=True)
