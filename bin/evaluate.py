#!/usr/bin/env python3
"""The metrics of a run's best weights on a split of its data.

    bin/evaluate.py results/first
    bin/evaluate.py results/first --split valid --json
    bin/evaluate.py results/first --predictions predictions.csv

Exit codes: 0 done; 2 refused.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src import results
from src.config import Refused


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", help="the run's folder")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", help="auto, cpu, cuda, ...; default: the run's")
    parser.add_argument("--predictions", metavar="FILE.csv", help="write what it gives for each input")
    arguments = parser.parse_args(argv[1:])
    try:
        metrics, targets, outputs = results.evaluate(arguments.run_dir, arguments.split, device=arguments.device)
        if arguments.predictions:
            with open(arguments.predictions, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(predictions(targets, outputs))
    except (Refused, OSError) as error:
        print(f"evaluate.py: {getattr(error, 'message', error)}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps({"run": arguments.run_dir, **metrics}))
    else:
        print(f"{arguments.run_dir}  {arguments.split}  {results.one_line(metrics)}")
    return 0


def predictions(targets: Any, outputs: Any) -> Iterator[list[Any]]:
    """A row for each input, after a header: of classes, or of numbers, as many as the network gives."""
    if targets.is_floating_point():
        n = outputs.flatten(1).shape[1]
        yield ["index", *(f"target_{k}" for k in range(n)), *(f"prediction_{k}" for k in range(n))]
        for index, (target, output) in enumerate(zip(targets.flatten(1), outputs.flatten(1), strict=True)):
            yield [index, *(f"{number:.6g}" for number in (*target.tolist(), *output.tolist()))]
    else:
        yield ["index", "label", "prediction", "probability"]
        probability, prediction = outputs.softmax(dim=1).max(dim=1)
        rows = zip(targets.tolist(), prediction.tolist(), probability.tolist(), strict=True)
        for index, (label, chosen, share) in enumerate(rows):
            yield [index, label, chosen, f"{share:.6f}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
