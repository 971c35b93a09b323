"""The shipped configs: nothing wrong in any, what they promise, and runs of those that are short."""

import json
import re
import shutil
from pathlib import Path

import pytest

from src import config, results
from src.config import ROOT
from src.data.dataset import data_dir
from src.training_loop import configure
from tests.cifar_archive import make_archive

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.gin"))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_config_raises_a_false_alarm(name):
    files = ["configs/cnn.gin", f"configs/{name}"] if name == "debug.gin" else [f"configs/{name}"]
    assert configure(config.read(files)).warnings == []
    assert configure(config.read([*files, "configs/debug.gin"])).warnings == []


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_opens_with_its_command_time_and_result(name):
    head = (ROOT / "configs" / name).read_text().split("\n\n")[0]
    assert re.search(rf"^#   bin/train\.py results/\w+ .*configs/{name}$", head, re.M)
    assert re.search(r"^# Time.*: .*\d", head, re.M) and re.search(r"^# Result.*: .", head, re.M)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's format in DATA_DIR; gives its checksum as a binding."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    data_dir().mkdir()
    return f"cifar10.md5='{make_archive(data_dir() / 'cifar-10-python.tar.gz', n_per_batch=100)}'"


@pytest.mark.slow
def test_debug_layered_on_each_config(cifar, main, capfd):
    for name in CONFIGS:
        first = "digits.gin" if name == "debug.gin" else name
        values = [value for value, _ in config.read([f"configs/{first}"]).bindings.values()]
        bindings = ("-b", cifar) if "@cifar10" in repr(values) else ()
        assert main("train", f"runs/{name}", f"configs/{first}", "configs/debug.gin", *bindings) == 0
        test = json.loads(Path("runs", name, "eval_results.json").read_text())
        assert len(results.load_history(f"runs/{name}")) == 1
        assert test["n"] <= 2 * 128
    assert "warning" not in capfd.readouterr().err


def test_cnn_takes_what_can_be_had_and_the_record_names_it(cifar, main, capfd):
    quick = ("configs/cnn.gin", "-b", "training_loop.steps_per_epoch=2")
    assert main("train", "online", *quick, "-b", cifar) == 0
    shutil.move(data_dir(), "kept")
    nowhere = ("-b", "cifar10.url='http://127.0.0.1:9/cifar.tar.gz'")
    assert main("train", "offline", *quick, *nowhere) == 0
    said = capfd.readouterr().err
    assert "TRAINING ON digits, NOT ON cifar10" in said and "127.0.0.1:9" in said
    for run, name in (("online", "cifar10"), ("offline", "digits")):
        assert results.load_config(run)["training_loop.data"] == f"@{name}"
        assert results.overview(Path(run))["data"] == name
    # The same run on other data is another run.
    more = ("-b", "training_loop.n_epochs=3;training_loop.reload=True")
    assert main("train", "online", *quick, *nowhere, *more) == 2
    message = capfd.readouterr().err
    assert "data: cifar10 (fingerprint" in message and "training_loop.data: @cifar10 -> @digits" in message
    # The other way round, the data can be had again.
    shutil.rmtree(data_dir(), ignore_errors=True)
    shutil.move("kept", data_dir())
    assert main("train", "offline", *quick, "-b", cifar, *more) == 2
    assert "training_loop.data: @digits -> @cifar10" in capfd.readouterr().err
    assert main("train", "offline", *quick, *more, "-b", "training_loop.data=@digits") == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_reaches_98_percent(tmp_path, monkeypatch, main, seed):
    monkeypatch.chdir(tmp_path)
    assert main("train", "run", "configs/digits.gin", "-b", f"training_loop.seed={seed}") == 0
    assert json.loads(Path("run/eval_results.json").read_text())["acc"] >= 98.0
    assert results.overview(Path("run"))["seconds"] < 60


def test_64_images_are_overfitted(tmp_path, monkeypatch, main):
    monkeypatch.chdir(tmp_path)
    few = "digits.n_train=64;digits.padding=0;training_loop.n_epochs=40;WarmupCosine.warmup_steps=1"
    assert main("train", "run", "configs/digits.gin", "-b", few) == 0
    assert results.load_history("run")[-1]["acc"] > 99
