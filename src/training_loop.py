"""The training loop: builds what gin configured, trains it by Poutyne, commits, and can go on.

Read from `training_loop` down. Poutyne appears here and in callbacks/ only.
"""

import copy
import hashlib
import inspect
import math
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import gin
import numpy as np
import torch
from torch import Tensor, nn

import src.models  # noqa: F401  (registers the models)
from src.callbacks import external, poutyne
from src.callbacks.progress import Progress
from src.callbacks.tensorboard import TensorBoard
from src.config import Config, Refused, Settings, check, nearest
from src.data.dataset import Data, TensorSplit
from src.metrics import Accuracy, register_torchmetric
from src.models.summary import summarise
from src.models.torchvision_models import register as register_torchvision
from src.run import Damaged, Run, machine, read_checkpoint, write_checkpoint

EXTERNAL: dict[str, Callable[[str], None]] = {
    "torchvision.models.": register_torchvision,
    "torchmetrics.": register_torchmetric,
    "poutyne.": external.register_poutyne,
}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
FEED_EVERY = 32  # batches; a metric costs tens of microseconds a call, whatever the batch's size


def register_torch() -> None:
    """Registers torch's optimizers, losses and LR schedulers with gin, by their bare names."""
    base = torch.optim.Optimizer
    left_out = (base, torch.optim.LBFGS)  # LBFGS calls the forward itself, several times a step
    for optimizer in vars(torch.optim).values():
        if inspect.isclass(optimizer) and issubclass(optimizer, base) and optimizer not in left_out:
            gin.external_configurable(optimizer, module="torch.optim", denylist=["params"])
    for name, loss in vars(nn).items():
        if name.endswith("Loss"):
            gin.external_configurable(loss, module="torch.nn")
    external.register_schedulers()


register_torch()


