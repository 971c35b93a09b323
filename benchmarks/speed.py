#!/usr/bin/env python3
"""Seconds an epoch and microseconds a step, side by side: a bare loop, this project, Poutyne, Lightning.

    benchmarks/speed.py                    # both tables
    benchmarks/speed.py --only step        # one of them; without the peers: --peers none

Epoch: the small CNN on 12,800 images of CIFAR-10's shape, crop, flip and validation; one process a trial, from the
second epoch on; bin/train.py with records, TensorBoard, commits and heartbeat on. Poutyne and Lightning as
their documentation shows them: a DataLoader of PIL transforms, here with as many workers as is faster, 0 or 2.
Step: one thread, an MLP of 0.5 ms a step, and one of 5 ms; loops that keep nothing, that keep loss and
accuracy, Poutyne, this project. Trials are interleaved; medians; the spread is (max - min) / median.
Peers come by: pip install '.[peers]'.
"""

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.config import ROOT

EPOCHS = 3
KEEPS = "bare, loss and acc"
CNN = """
import benchmarks.synthetic
training_loop.data = @synthetic
synthetic.n_train = {n_train}
training_loop.model = @SimpleCNN
training_loop.optimizer = @SGD
SGD.lr = 0.05
SGD.momentum = 0.9
SGD.weight_decay = 5e-4
training_loop.n_epochs = {n_epochs}
"""
MLP = """
import benchmarks.synthetic
training_loop.data = @synthetic
synthetic.n_train = {n_train}
synthetic.shape = (64,)
training_loop.model = @MLP
MLP.n_hidden = ({width}, {width})
training_loop.optimizer = @SGD
SGD.lr = 0.01
training_loop.batch_size = {batch}
training_loop.n_epochs = 1
"""


def epoch_seconds(name: str, n_train: int, folder: Path) -> list[float]:
    """Seconds of each epoch but the first, validation included, of one process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if name == "this":
        config, run = folder / "cnn.gin", folder / f"run{time.monotonic_ns()}"
        config.write_text(CNN.format(n_train=n_train, n_epochs=EPOCHS))
        command = [sys.executable, str(ROOT / "bin/train.py"), str(run), str(config)]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        return times_between_epochs(run)
    module = "benchmarks.bare" if name == "bare" else "benchmarks.peers"
    command = [sys.executable, "-m", module, *(() if name == "bare" else (name,)), str(n_train), str(EPOCHS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=folder)
    return [float(line.split()[0]) for line in done.stdout.splitlines() if line[:1].isdigit()][1:]


def times_between_epochs(run: Path) -> list[float]:
    """From one epoch's record to the next: all that an epoch costs, its commit too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    moments = [point.wall_time for point in events.Scalars("epoch/loss")]
    return [after - before for before, after in itertools.pairwise(moments)]


def step_loops(width: int, batch: int, n_steps: int, folder: Path) -> dict[str, Callable[[], float]]:
    """Loops that train the same MLP in this process; each gives its seconds a step."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from benchmarks.synthetic import images
    from src.callbacks import poutyne

    n = n_steps * batch
    x, y = images(n, (64,))
    x = x.float() / 255

    def network() -> nn.Module:
        layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
        return nn.Sequential(*layers)

    def bare(keep: bool) -> float:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
        losses, right = [], []
        began = time.perf_counter()
        for rows in torch.randperm(n).split(batch):
            xb, yb = x[rows], y[rows]
            loss = F.cross_entropy(output := model(xb), yb)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if keep:
                losses.append(loss.detach())
                right.append((output.detach().argmax(1) == yb).sum())
        if keep:
            torch.stack(losses).mean().item(), torch.stack(right).sum().item()
        return (time.perf_counter() - began) / n_steps

    def usual_poutyne() -> float:
        model = network()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch, shuffle=True)
        trainer = poutyne.Model(model, torch.optim.SGD(model.parameters(), lr=0.01), "cross_entropy", ["accuracy"])
        began = time.perf_counter()
        trainer.fit_generator(loader, epochs=1, verbose=False)
        return (time.perf_counter() - began) / n_steps

    config = folder / f"mlp{width}.gin"
    config.write_text(MLP.format(n_train=n, width=width, batch=batch))

    def this() -> float:
        from bin.train import main  # type: ignore[import-not-found]
        from src.results import load_history

        run = folder / f"mlp{time.monotonic_ns()}"
        assert main(["train.py", str(run), str(config)]) == 0
        return batch / load_history(run)[0]["images_per_s"]

    return {
        "bare": lambda: bare(False),
        "bare, loss and acc": lambda: bare(True),
        "this": this,
        "poutyne": usual_poutyne,
    }


def report(title: str, unit: str, times: dict[str, list[float]], base: str) -> None:
    """Median, spread and the ratio to the base."""
    print(f"\n{title}\n{'':22}{unit:>10}{'spread':>9}{'ratio':>8}")
    reference = statistics.median(times[base])
    for name, values in times.items():
        median = statistics.median(values)
        spread = (max(values) - min(values)) / median
        print(f"{name:22}{median:10.4g}{spread:9.0%}{median / reference:8.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("epoch", "step"))
    parser.add_argument("--trials", type=int, default=7, help="of an epoch; twice as many and one of a step")
    parser.add_argument("--images", type=int, default=12800)
    parser.add_argument("--peers", default="poutyne,lightning", help="names, separated by commas, or none")
    arguments = parser.parse_args()
    import torch

    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory(prefix="speed.") as name:
        folder = Path(name)
        if arguments.only != "step":
            peers = [peer for peer in arguments.peers.split(",") if peer != "none"]
            times: dict[str, list[float]] = {name: [] for name in ("bare", "this", *peers)}
            for _ in range(arguments.trials):
                for contender, values in times.items():
                    values.append(statistics.median(epoch_seconds(contender, arguments.images, folder)))
            report(f"epoch of {arguments.images} images, {arguments.trials} trials", "seconds", times, "bare")
        if arguments.only != "epoch":
            torch.set_num_threads(1)
            for label, width, batch in (("0.5 ms", 256, 128), ("5 ms", 1024, 256)):
                loops = step_loops(width, batch, 600 if label == "0.5 ms" else 60, folder)
                times = {contender: [] for contender in loops}
                for _ in range(2 * arguments.trials + 1):
                    for contender, loop in loops.items():
                        times[contender].append(1e6 * loop())
                report(
                    f"step of {label}, 1 thread, {2 * arguments.trials + 1} trials", "us", times, "bare, loss and acc"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
