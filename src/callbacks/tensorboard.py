"""TensorBoard points of a run; they follow the commits."""

import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from poutyne import Callback
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams, scalar, text

EPOCH_TAG = "epoch/loss"
STEP_TAG = "step/loss"
FINAL_TAG = "final/loss"
NOT_METRICS = ("epoch", "time", "lr", "images_per_s", "data_wait", "commit_s", "valid_s", "peak_mb")


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
        self.epochs, self.finals, self.last_step = _written(folder)
        self.settings = settings
        self.folder = folder
        if not self.epochs:
            self._write(text("config", "    " + config.replace("\n", "\n    ")), 0)  # type: ignore[no-untyped-call]
        for row in history:
            self.on_epoch_end(int(row["epoch"]), row)

    @cached_property
    def _file(self) -> RecordWriter:
        """The start's event file, made when there is something to write."""
        # Not by SummaryWriter: it writes in a thread, whose errors end in a traceback of their own.
        name = f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
        file = RecordWriter(open(self.folder / name, "ab", buffering=0))  # noqa: SIM115
        file.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        return file

    def _write(self, summary: Summary, step: int) -> None:
        self._file.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())

    def add_loss(self, step: int, loss: float) -> None:
        """The mean loss of the steps up to `step`, counted over the whole run."""
        if step > self.last_step:
            self._write(scalar(STEP_TAG, loss), step)  # type: ignore[no-untyped-call]

    def on_epoch_end(self, epoch_number: int, logs: Mapping[str, float]) -> None:
        if epoch_number not in self.epochs:  # or its commit was damaged, and the run went back by one
            self._add(logs)

    def _add(self, row: Mapping[str, float], prefix: str = "epoch") -> None:
        # One record, so that a kill leaves all of an epoch's points or none.
        points = [Summary.Value(tag=f"{prefix}/{k}", simple_value=v) for k, v in row.items() if k != "epoch"]
        self._write(Summary(value=points), int(row["epoch"]))

    def finish(self, row: Mapping[str, float]) -> None:
        """Writes the hparams with the metrics of the last epoch, unless they are there, and closes the file."""
        if row["epoch"] in self.finals:
            return
        metrics = {f"final/{name}": value for name, value in row.items() if name not in NOT_METRICS}
        for summary in hparams(dict(self.settings), dict(metrics)):  # type: ignore[no-untyped-call]
            self._write(summary, 0)
        self._add(row, "final")  # last: it says that all of this is there
        self._file.close()


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
