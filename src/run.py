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
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from src import record
from src.config import Config, Refused, Settings, read
from src.output import NAMES, Output

FILES = (
    "command.sh",
    "config.gin",
    "configs",
    "code.tar.gz",
    "git.txt",
    "meta.json",
    "environment.txt",
    *NAMES,
    "history.csv",
    "checkpoint.pt",
    "checkpoint.prev.pt",
    "best.pt",
    "eval_results.json",
    "HEARTBEAT",
    "FINISHED",
)
# Settings that may differ when a run goes on, since they do not change what is computed.
FREE = ("n_epochs", "reload", "device", "log_every", "detect_anomaly")
DIGEST_BYTES = 32
HEARTBEAT_SECONDS = 10.0


class Damaged(Refused):
    """A checkpoint whose bytes are not those that were written."""


class Run:
    """The folder `path`. Creating one only looks; `open` makes the folder and owns it until `close`.

    Raises Refused if the folder is unfit: a file, not writable, in use, holding another thing than
    a run, or holding a run when `reload` is False.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        reload: bool = False,
        settings: Settings | None = None,
        command: Sequence[str] = (),
        output: Output | None = None,
    ) -> None:
        self.path = Path(path)
        self.reload = reload
        self.settings = settings
        self.command = command
        self.output = output
        self.config: Config | None = None  # checked, and with the data really used
        self.meta: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.is_open = False
        self._beat_at = 0.0
        self._refuse_unfit()

    # --- before anything is written

    def _refuse_unfit(self) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise Refused(f"{path}: is a file: give the name of a folder for the run")
        place = path
        while not place.exists():
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise Refused(f"{path}: {place} cannot be written to: choose another folder for the run")
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        is_run = "meta.json" in names
        foreign = sorted(name for name in names if not _is_ours(name))
        if foreign and not is_run:
            raise Refused(
                f"{path}: holds files that are no run's ({', '.join(foreign[:3])}): choose a new or empty folder"
            )
        if names and not self.reload:
            raise Refused(
                f'{path}: holds a run already: continue it with -b "training_loop.reload=True", or remove the folder'
            )
        if "FINISHED" in names and "checkpoint.pt" not in names:
            raise Refused(
                f"{path}: the finished run's checkpoints were deleted: it cannot go on; "
                f"training_loop.init_from='{path}' starts a new run from its best weights"
            )
        if is_run and is_locked(path):
            raise Refused(_in_use(path))

    def refuse_changes(self, config: Config, data: Mapping[str, Any]) -> None:
        """Raises Refused when the folder's run had other settings or other data than these."""
        if not (self.path / "meta.json").exists() or not (self.path / "checkpoint.pt").exists():
            return
        before = read_meta(self.path).get("data", {})
        if before.get("fingerprint") != data["fingerprint"]:
            raise Refused(
                f"{self.path}: the run was trained on {_named(before)}, this would be "
                f"{_named(data)}: continue it where its data can be had, or start a new run"
            )
        old, new = read_flat(self.path / "config.gin"), config.flat()
        free = {f"training_loop.{name}" for name in FREE}
        changes = [
            f"  {key}: {old.get(key, '(not set)')} -> {new.get(key, '(not set)')}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and key not in free
        ]
        if changes:
            raise Refused(
                f"{self.path}: holds a run with other settings (old -> new):\n"
                + "\n".join(changes)
                + "\nuse the old ones, or start a new run in another folder"
            )

    # --- open and close

    def open(self, *, facts: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """Makes the folder, takes the lock and records what runs.

        `facts` goes into meta.json, `start` into its list of starts.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        self._refuse_unfit_now()
        if self.output:
            self.output.move_to(self.path)
        fresh = not (self.path / "checkpoint.pt").exists()
        self.meta = read_meta(self.path) if (self.path / "meta.json").exists() else {}
        starts = self.meta.get("starts", [])
        now = timestamp()
        starts.append(
            {"start": now, "stop": None, "status": "running", "exit": None, "host": socket.gethostname()}
            | {"pid": os.getpid(), **start}
        )
        self.meta |= {"status": "running", "exit": None, **facts, "starts": starts}
        self.warnings = list(dict.fromkeys([*self.meta.get("warnings", []), *self.warnings]))
        self.is_open = True
        self._write_meta()
        with open(self.path / "command.sh", "a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write("#!/usr/bin/env bash\n# Each start of this run: the exact command.\n\n")
            file.write(record.command(self.command, self.path, len(starts), now))
        (self.path / "command.sh").chmod(0o755)
        if self.config:
            write(self.path / "config.gin", self.config.text())
        if self.settings:
            _copy_configs(self.settings.files, self.path / "configs")
        write(self.path / "environment.txt", record.environment())
        if fresh:
            write(self.path / "git.txt", record.git_state())
            write(self.path / "code.tar.gz", record.code_archive(record.code_files()))

    def _lock(self) -> None:
        # A POSIX lock belongs to the process alone: it dies with it, and no child keeps it alive.
        self._heartbeat = os.open(self.path / "HEARTBEAT", os.O_RDWR | os.O_CREAT, 0o666)
        for attempt in range(5):  # who asks whether a run is locked holds the lock for an instant
            try:
                fcntl.lockf(self._heartbeat, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise Refused(
                        f"{self.path}: this file system has no locks ({error.strerror}): two "
                        "processes could write to one run; choose a folder on another one"
                    ) from None
            time.sleep(0.02 * attempt)
        else:
            raise Refused(_in_use(self.path))
        self.beat(step=0, at_once=True)

    def _refuse_unfit_now(self) -> None:
        """Another process may have made the run since the first look; our own HEARTBEAT is no run."""
        if not self.reload and {entry.name for entry in self.path.iterdir()} != {"HEARTBEAT"}:
            raise Refused(f"{self.path}: another process has just made a run here")

    def close(self, status: str, exit_code: int) -> None:
        """Writes how the run ended: finished, stopped or failed. FINISHED is written last of all."""
        if not self.is_open:
            return
        self.meta |= {"status": status, "exit": exit_code}
        self.meta["starts"][-1] |= {"status": status, "exit": exit_code, "stop": timestamp()}
        self._write_meta()
        if status == "finished":
            write(self.path / "FINISHED", timestamp() + "\n")
        os.close(self._heartbeat)
        self.is_open = False

    def warn(self, message: str) -> None:
        """A warning that the record keeps: on stderr and in meta.json."""
        print(f"warning: {message}", file=sys.stderr)
        self.warnings.append(message)
        if self.is_open:
            self._write_meta()

    def _write_meta(self) -> None:
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

    # --- commit and load

    def commit(self, state: Mapping[str, Any]) -> None:
        """Makes the state durable at once; the commit before is kept as checkpoint.prev.pt."""
        write_checkpoint(self.path / "checkpoint.pt", state, previous=self.path / "checkpoint.prev.pt")

    def load(self) -> dict[str, Any] | None:
        """The last commit, or None where there is none. A damaged one is reported, the one before
        it taken. Raises Refused if both are damaged.
        """
        for name in ("checkpoint.pt", "checkpoint.prev.pt"):
            try:
                return read_checkpoint(self.path / name)
            except FileNotFoundError:
                continue
            except Damaged as damage:
                self.warn(f"{damage}: going back to the commit before")
        if (self.path / "checkpoint.pt").exists():
            raise Refused(
                f"{self.path}: both checkpoints are damaged: the run cannot be continued. best.pt "
                "holds the best weights (training_loop.init_from starts a new run from them), "
                "history.csv the epochs"
            )
        return None

    def unfinish(self) -> None:
        """The run goes on: its end's files are no longer true."""
        for name in ("FINISHED", "eval_results.json"):
            (self.path / name).unlink(missing_ok=True)

    def write_history(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """history.csv: all committed epochs, one row each."""
        file = io.StringIO()
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]) if rows else ["epoch"])
        writer.writeheader()
        writer.writerows(rows)
        write(self.path / "history.csv", file.getvalue())


