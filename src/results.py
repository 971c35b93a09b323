"""Reads runs back. Only `load_model` and `evaluate` import torch."""

import ast
import csv
import json
import math
import os
import statistics
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
    """The run folders in or below a folder, sorted; what lies inside a run is not looked at.

    Raises Refused if there is no such folder.
    """
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
    """config.gin as {"SGD.lr": "0.1", ...}: the values as text, as gin reads them.

    Raises Refused if it cannot be read.
    """
    path = _existing(run) / "config.gin"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: cannot be read: {error}") from None
    try:
        flat = dict(binding for line in lines if not line.startswith("import ") for binding in _bindings(line))
    except Refused:
        flat = {}
    return flat or read_flat(path)  # edited by hand: macros, several lines a binding; or broken: it says where


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


def first_difference(a: str | Path, b: str | Path) -> str | None:
    """The first epoch and column where two runs' histories part, or their test metrics; None if they are equal.

    Columns of times and speeds do not count.
    """
    rows_a, rows_b = load_history(a), load_history(b)
    for epoch, (x, y) in enumerate(zip(rows_a, rows_b, strict=False), start=1):
        if found := _difference(x, y):
            return f"epoch {epoch}, {found}"
    if len(rows_a) != len(rows_b):
        return f"epochs: {len(rows_a)} -> {len(rows_b)}"
    tests = [json.loads(f.read_text()) for run in (a, b) if (f := Path(run) / "eval_results.json").exists()]
    found = _difference(*tests) if len(tests) == 2 else None
    return f"test, {found}" if found else None


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    for key in dict.fromkeys([*a, *b]):
        x, y = a.get(key), b.get(key)
        if key not in TIMES and x != y and not (x != x and y != y):  # NaN is equal to NaN here
            difference = f" ({y - x:+.3g})" if isinstance(x, float) and isinstance(y, float) else ""
            return f"{key}: {x} -> {y}{difference}"
    return None


def status(run: Path) -> str:
    """finished, running, stalled (no step for 10 minutes), stopped, failed, or dead.

    Raises Refused if meta.json, or HEARTBEAT of a run that a process holds, cannot be read.
    """
    said = str(_read_json(_existing(run) / "meta.json").get("status"))
    if run.resolve() in OWN:
        return "running"
    if not is_locked(run):
        return "finished" if (run / "FINISHED").exists() else "dead" if said in ("running", "finished") else said
    text = (run / "HEARTBEAT").read_text(encoding="utf-8", errors="replace")
    try:
        written = datetime.fromisoformat(text.splitlines()[0].split()[-1])
        return "stalled" if (datetime.now(UTC) - written).total_seconds() > STALLED_SECONDS else "running"
    except (ValueError, IndexError, TypeError):  # the last: a time without a zone
        raise Refused(f"{run}/HEARTBEAT: holds no step and time, but {text[:40]!r}") from None


def overview(run: Path) -> dict[str, Any]:
    """What bin/runs.py shows of a run.

    `problem` says what is wrong with one that has diverged, or whose folder is damaged. The status of the
    latter is 'unreadable', and no more is told.
    """
    found = _contents(run)
    row = {"run": str(run), "status": found["status"]}
    if "meta" in found:
        meta, best = found["meta"], found["best"]
        row |= {
            "data": meta["data"]["name"],
            "model": meta["model"],
            "epochs": found["epochs"],
            "monitor": meta["monitor"],
            "best": best[meta["monitor"]] if best else None,
            "test": found["test"],
            "seconds": found["seconds"],
        }
    return row | {"problem": found["problem"]}