class Stopped(Exception):
    """Training was asked to stop; everything is committed."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class NonFinite(Exception):
    """The loss or the weights are no longer finite. The last commit is from before."""


def configure(settings: Settings) -> Config:
    """Checks the settings against all that can be named here. Raises Refused."""
    return check(settings, "training_loop", EXTERNAL)


@gin.register(denylist=["run"])
def training_loop(
    run: Run,
    data: Callable[..., Data],
    model: Callable[..., nn.Module],
    optimizer: Callable[..., torch.optim.Optimizer],
    loss: Callable[..., nn.Module] = nn.CrossEntropyLoss,
    metrics: Sequence[Callable[..., nn.Module]] = (Accuracy,),
    callbacks: Sequence[Callable[..., poutyne.Callback]] = (),
    n_epochs: int = 1,
    batch_size: int = 128,
    seed: int = 0,
    monitor: str = "val_acc",
    monitor_mode: Literal["min", "max"] = "max",
    device: str = "auto",
    deterministic: bool = False,
    reload: bool = False,
    init_from: str | None = None,
    log_every: int = 50,
    steps_per_epoch: int | None = None,
    detect_anomaly: bool = False,
) -> Data:
    """Trains `model` on `data` into the run's folder and returns the data.

    Everything is built and tried on one batch in memory first; a mistake leaves no trace.

    Args:
        run: the folder; not configured by gin.
        data, model, optimizer, loss, metrics, callbacks: what builds them, uncalled: the loop
            seeds, then builds. It supplies input_shape and n_classes, and the optimizer's params.
        n_epochs: the run ends after this epoch; it may be raised later with reload=True.
        batch_size: images a step; the last batch of an epoch may be smaller.
        seed: of the weights, the order of the data, its augmentation and dropout.
        monitor, monitor_mode: the column of history.csv whose 'min' or 'max' is the best epoch.
        device: 'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1', 'mps'.
        deterministic: deterministic algorithms, for the same bits on a GPU.
        reload: goes on from the last commit if there is one.
        init_from: a run's folder: starts from its best weights.
        log_every: steps between two looks at the loss; the device is not waited for in between.
        steps_per_epoch: fewer steps an epoch, for debugging; also the batches of validation.
        detect_anomaly: torch's anomaly detection: names the operation behind a NaN. Slow.

    Raises:
        Refused: something does not fit; the folder is as it was.
        Stopped: a signal asked for it. The exit code is 128 + signal.
        NonFinite: the loss is no longer finite.
    """
    assert reload == run.reload, "the run's folder was looked at with another reload"
    for name, value in (
        ("n_epochs", n_epochs),
        ("batch_size", batch_size),
        ("log_every", log_every),
        ("steps_per_epoch", steps_per_epoch),
    ):
        if value is not None and value < 1:
            raise Refused(f"training_loop.{name} = {value}, but it must be at least 1")
    place = find_device(device)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.autograd.set_detect_anomaly(detect_anomaly)

    dataset = data()
    if dataset.choice is not None and run.config:
        run.config = run.config.choose("data", dataset.choice)
    if batch_size > len(dataset.train):
        raise Refused(
            f"training_loop.batch_size = {batch_size}, but {dataset.name} has only "
            f"{len(dataset.train)} images to train on"
        )
    facts: dict[str, Any] = {"data": describe(dataset)}
    if run.config:
        run.refuse_changes(run.config, facts["data"])

    seed_all(seed)
    network = build(model, input_shape=dataset.input_shape, n_classes=dataset.n_classes).to(place)
    trainable = [p for p in network.parameters() if p.requires_grad]
    trainer = Trainer(
        network,
        build(optimizer, params=trainable),
        LossList(build(loss).to(place)),
        MetricList([build(m, n_classes=dataset.n_classes).to(place) for m in metrics]),
    )
    built_callbacks = [build(callback) for callback in callbacks]
    train = TrainBatches(dataset.train.to(place), batch_size, seed, steps_per_epoch)
    valid = ValidBatches(dataset.valid.to(place), batch_size, steps_per_epoch)
    refuse_unknown_monitors(monitor, built_callbacks, trainer.metrics.names)
    for callback in built_callbacks:
        external.state_dict(callback)
    print(try_one_batch(trainer, train, dataset.n_classes))

    state = run.load()
    facts["model"] = run.config.flat()["training_loop.model"][1:] if run.config else str(model)
    facts |= {"parameters": sum(p.numel() for p in trainable), "seed": seed}
    facts |= {"monitor": monitor, "monitor_mode": monitor_mode}
    if init_from and state is None:
        facts["init_from"] = start_from(init_from, network)
    start = {"device": str(place), "threads": torch.get_num_threads(), "epoch": 0, **machine()}
    run.open(facts=facts, start=start | {"epoch": state["epoch"] if state else 0})

    with StopRequest() as stop:
        commits = Commits(run, train, built_callbacks, monitor, monitor_mode, log_every, state, stop)
        text = run.config.text() if run.config else ""
        tensorboard = TensorBoard(run.path, commits.history, text, hparams(run.config))
        commits.tensorboard = tensorboard
        if state and (state["stopped"] or state["epoch"] >= n_epochs):
            commits.follow()
            tensorboard.finish(commits.history[-1])
            print(f"{run.path}: {state['epoch']} epochs are done, nothing is left to train")
            return dataset
        run.unfinish()
        print(
            f"{run.path}: {facts['model']} on {dataset.name} ({len(dataset.train)} images), "
            f"{place}, " + (f"on from epoch {state['epoch']}" if state else f"seed {seed}")
        )
        terminal = run.output.terminal if run.output else None
        trainer.fit_generator(
            train,
            valid,
            epochs=n_epochs,
            initial_epoch=state["epoch"] + 1 if state else 1,
            verbose=False,
            callbacks=[
                *built_callbacks,
                commits,  # what stands behind it sees committed epochs only
                tensorboard,
                Progress(terminal, train.n_batches, batch_size),
            ],
        )
        tensorboard.finish(commits.history[-1])
    return dataset


# --- what is built, and tried ---------------------------------------------------------------------


def build(builder: Callable[..., Any], **supplied: Any) -> Any:
    """Calls the builder with those of the supplied arguments that it takes."""
    function = builder.__init__ if inspect.isclass(builder) else builder
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    return builder(**{k: v for k, v in supplied.items() if takes_all or k in names})


def find_device(name: str) -> torch.device:
    """'auto' takes cuda, then mps, then cpu. Raises Refused for a device that is not there."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise Refused(f"training_loop.device = {name!r}: cannot be used here: {reason}") from None
    return device


