"""Reads runs back. Only `load_model` and `evaluate` import torch."""

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gin

from src.config import Refused
from src.run import OWN, is_locked, read_checkpoint, read_flat, read_meta, write

if TYPE_CHECKING:
    from torch import nn

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
        if "meta.json" in files:
            runs.append(Path(path))
            folders.clear()
    return sorted(runs)


def load_config(run: str | Path) -> dict[str, str]:
    """config.gin as {"SGD.lr": "0.1", ...}: the values as text, as gin reads them."""
    return read_flat(_existing(run) / "config.gin")


def load_history(run: str | Path) -> list[dict[str, float]]:
    """history.csv: a dict an epoch, empty before the first commit."""
    path = _existing(run) / "history.csv"
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


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
    """finished, running, stalled (no step for 10 minutes), stopped, failed, or dead."""
    said = str(read_meta(run).get("status"))
    if run.resolve() in OWN:
        return "running"
    if not is_locked(run):
        return "finished" if (run / "FINISHED").exists() else "dead" if said in ("running", "finished") else said
    written = datetime.fromisoformat((run / "HEARTBEAT").read_text().split()[-1])
    return "stalled" if (datetime.now(UTC) - written).total_seconds() > STALLED_SECONDS else "running"


def overview(run: Path) -> dict[str, Any]:
    """What bin/runs.py shows of a run; status says what is wrong with a folder that is damaged."""
    row: dict[str, Any] = {"run": str(run)}
    try:
        meta, history = read_meta(run), load_history(run)
        row |= {"status": status(run), "data": meta["data"]["name"], "model": meta["model"]}
        values = [e[meta["monitor"]] for e in history if not math.isnan(e[meta["monitor"]])]
        best = max if meta["monitor_mode"] == "max" else min
        test = run / "eval_results.json"
        return row | {
            "epochs": len(history),
            "monitor": meta["monitor"],
            "best": best(values) if values else None,
            "test": json.loads(test.read_text()) if test.exists() else None,
            "seconds": sum(e["time"] for e in history),
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        return row | {"status": f"unreadable: {type(error).__name__}: {error}"}


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
) -> tuple[dict[str, Any], list[tuple[int, int, float]]]:
    """The metrics of the best weights on a split, and label, prediction and probability of each image.

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
    outputs, labels = [], []
    part = {"train": data.train, "valid": data.valid, "test": data.test}[split]
    part = part.to(place, settings["n_workers"], memory_format)
    with torch.inference_mode():
        for x, y in Batches(part, settings["batch_size"], limit=settings["steps_per_epoch"]):
            output = network(x)
            loss(output, y)
            metrics.update(output, y)
            outputs.append(output.softmax(dim=1))
            labels.append(y)
    probability, prediction = torch.cat(outputs).max(dim=1)
    values = {name: float(value) for name, value in metrics.compute().items()}
    return (
        {"split": split, "n": sum(loss.sizes), "epoch": state["epoch"], "loss": float(loss.compute()), **values},
        list(zip(torch.cat(labels).tolist(), prediction.tolist(), probability.tolist(), strict=True)),
    )


def test_once(run: Path, data: "Data") -> None:
    """Writes eval_results.json, the test metrics of the best weights, unless it is there."""
    if not (run / "eval_results.json").exists():
        metrics, _ = evaluate(run, "test", data)
        write(run / "eval_results.json", json.dumps(metrics, indent=2) + "\n")
        print("test  " + one_line(metrics))


def one_line(metrics: Mapping[str, Any]) -> str:
    """The numbers of `evaluate` as people read them."""
    return "  ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key != "split")
