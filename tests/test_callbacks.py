"""The callbacks: rates, memory across a reload, and what TensorBoard shows of a run."""

import os
import signal
from pathlib import Path

import gin
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

from src import results, training_loop
from src.callbacks import LRSchedule, WarmupCosine, external, poutyne
from src.run import read_checkpoint, write_checkpoint

SMALL = """
training_loop.data = @digits
training_loop.model = @MLP
MLP.n_hidden = [16]
training_loop.optimizer = @SGD
SGD.lr = 0.05
training_loop.batch_size = 100
training_loop.n_epochs = 2
training_loop.log_every = 3
"""
STEPS = 11  # an epoch


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small config, small.gin, in the current folder, from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    Path("small.gin").write_text(SMALL)
    return "small.gin"


def trainer(callback, lr=0.1) -> poutyne.Model:
    """A Poutyne model with the callback, as training begins."""
    network = nn.Linear(2, 2)
    model = poutyne.Model(network, torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9), None)
    model.updated = True  # as the loop's own: the last batch ended in an optimizer step
    callback.set_model(model)
    callback.on_train_begin({})
    return model


def rate(model) -> float:
    return model.optimizer.param_groups[0]["lr"]


# --- learning rates


def test_lr_schedule():
    callback = LRSchedule(0.2, [[2, 1.0], [10, 0.1], [11, 0.5]])
    model = trainer(callback)
    rates = {}
    for epoch in (1, 2, 3, 10, 11, 12, 99):
        callback.on_epoch_begin(epoch, {})
        rates[epoch] = rate(model)
    assert rates == pytest.approx({1: 0.2, 2: 0.2, 3: 0.02, 10: 0.02, 11: 0.1, 12: 0.1, 99: 0.1})
    assert LRSchedule(0.3).factor(1) == LRSchedule(0.3).factor(50) == 1
    own = LRSchedule(schedule=[[1, 1.0], [2, 0.5], [3, 0.25]])
    model = trainer(own)
    before, rates = rate(model), []
    for epoch in (1, 2, 3):
        own.on_epoch_begin(epoch, {})
        rates.append(rate(model))
    assert rates == pytest.approx([before, before / 2, before / 4])
    for wrong in ([], [[2, 1.0], [2, 0.1]], [[3, 1.0], [2, 0.1]]):
        with pytest.raises(Exception, match="epochs must rise"):
            LRSchedule(0.1, wrong)


@pytest.mark.parametrize(("warmup", "total", "final"), [(0, 10, 0.0), (5, 20, 0.1), (19, 20, 0.0)])
def test_warmup_cosine_is_torchs(warmup, total, final):
    callback = WarmupCosine(total, warmup, final)
    model = trainer(callback)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, eta_min=0.1 * final)
    if warmup:  # torch counts from 0: its last step of the warm-up is one before ours
        linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
        torchs = torch.optim.lr_scheduler.SequentialLR(optimizer, [linear, torchs], milestones=[warmup])
    for step in range(total + 1):
        callback.on_train_batch_begin(1, {})
        assert rate(model) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), step
        callback.on_train_batch_end(1, {})
        optimizer.step()
        torchs.step()
    for _ in range(5):  # after the horizon it stays
        callback.on_train_batch_begin(1, {})
        assert rate(model) == pytest.approx(0.1 * final, abs=1e-12)


def test_warmup_cosine_says_once_that_it_is_over(small, main, capfd):
    steps = "training_loop.callbacks=[@WarmupCosine];WarmupCosine.total_steps={};WarmupCosine.final=0.5"
    assert main("train", "run", small, "-b", f"{steps.format(22)};training_loop.n_epochs=2") == 0
    assert "total_steps" not in capfd.readouterr().out
    goes_on = f"{steps.format(22)};training_loop.n_epochs=3;training_loop.reload=True"
    assert main("train", "run", small, "-b", goes_on) == 0
    out = capfd.readouterr().out
    assert out.count("WarmupCosine: all 22 total_steps are done, the learning rate stays at 0.025") == 1


def test_warmup_cosine_at_the_edges():
    factor = WarmupCosine(total_steps=14, warmup_steps=4, final=0.2).factor
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [WarmupCosine(total_steps=9, warmup_steps=1).factor(step) for step in (0, 1)] == [1.0, 1.0]
    assert [factor(9), factor(14), factor(15), factor(10**9)] == pytest.approx([0.6, 0.2, 0.2, 0.2])
    with pytest.raises(Exception, match="must be below"):
        WarmupCosine(total_steps=5, warmup_steps=5)


ARGUMENTS = {
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3, 3]},
    "ConstantLR": {"total_iters": 3},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5},
    "ReduceLROnPlateau": {"patience": 1},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "OneCycleLR": {"max_lr": 0.2, "total_steps": 9},
}


