"""Runs a batch, a list of shell jobs, one a line, on this machine: by workers or GPUs, until all are finished.

A job's files lie in the folder BATCH.jobs beside the batch, named by the hash of its line, and its run: its log and,
unless it is a run of bin/train.py, the mark that it is finished. Who runs a job locks its log. The job's processes
inherit the lock: it holds as long as any of them lives, whoever was killed.
"""

import argparse
import asyncio
import fcntl
import hashlib
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from src.config import ROOT, Refused
from src.record import unpack
from src.results import overview
from src.stop import SIGNALS

POLL_SECONDS = 0.1
# A line that is a single call of bin/train.py with RUN_DIR first, as prepare writes it. Any other is a plain job.
TRAIN = re.compile(
    r"""(?P<before>[^;&|'"]*?)(?<!\S)(?P<python>\S*python[\d.]*\s+(-\S+\s+)*)?(?P<script>(\S*/)?bin/train\.py)\s+"""
    r"""(?P<run>(?!-)[\w./,=+@-]+|'[^']+')(?P<rest>(\s([^;&|'"]|>&|'[^']*'|"[^"]*")*)?)"""
)
# The outer shell outlives the signals that stop a job, so that the mark is right even if the launcher is dead.
OUTER = 'trap : INT TERM USR1; bash -c "$1" && : > "$2"'
# The line's shell starts nothing more after a signal, and has not finished.
INNER = "trap 'code=$?; exit $((code ? code : 143))' INT TERM USR1\n"


@dataclass(frozen=True)
class Job:
    """A line of a batch; `run` is the run's folder if the line is a call of bin/train.py."""

    line: str
    run: Path | None
    path: Path  # BATCH.jobs/HASH.RUN, or HASH, and .log or .done

    def __str__(self) -> str:
        return str(self.run or self.line)


def read_batch(batch: str | Path) -> list[Job]:
    """The jobs of a batch file, in its order; empty lines and those that begin with # are none.

    Raises Refused if the file cannot be read, and for two jobs with the same line or run folder.
    """
    batch = Path(batch)
    try:
        lines = batch.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{batch}: cannot be read: {error}") from None
    jobs: dict[str, Job] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        call = TRAIN.fullmatch(line)
        run = Path(call["run"].strip("'")) if call else None
        name = hashlib.sha256(line.encode()).hexdigest()[:16]
        if run:  # no character that a shell takes for a pattern
            name += "." + re.sub(r"[^\w.,=+@-]+", "_", run.name[:50])
        job = Job(line, run, Path(f"{batch}.jobs", name))
        if str(job) in jobs:
            raise Refused(f"{batch}:{number}: has the line or run folder of another, {job}: each job needs its own")
        jobs[str(job)] = job
    return list(jobs.values())


def state(job: Job) -> str:
    """'waiting' or 'finished'; of a run that has begun the status that `results.overview` gives."""
    if job.run:
        return str(overview(job.run)["status"]) if (job.run / "meta.json").exists() else "waiting"
    return "finished" if Path(f"{job.path}.done").exists() else "waiting"


def frozen_code(batch: Path) -> Path:
    """The folder code/HASH beside the batch, with the files of its code.tar.gz; made whole or not at all.

    Raises Refused without the archive, with a damaged one, or if a line of the batch is no call of bin/train.py.
    """
    if plain := [job for job in read_batch(batch) if not job.run]:
        raise Refused(f"--frozen: {plain[0]}: is no line as prepare writes it: bin/train.py RUN_DIR ...")
    archive = batch.resolve().with_name("code.tar.gz")
    if not archive.exists():
        raise Refused(f"{archive}: is missing: --frozen runs the code in it, as prepare keeps it")
    folder = archive.parent / "code" / hashlib.sha256(archive.read_bytes()).hexdigest()[:16]
    if not folder.exists():
        with tempfile.TemporaryDirectory(prefix=".", dir=archive.parent) as temporary:
            unpack(archive, Path(temporary, "code"))
            Path(temporary, "code/bin/train.py").chmod(0o755)
            folder.parent.mkdir(exist_ok=True)
            with suppress(OSError):  # another launcher was faster
                Path(temporary, "code").rename(folder)
    return folder


