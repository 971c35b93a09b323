"""Runs a batch, a list of shell jobs, one a line, on this machine: by workers or GPUs, until all are finished.

What a job needs lies in the folder BATCH.jobs beside the batch, named by the hash of its line: the log, the lock
and, for a line that is no run of bin/train.py, the mark that it is finished. The lock belongs to the job's
processes as well as to the launcher: it holds as long as any of them lives, whoever was killed.
"""

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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from src.config import ROOT, Refused
from src.record import unpack
from src.results import status
from src.stop import SIGNALS

POLL_SECONDS = 0.1
SCRIPTS = re.compile(r"(?<!\S)(\./)?bin/(?=\w+\.py\b)")  # as prepare writes them
# The outer shell outlives the signals that stop a job, so that the mark is right even if the launcher is dead.
OUTER = 'trap : INT TERM USR1; bash -c "$1"; code=$?; [ $code != 0 ] || : > "$2" || exit; exit $code'
# The line's shell starts nothing more after a signal; it says how what was running has ended, or 128 + signal.
INNER = "".join(f"trap 'code=$?; exit $((code ? code : {128 + n}))' {n.name.removeprefix('SIG')}\n" for n in SIGNALS)


@dataclass(frozen=True)
class Job:
    """A line of a batch; `run` is the run's folder if the line is a call of bin/train.py and nothing more."""

    line: str
    run: Path | None
    path: Path  # BATCH.jobs/HASH, with .log, .lock or .done

    def __str__(self) -> str:
        return str(self.run or self.line)


def read_batch(batch: str | Path) -> list[Job]:
    """The jobs of a batch file, in its order; empty lines and those that begin with # are none.

    Raises Refused if the file cannot be read or holds no job, for a line that no shell can read, and for two jobs
    with the same line or run folder.
    """
    batch = Path(batch)
    jobs: list[Job] = []
    seen: dict[str | Path, int] = {}
    try:
        lines = batch.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{batch}: cannot be read: {getattr(error, 'strerror', 'it is not UTF-8 text')}") from None
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        try:
            run = _run_of(line)
        except ValueError as error:
            raise Refused(f"{batch}:{number}: is no line of shell: {str(error).lower()}") from None
        for what, key in (("line", line), ("run folder", run and run.resolve())):
            if key and seen.setdefault(key, number) != number:
                raise Refused(f"{batch}:{number}: has the {what} of {batch}:{seen[key]}: each job needs its own")
        digest = hashlib.sha256(line.encode()).hexdigest()[:16]
        jobs.append(Job(line, run, batch.with_name(f"{batch.name}.jobs") / digest))
    if not jobs:
        raise Refused(f"{batch}: holds no job: write one shell command a line")
    return jobs


def _run_of(line: str) -> Path | None:
    """RUN_DIR of `[NAME=value ...] [./e.sh] [python] bin/train.py RUN_DIR ...`. ValueError if a quote is not closed."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = list(lexer)
    except ValueError:
        if subprocess.run(["bash", "-nc", line], capture_output=True).returncode:
            raise
        return None  # the quote is in a comment, or of a kind that bash alone knows
    if any(set(word) <= set(";&|()") for word in words if word):
        return None  # several commands: the run's end is not the line's
    while words and re.match(r"[A-Za-z_]\w*=|(.*/)?(e\.sh|python[\d.]*)$", words[0]):
        words.pop(0)
    if not words or Path(words[0]).parts[-2:] != ("bin", "train.py"):
        return None
    rest = iter(words[1:])
    for word in rest:
        if word == "-b" or (len(word) > 2 and "--bindings".startswith(word)):
            next(rest, None)
        elif not word.startswith("-"):
            redirected = next(rest, "")[:1] in ("<", ">")  # 2>log.txt
            # A pattern or a variable, if it is not in quotes: only the shell knows what it stands for.
            unknown = set(word) & set("$`*?[{~<>") and shlex.quote(word) not in line
            return None if redirected or unknown else Path(word)
    return None


def state(job: Job) -> str:
    """What `results.status` says of the job's run, 'unreadable' if it cannot; else 'waiting' or 'finished'."""
    if not job.run:
        return "finished" if job.path.with_suffix(".done").exists() else "waiting"
    try:
        return status(job.run) if (job.run / "meta.json").exists() else "waiting"
    except (Refused, OSError):
        return "unreadable"