@pytest.mark.parametrize("name", external.SCHEDULERS)
def test_a_scheduler_goes_on_as_if_it_had_not_stopped(name, tmp_path):
    def begin():
        callback = gin.get_configurable(name)(**ARGUMENTS.get(name, {}))
        return callback, trainer(callback)

    def step(callback, model, epoch):
        model.optimizer.step()
        callback.on_epoch_end(epoch, {"val_loss": 1.0})
        return rate(model)

    callback, model = begin()
    begun = [step(callback, model, epoch) for epoch in (1, 2)]
    state = {"callback": external.state_dict(callback), "optimizer": model.optimizer.state_dict()}
    write_checkpoint(tmp_path / "a.pt", training_loop.plain(state))
    expected = [step(callback, model, epoch) for epoch in range(3, 8)]
    assert len({*begun, *expected}) > 1

    read = read_checkpoint(tmp_path / "a.pt")
    callback, model = begin()
    model.optimizer.load_state_dict(read["optimizer"])
    external.load_state_dict(callback, read["callback"])
    assert [step(callback, model, epoch) for epoch in range(3, 8)] == expected


# --- memory


@pytest.mark.parametrize("name", ["EarlyStopping", "poutyne.EarlyStopping"])
def test_early_stopping_remembers_across_a_reload(small, main, name):
    still = f"SGD.lr=0.0;training_loop.callbacks=[@{name}];{name}.monitor='val_loss';{name}.patience=3"
    assert main("train", "a", small, "-b", still) == 0
    assert len(results.load_history("a")) == 2
    [(_, state)] = read_checkpoint(Path("a/checkpoint.pt"))["callbacks"]
    assert state["wait"] == 1 and state["best"] == results.load_history("a")[0]["val_loss"]
    more = "training_loop.n_epochs=9;training_loop.reload=True"
    assert main("train", "a", small, "-b", still, "-b", more) == 0
    assert len(results.load_history("a")) == 4  # epoch 1 was the best; then three without


def test_a_callback_made_from_early_stopping_may_remember_more():
    class Patient(poutyne.EarlyStopping):
        def state_dict(self):
            return {"wait": self.wait, "more": self.more}

        def load_state_dict(self, state):
            self.wait, self.more = state["wait"], state["more"] + 1

    callback = Patient(monitor="val_loss")
    callback.wait, callback.more = 2, 7
    external.load_state_dict(callback, external.state_dict(callback))
    assert (callback.wait, callback.more) == (2, 8)


def test_a_callback_says_what_it_remembers(small, main, capfd):
    Path("forgetful.py").write_text(
        "import gin\nfrom poutyne import Callback\n\n"
        "@gin.register\nclass Forgetful(Callback):\n    pass\n\n"
        "@gin.register\nclass Stateless(Callback):\n    stateless = True\n"
    )
    Path("forgetful.gin").write_text(f"import forgetful\n{SMALL}")
    assert main("train", "a", "forgetful.gin", "-b", "training_loop.callbacks=[@Forgetful]") == 2
    message = capfd.readouterr().err
    assert "callback Forgetful" in message and "state_dict" in message and "stateless = True" in message
    assert not Path("a").exists()
    one = "training_loop.n_epochs=1;training_loop.callbacks=[@Stateless]"
    assert main("train", "a", "forgetful.gin", "-b", one) == 0


# --- TensorBoard


def read_events(run: str) -> EventAccumulator:
    events = EventAccumulator(run, size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def epochs(events: EventAccumulator, column: str) -> list[int]:
    return sorted(point.step for point in events.Scalars(f"epoch/{column}"))


def assert_every_epoch_once(run: str) -> EventAccumulator:
    """As history.csv has them, and the loss of a step at most once."""
    events, history = read_events(run), results.load_history(run)
    columns = history[0].keys() - {"epoch"}
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("epoch/")} == {f"epoch/{c}" for c in columns}
    for column in columns:
        assert epochs(events, column) == [row["epoch"] for row in history]
        values = {point.step: point.value for point in events.Scalars(f"epoch/{column}")}
        assert values == pytest.approx({row["epoch"]: row[column] for row in history}, rel=1e-6)
    steps = [point.step for point in events.Scalars("step/loss")]
    assert len(steps) == len(set(steps)) and max(steps) <= STEPS * len(history)
    return events


def files(run: str) -> list[str]:
    return [path.name for path in Path(run).rglob("*tfevents*")]


