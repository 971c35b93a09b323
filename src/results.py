"""Reads runs back. Only `load_model` and `evaluate` import torch."""

import ast
import csv
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

import gin

from src.config import Refused, read, read_flat, refused_at
from src.record import changed_files, changes, code_files
from src.run import OWN, is_locked, read_checkpoint, read_meta, write

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from src.data.dataset import Data

STALLED_SECONDS = 600.0
TIMES = {"time", "images_per_s", "data_wait", "commit_s", "valid_s", "peak_mb"}  # columns that no two runs share


def find_runs(folder: str | Path) -> list[Path]:
    """The run folders in or below a folder, sorted, but for those inside of a run. Raises Refused without a folder."""
    if not Path(folder).is_dir():
        raise Refused(f"{folder}: no such folder")
    runs = []
    for path, folders, files in os.walk(folder):
        if "meta.json" in files or {"HEARTBEAT", "history.csv"} <= {*files}:  # the second has lost the first
            runs.append(Path(path))
            folders.clear()
    return sorted(runs)


def load_config(run: str | Path) -> dict[str, str]:
    """config.gin as {"SGD.lr": "0.1", ...}: the values as text, as gin reads them. Raises Refused if it is damaged."""
    return read_flat(Path(run) / "config.gin")


def load_history(run: str | Path) -> list[dict[str, float]]:
    """history.csv: a dict an epoch, empty before the first commit. Raises Refused if it is damaged, or of no run."""
    path, rows = Path(run) / "history.csv", []
    if not path.exists() and (path.parent / "meta.json").exists():
        return []
    with refused_at(path), open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        names = next(reader, [])
        for row in reader:
            if len(row) != len(names):
                raise ValueError(f"line {reader.line_num} has {len(row)} values under {len(names)} columns")
            rows.append(dict(zip(names, map(float, row), strict=True)))
    return rows


def load_test(run: str | Path) -> dict[str, float]:
    """The numbers of eval_results.json, none before the test. Raises Refused if it is damaged."""
    path = Path(run) / "eval_results.json"
    with refused_at(path):
        test = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {name: float(value) for name, value in test.items() if name != "split"}


def status(run: Path) -> str:
    """finished, running, stalled (no step for 10 minutes), stopped, failed, or dead. Raises Refused without a run."""
    with refused_at(run / "meta.json"):
        said = str(read_meta(run)["status"])
        if is_locked(run):
            age = time.time() - (run / "HEARTBEAT").stat().st_mtime
            return "stalled" if age > STALLED_SECONDS else "running"
    if (run / "FINISHED").exists():
        return "finished"
    return "dead" if said in ("running", "finished") else said


def overview(run: Path) -> dict[str, Any]:
    """A run at a glance: run (its path), status ('unreadable' if the folder is damaged), problem (what is wrong).

    And of one that can be read: data, model, monitor, epochs, seconds (of all epochs), config; last and best (of the
    monitor), rows of its history; test, its test metrics. The last three are {} before there are some.
    """
    row: dict[str, Any] = {"run": str(run), "status": "unreadable", "problem": ""}
    try:
        row |= _read(run)
    except Refused as refusal:
        row["problem"] = str(refusal).replace(f"{run}/", "")
    return row | {"problem": shorten(row["problem"], 160, placeholder=" ...")}


def _read(run: Path) -> dict[str, Any]:
    with refused_at(run / "meta.json"):
        meta = read_meta(run)
        row = {"status": status(run), "data": meta["data"]["name"], "model": meta["model"]}
        monitor = row["monitor"] = str(meta["monitor"])
        best_of = max if meta["monitor_mode"] == "max" else min
    with refused_at(run / "history.csv"):
        history = load_history(run)
        last, known = history[-1] if history else {}, [epoch for epoch in history if not math.isnan(epoch[monitor])]
        best = best_of(known, key=lambda epoch: epoch[monitor], default={})
        seconds = sum(epoch["time"] for epoch in history)
        row |= {"epochs": len(history), "seconds": seconds, "last": last, "best": best}
        if last and not math.isfinite(last["loss"]):
            row["problem"] = f"diverged: loss {last['loss']} in epoch {len(history)}"
        elif not last and row["status"] == "finished":
            row["problem"] = "history.csv: holds no epoch"
        elif row["status"] == "failed" and (log := run / "stderr.txt").exists():
            row["problem"] = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    return row | {"test": load_test(run), "config": load_config(run)}


def collect(folder: str | Path) -> "pd.DataFrame":
    """The runs in or below a folder, a row each, sorted by their paths.

    Columns: run, status, problem, each setting that is not the same in all runs ('SGD.lr': a number, text, tuple or
    None as gin would read it, a reference as text), and the others of `overview`, with last_<column>, best_<column>,
    test_<metric>. What a run does not have is NaN. Raises Refused if there is no such folder.
    """
    import pandas as pd

    rows = [overview(run) for run in find_runs(folder)]
    configs = [row.pop("config", {}) for row in rows]
    names = dict.fromkeys(name for config in configs for name in config)
    differing = [name for name in names if len({config.get(name) for config in configs if config}) > 1]
    for row, config in zip(rows, configs, strict=True):
        for name in config.keys() & differing:
            row[name] = config[name]
            with suppress(ValueError, SyntaxError):
                row[name] = ast.literal_eval(config[name])
    frame = pd.json_normalize(rows, sep="_")
    return frame.reindex(columns=list(dict.fromkeys(["run", "status", "problem", *differing, *frame.columns])))


# --- comparing ------------------------------------------------------------------------------------


