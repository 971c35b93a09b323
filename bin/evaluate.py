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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src import results
from src.config import Refused


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", help="the run's folder")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", help="auto, cpu, cuda, ...; default: the run's")
    parser.add_argument("--predictions", metavar="FILE.csv", help="write index, label, prediction, probability")
    arguments = parser.parse_args(argv[1:])
    try:
        metrics, predictions = results.evaluate(arguments.run_dir, arguments.split, device=arguments.device)
        if arguments.predictions:
            with open(arguments.predictions, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["index", "label", "prediction", "probability"])
                for index, (label, prediction, probability) in enumerate(predictions):
                    writer.writerow([index, label, prediction, f"{probability:.6f}"])
    except (Refused, OSError) as error:
        print(f"evaluate.py: {getattr(error, 'message', error)}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps({"run": arguments.run_dir, **metrics}))
    else:
        print(f"{arguments.run_dir}  {arguments.split}  {results.one_line(metrics)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