def seed_all(seed: int) -> None:
    """Seeds torch, and Python and numpy for models and callbacks that use them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def describe(data: Data) -> dict[str, Any]:
    """The data's part of meta.json."""
    return {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "input_shape": list(data.input_shape),
        "n_classes": data.n_classes,
        "n_train": len(data.train),
        "n_valid": len(data.valid),
        "n_test": len(data.test),
    }


def hparams(config: Config | None) -> dict[str, bool | int | float | str]:
    """The settings as TensorBoard's hparams: one value each."""
    flat = config.flat() if config else {}
    return {key: _number(text) for key, text in flat.items()}


def _number(text: str) -> bool | float | str:
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text


def refuse_unknown_monitors(monitor: str, callbacks: Sequence[poutyne.Callback], metrics: Sequence[str]) -> None:
    """Raises Refused if the loop or a callback watches what is no column of history.csv."""
    columns = [prefix + name for prefix in ("", "val_") for name in ("loss", *metrics)]
    monitors = [("training_loop", monitor)]
    monitors += [(type(c).__name__, c.monitor) for c in callbacks if hasattr(c, "monitor")]
    for owner, name in monitors:
        if name not in columns:
            raise Refused(
                f"{owner}.monitor = {name!r} is no metric{nearest(name, columns)}: there are {', '.join(columns)}"
            )


def try_one_batch(trainer: "Trainer", train: "TrainBatches", n_classes: int) -> str:
    """One forward of one batch in eval mode, with the random numbers put back; gives the summary.

    Raises Refused if the network does not take the data, or its output does not fit the loss.
    """
    x, y = next(train.split.batches(train.batch_size))
    shape = list(x.shape)
    devices = [x.device] if x.device.type == "cuda" else []
    name = type(trainer.network).__name__
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            output, summary = summarise(trainer.network, x)
        except RuntimeError as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise Refused(
                f"{name} does not take a batch of shape {shape}: {error} ({frame.filename}:{frame.lineno})"
            ) from None
        classes = not y.is_floating_point()
        if classes and output.shape[:2] != (len(x), n_classes):
            raise Refused(
                f"{name} gives an output of shape {list(output.shape)} for a batch of shape "
                f"{shape}, but the data has {n_classes} classes: "
                f"it must be [{len(x)}, {n_classes}]"
            )
        try:
            trainer.loss.function(output, y)
        except (RuntimeError, ValueError, IndexError) as error:
            raise Refused(f"the loss does not take {name}'s output: {error}") from None
    return summary


def start_from(folder: str, network: nn.Module) -> dict[str, Any]:
    """Loads the best weights of another run. Raises Refused without a run or with other shapes."""
    best = Path(folder) / "best.pt"
    try:
        weights = read_checkpoint(best)["network"]
    except FileNotFoundError:
        raise Refused(f"training_loop.init_from = {folder!r}: there is no {best}") from None
    except Damaged as damage:
        raise Refused(f"training_loop.init_from: {damage}") from None
    own = network.state_dict()
    unfit = [
        f"  {name}: {_shape(weights, name)} there, {_shape(own, name)} here"
        for name in dict.fromkeys([*own, *weights])
        if _shape(weights, name) != _shape(own, name)
    ]
    if unfit:
        more = [f"  and {len(unfit) - 8} more"] if len(unfit) > 8 else []
        raise Refused(
            f"training_loop.init_from = {folder!r}: the weights do not fit the model:\n" + "\n".join(unfit[:8] + more)
        )
    network.load_state_dict(weights)
    return {"run": folder, "sha256": hashlib.sha256(best.read_bytes()).hexdigest()}


