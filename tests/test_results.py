"""Reading runs back: bin/evaluate.py, bin/runs.py, load_model and the rest of results.py."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from src import config, results
from src.config import ROOT, Refused
from src.run import read_meta
from tests.awkward import EXAMPLE, FILES, awkward
from tests.test_train import SMALL


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two finished runs, a and b, of other shapes."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.gin").write_text(SMALL)
    for name, bindings in {"a": "SGD.lr=0.05", "b": "SimpleCNN.n_filters=[4];training_loop.seed=1"}.items():
        command = [sys.executable, ROOT / "bin/train.py", folder / name, folder / "small.gin", "-b", bindings]
        subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """A copy of them in the current folder: a run may be copied to another place."""
    shutil.copytree(trained, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def test_evaluate_gives_what_the_run_wrote(runs, main, capfd):
    assert main("evaluate", "runs/a", "--json") == 0
    test = json.loads(capfd.readouterr().out)
    written = json.loads((runs / "a/eval_results.json").read_text())
    assert {key: test[key] for key in written} == written
    assert main("evaluate", "runs/a", "--split", "valid", "--json") == 0
    valid = json.loads(capfd.readouterr().out)
    best = results.load_history("runs/a")[valid["epoch"] - 1]
    assert (valid["acc"], valid["loss"]) == (best["val_acc"], best["val_loss"])
    assert main("evaluate", "runs/a") == 0
    assert "acc" in capfd.readouterr().out


def test_predictions_are_a_row_an_image(runs, main):
    assert main("evaluate", "runs/a", "--predictions", "p.csv") == 0
    with open("p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "label", "prediction", "probability"]
    assert [int(row["index"]) for row in rows] == list(range(359))
    right = sum(row["label"] == row["prediction"] for row in rows)
    written = json.loads((runs / "a/eval_results.json").read_text())
    assert 100 * right / 359 == pytest.approx(written["acc"], abs=1e-4)
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)


def test_evaluate_refuses_what_is_no_run_and_other_data(runs, main, capfd):
    assert main("evaluate", "nowhere") == 2
    assert "evaluate.py: nowhere/best.pt: is missing" in capfd.readouterr().err
    meta = json.loads((runs / "a/meta.json").read_text())
    meta["data"]["fingerprint"] = "0" * 64
    (runs / "a/meta.json").write_text(json.dumps(meta))
    assert main("evaluate", "runs/a") == 2
    assert "the data here is not the run's" in capfd.readouterr().err
    (runs / "b/best.pt").unlink()
    assert main("evaluate", "runs/b") == 2
    assert "runs/b/best.pt: is missing" in capfd.readouterr().err


def test_runs_lists_all_and_says_what_is_damaged(runs, main, capfd):
    (runs / "broken").mkdir()
    (runs / "broken/meta.json").write_text("{")
    assert main("runs", "runs") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "status", "data", "model", "epochs", "best", "test", "time"]
    assert lines[1].split()[:7] == ["runs/a", "finished", "digits", "SimpleCNN", "2", "val_acc", lines[1].split()[6]]
    assert "unreadable: meta.json: Expecting property name" in lines[3]
    assert main("runs", "runs", "--json") == 0
    rows = json.loads(capfd.readouterr().out)
    assert [Path(row["run"]).name for row in rows] == ["a", "b", "broken"]
    assert rows[0]["epochs"] == 2 and rows[0]["test"]["n"] == 359
    assert main("runs", "nowhere") == 2


def test_prune_lists_and_deletes_checkpoints_of_finished_runs(runs, main, capfd):
    (runs / "b/FINISHED").unlink()
    assert main("runs", "runs", "--prune") == 0
    listed = capfd.readouterr().out
    assert "would delete, with --yes, runs/a/checkpoint.pt" in listed and "runs/b" not in listed
    assert (runs / "a/checkpoint.pt").exists()
    assert main("runs", "runs", "--prune", "--yes") == 0
    left = {f.name for f in (runs / "a").iterdir()}
    assert "best.pt" in left and not {"checkpoint.pt", "checkpoint.prev.pt"} & left
    assert (runs / "b/checkpoint.pt").exists()
    assert main("evaluate", "runs/a") == 0
    folder = [f for f in sorted((runs / "a").iterdir()) if f.name != "HEARTBEAT"]  # it is the lock, touched by each
    before = [(f.name, f.stat().st_mtime_ns) for f in folder]
    reload = "training_loop.reload=True"
    assert main("train", "runs/a", "runs/small.gin", "-b", reload) == 0  # nothing is left to do
    assert main("train", "runs/a", "runs/small.gin", "-b", f"{reload};training_loop.n_epochs=9") == 2
    assert "checkpoints were deleted" in capfd.readouterr().err
    assert [(f.name, f.stat().st_mtime_ns) for f in folder] == before
    assert [f for f in sorted((runs / "a").iterdir()) if f.name != "HEARTBEAT"] == folder


def test_an_early_stopped_run_stays_as_it_is_pruned_or_not(runs, main, capfd):
    still = "training_loop.callbacks=[@EarlyStopping];EarlyStopping.patience=1;SGD.lr=0.0;training_loop.reload=True"
    own = ("train", "runs/c", "runs/small.gin", "-b", still)
    assert main(*own, "-b", "training_loop.n_epochs=9") == 0
    assert len(results.load_history("runs/c")) == 2
    for pruned in (False, True):
        if pruned:
            assert main("runs", "runs", "--prune", "--yes") == 0
            assert not (runs / "c/checkpoint.pt").exists()
        assert main(*own, "-b", "training_loop.n_epochs=9") == 0
        assert results.status(runs / "c") == "finished"
        assert len(results.load_history("runs/c")) == 2
    assert main(*own, "-b", "training_loop.n_epochs=10") == 2
    assert "checkpoints were deleted" in capfd.readouterr().err


def test_what_prune_may_not_delete_is_said(runs, main, capfd):
    (runs / "a/checkpoint.pt").unlink()
    (runs / "a/checkpoint.pt").mkdir()
    assert main("runs", "runs", "--prune", "--yes") == 2
    assert "runs.py: [Errno " in capfd.readouterr().err


def test_prune_leaves_damaged_runs(runs, main, capfd):
    (runs / "a/meta.json").write_text("[]")
    (runs / "b/checkpoint.pt").unlink()
    (runs / "b/checkpoint.prev.pt").unlink()
    assert main("runs", "runs", "--prune", "--yes") == 0
    assert capfd.readouterr().out == ""
    assert (runs / "a/checkpoint.pt").exists()


HOLD = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX); print(); input()"


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Another process has the run's lock, as the one that trains it has."""
    command = [sys.executable, "-c", HOLD, run / "HEARTBEAT"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield
        process.stdin.close()


def test_what_a_process_holds_is_not_pruned(runs, main, capfd):
    with held(runs / "a"):
        assert main("runs", "runs", "--prune", "--yes") == 0
    deleted = capfd.readouterr().out
    assert (runs / "a/checkpoint.pt").exists() and "runs/a" not in deleted
    assert not (runs / "b/checkpoint.pt").exists() and "deleted runs/b" in deleted


@pytest.mark.parametrize("minutes, status", [(9, "running"), (11, "stalled")])
def test_a_run_without_a_step_for_ten_minutes_is_stalled(runs, minutes, status):
    then = time.time() - 60 * minutes
    os.utime(runs / "a/HEARTBEAT", (then, then))
    with held(runs / "a"):
        assert results.overview(runs / "a")["status"] == status
    (runs / "a/FINISHED").unlink()
    meta = read_meta(runs / "a") | {"status": "running"}
    (runs / "a/meta.json").write_text(json.dumps(meta))
    with held(runs / "a"):
        assert results.overview(runs / "a")["status"] == status
    assert results.overview(runs / "a")["status"] == "dead"


def test_collect_gives_a_row_a_run(runs):
    frame = results.collect("runs")
    # What the runs were given, and nothing else, is told apart.
    assert list(frame.columns[:6]) == ["run", "status", "problem", "training_loop.seed", "SimpleCNN.n_filters", "data"]
    assert frame["SimpleCNN.n_filters"].tolist() == [[8, 8], [4]]
    assert frame["training_loop.seed"].tolist() == [0, 1]
    assert frame["epochs"].tolist() == [2, 2] and frame["problem"].tolist() == ["", ""]
    for _, row in frame.iterrows():
        history = results.load_history(row["run"])
        assert (row["last_loss"], row["last_val_loss"]) == (history[-1]["loss"], history[-1]["val_loss"])
        best = max(history, key=lambda epoch: epoch["val_acc"])
        assert (row["best_epoch"], row["best_val_acc"]) == (best["epoch"], best["val_acc"])
        assert row["test_acc"] == json.loads((Path(row["run"]) / "eval_results.json").read_text())["acc"]
    assert results.collect(runs / "a/configs").columns[0] == "run"  # none: a frame without rows
    with pytest.raises(Refused, match="no such folder"):
        results.collect("nowhere")


def test_the_best_epoch_is_the_monitors(tmp_path):
    for mode, epoch in {"min": 1, "max": 2}.items():
        shutil.copytree(EXAMPLE, tmp_path / mode)
        meta = read_meta(EXAMPLE) | {"monitor": "val_acc", "monitor_mode": mode}
        (tmp_path / mode / "meta.json").write_text(json.dumps(meta))
        (row,) = results.collect(tmp_path / mode).to_dict("records")
        history = results.load_history(EXAMPLE)
        assert row["best_epoch"] == epoch and row["best_val_loss"] == history[epoch - 1]["val_loss"]


def test_a_setting_that_a_run_lacks_differs(tmp_path):
    for name, line in {"a": "", "b": "digits.flip = True\n", "c": "digits.flip = @SGD\n"}.items():
        shutil.copytree(EXAMPLE, tmp_path / name)
        with open(tmp_path / name / "config.gin", "a") as file:
            file.write(line)
    (tmp_path / "c/meta.json").write_text("{}")  # what cannot be read makes no setting differ
    frame = results.collect(tmp_path)
    assert list(frame.columns[:5]) == ["run", "status", "problem", "digits.flip", "data"]
    assert frame["digits.flip"].isna().tolist() == [True, False, True] and frame["digits.flip"][1] is True
    assert frame["epochs"].isna().tolist() == [False, False, True]


def test_settings_are_read_as_gin_reads_them(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "run")
    for more in ("", "a.b = 'x = 3; y'\n", "a.b = {'c': [-1.5, (@SGD,)]}\n"):
        with open(tmp_path / "run/config.gin", "a") as file:
            file.write(more)
        read = config.read([str(tmp_path / "run/config.gin")]).bindings
        assert results.load_config(tmp_path / "run") == {key: repr(value) for key, (value, _) in read.items()}


def refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def test_awkward_folders_are_all_listed_with_what_is_wrong(tmp_path, main, capfd):
    expected = {str(tmp_path / "runs" / name): said for name, said in awkward(tmp_path / "runs").items()}
    assert len(expected) >= 30
    frame = results.collect(tmp_path / "runs")
    assert main("runs", tmp_path / "runs", "--json") == 0
    rows = json.loads(capfd.readouterr().out, parse_constant=refuse_constant)
    assert sorted(frame["run"]) == sorted(row["run"] for row in rows) == sorted(expected)
    for row in (*frame.to_dict("records"), *rows):
        status, problem = expected[row["run"]]
        assert row["status"] == status and problem in row["problem"], row
        assert bool(row["problem"]) == bool(problem) and "\n" not in row["problem"] and len(row["problem"]) <= 160, row

    assert main("runs", tmp_path / "runs") == 0
    out, err = capfd.readouterr()
    assert err == "" and "Traceback" not in out
    lines = {line.split("  ")[0]: line for line in out.splitlines()[1:]}
    assert len(lines) == len(out.splitlines()) - 1 == len(expected)
    for run, (status, problem) in expected.items():
        line = lines[run.replace("\n", "\\n").replace("\udcff", "\\udcff")]
        assert f"  {status}" in line and problem in line, line

    found = frame.set_index(frame["run"].map(lambda run: Path(run).name))
    assert found["epochs"]["history huge"] == 20_000 and math.isnan(found["epochs"]["meta cut"])
    assert found["best_epoch"]["monitor NaN at last"] == 1 and math.isnan(found["best_epoch"]["monitor always NaN"])
    assert math.isnan(found["last_loss"]["loss NaN"])
    assert main("runs", tmp_path / "runs", "--prune") == 0


@pytest.mark.alone
def test_a_thousand_runs_are_read_at_once(tmp_path):
    contents = {name: (EXAMPLE / name).read_bytes() for name in FILES}
    for k in range(1000):
        (tmp_path / f"run{k:03}").mkdir()
        for name, content in contents.items():
            content = content.replace(b"loop.seed = 0", b"loop.seed = %d" % k) if name == "config.gin" else content
            (tmp_path / f"run{k:03}" / name).write_bytes(content)
    began = time.perf_counter()
    frame = results.collect(tmp_path)
    assert time.perf_counter() - began < 4  # 0.5 to 1 s; by gin's parser alone, 3 s
    assert frame["training_loop.seed"].tolist() == list(range(1000))


def test_mean_and_interval():
    mean, deviation, half, n = results.mean_interval([96.0, 97.0, 95.0, 98.0, 99.0])
    assert (mean, n) == (97, 5) and deviation == pytest.approx(math.sqrt(2.5))
    assert half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)  # t of 4 degrees of freedom, from a table
    mean, deviation, half, n = results.mean_interval([3])
    assert (mean, n) == (3, 1) and math.isnan(deviation) and math.isnan(half)
    assert results.mean_interval([])[3] == 0
    for strange in (math.nan, math.inf):
        with pytest.raises(AssertionError, match="list NaN and infinities apart"):
            results.mean_interval([1.0, strange])


