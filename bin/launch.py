#!/usr/bin/env python3
"""Runs a batch: a file of shell jobs, one a line, from the current folder.

    bin/launch.py results/tune_lr/batch.sh
    bin/launch.py results/tune_lr/batch.sh --workers 4 --retry 1
    bin/launch.py results/tune_lr/batch.sh --gpus 0,1 --frozen

Jobs that are finished are not run again: a line that calls bin/train.py when its run folder says so, another one
when it has ended with exit code 0. Several launchers may share a batch. Ctrl-C or SIGTERM stops every job at its
next step, with everything saved; a second Ctrl-C stops at once; the same command goes on. What a job prints is
in the folder BATCH.jobs. OMP_NUM_THREADS, if it is set, holds for each job.

Exit codes: 0 all jobs are finished; 1 some are not; 2 refused; 128 + signal stopped on request.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src import jobs
from src.config import Refused


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch", help="the file of jobs; empty lines and those that begin with # are skipped")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, metavar="N", help="jobs at a time; default: what the cores allow")
    where.add_argument("--gpus", metavar="0,1", help="one job at a time on each of these, by CUDA_VISIBLE_DEVICES")
    parser.add_argument("--retry", type=int, default=0, metavar="N", help="run a failed job again up to N times")
    parser.add_argument("--frozen", action="store_true", help="run the code as it was at prepare: code.tar.gz")
    arguments = parser.parse_args(argv[1:])
    gpus = None if arguments.gpus is None else arguments.gpus.split(",")
    options = {"retry": arguments.retry, "frozen": arguments.frozen}
    try:
        return jobs.launch(arguments.batch, workers=arguments.workers, gpus=gpus, **options)
    except Refused as refusal:
        print(f"launch.py: {refusal.message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
