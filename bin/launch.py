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

from src import jobs, slurm
from src.config import Refused


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch", help="the file of jobs; empty lines and those that begin with # are skipped")
    parser.add_argument("--workers", type=int, metavar="N", help="jobs at a time; default: what the cores allow")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", metavar="0,1", help="one job at a time on each of these, by CUDA_VISIBLE_DEVICES")
    where.add_argument("--slurm", metavar="OPTIONS", help="submit to Slurm, with these options of sbatch")
    where.add_argument("--only", metavar="NAME", help="run one job, named as in BATCH.jobs, unless it runs elsewhere")
    parser.add_argument("--retry", type=int, default=0, metavar="N", help="run a failed job again up to N times")
    parser.add_argument("--frozen", action="store_true", help="run the code as it was at prepare: code.tar.gz")
    arguments = parser.parse_args(slurm.joined(argv)[1:])
    gpus = None if arguments.gpus is None else arguments.gpus.split(",")
    batch, options = arguments.batch, {"retry": arguments.retry, "frozen": arguments.frozen}
    try:
        if arguments.slurm is not None:
            return slurm.submit(batch, arguments.slurm, at_a_time=arguments.workers, **options)
        if arguments.only is not None:
            return jobs.launch(batch, workers=1, only=arguments.only, starter=slurm.torchrun(), **options)
        return jobs.launch(batch, workers=arguments.workers, gpus=gpus, **options)
    except Refused as refusal:
        print(f"launch.py: {refusal.message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