# --- reading a folder -----------------------------------------------------------------------------


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of a run's folder."""
    meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    return meta


def read_flat(config: Path) -> dict[str, str]:
    """A config.gin as `Config.flat` gives it."""
    from src.config import format_value

    return {
        f"{b.scope}/{b.name}.{b.parameter}".lstrip("/"): format_value(b.value, {}) for b in read([str(config)]).bindings
    }


def is_locked(path: Path) -> bool:
    """Whether a living process owns the run."""
    try:
        with open(path / "HEARTBEAT", "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `write_checkpoint` wrote, tensors on the CPU. Raises Damaged if a byte differs."""
    import torch

    content = path.read_bytes()
    body, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise Damaged(f"{path}: is damaged (its checksum does not fit)")
    state: dict[str, Any] = torch.load(io.BytesIO(body), weights_only=True, map_location="cpu")
    return state


def write_checkpoint(path: Path, state: Mapping[str, Any], previous: Path | None = None) -> None:
    """Tensors, numbers, strings, lists and dicts; ends in the SHA-256 of the bytes before it.

    Whole or not at all, and lastingly. What `path` held is kept as `previous`, if that is given.
    """
    import torch

    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        digest = _Digest(file)
        torch.save(dict(state), digest)  # type: ignore[arg-type]
        file.write(digest.hash.digest())
        file.flush()
        os.fsync(file.fileno())
    if previous and path.exists():  # a link first: `path` exists at every instant
        link = previous.with_name(f".{previous.name}.tmp")
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, previous)
    os.replace(temporary, path)
    _sync_folder(path.parent)


class _Digest:
    """A file that is only written to, and hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, content: str | bytes) -> None:
    """Writes the file whole or not at all, and lastingly."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


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


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_ours(name: str) -> bool:
    return name in FILES or name.startswith("events.out.tfevents.") or name in [f".{file}.tmp" for file in FILES]


def _in_use(path: Path) -> str:
    start = read_meta(path)["starts"][-1] if (path / "meta.json").exists() else {}
    owner = f"process {start['pid']} on {start['host']}" if start else "another process"
    return f"{path}: {owner} is writing to this run: wait for it, or choose another folder"


def _named(data: Mapping[str, Any]) -> str:
    return f"{data.get('name')} (fingerprint {str(data.get('fingerprint'))[:12]})"


def _copy_configs(files: Sequence[Path], folder: Path) -> None:
    """The input configs as they were; another file of the same name gets a number."""
    folder.mkdir(exist_ok=True)
    for file in files:
        content, number = file.read_bytes(), 1
        target = folder / file.name
        while target.exists() and target.read_bytes() != content:
            number += 1
            target = folder / f"{file.stem}.{number}{file.suffix}"
        if not target.exists():
            shutil.copyfile(file, target)
