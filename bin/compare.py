#!/usr/bin/env python3
"""Says what two runs do not have in common: settings, data, code, versions, machine, and where their histories part.

    bin/compare.py results/a results/b
    bin/compare.py results/a results/b --json

Of several starts the last counts. Exit codes: 0 nothing differs; 1 something differs; 2 refused.
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src import results
from src.config import Refused, refused_at
from src.record import changed_files, changes
from src.reproduce import surroundings
from src.run import read_meta


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_a", type=Path, help="a run's folder")
    parser.add_argument("run_b", type=Path, help="another's")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args(argv[1:])
    try:
        found = compare(arguments.run_a, arguments.run_b)
    except Refused as refusal:
        print(f"compare.py: {refusal}", file=sys.stderr)
        return 2
    lines = [f"{section:<9} {line}" for section, lines in found.items() for line in lines]
    if lines and not found["history"]:
        lines.append("history   no epoch differs")
    print(results.to_json(found) if arguments.json else "\n".join(lines or ["nothing differs"]))
    return int(bool(lines))


def compare(a: Path, b: Path) -> dict[str, list[str]]:
    """What differs, as lines `name: in a -> in b`, by sections. Raises Refused if a run cannot be read."""
    data, code, versions = [], [], []
    for run in (a, b):
        with refused_at(run / "meta.json"):
            meta = read_meta(run)
            data.append(meta["data"])
            code.append(run / meta["code"])
            versions.append(surroundings(run))
    settings, first = [results.load_config(run) for run in (a, b)], results.first_difference(a, b)
    return {
        "settings": list(changes(*settings).values()),
        "data": list(changes(*data).values()),
        "code": changed_files(code[1], code[0]),
        "versions": list(changes(*versions).values()),
        "history": [first] if first else [],
    }


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may end it
    sys.exit(main(sys.argv))
