#!/usr/bin/env python3
"""Trains what the configs say, into a run folder of its own, and tests the best weights.

    bin/train.py results/first configs/cnn.gin
    bin/train.py results/first configs/cnn.gin -b "training_loop.n_epochs=5;training_loop.reload=True"
    bin/train.py results/try configs/cnn.gin configs/debug.gin -b "SGD.lr=0.1"

Exit codes: 0 finished; 1 the run failed; 2 refused, and nothing was created or changed;
128 + signal stopped on request, with everything saved.
"""

import argparse
import json
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src import config
from src.output import Output
from src.run import Run, write


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", help="the run's folder, made if it is not there")
    parser.add_argument("config", nargs="+", help="gin files, layered: later ones win")
    parser.add_argument("-b", "--bindings", action="append", default=[], help="\"a.x=1;b.y='z'\": win over the files")
    arguments = parser.parse_args(argv[1:])
    try:
        settings = config.read(arguments.config, arguments.bindings)
        reload = settings.last("training_loop.reload", False) is True
        run = Run(arguments.run_dir, reload=reload, settings=settings, command=argv)
    except config.Refused as refusal:
        return refused(refusal)
    run.output = Output()
    try:
        return train(run)
    finally:
        run.output.close()


def train(run: Run) -> int:
    import gin

    from src import results, training_loop
    from src.training_loop import NonFinite, Stopped

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    for number in training_loop.STOP_SIGNALS:  # the loop itself commits first
        signal.signal(number, stop)
    status, code = "failed", 1
    try:
        assert run.settings is not None
        run.config = training_loop.configure(run.settings)
        for warning in run.config.warnings:
            run.warn(warning)
        run.config.apply()
        data = training_loop.training_loop(run, **gin.get_bindings("training_loop"))
        if not (run.path / "eval_results.json").exists():
            metrics, _ = results.evaluate(run.path, "test", data)
            write(run.path / "eval_results.json", json.dumps(metrics, indent=2) + "\n")
            print("test  " + results.one_line(metrics))
        status, code = "finished", 0
    except config.Refused as refusal:
        code = refused(refusal)
    except Stopped as stopped:
        status, code = "stopped", stopped.exit_code
        print(f"{run.path}: stopped by {stopped}", file=sys.stderr)
    except KeyboardInterrupt:
        status, code = "stopped", 128 + signal.SIGINT
    except NonFinite as error:
        print(f"{run.path}: {error}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    run.close(status, code)
    return code


def refused(refusal: config.Refused) -> int:
    print(f"train.py: {refusal.message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
