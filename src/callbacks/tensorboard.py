"""TensorBoard points of a run; they follow the commits."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from poutyne import Callback
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

EPOCH_TAG = "epoch/loss"
STEP_TAG = "step/loss"
FINAL_TAG = "final/loss"


class TensorBoard(Callback):
    """Each column of history.csv by epoch, the loss by step, the config as text, the hparams.

    Stands behind the commit in the list of callbacks: a point is written for committed epochs only,
    once, also when the run was killed and continued.

    Args:
        folder: the run's; its event files are looked through for what was written before.
        history: the committed epochs.
        config: the run's config as text.
        settings: setting -> value, shown as hparams.
    """

    stateless = True

    def __init__(
        self,
        folder: Path,
        history: Sequence[Mapping[str, float]],
        config: str,
        settings: Mapping[str, bool | int | float | str],
    ) -> None:
        super().__init__()
        epochs, self.finals, self.last_step = _written(folder)
        self.settings = settings
        self.folder = folder
        if not epochs:
            self.writer.add_text("config", "    " + config.replace("\n", "\n    "))
        for row in history:
            if row["epoch"] not in epochs:
                self._add(row)

    @cached_property
    def writer(self) -> SummaryWriter:
        """Makes the start's event file when there is something to write."""
        return SummaryWriter(str(self.folder))

    def add_loss(self, step: int, loss: float) -> None:
        """The mean loss of the steps up to `step`, counted over the whole run."""
        if step > self.last_step:
            self.writer.add_scalar(STEP_TAG, loss, step)
            self.writer.flush()  # 7 us; a stop inside the epoch leaves no gap

    def on_epoch_end(self, epoch_number: int, logs: Mapping[str, float]) -> None:
        self._add(logs)

    def _add(self, row: Mapping[str, float], prefix: str = "epoch") -> None:
        # One record, so that a kill leaves all of an epoch's points or none.
        points = [Summary.Value(tag=f"{prefix}/{k}", simple_value=v) for k, v in row.items() if k != "epoch"]
        file = self.writer._get_file_writer()  # type: ignore[no-untyped-call]
        file.add_summary(Summary(value=points), int(row["epoch"]))
        self.writer.flush()

    def finish(self, row: Mapping[str, float]) -> None:
        """Writes the hparams with the metrics of the last epoch, unless they are there, and closes the file."""
        if row["epoch"] in self.finals:
            return
        metrics = {f"final/{name}": value for name, value in row.items() if name != "epoch"}
        for summary in hparams(dict(self.settings), dict(metrics)):  # type: ignore[no-untyped-call]
            self.writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
        self._add(row, "final")  # last: it says that all of this is there
        self.writer.close()


def _written(folder: Path) -> tuple[set[int], set[int], int]:
    """What the folder's event files hold: epochs, last epochs with final metrics, the last step."""
    epochs, finals, last_step = set(), set(), 0
    for file in folder.glob("events.out.tfevents.*"):
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        for event in LegacyEventFileLoader(str(file)).Load():
            tags: Any = {value.tag for value in event.summary.value}
            if EPOCH_TAG in tags:
                epochs.add(event.step)
            if FINAL_TAG in tags:
                finals.add(event.step)
            if STEP_TAG in tags:
                last_step = max(last_step, event.step)
    return epochs, finals, last_step
