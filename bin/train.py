#!/usr/bin/env python3
"""Trains what the configs say, into a run folder of its own, and tests the best weights.

    bin/train.py results/first configs/cnn.gin
    bin/train.py results/first configs/cnn.gin -b "training_loop.n_epochs=5;training_loop.reload=True"
    bin/train.py results/try configs/cnn.gin configs/debug.gin -b "SGD.lr=0.1"
    torchrun --nproc-per-node 2 bin/train.py results/two configs/cnn.gin

Exit codes: 0 finished; 1 the run failed; 2 refused, and nothing was created or changed;
128 + signal stopped on request, with everything saved.
"""

import argparse
import os
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src import config
from src.output import Output
from src.run import Run, Shadow
from src.stop import Stopped, StopRequest


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", help="the run's folder, made if it is not there")
    parser.add_argument("config", nargs="+", help="gin files, layered: later ones win")
    parser.add_argument("-b", "--bindings", action="append", default=[], help="\"a.x=1;b.y='z'\": win over the files")
    parser.add_argument("--profile", action="store_true", help="write a trace of 20 steps into the run's folder")
    arguments = parser.parse_args(argv[1:])
    rank = int(os.environ.get("RANK", 0))  # torchrun sets it
    try:
        settings = config.read(arguments.config, arguments.bindings)
        run = (Shadow if rank else Run)(arguments.run_dir, settings, argv)
    except (config.Refused, OSError) as refusal:  # the latter: the folder cannot be looked at
        if rank == 0:
            print(f"train.py: {refusal}", file=sys.stderr)
        return 2
    run.output = Output(rank)
    run.profile = arguments.profile and rank == 0
    stop, status, code, message = StopRequest(), "finished", 0, ""
    try:
        train(run, stop)
        stop.ignore()
    except (Exception, Stopped, SystemExit) as error:
        stop.ignore()
        status, code = getattr(error, "status", "failed"), getattr(error, "exit_code", 1)
        said = str(error) if hasattr(error, "exit_code") else run.why_lost(error)  # else it is a bug
        message = f"train.py: {said}" if said else traceback.format_exc()
    return run.close(status, code, message)


def train(run: Run, stop: StopRequest) -> None:
    import gin

    from src import results, training_loop
    from src.distributed import Team

    run.config = training_loop.configure(run.settings)
    for warning in run.config.warnings:
        run.warn(warning)
    run.config.apply()
    team = Team(run.output.rank, int(os.environ.get("WORLD_SIZE", 1)))
    with team.watching(stop):
        data = training_loop.TrainingLoop(run, stop, team, **gin.get_bindings("training_loop")).train()
    if team.part.rank == 0:
        results.test_once(run.path, data)


if __name__ == "__main__":
    code = main(sys.argv)
    if "RANK" in os.environ:  # gloo's threads may abort a process that takes itself apart
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 2 and os.environ["RANK"] != "0":  # torchrun ends all once one has ended, and the first says why
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        os._exit(code)
    sys.exit(code)
