from typing import Literal

import gin
import poutyne


@gin.register
class EarlyStopping(poutyne.EarlyStopping):
    """Poutyne's own: stops after `patience` epochs in which a metric did not get better by more than `min_delta`.

    monitor: column of history.csv, e.g. val_loss. mode: 'min' or 'max'.
    """

    def __init__(
        self, monitor: str = "val_loss", mode: Literal["min", "max"] = "min", patience: int = 5, min_delta: float = 0.0
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, patience=patience, min_delta=min_delta, verbose=True)