class Launcher:
    """Runs the jobs of a batch that are not finished, from the current folder, with the options of bin/launch.py.

    `starter` is what starts bin/train.py, such as "torchrun --nproc-per-node 2", or "": as the lines say.
    Raises Refused, with nothing created, for an unfit batch.
    """

    def __init__(self, batch: Path, options: argparse.Namespace, starter: str) -> None:
        self.jobs = [job for job in read_batch(batch) if options.only in (None, job.path.name)]
        if not self.jobs:
            raise Refused(f"{batch}: holds no job{f' {options.only}' * bool(options.only)}, one shell command a line")
        self.waiting = [job for job in self.jobs if state(job) != "finished"]
        self.failures: Counter[Job] = Counter()
        self.signals: list[int] = []  # that ask to stop, in their order
        self.retry, self.starter, self.script = options.retry, starter, ""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        at_once = len(options.gpus) or options.workers
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // (at_once or 8)))
        self.slots = options.gpus or [""] * (at_once or min(len(self.jobs), max(1, cores // threads)))
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if options.frozen:
            code = frozen_code(batch)
            self.script = shlex.quote(str(code / "bin/train.py"))
            self.environment["DATA_DIR"] = os.environ.get("DATA_DIR") or str(ROOT / "data")
            # The code lies inside of this clone, and is not what this clone's git knows.
            self.environment["GIT_CEILING_DIRECTORIES"] = str(code.parent)
        self.folder = self.jobs[0].path.parent
        self.folder.mkdir(exist_ok=True)

    async def run(self) -> int:
        """Returns the exit code: 0 all jobs are finished, 1 some are not, 128 + signal stopped on request."""
        for number in SIGNALS:
            signal.signal(number, lambda number, _: self.signals.append(number))
        print(f"{len(self.waiting)} of {len(self.jobs)} jobs to do, {len(self.slots)} at a time", flush=True)
        await asyncio.gather(*map(self._work, self.slots))
        left = [job for job in self.jobs if state(job) != "finished"]
        text = f"{len(self.jobs) - len(left)} of {len(self.jobs)} jobs are finished"
        if n_failed := sum(job in self.failures for job in left):
            text += f", {n_failed} failed"
        if self.signals:
            text = f"stopped by {signal.Signals(self.signals[0]).name}: {text}; the same command goes on"
        print(text, flush=True)
        return 128 + self.signals[0] if self.signals else int(bool(left))

    async def _work(self, slot: str) -> None:
        """Runs waiting jobs one after another, on the GPU of this name, or "", unless others run them or use it."""
        gpu_lock = self.folder / f"{socket.gethostname()}.{slot.replace('/', '_')}.lock" if slot else os.devnull
        with open(gpu_lock, "ab") as gpu:
            while self.waiting and not self.signals:
                mine = not slot or _lock(gpu)
                for job in list(self.waiting) if mine else []:
                    with open(f"{job.path}.log", "ab") as log:
                        found = state(job) if _lock(log) else "running"
                        if found in ("running", "stalled") or job not in self.waiting or self.signals:
                            continue
                        self.waiting.remove(job)
                        if found != "finished":
                            await self._run_job(job, slot, log, gpu)
                await asyncio.sleep(POLL_SECONDS)

    async def _run_job(self, job: Job, slot: str, log: BinaryIO, gpu: BinaryIO) -> None:
        line, call = job.line, TRAIN.fullmatch(job.line)
        if call and (self.script or self.starter):
            python = f"{self.starter} " if self.starter else call["python"] or ""
            line = f"{call['before']}{python}{self.script or call['script']} {call['run']}{call['rest']}"
        log.write(f"$ {line}\n".encode())
        log.flush()
        began, log_began, n_passed_on = time.monotonic(), log.tell(), 0
        shell = subprocess.Popen(
            ["bash", "-c", OUTER, "bash", INNER + line, os.devnull if job.run else f"{job.path}.done"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[log.fileno(), gpu.fileno()],
            start_new_session=True, env=self.environment | ({"CUDA_VISIBLE_DEVICES": slot} if slot else {}),
        )  # fmt: skip
        self._say(job, "started")
        while shell.poll() is None:
            for number in self.signals[n_passed_on:]:
                n_passed_on += 1
                with suppress(ProcessLookupError, PermissionError):  # it has just ended
                    os.killpg(shell.pid, number)
            await asyncio.sleep(POLL_SECONDS)
        code = shell.returncode if shell.returncode >= 0 else 128 - shell.returncode
        stopped = code == 0 or code - 128 in SIGNALS  # code 0 of a run that is not finished: stop_at
        outcome = "finished" if state(job) == "finished" else "stopped" if stopped else "failed"
        more = f"{time.monotonic() - began:.0f} s"
        if outcome == "failed":
            self.failures[job] += 1
            more += f"  exit code {code}"
            if self.failures[job] <= self.retry:
                more += ", to be run again"
                self.waiting.append(job)  # until its lock is free: a process of it may live on
            printed = Path(log.name).read_bytes()[log_began:].decode("utf-8", "replace")
            more = "\n    ".join([more, job.line, *(f"| {text}" for text in printed.splitlines()[-5:]), log.name])
        self._say(job, outcome, more)

    def _say(self, job: Job, what: str, more: str = "") -> None:
        print(f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {what:8}  {job}  {more}".rstrip(), flush=True)


def _lock(file: BinaryIO) -> bool:
    """Whether the file is locked now for this process, and those that inherit the open file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise Refused(f"{file.name}: this file system has no locks ({error}): put the batch on another") from None
    return True
