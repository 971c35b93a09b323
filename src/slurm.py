"""Submits a batch to Slurm: an array of tasks, each of which runs one job by bin/launch.py on its node.

What no task has finished goes back into the queue by itself when its time is up or its node is taken, and goes on;
what was stopped or failed is submitted again by the same command. Accounting (sacct) is not needed.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from src.config import ROOT, Refused
from src.jobs import frozen_code, launch, read_batch, state

# Slurm sends SIGUSR1 to the shell so long before the time limit; it passes it on, and asks for another go.
SCRIPT = """#!/usr/bin/env bash
# Task k of the array runs job k of {batch}.
jobs=({jobs})
trap 'kill -USR1 $launcher' USR1
trap 'kill -TERM $launcher' TERM
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}}
{launch} --only "${{jobs[SLURM_ARRAY_TASK_ID]}}" &
launcher=$!
while wait $launcher; code=$?; kill -0 $launcher 2> /dev/null; do :; done # a trap ends a wait
[ $code != 138 ] || scontrol requeue "$SLURM_JOB_ID"
exit $code
"""
WARNING = "--signal=B:USR1@120"  # seconds
# A SIGTERM makes srun kill all at once; a SIGUSR1 it passes on, and so does torchrun, when it is told to.
KEEP = 'trap "kill -USR1 \\$srun" INT TERM; setsid srun "$@" & srun=$!; '
KEEP += "while wait $srun; code=$?; kill -0 $srun 2> /dev/null; do :; done; exit $code"
# Without the second, agents would meet again at the addresses of before a restart.
VARIABLES = "TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
SRUN = f"env {VARIABLES} bash -c {shlex.quote(KEEP)} srun"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of who runs batches; `run` reads them."""
    parser.add_argument("--workers", type=int, metavar="N", help="jobs at a time; default: what the cores allow")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", metavar="0,1", help="one job at a time on each of these, by CUDA_VISIBLE_DEVICES")
    where.add_argument("--slurm", metavar="OPTIONS", help="submit to Slurm, with these options of sbatch")
    where.add_argument("--only", metavar="NAME", help="run one job, named as in BATCH.jobs, unless it runs elsewhere")
    parser.add_argument("--retry", type=int, default=0, metavar="N", help="run a failed job again up to N times")
    parser.add_argument("--frozen", action="store_true", help="run the code as it was at prepare: code.tar.gz")


def joined(argv: Sequence[str]) -> list[str]:
    """The arguments with --slurm=OPTIONS for --slurm OPTIONS, whose value argparse would take for an option."""
    return "\0".join(argv).replace("\0--slurm\0", "\0--slurm=").split("\0")


def run(batch: str | Path, options: argparse.Namespace) -> int:
    """Launches or submits the batch as the options say, and returns the exit code. Raises Refused."""
    if options.workers is not None and options.workers < 1:
        raise Refused(f"--workers {options.workers}: give a number of jobs at a time, from 1")
    if options.retry < 0:
        raise Refused(f"--retry {options.retry}: give a number of times, from 0")
    if options.slurm is not None:
        _submit(Path(batch).absolute(), options)  # as it is known to the nodes
        return 0
    gpus = None if options.gpus is None else options.gpus.split(",")
    workers, starter = (1, torchrun()) if options.only else (options.workers, "")
    how = {"retry": options.retry, "frozen": options.frozen, "only": options.only, "starter": starter}
    return launch(batch, workers=workers, gpus=gpus, **how)


def _submit(batch: Path, options: argparse.Namespace) -> None:
    """Submits the jobs that are neither finished nor in the queue already; --workers limits how many run at once.

    Tasks run in the current folder, and the nodes must see the batch's. What --slurm says wins over what is chosen
    here. Raises Refused, with nothing submitted, for an unfit batch or argument, or if Slurm refuses.
    """
    jobs = read_batch(batch)
    try:
        words = shlex.split(options.slurm)
    except ValueError as error:
        raise Refused(f"--slurm {options.slurm}: {str(error).lower()}") from None
    if not all(map(shutil.which, ("sbatch", "squeue", "scontrol"))):
        raise Refused("--slurm: there is no sbatch on PATH, or no squeue or scontrol: call it where jobs are submitted")
    folder = jobs[0].path.parent
    largest = int(_ask("scontrol", "show", "config").partition("MaxArraySize")[2].split()[1])
    queued = _queued(folder)
    todo = [job for job in jobs if job.path.name not in queued and state(job) != "finished"]
    print(f"{len(todo)} of {len(jobs)} jobs to submit, {len(queued)} are in the queue", flush=True)
    if not todo:
        return
    _ask("sbatch", "--test-only", *words, script="#!/bin/sh\n")  # refuses what it does not take
    launcher = [sys.executable, str(ROOT / "bin/launch.py"), str(batch), f"--retry={options.retry}"]
    if options.frozen:
        frozen_code(batch)
        launcher.append("--frozen")
    folder.mkdir(exist_ok=True)
    common = ["sbatch", "--parsable", f"--job-name={batch.name}", "--requeue", "--open-mode=append", WARNING]
    common.append(f"--output={str(folder).replace('%', '%%')}/slurm.%A_%a.log")
    limit = f"%{options.workers}" if options.workers else ""
    before = ":".join(sorted(set(queued.values())))
    for first in range(0, len(todo), largest):
        names = [job.path.name for job in todo[first : first + largest]]
        command = [*common, f"--array=0-{len(names) - 1}{limit}"]
        if before and limit:  # so that it holds for all of them together
            command.append(f"--dependency=afterany:{before}")
        script = SCRIPT.format(batch=batch, jobs=" ".join(names), launch=shlex.join(launcher))
        before = _ask(*command, *words, script=script).strip().partition(";")[0]
        (folder / f"slurm.{before}").write_text("".join(f"{name}\n" for name in names))
        print(f"array {before}: {len(names)} jobs; scancel {before} stops them with everything saved", flush=True)


def _ask(*command: str, script: str | None = None) -> str:
    """What a command of Slurm's prints. Raises Refused if it fails."""
    done = subprocess.run(command, input=script, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _queued(folder: Path) -> dict[str, str]:
    """Names of the jobs that wait or run in arrays which were submitted before, and these arrays."""
    found = {}
    for task in _ask("squeue", "--me", "--noheader", "--array", "--format=%F.%K").split():
        array, _, k = task.partition(".")
        names = folder / f"slurm.{array}"
        if k.isdecimal() and names.exists():
            found[names.read_text().split()[int(k)]] = array
    return found


def torchrun() -> str:
    """What starts a program as the processes that the task's allocation has room for, or "" for one process.

    On nodes with GPUs a process for each; without, one for each of Slurm's tasks (--ntasks, --ntasks-per-node).
    """
    nodes, gpus = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)), int(os.environ.get("SLURM_GPUS_ON_NODE", 0))
    agents, processes = (nodes, gpus) if gpus else (int(os.environ.get("SLURM_NTASKS", nodes)), 1)
    if agents == 1:
        return f"torchrun --standalone --nproc-per-node={processes}" if processes > 1 else ""
    job = os.environ["SLURM_JOB_ID"]
    head = _ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()[0]
    rendezvous = f"--rdzv-backend=c10d --rdzv-endpoint={head}:{20000 + int(job) % 20000} --rdzv-id={job}"
    srun = f"--nodes={nodes} --ntasks={agents} --ntasks-per-node={agents // nodes} --kill-on-bad-exit=0"
    return f"{SRUN} {srun} torchrun --nnodes={agents} --nproc-per-node={processes} {rendezvous}"