def launch(
    batch: str | Path,
    *,
    workers: int | None = None,
    gpus: Sequence[str] | None = None,
    retry: int = 0,
    frozen: bool = False,
    only: str | None = None,
    starter: str = "",
) -> int:
    """Runs the jobs of a batch that are not finished, from the current folder, and returns the exit code:
    0 all are finished, 1 some are not, 128 + signal stopped on request.

    Args:
        batch: file of jobs. Several launchers may share it.
        workers: jobs at a time; None: as many as fit the cores, by OMP_NUM_THREADS or an eighth of them a job.
        gpus: names for CUDA_VISIBLE_DEVICES; one job at a time on each.
        retry: how often a job that failed is run again, after the others.
        frozen: the scripts of bin/ are those of code.tar.gz beside the batch; where a line names one in another
            way than bin/NAME.py from the clone's root, ours goes on as that one as soon as it imports src.
        only: the name of one job, the hash of its line, which is left alone, as the others are, if it runs elsewhere.
        starter: what starts bin/train.py, such as "torchrun --nproc-per-node 2".

    Raises Refused, with nothing created, for an unfit batch or argument.
    """
    batch = Path(batch)
    jobs = [job for job in read_batch(batch) if only in (None, job.path.name)]
    if not jobs:
        raise Refused(f"{batch}: has no job {only}, or no more: see the names in {batch}.jobs")
    slots, threads = _slots(len(jobs), workers, gpus)
    # src/__init__.py reads TRAIN_STARTER and FROZEN_CODE.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRAIN_STARTER": starter}
    scripts = "bin/"
    if frozen:
        code = frozen_code(batch)
        environment["FROZEN_CODE"] = str(code)  # for lines that name their script in another way
        scripts = f"{shlex.quote(str(code))}/bin/" if Path.cwd() == ROOT else scripts
        environment["DATA_DIR"] = environment.get("DATA_DIR") or str(ROOT / "data")
        # The code lies inside of this clone, and is not what this clone's git knows.
        environment["GIT_CEILING_DIRECTORIES"] = str(code.parent)
    jobs[0].path.parent.mkdir(exist_ok=True)
    return asyncio.run(_Launcher(jobs, environment, scripts, retry, waits=only is None).run(slots))


