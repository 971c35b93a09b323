"""Runs a batch, a list of shell jobs, one a line, on this machine: by workers or GPUs, until all are finished.

What a job needs lies in the folder BATCH.jobs beside the batch, named by the hash of its line: the log, the lock
and, for a line that is no run of bin/train.py, the mark that it is finished. The lock belongs to the job's
processes as well as to the launcher: it holds as long as any of them lives, whoever was killed.
"""

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.config import ROOT, Refused
from src.reproduce import unpack
from src.results import status
from src.stop import SIGNALS

POLL_SECONDS, OTHERS_SECONDS = 0.1, 0.5  # between two looks at our jobs, at those that others hold
# A word of a shell line as it is written, quotes included.
WORD = re.compile(r"""(?:[^\s'"\\;&|()<>]|\\.|'[^']*'|"(?:\\.|[^"\\])*")+""")
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
        text = str(self.run or self.line)
        return text if len(text) <= 80 else text[:77] + "..."


def read_batch(batch: str | Path) -> list[Job]:
    """The jobs of a batch file, in its order; empty lines and those that begin with # are none.

    Raises Refused if the file cannot be read or holds no job, for a line that no shell can read, and for two jobs
    with the same line or run folder.
    """
    batch = Path(batch)
    jobs: list[Job] = []
    seen: dict[str | Path | int, int] = {}
    try:
        lines = batch.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{batch}: cannot be read: {getattr(error, 'strerror', 'it is not UTF-8 text')}") from None
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        try:
            run = _run_of(line)
        except ValueError as error:  # or a quote in a comment, or of a kind that bash alone knows
            run = None
            if "\0" in line or subprocess.run(["bash", "-nc", line], capture_output=True).returncode:
                raise Refused(f"{batch}:{number}: is no line of shell: {str(error).lower()}") from None
        for what, key in (("line", line), ("run folder", run.resolve() if run else number)):
            if seen.setdefault(key, number) != number:
                raise Refused(f"{batch}:{number}: has the {what} of {batch}:{seen[key]}: each job needs its own")
        digest = hashlib.sha256(line.encode()).hexdigest()[:16]
        jobs.append(Job(line, run, batch.with_name(f"{batch.name}.jobs") / digest))
    if not jobs:
        raise Refused(f"{batch}: holds no job: write one shell command a line")
    return jobs


def _run_of(line: str) -> Path | None:
    """RUN_DIR of `[NAME=value ...] [./e.sh] [python] bin/train.py RUN_DIR ...`. ValueError if a quote is not closed."""
    if "\0" in line:
        raise ValueError("it has a null byte")
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words = list(lexer)
    if any(set(word) <= set(";&|()") for word in words if word):
        return None  # several commands: the run's end is not the line's
    while words and re.match(r"[A-Za-z_]\w*=|(.*/)?(e\.sh|python[\d.]*)$", words[0]):
        words.pop(0)
    if not words or Path(words[0]).parts[-2:] != ("bin", "train.py"):
        return None
    rest = iter(words[1:])
    written = set(re.sub("'[^']*'", "", line))  # not between single quotes
    for word in rest:
        if word == "-b" or (len(word) > 2 and "--bindings".startswith(word)):
            next(rest, None)
        elif not word.startswith("-"):
            redirected = word.isdecimal() and next(rest, "")[:1] in ("<", ">")  # 2>log.txt
            # A pattern or a variable: only the shell knows what it stands for.
            return None if redirected or set(word) & set("$`*?[{~<>") & written else Path(word)
    return None


