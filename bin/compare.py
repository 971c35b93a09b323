#!/usr/bin/env python3
"""Says what two runs do not have in common: settings, data, code, versions, machine, and where their histories part.

    bin/compare.py results/a results/b
    bin/compare.py results/a results/b --json

"not counted" are the host and settings that change no result (n_workers, say). Of several starts the last counts.

Exit codes: 0 nothing that counts differs; 1 something differs; 2 refused.
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src import results
from src.config import Refused
from src.record import changed_files
from src.reproduce import surroundings
from src.results import changes
from src.run import FREE, read_meta


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_a", type=Path, help="a run's folder")
    parser.add_argument("run_b", type=Path, help="another's")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args(argv[1:])
    try:
        found = compare(arguments.run_a, arguments.run_b)
    except (Refused, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        said = str(error) if isinstance(error, Refused | OSError) else f"a file is not as in a run's folder: {error!r}"
        print(f"compare.py: {said}", file=sys.stderr)
        return 2
    counts = any(lines for section, lines in found.items() if section != "not counted")
    if arguments.json:
        print(results.to_json(found))
    else:
        for section, lines in found.items():
            print("".join(f"{section:<12} {line}\n" for line in lines), end="")
        print("" if counts else "nothing that counts differs\n", end="")
    return int(counts)


def compare(a: Path, b: Path) -> dict[str, list[str]]:
    """What differs, as lines `name: in a -> in b`, by sections."""
    seen = [results.overview(run) for run in (a, b)]
    if unreadable := [f"{run['run']}: {run['problem']}" for run in seen if run["status"] == "unreadable"]:
        raise Refused(unreadable[0])
    meta_a, meta_b = read_meta(a), read_meta(b)
    settings, packages = changes(*(run["config"] for run in seen)), changes(installed(a), installed(b))
    machine, first = changes(surroundings(a), surroundings(b)), results.first_difference(a, b)
    hosts = changes(*({"host": meta["starts"][-1]["host"]} for meta in (meta_a, meta_b)))
    return {
        "settings": [line for name, line in settings.items() if name not in FREE],
        "data": list(changes(meta_a["data"], meta_b["data"]).values()),
        "code": changed_files(b / meta_b["code"], a / meta_a["code"]),
        "versions": list(packages.values()),
        "machine": [line for name, line in machine.items() if name not in packages],
        "history": [first] if first else [],
        "not counted": [*hosts.values(), *(line for name, line in settings.items() if name in FREE)],
    }


def installed(run: Path) -> dict[str, str]:
    _, *packages = (run / "environment.txt").read_text(encoding="utf-8").splitlines()
    return dict(package.split("==", 1) for package in packages)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may end it
    sys.exit(main(sys.argv))