def _slots(n_jobs: int, workers: int | None, gpus: Sequence[str] | None) -> tuple[list[str], int]:
    """A GPU's name, or "", for each job at a time, and the threads of each job."""
    if gpus is not None and (workers or "" in gpus or len(set(gpus)) < len(gpus)):
        raise Refused(f"--gpus {','.join(gpus)}: name each GPU once, without --workers: --gpus 0,1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fixed = len(gpus) if gpus else workers
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked and not asked.isdecimal():
        raise Refused(f"OMP_NUM_THREADS={asked}: must be a number of threads, from 1")
    threads = int(asked or 0) or max(1, cores // (fixed or 8))
    return list(gpus or [""] * (fixed or min(n_jobs, max(1, cores // threads)))), threads


def frozen_code(batch: Path) -> Path:
    """The folder code/HASH beside the batch, with the files of its code.tar.gz; made whole or not at all.

    Raises Refused without the archive, or with a damaged one.
    """
    archive = batch.resolve().with_name("code.tar.gz")
    if not archive.exists():
        raise Refused(f"{archive}: is missing: --frozen runs the code in it, as prepare keeps it")
    folder = archive.parent / "code" / hashlib.sha256(archive.read_bytes()).hexdigest()[:16]
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(prefix=".", dir=archive.parent) as temporary:
        unpack(archive, Path(temporary).resolve() / "code")
        for script in Path(temporary, "code/bin").glob("*"):
            script.chmod(0o755)
        folder.parent.mkdir(exist_ok=True)
        with suppress(OSError):  # another launcher was faster
            Path(temporary, "code").rename(folder)
    return folder


def _claim(path: Path) -> list[int]:
    """The descriptor that holds the lock of the file, or none if it is held already."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Unlike a POSIX lock it is shared with the processes that inherit the descriptor.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return [lock]
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            return []
        raise Refused(f"{path}: this file system has no locks ({error.strerror}): put the batch on another") from None


def _release(locks: list[int]) -> None:
    for lock in locks:
        os.close(lock)


class _Launcher:
    """One launch: each slot runs one waiting job after another, until all are finished or a signal asks to stop."""

    def __init__(self, jobs: list[Job], environment: dict[str, str], scripts: str, retry: int, waits: bool) -> None:
        self.jobs, self.environment, self.scripts = jobs, environment, scripts
        self.retry, self.waits = retry, waits
        self.waiting = [job for job in jobs if state(job) != "finished"]
        self.n_running = 0
        self.has_said = False  # that others run what is left
        self.failures: Counter[Job] = Counter()
        self.outcomes: dict[Job, str] = {}  # how each job ended that was started here
        self.signals: list[int] = []  # that ask to stop, in their order
        for number in SIGNALS:
            signal.signal(number, lambda number, _: self.signals.append(number))

    async def run(self, slots: list[str]) -> int:
        print(f"{len(self.waiting)} of {len(self.jobs)} jobs to do, {len(slots)} at a time", flush=True)
        await asyncio.gather(*map(self._work, slots))
        left = [job for job in self.jobs if state(job) != "finished"]
        ends = Counter(self.outcomes.get(job) for job in left)
        text = f"{len(self.jobs) - len(left)} of {len(self.jobs)} jobs are finished"
        text += "".join(f", {ends[what]} {what}" for what in ("stopped", "failed") if ends[what])
        if self.signals:
            text = f"stopped by {signal.Signals(self.signals[0]).name}: {text}; the same command goes on"
        print(text, flush=True)
        return 128 + self.signals[0] if self.signals else int(bool(left))

    async def _work(self, slot: str) -> None:
        while self.waiting or self.n_running:  # what runs here may fail, and is to be run again then
            if self.signals:
                self.waiting.clear()
            elif claimed := self._claim_next(slot):
                await self._run_job(*claimed, slot)
                continue
            elif self.waiting and not self.n_running and not self.has_said:
                self.has_said = True
                what = "waiting for" if self.waits else "leaving alone"
                print(f"{what} what runs elsewhere: {len(self.waiting)}", flush=True)
                if not self.waits:
                    self.waiting.clear()
            await asyncio.sleep(POLL_SECONDS)

    def _claim_next(self, slot: str) -> tuple[Job, list[int]] | None:
        """The first waiting job that nobody else runs, and the locks of it and of the slot's GPU."""
        gpu = []
        if slot:  # it may still have a job of a launcher that was killed
            gpu = _claim(self.jobs[0].path.with_name(f"{socket.gethostname()}.{slot.replace('/', '_')}.lock"))
            if not gpu:
                return None
        for job in list(self.waiting):
            lock = _claim(job.path.with_suffix(".lock"))
            found = state(job) if lock else "running"  # by another launcher
            if found not in ("running", "stalled"):
                self.waiting.remove(job)
                if found != "finished":
                    return job, lock + gpu
                self._say(job, "finished", "elsewhere")
            _release(lock)
        _release(gpu)
        return None

    async def _run_job(self, job: Job, locks: list[int], slot: str) -> None:
        line = SCRIPTS.sub(lambda _: self.scripts, job.line)
        mark = os.devnull if job.run else job.path.with_suffix(".done")
        with open(job.path.with_suffix(".log"), "ab") as log:
            began, log_began = time.monotonic(), log.tell()
            shell = subprocess.Popen(
                ["bash", "-c", OUTER, "bash", INNER + line, mark],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=locks, start_new_session=True,
                env=self.environment | ({"CUDA_VISIBLE_DEVICES": slot} if slot else {}),
            )  # fmt: skip
        self.n_running += 1
        self._say(job, "started")
        is_asked = False
        while (code := shell.poll()) is None:
            again = signal.SIGINT in self.signals[1:]  # a second Ctrl-C: until the job has ended
            if again or (self.signals and not is_asked):
                is_asked = True
                with suppress(ProcessLookupError, PermissionError):  # it has just ended
                    os.killpg(shell.pid, signal.SIGINT if again else signal.SIGTERM)
            await asyncio.sleep(POLL_SECONDS)
        self.n_running -= 1
        _release(locks)
        code = code if code >= 0 else 128 - code  # the shell itself was killed
        # 0 without the end of the run: it was to stop at some step.
        stopped = code == 0 or (code - 128 in SIGNALS and (job.run or self.signals))
        outcome = "finished" if state(job) == "finished" else "stopped" if stopped else "failed"
        self.outcomes[job] = outcome
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        said = f"{minutes}:{seconds:02}"
        if outcome == "failed":
            said += f"  exit code {code}"
            self.failures[job] += 1
            if self.failures[job] <= self.retry:
                said += ", to be run again"
                self.waiting.append(job)  # until its lock is free: a process of it may live on
            printed = job.path.with_suffix(".log").read_bytes()[log_began:].decode("utf-8", "replace")
            said = "\n    ".join([said, job.line, *(f"| {text}" for text in printed.splitlines()[-5:])])
        self._say(job, outcome, said)

    def _say(self, job: Job, what: str, more: str = "") -> None:
        print(f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {what:8}  {job}  {more}".rstrip(), flush=True)
