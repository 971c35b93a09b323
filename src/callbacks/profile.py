from pathlib import Path

import poutyne
import torch


def profile(path: Path) -> poutyne.Callback:
    """A callback that writes a trace of steps 11 to 30 into the file: Perfetto (ui.perfetto.dev) and Chrome open it.

    The first steps are slower than the rest.
    """
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=8, warmup=2, active=20, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    )

    def end(logs: object) -> None:
        profiler.stop()
        if not path.exists():
            print(f"{path} was not written: it needs 11 steps, better 30")

    return poutyne.LambdaCallback(
        on_train_begin=lambda logs: profiler.start(),
        on_train_batch_end=lambda batch_number, logs: profiler.step(),
        on_train_end=end,
    )
