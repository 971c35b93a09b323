"""bin/train.py: real runs of it, what their folders hold, how they stop and go on."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.kill import run_difference
from src import results
from src.run import read_checkpoint, read_meta
from tests.conftest import RUN_FILES, SMALL


def assert_same_run(a, b):
    """The design's equality: tensor bytes, history and test metrics."""
    assert run_difference(Path(a), Path(b)) is None


def test_a_run_leaves_every_file_of_its_folder(small, train):
    done = train("runs/a b", small, "-b", "SGD.lr=0.03;training_loop.seed=3")
    assert done.returncode == 0, done.stderr
    run = Path("runs/a b")
    assert {f.name for f in run.iterdir() if "tfevents" not in f.name} == RUN_FILES
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert (run / "stdout.txt").read_text() == done.stdout
    assert (run / "stderr.txt").read_text() == done.stderr == ""
    assert (run / "configs/small.gin").read_text() == SMALL
    meta = read_meta(run)
    assert (meta["status"], meta["exit"], meta["seed"]) == ("finished", 0, 3)
    assert meta["data"]["name"] == "digits" and meta["model"] == "SimpleCNN"
    assert meta["starts"][0]["stop"] and meta["starts"][0]["threads"] == 1
    columns = next(csv.reader((run / "history.csv").read_text().splitlines()))
    expected = "epoch,time,lr,loss,acc,val_loss,val_acc,images_per_s,data_wait,commit_s,valid_s,peak_mb"
    assert columns == expected.split(",")
    assert [row["lr"] for row in results.load_history(run)] == [0.03, 0.03]
    assert json.loads((run / "eval_results.json").read_text())["n"] == 359
    config = results.load_config(run)
    assert config["SGD.lr"] == "0.03" and config["SGD.nesterov"] == "False"
    assert "torch==" in (run / "environment.txt").read_text()
    assert re.match(r"step 22 20", (run / "HEARTBEAT").read_text())
    assert "SGD.lr=0.03" in (run / "command.sh").read_text()


@pytest.mark.slow
def test_the_recorded_config_and_command_repeat_the_run(small, train):
    assert train("a", small).returncode == 0
    assert train("b", "a/config.gin").returncode == 0
    assert_same_run("a", "b")
    command = Path("a/command.sh").read_text().replace(" a small.gin", " c small.gin")
    Path("a/again.sh").write_text(command)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "a/again.sh"], check=True, env=os.environ | {"PATH": path})
    assert_same_run("a", "c")


