#!/usr/bin/env python3
"""Trains what the configs say, into a run folder of its own, and tests the best weights.

    bin/train.py results/first configs/cnn.gin
    bin/train.py results/first configs/cnn.gin -b "training_loop.n_epochs=5;training_loop.reload=True"
    bin/train.py results/try configs/cnn.gin configs/debug.gin -b "SGD.lr=0.1"

Exit codes: 0 finished; 1 the run failed; 2 refused, and nothing was created or changed;
128 + signal stopped on request, with everything saved.
"""

import argparse
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src import config
from src.output import Output
from src.run import Run
from src.stop import Stopped, StopRequest


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", help="the run's folder, made if it is not there")
    parser.add_argument("config", nargs="+", help="gin files, layered: later ones win")
    parser.add_argument("-b", "--bindings", action="append", default=[], help="\"a.x=1;b.y='z'\": win over the files")
    parser.add_argument("--profile", action="store_true", help="write a trace of 20 steps into the run's folder")
    arguments = parser.parse_args(argv[1:])
    try:
        run = Run(arguments.run_dir, config.read(arguments.config, arguments.bindings), argv)
    except config.Refused as refusal:
        print(f"train.py: {refusal.message}", file=sys.stderr)
        return refusal.exit_code
    run.output, run.profile = Output(), arguments.profile
    stop = StopRequest()
    status, code, message = "failed", 1, ""
    try:
        train(run, stop)
        stop.ignore()
        status, code = "finished", 0
    except (Exception, Stopped, SystemExit) as error:
        stop.ignore()
        said = str(error) if hasattr(error, "exit_code") else run.why_lost(error)  # else it is a bug
        message = f"train.py: {said}" if said else traceback.format_exc()
        status, code = getattr(error, "status", status), getattr(error, "exit_code", code)
    return run.close(status, code, message)


def train(run: Run, stop: StopRequest) -> None:
    import gin

    from src import results, training_loop

    run.config = training_loop.configure(run.settings)
    for warning in run.config.warnings:
        run.warn(warning)
    run.config.apply()
    data = training_loop.training_loop(run, stop, **gin.get_bindings("training_loop"))
    results.test_once(run.path, data)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