def state(job: Job) -> str:
    """What `results.status` says of the job's run, 'unreadable' if it cannot; else 'waiting' or 'finished'."""
    if not job.run:
        return "finished" if job.path.with_suffix(".done").exists() else "waiting"
    if not (job.run / "meta.json").exists():
        return "waiting"
    try:
        return status(job.run)
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
        frozen: takes the scripts of bin/ from code.tar.gz beside the batch.
        only: the name of one job, the hash of its line; the others are left alone, and so is this one if it
            runs elsewhere.
        starter: what stands before bin/train.py in the lines that are run, such as "torchrun --nproc-per-node 2".

    Raises Refused, with nothing created, for an unfit batch or argument.
    """
    batch = Path(batch)
    jobs = [job for job in read_batch(batch) if only in (None, job.path.name)]
    if not jobs:
        raise Refused(f"{batch}: has no job {only}, or no more: see the names in {batch}.jobs")
    slots, threads = _slots(len(jobs), workers, gpus)
    if retry < 0:
        raise Refused(f"--retry {retry}: give a number of times, from 0")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    code = frozen_code(batch) if frozen else None
    if code:
        environment["DATA_DIR"] = environment.get("DATA_DIR") or str(ROOT / "data")
        # The code lies inside of this clone, and is not what this clone's git knows.
        environment["GIT_CEILING_DIRECTORIES"] = str(code.parent)
        refuse_unreplaced(jobs, code)
    make_folder(jobs[0].path.parent)
    launcher = _Launcher(jobs, slots, environment, retry, code, starter, waits=only is None)
    with _caught(launcher.signals):
        try:
            return launcher.run()
        except OSError as error:  # who read what is printed is gone, or BATCH.jobs
            raise Refused(f"{batch}: {error}: jobs that run go on, and the same command waits for them") from None


def _slots(n_jobs: int, workers: int | None, gpus: Sequence[str] | None) -> tuple[list[str], int]:
    """A GPU's name, or "", for each job at a time, and the threads of each job."""
    if gpus is not None and (workers is not None or not all(gpus) or not gpus or len(set(gpus)) < len(gpus)):
        raise Refused(f"--gpus {','.join(gpus)}: name each GPU once, without --workers: --gpus 0,1")
    if workers is not None and workers < 1:
        raise Refused(f"--workers {workers}: give a number of jobs at a time, from 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fixed = workers or (len(gpus) if gpus else None)
    asked = os.environ.get("OMP_NUM_THREADS")
    if asked and not (asked.isdecimal() and int(asked)):
        raise Refused(f"OMP_NUM_THREADS={asked}: must be a number of threads, from 1")
    threads = int(asked) if asked else max(1, cores // (fixed or 8))
    return list(gpus or [""] * (fixed or min(n_jobs, max(1, cores // threads)))), threads


def make_folder(folder: Path) -> None:
    """Makes the folder beside a batch. Raises Refused if it cannot."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder}: cannot be made: {error.strerror}") from None


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


def refuse_unreplaced(jobs: Sequence[Job], code: Path) -> None:
    """Raises Refused for a line that runs train.py in a way that hides which one, so that it would not be `code`'s."""
    for job in jobs:
        if re.search(r"\btrain\.py\b", job.line) and _with_scripts(job.line, code, "") == job.line:
            raise Refused(f"--frozen: which train.py this line runs cannot be told: {job.line}: write bin/train.py")


def _with_scripts(line: str, code: Path | None, starter: str) -> str:
    """The line with this clone's scripts replaced by those of the folder `code`, and the starter before train.py."""
    if starter:  # it brings its own Python
        line = re.sub(r"""('[^']*/)?\S*\bpython[\d.]*'?(\s+-\w+)*\s+(?=('[^']*)?\S*train\.py)""", "", line)

    def replaced(word: re.Match[str]) -> str:
        path = Path("".join(shlex.split(word[0]))).resolve()
        if path.parent != ROOT / "bin" or not os.path.isfile(path):
            return word[0]
        script = shlex.quote(str(code / "bin" / path.name)) if code else word[0]
        return f"{starter} {script}" if starter and path.name == "train.py" else script

    return WORD.sub(replaced, line)


@contextmanager
def _caught(signals: list[int]) -> Iterator[None]:
    """Notes the signals that ask to stop, in their order."""
    before = {n: signal.signal(n, lambda number, _: signals.append(number)) for n in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


@dataclass(frozen=True)
class _Started:
    """A job's shell, what it holds, and where its part of the log begins."""

    job: Job
    shell: subprocess.Popen[Any]
    slot: str
    locks: list[int]
    time: float
    log_begin: int


class _Launcher:
    """One launch: starts what is waiting whenever a slot is free, looks who has ended, stops all when asked to."""

    def __init__(
        self,
        jobs: list[Job],
        slots: list[str],
        environment: dict[str, str],
        retry: int,
        code: Path | None,
        starter: str,
        waits: bool,
    ) -> None:
        self.jobs, self.free, self.environment, self.retry = jobs, slots, environment, retry
        self.code, self.starter, self.waits = code, starter, waits
        self.signals: list[int] = []
        self.told = False  # whether the jobs were asked to stop
        self.running: list[_Started] = []
        self.waiting = [job for job in jobs if state(job) != "finished"]
        self.failures: Counter[Job] = Counter()
        self.outcomes: dict[Job, str] = {}  # how each job ended that was started here

    def run(self) -> int:
        print(f"{len(self.waiting)} of {len(self.jobs)} jobs to do, {len(self.free)} at a time", flush=True)
        told = False
        while self.running or self.waiting:
            for started in [s for s in self.running if s.shell.poll() is not None]:
                self._end(started)
            if self.signals:
                self._ask_to_stop()
            else:
                self._start_what_fits()
                if self.waiting and not self.running and not told:
                    told = True
                    what = "waiting for what" if self.waits else "leaving alone what"
                    print(f"{what} runs elsewhere: {len(self.waiting)}", flush=True)
                    if not self.waits:
                        self.waiting.clear()
            if self.running or self.waiting:
                time.sleep(POLL_SECONDS if self.running else OTHERS_SECONDS)
        return self._summary()

    def _start_what_fits(self) -> None:
        for slot in list(self.free):
            gpu = []
            if slot:  # it may still have a job of a launcher that was killed
                gpu = _claim(self.jobs[0].path.with_name(f"{socket.gethostname()}.{slot.replace('/', '_')}.lock"))
                if not gpu:
                    continue
            if self.signals or not (claimed := self._claim_next()):
                _release(gpu)
                return
            job, lock = claimed
            self._start(job, slot, lock + gpu)

    def _claim_next(self) -> tuple[Job, list[int]] | None:
        """The first waiting job that nobody else runs, and its lock."""
        for job in list(self.waiting):
            lock = _claim(job.path.with_suffix(".lock"))
            found = state(job) if lock else "claimed"
            if found not in ("claimed", "running", "stalled"):  # by another launcher; by hand
                self.waiting.remove(job)
                if found != "finished":
                    return job, lock
                self._say(job, "finished", "elsewhere")
            _release(lock)
        return None

    def _start(self, job: Job, slot: str, locks: list[int]) -> None:
        line = _with_scripts(job.line, self.code, self.starter)
        mark = os.devnull if job.run else job.path.with_suffix(".done")
        with open(job.path.with_suffix(".log"), "ab") as log:
            log_begin = log.tell()
            shell = subprocess.Popen(
                ["bash", "-c", OUTER, "bash", INNER + line, mark],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=locks, start_new_session=True,
                env=self.environment | ({"CUDA_VISIBLE_DEVICES": slot} if slot else {}),
            )  # fmt: skip
            self.running.append(_Started(job, shell, slot, locks, time.monotonic(), log_begin))
        self.free.remove(slot)
        self._say(job, "started")

    def _end(self, started: _Started) -> None:
        job, code = started.job, started.shell.returncode
        code = code if code >= 0 else 128 - code  # the shell itself was killed
        self.running.remove(started)
        self.free.append(started.slot)
        _release(started.locks)
        # 0 without the end of the run: it was to stop at some step.
        stopped = code == 0 or (code - 128 in SIGNALS and (job.run or self.signals))
        outcome = "finished" if state(job) == "finished" else "stopped" if stopped else "failed"
        self.outcomes[job] = outcome
        self.failures[job] += outcome == "failed"
        minutes, seconds = divmod(round(time.monotonic() - started.time), 60)
        said = f"{minutes}:{seconds:02}"
        if outcome == "failed":
            with open(job.path.with_suffix(".log"), "rb") as log:
                log.seek(started.log_begin)
                last = log.read().decode("utf-8", "replace").splitlines()[-5:]
            said += f"  exit code {code}"
            if self.failures[job] <= self.retry:
                said += ", to be run again"
                self.waiting.append(job)  # until its lock is free: a process of it may live on
            said += "".join(f"\n    {text}" for text in (job.line, *(f"| {text}" for text in last)))
        self._say(job, outcome, said)

    def _ask_to_stop(self) -> None:
        """SIGTERM once; after a Ctrl-C that is not the first signal SIGINT, too, until the jobs have ended."""
        self.waiting.clear()
        number = signal.SIGINT if signal.SIGINT in self.signals[1:] else signal.SIGTERM
        if number == signal.SIGINT or not self.told:
            self.told = True
            for started in self.running:
                with suppress(ProcessLookupError, PermissionError):  # it has just ended
                    os.killpg(started.shell.pid, number)

    def _say(self, job: Job, what: str, more: str = "") -> None:
        print(f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {what:8}  {job}  {more}".rstrip(), flush=True)

    def _summary(self) -> int:
        left = {job: self.outcomes.get(job) for job in self.jobs if state(job) != "finished"}
        ends = Counter(left.values())
        text = f"{len(self.jobs) - len(left)} of {len(self.jobs)} jobs are finished"
        text += "".join(f", {ends[what]} {what}" for what in ("stopped", "failed") if ends[what])
        if self.signals:
            text = f"stopped by {signal.Signals(self.signals[0]).name}: {text}; the same command goes on"
        print(text, flush=True)
        return 128 + self.signals[0] if self.signals else int(bool(left))
