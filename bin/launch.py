#!/usr/bin/env python3
"""Runs a batch: a file of shell jobs, one a line, from the current folder.

    bin/launch.py results/tune_lr/batch.sh
    bin/launch.py results/tune_lr/batch.sh --workers 4 --retry 1
    bin/launch.py results/tune_lr/batch.sh --gpus 0,1 --frozen
    bin/launch.py results/tune_lr/batch.sh --slurm "--partition=gpu --time=8:00:00" --workers 8

Jobs that are finished are not run again: a line that calls bin/train.py when its run folder says so, another one
when it has ended with exit code 0. Several launchers may share a batch. Ctrl-C or SIGTERM stops every job at its
next step, with everything saved; a second Ctrl-C stops at once; the same command goes on. What a job prints is
in the folder BATCH.jobs. OMP_NUM_THREADS, if it is set, holds for each job. --slurm submits what is not finished and
returns; scancel stops it, with everything saved. With several nodes, GPUs or --ntasks-per-node in its options each
job is started as that many processes by torchrun.

Exit codes: 0 all jobs are finished, or submitted; 1 some are not; 2 refused; 128 + signal stopped on request.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src import slurm
from src.config import Refused


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch", help="the file of jobs; empty lines and those that begin with # are skipped")
    slurm.add_options(parser)
    arguments = parser.parse_args(slurm.joined(argv)[1:])
    try:
        return slurm.run(arguments.batch, arguments)
    except (Refused, OSError) as error:  # the latter: who read what is printed is gone, or the disk is full
        print(f"launch.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
