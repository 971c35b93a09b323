"""Submits a batch to Slurm: an array of tasks, each of which runs one job by bin/launch.py on its node.

What no task has finished goes back into the queue by itself when its time is up or its node is taken, and goes on;
what was stopped or failed is submitted again by the same command. Accounting (sacct) is not needed.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from src.config import ROOT, Refused
from src.jobs import frozen_code, make_folder, read_batch, state

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


def submit(batch: str | Path, options: str, *, at_a_time: int | None, retry: int, frozen: bool) -> int:
    """Submits the jobs that are neither finished nor in the queue already, and returns 0.

    Args:
        batch: file of jobs, in a folder that the nodes see, too. Tasks run in the current folder.
        options: sbatch's, such as "--partition=gpu --time=8:00:00"; they win over what is chosen here.
        at_a_time: how many tasks of an array may run at once; None: as many as there is room for.
        retry, frozen: as in `jobs.launch`.

    Raises Refused, with nothing submitted, for an unfit batch or argument, or if Slurm refuses.
    """
    batch = Path(batch)
    jobs = read_batch(batch)
    if at_a_time is not None and at_a_time < 1:
        raise Refused(f"--workers {at_a_time}: give a number of jobs at a time, from 1")
    if shutil.which("sbatch") is None:
        raise Refused("--slurm: there is no sbatch on PATH: call it where jobs are submitted to Slurm")
    if frozen:
        frozen_code(batch)
    folder = jobs[0].path.parent
    largest = int(_ask("scontrol", "show", "config").partition("MaxArraySize")[2].split()[1])
    queued = _queued(folder)
    todo = [job for job in jobs if job.path.name not in queued and state(job) != "finished"]
    print(f"{len(todo)} of {len(jobs)} jobs to submit, {len(queued)} are in the queue", flush=True)
    make_folder(folder)
    launch = [sys.executable, str(ROOT / "bin/launch.py"), str(batch), "--retry", str(retry)]
    before = ""
    for first in range(0, len(todo), largest):
        names = [job.path.name for job in todo[first : first + largest]]
        command = ["sbatch", "--parsable", f"--job-name={batch.name}", "--requeue", "--open-mode=append", WARNING]
        command.append(f"--array=0-{len(names) - 1}" + (f"%{at_a_time}" if at_a_time else ""))
        command.append(f"--output={str(folder).replace('%', '%%')}/slurm.%A_%a.log")
        if before:  # so that the limit holds for all of them together
            command.append(f"--dependency=afterany:{before}")
        script = SCRIPT.format(
            batch=str(batch), jobs=" ".join(names), launch=shlex.join(launch + ["--frozen"] * frozen)
        )
        before = _ask(*command, *shlex.split(options), script=script).strip().partition(";")[0]
        (folder / f"slurm.{before}").write_text("".join(f"{name}\n" for name in names))
        print(f"array {before}: {len(names)} jobs; scancel {before} stops them with everything saved", flush=True)
    return 0


def joined(argv: Sequence[str]) -> list[str]:
    """The arguments with --slurm=OPTIONS for --slurm OPTIONS, whose value argparse would take for an option."""
    words = "\0".join(argv)
    return words.replace("\0--slurm\0", "\0--slurm=").split("\0")


def _ask(*command: str, script: str | None = None) -> str:
    """What a command of Slurm's prints. Raises Refused if it fails."""
    done = subprocess.run(command, input=script, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _queued(folder: Path) -> set[str]:
    """Names of the jobs that wait or run in arrays which were submitted before."""
    found = set()
    for task in _ask("squeue", "--me", "--noheader", "--array", "--format=%F.%K").split():
        array, _, k = task.partition(".")
        names = folder / f"slurm.{array}"
        if k.isdecimal() and names.exists():
            found.add(names.read_text().split()[int(k)])
    return found


def torchrun() -> str:
    """What starts a program as the processes that the task's allocation has room for, or "" for one process.

    A process a GPU, or as many as --ntasks-per-node says, on each node.
    """
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    processes = int(os.environ.get("SLURM_GPUS_ON_NODE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)
    if nodes * processes == 1:
        return ""
    job = os.environ["SLURM_JOB_ID"]
    head = _ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()[0]
    port = 20000 + int(job) % 20000
    srun = f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --kill-on-bad-exit=1"
    rendezvous = f"--rdzv-backend=c10d --rdzv-endpoint={head}:{port} --rdzv-id={job}"
    return f"{srun} torchrun --nnodes={nodes} --nproc-per-node={processes} {rendezvous}"
