"""Needs the packages of pyproject.toml."""

import sys
from importlib.util import find_spec

if find_spec("gin") is None:
    print("The packages are missing: `source e.sh` first, or run through it: ./e.sh bin/train.py ...", file=sys.stderr)
    sys.exit(2)
