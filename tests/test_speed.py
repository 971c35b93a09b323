"""Settings that make a step faster or other: what they compute, and that a run with them goes on exactly.

And what keeps a person or the device waiting: the start of a command, data that are read slowly, a look at a value.
"""

import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gin
import pytest
import torch
from torch import nn

from benchmarks.kill import run_difference
from src import results
from src.data.augment import cutout
from src.run import read_checkpoint
from src.training_loop import Trainer, build_optimizer
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("small")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
can_compile = torch.cuda.is_available() or shutil.which("g++")  # on the CPU, by the C++ compiler

# Data, or steps, that take 0.1 s a batch: over 1 s an epoch of the small config's.
SLOW = """
import time

import gin
from poutyne import Callback
from src.data import digits


def wait(x, draw):
    time.sleep(0.1)
    return x


@gin.register
def slow_digits():
    data = digits()
    data.train.augment = (wait,)
    return data


@gin.register
class SlowSteps(Callback):
    stateless = True

    def on_backward_end(self, batch_number):
        time.sleep(0.1)
"""
# From the third step on, a wait for the GPU is an error, but where the epoch's losses are read, after its last step.
NO_WAITS = """
import gin
import torch
from poutyne import Callback


@gin.register
class NoWaits(Callback):
    stateless = True

    def __init__(self, last: int, waits: bool = False) -> None:
        super().__init__()
        self.last, self.waits = last, waits

    def on_train_batch_begin(self, batch_number, logs):
        torch.cuda.set_sync_debug_mode("error" if 3 <= batch_number < self.last else "default")

    def on_backward_end(self, batch_number):
        if self.waits:
            torch.ones(1, device="cuda").item()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that gin files of the current folder can import."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(name: str, text: str) -> str:
        Path(f"{name}.py").write_text(text)
        Path(f"{name}.gin").write_text(f"import {name}\n")
        return f"{name}.gin"

    return write


def weights(run: str, file: str = "checkpoint.pt") -> dict[str, torch.Tensor]:
    return read_checkpoint(Path(run, file))["network"]


@pytest.mark.parametrize(
    "settings", ["ema_decay=0.9", "precision='bf16'", "clip_norm=0.5;training_loop.accumulate=3", "channels_last=False"]
)
def test_a_run_with_them_goes_on_exactly(main, settings):
    assert main("train", "whole", "small.gin", "-b", f"training_loop.{settings}") == 0
    first, last = results.load_history("whole")
    assert last["loss"] < first["loss"]
    assert main("train", "parts", "small.gin", "-b", f"training_loop.{settings};training_loop.stop_at=15") == 0
    assert main("train", "parts", "small.gin", "-b", f"training_loop.{settings};training_loop.reload=True") == 0
    assert run_difference(Path("whole"), Path("parts")) is None


def test_the_average_is_what_is_shown(main):
    assert main("train", "plain", "small.gin", "-b", "training_loop.n_epochs=1") == 0
    assert main("train", "now", "small.gin", "-b", "training_loop.n_epochs=1;training_loop.ema_decay=0.0") == 0
    assert main("train", "first", "small.gin", "-b", "training_loop.n_epochs=1;training_loop.ema_decay=1.0") == 0
    plain, now = (results.load_history(run)[0] for run in ("plain", "now"))
    assert plain["loss"] == now["loss"] and plain["val_loss"] == pytest.approx(now["val_loss"], rel=1e-5)
    name = "classifier.1.weight"
    assert torch.equal(weights("now", "best.pt")[name], weights("plain")[name])
    assert torch.equal(weights("first")[name], weights("plain")[name])
    assert not torch.equal(weights("first", "best.pt")[name], weights("plain")[name])


def test_the_average_forgets_the_random_weights_of_the_beginning():
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 100.0)
    loop = SimpleNamespace(ema_decay=0.999)
    trainer = SimpleNamespace(network=network, averaged=copy.deepcopy(network), loop=loop, n_averaged=0)
    nn.init.constant_(network.weight, 1.0)
    for _ in range(100):
        Trainer._average(trainer)
    assert trainer.averaged.weight.item() == pytest.approx(1, abs=1e-3)  # without a warm-up 90 would be left


def test_gradients_are_clipped_to_the_norm(main):
    one_step = "training_loop.n_epochs=1;training_loop.steps_per_epoch=1;SGD.lr=1.0;SGD.momentum=0.0"
    still = one_step.replace("lr=1.0", "lr=0.0")
    assert main("train", "start", "small.gin", "-b", still) == 0
    assert main("train", "clipped", "small.gin", "-b", f"{one_step};training_loop.clip_norm=0.01") == 0
    before, after = weights("start"), weights("clipped")
    moved = [(after[k] - before[k]).flatten() for k in before if "running" not in k and "num_" not in k]
    assert torch.cat(moved).norm() == pytest.approx(0.01, rel=1e-3)


def test_channels_last_computes_the_same(main):
    for run, last in (("a", True), ("b", False)):
        settings = f"training_loop.channels_last={last};training_loop.n_epochs=1;SimpleCNN.dropout=0.0"
        assert main("train", run, "small.gin", "-b", settings) == 0
    a, b = (results.load_history(run)[0] for run in "ab")
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


# Digits of three channels, and a network that says how it is given them.
WATCHED = """
import gin
import torch
from src.data.dataset import Split, divide, stratified_split
from src.data.digits import read
from src.models.simple_cnn import SimpleCNN