def test_tensorboard_holds_every_epoch_once_also_when_the_run_goes_on(small, main):
    assert main("train", "a", small) == 0
    events = assert_every_epoch_once("a")
    assert [p.step for p in events.Scalars("step/loss")] == [3, 6, 9, 11, 14, 17, 20, 22]
    # The loss by step is the mean since the point before: with the steps' numbers it gives the epoch's.
    points = {p.step: p.value for p in events.Scalars("step/loss")}
    mean = (3 * points[3] + 3 * points[6] + 3 * points[9] + 2 * points[11]) / 11
    assert mean == pytest.approx(results.load_history("a")[0]["loss"], rel=1e-2)  # the last batch is smaller
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    SGD.lr = 0.05" in text and "digits" in text
    assert len(files("a")) == 1
    assert [path.name for path in Path("a").iterdir() if path.is_dir()] == ["configs"]

    settings, metrics = hparams(events)
    assert settings["SGD.lr"] == 0.05 and "training_loop.model" in settings
    last = results.load_history("a")[-1]
    assert {"final/val_acc", "final/val_loss", "final/loss"} <= metrics
    assert [p.value for p in events.Scalars("final/val_acc")] == pytest.approx([last["val_acc"]])

    assert main("train", "a", small, "-b", "training_loop.n_epochs=4;training_loop.reload=True") == 0
    events = assert_every_epoch_once("a")
    assert len(files("a")) == 2
    assert [p.step for p in events.Scalars("step/loss")][-4:] == [36, 39, 42, 44]
    configs = {p.step: p.tensor_proto.string_val[0].decode() for p in events.Tensors("config/text_summary")}
    assert [f"n_epochs = {n}" in configs[step] for step, n in ((0, 2), (2, 4))] == [True, True]
    # Nothing left to train: nothing more is written.
    assert main("train", "a", small, "-b", "training_loop.n_epochs=4;training_loop.reload=True") == 0
    assert_every_epoch_once("a")
    assert len(files("a")) == 2


def hparams(events: EventAccumulator) -> tuple[dict[str, object], set[str]]:
    """The settings and the names of the metrics, as TensorBoard's plugin reads them."""
    content = {tag: HParamsPluginData.FromString(data) for tag, data in events.PluginTagToContent("hparams").items()}
    values = content["_hparams_/session_start_info"].session_start_info.hparams
    experiment = content["_hparams_/experiment"].experiment
    return (
        {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()},
        {info.name.tag for info in experiment.metric_infos},
    )


def test_a_stop_inside_an_epoch_leaves_every_point_once(small, train, main):
    Path("stopper.py").write_text(
        "import os, signal, gin\nfrom poutyne import Callback\n\n@gin.register\n"
        "class Stopper(Callback):\n    stateless = True\n    n = 0\n"
        "    def on_train_batch_end(self, batch, logs):\n        self.n += 1\n"
        f"        if self.n == {STEPS + 7} and not os.path.exists('stopped'):\n"
        "            open('stopped', 'w').close()\n            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    Path("stopper.gin").write_text(f"import stopper\n{SMALL}training_loop.callbacks = [@Stopper]\n")
    assert train("a", "stopper.gin").returncode == 128 + signal.SIGTERM
    events = read_events("a")
    assert epochs(events, "loss") == [1]
    assert [p.step for p in events.Scalars("step/loss")] == [3, 6, 9, 11, 14, 17]
    assert main("train", "a", "stopper.gin", "-b", "training_loop.reload=True") == 0
    events = assert_every_epoch_once("a")
    assert [p.step for p in events.Scalars("step/loss")] == [3, 6, 9, 11, 14, 17, 20, 22]


# Kills the process where it writes the named file for the n-th time. best.pt comes after the commit,
# before TensorBoard's points.
KILLER = """
import os, signal, sys

def kill(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".best.pt.tmp") and "w" in (arguments[1] or ""):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

left = int(os.environ.get("KILL_AT", "0"))
sys.addaudithook(kill)
"""


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_kill_between_commit_and_points(small, train, main, epoch):
    Path("killer.py").write_text(KILLER)
    Path("killer.gin").write_text(f"import killer\n{SMALL}training_loop.n_epochs = 3\n")
    killed = train("a", "killer.gin", env=os.environ | {"KILL_AT": str(epoch)})
    assert killed.returncode == -signal.SIGKILL
    assert read_checkpoint(Path("a/checkpoint.pt"))["epoch"] == epoch
    if epoch > 1:
        assert epochs(read_events("a"), "loss") == list(range(1, epoch))
    assert main("train", "a", "killer.gin", "-b", "training_loop.reload=True") == 0
    events = assert_every_epoch_once("a")
    assert [p.step for p in events.Scalars("final/val_acc")] == [3]
    assert hparams(events)[0]["SGD.lr"] == 0.05


def test_a_point_torn_by_a_kill_is_no_point(small, main):
    assert main("train", "a", small) == 0
    [file] = Path("a").glob("*tfevents*")
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rindex(b"epoch/val_acc") + 5])
    assert main("train", "a", small, "-b", "training_loop.n_epochs=3;training_loop.reload=True") == 0
    assert_every_epoch_once("a")
