"""Repeats a run from its folder alone: its code, its settings, in their order."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.config import Failed, Refused, refused_at
from src.record import unpack
from src.results import load_history
from src.run import read_meta


def reproduce(run: Path, new: Path) -> None:
    """Runs the code that `run` keeps, with its settings, into the folder `new`.

    It runs that code, so it must be as trusted as any program. Starts between which neither settings
    nor code have changed are repeated as one undisturbed run. Output goes where ours goes.

    Raises Refused if there is no run with a committed epoch, or `new` is there; Failed if the repeated run fails.
    """
    from src.data.dataset import data_dir  # torch comes with it, which comparing does without

    with refused_at(run / "meta.json"):
        parts = parts_of(read_meta(run)["starts"])
    history = load_history(run)
    if not history:
        raise Refused(f"{run}: has no epoch to compare with")
    if new.exists():
        raise Refused(f"{new}: is there already: choose a new folder for the repeated run")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the repeated run, which saves and ends
    for k, part in enumerate(parts):
        bindings = [f"training_loop.n_epochs={len(history)}"]
        if k > 0:
            bindings += ["training_loop.reload=True", "training_loop.accept_changes=True"]
        if k + 1 < len(parts):  # up to where the next one began
            epoch, step, total = (parts[k + 1][key] for key in ("epoch", "step", "total_steps"))
            bindings += [f"training_loop.stop_at={total}" if step else f"training_loop.n_epochs={epoch}"]
        starter = [sys.executable]
        if part["processes"] > 1:
            starter += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={part['processes']}"]
        environment = os.environ | {"DATA_DIR": str(data_dir()), "OMP_NUM_THREADS": str(part["threads"])}
        with tempfile.TemporaryDirectory(prefix="reproduce.") as folder:
            unpack(run / part["code"], Path(folder, "code"))
            Path(folder, "config.gin").write_text(part["config"], encoding="utf-8")
            command = [f"{folder}/code/bin/train.py", f"--bindings={';'.join(bindings)}", "--", str(new)]
            command += [f"{folder}/config.gin"]
            code = subprocess.run([*starter, *command], env=environment).returncode
        if code:
            raise Failed(f"{run}: cannot be repeated: its code ended with exit code {code}, see above")


def parts_of(starts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of a run's starts that changed settings, code or the number of processes, and came to something."""
    parts: list[Mapping[str, Any]] = []
    for start in starts:
        while parts and parts[-1]["total_steps"] >= start["total_steps"]:  # killed before it had committed a step
            parts.pop()
        start = {**(parts[-1] if parts else {}), **start}  # older runs leave out what has not changed
        if not parts or any(parts[-1][key] != start[key] for key in ("config", "code", "processes")):
            parts.append(start)
    return parts


def surroundings(run: Path) -> dict[str, Any]:
    """Versions, device, threads and processes of a run's last start, and the hash of the weights begun from."""
    meta = read_meta(run)
    start = meta["starts"][-1]
    found = {name: start[name] for name in ("python", "platform", "device", "threads", "processes")}
    return {**start["versions"], **found, "init_from": meta.get("init_from", {}).get("sha256")}