def test_welch():
    # Equal sizes and spreads: Student's with 4 degrees of freedom, whose p has a closed form.
    assert results.welch([1, 2, 3], [3, 4, 5]) == pytest.approx(1 - 1.2 * math.sqrt(0.6))
    # Others: t = -2.31201 with 10.736 degrees of freedom; Student's would be 0.0458.
    a, b = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9], [27.1, 22.0, 20.8, 23.4, 33.4, 35.0, 28.0]
    assert results.welch(a, b) == pytest.approx(0.0416931, rel=1e-5)
    assert results.welch([1, 2], [3, 4, 5]) is None and results.welch([], []) is None
    assert results.welch([1, 1, 1], [1, 1, 1]) is None
    with pytest.raises(AssertionError, match="list NaN and infinities apart"):
        results.welch([1, 2, math.nan], [1, 2, 3])


def test_columns_of_times_are_the_same_everywhere():
    from src.callbacks.progress import NOT_METRICS

    assert results.TIMES | {"epoch", "lr"} == set(NOT_METRICS)


def test_models_of_two_runs_stand_side_by_side(runs):
    state = torch.get_rng_state()
    a, b = results.load_model("runs/a"), results.load_model("runs/b", weights="last")
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.rand(3, 1, 8, 8)
    first = a(x)
    assert b(x).shape == first.shape == (3, 10)
    assert not a.training and not b.training
    assert len(list(a.features)) == 8 and len(list(b.features)) == 4
    assert torch.equal(results.load_model("runs/a")(x), first)


