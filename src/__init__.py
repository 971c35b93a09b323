"""Needs the packages of pyproject.toml.

bin/launch.py asks its jobs by two variables to go on otherwise: a script of bin/ with the code in FROZEN_CODE, and
bin/train.py as the processes that the command TRAIN_STARTER starts.
"""

import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

script = Path(sys.argv[0])
if script.resolve().parent == Path(__file__).resolve().parents[1] / "bin":
    # Taken out: neither the script as it goes on nor a process of its own does it again.
    code, starter = (os.environ.pop(name, "") for name in ("FROZEN_CODE", "TRAIN_STARTER"))
    command = shlex.split(starter) if script.name == "train.py" else []
    if code or command:
        command = command or [sys.executable, *sys.orig_argv[1 : -len(sys.argv)]]  # with Python's own options
        script = Path(code, "bin", script.name) if code else script
        os.execvp(command[0], [*command, str(script), *sys.argv[1:]])
if find_spec("gin") is None:
    print("The packages are missing: `source e.sh` first, or run through it: ./e.sh bin/train.py ...", file=sys.stderr)
    sys.exit(2)