@gin.register
def colours():
    x, y = read()
    return divide("colours", Split(x.expand(-1, 3, -1, -1), y), stratified_split(y), n_classes=10)


@gin.register(denylist=["input_shape", "n_classes"])
class Watching(SimpleCNN):
    def forward(self, x):
        logits = super().forward(x)
        if torch.is_grad_enabled():
            print(logits.dtype, x.is_contiguous(memory_format=torch.channels_last))
        return logits
"""


@pytest.mark.parametrize("precision, kind", [("bf16", torch.bfloat16), ("fp64", torch.float64)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_precision_and_memory_format_reach_the_network(main, capfd, module, precision, kind, channels_last):
    settings = "training_loop.data=@colours;training_loop.model=@Watching;training_loop.n_epochs=1;"
    settings += f"training_loop.precision='{precision}';training_loop.channels_last={channels_last}"
    (Path("b.gin")).write_text("import watched\ntraining_loop.optimizer = @SGD\nSGD.lr = 0.01\n")
    module("watched", WATCHED)
    assert main("train", "a", "b.gin", "-b", settings) == 0
    assert capfd.readouterr().out.count(f"{kind} {channels_last}\n") == 9  # batches
    # evaluate computes as the training's validation did.
    val_loss = results.load_history("a")[-1]["val_loss"]
    assert results.evaluate("a", "valid")[0]["loss"] == pytest.approx(val_loss, rel=1e-12)


def test_the_optimizer_is_fused_unless_the_config_says_otherwise():
    from src import training_loop  # noqa: F401  (registers the optimizers)

    for bindings, fused, expected in (("", True, True), ("", False, None), ("SGD.foreach = True", True, None)):
        gin.clear_config()
        gin.parse_config(f"{bindings}\nroot/SGD.lr = 0.1")
        sgd = gin.get_configurable("torch.optim.SGD")
        optimizer = build_optimizer(sgd, [nn.Parameter(torch.zeros(2))], fused)
        assert optimizer.defaults["fused"] is expected
    lbfgs = torch.optim.Rprop  # has no fused form
    assert isinstance(build_optimizer(lbfgs, [nn.Parameter(torch.zeros(2))], True), torch.optim.Rprop)


def test_the_record_says_where_the_time_goes(main):
    assert main("train", "a", "small.gin", "--profile", "-b", "training_loop.n_epochs=4") == 0
    for row in results.load_history("a"):
        assert 0 < row["valid_s"] < row["time"] and 50 < row["peak_mb"] < 50_000
    trace = json.loads(Path("a/profile.json").read_text())
    assert any("SGD" in event.get("name", "") for event in trace["traceEvents"])


def test_a_profile_of_too_few_steps_is_spoken_of(main, capfd):
    assert main("train", "a", "small.gin", "--profile", "-b", "training_loop.steps_per_epoch=3") == 0
    assert "a/profile.json was not written: it needs 11 steps, better 30" in capfd.readouterr().out


def test_cutout_sets_a_square_to_zero():
    x = torch.ones(200, 3, 16, 12)
    generator = torch.Generator()

    def draw(*shape):
        return torch.rand(len(x), *shape, generator=generator.manual_seed(0))

    cut = cutout(4)(x, draw)
    assert torch.equal(cut[:, 0], cut[:, 2]) and torch.equal(x, torch.ones_like(x))
    areas = (cut[:, 0] == 0).sum((1, 2))
    assert areas.max() == 16 and areas.min() >= 4  # a part of it may lie outside
    assert (cut.mean(0)[0] < 1).all()  # every pixel is hit now and then
    assert torch.equal(cut, cutout(4)(x, draw))


@pytest.mark.parametrize(
    "bindings, n_lines",
    [("", 0), ("training_loop.data=@slow_digits", 1), ("training_loop.callbacks=[@SlowSteps]", 0)],
    ids=["ordinary", "slow data", "slow steps"],
)
def test_data_that_are_waited_for_are_spoken_of_once(main, capfd, module, bindings, n_lines):
    assert main("train", "a", "small.gin", module("slow", SLOW), "-b", bindings) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "waits for data" in line]
    assert len(lines) == n_lines
    rows = results.load_history("a")
    assert not bindings or all(row["time"] > 1 for row in rows)
    if lines:
        assert all(row["data_wait"] > 0.2 for row in rows)
        assert lines[0].startswith(f"{rows[0]['data_wait']:.0%} of the training time waits for data: raise ")


@pytest.mark.slow
@pytest.mark.alone
def test_answers_and_refusals_come_soon():
    """Half as long again as they should take is let pass, for a machine that is busy."""
    train = [sys.executable, str(ROOT / "bin/train.py")]
    commands = {
        "import torch": ([sys.executable, "-c", "import torch"], 0),
        "--help": ([*train, "--help"], 0),
        "no such config": ([*train, "run", "no.gin"], 2),
        "a wrong name": ([*train, "run", "small.gin", "-b", "SGD.rl=1"], 2),
    }
    times = {name: [] for name in commands}
    for _ in range(3):
        for name, (command, code) in commands.items():
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            times[name].append(time.perf_counter() - began)
            assert done.returncode == code, done.stderr
    seconds = {name: statistics.median(values) for name, values in times.items()}
    print(seconds)
    assert seconds["--help"] <= 1.5 * 0.3
    assert seconds["no such config"] <= 1.5 * 0.5
    assert seconds["a wrong name"] <= 1.5 * (seconds["import torch"] + 1)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile, reason="needs g++ or a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_network_learns_the_same(train, tmp_path, precision):
    # Compiled dropout draws other numbers.
    mlp = "training_loop.model=@MLP;MLP.n_hidden=(32,);MLP.dropout=0.0;training_loop.n_epochs=8"
    mlp += f";training_loop.precision='{precision}'"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for run, compiled in (("plain", False), ("compiled", True)):
        done = train(run, "small.gin", "-b", f"{mlp};training_loop.compile={compiled}", env=environment)
        assert done.returncode == 0, done.stderr
        assert any(Path("cache").rglob("*.py")) == compiled
    plain, compiled = (results.load_history(run) for run in ("plain", "compiled"))
    assert plain[-1]["loss"] < 0.5 * plain[0]["loss"]
    for column in ("loss", "val_loss"):
        expected = [row[column] for row in plain]
        assert [row[column] for row in compiled] == pytest.approx(expected, rel=1e-3 if precision == "fp32" else 1e-2)
    assert weights("compiled").keys() == weights("plain").keys()


@pytest.mark.slow
@needs_gpu
@pytest.mark.parametrize(
    "settings",
    [
        "",
        "training_loop.precision='bf16'",
        "training_loop.clip_norm=1.0;training_loop.accumulate=2;training_loop.ema_decay=0.9",
        "training_loop.compile=True",
    ],
)
def test_the_gpu_is_not_waited_for_inside_an_epoch(train, module, settings):
    watched = "training_loop.device='cuda';training_loop.callbacks=[@NoWaits];training_loop.log_every=1000"
    batches = "training_loop.batch_size=10;NoWaits.last=108"  # of 1,079 images
    done = train("a", "small.gin", module("no_waits", NO_WAITS), "-b", f"{watched};{batches};{settings}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_gpu
def test_a_wait_for_the_gpu_would_be_noticed(train, module):
    watched = "training_loop.device='cuda';training_loop.callbacks=[@NoWaits];NoWaits.last=11;NoWaits.waits=True"
    done = train("a", "small.gin", module("no_waits", NO_WAITS), "-b", watched)
    assert done.returncode == 1 and "synchronizing CUDA operation" in done.stderr
