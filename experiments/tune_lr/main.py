#!/usr/bin/env python3
"""Tunes the learning rate of the small CNN: which rate is best, over seeds, and is it better than the next?

    experiments/tune_lr/main.py prepare --size small     # writes configs and batch.sh
    experiments/tune_lr/main.py run --size small         # Ctrl-C pauses; the same command goes on
    experiments/tune_lr/main.py run --size large --slurm "--partition=gpu" --workers 8     # options of bin/launch.py
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from src import jobs
from src.config import Refused
from src.results import overview

AXIS, LABEL = "SGD.lr", "learning rate"  # what is compared
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
    parser.add_argument("command", choices=["prepare", "run", "status", "report"])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--folder", type=Path, help=f"default: {HERE.name}/SIZE in $RESULTS_DIR, or in results")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="status: refresh until all are finished")
    parser.add_argument("--json", action="store_true", help="report: print it as JSON")
    arguments, others = parser.parse_known_args(argv[1:])
    if others and arguments.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    results = os.environ.get("RESULTS_DIR") or ROOT / "results"
    folder = (arguments.folder or Path(results, HERE.name, arguments.size)).absolute()
    os.chdir(ROOT)  # where the lines of batch.sh are to be run
    folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    batch = folder / "batch.sh"
    try:
        if arguments.command == "prepare":
            from src import grid  # torch takes a second

            settings = SIZES[arguments.size]
            if not all(isinstance(value, int | float) for value in settings[AXIS]):
                raise Refused(f"{AXIS}: has a value that is no number: the report compares numbers")
            if more := [s for s in settings if len(settings[s]) > 1 and s not in (AXIS, "training_loop.seed")]:
                raise Refused(f"{more[0]}: only {AXIS} and the seed may have several values: use a --folder for each")
            grid.prepare(folder, HERE / "base.gin", settings)
            print(f"{batch}: {len(jobs.read_batch(batch))} jobs")
        elif not batch.exists():
            raise Refused(f"{folder}: has no batch.sh: write it with main.py prepare")
        elif arguments.command == "run":
            os.execv(sys.executable, [sys.executable, str(ROOT / "bin/launch.py"), str(batch), *others])
        elif arguments.command == "status":
            show_status(batch, arguments.every)
        else:
            import report as reporting  # pandas and matplotlib take a second

            reporting.report(folder, AXIS, LABEL, as_json=arguments.json)
    except (Refused, OSError) as error:
        print(f"main.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # ends a status that refreshes
        pass
    return 0


def show_status(batch: Path, every: float | None) -> None:
    """Prints the table of jobs; again and again, if `every` (seconds) is given, until all are finished."""
    while True:
        states = {job: jobs.state(job) for job in jobs.read_batch(batch)}
        if every and sys.stdout.isatty():
            print(end="\x1b[H\x1b[2J")
        names = {job: job.run.name if job.run else job.line for job in states}
        width = max(map(len, names.values()), default=0)
        for job, state in states.items():
            done = progress(job.run) if job.run else ""
            print(f"{state:9} {names[job]:{width}}  {done}".rstrip(), flush=True)
        if not every or set(states.values()) == {"finished"}:
            return
        time.sleep(every)


def progress(run: Path) -> str:
    """Epochs and, while it runs, images a second and, by the last epoch's time, the seconds left."""
    seen = overview(run)
    if "config" not in seen:  # not begun, or damaged
        return ""
    done, n_epochs, last = seen["epochs"], int(seen["config"]["training_loop.n_epochs"]), seen["last"]
    if seen["status"] != "running" or not last:
        return f"epoch {done}/{n_epochs}"
    left = (n_epochs - done) * last["time"]
    return f"epoch {done}/{n_epochs}  {last['images_per_s']:,.0f} images/s  {left:.0f} s left"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
