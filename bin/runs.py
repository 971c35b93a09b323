#!/usr/bin/env python3
"""Lists the runs in a folder: status, data, model, epochs, best monitored and test metric, time.

    bin/runs.py results
    bin/runs.py results --json
    bin/runs.py results --prune          # what of finished runs could be deleted (best.pt stays)
    bin/runs.py results --prune --yes    # deletes it

Exit codes: 0 done; 2 refused.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src import results
from src.config import ROOT, Refused


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = os.environ.get("RESULTS_DIR") or os.path.relpath(ROOT / "results")
    parser.add_argument("folder", nargs="?", default=folder, help="default: $RESULTS_DIR, results")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--prune", action="store_true", help="list checkpoints of finished runs")
    parser.add_argument("--yes", action="store_true", help="with --prune: delete them")
    arguments = parser.parse_args(argv[1:])
    try:
        runs = results.find_runs(arguments.folder)
        if arguments.prune:
            prune(runs, delete=arguments.yes)
            return 0
    except (Refused, OSError) as error:
        print(f"runs.py: {error}", file=sys.stderr)
        return 2
    rows = [results.overview(run) for run in runs]
    if arguments.json:
        print(results.to_json([{name: row[name] for name in row if name != "config"} for row in rows]))
    else:
        table = [("run", "status", "data", "model", "epochs", "best", "test", "time"), *map(cells, rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print(*("  ".join(map(str.ljust, line, widths)).rstrip() for line in table), sep="\n")
    return 0


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A run's line of the table."""
    name = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in row["run"])  # a line's end would break the table
    status = f"{row['status']}: {row['problem']}".removesuffix(": ")
    if row["status"] == "unreadable":
        return (name, status, *[""] * 6)
    best = {name: value for name, value in row["best"].items() if name == row["monitor"]}
    test = {name: value for name, value in row["test"].items() if name not in ("n", "epoch")}
    numbers = (results.one_line(found).replace("  ", " ") for found in (best, test))
    return (name, status, *(str(row[k]) for k in ("data", "model", "epochs")), *numbers, f"{row['seconds']:,.0f} s")


def prune(runs: list[Path], *, delete: bool) -> None:
    """Lists, or deletes, the checkpoints of finished runs that have their best weights."""
    for run in runs:
        if results.overview(run)["status"] == "finished" and (run / "best.pt").exists():
            for file in run.glob("checkpoint*.pt"):
                print(f"{'deleted' if delete else 'would delete, with --yes,'} {file}")
                if delete:
                    file.unlink()


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may end it
    sys.exit(main(sys.argv))
