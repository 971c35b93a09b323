"""Reads runs back. Only `load_model` and `evaluate` import torch."""

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gin

from src.config import Refused
from src.run import is_locked, read_checkpoint, read_flat, read_meta

if TYPE_CHECKING:
    from torch import nn

    from src.data.dataset import Data

STALLED_SECONDS = 600.0


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


def status(run: Path) -> str:
    """finished, running, stalled (no step for 10 minutes), stopped, failed, or dead."""
    if (run / "FINISHED").exists():
        return "finished"
    said = str(read_meta(run).get("status"))
    if said != "running":
        return said
    if not is_locked(run):
        return "dead"
    written = datetime.fromisoformat((run / "HEARTBEAT").read_text().split()[-1])
    return "stalled" if (datetime.now(UTC) - written).total_seconds() > STALLED_SECONDS else said


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
    import torch

    from src.training_loop import build

    file = {"best": "best.pt", "last": "checkpoint.pt"}.get(weights)
    if file is None:
        raise Refused(f"weights must be 'best' or 'last', not {weights!r}")
    path = _existing(run)
    if not (path / file).exists():
        raise Refused(f"{path}: has no {file} yet: no epoch is finished")
    data = read_meta(path)["data"]
    with _configured(path) as settings, torch.random.fork_rng(devices=[]):
        network: nn.Module = build(
            settings["model"], input_shape=tuple(data["input_shape"]), n_classes=data["n_classes"]
        )
    try:
        network.load_state_dict(read_checkpoint(path / file)["network"])
    except RuntimeError as error:
        raise Refused(f"{path / file}: does not fit the model of the code here: {error}") from None
    return network.eval()


@dataclass(frozen=True)
class Predictions:
    """One row an image of the split, in its order. label, prediction: class; probability: 0..1."""

    label: list[int]
    prediction: list[int]
    probability: list[float]


def evaluate(
    run: str | Path, split: str = "test", data: "Data | None" = None, device: str | None = None
) -> tuple[dict[str, Any], Predictions]:
    """The metrics of the best weights on a split, and the predictions.

    Args:
        run: its folder.
        split: 'train' (not augmented), 'valid' or 'test'.
        data: the run's data, if it is at hand already.
        device: as in training_loop; None takes the run's.

    Raises:
        Refused: no run, no weights, or other data than the run's.
    """
    import torch

    from src.training_loop import LossList, MetricList, ValidBatches, build, find_device

    path = _existing(run)
    network = load_model(path)
    with _configured(path) as settings:
        place = find_device(device or settings["device"])
        network.to(place)
        data = data or settings["data"]()
        loss = LossList(build(settings["loss"]).to(place))
        metrics = MetricList([build(m, n_classes=data.n_classes).to(place) for m in settings["metrics"]])
    expected = read_meta(path)["data"]["fingerprint"]
    if data.fingerprint != expected:
        raise Refused(
            f"{path}: the data here is not the run's (fingerprint {data.fingerprint[:12]}, not {expected[:12]})"
        )
    outputs, labels = [], []
    part = {"train": data.train, "valid": data.valid, "test": data.test}[split].to(place)
    with torch.inference_mode():
        for x, y in ValidBatches(part, settings["batch_size"], settings["steps_per_epoch"]):
            output = network(x)
            loss(output, y)
            metrics.update(output, y)
            outputs.append(output.softmax(dim=1))
            labels.append(y)
    probability, prediction = torch.cat(outputs).max(dim=1)
    values = {name: float(value) for name, value in metrics.compute().items()}
    epoch = read_checkpoint(path / "best.pt")["epoch"]
    return (
        {"split": split, "n": sum(loss.sizes), "epoch": epoch, "loss": float(loss.compute()), **values},
        Predictions(torch.cat(labels).tolist(), prediction.tolist(), probability.tolist()),
    )


def one_line(metrics: Mapping[str, Any]) -> str:
    """The numbers of `evaluate` as people read them."""
    return "  ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key != "split")
