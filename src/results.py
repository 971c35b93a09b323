"""Reads runs back. Only `load_model` and `evaluate` import torch."""

import ast
import csv
import json
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gin

from src.config import Refused, format_value, read
from src.run import OWN, is_locked, read_checkpoint, read_flat, read_meta, write

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
        names = {*files, *folders}
        if "meta.json" in names or {"HEARTBEAT", "history.csv"} <= names:  # the second has lost the first
            runs.append(Path(path))
            folders.clear()
    return sorted(runs)


def load_config(run: str | Path) -> dict[str, str]:
    """config.gin as {"SGD.lr": "0.1", ...}: the values as text, as gin reads them. Raises Refused if it is damaged."""
    path = _existing(run) / "config.gin"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        flat = dict(binding for line in lines if not line.startswith("import ") for binding in _bindings(line))
    except (Refused, OSError, ValueError):
        flat = {}
    return flat or read_flat(path)  # edited by hand: macros, several lines a binding; or damaged: it says where


@lru_cache(maxsize=2**14)
def _bindings(line: str) -> list[tuple[str, str]]:
    """What one line sets: most are the same in many runs, and gin's parser takes 2 ms a file."""
    return [(b.key, format_value(b.value)) for b in read([], [line]).bindings]


def load_history(run: str | Path) -> list[dict[str, float]]:
    """history.csv: a dict an epoch, empty before the first commit. Raises Refused if it is damaged."""
    path = _existing(run) / "history.csv"
    if not path.exists():
        return []
    rows, line = [], 1
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            names = next(reader, None)
            if not names:
                raise ValueError("is empty, it has no header")
            for line, row in enumerate(reader, start=2):  # noqa: B007
                if len(row) != len(names):
                    raise ValueError(f"{len(row)} values under {len(names)} columns")
                rows.append(dict(zip(names, map(float, row), strict=True)))
    except (OSError, ValueError, csv.Error) as error:
        raise Refused(f"{path}: line {line}: {error}") from None
    return rows


def _existing(run: str | Path) -> Path:
    if not (Path(run) / "meta.json").is_file():
        raise Refused(f"{run}: is no run's folder: it has no meta.json")
    return Path(run)


def _read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises Refused if it does not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise Refused(f"{path}: holds no JSON object, but a {type(found).__name__}")
    return found


