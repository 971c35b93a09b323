#!/usr/bin/env python3
"""The metrics of a run's best weights on a split of its data.

    bin/evaluate.py results/first
    bin/evaluate.py results/first --split valid --json
    bin/evaluate.py results/first --predictions predictions.csv

Exit codes: 0 done; 1 an input cannot be read; 2 refused.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src import results
from src.config import Failed, Refused

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


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
            table = predictions(targets, outputs)
            table.to_csv(arguments.predictions, index_label="index", float_format="%.6g")
    except (Refused, Failed, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    if arguments.json:
        print(results.to_json({"run": arguments.run_dir, **metrics}))
    else:
        print(f"{arguments.run_dir}  {arguments.split}  {results.one_line(metrics)}")
    return 0


def predictions(targets: "Tensor", outputs: "Tensor") -> "pd.DataFrame":
    """A row for each input: of classes, or of numbers, as many as the network gives. Both are [N, ...]."""
    import pandas as pd

    if targets.is_floating_point():
        target, prediction = (pd.DataFrame(numbers.flatten(1).tolist()) for numbers in (targets, outputs))
        return target.add_prefix("target_").join(prediction.add_prefix("prediction_"))
    probabilities, classes = outputs.softmax(dim=1).max(dim=1)
    columns = {"label": targets, "prediction": classes, "probability": probabilities}
    return pd.DataFrame({name: values.tolist() for name, values in columns.items()})


if __name__ == "__main__":
    sys.exit(main(sys.argv))