def to_json(value: Any) -> str:
    """The value as JSON that every program reads: NaN and the infinities, which it does not know, become null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=2)


def first_difference(a: str | Path, b: str | Path) -> str | None:
    """The first epoch and column where two runs' histories part, or their test metrics; None if they are equal.

    Columns of times and speeds do not count, nor do test metrics that one of them has not got yet.
    """
    rows = itertools.zip_longest(load_history(a), load_history(b), fillvalue=dict[str, float]())
    pairs = [(f"epoch {k}, ", *pair) for k, pair in enumerate(rows, start=1)]
    if (test_a := load_test(a)) and (test_b := load_test(b)):
        pairs.append(("test, ", test_a, test_b))
    lines = (where + line for where, *pair in pairs for name, line in changes(*pair).items() if name not in TIMES)
    return next(lines, None)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float, int]:
    """Mean, standard deviation (n - 1), half width of the 95 % t interval of the mean, and n, of finite values.

    The two in the middle are NaN for n < 2, all three for n = 0.
    """
    import pandas as pd
    from scipy import stats  # type: ignore[import-untyped]

    assert all(map(math.isfinite, values)), "list NaN and infinities apart"
    series = pd.Series(values, dtype=float)
    half = stats.t.ppf(0.975, len(series) - 1) * series.sem()
    return float(series.mean()), float(series.std()), float(half), len(series)


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The two-sided p value of Welch's t test that a and b have one mean; both are finite.

    None where that cannot be told: fewer than 3 values in one of them, or no spread in both.
    """
    from scipy import stats

    assert all(map(math.isfinite, [*a, *b])), "list NaN and infinities apart"
    if min(len(a), len(b)) < 3 or len(set(a)) == len(set(b)) == 1:
        return None
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


# --- one run's network ----------------------------------------------------------------------------


def load_model(run: str | Path, weights: Literal["best", "last"] = "best") -> "nn.Module":
    """The run's network on the CPU, in eval mode, with the weights of best.pt or, 'last', of the last commit.

    Input and output shapes are the run's data's. gin's configuration is the run's then. Raises Refused if there are no
    such weights yet, or they do not fit the code as it is now.
    """
    return _load(Path(run), weights)[0]


def _load(run: Path, weights: Literal["best", "last"]) -> tuple["nn.Module", dict[str, Any]]:
    """The network, and what the file of its weights holds."""
    import torch

    from src.training_loop import build, configure, refusing

    path = run / {"best": "best.pt", "last": "checkpoint.pt"}[weights]
    state = read_checkpoint(path)
    with refused_at(run / "meta.json"):
        meta = read_meta(run)
        data, archive = meta["data"], run / meta["code"]
        shapes = {"input_shape": tuple(data["input_shape"]), "n_classes": data["n_classes"]}
    if run.resolve() not in OWN and (changed := changed_files(code_files(), archive)):
        print(f"warning: {run}: the code is not the run's: {shorten(', '.join(changed), 200)}", file=sys.stderr)
    configure(read([str((run / "config.gin").absolute())])).apply()
    settings = gin.get_bindings("training_loop")
    with torch.random.fork_rng(devices=[]):
        network = build(settings["model"], torch.nn.Module, **shapes)
    if settings["precision"] == "fp64":
        network.double()
    with refusing(f"{path}: does not fit the model of the code here"):
        network.load_state_dict(state["network"])
    return network.eval(), state


def evaluate(
    run: str | Path, split: str = "test", data: "Data | None" = None, device: str | None = None
) -> tuple[dict[str, Any], "Tensor", "Tensor"]:
    """The metrics of the best weights on a split, its targets y [N, ...] and the network's outputs [N, ...].

    `split` is 'train' (not augmented), 'valid' or 'test'; `data` the run's data, if it is at hand already; `device` is
    as in training_loop, None takes the run's. Raises Refused: no run, no weights, or other data than the run's.
    """
    import torch

    from src.data.dataset import Batches, Data
    from src.metrics import Sums
    from src.training_loop import build, find_device, forward, memory_format_of

    network, best = _load(Path(run), "best")
    settings = gin.get_bindings("training_loop")
    place, data = find_device(device or settings["device"]), data or build(settings["data"], Data)
    here, expected = data.fingerprint, read_meta(Path(run))["data"]["fingerprint"]
    if here != expected:
        raise Refused(f"{run}: the data here is not the run's (fingerprint {here[:12]}, not {expected[:12]})")
    memory_format = memory_format_of(data, settings["channels_last"])
    network.to(place).to(memory_format=memory_format)
    metrics = [build(m, torch.nn.Module, n_classes=data.n_classes).to(place) for m in settings["metrics"]]
    sums = Sums(build(settings["loss"], torch.nn.Module).to(place), metrics)
    size, limit, n_workers = (settings[name] for name in ("batch_size", "steps_per_epoch", "n_workers"))
    batches = Batches(getattr(data, split), size, None, limit, place, memory_format, n_workers=n_workers)
    outputs, targets = [], []
    with torch.inference_mode():
        for x, y in batches:
            output = forward(network, x, settings["precision"])
            sums.update(output, y, len(y))
            outputs.append(output)
            targets.append(y)
    found = {"split": split, "n": sum(sums.sizes), "epoch": best["epoch"], "loss": float(sums.mean_loss())}
    return found | sums.compute(), torch.cat(targets), torch.cat(outputs)


def test_once(run: Path, data: "Data") -> None:
    """Writes eval_results.json, the test metrics of the best weights, unless it is there."""
    if not (run / "eval_results.json").exists():
        metrics = evaluate(run, "test", data)[0]
        write(run / "eval_results.json", json.dumps(metrics, indent=2) + "\n")
        print("test  " + one_line(metrics))


def one_line(metrics: Mapping[str, Any]) -> str:
    """The numbers of `evaluate` as people read them."""
    return "  ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key != "split")
