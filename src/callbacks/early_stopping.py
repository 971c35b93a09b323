"""Stops when a metric no longer gets better."""

import math
from typing import Literal

import gin
import poutyne


@gin.register
class EarlyStopping(poutyne.EarlyStopping):
    """Stops after `patience` epochs without an improvement of more than `min_delta`.

    Poutyne's own, with its memory kept in the checkpoint.

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
        self.best = math.inf if mode == "min" else -math.inf

    def state_dict(self) -> dict[str, float]:
        return {"wait": self.wait, "best": float(self.best), "stopped_epoch": self.stopped_epoch}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.wait, self.best = int(state["wait"]), state["best"]
        self.stopped_epoch = int(state["stopped_epoch"])