def _contents(run: Path) -> dict[str, Any]:
    """status and problem of a run; of one that can be read what its files say, and of its history the last row, the
    best and the sum of times: all rows of many runs would fill the memory.
    """
    try:
        meta, config, history = _read_json(_existing(run) / "meta.json"), load_config(run), load_history(run)
        test = _read_json(run / "eval_results.json") if (run / "eval_results.json").exists() else {}
        if missing := [k for k in ("data", "model", "monitor", "monitor_mode") if k not in meta]:
            raise Refused(f"meta.json: has no {', '.join(missing)}")
        monitor, _ = meta["monitor"], meta["data"]["name"]
        if missing := [k for k in ("epoch", "time", "loss", monitor) if history and k not in history[0]]:
            raise Refused(f"history.csv: has no column {', '.join(missing)}")
        if strange := [k for k, v in test.items() if k != "split" and not isinstance(v, int | float)]:
            raise Refused(f"eval_results.json: {strange[0]} is no number")
        known = [row for row in history if not math.isnan(row[monitor])]
        best = (max if meta["monitor_mode"] == "max" else min)(known, key=lambda row: row[monitor], default={})
        now, last, problem = status(run), history[-1] if history else {}, ""
        if last and not math.isfinite(last["loss"]):
            problem = f"diverged: loss {last['loss']} in epoch {len(history)}"
        elif now == "finished" and not history:
            problem = "history.csv: holds no epoch"
    except Refused as refusal:
        what = refusal.message
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
    else:
        found = {"status": now, "problem": problem, "meta": meta, "config": config, "test": test or None}
        seconds = sum(row["time"] for row in history)
        return found | {"epochs": len(history), "seconds": seconds, "last": last, "best": best}
    what = what.removeprefix(f"{run}: ").replace(f"{run}/", "")
    return {"status": "unreadable", "problem": textwrap.shorten(what, 160, placeholder=" ...")}


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

    def plain(v: Any) -> Any:
        if isinstance(v, Mapping):
            return {key: plain(item) for key, item in v.items()}
        if isinstance(v, list | tuple):
            return [plain(item) for item in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(plain(value), indent=2, allow_nan=False)


# --- many runs ------------------------------------------------------------------------------------


def collect(folder: str | Path) -> "pd.DataFrame":
    """The runs in or below a folder, a row each, sorted by their paths.

    Columns: run (its path), status, each setting that is not the same in all runs ('SGD.lr': a number, text, tuple
    or None as gin would read it, a reference as text), epochs, last_<column> and best_<column> of history.csv for
    the last epoch and the best by the run's monitor (times left out), test_<metric>, and problem (see `overview`).
    What a run does not have is NaN.

    Raises Refused if there is no such folder.
    """
    import pandas as pd

    found = {str(run): _contents(run) for run in find_runs(folder)}
    configs = [f["config"] for f in found.values() if "config" in f]
    names = dict.fromkeys(name for config in configs for name in config)
    differing = [name for name in names if len({config.get(name) for config in configs}) > 1]
    groups: list[list[dict[str, Any]]] = []  # the columns of each run, group by group
    for run, f in found.items():
        config, best, test = (f.get(key) or {} for key in ("config", "best", "test"))
        groups.append(
            [
                {"run": run, "status": f["status"]},
                {name: _literal(config[name]) for name in differing if name in config},
                {"epochs": f.get("epochs")},
                {f"last_{name}": value for name, value in f.get("last", {}).items() if name not in TIMES | {"epoch"}},
                {"best_epoch": int(best["epoch"]) if best else None},
                {f"best_{name}": value for name, value in best.items() if name not in TIMES | {"epoch"}},
                {f"test_{name}": value for name, value in test.items() if name not in ("split", "n", "epoch")},
                {"problem": f["problem"]},
            ]
        )
    columns = dict.fromkeys(name for group in zip(*groups, strict=True) for part in group for name in part)
    rows = [{name: value for group in run for name, value in group.items()} for run in groups]
    return pd.DataFrame(rows, columns=list(columns or ("run", "status", "epochs", "best_epoch", "problem")))


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def mean_interval(values: Sequence[float]) -> tuple[float, float, float, int]:
    """Mean, standard deviation (n - 1), half width of the 95 % t interval of the mean, and n.

    The two in the middle are NaN for n < 2, all three for n = 0. Raises ValueError for values that are NaN or
    infinite: they are to be listed apart, not averaged.
    """
    from scipy import stats  # type: ignore[import-untyped]

    numbers, n = _finite(values), len(values)
    mean = statistics.fmean(numbers) if n else math.nan
    deviation = statistics.stdev(numbers) if n > 1 else math.nan
    half = float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n) if n > 1 else math.nan
    return mean, deviation, half, n


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The two-sided p value of Welch's t test that a and b have one mean.

    None where that cannot be told: fewer than 3 values in one of them, or no spread in both.
    Raises ValueError for NaN and infinities.
    """
    from scipy import stats

    a, b = _finite(a), _finite(b)
    if min(len(a), len(b)) < 3 or len(set(a)) == len(set(b)) == 1:
        return None
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def _finite(values: Sequence[float]) -> list[float]:
    numbers = [float(value) for value in values]
    if strange := [value for value in numbers if not math.isfinite(value)]:
        raise ValueError(f"{len(strange)} of {len(numbers)} values are not finite ({strange[0]}): list them apart")
    return numbers


# --- one run's network ----------------------------------------------------------------------------


@contextmanager
def _configured(run: Path) -> Iterator[dict[str, Any]]:
    """The run's `training_loop` settings as gin builds them; gin's own configuration is kept."""
    from src import config
    from src.training_loop import configure

    before = {key: dict(value) for key, value in gin.config._CONFIG.items()}
    try:
        configure(config.read([str(run / "config.gin")])).apply()
        yield gin.get_bindings("training_loop")
    finally:
        gin.clear_config()
        gin.config._CONFIG.update(before)


def load_model(run: str | Path, weights: str = "best") -> "nn.Module":
    """The run's network on the CPU, in eval mode. Input and output shapes are the run's data's.

    Args:
        run: its folder.
        weights: 'best' (best.pt) or 'last' (the last commit).

    Raises:
        Refused: no run, no such weights yet, or weights that do not fit the code as it is now.
    """
    return _load(_existing(run), weights)[0]


def _load(run: Path, weights: str) -> tuple["nn.Module", dict[str, Any]]:
    import torch

    from src.training_loop import build, refuse_other_shapes

    file = {"best": "best.pt", "last": "checkpoint.pt"}.get(weights)
    if file is None:
        raise Refused(f"weights must be 'best' or 'last', not {weights!r}")
    if not (run / file).exists():
        raise Refused(f"{run}: has no {file} yet: no epoch is finished")
    data, state = read_meta(run)["data"], read_checkpoint(run / file)
    with _configured(run) as settings, torch.random.fork_rng(devices=[]):
        network: nn.Module = build(
            settings["model"], input_shape=tuple(data["input_shape"]), n_classes=data["n_classes"]
        )
    refuse_other_shapes(state["network"], network, f"{run / file}: does not fit the model of the code here")
    network.load_state_dict(state["network"])
    return network.eval(), state


def evaluate(
    run: str | Path, split: str = "test", data: "Data | None" = None, device: str | None = None
) -> tuple[dict[str, Any], "Tensor", "Tensor"]:
    """The metrics of the best weights on a split, its targets y [N, ...] and the network's outputs [N, ...].

    Args:
        run: its folder.
        split: 'train' (not augmented), 'valid' or 'test'.
        data: the run's data, if it is at hand already.
        device: as in training_loop; None takes the run's.

    Raises:
        Refused: no run, no weights, or other data than the run's.
    """
    import torch

    from src.data.dataset import Batches
    from src.metrics import LossList, MetricList
    from src.training_loop import build, find_device, memory_format_of

    path = _existing(run)
    network, state = _load(path, "best")
    with _configured(path) as settings:
        place = find_device(device or settings["device"])
        data = data or settings["data"]()
        memory_format = memory_format_of(data, settings["channels_last"])
        network.to(place).to(memory_format=memory_format)
        loss = LossList(build(settings["loss"]).to(place))
        metrics = MetricList([build(m, n_classes=data.n_classes).to(place) for m in settings["metrics"]])
    expected = read_meta(path)["data"]["fingerprint"]
    if data.fingerprint != expected:
        raise Refused(
            f"{path}: the data here is not the run's (fingerprint {data.fingerprint[:12]}, not {expected[:12]})"
        )
    outputs, targets = [], []
    part = {"train": data.train, "valid": data.valid, "test": data.test}[split]
    part = part.to(place, settings["n_workers"], memory_format)
    with torch.inference_mode():
        for x, y in Batches(part, settings["batch_size"], limit=settings["steps_per_epoch"]):
            output = network(x)
            loss.of(output, y, len(y))
            metrics.update(output, y, len(y))
            outputs.append(output)
            targets.append(y)
    values = {name: float(value) for name, value in metrics.compute().items()}
    return (
        {"split": split, "n": sum(loss.sizes), "epoch": state["epoch"], "loss": float(loss.compute()), **values},
        torch.cat(targets),
        torch.cat(outputs),
    )


def test_once(run: Path, data: "Data") -> None:
    """Writes eval_results.json, the test metrics of the best weights, unless it is there."""
    if not (run / "eval_results.json").exists():
        metrics = evaluate(run, "test", data)[0]
        write(run / "eval_results.json", json.dumps(metrics, indent=2) + "\n")
        print("test  " + one_line(metrics))


def one_line(metrics: Mapping[str, Any]) -> str:
    """The numbers of `evaluate` as people read them."""
    return "  ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key != "split")
