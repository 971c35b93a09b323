"""Reading runs back: bin/evaluate.py, bin/runs.py, load_model and the rest of results.py."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import gin
import pytest
import torch

from src import results
from src.config import ROOT, Refused
from src.run import read_meta
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
    assert "is no run's folder" in capfd.readouterr().err
    meta = json.loads((runs / "a/meta.json").read_text())
    meta["data"]["fingerprint"] = "0" * 64
    (runs / "a/meta.json").write_text(json.dumps(meta))
    assert main("evaluate", "runs/a") == 2
    assert "the data here is not the run's" in capfd.readouterr().err
    (runs / "b/best.pt").unlink()
    assert main("evaluate", "runs/b") == 2
    assert "has no best.pt yet" in capfd.readouterr().err


def test_runs_lists_all_and_says_what_is_damaged(runs, main, capfd):
    (runs / "broken").mkdir()
    (runs / "broken/meta.json").write_text("{")
    assert main("runs", "runs") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "status", "data", "model", "epochs", "best", "test", "time"]
    assert lines[1].split()[:7] == ["runs/a", "finished", "digits", "SimpleCNN", "2", "val_acc", lines[1].split()[6]]
    assert "unreadable: JSONDecodeError" in lines[3]
    assert main("runs", "runs", "--json") == 0
    rows = json.loads(capfd.readouterr().out)
    assert [Path(row["run"]).name for row in rows] == ["a", "b", "broken"]
    assert rows[0]["epochs"] == 2 and rows[0]["test"]["n"] == 359
    assert main("runs", "nowhere") == 2


def test_prune_lists_and_deletes_checkpoints_of_finished_runs(runs, main, capfd):
    (runs / "b/FINISHED").unlink()
    assert main("runs", "runs", "--prune") == 0
    listed = capfd.readouterr().out
    assert "would delete runs/a/checkpoint.pt" in listed and "runs/b" not in listed
    assert (runs / "a/checkpoint.pt").exists()
    assert main("runs", "runs", "--prune", "--yes") == 0
    left = {f.name for f in (runs / "a").iterdir()}
    assert "best.pt" in left and not {"checkpoint.pt", "checkpoint.prev.pt"} & left
    assert (runs / "b/checkpoint.pt").exists()
    assert main("evaluate", "runs/a") == 0
    before = sorted((f.name, f.stat().st_mtime_ns) for f in (runs / "a").iterdir())
    reload = "training_loop.reload=True"
    assert main("train", "runs/a", "runs/small.gin", "-b", reload) == 0  # nothing is left to do
    assert main("train", "runs/a", "runs/small.gin", "-b", f"{reload};training_loop.n_epochs=9") == 2
    assert "checkpoints were deleted" in capfd.readouterr().err
    assert sorted((f.name, f.stat().st_mtime_ns) for f in (runs / "a").iterdir()) == before


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
    then = datetime.now(UTC) - timedelta(minutes=minutes)
    (runs / "a/HEARTBEAT").write_text(f"step 7 {then.isoformat(timespec='seconds')}\n")
    with held(runs / "a"):
        assert results.overview(runs / "a")["status"] == status
    (runs / "a/FINISHED").unlink()
    meta = read_meta(runs / "a") | {"status": "running"}
    (runs / "a/meta.json").write_text(json.dumps(meta))
    with held(runs / "a"):
        assert results.overview(runs / "a")["status"] == status
    assert results.overview(runs / "a")["status"] == "dead"


def test_models_of_two_runs_stand_side_by_side(runs):
    gin.clear_config()
    gin.parse_config("SimpleCNN.n_dense = 5")
    state = torch.get_rng_state()
    a, b = results.load_model("runs/a"), results.load_model("runs/b", weights="last")
    assert torch.equal(torch.get_rng_state(), state)
    assert gin.query_parameter("SimpleCNN.n_dense") == 5  # the notebook's own configuration
    gin.clear_config()
    x = torch.rand(3, 1, 8, 8)
    first = a(x)
    assert b(x).shape == first.shape == (3, 10)
    assert not a.training and not b.training
    assert len(list(a.features)) == 8 and len(list(b.features)) == 4
    assert torch.equal(results.load_model("runs/a")(x), first)
    with pytest.raises(Refused, match="'best' or 'last'"):
        results.load_model("runs/a", weights="worst")


def test_reading_runs_needs_no_torch(runs):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from src import results\n"
        "run, = results.find_runs('runs/a')\n"
        "assert results.load_config(run)['SGD.lr'] == '0.05'\n"
        "assert results.load_history(run)[1]['epoch'] == 2\n"
        "assert results.overview(run)['status'] == 'finished'\n"
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