def test_reading_runs_needs_no_torch(runs):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from src import results\n"
        "run, = results.find_runs('runs/a')\n"
        "assert results.load_config(run)['SGD.lr'] == '0.05'\n"
        "assert results.load_history(run)[1]['epoch'] == 2\n"
        "assert results.overview(run)['status'] == 'finished'\n"
        "assert results.collect('runs').status.tolist() == ['finished', 'finished']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_run_is_what_a_run_is(runs, capfd):
    example = ROOT / "results/example_run"
    fresh = runs / "a"
    pruned = {"checkpoint.pt", "checkpoint.prev.pt"}

    def names(run: Path) -> set[str]:
        return {"events" if "tfevents" in f.name else f.name for f in run.iterdir()}

    assert names(example) | pruned == names(fresh)
    assert results.load_history(example)[0].keys() == results.load_history(fresh)[0].keys()
    assert read_meta(example).keys() == read_meta(fresh).keys()
    assert read_meta(example)["starts"][0].keys() == read_meta(fresh)["starts"][0].keys()
    assert results.overview(example)["status"] == "finished"
    assert sum(f.stat().st_size for f in example.rglob("*") if f.is_file()) < 1e6
    for file in example.rglob("*"):
        if file.suffix in (".sh", ".gin", ".txt", ".json", ".csv"):
            assert not re.search(r"(?<![\w.)\"'/])/(home|root|work|tmp|Users)/", file.read_text()), file
