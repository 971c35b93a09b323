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

HEADER = ("run", "status", "data", "model", "epochs", "best", "test", "time")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = os.environ.get("RESULTS_DIR", os.path.relpath(ROOT / "results"))
    parser.add_argument("folder", nargs="?", default=folder, help="default: $RESULTS_DIR, results")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--prune", action="store_true", help="list checkpoints of finished runs")
    parser.add_argument("--yes", action="store_true", help="with --prune: delete them")
    arguments = parser.parse_args(argv[1:])
    try:
        runs = results.find_runs(arguments.folder)
    except Refused as refusal:
        print(f"runs.py: {refusal.message}", file=sys.stderr)
        return 2
    if arguments.prune:
        prune(runs, delete=arguments.yes)
    elif arguments.json:
        rows = [results.overview(run) for run in runs]
        print(results.to_json([{name: row[name] for name in row if name != "config"} for row in rows]))
    else:
        table = [HEADER, *(shown(results.overview(run)) for run in runs)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for cells in table:
            print("  ".join(map(str.ljust, cells, widths)).rstrip())
    return 0


def shown(row: dict[str, Any]) -> tuple[str, ...]:
    # A name with a line's end, or bytes that are no text, would break the table.
    name = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in row["run"])
    status = f"{row['status']}: {row['problem']}" if row["problem"] else row["status"]
    if row["status"] == "unreadable":
        return (name, status, "", "", "", "", "", "")
    best = f"{row['monitor']} {row['best']:.4g}" if row["best"] is not None else ""
    metric = row["monitor"].removeprefix("val_")
    test = f"{metric} {row['test'][metric]:.4g}" if metric in (row["test"] or {}) else ""
    minutes, seconds = divmod(round(row["seconds"]), 60)
    data, model, epochs = (str(row[column]) for column in ("data", "model", "epochs"))
    return (name, status, data, model, epochs, best, test, f"{minutes}:{seconds:02}")


def prune(runs: list[Path], *, delete: bool) -> None:
    total = 0
    for run in runs:
        is_done = results.overview(run)["status"] == "finished" and (run / "best.pt").exists()
        for file in (run / "checkpoint.pt", run / "checkpoint.prev.pt"):
            if is_done and file.exists():
                total += file.stat().st_size
                print(f"{'deleted' if delete else 'would delete'} {file}")
                if delete:
                    file.unlink()
    size = f"{total / 1e6:,.1f} MB" + ("" if delete else " (--yes deletes them)")
    print(size if total else "nothing to prune")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may end it
    sys.exit(main(sys.argv))