def _shape(weights: Mapping[str, Tensor], name: str) -> list[int] | str:
    return list(weights[name].shape) if name in weights else "missing"


# --- the step -------------------------------------------------------------------------------------


class Trainer(poutyne.Model):
    """Poutyne's model with a step that never waits for the device."""

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, loss: "LossList", metrics: "MetricList"
    ) -> None:
        super().__init__(network, optimizer, loss, epoch_metrics=[(metrics.names, metrics)])
        self.loss, self.metrics = loss, metrics

    def _fit_batch(self, x: Any, y: Any, *, callback: Any, step: int, **_: Any) -> tuple[Tensor, tuple[()], None]:
        self.optimizer.zero_grad()
        loss = self._compute_loss_and_metrics(x, y)[0]
        loss.backward()  # type: ignore[no-untyped-call]
        callback.on_backward_end(step)
        self.optimizer.step()
        return loss.detach(), (), None

    def _compute_loss_and_metrics(self, x: Any, y: Any, **_: Any) -> tuple[Tensor, tuple[()], None]:
        output = self.network(*x) if isinstance(x, tuple) else self.network(x)
        loss = self.loss(output, y)
        self.metrics.update(output.detach(), y)
        return loss, (), None


class LossList(nn.Module):
    """The loss, with its values of the epoch: a list of detached tensors, summed once."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.reset()

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.function(output, y)
        self.values.append(loss.detach())
        self.sizes.append(len(y))
        return loss

    def read(self, begin: int = 0) -> Tensor:
        """The values from step `begin` of the epoch on, on the CPU: waits for the device."""
        values = self.values[begin:]
        return torch.stack(values).cpu() if values else torch.zeros(0)

    def compute(self) -> Tensor:
        """The mean over the epoch's images."""
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        return (self.read().double() * sizes).sum() / sizes.sum()

    def reset(self) -> None:
        self.values: list[Tensor] = []
        self.sizes: list[int] = []

    def pending(self) -> dict[str, Any]:
        """What a commit inside an epoch keeps."""
        return {"values": self.read(), "sizes": list(self.sizes)}

    def load_pending(self, pending: Mapping[str, Any], device: torch.device) -> None:
        self.values = list(pending["values"].to(device))
        self.sizes = list(pending["sizes"])


class MetricList(nn.Module):
    """The metrics of an epoch, fed every 32 batches on a fixed grid."""

    def __init__(self, metrics: Sequence[nn.Module]) -> None:
        super().__init__()
        self.metrics = nn.ModuleList(metrics)
        self.names = [str(getattr(m, "name", type(m).__name__.lower())) for m in metrics]
        if len(set(self.names)) < len(self.names):
            raise Refused(f"two metrics have one name: {', '.join(self.names)}: give one a scope")
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def update(self, output: Tensor, y: Tensor) -> None:
        """output: [N, C, ...], y: [N, ...]."""
        self.waiting.append((output, y))
        if len(self.waiting) == FEED_EVERY:
            self._feed()

    def _feed(self) -> None:
        if self.waiting:
            outputs, labels = (torch.cat(column) for column in zip(*self.waiting, strict=True))
            for metric in self.metrics:
                metric.update(outputs, labels)  # type: ignore[operator]
            self.waiting = []

    def compute(self) -> dict[str, Tensor]:
        """Each metric's value by its name."""
        self._feed()
        return {
            name: metric.compute()  # type: ignore[operator]
            for name, metric in zip(self.names, self.metrics, strict=True)
        }

    def reset(self) -> None:
        self.waiting = []
        for metric in self.metrics:
            metric.reset()  # type: ignore[operator]

    def pending(self) -> dict[str, Any]:
        """What a commit inside an epoch keeps."""
        waiting = [(output.cpu(), y.cpu()) for output, y in self.waiting]
        return {"metrics": copy.deepcopy(self.metrics.state_dict()), "waiting": waiting}

    def load_pending(self, pending: Mapping[str, Any], device: torch.device) -> None:
        self.metrics.load_state_dict(pending["metrics"])
        self.metrics.to(device)  # torchmetrics keeps the tensors it is given, on the CPU
        self.waiting = [(output.to(device), y.to(device)) for output, y in pending["waiting"]]


