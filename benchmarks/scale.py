#!/usr/bin/env python3
"""Seconds an epoch of 1, 2 and 4 processes on this machine, beside DistributedDataParallel by hand.

    benchmarks/scale.py --processes 1,2,4 --trials 7      # 20 minutes on 2 cores

The small CNN on images of CIFAR-10's shape, crop, flip and validation, from the second epoch on; by hand: bare.py under
torchrun, which splits each batch and normalises by the rows of each process. Ours is bin/train.py, without and with
sync_batch_norm. All are interleaved; medians, the spread (max - min) / median, and the median of the ratios by hand /
ours within a round. The cores are shared out among the processes. Then what grows with the processes.
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

from benchmarks.speed import CNN, EPOCHS, ratio, times_between_epochs
from src.config import ROOT
from src.results import load_history
from src.run import read_meta


def torchrun(n: int, *command: str, folder: Path) -> str:
    """What the command, run by n processes, prints."""
    starter = [sys.executable]
    if n > 1:
        starter += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    threads = max(1, (os.cpu_count() or 1) // n)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*starter, *command], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def by_hand(n: int, n_train: int, folder: Path) -> float:
    """Median seconds of the epochs but the first."""
    printed = torchrun(n, "-m", "benchmarks.bare", str(n_train), str(EPOCHS), folder=folder)
    return statistics.median([float(line.split()[0]) for line in printed.splitlines() if line[:1].isdigit()][1:])


def ours(n: int, n_train: int, sync: bool, folder: Path) -> Path:
    """The run's folder."""
    config = folder / "cnn.gin"
    config.write_text(CNN.format(n_train=n_train, n_epochs=EPOCHS) + f"training_loop.sync_batch_norm = {sync}\n")
    run = folder / f"run{time.monotonic_ns()}"
    torchrun(n, str(ROOT / "bin/train.py"), str(run), str(config), folder=folder)
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--images", type=int, default=12800)
    arguments = parser.parse_args()
    import torch

    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    print(f"{arguments.images} images an epoch, {arguments.trials} trials")
    print(f"{'processes':>9}  {'':22}{'seconds':>9}{'spread':>9}{'by hand / it':>14}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="scale.") as name:
        folder = Path(name)
        for n in map(int, arguments.processes.split(",")):
            times: dict[str, list[float]] = {"by hand": [], "this": [], "this, sync_batch_norm": []}
            for _ in range(arguments.trials):
                times["by hand"].append(by_hand(n, arguments.images, folder))
                for label, sync in (("this", False), ("this, sync_batch_norm", True)):
                    run = ours(n, arguments.images, sync, folder)
                    times[label].append(statistics.median(times_between_epochs(run)))
            for label, values in times.items():
                median = statistics.median(values)
                spread = (max(values) - min(values)) / median
                print(f"{n:9}  {label:22}{median:9.3f}{spread:9.0%}{ratio(times['by hand'], values):14.3f}", flush=True)
            commit = statistics.median(row["commit_s"] for row in load_history(run)[1:])
            rows.append(
                (
                    n,
                    4 * read_meta(run)["parameters"] if n > 1 else 0,
                    commit,
                    len([f for f in run.iterdir() if f.is_file()]),
                )
            )
    print(f"\n{'processes':>9}{'bytes all-reduced a step':>26}{'commit, s':>11}{'files of a run':>16}")
    for n, size, commit, files in rows:
        print(f"{n:9}{size:26,}{commit:11.4f}{files:16}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
