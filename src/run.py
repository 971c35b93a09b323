"""One run's folder: open, lock, record, commit, close. README.md lists its files.

A refusal leaves the folder as it was. What `commit` has written once is never lost: the checkpoint is
one file, written beside, flushed to the disk and renamed; all else follows from it.
"""

import csv
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from src import record
from src.config import Config, Refused, Settings, read_flat, refused_at
from src.output import Output

# Settings that may differ when a run goes on, since they do not change what is computed.
LOOP_FREE = "n_epochs reload accept_changes init_from commit_every stop_at device log_every detect_anomaly n_workers"
FREE = {f"training_loop.{name}" for name in LOOP_FREE.split()}
# Where data come from: their fingerprint is compared.
FREE |= {"cifar10.url", "cifar10.md5", "image_folder.folder"}
PACKAGES = ("torch", "torchvision", "poutyne", "gin-config", "numpy")  # whose versions each start records
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
DIGEST_BYTES = 32
HEARTBEAT_SECONDS = 10.0
# Settings that say which images the batches of an epoch hold: they may change between epochs only.
OF_AN_EPOCH = {"data", *(f"training_loop.{name}" for name in ("batch_size", "accumulate", "steps_per_epoch", "seed"))}
OWN: set[Path] = set()  # folders whose lock this process holds


class Damaged(Refused):
    """A checkpoint that is missing, or whose bytes are not those that were written."""


