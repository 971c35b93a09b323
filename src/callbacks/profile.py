from pathlib import Path
from typing import Any

import torch
from poutyne import Callback

SKIPPED, RECORDED = 10, 20  # steps; the first ones are slower than the rest


class Profile(Callback):
    """Writes a trace of 20 steps into the file `folder`/profile.json: Perfetto (ui.perfetto.dev) and Chrome open it."""

    stateless = True

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "profile.json"
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=SKIPPED - 2, warmup=2, active=RECORDED, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(self.path)),
        )

    def on_train_begin(self, logs: dict[str, Any]) -> None:
        self.profiler.start()

    def on_train_batch_end(self, batch_number: int, logs: dict[str, Any]) -> None:
        self.profiler.step()

    def on_train_end(self, logs: dict[str, Any]) -> None:
        self.profiler.stop()
        if self.path.exists():
            print(f"{self.path}: open it in ui.perfetto.dev")
        else:
            print(f"--profile: no trace: it takes {SKIPPED + RECORDED} steps")
