#!/usr/bin/env python3
"""Tunes the learning rate of the small CNN: which rate is best, over seeds, and is it better than the next?

    experiments/tune_lr/main.py prepare --size small     # writes configs and batch.sh
    experiments/tune_lr/main.py run --size small         # Ctrl-C pauses; the same command goes on
    experiments/tune_lr/main.py run --size large --slurm "--partition=gpu --time=8:00:00" --workers 8
    experiments/tune_lr/main.py status --size small
    experiments/tune_lr/main.py report --size small      # table, plots and report.html

small: digits, offline, a minute on 2 cores. large: CIFAR-10. To start another experiment, copy this folder and
change base.gin and what stands below the imports.

Exit codes: 0 done; 1 a job failed; 2 refused; 128 + signal paused on request.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from src import grid, jobs, slurm
from src.config import Refused
from src.results import load_config, load_history

AXIS, LABEL = "SGD.lr", "learning rate"
SIZES: dict[str, dict[str, Sequence[Any]]] = {
    "small": {
        "training_loop.data": ["@digits"],
        "training_loop.n_epochs": [10],
        "training_loop.batch_size": [64],
        AXIS: [0.001, 0.03, 1.0],
        "training_loop.seed": [0, 1, 2],
    },
    "large": {
        "training_loop.data": ["@cifar10"],
        "training_loop.n_epochs": [30],
        AXIS: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0],
        "training_loop.seed": [0, 1, 2, 3, 4],
    },
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write configs and batch.sh")
    run = commands.add_parser("run", help="run what is not finished")
    status = commands.add_parser("status", help="a table of the jobs")
    report = commands.add_parser("report", help="table, plots and verdict")
    slurm.add_options(run)
    status.add_argument("--every", type=float, metavar="SECONDS", help="refresh until all are finished")
    report.add_argument("--json", action="store_true", help="print it as JSON")
    for command in (prepare, run, status, report):
        command.add_argument("--size", choices=SIZES, default="small")
        command.add_argument("--folder", type=Path, help=f"default: {HERE.name}/SIZE in $RESULTS_DIR, or in results")
    arguments = parser.parse_args(slurm.joined(argv)[1:])
    results = Path(os.environ.get("RESULTS_DIR", ROOT / "results"))
    folder = (arguments.folder or results / HERE.name / arguments.size).absolute()
    os.chdir(ROOT)  # where the lines of batch.sh are to be run
    folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    batch = folder / "batch.sh"
    try:
        if arguments.command == "prepare":
            if strange := [v for size in SIZES.values() for v in size[AXIS] if type(v) not in (int, float)]:
                raise Refused(f"AXIS {AXIS} has the value {strange[0]!r}: the report compares numbers")
            grid.prepare(folder, (HERE / "base.gin").read_text(encoding="utf-8"), SIZES[arguments.size])
            print(f"{batch}: {len(jobs.read_batch(batch))} jobs")
        elif not batch.exists():
            raise Refused(f"{folder}: has no batch.sh: write it with main.py prepare")
        elif arguments.command == "run":
            return slurm.run(batch, arguments)
        elif arguments.command == "status":
            with suppress(KeyboardInterrupt):
                show_status(batch, arguments.every)
        else:
            import report as reporting  # pandas and matplotlib take a second

            reporting.report(folder, AXIS, LABEL, as_json=arguments.json)
    except (Refused, OSError) as error:
        print(f"main.py: {error}", file=sys.stderr)
        return 2
    return 0


def show_status(batch: Path, every: float | None) -> None:
    """Prints the table of jobs, again and again if `every` is given, until all are finished."""
    while True:
        states = [(job, jobs.state(job)) for job in jobs.read_batch(batch)]
        rows = [f"{state:9} {progress(job.run, state) if job.run else '':38} {job}" for job, state in states]
        clear = "\x1b[H\x1b[2J" if every and sys.stdout.isatty() else ""
        print(clear + "\n".join(rows), flush=True)
        if not every or every < 0 or all(state == "finished" for _, state in states):
            return
        time.sleep(every)


def progress(run: Path, state: str) -> str:
    """Epochs, images a second and, by the last epoch's time, what is left of a run; of a failed one its last words."""
    try:
        if state == "failed":
            return (run / "stderr.txt").read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        history, n_epochs = load_history(run), int(load_config(run)["training_loop.n_epochs"])
        done = f"epoch {len(history)}/{n_epochs}"
        if state not in ("running", "stalled") or not history:
            return done
        left = (n_epochs - len(history)) * history[-1]["time"]
        return f"{done}  {history[-1]['images_per_s']:,.0f} images/s  {left:.0f} s left"
    except (Refused, OSError, KeyError, ValueError):  # not begun, or damaged: the state says which
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv))
