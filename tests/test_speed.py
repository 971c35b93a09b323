"""Settings that make a step faster or other: what they compute, and that a run with them goes on exactly."""

import json
from pathlib import Path

import gin
import pytest
import torch
from torch import nn

from benchmarks.kill import run_difference
from src import results
from src.data.augment import cutout
from src.run import read_checkpoint
from src.training_loop import build_optimizer

SMALL = """
training_loop.data = @digits
digits.padding = 1
training_loop.model = @SimpleCNN
SimpleCNN.n_filters = [8, 8]
SimpleCNN.n_dense = 16
SimpleCNN.dropout = 0.2
training_loop.optimizer = @SGD
SGD.lr = 0.05
SGD.momentum = 0.9
training_loop.batch_size = 100
training_loop.n_epochs = 2
"""


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.gin").write_text(SMALL)


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
    # With a decay of 1 the average stays where the weights began.
    assert not torch.equal(weights("first", "best.pt")[name], weights("plain")[name])
    assert results.load_history("first")[0]["val_acc"] < 40


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


def test_cutout_sets_a_square_to_zero():
    x = torch.ones(200, 3, 16, 12)
    cut = cutout(4)(x, torch.Generator().manual_seed(0))
    assert torch.equal(cut[:, 0], cut[:, 2]) and torch.equal(x, torch.ones_like(x))
    areas = (cut[:, 0] == 0).sum((1, 2))
    assert areas.max() == 16 and areas.min() >= 4  # a part of it may lie outside
    assert (cut.mean(0)[0] < 1).all()  # every pixel is hit now and then
    assert torch.equal(cut, cutout(4)(x, torch.Generator().manual_seed(0)))
