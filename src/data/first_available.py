import sys
from collections.abc import Callable
from dataclasses import replace
from textwrap import indent

import gin

from src.config import Refused
from src.data.dataset import Data, Unavailable


@gin.register
def first_available(of: list[Callable[..., Data]]) -> Data:
    """The first data set of the list, [@cifar10, @digits], that can be had; loudly, on stderr, if not the very first.

    Raises Refused with all reasons if none can.
    """
    reasons = ""
    for i, build in enumerate(of):
        try:
            data = replace(build(), choice=i)
        except Unavailable as error:
            reasons += f"{build.__name__}:\n{indent(error.message, '    ')}\n"
            continue
        if reasons:
            stars = "*" * 78
            print(f"{stars}\n*** TRAINING ON {data.name}, NOT ON {of[0].__name__}:\n{reasons}{stars}", file=sys.stderr)
        return data
    raise Refused(f"first_available: none of {len(of)} data sets can be had.\n{reasons}".rstrip())