@pytest.mark.parametrize(
    "bindings",
    [
        "",
        "training_loop.optimizer=@Adam;training_loop.callbacks=[@WarmupCosine,@EarlyStopping];"
        "WarmupCosine.total_steps=40;WarmupCosine.warmup_steps=5",
        "training_loop.callbacks=[@LRSchedule,@ReduceLROnPlateau];LRSchedule.base_lr=0.1;"
        "LRSchedule.schedule=[[2,1.0],[10,0.1]];ReduceLROnPlateau.patience=0",
    ],
    ids=["momentum", "adam-cosine", "schedules"],
)
def test_two_epochs_and_then_on_to_five_are_five(small, main, bindings):
    longer = f"{bindings};training_loop.n_epochs=5"
    assert main("train", "whole", small, "-b", longer) == 0
    assert main("train", "parts", small, "-b", bindings) == 0
    assert len(results.load_history("parts")) == 2
    assert main("train", "parts", small, "-b", longer, "-b", "training_loop.reload=True") == 0
    assert_same_run("whole", "parts")
    assert len(read_meta(Path("parts"))["starts"]) == 2
    assert Path("parts/command.sh").read_text().count("# start") == 2


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1))]
)
def test_a_signal_stops_within_the_epoch_and_the_run_goes_on_exactly(small, start, main, number):
    # 108 small steps an epoch: the signal comes in the middle of one.
    bindings = ("-b", "training_loop.batch_size=10;training_loop.n_epochs=12")
    assert main("train", "whole", small, *bindings) == 0
    process = start("stopped", small, *bindings)
    wait_for(lambda: Path("stopped/history.csv").exists(), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number, errors
    assert f"stopped by {number.name}" in errors
    assert results.status(Path("stopped")) == "stopped"
    state = read_checkpoint(Path("stopped/checkpoint.pt"))
    assert state["epoch"] < 12
    assert len(state["history"]) == len(results.load_history("stopped")) == state["epoch"]
    again = [*bindings, "-b", "training_loop.reload=True"]
    assert main("train", "stopped", small, *again) == 0
    assert_same_run("whole", "stopped")


@pytest.mark.slow
def test_a_killed_run_is_dead_and_goes_on_exactly(small, start, main):
    bindings = ("-b", "training_loop.batch_size=10;training_loop.n_epochs=8")
    assert main("train", "whole", small, *bindings) == 0
    process = start("killed", small, *bindings)
    wait_for(lambda: Path("killed/history.csv").exists(), process)
    assert results.status(Path("killed")) == "running"
    assert main("train", "killed", small, *bindings, "-b", "training_loop.reload=True") == 2
    process.kill()
    process.communicate(timeout=30)
    assert results.status(Path("killed")) == "dead"
    assert main("train", "killed", small, *bindings, "-b", "training_loop.reload=True") == 0
    assert_same_run("whole", "killed")


def wait_for(condition, process, seconds=60):
    began = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < seconds
        time.sleep(0.01)


def test_reload_starts_where_nothing_is_committed_and_completes_what_is_finished(small, main):
    reload = ("-b", "training_loop.reload=True;training_loop.n_epochs=1")
    Path("empty").mkdir()
    assert main("train", "empty", small, *reload) == 0
    assert main("train", "missing", small, *reload) == 0
    assert_same_run("empty", "missing")
    before = Path("empty/eval_results.json").read_text()
    for name in ("eval_results.json", "history.csv", "best.pt", "FINISHED"):
        Path("empty", name).unlink()
    assert main("train", "empty", small, *reload) == 0
    assert Path("empty/eval_results.json").read_text() == before
    assert_same_run("empty", "missing")
    assert Path("empty/FINISHED").exists()


def test_an_early_stopped_run_stays_stopped(small, main):
    stop = "training_loop.callbacks=[@EarlyStopping];EarlyStopping.patience=1;SGD.lr=0.0"
    assert main("train", "a", small, "-b", stop, "-b", "training_loop.n_epochs=9") == 0
    assert len(results.load_history("a")) == 2
    more = "training_loop.n_epochs=20;training_loop.reload=True"
    assert main("train", "a", small, "-b", stop, "-b", more) == 0
    assert len(results.load_history("a")) == 2


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_taken(small, main, capfd):
    assert main("train", "whole", small) == 0
    assert main("train", "a", small) == 0
    path = Path("a/checkpoint.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = ("-b", "training_loop.reload=True")
    Path("a/eval_results.json").unlink()
    assert main("train", "a", small, *again) == 0
    assert "checkpoint.pt: is damaged" in read_meta(Path("a"))["warnings"][0]
    assert_same_run("whole", "a")
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        Path("a", name).write_bytes(b"short")
    capfd.readouterr()
    assert main("train", "a", small, *again) == 2
    assert "best.pt holds the best weights" in capfd.readouterr().err


def test_a_non_finite_loss_stops_the_run_and_says_where(small, main, capfd):
    wild = ("-b", "SGD.lr=1e12;training_loop.n_epochs=5")
    assert main("train", "a", small, *wild) == 1
    message = capfd.readouterr().err
    assert re.search(r"the (loss is (nan|inf)|weights are no longer finite) at epoch \d", message)
    assert results.status(Path("a")) == "failed"
    if Path("a/checkpoint.pt").exists():
        network = read_checkpoint(Path("a/checkpoint.pt"))["network"]
        assert all(w.isfinite().all() for w in network.values())


def test_a_crash_keeps_its_traceback_and_all_that_was_printed(small, train, tmp_path):
    (tmp_path / "crash.py").write_text(
        "import ctypes, os, gin\nfrom poutyne import Callback\n\n\n@gin.register\n"
        "class Crash(Callback):\n    stateless = True\n    def on_epoch_end(self, epoch, logs):\n"
        "        print('by python')\n        os.write(1, b'by descriptor\\n')\n"
        "        os.system('echo by a child >&2')\n        ctypes.CDLL(None).puts(b'by C')\n"
        "        if epoch == 2:\n            raise KeyError('the bug')\n"
    )
    Path("crash.gin").write_text(SMALL + "import crash\ntraining_loop.callbacks = [@Crash]\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = train("a", "crash.gin", env=environment)
    assert done.returncode == 1
    written = Path("a/stdout.txt").read_text()
    for line in ("by python", "by descriptor", "by C"):
        assert written.count(line) == 2, line
    errors = Path("a/stderr.txt").read_text()
    assert errors.count("by a child") == 2
    assert "Traceback" in errors and "KeyError: 'the bug'" in errors
    assert done.stdout == written and done.stderr == errors
    assert results.status(Path("a")) == "failed"
    assert len(results.load_history("a")) == 1


def test_init_from_starts_a_new_run_from_the_best_weights(small, main, capfd):
    assert main("train", "a", small) == 0
    still = ("-b", "SGD.lr=0.0;training_loop.n_epochs=1;training_loop.init_from='a';training_loop.seed=1")
    assert main("train", "b", small, *still) == 0
    best, after = (read_checkpoint(Path(run, "best.pt"))["network"] for run in "ab")
    moved = {name for name in best if not best[name].equal(after[name])}
    assert moved and all("running_" in name or "num_batches" in name for name in moved)  # by batch norm
    assert read_meta(Path("b"))["init_from"]["run"] == "a"
    assert len(read_meta(Path("b"))["init_from"]["sha256"]) == 64
    assert main("train", "c", small, *still, "-b", "training_loop.ema_decay=0.9") == 0  # the average begins there, too
    average = read_checkpoint(Path("c/best.pt"))["network"]
    assert all(average[name].allclose(best[name]) for name in best.keys() - moved)


@pytest.mark.parametrize("mode, best", [("min", min), ("max", max)])
def test_the_best_epoch_is_that_of_the_monitor(small, main, mode, best):
    settings = f"training_loop.monitor='val_acc';training_loop.monitor_mode='{mode}'"
    assert main("train", "a", small, "-b", settings) == 0
    rows = results.load_history("a")
    assert rows[0]["val_acc"] < rows[1]["val_acc"]
    expected = best(rows, key=lambda row: row["val_acc"])["epoch"]
    assert read_checkpoint(Path("a/best.pt"))["epoch"] == expected == results.overview(Path("a"))["best"]["epoch"]


def test_debug_settings_and_other_metrics(small, main):
    more = (
        "training_loop.steps_per_epoch=2;training_loop.detect_anomaly=True;"
        "training_loop.metrics=[@Accuracy,@top3/torchmetrics.Accuracy,@torchmetrics.F1Score];"
        "torchmetrics.Accuracy.task='multiclass';top3/torchmetrics.Accuracy.top_k=3;"
        "torchmetrics.F1Score.task='multiclass';torchmetrics.F1Score.average='macro';"
        "training_loop.monitor='val_f1_score'"
    )
    assert main("train", "a", small, "-b", more) == 0
    assert torch.is_anomaly_enabled()
    torch.autograd.set_detect_anomaly(False)
    row = results.load_history("a")[-1]
    assert {"acc", "top3", "f1_score", "val_acc", "val_top3", "val_f1_score"} <= row.keys()
    assert row["val_top3"] >= row["val_acc"] / 100
    test = json.loads(Path("a/eval_results.json").read_text())
    assert set(test) == {"split", "n", "epoch", "loss", "acc", "top3", "f1_score"}


def test_accuracy_of_targets_that_are_numbers_is_refused(small, main, capfd, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    Path("numbers_of.py").write_text(
        "import gin\nfrom src.data import digits\n\n\n@gin.register\ndef numbers_of():\n    data = digits()\n"
        "    for split in (data.train, data.valid, data.test):\n"
        "        split.y = split.y[:, None].float().expand(-1, 10)\n"
        "    return data\n"
    )
    Path("b.gin").write_text("import numbers_of\ntraining_loop.data = @numbers_of\ntraining_loop.loss = @MSELoss\n")
    assert main("train", "run", small, "b.gin") == 2
    assert "Accuracy needs classes, but the targets are numbers" in capfd.readouterr().err
    more = "training_loop.metrics=[];training_loop.monitor='val_loss';training_loop.monitor_mode='min'"
    assert main("train", "run", small, "b.gin", "-b", more) == 0
    assert main("evaluate", "run", "--predictions", "p.csv") == 0
    header, first, *_ = Path("p.csv").read_text().splitlines()
    assert header.startswith("index,target_0,") and header.endswith(",prediction_9") and len(first.split(",")) == 21
