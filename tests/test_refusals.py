"""Bad input: one clear message on stderr, exit 2, and nothing created or changed."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import refusal_of_unprivileged

HELPERS = """
from dataclasses import replace

import gin
import torch
from torch import nn
from src.data import digits
from src.data.dataset import divide


@gin.register(denylist=["input_shape", "n_classes"])
class TooFew(nn.Sequential):
    def __init__(self, input_shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, n_classes - 1))


@gin.register
class FiveByFive(nn.Sequential):
    def __init__(self, n_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(25, n_classes))


@gin.register(denylist=["input_shape", "n_classes"])
class Two(nn.Linear):
    def __init__(self, input_shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__(8, 10)

    def forward(self, x):
        return x, x


@gin.register
def numbers():
    data = digits()
    splits = [replace(split, y=split.y.float()) for split in (data.train, data.valid, data.test)]
    return replace(data, **dict(zip(("train", "valid", "test"), splits)), n_classes=1)


@gin.register
def no_test():
    data = digits()
    rows = [torch.arange(1000), torch.arange(9), torch.arange(0)]
    return divide("few", data.train, rows, n_classes=10)
"""


def contents(folder: Path) -> dict[str, str]:
    return {
        str(f): hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else "folder"
        for f in sorted(folder.rglob("*"))
        if "__pycache__" not in f.parts
    }


@pytest.fixture
def place(small, tmp_path, monkeypatch):
    """A folder with a config, a file, foreign files and an empty and a folder-like config."""
    monkeypatch.syspath_prepend(tmp_path)
    Path("empty.gin").write_text("")
    Path("helpers.gin").write_text("import too_few")
    Path("too_few.py").write_text(HELPERS)
    Path("file").write_text("precious")
    Path("foreign").mkdir()
    Path("foreign/thesis.tex").write_text("precious")
    return tmp_path


REFUSED = {
    "no config": ("run no.gin", "no.gin: no such config"),
    "setting as config": ("run small.gin SGD.lr=1", "SGD.lr=1: no such config (settings come after -b)"),
    "folder as config": ("run foreign", "foreign: Is a directory"),
    "empty config": ("run empty.gin", "empty.gin: is empty"),
    "file as run": ("file small.gin", "file: is a file"),
    "file above run": ("file/run small.gin", "file/run: file cannot be written to"),
    "foreign files": ("foreign small.gin", "foreign: holds files that are no run's (thesis.tex)"),
    "open quote": ("run small.gin -b SGD.lr='", "an unclosed bracket or quote"),
    "no epoch": ("run small.gin -b training_loop.n_epochs=0", "n_epochs = 0"),
    "less": ("run small.gin -b training_loop.n_epochs=-1", "must be at least 1"),
    "large batch": (
        "run small.gin -b training_loop.batch_size=1080",
        "digits has 1079 images to train on: give 1 to 1079",
    ),
    "monitor": ("run small.gin -b training_loop.monitor='val_ac'", "did you mean val_acc?"),
    "callback's monitor": (
        "run small.gin -b training_loop.callbacks=[@EarlyStopping];EarlyStopping.monitor='x'",
        "EarlyStopping.monitor = 'x' is no metric",
    ),
    "callback": ("run small.gin -b training_loop.callbacks=[@Early]", "named Early"),
    "model": ("run small.gin -b training_loop.model=@SimpleCN", "did you mean SimpleCNN?"),
    "data": ("run small.gin -b training_loop.data=@digit", "did you mean digits?"),
    "too few outputs": (
        "run small.gin helpers.gin -b training_loop.model=@TooFew",
        "TooFew gives an output of shape [100, 9], but it must be [100, 10]",
    ),
    "model of other images": (
        "run small.gin -b training_loop.model=@torchvision.models.squeezenet1_1",
        "squeezenet1_1 takes images [3, H, W], not data of shape (1, 8, 8)",
    ),
    "two outputs": (
        "run small.gin helpers.gin -b training_loop.model=@Two",
        "Two gives a tuple, but it must be one tensor",
    ),
    "no test split": (
        "run small.gin helpers.gin -b training_loop.data=@no_test",
        "few: n_test is 0: let each split have some",
    ),
    "targets of another shape": (
        "run small.gin helpers.gin -b training_loop.data=@numbers;training_loop.loss=@MSELoss;training_loop.metrics=[];"
        "training_loop.monitor='val_loss'",
        "SimpleCNN gives an output of shape [100, 1] for targets of shape [100]",
    ),
    "a loss of several numbers": (
        "run small.gin -b CrossEntropyLoss.reduction='none'",
        "the loss or a metric does not take SimpleCNN's output: the loss gives 100 numbers, not one",
    ),
    "a part of another kind": (
        "run small.gin -b training_loop.callbacks=[@Accuracy]",
        "Accuracy: gives a Accuracy, but here it must be a Callback",
    ),
    "no data": ("run small.gin -b training_loop.data=@CrossEntropyLoss", "here it must be a Data"),
    "for sparse gradients": ("run small.gin -b training_loop.optimizer=@SparseAdam", "nothing is named SparseAdam"),
    "no training images": (
        "run small.gin -b digits.n_train=0",
        "train.py: n_train = 0, but there are 1079 images: give 1 to 1079, or None\n",
    ),
    "a metric of several numbers": (
        "run small.gin -b training_loop.metrics=[@Accuracy,@torchmetrics.ROC];torchmetrics.ROC.task='multiclass'",
        "a metric does not take SimpleCNN's output",
    ),
    "input too small": (
        "run small.gin helpers.gin -b training_loop.model=@FiveByFive",
        "FiveByFive does not take a batch of shape [100, 1, 8, 8]: ",
    ),
    "loss": (
        "run small.gin -b training_loop.loss=@PoissonNLLLoss",
        "the loss or a metric does not take SimpleCNN's output",
    ),
    "init without run": ("run small.gin -b training_loop.init_from='no'", "there is no no/best.pt"),
    "device": ("run small.gin -b training_loop.device='tpu9'", "device = 'tpu9'"),
    "n_train": ("run small.gin -b digits.n_train=2000", "n_train = 2000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_message_and_nothing_created(place, main, capfd, case):
    arguments, message = REFUSED[case]
    before = contents(place)
    assert main("train", *arguments.split(" ")) == 2
    errors = capfd.readouterr().err
    assert message in errors
    lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    assert lines[0].startswith("train.py: ") and "Traceback" not in errors
    assert contents(place) == before


def test_a_folder_that_holds_a_run_is_refused_and_not_touched(place, main, capfd):
    assert main("train", "run", "small.gin", "-b", "training_loop.n_epochs=1") == 0
    before = contents(place)
    reload = "training_loop.n_epochs=3;training_loop.reload=True"
    refusals = {
        "training_loop.n_epochs=3": 'continue it with -b "training_loop.reload=True"',
        f"{reload};SGD.lr=0.5": "  SGD.lr: 0.05 -> 0.5",
        f"{reload};SimpleCNN.n_dense=8": "  SimpleCNN.n_dense: 16 -> 8",
        f"{reload};training_loop.seed=1": "  training_loop.seed: 0 -> 1",
        f"{reload};digits.n_train=500": "data: digits (fingerprint ",
        f"{reload};training_loop.optimizer=@Adam": "training_loop.optimizer: @SGD -> @Adam",
    }
    for bindings, message in refusals.items():
        capfd.readouterr()
        unused = "Adam" in bindings  # SGD.lr of the file is then used by nothing
        assert main("train", "run", "small.gin", "-b", bindings) == 2
        errors = capfd.readouterr().err
        assert message in errors, bindings
        assert unused or "warning" not in errors
        assert contents(place) == before, bindings
    other = ("other", "small.gin", "-b", "SimpleCNN.n_dense=8;training_loop.init_from='run'")
    assert main("train", *other) == 2
    errors = capfd.readouterr().err
    assert "size mismatch for classifier.1.weight" in errors and "[16, 32]" in errors and "[8, 32]" in errors
    assert contents(place) == before


def test_a_folder_that_may_not_be_written_to_is_refused(place):
    Path("closed").mkdir(mode=0o555)
    assert "closed cannot be written to" in refusal_of_unprivileged("closed/run", "small.gin")
    assert not list(Path("closed").iterdir())


def test_the_exit_codes_of_the_real_command(place, train):
    done = train("run", "small.gin", "-b", "training_loop.model=@SimpleCN")
    assert done.returncode == 2 and not Path("run").exists()
    assert done.stderr.startswith("train.py: -b 'training_loop.model=@SimpleCN': nothing is named")
    assert done.stdout == ""
    assert train("run").returncode == 2
    done = train("--help")
    assert done.returncode == 0 and "bin/train.py results/first configs/cnn.gin" in done.stdout


def test_refusals_of_text_need_no_torch(place, train):
    code = (
        "import sys, runpy\n"
        "sys.modules['torch'] = None\n"
        f"sys.argv = ['bin/train.py', 'run', 'no.gin']\n"
        f"runpy.run_path({str(Path(__file__).parents[1] / 'bin/train.py')!r}, "
        "run_name='__main__')\n"
    )
    Path("script.py").write_text(code)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "train.py: no.gin: no such config\n")
