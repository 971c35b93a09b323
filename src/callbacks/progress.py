"""What a person sees of a training: a bar on a terminal, one line an epoch everywhere."""

import os
import select
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from poutyne import Callback

REFRESH_SECONDS = 0.1
BAR_WIDTH = 24
NOT_METRICS = ("epoch", "time", "lr", "images_per_s", "data_wait", "commit_s", "valid_s", "peak_mb")


class Progress(Callback):
    """Prints a line at the end of each epoch; draws a bar meanwhile where there is a terminal.

    terminal: file descriptor that the bar is drawn on, or None. batches: those of training.
    """

    def __init__(self, terminal: int | None, batches: Any) -> None:
        super().__init__()
        self.terminal, self.batches = terminal, batches
        self.warned = False

    def on_epoch_begin(self, epoch_number: int, logs: dict[str, Any]) -> None:
        self.title = f"epoch {epoch_number}/{self.params['epochs']}"
        self.began = self.drawn_at = time.monotonic()

    def on_train_batch_end(self, batch_number: int, logs: dict[str, Any]) -> None:
        now = time.monotonic()
        if self.terminal is None or now - self.drawn_at < REFRESH_SECONDS:
            return
        self.drawn_at = now
        done, of = self.batches.start + batch_number, self.batches.n_batches
        speed = batch_number / (now - self.began)
        bar = ("█" * (BAR_WIDTH * done // of)).ljust(BAR_WIDTH, "░")
        images_per_s, left = speed * self.batches.batch_size, clock((of - done) / speed)
        self._draw(f"{self.title} {bar} {done}/{of}  {images_per_s:,.0f} images/s  {left} left")

    def on_valid_begin(self, logs: dict[str, Any]) -> None:
        self._draw(f"{self.title} validation")

    def _draw(self, text: str) -> None:
        with suppress(OSError):  # the terminal is gone; the run goes on
            # Not where it is held by Ctrl-S: the run would wait for it.
            if self.terminal is not None and select.select([], [self.terminal], [], 0)[1]:
                width = os.get_terminal_size(self.terminal).columns or 80
                os.write(self.terminal, f"\r\x1b[K{text[: width - 1]}".encode())

    def on_epoch_end(self, epoch_number: int, logs: Mapping[str, float]) -> None:
        self._draw("")
        if logs["data_wait"] > 0.2 and logs["time"] > 1 and not self.warned:
            self.warned = True
            advice = "raise training_loop.n_workers, give the run more cores, or store the data smaller"
            print(f"{logs['data_wait']:.0%} of the training time waits for data: {advice}")
        left = clock((self.params["epochs"] - epoch_number) * logs["time"])
        values = "  ".join(f"{k} {v:.4g}" for k, v in logs.items() if k not in NOT_METRICS)
        speed = f"  {logs['images_per_s']:,.0f} images/s" if logs["images_per_s"] else ""  # it had been trained before
        print(f"{self.title}  {values}  lr {logs['lr']:.3g}{speed}  {left} left")


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
