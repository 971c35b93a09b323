"""A grid of settings as jobs: a config and a line of batch.sh for each combination."""

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from src.config import Refused, read
from src.record import code_archive, code_files
from src.run import write
from src.training_loop import configure


def prepare(folder: Path, base: Path, grid: Mapping[str, Sequence[Any]]) -> Path:
    """Writes configs/, batch.sh, code.tar.gz and grid.csv, the settings of each run, and returns batch.sh.

    The same arguments and code give the same bytes.

    Args:
        folder: made if it is not there; the runs will lie in folder/runs.
        base: gin file that all jobs share, without includes: a job's config does not change with other files.
        grid: setting -> its values, such as {"SGD.lr": [0.1, 1.0]}; a reference or macro is a str such as "@digits".

    Raises Refused, with nothing written, for runs whose config would be another one than theirs, and for a config
    that bin/train.py would refuse by a name or a type.
    """
    shared = base.read_text(encoding="utf-8")
    batch = "# From the clone's root; one thread each, so that the results do not depend on how many run at a time.\n"
    configs: dict[Path, str] = {}
    rows, changed = [], ""
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        several = [f"{key.rpartition('.')[2]}={value}" for key, value in settings.items() if len(grid[key]) > 1]
        # No characters that a shell takes for a pattern.
        name = re.sub(r"[^\w.,=+@-]+", "_", ",".join(several)) or "run"
        run, config = folder / "runs" / name, folder / "configs" / f"{name}.gin"
        if config in configs:
            raise Refused(f"two places of the grid give one run, {name}: let their values differ")
        bindings = [f"{key} = {v if str(v)[:1] in ('@', '%') else repr(v)}" for key, v in settings.items()]
        configure(found := read([str(base)], bindings))
        if len(found.files) > 1:
            raise Refused(f"{base}: includes {found.files[1]}: put its lines here, a job's config stands alone")
        configs[config] = "\n".join([shared, *bindings, ""])
        rows.append({"run": name, **settings})
        batch += f"OMP_NUM_THREADS=1 bin/train.py {shlex.join([str(run), str(config)])} -b training_loop.reload=True\n"
        if run.exists() and not (config.exists() and config.read_text(encoding="utf-8") == configs[config]):
            changed += f"  {run}\n"
    if changed:
        raise Refused(
            f"runs that were made with another config:\n{changed}"
            "remove them, put the settings back, or prepare in another folder with --folder"
        )
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    for config, text in configs.items():
        write(config, text)
    write(folder / "grid.csv", pd.DataFrame(rows).to_csv(index=False))
    write(folder / "code.tar.gz", code_archive(code_files()))
    write(folder / "batch.sh", batch)
    return folder / "batch.sh"
