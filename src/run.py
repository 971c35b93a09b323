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
import re
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
from src.config import Config, Refused, Settings, read_flat
from src.output import Output

# What a start that was killed at once leaves behind: no run yet.
BEFORE_META = r"HEARTBEAT|std(out|err)(\.rank\d+)?\.txt|\.?(code\.tar\.gz|git\.txt)(\.tmp)?|\.meta\.json\.tmp"
# Settings that may differ when a run goes on, since they do not change what is computed.
LOOP_FREE = "n_epochs reload accept_changes init_from commit_every stop_at device log_every detect_anomaly n_workers"
FREE = {f"training_loop.{name}" for name in LOOP_FREE.split()}
# Where data come from: their fingerprint is compared.
FREE |= {"cifar10.url", "cifar10.md5", "cifar10.timeout", "image_folder.folder"}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
DIGEST_BYTES = 32
HEARTBEAT_SECONDS = 10.0
OWN: set[Path] = set()  # folders whose lock this process holds


class Damaged(Refused):
    """A checkpoint that is missing, or whose bytes are not those that were written."""


class Run:
    """The folder `path`. Creating one only looks; `open` makes the folder and owns it until `close`.

    Raises Refused if the folder is unfit: a file, not writable, in use, holding another thing than
    a run, or holding a run when the settings do not say reload.
    """

    config: Config  # checked, and with the data really used

    def __init__(self, path: str | Path, settings: Settings, command: Sequence[str]) -> None:
        self.path, self.settings, self.command = Path(path), settings, command
        self.reload = settings.last("training_loop.reload", False) is True
        self.output: Output | None = None
        self.profile = False  # whether to write a trace of some steps
        self.meta: dict[str, Any] = {}
        self.warnings: list[str] = []  # of this start
        self.changed: list[str] = []  # settings that differ from the run's until now
        self.changes: list[str] = []  # these and the data, for people
        self.is_open = False
        self._beat_at = -math.inf
        try:
            self._refuse_unfit()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", "its name is not UTF-8")
            raise Refused(f"{path}: cannot be looked at: {reason}: choose another folder for the run") from None

    # --- before anything is written

    def _refuse_unfit(self) -> None:
        path = self.path
        str(path.resolve()).encode()  # a UnicodeError if the record could not name it
        if path.exists() and not path.is_dir():
            raise Refused(f"{path}: is a file: give the name of a folder for the run")
        place = next(p for p in (path, *path.parents) if p.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise Refused(f"{path}: {place} cannot be written to: choose another folder for the run")
        names = sorted(os.listdir(path)) if path.exists() else []
        foreign = ", ".join([name for name in names if not re.fullmatch(BEFORE_META, name)][:3])
        if foreign and "meta.json" not in names:
            raise Refused(f"{path}: holds files that are no run's ({foreign}): choose a new or empty folder")
        if names and not self.reload:
            advice = 'continue it with -b "training_loop.reload=True", or remove the folder'
            raise Refused(f"{path}: holds a run already: {advice}")
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

        Raises Refused when a difference would change what is computed (with `accept` it is warned of and recorded
        instead), or when a finished run whose checkpoints were deleted is to have more epochs.
        """
        if not self.has_commit and not self.is_pruned:
            return
        old, new, before = read_flat(self.path / "config.gin"), self.config.flat(), read_meta(self.path)["data"]
        # What only the code's defaults have added is the code's change, which is recorded as such.
        counted = [key for key in sorted(old.keys() | new.keys()) if key in old or key in self.settings.bindings]
        self.changed = [key for key in counted if key not in FREE and old.get(key) != new.get(key)]
        self.changes = [f"{key}: {old.get(key, '(not set)')} -> {new.get(key, '(not set)')}" for key in self.changed]
        if before["fingerprint"] != data["fingerprint"]:
            self.changes.insert(0, f"data: {_named(before)} -> {_named(data)}")
        if self.changes and not accept:
            advice = "use the old ones, start a new run in another folder, or take the new ones with "
            advice += "training_loop.accept_changes=True"
            if "training_loop.data" in self.changed:
                advice += f'. -b "training_loop.data={old["training_loop.data"]}" takes the data that it was trained on'
            title = f"{self.path}: holds a run with other settings (old -> new):"
            raise Refused("\n  ".join([title, *self.changes]) + f"\n{advice}")
        n_before, n_epochs = (int(flat["training_loop.n_epochs"]) for flat in (old, new))
        if self.is_pruned and n_epochs > n_before:
            advice = f"training_loop.init_from='{self.path}' starts a new one from its best weights"
            raise Refused(f"{self.path}: the run's checkpoints were deleted: it ends at epoch {n_before}; {advice}")

    # --- open and close

    def open(self) -> dict[str, Any] | None:
        """Makes the folder, takes the lock, and returns the last commit, or the one before if that is damaged.

        Raises Refused if both are damaged or another process owns the run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        if not self.reload and os.listdir(self.path) != ["HEARTBEAT"]:
            raise Refused(f"{self.path}: another process has just made a run here")
        return self._load()

    def record(self, state: Mapping[str, Any] | None, facts: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """Writes down what runs from now on, from the commit `state`; `facts` and `start` go into meta.json."""
        self.beat(step=state["total_steps"] if state else 0)
        if self.output:
            self.output.move_to(self.path)
        self.meta = read_meta(self.path) if (self.path / "meta.json").exists() else {"starts": [], "warnings": []}
        self._settle(state)
        starts, now = self.meta["starts"], timestamp()
        number = len(starts) + 1
        code = record.code_files()
        changed = record.changed_files(code, self.path / self.meta["code"]) if state else []
        if changed:
            self.warn(f"the code has changed since the run's last start: {', '.join(changed)}")
        for change in self.changes:
            self.warn(f"the run goes on with another setting: {change}")
        begin = {key: state[key] if state else 0 for key in ("epoch", "step", "total_steps")}
        entry = {"start": now, "stop": None, "status": "running", "exit": None, **begin, **start, **_machine()}
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
        warnings = list(dict.fromkeys([*self.meta["warnings"], *self.warnings]))
        self.meta |= {"starts": [*starts, entry], "warnings": warnings, "status": "running", "exit": None, **facts}
        self.is_open = True  # there is an entry that says how it ends
        self._write_meta()
        with open(self.path / "command.sh", "a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write("#!/usr/bin/env bash\n# Each start of this run: the exact command.\n\n")
            file.write(record.command(self.command, self.path, number, now, start["threads"]))
        (self.path / "command.sh").chmod(0o755)
        record.copy_configs(self.settings.files, self.path / "configs")
        write(self.path / "environment.txt", record.environment())

    def _settle(self, state: Mapping[str, Any] | None) -> None:
        """Makes the config the run's: without what is of this start alone, from its beginning to its last epoch."""
        values: dict[str, Any] = {"reload": False, "accept_changes": False, "stop_at": None}
        if state:
            n_epochs = int(self.config.flat()["training_loop.n_epochs"])
            values["n_epochs"] = max(n_epochs, state["epoch"])
            values["init_from"] = self.meta.get("init_from", {}).get("run")
        for name, value in values.items():
            self.config = self.config.set(f"training_loop.{name}", value)

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
            except (BlockingIOError, PermissionError):
                time.sleep(0.02 * attempt)
            except OSError as error:
                (self.path / "HEARTBEAT").unlink()
                with suppress(OSError):  # not empty: it was there before
                    self.path.rmdir()
                reason = f"this file system has no locks ({error.strerror})"
                raise Refused(f"{self.path}: {reason}: choose a folder on another one") from None
        raise Refused(_in_use(self.path))

    def close(self, status: str, exit_code: int, message: str) -> int:
        """Says how the run ended, on stderr and in the folder; FINISHED is written last of all.

        Returns the exit code: 1 if a finished run's end cannot be written.
        """
        unsaid = ""
        if message:
            with suppress(OSError):  # what stderr.txt cannot take stays in the buffer, for the terminal
                print(message.rstrip(), file=sys.stderr)
        if self.is_open:
            end = {"status": status, "exit": exit_code}
            try:
                self.meta["starts"][-1] |= end | {"stop": timestamp()}
                self.meta |= end
                self._write_meta()
                if status == "finished":
                    write(self.path / "FINISHED", timestamp() + "\n")
            except OSError as error:  # the disk is full, or the folder is gone
                exit_code = exit_code or 1
                unsaid = "" if message else self.why_lost(error) or f"{self.path}: {error}"
            os.close(self._heartbeat)
            OWN.discard(self.path.resolve())
            self.is_open = False
        if self.output:
            self.output.close()
        if unsaid:
            print(unsaid, file=sys.stderr)
        return exit_code

    def warn(self, message: str) -> None:
        """A warning, on stderr, that `record` keeps in meta.json."""
        print(f"warning: {message}", file=sys.stderr)
        self.warnings.append(message)

    def _refuse_gone(self) -> None:
        """Raises FileNotFoundError if the folder is removed, or another one that a process may own has its name."""
        if not os.path.samestat(os.fstat(self._heartbeat), os.stat(self.path / "HEARTBEAT")):
            raise FileNotFoundError(errno.ENOENT, "was removed", str(self.path))

    def _write_meta(self) -> None:
        self._refuse_gone()
        write(self.path / "meta.json", json.dumps(self.meta, indent=2) + "\n")

    def beat(self, step: int) -> None:
        """HEARTBEAT: the last step and its time, rewritten at most every 10 s."""
        now = time.monotonic()
        if now - self._beat_at > HEARTBEAT_SECONDS:
            self._beat_at = now
            line = f"step {step} {timestamp()}\n".encode()
            os.pwrite(self._heartbeat, line, 0)
            os.ftruncate(self._heartbeat, len(line))

    def why_lost(self, error: BaseException) -> str | None:
        """What to tell if the folder cannot be written to any more, or a worker was killed; None for another error."""
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            advice = "by whoever needed its memory, as a rule: try a smaller training_loop.n_workers"
            return f"a process that reads the data was killed, {advice} ({str(error).splitlines()[0]})"
        if not isinstance(error, OSError):
            return None
        ours = error.filename and Path(os.fsdecode(error.filename)).resolve().is_relative_to(self.path.resolve())
        if ours and isinstance(error, FileNotFoundError):
            return f"{self.path}: was removed while the run was writing to it"
        if not ours and error.errno not in DISK_ERRORS:
            return None
        advice = "What was committed is intact: put that right, then go on with training_loop.reload=True"
        return f"{self.path}: cannot be written to: {error.strerror}. {advice}"

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
        except Damaged as damage:
            reason = damage.message
        try:
            state = read_checkpoint(previous)
        except Damaged:
            advice = "best.pt holds the best weights (training_loop.init_from starts a new run from them)"
            raise Refused(f"{self.path}: checkpoint.pt and checkpoint.prev.pt are damaged: {advice}") from None
        self.warn(f"{reason}: going back to the commit before")
        os.replace(previous, path)
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

    def __init__(self, path: str | Path, settings: Settings, rank: int) -> None:
        self.path, self.settings, self.rank = Path(path), settings, rank
        self.output: Output | None = None
        self.changed: list[str] = []  # as the first says

    def ignore(self, *_: Any, **__: Any) -> Any:
        """The first does it."""

    open = refuse_changes = warn = why_lost = beat = commit = ignore
    write_config = write_history = write_best = unfinish = ignore

    def record(self, *_: Any) -> None:
        """From now on what is printed goes into the folder."""
        if self.output:
            self.path.mkdir(parents=True, exist_ok=True)  # on another machine it may not be seen
            self.output.move_to(self.path)

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
        what = f"it holds more than tensors, numbers, strings and lists ({type(error).__name__}); nothing of it was run"
        raise Damaged(f"{path}: is no checkpoint of this project: {what}") from None
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
        link = previous.with_name(f".{previous.name}.link")
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, previous)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _machine() -> dict[str, Any]:
    """What a start runs on, but for the device."""
    packages = ("torch", "torchvision", "poutyne", "gin-config", "numpy")
    return {
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def _in_use(path: Path) -> str:
    start = read_meta(path)["starts"][-1] if (path / "meta.json").exists() else {}
    owner = f"process {start['pid']} on {start['host']}" if start else "another process"
    return f"{path}: {owner} is writing to this run: wait for it, or choose another folder"


def _named(data: Mapping[str, Any]) -> str:
    return f"{data.get('name')} (fingerprint {str(data.get('fingerprint'))[:12]})"
