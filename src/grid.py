"""A grid of settings as jobs: a config and a line of batch.sh for each combination."""

import itertools
import json
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.config import Refused, read
from src.record import code_archive, code_files
from src.run import write


def prepare(folder: Path, base: str, grid: Mapping[str, Sequence[Any]]) -> Path:
    """Writes configs/, batch.sh, grid.json and code.tar.gz into `folder`, and returns batch.sh.

    The same arguments give the same bytes (of the code, if it is the same, too).

    Args:
        folder: made if it is not there; the runs will lie in folder/runs.
        base: gin text that all jobs share, without includes: a job's config does not change with other files.
        grid: setting -> its values, such as {"SGD.lr": [0.1, 1.0]}; a reference or macro is a str such as "@digits".

    Raises Refused, with nothing written, for runs whose config would be another one than theirs, and for a config
    that bin/train.py would refuse by a name or a type.
    """
    configs = {}
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        several = [f"{key.rpartition('.')[2]}={str(v).lstrip('@')}" for key, v in chosen.items() if len(grid[key]) > 1]
        name = re.sub(r"[^\w.,=+-]+", "_", ",".join(several)) or "run"  # no characters that a shell takes for a pattern
        if name in configs:
            raise Refused(f"two places of the grid give one run, {name}: let their values differ")
        configs[name] = base + "\n" + "".join(f"{key} = {_as_gin(value)}\n" for key, value in chosen.items())
    paths = {name: (folder / "runs" / name, folder / "configs" / f"{name}.gin") for name in configs}
    other = [
        f"  {run}\n"
        for name, (run, config) in paths.items()
        if run.exists() and not (config.exists() and config.read_text(encoding="utf-8") == configs[name])
    ]
    if other:
        raise Refused(
            f"runs that were made with another config:\n{''.join(other)}"
            "remove them, put the settings back, or prepare in another folder with --folder"
        )
    refuse_wrong_names(next(iter(configs.values())))
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    lines = ["# From the clone's root; one thread each, so that the results do not depend on how many run at a time.\n"]
    for name, (run, config) in paths.items():
        write(config, configs[name])
        words = shlex.join([str(run), str(config), "-b", "training_loop.reload=True"])
        lines.append(f"OMP_NUM_THREADS=1 bin/train.py {words}\n")
    write(folder / "grid.json", json.dumps(grid, indent=2) + "\n")
    write(folder / "code.tar.gz", code_archive(code_files()))
    write(folder / "batch.sh", "".join(lines))
    return folder / "batch.sh"


def refuse_wrong_names(config: str) -> None:
    """Raises Refused as bin/train.py would, by names and types."""
    from src.training_loop import configure  # takes a second: torch

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "config.gin")
        path.write_text(config, encoding="utf-8")
        try:
            configure(read([str(path)]))
        except Refused as refusal:
            raise Refused(refusal.message.replace(f"{path}:", "the configs, line ")) from None


def _as_gin(value: Any) -> str:
    return value if isinstance(value, str) and value[:1] in "@%" else repr(value)
