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
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from src import record
from src.config import Config, Refused, Settings, format_value, read
from src.output import NAMES, Output

# What a start that was killed at once leaves behind: no run yet.
BEFORE_META = {"HEARTBEAT", "code.tar.gz", "git.txt", *NAMES}
BEFORE_META |= {f".{name}.tmp" for name in ("meta.json", "code.tar.gz", "git.txt")}
# Settings that may differ when a run goes on, since they do not change what is computed.
LOOP_FREE = {"n_epochs", "reload", "accept_changes", "init_from", "commit_every", "stop_at", "device", "log_every"}
FREE = {f"training_loop.{name}" for name in LOOP_FREE | {"detect_anomaly", "n_workers"}}
# Where data come from: their fingerprint is compared.
FREE |= {"cifar10.url", "cifar10.md5", "cifar10.timeout", "image_folder.folder"}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
DIGEST_BYTES = 32
HEARTBEAT_SECONDS = 10.0
OWN: set[Path] = set()  # folders whose lock this process holds


class Damaged(Refused):
    """A checkpoint whose bytes are not those that were written."""


class Run:
    """The folder `path`. Creating one only looks; `open` makes the folder and owns it until `close`.

    Raises Refused if the folder is unfit: a file, not writable, in use, holding another thing than
    a run, or holding a run when the settings do not say reload.
    """

    config: Config  # checked, and with the data really used

    def __init__(self, path: str | Path, settings: Settings, command: Sequence[str]) -> None:
        self.path = Path(path)
        self.settings = settings
        self.command = command
        self.reload = settings.last("training_loop.reload", False) is True
        self.output: Output | None = None
        self.profile = False  # whether to write a trace of some steps
        self.meta: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.changed: list[str] = []  # settings that differ from the run's until now
        self.changes: list[str] = []  # these and the data, for people
        self.is_open = False
        self._beat_at = 0.0
        try:
            self._refuse_unfit()
        except OSError as error:
            raise Refused(f"{path}: cannot be looked at: {error.strerror}: choose another folder for the run") from None

    # --- before anything is written

    def _refuse_unfit(self) -> None:
        path = self.path
        try:
            str(path.resolve()).encode()
        except UnicodeEncodeError:
            raise Refused(f"{path}: its name is not UTF-8: choose another folder for the run") from None
        if path.exists() and not path.is_dir():
            raise Refused(f"{path}: is a file: give the name of a folder for the run")
        place = path
        while not place.exists():
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise Refused(f"{path}: {place} cannot be written to: choose another folder for the run")
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        foreign = sorted(n for n in names - BEFORE_META if not re.fullmatch(r"std(out|err)\.rank\d+\.txt", n))
        if foreign and "meta.json" not in names:
            raise Refused(
                f"{path}: holds files that are no run's ({', '.join(foreign[:3])}): choose a new or empty folder"
            )
        if names and not self.reload:
            raise Refused(
                f'{path}: holds a run already: continue it with -b "training_loop.reload=True", or remove the folder'
            )
        if is_locked(path):
            raise Refused(_in_use(path))

    @property
    def has_commit(self) -> bool:
        """Whether there is something to go on from."""
        return any((self.path / name).exists() for name in ("checkpoint.pt", "checkpoint.prev.pt"))

    @property
    def is_pruned(self) -> bool:
        """Whether the run has finished, and its checkpoints were deleted since."""
        return (self.path / "FINISHED").exists() and not self.has_commit

    def refuse_changes(self, data: Mapping[str, Any], *, accept: bool) -> None:
        """Compares settings and data with those of the folder's run.

        Raises Refused when a difference would change what is computed; with `accept` it is warned of
        and recorded instead.
        """
        if not self.has_commit and not self.is_pruned:
            return
        before = read_meta(self.path)["data"]
        old, new = read_flat(self.path / "config.gin"), self.config.flat()
        self.changed = [
            key
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
            and key not in FREE
            # What only the code's defaults have added is the code's change, which is recorded as such.
            and (key in old or self.settings.binds(key))
        ]
        self.changes = [f"{key}: {old.get(key, '(not set)')} -> {new.get(key, '(not set)')}" for key in self.changed]
        if before["fingerprint"] != data["fingerprint"]:
            self.changes.insert(0, f"data: {_named(before)} -> {_named(data)}")
        if self.changes and not accept:
            chosen = old["training_loop.data"]
            same_data = (
                f'. -b "training_loop.data={chosen}" takes the data that it was trained on'
                if new["training_loop.data"] != chosen
                else ""
            )
            raise Refused(
                f"{self.path}: holds a run with other settings (old -> new):\n  "
                + "\n  ".join(self.changes)
                + "\nuse the old ones, start a new run in another folder, or take the new ones with "
                + f"training_loop.accept_changes=True{same_data}"
            )

    # --- open and close

    def open(self) -> dict[str, Any] | None:
        """Makes the folder, takes the lock, and returns the last commit, if there is one.

        A damaged commit is reported, and the one before it taken. Raises Refused if both are damaged
        or another process owns the run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        if not self.reload and {entry.name for entry in self.path.iterdir()} != {"HEARTBEAT"}:
            raise Refused(f"{self.path}: another process has just made a run here")
        return self._load()

    def record(self, state: Mapping[str, Any] | None, facts: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """Writes down what runs from now on, from the commit `state`.

        `facts` goes into meta.json, `start` into its list of starts.
        """
        self.beat(step=state["total_steps"] if state else 0, at_once=True)
        if self.output:
            self.output.move_to(self.path)
        self.meta = read_meta(self.path) if (self.path / "meta.json").exists() else {}
        starts = self.meta.setdefault("starts", [])
        number, now = len(starts) + 1, timestamp()
        code = record.code_files()
        changed = record.changed_files(code, self.path / self.meta["code"]) if state else []
        if changed:
            self.warn(f"the code has changed since the run's last start: {', '.join(changed)}")
        for change in self.changes:
            self.warn(f"the run goes on with another setting: {change}")
        begin = {key: state[key] if state else 0 for key in ("epoch", "step", "total_steps")}
        entry = {"start": now, "stop": None, "status": "running", "exit": None, **begin, **start}
        entry |= {"host": socket.gethostname(), "pid": os.getpid()}
        if changed or not state:
            entry["code"] = self.meta["code"] = f"code.{number}.tar.gz" if changed else "code.tar.gz"
            write(self.path / entry["code"], record.code_archive(code))
            before = (self.path / "git.txt").read_text(encoding="utf-8") if state else ""
            write(self.path / "git.txt", f"{before}# start {number}\n{record.git_state()}")
        again = state and "config" in starts[-1] and starts[-1]["total_steps"] == state["total_steps"]
        if self.changes or not state or again:  # what that start changed may have come to nothing
            entry["config"] = self.config.text()
        if not self.changed:  # else config.gin says it once a commit holds it
            self.write_config()
        starts.append(entry)
        self.is_open = True  # there is an entry that says how it ends
        self.meta |= {"status": "running", "exit": None, **facts}
        self.warnings = list(dict.fromkeys([*self.meta.get("warnings", []), *self.warnings]))
        self._write_meta()
        with open(self.path / "command.sh", "a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write("#!/usr/bin/env bash\n# Each start of this run: the exact command.\n\n")
            file.write(record.command(self.command, self.path, number, now, start["threads"]))
        (self.path / "command.sh").chmod(0o755)
        record.copy_configs(self.settings.files, self.path / "configs")
        write(self.path / "environment.txt", record.environment())

    def write_config(self) -> None:
        """config.gin: the settings that the run goes on with."""
        write(self.path / "config.gin", self.config.text())

    def _lock(self) -> None:
        # A POSIX lock belongs to the process alone: it dies with it, and no child keeps it alive.
        self._heartbeat = os.open(self.path / "HEARTBEAT", os.O_RDWR | os.O_CREAT, 0o666)
        for attempt in range(5):  # who asks whether a run is locked holds the lock for an instant
            try:
                fcntl.lockf(self._heartbeat, fcntl.LOCK_EX | fcntl.LOCK_NB)
                OWN.add(self.path.resolve())
                return
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    (self.path / "HEARTBEAT").unlink()
                    with suppress(OSError):  # not empty: it was there before
                        self.path.rmdir()
                    raise Refused(
                        f"{self.path}: this file system has no locks ({error.strerror}): two "
                        "processes could write to one run; choose a folder on another one"
                    ) from None
            time.sleep(0.02 * attempt)
        raise Refused(_in_use(self.path))

    def close(self, status: str, exit_code: int, message: str) -> int:
        """Says how the run ended, on stderr and in the folder; FINISHED is written last of all.

        Returns the exit code: 1 if a finished run's end cannot be written.
        """
        unsaid = ""
        if message:
            with suppress(OSError):  # what stderr.txt cannot take stays in the buffer, for the terminal
                print(message.rstrip(), file=sys.stderr)
        try:
            if self.is_open:
                self.meta |= {"status": status, "exit": exit_code}
                self.meta["starts"][-1] |= {"status": status, "exit": exit_code, "stop": timestamp()}
                self._write_meta()
            if self.is_open and status == "finished":
                write(self.path / "FINISHED", timestamp() + "\n")
        except OSError as error:  # the disk is full, or the folder is gone
            exit_code = exit_code or 1
            unsaid = "" if message else self.why_lost(error) or f"{self.path}: {error}"
        if self.is_open:
            os.close(self._heartbeat)
            OWN.discard(self.path.resolve())
        self.is_open = False
        if self.output:
            self.output.close()
        if unsaid:
            print(unsaid, file=sys.stderr)
        return exit_code

    def warn(self, message: str) -> None:
        """A warning that the record keeps: on stderr and in meta.json."""
        print(f"warning: {message}", file=sys.stderr)
        self.warnings.append(message)
        if self.is_open:
            self._write_meta()

    @property
    def is_gone(self) -> bool:
        """Whether the folder is no longer the one that `open` took the lock in: removed, or another in its place."""
        try:
            return not os.path.samestat(os.fstat(self._heartbeat), os.stat(self.path / "HEARTBEAT"))
        except FileNotFoundError:
            return True

    def _refuse_gone(self) -> None:
        # Another process may own a new folder of this name.
        if self.is_gone:
            raise FileNotFoundError(errno.ENOENT, "was removed", str(self.path))

    def _write_meta(self) -> None:
        self._refuse_gone()
        meta = self.meta | {"warnings": self.warnings}
        write(self.path / "meta.json", json.dumps(meta, indent=2) + "\n")

    def beat(self, step: int, at_once: bool = False) -> None:
        """HEARTBEAT: the last step and its time, rewritten at most every 10 s."""
        now = time.monotonic()
        if at_once or now - self._beat_at > HEARTBEAT_SECONDS:
            self._beat_at = now
            line = f"step {step} {timestamp()}\n".encode()
            os.pwrite(self._heartbeat, line, 0)
            os.ftruncate(self._heartbeat, len(line))

    def why_lost(self, error: BaseException) -> str | None:
        """What to tell the person if the folder can no longer be written to, or a worker was killed, which
        torch notices wherever the run is just then; None for another error.
        """
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            what = str(error).splitlines()[0]  # by whoever needed its memory, as a rule
            return f"a process that reads the data was killed ({what}): try a smaller training_loop.n_workers"
        if not isinstance(error, OSError):
            return None
        if self.is_open and self.is_gone:
            return f"{self.path}: was removed while the run was writing to it"
        ours = error.filename and Path(os.fsdecode(error.filename)).resolve().is_relative_to(self.path.resolve())
        if ours or error.errno in DISK_ERRORS:
            return (
                f"{self.path}: cannot be written to: {error.strerror}. What was committed is intact: put that "
                "right, then go on with training_loop.reload=True"
            )
        return None

    @property
    def began_from(self) -> str | None:
        """The folder whose best weights the run began from, as meta.json says."""
        return read_meta(self.path).get("init_from", {}).get("run")  # type: ignore[no-any-return]

    # --- commit and load

    def commit(self, state: Mapping[str, Any]) -> None:
        """Makes the state durable at once; the commit before is kept as checkpoint.prev.pt."""
        self._refuse_gone()
        write_checkpoint(self.path / "checkpoint.pt", state, previous=self.path / "checkpoint.prev.pt")

    def write_best(self, state: Mapping[str, Any]) -> None:
        """best.pt: the epoch and the network's weights."""
        write_checkpoint(self.path / "best.pt", state)

    def _load(self) -> dict[str, Any] | None:
        path, previous = self.path / "checkpoint.pt", self.path / "checkpoint.prev.pt"
        if not self.has_commit:
            return None
        try:
            return read_checkpoint(path)
        except (FileNotFoundError, Damaged) as damage:
            try:
                state = read_checkpoint(previous)
            except (FileNotFoundError, Damaged):
                raise Refused(
                    f"{self.path}: checkpoint.pt and checkpoint.prev.pt are damaged: the run cannot be continued. "
                    "best.pt holds the best weights (training_loop.init_from starts a new run from them), "
                    "history.csv the epochs"
                ) from None
            reason = damage.message if isinstance(damage, Damaged) else f"{path}: is missing"
        self.warn(f"{reason}: going back to the commit before")
        _link(previous, path)  # the next commit keeps what checkpoint.pt holds as the previous one
        return state

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


