#!/usr/bin/env python3
"""Runs a batch: a file of shell jobs, one a line, from the current folder.

    bin/launch.py results/tune_lr/batch.sh
    bin/launch.py results/tune_lr/batch.sh --workers 4 --retry 1
    bin/launch.py results/tune_lr/batch.sh --gpus 0,1 --frozen
    bin/launch.py results/tune_lr/batch.sh --slurm "--partition=gpu --time=8:00:00" --workers 8

What is finished is not run again: a line that calls bin/train.py when its run folder says so, another one when it has
ended with exit code 0. Several launchers may share a batch. Ctrl-C or SIGTERM stops every job at its next step, with
everything saved; a second Ctrl-C stops at once; the same command goes on. What a job prints is in the folder
BATCH.jobs. OMP_NUM_THREADS, if it is set, holds for each job. --slurm submits and returns; with several nodes, GPUs or
--ntasks-per-node in its options a line that calls bin/train.py is started as that many processes by torchrun.

Exit codes: 0 all jobs are finished, or submitted; 1 some are not; 2 refused; 128 + signal stopped on request.
"""

import argparse
import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src import slurm
from src.config import Refused
from src.jobs import Launcher


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch", type=Path, help="the file of jobs, one a line; those that begin with # are skipped")
    parser.add_argument("--workers", type=int, metavar="N", help="jobs at a time; default: what the cores allow")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", type=lambda names: names.split(","), default=[], metavar="0,1",
                       help="one job at a time on each of these, by CUDA_VISIBLE_DEVICES")  # fmt: skip
    where.add_argument("--slurm", metavar="OPTIONS", help="submit to Slurm, with these options of sbatch")
    where.add_argument("--only", metavar="NAME", help="run one job, named as in BATCH.jobs")
    parser.add_argument("--retry", type=int, default=0, metavar="N", help="run a failed job again up to N times")
    parser.add_argument("--frozen", action="store_true", help="run the code as it was at prepare: code.tar.gz")
    # argparse would take the value of --slurm, which begins with --, for an option.
    options = parser.parse_args("\0".join(argv).replace("\0--slurm\0", "\0--slurm=").split("\0")[1:])
    if "" in options.gpus or (options.workers is not None and (options.workers < 1 or options.gpus)):
        parser.error("give --gpus the name of each GPU, such as 0,1, or --workers a number of jobs at a time, from 1")
    try:
        if options.slurm is not None:
            slurm.submit(options.batch, options)
            return 0
        starter = slurm.torchrun() if options.only else ""
        return asyncio.run(Launcher(options.batch, options, starter).run())
    except (Refused, OSError) as error:  # the latter: who read what is printed is gone, or the disk is full
        print(f"launch.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
