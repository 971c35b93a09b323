"""Repeats a run from its folder alone: its code, its settings, in their order."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.config import Failed, Refused
from src.record import read_archive
from src.results import changes, load_history
from src.run import read_meta


def reproduce(run: Path, new: Path) -> None:
    """Runs the code that `run` keeps, with its settings, into the folder `new`.

    It runs that code, so it must be as trusted as any program. Starts between which neither settings
    nor code have changed are repeated as one undisturbed run. Output goes where ours goes.

    Raises Refused if there is no run with a committed epoch, or `new` is unfit; Failed if the repeated run fails.
    """
    from src.data.dataset import data_dir  # torch comes with it, which comparing does without

    history = load_history(run)
    if not history:
        raise Refused(f"{run}: has no epoch to compare with")
    if new.exists() and (not new.is_dir() or any(new.iterdir())):
        raise Refused(f"{new}: is there already: choose a new folder for the repeated run")
    parts = parts_of(read_meta(run)["starts"])
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
            unpack(run / part["code"], Path(folder).resolve() / "code")
            config = Path(folder, "config.gin")
            config.write_text(part["config"], encoding="utf-8")
            command = [f"{folder}/code/bin/train.py", f"--bindings={';'.join(bindings)}", "--", str(new), str(config)]
            code = subprocess.run([*starter, *command], env=environment).returncode
        if code:
            raise Failed(f"{run}: cannot be repeated: its code ended with exit code {code}, see above")


def unpack(archive: Path, folder: Path) -> None:
    """Writes the archive's files into the folder. Raises Refused if it is damaged or a path leads elsewhere."""
    for name, content in read_archive(archive).items():
        path = Path(os.path.normpath(folder / name))
        if not path.is_relative_to(folder):
            raise Refused(f"{archive}: {name} is no file inside of the folder that it is unpacked to")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def parts_of(starts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each start since the beginning that changed settings, code or the number of processes, with all as they were."""
    parts: list[dict[str, Any]] = []
    for start in starts:
        if not start["total_steps"]:  # nothing was committed before
            parts = [dict(start)]
        elif parts[-1]["total_steps"] == start["total_steps"]:  # killed before it made a step
            parts[-1] |= start
        elif "config" in start or "code" in start or parts[-1]["processes"] != start["processes"]:
            parts.append({**parts[-1], **start})
    return parts


def surroundings(run: Path) -> dict[str, Any]:
    """Versions, device, threads and processes of a run's last start, and the hash of the weights begun from."""
    meta = read_meta(run)
    start = meta["starts"][-1]
    found = {name: start[name] for name in ("python", "platform", "device", "threads", "processes")}
    return {**start["versions"], **found, "init_from": meta.get("init_from", {}).get("sha256")}


def differing_surroundings(run: Path, new: Path) -> list[str]:
    """What of `surroundings` is not the same in two runs."""
    return list(changes(surroundings(run), surroundings(new)).values())
