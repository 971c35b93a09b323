"""TensorBoard points of a run; they follow the commits."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from poutyne import Callback
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams, text

from src.callbacks.progress import NOT_METRICS


class TensorBoard(Callback):
    """Each column of history.csv by epoch, the loss by step, the config as text, the settings as hparams.

    Stands behind the commit in the list of callbacks: a point is written for committed epochs only,
    once, also when the run was killed and continued: the event files in `folder` say what was written before.
    """

    def __init__(
        self, folder: Path, history: Sequence[Mapping[str, float]], config: str, settings: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.folder, self.settings = folder, settings
        self.written: set[tuple[str, int]] = set()  # tag and step of each point
        for file in folder.glob("events.out.tfevents.*"):
            from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

            for event in LegacyEventFileLoader(str(file)).Load():
                self.written |= {(value.tag, event.step) for value in event.summary.value}
        # Each file begins with the config, at the epoch from which it holds.
        config = "    " + config.replace("\n", "\n    ")
        self.first = Event(step=len(history), summary=text("config", config))  # type: ignore[no-untyped-call]
        for row in history:
            self.on_epoch_end(int(row["epoch"]), row)

    @cached_property
    def _records(self) -> RecordWriter:
        """Those of the start's event file, made when there is something to write."""
        # Not by SummaryWriter: it writes in a thread, whose errors end in a traceback of their own.
        name = f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
        records = RecordWriter(open(self.folder / name, "ab", buffering=0))  # noqa: SIM115
        records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        records.write(self.first.SerializeToString())
        return records

    def _write(self, summary: Summary, step: int) -> None:
        """Writes the summary's points, unless they are there: as one record, so that a kill leaves all or none."""
        if self.written.isdisjoint((value.tag, step) for value in summary.value):
            self._records.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())

    def add(self, kind: str, row: Mapping[str, float], step: int) -> None:
        """The row's values as the points `kind/column` of a step, or of an epoch."""
        points = [Summary.Value(tag=f"{kind}/{k}", simple_value=v) for k, v in row.items() if k != "epoch"]
        self._write(Summary(value=points), step)

    def on_epoch_end(self, epoch_number: int, logs: Mapping[str, float]) -> None:
        self.add("epoch", logs, epoch_number)

    def finish(self, row: Mapping[str, float]) -> None:
        """Writes the hparams with the metrics of the last epoch."""
        settings: dict[str, str | float] = dict(self.settings)
        for key, value in self.settings.items():
            with suppress(ValueError):
                settings[key] = float(value)
        metrics = {f"final/{name}": value for name, value in row.items() if name not in NOT_METRICS}
        for summary in hparams(settings, metrics):  # type: ignore[no-untyped-call]
            self._write(summary, 0)
        self.add("final", row, int(row["epoch"]))