def to_json(value: Any) -> str:
    """The value as JSON that every program reads: NaN and the infinities, which it does not know, become null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=2)


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, str]:
    """`name: in a -> in b` for each name that has another value, or none, in the other; NaN is equal to NaN here."""
    lines = {}
    for name in dict.fromkeys([*a, *b]):
        x, y = (values.get(name, "(not set)") for values in (a, b))
        if x != y and not (x != x and y != y):
            step = f" ({y - x:+.3g})" if isinstance(x, float) and isinstance(y, float) else ""
            lines[name] = f"{name}: {x} -> {y}{step}"
    return lines


def first_difference(a: str | Path, b: str | Path) -> str | None:
    """The first epoch and column where two runs' histories part, or their test metrics; None if they are equal.

    Columns of times and speeds do not count, nor do test metrics that one of them has not got yet.
    """
    rows_a, rows_b = load_history(a), load_history(b)
    parts: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]
    parts = [(f"epoch {k}, ", *rows) for k, rows in enumerate(zip(rows_a, rows_b, strict=False), start=1)]
    parts.append(("", {"epochs": len(rows_a)}, {"epochs": len(rows_b)}))
    tests = [Path(run) / "eval_results.json" for run in (a, b)]
    if all(test.exists() for test in tests):
        parts.append(("test, ", _read_json(tests[0]), _read_json(tests[1])))
    found = (where + line for where, x, y in parts for name, line in changes(x, y).items() if name not in TIMES)
    return next(found, None)


def status(run: Path) -> str:
    """finished, running, stalled (no step for 10 minutes), stopped, failed, or dead. Raises Refused if meta.json, or
    HEARTBEAT of a run that a process holds, cannot be read.
    """
    said = str(_read_json(_existing(run) / "meta.json").get("status"))
    if run.resolve() in OWN:  # to open and close HEARTBEAT would give its lock away
        return "running"
    if not is_locked(run):
        return "finished" if (run / "FINISHED").exists() else "dead" if said in ("running", "finished") else said
    text = (run / "HEARTBEAT").read_text(encoding="utf-8", errors="replace")
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(text.splitlines()[0].split()[-1])
    except (ValueError, IndexError, TypeError):  # the last: a time without a zone
        raise Refused(f"{run}/HEARTBEAT: holds no step and time, but {text[:40]!r}") from None
    return "stalled" if age.total_seconds() > STALLED_SECONDS else "running"


def overview(run: Path) -> dict[str, Any]:
    """All that can be said of a run at a glance.

    Always: run (its path), status, and problem, what is wrong with one that has diverged or whose folder is damaged.
    Unless the status is 'unreadable': data, model, monitor, epochs, best (of the monitor), test (metrics or None),
    seconds (of all epochs), config, and last_epoch and best_epoch, rows of its history ({} before the first).
    """
    try:
        return {"run": str(run), **_read(run)}
    except (Refused, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
        what = textwrap.shorten(what.removeprefix(f"{run}: ").replace(f"{run}/", ""), 160, placeholder=" ...")
        return {"run": str(run), "status": "unreadable", "problem": what}


def _read(run: Path) -> dict[str, Any]:
    meta, config, history = _read_json(_existing(run) / "meta.json"), load_config(run), load_history(run)
    test = _read_json(run / "eval_results.json") if (run / "eval_results.json").exists() else None
    if missing := [k for k in ("data", "model", "monitor", "monitor_mode") if k not in meta]:
        raise Refused(f"meta.json: has no {', '.join(missing)}")
    monitor = meta["monitor"]
    if missing := [k for k in ("epoch", "time", "loss", monitor) if history and k not in history[0]]:
        raise Refused(f"history.csv: has no column {', '.join(missing)}")
    if strange := [k for k, v in (test or {}).items() if k != "split" and not isinstance(v, int | float)]:
        raise Refused(f"eval_results.json: {strange[0]} is no number")
    known = [row for row in history if not math.isnan(row[monitor])]
    best = (max if meta["monitor_mode"] == "max" else min)(known, key=lambda row: row[monitor], default={})
    now, last, problem = status(run), history[-1] if history else {}, ""
    if last and not math.isfinite(last["loss"]):
        problem = f"diverged: loss {last['loss']} in epoch {len(history)}"
    elif now == "finished" and not history:
        problem = "history.csv: holds no epoch"
    return {
        "status": now,
        "data": meta["data"]["name"],
        "model": meta["model"],
        "epochs": len(history),
        "monitor": monitor,
        "best": best.get(monitor),
        "test": test,
        "seconds": sum(row["time"] for row in history),
        "problem": problem,
        "config": config,
        "last_epoch": last,  # these two alone: all rows of many runs would fill the memory
        "best_epoch": best,
    }


# --- many runs ------------------------------------------------------------------------------------


def collect(folder: str | Path) -> "pd.DataFrame":
    """The runs in or below a folder, a row each, sorted by their paths.

    Columns: run (its path), status, each setting that is not the same in all runs ('SGD.lr': a number, text, tuple
    or None as gin would read it, a reference as text), epochs, best_epoch (by the run's monitor), last_<column> and
    best_<column> of history.csv for the last epoch and the best (times left out), test_<metric>, and problem (see
    `overview`). What a run does not have is NaN. Raises Refused if there is no such folder.
    """
    import pandas as pd

    runs = [overview(run) for run in find_runs(folder)]
    configs = [run["config"] for run in runs if "config" in run]
    names = dict.fromkeys(name for config in configs for name in config)
    differing = [name for name in names if len({config.get(name) for config in configs}) > 1]
    rows = []
    for run in runs:
        row = {name: run.get(name) for name in ("run", "status", "epochs", "problem")}
        config, last, best, test = (run.get(name) or {} for name in ("config", "last_epoch", "best_epoch", "test"))
        row |= {name: _literal(config[name]) for name in differing if name in config}
        row["best_epoch"] = int(best["epoch"]) if best else None
        for kind, values in (("last", last), ("best", best), ("test", test)):
            row |= {f"{kind}_{k}": v for k, v in values.items() if k not in TIMES | {"epoch", "split", "n"}}
        rows.append(row)
    first = ["run", "status", *differing, "epochs"]
    others = dict.fromkeys(name for row in rows for name in row if name not in (*first, "problem"))
    return pd.DataFrame(rows, columns=[*first, *others, "problem"])


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def mean_interval(values: Sequence[float]) -> tuple[float, float, float, int]:
    """Mean, standard deviation (n - 1), half width of the 95 % t interval of the mean, and n.

    The two in the middle are NaN for n < 2, all three for n = 0. Raises ValueError for NaN and infinities.
    """
    import pandas as pd
    from scipy import stats  # type: ignore[import-untyped]

    series = pd.Series(_finite(values), dtype=float)
    half = stats.t.ppf(0.975, len(series) - 1) * series.sem()
    return float(series.mean()), float(series.std()), float(half), len(series)


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The two-sided p value of Welch's t test that a and b have one mean. Raises ValueError for NaN and infinities.

    None where that cannot be told: fewer than 3 values in one of them, or no spread in both.
    """
    from scipy import stats

    a, b = _finite(a), _finite(b)
    if min(len(a), len(b)) < 3 or len(set(a)) == len(set(b)) == 1:
        return None
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def _finite(values: Sequence[float]) -> list[float]:
    if strange := [value for value in values if not math.isfinite(value)]:
        raise ValueError(f"{len(strange)} of {len(values)} values are not finite ({strange[0]}): list them apart")
    return [float(value) for value in values]


# --- one run's network ----------------------------------------------------------------------------


@contextmanager
def _configured(run: str | Path) -> Iterator[dict[str, Any]]:
    """The run's `training_loop` settings as gin builds them; gin's own configuration is kept."""
    from src.training_loop import configure

    before = {key: dict(value) for key, value in gin.config._CONFIG.items()}
    try:
        configure(read([str(Path(run, "config.gin"))])).apply()
        yield gin.get_bindings("training_loop")
    finally:
        gin.clear_config()
        gin.config._CONFIG.update(before)


def load_model(run: str | Path, weights: str = "best") -> "nn.Module":
    """The run's network on the CPU, in eval mode, with the weights of best.pt or, 'last', of the last commit.

    Input and output shapes are the run's data's. Raises Refused if there is no run, there are no such weights yet, or
    they do not fit the code as it is now.
    """
    return _load(run, weights)[0]


def _load(run: str | Path, weights: str) -> tuple["nn.Module", dict[str, Any]]:
    """The network, and what the file of its weights holds."""
    import torch

    from src.training_loop import build, refuse_other_shapes

    file = {"best": "best.pt", "last": "checkpoint.pt"}.get(weights)
    if file is None:
        raise Refused(f"weights must be 'best' or 'last', not {weights!r}")
    path = _existing(run) / file
    if not path.exists():
        raise Refused(f"{run}: has no {file} yet: no epoch is finished")
    data, state = read_meta(path.parent)["data"], read_checkpoint(path)
    shapes = {"input_shape": tuple(data["input_shape"]), "n_classes": data["n_classes"]}
    with _configured(run) as settings, torch.random.fork_rng(devices=[]):
        network: nn.Module = build(settings["model"], **shapes)
    refuse_other_shapes(state["network"], network, f"{path}: does not fit the model of the code here")
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

    from src.data.dataset import Batches
    from src.metrics import LossList, MetricList
    from src.training_loop import build, find_device, memory_format_of

    (network, best), path = _load(run, "best"), Path(run)
    with _configured(path) as settings:
        place = find_device(device or settings["device"])
        data = data or settings["data"]()
        memory_format = memory_format_of(data, settings["channels_last"])
        network.to(place).to(memory_format=memory_format)
        loss = LossList(build(settings["loss"]).to(place))
        metrics = MetricList([build(m, n_classes=data.n_classes).to(place) for m in settings["metrics"]])
    here, expected = data.fingerprint, read_meta(path)["data"]["fingerprint"]
    if here != expected:
        raise Refused(f"{path}: the data here is not the run's (fingerprint {here[:12]}, not {expected[:12]})")
    size, limit, n_workers = (settings[name] for name in ("batch_size", "steps_per_epoch", "n_workers"))
    batches = Batches(getattr(data, split), size, None, limit, place, memory_format, n_workers=n_workers)
    outputs, targets = [], []
    with torch.inference_mode():
        for x, y in batches:
            output = network(x)
            loss.of(output, y, len(y))
            metrics.update(output, y, len(y))
            outputs.append(output)
            targets.append(y)
    found = {"split": split, "n": sum(loss.sizes), "epoch": best["epoch"]}
    found |= {"loss": float(loss.compute()), **{name: float(value) for name, value in metrics.compute().items()}}
    return found, torch.cat(targets), torch.cat(outputs)


def test_once(run: Path, data: "Data") -> None:
    """Writes eval_results.json, the test metrics of the best weights, unless it is there."""
    if not (run / "eval_results.json").exists():
        metrics = evaluate(run, "test", data)[0]
        write(run / "eval_results.json", json.dumps(metrics, indent=2) + "\n")
        print("test  " + one_line(metrics))


def one_line(metrics: Mapping[str, Any]) -> str:
    """The numbers of `evaluate` as people read them."""
    return "  ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key != "split")