class Shadow:
    """A run as its processes beside the first have it: they write what they print, stdout.rank1.txt and so on."""

    config: Config
    is_pruned = has_commit = profile = False
    began_from = None

    def __init__(self, path: str | Path, settings: Settings, rank: int) -> None:
        self.path, self.settings, self.rank = Path(path), settings, rank
        self.output: Output | None = None
        self.changed: list[str] = []  # as the first says

    def open(self) -> None:
        """The first opens it."""

    def record(self, *_: Any) -> None:
        """From now on what is printed goes into the folder."""
        if self.output:
            self.path.mkdir(parents=True, exist_ok=True)  # on another machine it may not be seen
            self.output.move_to(self.path)

    def refuse_changes(self, *_: Any, accept: bool) -> None:
        """The first does it."""

    def warn(self, *_: Any) -> None:
        """The first does it."""

    write_config = write_history = write_best = commit = unfinish = beat = warn

    def why_lost(self, error: BaseException) -> str | None:
        """What a bug is told by is its traceback."""
        return None

    def close(self, status: str, exit_code: int, message: str) -> int:
        """Returns the exit code. On the terminal it says what the first cannot: a bug here, a refusal on another
        machine, the end of the first.
        """
        if message:
            print(message.rstrip(), file=sys.stderr)
        if self.output:
            self.output.close()
        is_ours = "Traceback" in message or "rank 0 (process" in message
        if is_ours or (exit_code == 2 and os.environ.get("LOCAL_RANK") == "0"):
            print(f"rank {self.rank}: {message.rstrip()}", file=sys.stderr)
        return exit_code


