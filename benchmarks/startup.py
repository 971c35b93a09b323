#!/usr/bin/env python3
"""Seconds from the command to an answer, a refusal, the first training step.

    benchmarks/startup.py --trials 7

Each trial is a process; trials of all rows are interleaved; medians, and the spread (max - min) / median. By hand:
a script that imports torch, reads the digits, builds a small network and an optimizer, and makes a step.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.config import ROOT

BY_HAND = """
import gzip, importlib.util, os
import numpy, torch
from torch import nn
wheel = importlib.util.find_spec("sklearn").submodule_search_locations[0]  # to import it takes 1.4 s more
with gzip.open(os.path.join(wheel, "datasets/data/digits.csv.gz")) as file:
    table = torch.from_numpy(numpy.loadtxt(file, delimiter=",", dtype=numpy.int64))
x, y = table[:, :64].view(-1, 1, 8, 8).float() / 16, table[:, 64]
network = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10))
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
nn.functional.cross_entropy(network(x[:128]), y[:128]).backward()
optimizer.step()
os._exit(0)
"""
# Ends the process at the first step, as the by-hand script does.
FIRST_STEP = """
import os
import gin
from poutyne import Callback

@gin.register
class Leave(Callback):
    stateless = True
    def on_train_batch_end(self, batch_number, logs):
        os._exit(0)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup.") as folder:
        Path(folder, "leave.py").write_text(FIRST_STEP)
        Path(folder, "leave.gin").write_text("import leave\ntraining_loop.callbacks = [@Leave]\n")
        train, cnn = [sys.executable, str(ROOT / "bin/train.py")], str(ROOT / "configs/digits.gin")
        rows = {
            "import torch": [sys.executable, "-c", "import torch"],
            "--help": [*train, "--help"],
            "no such config": [*train, "run", "no.gin"],
            "a wrong name": [*train, "run", cnn, "-b", "SGD.rl=1"],
            "a wrong type": [*train, "run", cnn, "-b", "training_loop.n_epochs='5'"],
            "first step by hand": [sys.executable, "-c", BY_HAND],
            "first step": [*train, "", cnn, "leave.gin"],
        }
        times: dict[str, list[float]] = {name: [] for name in rows}
        for trial in range(arguments.trials):
            for name, command in rows.items():
                command = [part or f"run{trial}" for part in command]
                began = time.perf_counter()
                environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": ""}  # as a second start
                done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
                times[name].append(time.perf_counter() - began)
                assert done.returncode == (2 if name.startswith(("no such", "a wrong")) else 0), (
                    f"{name}: {done.stderr}"
                )
    from importlib.metadata import version

    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}")
    print(f"{'':22}{'seconds':>9}{'spread':>8}   median of {arguments.trials}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:22}{median:9.3f}{(max(values) - min(values)) / median:8.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
