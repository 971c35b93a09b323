#!/usr/bin/env python3
"""Repeats a run with the code and the settings that its folder keeps, and compares the two.

    bin/reproduce.py results/first results/again

It runs the code in RUN_DIR/code.tar.gz: do that with folders that you trust. Needs nothing but the folder, and
the data in DATA_DIR.

Exit codes: 0 identical, to the bit but for times; 1 different, or the repeated run failed; 2 refused.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.config import Failed, Refused
from src.record import changes
from src.reproduce import reproduce, surroundings
from src.results import first_difference


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="the run to repeat")
    parser.add_argument("new_dir", type=Path, help="the folder for the repeated run")
    arguments = parser.parse_args(argv[1:])
    run, new = arguments.run_dir, arguments.new_dir
    try:
        reproduce(run, new)
    except (Refused, Failed) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return error.exit_code
    for what in changes(surroundings(run), surroundings(new)).values():
        print(f"warning: not as it was: {what}", file=sys.stderr)
    found = first_difference(run, new)
    print(f"{run}, {new}: {found or 'identical'}")
    return int(found is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