# --- reading a folder -----------------------------------------------------------------------------


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of a run's folder."""
    meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    return meta


def read_flat(config: Path) -> dict[str, str]:
    """A config.gin as `Config.flat` gives it."""
    return {b.key: format_value(b.value) for b in read([str(config)]).bindings}


def is_locked(path: Path) -> bool:
    """Whether a living process owns the run."""
    if path.resolve() in OWN:  # to open and close the file would give the lock away
        return True
    try:
        with open(path / "HEARTBEAT", "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `write_checkpoint` wrote, tensors on the CPU; runs no code that a file may hold.

    Raises Damaged if a byte differs, or if it was written by something else.
    """
    import torch

    content = path.read_bytes()
    body, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise Damaged(f"{path}: is damaged (its checksum does not fit)")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(body), weights_only=True, map_location="cpu")
    except Exception as error:  # of all kinds; torch's own advice in it is to run what the file holds
        raise Damaged(
            f"{path}: is no checkpoint of this project: it holds more than tensors, numbers, strings and "
            f"lists ({type(error).__name__}); nothing of it was run"
        ) from None
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
    if previous and path.exists():
        _link(path, previous)  # a link: `path` exists at every instant
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _link(path: Path, name: Path) -> None:
    """`name` becomes another name of the file `path`, in place of what it was."""
    temporary = name.with_name(f".{name.name}.link")
    temporary.unlink(missing_ok=True)
    os.link(path, temporary)
    os.replace(temporary, name)


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> dict[str, Any]:
    """What a start ran on, but for the device."""
    from importlib.metadata import version

    packages = ("torch", "torchvision", "poutyne", "gin-config", "numpy")
    return {
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _in_use(path: Path) -> str:
    start = read_meta(path)["starts"][-1] if (path / "meta.json").exists() else {}
    owner = f"process {start['pid']} on {start['host']}" if start else "another process"
    return f"{path}: {owner} is writing to this run: wait for it, or choose another folder"


def _named(data: Mapping[str, Any]) -> str:
    return f"{data.get('name')} (fingerprint {str(data.get('fingerprint'))[:12]})"
