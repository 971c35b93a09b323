"""Run folders as crashes, full disks, copies and people leave them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from src.config import ROOT

EXAMPLE = ROOT / "results/example_run"
FILES = ("FINISHED", "HEARTBEAT", "config.gin", "eval_results.json", "history.csv", "meta.json")
HEADER, *ROWS = (EXAMPLE / "history.csv").read_text().splitlines()
COLUMNS = HEADER.split(",")


def awkward(folder: Path) -> dict[str, tuple[str, str]]:
    """Makes the runs in the folder. Gives each one's status and what must be said of it, by its name."""
    for name, (_, _, spoil) in RUNS.items():
        run = folder / name
        run.mkdir(parents=True)
        for file in FILES:
            shutil.copy(EXAMPLE / file, run / file)
        spoil(run)
    # No runs: a file, a folder that leads back, one with another's table, what lies inside of a run.
    (folder / "a file.json").write_text("{}")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "plots").mkdir()
    (folder / "plots/history.csv").write_text("x,y\n")
    shutil.copytree(folder / "healthy", folder / "healthy/copy of healthy")
    return {name: (status, problem) for name, (status, problem, _) in RUNS.items()}


def put(file: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda run: (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def gone(*files: str) -> Callable[[Path], object]:
    return lambda run: [(run / file).unlink() for file in files]


def as_folder(file: str) -> Callable[[Path], object]:
    return lambda run: ((run / file).unlink(), (run / file).mkdir())


def meta(**entries: object) -> Callable[[Path], object]:
    return put("meta.json", json.dumps(json.loads((EXAMPLE / "meta.json").read_text()) | entries))


def tested(**entries: object) -> Callable[[Path], object]:
    return put("eval_results.json", json.dumps(json.loads((EXAMPLE / "eval_results.json").read_text()) | entries))


def history(*rows: str, header: str = HEADER) -> Callable[[Path], object]:
    return put("history.csv", "\r\n".join([header, *rows, ""]))


def with_value(column: str, *values: str) -> Callable[[Path], object]:
    """The history with other values of a column in its last epochs."""
    rows = [row.split(",") for row in ROWS]
    for row, value in zip(rows[-len(values) :], values, strict=True):
        row[COLUMNS.index(column)] = value
    return history(*(",".join(row) for row in rows))


def stopped_before_an_epoch(run: Path) -> None:
    gone("FINISHED", "history.csv", "eval_results.json")(run)
    meta(status="stopped")(run)


def failed(run: Path) -> None:
    stopped_before_an_epoch(run)
    meta(status="failed")(run)
    put("stderr.txt", b"warning: \xff\ntrain.py: the loss is nan at epoch 1, step 7: try a lower learning rate\n")(run)


def link_to_itself(run: Path) -> None:
    gone("meta.json")(run)
    (run / "meta.json").symlink_to("meta.json")


HUGE = [f"{k},{ROWS[0].split(',', 1)[1]}" for k in range(1, 20_001)]
MORE = [f"{row},0.5" for row in ROWS]
LESS = history(*(",".join(row.split(",")[:6]) for row in ROWS), header=",".join(COLUMNS[:6]))
BY_HAND = "rate = 0.1\nSGD.lr = %rate\nSimpleCNN.n_filters = [\n  8,  # small\n  8]\n"

# name -> status, a part of what must be said, how the example is spoilt
RUNS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "healthy": ("finished", "", lambda run: None),
    "a name with spaces, and a comma": ("finished", "", lambda run: None),
    "läuft-实验-🙂": ("finished", "", lambda run: None),
    "two\nlines and no \udcff text": ("finished", "", lambda run: None),
    "deep/er/down": ("finished", "", lambda run: None),
    "meta cut": ("unreadable", "meta.json: Unterminated string", put("meta.json", '{"starts": [{"sta')),
    "meta of no bytes": ("unreadable", "meta.json: Expecting value", put("meta.json", "")),
    "meta of zeros": ("unreadable", "meta.json: Expecting value", put("meta.json", bytes(4096))),
    "meta binary": ("unreadable", "meta.json: 'utf-8' codec can't", put("meta.json", b"\xff\xfe\x00")),
    "meta too deep": ("unreadable", "meta.json: maximum recursion depth", put("meta.json", "[" * 100_000)),
    "meta without entries": ("unreadable", "meta.json: has no 'status'", put("meta.json", "{}")),
    "meta a list": ("unreadable", "meta.json: list indices must be", put("meta.json", "[]")),
    "meta with odd data": ("unreadable", "meta.json: string indices must be", meta(data="digits")),
    "meta with odd monitor": ("unreadable", "history.csv: has no \"['val_acc']\"", meta(monitor=["val_acc"])),
    "meta with odd model": ("finished", "", meta(model=7)),
    "meta missing": ("unreadable", "meta.json: No such file", gone("meta.json")),
    "meta a folder": ("unreadable", "meta.json: Is a directory", as_folder("meta.json")),
    "meta a link to itself": ("unreadable", "meta.json: Too many levels", link_to_itself),
    "history of no bytes": ("finished", "history.csv: holds no epoch", put("history.csv", "")),
    "history only a header": ("finished", "history.csv: holds no epoch", history()),
    "history missing": ("finished", "history.csv: holds no epoch", gone("history.csv")),
    "history not begun": ("stopped", "", stopped_before_an_epoch),
    "history cut": ("unreadable", "history.csv: line 3 has 4 values under 12", history(ROWS[0], "2,1,0.1,0.")),
    "history half overwritten": ("unreadable", "history.csv: line 2", history(ROWS[0] + ",9")),
    "history with a word": ("unreadable", "could not convert string to float: 'fast'", with_value("lr", "fast")),
    "history binary": ("unreadable", "history.csv: 'utf-8' codec", put("history.csv", b"\x89PNG\r\n\x1a\n\xff" * 9)),
    "history a folder": ("unreadable", "history.csv: Is a directory", as_folder("history.csv")),
    "history without monitor": ("unreadable", "history.csv: has no 'val_acc'", LESS),
    "history with other columns": ("finished", "", history(*MORE, header=f"{HEADER},val_f1")),
    "history huge": ("finished", "", history(*HUGE)),
    "loss NaN": ("finished", "diverged: loss nan in epoch 2", with_value("loss", "nan")),
    "loss infinite": ("finished", "diverged: loss inf in epoch 2", with_value("loss", "inf")),
    "time NaN": ("finished", "", with_value("time", "nan")),
    "monitor NaN at last": ("finished", "", with_value("val_acc", "nan")),
    "monitor always NaN": ("finished", "", with_value("val_acc", "nan", "nan")),
    "config missing": ("unreadable", "config.gin: No such file", gone("config.gin")),
    "config empty": ("unreadable", "config.gin: is not as a run writes it", put("config.gin", "")),
    "config cut": ("unreadable", "config.gin: is not as a run writes it", put("config.gin", "SGD.lr = 0.1\nSGD.m = ")),
    "config binary": ("unreadable", "config.gin: 'utf-8' codec can't", put("config.gin", b"\xff\x00")),
    "config written by hand": ("unreadable", "config.gin: is not as a run writes it", put("config.gin", BY_HAND)),
    "heartbeat missing": ("finished", "", gone("HEARTBEAT")),
    "heartbeat garbage": ("finished", "", put("HEARTBEAT", b"\x00\xff")),
    "test cut": ("unreadable", "eval_results.json: Unterminated string", put("eval_results.json", '{"spl')),
    "test a number": ("unreadable", "eval_results.json: 'int' object has no", put("eval_results.json", "3")),
    "test with a word": ("unreadable", "eval_results.json: could not convert string", tested(acc="high")),
    "test NaN": ("finished", "", tested(acc=float("nan"), loss=float("inf"))),
    "killed": ("dead", "", gone("FINISHED")),
    "failed": ("failed", "the loss is nan at epoch 1", failed),
}  # fmt: skip
