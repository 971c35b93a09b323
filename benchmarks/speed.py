#!/usr/bin/env python3
"""Seconds an epoch and microseconds a step, side by side: a bare loop, this project, Poutyne, Lightning.

    benchmarks/speed.py                    # both tables
    benchmarks/speed.py --only step        # one of them; without the peers: --peers none

Epoch: the small CNN on 12,800 images of CIFAR-10's shape, crop, flip and validation; one process a trial, from the
second epoch on; bin/train.py with records, TensorBoard, commits and heartbeat on. Poutyne and Lightning as
their documentation shows them: a DataLoader of PIL transforms, here with 0 or 2 workers, whichever loads faster.
Step: one thread, MLPs with the batch size that makes a bare step take 0.5 and 5 ms; loops that keep nothing,
that keep loss and accuracy, Poutyne, this project. Trials are interleaved; medians, the spread as (max - min) / median,
and the median of the ratios within a round, which a machine's slower minutes leave alone.
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


def epoch_cost(name: str, n_train: int, folder: Path) -> tuple[float, float]:
    """Median seconds of the epochs but the first, validation included, and peak MB, of one process."""
    run = folder / f"run{time.monotonic_ns()}"
    if name == "this":
        config = folder / "cnn.gin"
        config.write_text(CNN.format(n_train=n_train, n_epochs=EPOCHS))
        command = [str(ROOT / "bin/train.py"), str(run), str(config)]
    else:
        module = ("benchmarks.bare",) if name == "bare" else ("benchmarks.peers", name)
        command = ["-m", *module, str(n_train), str(EPOCHS)]
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
    )
    assert process.stdout
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{name} failed:\n{printed}"
    if name == "this":
        seconds = times_between_epochs(run)
    else:
        seconds = [float(line.split()[0]) for line in printed.splitlines() if line[:1].isdigit()][1:]
    return statistics.median(seconds), usage.ru_maxrss / 1e3


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
        layers: list[nn.Module] = [nn.Flatten()]  # as in src/models/mlp.py
        for n_in in (64, width):
            layers += [nn.Linear(n_in, width), nn.ReLU(), nn.Dropout(0.0)]
        return nn.Sequential(*layers, nn.Linear(width, 10))

    def bare(keep: bool) -> float:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
        losses, right = [], []
        began = time.perf_counter()
        for rows in torch.randperm(n).split(batch):
            xb, yb = x.index_select(0, rows), y.index_select(0, rows)
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
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainer = poutyne.Model(model, optimizer, "cross_entropy", batch_metrics=["accuracy"])
        began = time.perf_counter()
        trainer.fit_generator(loader, epochs=1, verbose=False)
        return (time.perf_counter() - began) / n_steps

    config = folder / f"mlp{width}.gin"
    config.write_text(MLP.format(n_train=n, width=width, batch=batch))

    def this() -> float:
        from bin.train import main  # type: ignore[import-not-found]
        from src.results import load_history

        run = folder / f"mlp{time.monotonic_ns()}"
        terminal, silence = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        code = main(["train.py", str(run), str(config)])
        os.dup2(terminal, 1)
        os.close(terminal), os.close(silence)
        assert code == 0
        return batch / load_history(run)[0]["images_per_s"]

    return {"bare": lambda: bare(False), KEEPS: lambda: bare(True), "this": this, "poutyne": usual_poutyne}


def batch_of(seconds: float, width: int, folder: Path) -> int:
    """The batch size with which a bare step takes so long on this machine."""
    sizes = (64, 256)
    small, large = (statistics.median(step_loops(width, n, 100, folder)["bare"]() for _ in range(5)) for n in sizes)
    batch = sizes[0] + (seconds - small) / (large - small) * (sizes[1] - sizes[0])
    return max(round(batch), 16)  # on a busy machine the line through two noisy points may lead anywhere


def ratio(values: list[float], base: list[float]) -> float:
    """Median of the ratios to the base's trial beside it."""
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def report(title: str, unit: str, times: dict[str, list[float]], base: str) -> None:
    """Prints median, spread and ratio of each."""
    print(f"\n{title}\n{'':22}{unit:>10}{'spread':>9}{'ratio':>8}")
    for name, values in times.items():
        median = statistics.median(values)
        spread = (max(values) - min(values)) / median
        print(f"{name:22}{median:10.4g}{spread:9.0%}{ratio(values, times[base]):8.3f}", flush=True)


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
            memory: dict[str, list[float]] = {name: [] for name in times}
            for _ in range(arguments.trials):
                for contender in times:
                    seconds, peak = epoch_cost(contender, arguments.images, folder)
                    times[contender].append(seconds)
                    memory[contender].append(peak)
            report(f"epoch of {arguments.images} images, {arguments.trials} trials", "seconds", times, "bare")
            report("peak memory of the same processes", "MB", memory, "bare")
        if arguments.only != "epoch":
            torch.set_num_threads(1)
            for aim, width, n_steps in ((0.5, 128, 2000), (5, 640, 200)):
                batch = batch_of(1e-3 * aim, width, folder)
                loops = step_loops(width, batch, n_steps, folder)
                times = {contender: [] for contender in loops}
                for _ in range(2 * arguments.trials + 1):
                    for contender, loop in loops.items():
                        times[contender].append(1e6 * loop())
                report(f"step of {aim} ms, batch {batch}, {2 * arguments.trials + 1} trials", "us", times, KEEPS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
