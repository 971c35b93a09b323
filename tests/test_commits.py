"""Commits on disks that fail, fill up and come back, damaged and malicious files, and the owner of a run.

The faults are real ones and come from outside the process.
"""

import csv
import ctypes
import hashlib
import io
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from benchmarks.kill import difference, run_difference
from src import results
from src.config import Refused
from src.run import Damaged, read_checkpoint, read_meta, write_checkpoint
from tests.test_refusals import contents
from tests.test_train import SMALL, wait_for

needs_root = pytest.mark.skipif(os.getuid() != 0 or not shutil.which("strace"), reason="needs root and strace")
RELOAD = ("-b", "training_loop.reload=True")
LONG = ("-b", "training_loop.batch_size=20;training_loop.n_epochs=10")
CALLS = "openat,write,fsync,link,linkat,rename,renameat,renameat2,unlink,unlinkat"
# Thread, call, and the first path among its arguments; with -y a descriptor has its path, too.
CALL = re.compile(r'(\d+) +(\w+)\((?:AT_FDCWD<[^>]*>, )?(?:\d+<)?"?(/[^">]*)')


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small config, small.gin, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("small.gin").write_text(SMALL)
    return "small.gin"


class Child:
    """bin/train.py in a child of this process, which has imported all it needs already."""

    def __init__(self, main, run, *arguments, strace=(), powerless=False):
        fork = get_context("fork")
        self.errors, self.go = Path(f"{Path(run).name}.{time.monotonic_ns()}.err"), fork.Event()
        self.process = fork.Process(target=self.train, args=(main, powerless, run, "small.gin", *arguments))
        self.process.start()
        self.tracer = self.attach(*strace) if strace else None
        self.go.set()

    def train(self, main, powerless, *arguments):
        for descriptor, file in ((1, os.devnull), (2, self.errors)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        self.go.wait()
        if powerless:
            no_capability = struct.pack("Ii", 0x20080522, 0), bytes(24)
            assert ctypes.CDLL(None).capset(*no_capability) == 0
        sys.exit(main("train", *arguments))

    def attach(self, *options):
        command = ["strace", "-f", "-p", str(self.process.pid), *options]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert "attached" in (line := tracer.stderr.readline()), line
        return tracer

    def poll(self):  # as Popen has them, for wait_for
        return self.process.exitcode

    def signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()
        self.process.join()

    def communicate(self):
        """The exit code, and what was said on stderr."""
        self.process.join(60)
        if self.tracer:
            self.tracer.communicate(timeout=60)
        return self.process.exitcode, self.errors.read_text()


@pytest.fixture
def child(main):
    """Starts bin/train.py in a child; what is left of it is killed after the test."""
    children = []

    def start(*arguments, **options):
        children.append(Child(main, *arguments, **options))
        return children[-1]

    yield start
    for one in children:
        one.kill()


def assert_stopped(run, code, errors):
    """Exit 1 and one message, which names the folder and says what to do; the folder is sound."""
    assert code == 1, errors
    expected = rf"(train\.py: )?{run}: cannot be written to: .*go on with training_loop\.reload=True\n"
    assert re.fullmatch(expected, errors), errors
    assert_loads(run)


def assert_loads(run):
    """The last commit is whole, and what follows from it is of it or of the one before."""
    state = read_checkpoint(run / "checkpoint.pt")
    model = results.load_model(run, weights="last")
    assert difference(state["network"], model.state_dict()) is None
    rows = results.load_history(run)
    assert rows in (state["history"], state["history"][:-1])
    return state


# --- one call fails -------------------------------------------------------------------------------


def record_calls(log, run):
    """(call, path, the how manyth of this path), of all that is written from the second commit on."""
    made, found = Counter(), []
    for line in log.read_text().splitlines():
        match = CALL.match(line)
        if match and Path(match[3]).is_relative_to(run):
            made[match.groups()] += 1
            if match[2] != "openat" or "O_WRONLY" in line or match[3] == str(run):
                found.append((match[2], match[3], made[match.groups()]))
    return found[found.index(("openat", f"{run}/.checkpoint.pt.tmp", 2)) :]


@pytest.mark.slow
@needs_root
def test_any_call_of_a_commit_may_fail(small, main, child, tmp_path):
    assert main("train", "whole", small) == 0
    whole, log = tmp_path / "recorded", Path("log")
    child(whole, strace=("-y", "-o", log, "-e", f"trace={CALLS}")).communicate()
    commits = [read_checkpoint(whole / name) for name in ("checkpoint.prev.pt", "checkpoint.pt")]
    calls = [(*call, i) for i, call in enumerate(record_calls(log, whole)) if "tfevents" not in call[1]]
    renamed, closing = (
        next(i for i, (call, path, *_) in enumerate(calls) if call.startswith(start) and path.endswith(end))
        for start, end in (("rename", "/.checkpoint.pt.tmp"), ("openat", "/.meta.json.tmp"))
    )

    def fail(call, path, count, i):
        run = tmp_path / str(i)
        error = "EIO" if call == "fsync" or i % 2 else "ENOSPC"
        inject = ("-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={count}")
        return run, child(run, strace=("-o", f"{run}.log", "-P", path.replace(str(whole), str(run)), *inject))

    failed = []
    for k in range(0, len(calls), 2):  # two side by side
        pair = calls[k : k + 2]
        began = [fail(*call) for call in pair]
        for call, (run, process) in zip(pair, began, strict=True):
            name = f"{call[0]} {Path(call[1]).name} {call[2]}"
            try:
                assert_stopped(run, *process.communicate())
                assert difference(assert_loads(run), commits[calls.index(call) > renamed]) is None
                assert calls.index(call) >= closing or results.status(run) == "failed"
            except Exception as error:
                failed.append(f"{name}: {error}")
        again = [child(run, *RELOAD) for run, _ in began]
        for call, (run, _), process in zip(pair, began, again, strict=True):
            code, errors = process.communicate()
            if code or run_difference(whole, run):
                failed.append(f"{call}: does not go on: {errors}")
    assert not failed, "\n".join(failed)
    assert len(calls) > 30
    assert run_difference(tmp_path / "whole", whole) is None


@needs_root
def test_tensorboards_file_may_fail(small, main, child, tmp_path):
    run = tmp_path / "run"
    assert main("train", "whole", small, *LONG) == 0
    process = child(run, *LONG)
    wait_for(lambda: (run / "history.csv").exists(), process)
    file = next(run.glob("events.out.tfevents.*"))
    process.tracer = process.attach("-o", "log", "-P", file, "-e", "trace=write", "-e", "inject=write:error=EIO")
    assert_stopped(run, *process.communicate())
    assert results.status(run) == "failed"
    assert child(run, *LONG, *RELOAD).communicate()[0] == 0
    assert run_difference(Path("whole"), run) is None
    assert_each_epoch_once(run, 10)


@needs_root
@pytest.mark.parametrize("reload", [False, True])
def test_a_file_system_without_locks_is_refused(small, main, child, tmp_path, reload):
    run = tmp_path / "runs/run"
    assert not reload or main("train", run, small, "-b", "training_loop.n_epochs=1") == 0
    before = contents(run)
    inject = ("-P", run / "HEARTBEAT", "-e", "trace=fcntl", "-e", "inject=fcntl:error=ENOLCK")
    code, errors = child(run, *(RELOAD if reload else ()), strace=inject).communicate()
    message = f"train.py: {run}: this file system has no locks (No locks available): choose a folder on another one\n"
    assert (code, errors) == (2, message)
    assert contents(run) == before and run.exists() == reload


@needs_root
def test_a_file_system_without_links_keeps_the_commit_before_as_a_copy(small, main, child, tmp_path):
    assert main("train", "whole", small) == 0
    inject = ("-e", "trace=link,linkat", "-e", "inject=link,linkat:error=EPERM")
    assert child(tmp_path / "run", strace=inject).communicate()[0] == 0
    first, last = (read_checkpoint(Path("run", name))["epoch"] for name in ("checkpoint.prev.pt", "checkpoint.pt"))
    assert first == last - 1 and Path("run/checkpoint.prev.pt").stat().st_nlink == 1
    assert run_difference(Path("whole"), Path("run")) is None


# --- the disk fails for a while -------------------------------------------------------------------


@contextmanager
def full(run, process):
    """20 kB are left: room for meta.json, but not for a checkpoint."""
    process.signal(signal.SIGCONT)
    with open(run.parent / "ballast", "wb", buffering=0) as file:
        while process.poll() is None:
            disk = os.statvfs(run)
            with suppress(OSError):  # the run was faster
                file.write(bytes(max(0, disk.f_bavail * disk.f_bsize - 20_000)))
            time.sleep(0.001)
    yield "failed"
    subprocess.run(["mount", "-o", "remount,size=16m", run.parent], check=True)


@contextmanager
def read_only(run, process):
    subprocess.run(["mount", "--bind", run, run], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)
    process.signal(signal.SIGCONT)
    yield "dead"  # it could not write down that it failed
    subprocess.run(["umount", run], check=True)


@contextmanager
def closed(run, process):
    run.chmod(0o555)
    process.signal(signal.SIGCONT)
    yield "dead"
    run.chmod(0o755)


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=777", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@needs_root
@pytest.mark.parametrize("trouble", [full, read_only, closed])
def test_a_run_goes_on_once_its_disk_does(small, main, child, disk, trouble):
    """As root without its capabilities, which may write to closed folders no more than others may."""
    assert main("train", "whole", small, *LONG) == 0
    run = disk / "run"
    process = child(run, *LONG, powerless=True)
    wait_for(lambda: (run / "checkpoint.prev.pt").exists(), process)
    process.signal(signal.SIGSTOP)
    with trouble(run, process) as status:
        assert_stopped(run, *process.communicate())
        assert results.status(run) == status
        assert read_checkpoint(run / "checkpoint.pt")["epoch"] < 10
    assert child(run, *LONG, *RELOAD, powerless=True).communicate()[0] == 0
    assert run_difference(Path("whole"), run) is None


# --- damaged files --------------------------------------------------------------------------------


def test_every_bit_and_every_length_of_a_checkpoint_counts(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"epoch": 3, "network": {"weight": torch.arange(6.0)}, "history": [{"loss": 0.5}]})
    content, dice = path.read_bytes(), random.Random(0)
    assert read_checkpoint(path)["epoch"] == 3
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << dice.randrange(8)
        for damaged in (bytes(flipped), content[:place]):
            path.write_bytes(damaged)
            with pytest.raises(Damaged, match=r"checkpoint\.pt: is damaged"):
                read_checkpoint(path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_the_commit_before_a_damaged_one_is_taken_and_kept(small, main, capfd, damage):
    longer = ("-b", "training_loop.n_epochs=4")
    assert main("train", "whole", small, *longer) == 0
    assert main("train", "a", small) == 0
    path, previous = Path("a/checkpoint.pt"), Path("a/checkpoint.prev.pt")
    content, dice = bytearray(path.read_bytes()), random.Random(damage)
    if damage == "missing":
        path.unlink()
    else:
        place = dice.randrange(len(content))
        content[place] ^= 1 << dice.randrange(8)
        path.write_bytes(content[:place] if damage == "truncated" else content)
    assert main("train", "a", small, *RELOAD, "-b", "training_loop.n_epochs=1") == 0  # commits nothing
    assert f"a/checkpoint.pt: is {damage if damage == 'missing' else 'damaged'}" in capfd.readouterr().err
    assert main("train", "a", small, *RELOAD, *longer) == 0
    assert len(read_meta(Path("a"))["warnings"]) == 1
    assert run_difference(Path("whole"), Path("a")) is None
    assert read_checkpoint(previous)["epoch"] == 3
    assert_each_epoch_once("a", 4)
    for file in (path, previous):
        file.write_bytes(file.read_bytes()[:-1])
    before = contents(Path("a"))
    assert main("train", "a", small, *RELOAD, *longer) == 2
    assert "best.pt holds the best weights (training_loop.init_from starts" in capfd.readouterr().err
    assert contents(Path("a")) == before


class Evil:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_no_file_of_a_run_runs_code(small, main, capfd, kind, sealed):
    assert main("train", "a", small) == 0
    buffer = io.BytesIO()
    if kind == "pickle":
        buffer.write(pickle.dumps(Evil(), protocol=2))
    else:
        torch.save({"epoch": 2, "network": Evil()}, buffer, _use_new_zipfile_serialization=kind == "torch")
    if sealed:
        buffer.write(hashlib.sha256(buffer.getvalue()).digest())
    for name in ("checkpoint.pt", "checkpoint.prev.pt", "best.pt"):
        Path("a", name).write_bytes(buffer.getvalue())
    reason = "is no checkpoint of this project" if sealed else "is damaged"
    before = contents(Path())
    capfd.readouterr()
    for weights, name in (("best", "best.pt"), ("last", "checkpoint.pt")):
        with pytest.raises(Refused, match=f"a/{name}: {reason}"):
            results.load_model("a", weights=weights)
    assert main("evaluate", "a") == 2
    assert main("train", "b", small, "-b", "training_loop.init_from='a'") == 2
    assert main("train", "a", small, *RELOAD) == 2
    errors = capfd.readouterr().err
    assert errors.count(f"a/best.pt: {reason}") == 2 and "checkpoint.prev.pt are damaged" in errors, errors
    assert "Traceback" not in errors and "weights_only" not in errors
    assert contents(Path()) == before and not Path("pwned").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert Path("pwned").exists()  # it would have worked


# --- one owner ------------------------------------------------------------------------------------


@pytest.mark.alone
def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(small, main, child, capfd):
    assert main("train", "whole", small, *LONG) == 0
    first = child("run", *LONG)
    wait_for(lambda: Path("run/history.csv").exists(), first)
    first.signal(signal.SIGSTOP)  # it owns the run, whether it makes steps or not
    began, before = time.monotonic(), contents(Path("run"))
    assert main("train", "run", small, *LONG, *RELOAD) == 2
    assert time.monotonic() - began < 1
    message = f"run: process {first.process.pid} on {socket.gethostname()} is writing to this run"
    assert message in capfd.readouterr().err
    assert contents(Path("run")) == before
    first.kill()
    assert main("train", "run", small, *LONG, *RELOAD) == 0
    assert run_difference(Path("whole"), Path("run")) is None


def test_of_two_that_start_at_once_one_owns_the_run(small, main, child):
    assert main("train", "whole", small) == 0
    both = [child("run", *RELOAD) for _ in range(2)]
    codes, errors = zip(*(one.communicate() for one in both), strict=True)
    assert sorted(codes) in ([0, 2], [0, 0]), errors  # the second may come after the first has finished
    assert all(not e or "is writing to this run" in e for e in errors)
    assert run_difference(Path("whole"), Path("run")) is None


# --- each epoch once ------------------------------------------------------------------------------


def assert_each_epoch_once(run, n_epochs):
    """In history.csv, and each of its columns in TensorBoard's files, with the same value."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    rows = list(csv.DictReader(Path(run, "history.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == list(range(1, n_epochs + 1))
    points = Counter()
    for file in Path(run).glob("events.out.tfevents.*"):
        for event in LegacyEventFileLoader(str(file)).Load():
            points.update((value.tag, event.step) for value in event.summary.value)
    epochs = {point for point in points if point[0].startswith("epoch/")}
    assert epochs == {(f"epoch/{key}", int(row["epoch"])) for row in rows for key in row if key != "epoch"}
    assert {point for point in points if point[0].startswith("final/")} >= {("final/loss", n_epochs)}
    repeated = {point: n for point, n in points.items() if n > 1 and point[0].startswith(("epoch/", "step/", "final/"))}
    assert not repeated


@pytest.mark.slow
def test_kills_repeat_no_epoch_and_lose_none(small, main, child):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    began = time.monotonic()
    assert main("train", "whole", small, *LONG) == 0
    seconds = time.monotonic() - began
    for _ in range(6):
        process = child("run", *LONG, *RELOAD)
        time.sleep(dice.uniform(0.2, 0.6) * seconds)
        process.kill()
    assert child("run", *LONG, *RELOAD).communicate()[0] == 0
    assert run_difference(Path("whole"), Path("run")) is None
    assert_each_epoch_once("run", 10)
