"""Submits a batch to Slurm: an array of tasks, each of which runs one job by bin/launch.py on its node.

What no task has finished goes back into the queue by itself when its time is up or its node is taken, and goes on;
what was stopped or failed is submitted again by the same command. Accounting (sacct) is not needed.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from src.config import ROOT, Refused
from src.jobs import frozen_code, read_batch, state

# A SIGTERM makes srun kill all at once; a SIGUSR1 it passes on, and so does torchrun, when it is told to.
KEEP = 'trap "kill -USR1 \\$srun" INT TERM; setsid srun "$@" & srun=$!; '
KEEP += "while wait $srun; code=$?; kill -0 $srun 2> /dev/null; do :; done; exit $code"
# Without the second, what torchrun starts again would meet at the old addresses.
VARIABLES = "TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
SRUN = f"env {VARIABLES} bash -c {shlex.quote(KEEP)} srun"


def submit(batch: Path, options: argparse.Namespace) -> None:
    """Submits the jobs that are neither finished nor in the queue, as one array, with the options of bin/launch.py.

    Tasks run in the current folder, and the nodes must see the batch's. What --slurm says wins over what is chosen
    here. Raises Refused, with nothing submitted, for an unfit batch, or if Slurm refuses.
    """
    batch = batch.absolute()  # as it is known to the nodes
    jobs = read_batch(batch)
    tasks = _ask("squeue", "--me", "--noheader", "--array", "--format=%F_%K").split()
    submitted = {job: Path(f"{job.path}.slurm") for job in jobs}  # these files hold the task of each job
    queued = [job for job, file in submitted.items() if file.exists() and file.read_text() in tasks]
    todo = [job for job in jobs if job not in queued and state(job) != "finished"]
    print(f"{len(todo)} of {len(jobs)} jobs to submit, {len(queued)} are in the queue", flush=True)
    if not todo:
        return
    launch = [sys.executable, str(ROOT / "bin/launch.py"), str(batch), f"--retry={options.retry}"]
    if options.frozen:
        frozen_code(batch)
        launch.append("--frozen")
    folder = todo[0].path.parent
    # Slurm sends SIGUSR1 to the shell 120 seconds before the time limit, or up to a minute earlier.
    script = f"""#!/usr/bin/env bash
#SBATCH --job-name={shlex.quote(batch.name)} --output={shlex.quote(f"{folder}/slurm.%A_%a.log")} --open-mode=append
#SBATCH --array=0-{len(todo) - 1}{f"%{options.workers}" if options.workers else ""} --requeue --signal=B:USR1@120
#SBATCH {options.slurm}
names=({" ".join(job.path.name for job in todo)})
trap 'again=yes; kill -TERM $launcher' USR1
trap 'kill -TERM $launcher' TERM
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}}
{shlex.join(launch)} --only "${{names[SLURM_ARRAY_TASK_ID]}}" &
launcher=$!
while wait $launcher; code=$?; kill -0 $launcher 2> /dev/null; do :; done # a trap ends a wait
[ -z "$again" ] || scontrol requeue "$SLURM_JOB_ID"
exit $code
"""
    _ask("sbatch", "--test-only", script=script)  # refuses what it does not take
    folder.mkdir(exist_ok=True)
    array = _ask("sbatch", "--parsable", script=script).strip().partition(";")[0]
    for k, job in enumerate(todo):
        submitted[job].write_text(f"{array}_{k}")
    print(f"array {array}: {len(todo)} jobs; scancel {array} stops them with everything saved")


def _ask(*command: str, script: str | None = None) -> str:
    """What a command of Slurm's prints. Raises Refused if it fails."""
    try:
        return subprocess.run(command, input=script, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise Refused(f"--slurm: there is no {command[0]} on PATH: call it where jobs are submitted") from None
    except subprocess.CalledProcessError as error:
        raise Refused(f"{command[0]}: {(error.stderr or error.stdout).strip()}") from None


def torchrun() -> str:
    """What starts a program as the processes that the task's allocation has room for, or "" for one process.

    On nodes with GPUs a process for each; without, one for each of Slurm's tasks (--ntasks, --ntasks-per-node).
    """
    nodes, gpus = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)), int(os.environ.get("SLURM_GPUS_ON_NODE", 0))
    agents, processes = (nodes, gpus) if gpus else (int(os.environ.get("SLURM_NTASKS", nodes)), 1)
    if agents == 1:
        return f"torchrun --standalone --nproc-per-node={processes}" if processes > 1 else ""
    job = os.environ["SLURM_JOB_ID"]
    head = os.environ["SLURMD_NODENAME"]  # the first of them, where this runs
    rendezvous = f"--rdzv-backend=c10d --rdzv-endpoint={head}:{20000 + int(job) % 20000} --rdzv-id={job}"
    srun = f"--nodes={nodes} --ntasks={agents} --ntasks-per-node={-(-agents // nodes)} --kill-on-bad-exit=0"
    return f"{SRUN} {srun} torchrun --nnodes={agents} --nproc-per-node={processes} {rendezvous}"