class TrainBatches:
    """An epoch's batches, from any of them on. Without a length, or Poutyne would repeat them."""

    def __init__(self, split: TensorSplit, batch_size: int, seed: int, limit: int | None) -> None:
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        n_batches = math.ceil(len(split) / batch_size)
        self.n_batches = min(n_batches, limit or n_batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.waited = 0.0
        batches = self.split.batches(self.batch_size, seed=self.seed, epoch=self.epoch, start=self.start)
        for _ in range(self.start, self.n_batches):
            began = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - began
            yield batch

    def begin(self, epoch: int, start: int) -> None:
        """The next iteration is epoch `epoch`, from batch `start` on."""
        self.epoch, self.start = epoch, start


class ValidBatches:
    """The valid split in order; without a length, see TrainBatches."""

    def __init__(self, split: TensorSplit, batch_size: int, limit: int | None) -> None:
        self.split, self.batch_size, self.limit = split, batch_size, limit

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for k, batch in enumerate(self.split.batches(self.batch_size)):
            if k == self.limit:
                return
            yield batch


# --- commits --------------------------------------------------------------------------------------


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 set a flag that is acted on at the step's edge.

    A second SIGINT stops at once; what was committed stays.
    """

    def __enter__(self) -> "StopRequest":
        self.signal = 0
        self.before = {number: signal.signal(number, self) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class Commits(poutyne.Callback):
    """Puts the last commit back when training begins, and commits at the end of each epoch and
    when a signal asks for a stop. All that a run needs to go on is in `_state`.

    Stands behind the callbacks that have a state, before those that show committed epochs.
    """

    stateless = True

    def __init__(
        self,
        run: Run,
        batches: TrainBatches,
        callbacks: Sequence[poutyne.Callback],
        monitor: str,
        mode: str,
        log_every: int,
        state: dict[str, Any] | None,
        stop: "StopRequest",
    ) -> None:
        super().__init__()
        self.run = run
        self.batches = batches
        self.callbacks = callbacks
        self.monitor = monitor
        self.sign = 1 if mode == "max" else -1
        self.log_every = log_every
        self.state = state
        self.history: list[dict[str, float]] = state["history"] if state else []
        self.best: dict[str, Any] = state["best"] if state else {"epoch": 0, "value": None}
        self.step = state["step"] if state else 0  # of the epoch that is under way
        self.total_steps = state["total_steps"] if state else 0
        self.lr = state["lr"] if state else 0.0
        self.tensorboard: TensorBoard | None = None
        self.stop = stop

    def on_train_begin(self, logs: dict[str, Any]) -> None:
        # Only now: schedulers are made when training begins, and set the learning rate then.
        if self.state:
            self._restore(self.state)
            self.follow()
            self.state = None

    def _restore(self, state: dict[str, Any]) -> None:
        trainer = self.model
        device = next(trainer.network.parameters()).device
        trainer.network.load_state_dict(state["network"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            external.load_state_dict(callback, saved)
        if state["step"]:
            trainer.loss.load_pending(state["loss"], device)
            trainer.metrics.load_pending(state["metrics"], device)
        set_rng(state["rng"])

    def on_epoch_begin(self, epoch_number: int, logs: dict[str, Any]) -> None:
        self.epoch = epoch_number
        self.batches.begin(epoch_number, self.step)
        done = self.step == self.batches.n_batches
        self.read_until = self.step if done else self.step - self.step % self.log_every
        self.at_train_end = self._pending() if done else None
        self.n_images = 0
        self.began = self.train_end = time.perf_counter()

    def on_backward_end(self, batch_number: int) -> None:
        self.lr = self.model.optimizer.param_groups[0]["lr"]  # of this step; schedules come after

    def on_train_batch_end(self, batch_number: int, logs: dict[str, Any]) -> None:
        self.step += 1
        self.total_steps += 1
        self.n_images += logs["size"]
        self.run.beat(self.total_steps)
        last = self.step == self.batches.n_batches
        if last or self.step % self.log_every == 0:
            self._read_losses()
        if last:
            self.train_end = time.perf_counter()
            self.at_train_end = self._pending()
        if self.stop.signal:
            self._commit_and_stop()

    def on_valid_batch_end(self, batch_number: int, logs: dict[str, Any]) -> None:
        self.run.beat(self.total_steps)
        if self.stop.signal:
            self._commit_and_stop()

    def on_epoch_end(self, epoch_number: int, logs: dict[str, Any]) -> None:
        seconds = max(self.train_end - self.began, 1e-9)
        values = {key: float(value) for key, value in logs.items() if key not in ("epoch", "time")}
        row = {
            "epoch": epoch_number,
            "time": logs["time"],
            "lr": self.lr,
            **values,
            "images_per_s": self.n_images / seconds,
            "data_wait": self.batches.waited / seconds,
        }
        value = row[self.monitor]
        best = self.best["value"]
        if best is None or math.isnan(best) or self.sign * value > self.sign * best:
            self.best = {"epoch": epoch_number, "value": value}
        self.history.append(row)
        self.step = 0
        self._commit(epoch_number, pending=self._pending())
        logs.clear()
        logs.update(row)  # for those that stand behind
        self.follow()

    def follow(self) -> None:
        """Writes what follows from the last commit: history.csv, best.pt."""
        if not self.history:
            return
        self.run.write_history(self.history)
        path = self.run.path / "best.pt"
        if self.step == 0 and self.best["epoch"] == self.history[-1]["epoch"]:
            network = self.state["network"] if self.state else self.model.network.state_dict()
            write_checkpoint(path, {"epoch": self.best["epoch"], "network": network})

    def _read_losses(self) -> None:
        """Looks for the first loss that is not finite, and gives TensorBoard the mean."""
        losses = self.model.loss.read(self.read_until)
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = self.read_until + int(bad[0]) + 1
            raise NonFinite(
                f"the loss is {losses[bad[0]].item()} at epoch {self.epoch}, step {step}: try a "
                "lower learning rate, or training_loop.detect_anomaly=True"
            )
        self.read_until = self.step
        if self.tensorboard and len(losses):
            self.tensorboard.add_loss(self.total_steps, float(losses.mean()))

    def _pending(self) -> dict[str, Any]:
        """What an epoch under way has gathered, and the random numbers' state."""
        return {"loss": self.model.loss.pending(), "metrics": self.model.metrics.pending(), "rng": get_rng()}

    def _commit_and_stop(self) -> None:
        # During validation the sums are those of the valid split: take what the training left.
        pending = self.at_train_end or self._pending()
        if not pending["loss"]["values"].isfinite().all():
            self._read_losses()
        self._commit(self.epoch - 1, pending)
        raise Stopped(self.stop.signal)

    def _commit(self, epoch: int, pending: Mapping[str, Any]) -> None:
        trainer = self.model
        if not torch.stack([p.isfinite().all() for p in trainer.network.parameters()]).all():
            raise NonFinite(
                f"the weights are no longer finite at epoch {self.epoch}: try a lower learning "
                "rate, or training_loop.detect_anomaly=True"
            )
        self.run.commit(
            {
                "epoch": epoch,
                "step": self.step,
                "total_steps": self.total_steps,
                "lr": self.lr,
                "network": trainer.network.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "callbacks": [plain(external.state_dict(c)) for c in self.callbacks],
                "history": self.history,
                "best": self.best,
                "stopped": trainer.stop_training,
                **pending,
            }
        )


def get_rng() -> dict[str, Any]:
    """The state of all generators of random numbers."""
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
    }


def set_rng(state: Mapping[str, Any]) -> None:
    """Puts back what `get_rng` returned; a run may go on with another number of GPUs."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def plain(value: Any) -> Any:
    """numpy's numbers as Python's: the checkpoint holds no class that needs code to load."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value