class Run:
    """The folder `path`, owned until `close`: from its creation on if it is there, else from `open` on, which makes it.

    Raises Refused if the folder is unfit: a file, not writable, in use, holding another thing than
    a run, or holding a run when the settings do not say reload.
    """

    config: Config  # checked, and with the data really used
    output: Output
    profile = False  # whether to write a trace of some steps

    def __init__(self, path: str | Path, settings: Settings, command: Sequence[str]) -> None:
        self.path, self.settings, self.command = Path(path), settings, command
        self.meta: dict[str, Any] = {"starts": [], "warnings": []}  # meta.json
        self.has_commit = False  # whether there is something to go on from
        self.is_pruned = False  # whether the run has finished, and its checkpoints were deleted since
        self.changed: dict[str, str] = {}  # settings, or "data", that are not as they were: "name: old -> new"
        self._is_recorded = False
        self._facts: dict[str, Any] = {}  # meta.json's, of the settings as they are now
        self._went_back = False  # to the commit before the last
        self._heartbeat = -1  # the descriptor of HEARTBEAT, which is locked
        self._beat_at, self._step = -math.inf, 0
        self._look()

    # --- before anything is written

    def _look(self) -> None:
        path = self.path
        try:
            str(path.resolve()).encode()
        except UnicodeError:
            raise Refused(f"{str(path)!a}: its name is not UTF-8: choose another folder for the run") from None
        if path.exists() and not path.is_dir():
            raise Refused(f"{path}: is a file: give the name of a folder for the run")
        place = next(p for p in (path, *path.parents) if p.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise Refused(f"{path}: {place} cannot be written to: choose another folder for the run")
        names = sorted(os.listdir(path)) if path.exists() else []
        if not names:
            return
        if "HEARTBEAT" not in names and "meta.json" not in names:  # the first is made before all others
            foreign = ", ".join(names[:3])
            raise Refused(f"{path}: holds files that are no run's ({foreign}): choose a new or empty folder")
        if self.settings.last("training_loop.reload", False) is not True:
            advice = 'continue it with -b "training_loop.reload=True", or remove the folder'
            raise Refused(f"{path}: holds a run already: {advice}")
        self._lock()
        names = os.listdir(path)  # as it stays from here on
        self.has_commit = "checkpoint.pt" in names or "checkpoint.prev.pt" in names
        self.is_pruned = "FINISHED" in names and not self.has_commit
        if self.has_commit or self.is_pruned or "meta.json" in names:
            with refused_at(path / "meta.json"):
                self.meta = read_meta(path)

    def _lock(self) -> None:
        # A POSIX lock belongs to the process alone: it dies with it, and no child keeps it alive.
        self._heartbeat = os.open(self.path / "HEARTBEAT", os.O_RDWR | os.O_CREAT, 0o666)
        for _ in range(5):  # who asks whether a run is locked holds the lock for an instant
            try:
                fcntl.lockf(self._heartbeat, fcntl.LOCK_EX | fcntl.LOCK_NB)
                OWN.add(self.path.resolve())
                os.utime(self._heartbeat)  # not stalled while it starts
                return
            except (BlockingIOError, PermissionError):
                time.sleep(0.02)
            except OSError as error:
                if os.listdir(self.path) == ["HEARTBEAT"]:
                    (self.path / "HEARTBEAT").unlink()
                    with suppress(OSError):  # it is a link to a folder
                        self.path.rmdir()
                reason = f"this file system has no locks ({error.strerror})"
                raise Refused(f"{self.path}: {reason}: choose a folder on another one") from None
        with refused_at(self.path / "meta.json"):
            start = read_meta(self.path)["starts"][-1] if (self.path / "meta.json").exists() else {}
        owner = f"process {start['pid']} on {start['host']}" if start else "another process"
        raise Refused(f"{self.path}: {owner} is writing to this run: wait for it, or choose another folder")

    def last_commit(self) -> dict[str, Any] | None:
        """The last commit, or the one before if that is damaged; None if there is none. Raises Refused if both are."""
        if not self.has_commit:
            return None
        try:
            return read_checkpoint(self.path / "checkpoint.pt")
        except Damaged as damage:
            self._went_back = True
            self.warn(f"{damage}: going back to the commit before")
        try:
            return read_checkpoint(self.path / "checkpoint.prev.pt")
        except Damaged:
            advice = "best.pt holds the best weights (training_loop.init_from starts a new run from them)"
            raise Refused(f"{self.path}: checkpoint.pt and checkpoint.prev.pt are damaged: {advice}") from None

    def refuse_changes(self, data: Mapping[str, Any], state: Mapping[str, Any] | None, *, accept: bool) -> None:
        """Compares settings and data with those that the commit `state` holds, or config.gin if there is none any more.

        Raises Refused when a difference would change what is computed (with `accept` it is warned of and recorded
        instead), and for what the run cannot do with its new settings.
        """
        if not (state or self.is_pruned):
            return
        if state and "config" not in state:
            raise Refused(f"{self.path}: was made by an older version: go on with the code in its code.tar.gz")
        old, new = dict(state["config"]) if state else read_flat(self.path / "config.gin"), self.config.flat()
        for flat, found in ((old, state["data"] if state else self.meta["data"]), (new, data)):
            flat["data"] = f"{found['name']} (fingerprint {found['fingerprint'][:12]})"
        for key, line in record.changes(old, new).items():
            # What only the code's defaults have added is the code's change, which is recorded as such.
            if key not in FREE and (key in old or key in self.settings.bindings):
                self.changed[key] = line
        if self.changed and not accept:
            lines = [f"{self.path}: holds a run with other settings (old -> new):", *self.changed.values()]
            advice = "use the old ones, start a new run in another folder, or take the new ones with "
            raise Refused("\n  ".join(lines) + f"\n{advice}training_loop.accept_changes=True")
        n_epochs = int(new["training_loop.n_epochs"])
        if self.is_pruned and (self.changed or n_epochs > int(old["training_loop.n_epochs"])):
            advice = f"training_loop.init_from='{self.path}' starts a new run from its best weights"
            raise Refused(f"{self.path}: the run's checkpoints were deleted, it cannot go on: {advice}")
        if state and self.changed and state["epoch"] >= n_epochs:
            advice = "raise training_loop.n_epochs to train with the new settings"
            raise Refused(f"{self.path}: {state['epoch']} epochs are done, nothing is left to train: {advice}")
        if state and state["step"] and (of_epoch := OF_AN_EPOCH & self.changed.keys()):
            advice = f"finish epoch {state['epoch'] + 1} with the old one first"
            raise Refused(f"{self.path}: {min(of_epoch)} cannot change inside an epoch: {advice}")
        begun, asked = self.meta.get("init_from", {}).get("run"), self.settings.last("training_loop.init_from", None)
        if asked not in (None, begun):
            raise Refused(f"training_loop.init_from = {asked!r}, but the run began from {begun or 'random weights'}")

    # --- open and close

    def open(self) -> None:
        """From here on the folder is the run's: it is made if it is not there.

        Raises Refused if another process has just made a run here.
        """
        if self._heartbeat < 0:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            if os.listdir(self.path) != ["HEARTBEAT"]:
                raise Refused(f"{self.path}: another process is writing to this run, or has just done so")
        if self._went_back:
            os.replace(self.path / "checkpoint.prev.pt", self.path / "checkpoint.pt")

    def record(self, state: Mapping[str, Any] | None, facts: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """Writes down what runs from now on, from the commit `state`; `facts` and `start` go into meta.json."""
        begin = {key: state[key] if state else 0 for key in ("epoch", "step", "total_steps")}
        self.beat(begin["total_steps"])
        self.output.move_to(self.path)
        if not state:  # what was killed before its first commit leaves only the list of its starts
            self.meta = {"starts": self.meta["starts"], "warnings": self.meta["warnings"]}
            for events in self.path.glob("events.out.tfevents.*"):
                events.unlink()
        meta, now, number = self.meta, timestamp(), len(self.meta["starts"]) + 1
        self._facts = dict(facts)
        self._settle(state)
        before = meta["starts"][-1]["threads"] if state else start["threads"]
        if start["device"] == "cpu" and start["threads"] != before:
            self.warn(f"{before} threads until now, {start['threads']} from here on (OMP_NUM_THREADS): other last bits")
        for change in self.changed.values():
            self.warn(f"the run goes on with another setting: {change}")
        code = record.code_files()
        files = record.changed_files(code, self.path / meta["code"]) if state else []
        if files:
            self.warn(f"the code has changed since the run's last start: {', '.join(files)}")
        if files or not state:
            meta["code"] = f"code.{number}.tar.gz" if state else "code.tar.gz"
            write(self.path / meta["code"], record.code_archive(code))
            with open(self.path / "git.txt", "a", encoding="utf-8") as file:
                file.write(f"# start {number}\n{record.git_state()}")
        entry = {
            "start": now, "stop": None, "status": "running", "exit": None, **begin, **start,
            "host": socket.gethostname(), "pid": os.getpid(), "platform": platform.platform(terse=True),
            "python": platform.python_version(), "versions": {name: metadata.version(name) for name in PACKAGES},
            "code": meta["code"], "config": self.config.text(),
        }  # fmt: skip
        meta["starts"].append(entry)
        meta |= {"status": "running", "exit": None}
        self._is_recorded = True
        if self.changed:  # what is new stands in the folder once a commit holds it
            self._write_meta()
        else:
            self.write_settings()
        script = self.path / "command.sh"
        if not script.exists():
            script.write_text("#!/usr/bin/env bash\n# Each start of this run: the exact command.\n")
            script.chmod(0o755)
        with open(script, "a", encoding="utf-8") as file:
            file.write(record.command(self.command, self.path, number, now, start["threads"]))
        record.copy_configs(self.settings.files, self.path / "configs")
        write(self.path / "environment.txt", record.environment())

    def _settle(self, state: Mapping[str, Any] | None) -> None:
        """Makes the config the run's: without what is of this start alone, from its beginning to its last epoch."""
        values: dict[str, Any] = {"reload": False, "accept_changes": False, "stop_at": None}
        if state:
            values["n_epochs"] = max(int(self.config.flat()["training_loop.n_epochs"]), state["epoch"])
            values["init_from"] = self.meta.get("init_from", {}).get("run")
        for name, value in values.items():
            self.config = self.config.set(f"training_loop.{name}", value)

    def write_settings(self) -> None:
        """config.gin, and the facts in meta.json: what the run goes on with."""
        write(self.path / "config.gin", self.config.text())
        self.meta |= self._facts
        self._write_meta()

    def close(self, status: str, exit_code: int, message: str) -> int:
        """Says how the run ended, in the folder and on stderr; FINISHED is written last of all.

        Returns the exit code: 1 if a finished run's end cannot be written.
        """
        if self._is_recorded:
            try:
                self._beat_at = -math.inf
                self.beat(self._step)
                self.meta["starts"][-1] |= {"stop": timestamp(), "status": status, "exit": exit_code}
                self.meta |= {"status": status, "exit": exit_code}
                self._write_meta()
                if status == "finished":
                    write(self.path / "FINISHED", timestamp() + "\n")
            except OSError as error:  # the disk is full, or the folder is gone
                exit_code = exit_code or 1
                message = message or f"train.py: {self.why_lost(error) or error}"
        if message:
            with suppress(OSError):  # what stderr.txt cannot take stays in the buffer, for the terminal
                print(message.rstrip(), file=sys.stderr)
        if self._heartbeat >= 0:
            os.close(self._heartbeat)
            OWN.discard(self.path.resolve())
        self.output.close()
        if (rank := self.output.rank) and message:  # what the first cannot say on the terminal:
            is_own = "Traceback" in message or "rank 0 (process" in message  # a bug here, the end of the first,
            if is_own or (exit_code == 2 and os.environ.get("LOCAL_RANK") == "0"):  # a refusal on another machine
                print(f"rank {rank}: {message.rstrip()}", file=sys.stderr)
        return exit_code

    def warn(self, message: str) -> None:
        """A warning, on stderr, that the record keeps."""
        print(f"warning: {message}", file=sys.stderr)
        if message not in self.meta["warnings"]:
            self.meta["warnings"].append(message)

    def _refuse_gone(self) -> None:
        """Raises FileNotFoundError if the folder is removed, or another one that a process may own has its name."""
        if not os.path.samestat(os.fstat(self._heartbeat), os.stat(self.path / "HEARTBEAT")):
            raise FileNotFoundError(errno.ENOENT, "was removed", str(self.path))

    def _write_meta(self) -> None:
        self._refuse_gone()
        write(self.path / "meta.json", json.dumps(self.meta, indent=2) + "\n")

    def beat(self, step: int) -> None:
        """HEARTBEAT: the last step and its time, rewritten at most every 10 s."""
        now, self._step = time.monotonic(), step
        if now - self._beat_at > HEARTBEAT_SECONDS:
            self._beat_at = now
            line = f"step {step} {timestamp()}\n".encode()
            os.pwrite(self._heartbeat, line, 0)
            os.ftruncate(self._heartbeat, len(line))

    def why_lost(self, error: BaseException) -> str | None:
        """What to tell if the folder cannot be written to any more, or a worker was killed; None for another error."""
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            advice = "try a smaller training_loop.n_workers, which takes less memory"
            return f"a process that reads the data was killed: {advice} ({str(error).splitlines()[0]})"
        if not isinstance(error, OSError):
            return None
        is_ours = Path(str(error.filename)).resolve().is_relative_to(self.path.resolve())
        if is_ours and isinstance(error, FileNotFoundError):
            return f"{self.path}: was removed while the run was writing to it"
        if not is_ours and error.errno not in DISK_ERRORS:
            return None
        advice = "What was committed is intact: put that right, then go on with training_loop.reload=True"
        return f"{self.path}: cannot be written to: {error.strerror}. {advice}"

    # --- commit

    def commit(self, state: Mapping[str, Any]) -> None:
        """Makes the state durable at once; the commit before is kept as checkpoint.prev.pt."""
        self._refuse_gone()
        config = {key: value for key, value in self.config.flat().items() if key not in FREE}
        state = {**state, "config": config, "data": self._facts["data"]}
        write_checkpoint(self.path / "checkpoint.pt", state, previous=self.path / "checkpoint.prev.pt")

    def write_best(self, state: Mapping[str, Any]) -> None:
        """best.pt: the epoch and the network's weights."""
        write_checkpoint(self.path / "best.pt", state)

    def unfinish(self) -> None:
        """The run goes on: its end's files are no longer true."""
        for name in ("FINISHED", "eval_results.json"):
            (self.path / name).unlink(missing_ok=True)

    def write_history(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """history.csv: all committed epochs, one row each."""
        file = io.StringIO()
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), restval="nan")
        writer.writeheader()
        writer.writerows(rows)
        write(self.path / "history.csv", file.getvalue())


class Shadow(Run):
    """A run as its processes beside the first have it: they write what they print, stdout.rank1.txt and so on."""

    def _ignore(self, *_: Any, **__: Any) -> Any:
        """The first does it."""

    _look = last_commit = refuse_changes = open = warn = beat = commit = _ignore
    write_settings = write_history = write_best = unfinish = why_lost = _ignore

    def record(self, *_: Any) -> None:
        """From now on what is printed goes into the folder."""
        self.path.mkdir(parents=True, exist_ok=True)  # on another machine it may not be seen
        self.output.move_to(self.path)


# --- files of a folder ----------------------------------------------------------------------------


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of a run's folder."""
    meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    return meta


def is_locked(path: Path) -> bool:
    """Whether a living process owns the run."""
    if path.resolve() in OWN:  # to open and close the file would give the lock away
        return True
    try:
        with open(path / "HEARTBEAT", "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return isinstance(error, BlockingIOError | PermissionError)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `write_checkpoint` wrote, tensors on the CPU; runs no code that a file may hold.

    Raises Damaged if it is missing, a byte differs, or it was written by something else.
    """
    import torch

    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{path}: is missing") from None
    body, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise Damaged(f"{path}: is damaged (its checksum does not fit)")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(body), weights_only=True, map_location="cpu")
    except Exception as error:  # of all kinds; torch's own advice in it is to run what the file holds
        kind = type(error).__name__
        raise Damaged(f"{path}: is no checkpoint of this project ({kind}); nothing in it was run") from None
    return state


def write_checkpoint(path: Path, state: Mapping[str, Any], previous: Path | None = None) -> None:
    """Tensors, numbers, strings, lists and dicts; ends in the SHA-256 of the bytes before it.

    Whole or not at all, and lastingly. What `path` held is kept as `previous`, if that is given.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    write(path, buffer.getbuffer(), previous)


def write(path: Path, content: str | bytes | memoryview, previous: Path | None = None) -> None:
    """Writes the file whole or not at all, and lastingly; what it held is kept as `previous`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):  # a full disk needs the room for meta.json
            temporary.unlink()
        raise
    if previous and path.exists():  # as another name of the file: `path` exists at every instant
        previous.unlink(missing_ok=True)
        try:
            os.link(path, previous)
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise
            shutil.copyfile(path, previous)  # this file system has no links
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
