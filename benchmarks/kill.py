#!/usr/bin/env python3
"""Kills bin/train.py at random moments, continues it, and compares it with runs that were left alone.

    benchmarks/kill.py --kills 200        # prints "200/200 identical"
    benchmarks/kill.py --kills 10 --seed 7 --case adam

Each case is trained once undisturbed. Then it is trained again and again: started with reload=True, killed
by SIGKILL, KILLS_A_RUN times, and left to finish. Weights, optimizer, history and test metrics have to be the
same, to the bit; else none of these kills counts as identical. Five kills of six come while it trains,
validates, commits or tests, the others while it starts. Exit code 1 if any differs.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.config import ROOT
from src.results import TIMES, load_history

KILLS_A_RUN = 5
COMMON = """
training_loop.data = @digits
digits.padding = 1
training_loop.model = @SimpleCNN
SimpleCNN.n_filters = [8, 8]
SimpleCNN.n_dense = 32
SimpleCNN.dropout = 0.3
training_loop.batch_size = 8
training_loop.n_epochs = 6
"""
CASES = {
    "momentum": """
training_loop.optimizer = @SGD
SGD.momentum = 0.9
training_loop.callbacks = [@LRSchedule, @ReduceLROnPlateau]
LRSchedule.base_lr = 0.02
LRSchedule.schedule = [[2, 1.0], [4, 0.3], [6, 0.1]]
training_loop.commit_every = 40
""",
    "adam": """
training_loop.optimizer = @Adam
Adam.lr = 0.003
training_loop.accumulate = 3
training_loop.commit_every = 20
training_loop.callbacks = [@WarmupCosine, @EarlyStopping]
WarmupCosine.total_steps = 270
WarmupCosine.warmup_steps = 20
EarlyStopping.patience = 2
""",
    "workers": """
training_loop.data = @image_folder
image_folder.folder = 'digits'
image_folder.size = 8
training_loop.n_workers = 2
training_loop.optimizer = @SGD
SGD.lr = 0.02
SGD.momentum = 0.9
training_loop.commit_every = '0.01min'
training_loop.n_epochs = 4
""",
}


def difference(a: Any, b: Any, place: str = "") -> str | None:
    """Where two checkpoints or lists of results differ first, but for times and speeds; or None."""
    import torch

    if type(a) is not type(b):
        return place
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    elif isinstance(a, dict | list | tuple):
        if len(a) != len(b) or (isinstance(a, dict) and a.keys() != b.keys()):
            return place
        keys = [key for key in a if key not in TIMES] if isinstance(a, dict) else range(len(a))
        return next((found for key in keys if (found := difference(a[key], b[key], f"{place}/{key}"))), None)
    else:
        same = a == b or (a != a and b != b)
    return None if same else place


def run_difference(a: Path, b: Path) -> str | None:
    """Where two finished runs differ first: last commit, best weights, history, test metrics."""
    from src.run import read_checkpoint

    def content(run: Path) -> dict[str, Any]:
        files = {name: read_checkpoint(run / name) for name in ("checkpoint.pt", "best.pt")}
        return files | {"history": load_history(run), "test": json.loads((run / "eval_results.json").read_text())}

    return difference(content(a), content(b))


def write_images(folder: Path) -> None:
    """The digits as PNG files, in a folder for each class."""
    from PIL import Image

    from src.data.digits import read

    x, y = read()
    for k, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).byte().numpy()).save(folder / str(label) / f"{k}.png")


def train(run: Path, config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "bin/train.py"), str(run), str(config), "-b", "training_loop.reload=True"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DATA_DIR": str(config.parent)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def starts(run: Path) -> int:
    """How often the run has begun to train."""
    meta = run / "meta.json"
    return len(json.loads(meta.read_text())["starts"]) if meta.exists() else 0


def kill_once(run: Path, config: Path, dice: random.Random, startup: float, training: float) -> bool:
    """Starts the run and kills it at a random moment; False if it was finished before."""
    process, before = train(run, config), starts(run)
    if dice.random() < 1 / 6:
        time.sleep(dice.uniform(0, startup))
    else:
        while process.poll() is None and starts(run) == before:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, training))
    finished = process.poll() is not None
    process.kill()
    process.wait()
    return not finished


def undisturbed(run: Path, config: Path) -> tuple[float, float]:
    """Trains to the end; seconds until the training began, and from then on."""
    began, process = time.monotonic(), train(run, config)
    while process.poll() is None and not starts(run):
        time.sleep(0.005)
    startup = time.monotonic() - began
    assert process.wait() == 0, (run / "stderr.txt").read_text() if run.exists() else "it did not start"
    return startup, time.monotonic() - began - startup


def attempt(run: Path, config: Path, n_kills: int, dice: random.Random, times: tuple[float, float]) -> str | None:
    """Kills the training of one run after another, until so many kills are made; the first difference."""
    killed = number = 0
    while killed < n_kills:
        number += 1
        part = run.with_name(f"{run.name}-{number}")
        while killed < n_kills and kill_once(part, config, dice, *times):
            killed += 1
        train(part, config).wait()
        if found := run_difference(config.with_suffix(""), part):
            return found
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the moments; printed")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    identical = 0
    cases = arguments.case or list(CASES)
    with tempfile.TemporaryDirectory(prefix="kill.") as name, ThreadPoolExecutor(arguments.jobs) as pool:
        folder = Path(name)
        write_images(folder / "digits")
        for case in cases:
            (folder / f"{case}.gin").write_text(COMMON + CASES[case])
        times = dict(zip(cases, pool.map(lambda c: undisturbed(folder / c, folder / f"{c}.gin"), cases), strict=True))
        work = []
        for number, done in enumerate(range(0, arguments.kills, KILLS_A_RUN)):
            case, n_kills = cases[number % len(cases)], min(KILLS_A_RUN, arguments.kills - done)
            dice = random.Random(f"{arguments.seed} {number}")
            part = folder / f"{case}-{number}", folder / f"{case}.gin", n_kills, dice, times[case]
            work.append((case, n_kills, pool.submit(attempt, *part)))
        for case, n_kills, future in work:
            found = future.result()
            identical += 0 if found else n_kills
            print(f"{case}: {n_kills} kills, {f'differs at {found}' if found else 'identical'}", flush=True)
    print(f"{identical}/{arguments.kills} identical")
    return int(identical < arguments.kills)


if __name__ == "__main__":
    sys.exit(main())
