#!/usr/bin/env python3
"""What grows, and what must not: cost an image with the data, memory with the epochs, bin/runs.py with the runs.

    benchmarks/growth.py                     # about 8 minutes on 2 cores, 2 GB of memory
    benchmarks/growth.py --only runs         # or images, epochs

images: microseconds an image of bin/train.py, from the second epoch on, a small network on 10,000 to 200,000 images of
CIFAR-10's shape; sizes interleaved, medians, and the median of the ratios to the smallest in a round. epochs: the
process's peak memory after 10 and after 100 epochs. runs: seconds of bin/runs.py over copies of one finished run.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed import ratio
from src.config import ROOT
from src.results import load_history

SIZES = (10_000, 50_000, 200_000)
CONFIG = """
import benchmarks.synthetic
training_loop.data = @synthetic
training_loop.model = @SimpleCNN
SimpleCNN.n_filters = (8,)
SimpleCNN.n_dense = 16
training_loop.optimizer = @SGD
SGD.lr = 0.05
"""


def train(run: Path, bindings: str) -> list[dict[str, float]]:
    """The history of a run with the config above."""
    config = run.with_suffix(".gin")
    config.write_text(CONFIG)
    command = [sys.executable, str(ROOT / "bin/train.py"), str(run), str(config), "-b", bindings]
    subprocess.run(command, check=True, capture_output=True)
    return load_history(run)


def images(folder: Path, trials: int) -> None:
    costs: dict[int, list[float]] = {size: [] for size in SIZES}
    for trial in range(trials):
        for size in SIZES:
            n_epochs = 1 + max(2, 50_000 // size)
            run = folder / f"images{size}.{trial}"
            history = train(run, f"synthetic.n_train={size}; training_loop.n_epochs={n_epochs}")
            costs[size].append(1e6 / statistics.median(row["images_per_s"] for row in history[1:]))
            shutil.rmtree(run)
    print(f"\ntraining, {trials} trials\n{'images':>10}{'us an image':>14}{'spread':>9}{'ratio':>8}")
    for size, values in costs.items():
        median = statistics.median(values)
        spread = (max(values) - min(values)) / median
        print(f"{size:10,}{median:14.2f}{spread:9.0%}{ratio(values, costs[SIZES[0]]):8.3f}")


def epochs(folder: Path) -> None:
    history = train(folder / "epochs", "synthetic.n_train=1280; synthetic.n_valid=128; training_loop.n_epochs=100")
    print(f"\npeak memory\n{'epochs':>10}{'MB':>14}")
    for epoch in (10, 50, 100):
        print(f"{epoch:10}{history[epoch - 1]['peak_mb']:14.1f}")


def runs(folder: Path, trials: int) -> None:
    train(folder / "one", "synthetic.n_train=1280; synthetic.n_valid=128; training_loop.n_epochs=10")
    for file in [*(folder / "one").glob("*.pt"), *(folder / "one").glob("events*"), folder / "one/code.tar.gz"]:
        file.unlink()  # they are not read, and take gigabytes
    print(f"\nbin/runs.py, {trials} trials\n{'runs':>10}{'seconds':>14}{'spread':>9}")
    for n in (1_000, 10_000):
        for k in range(n):
            shutil.copytree(folder / "one", folder / f"{n}/{k:05}", symlinks=True)
        times = []
        for _ in range(trials):
            began = time.perf_counter()
            command = [sys.executable, str(ROOT / "bin/runs.py"), str(folder / str(n))]
            listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            times.append(time.perf_counter() - began)
            assert listed.count("finished") == n
        median = statistics.median(times)
        print(f"{n:10,}{median:14.2f}{(max(times) - min(times)) / median:9.0%}", flush=True)
        shutil.rmtree(folder / str(n))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("images", "epochs", "runs"))
    parser.add_argument("--trials", type=int, default=7)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="growth.") as name:
        folder = Path(name)
        if arguments.only in (None, "images"):
            images(folder, arguments.trials)
        if arguments.only in (None, "epochs"):
            epochs(folder)
        if arguments.only in (None, "runs"):
            runs(folder, arguments.trials)
    return 0


if __name__ == "__main__":
    sys.exit(main())
