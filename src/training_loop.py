"""The training loop: builds what gin configured, trains it by Poutyne, commits, and can go on.

Read it from the top: what a run can be told, what is done with it, the step, the commits. Poutyne appears here and in
callbacks/ only.
"""

import copy
import hashlib
import inspect
import math
import os
import random
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import gin
import numpy as np
import torch
from torch import Tensor, nn

import src.models.torchvision_models  # noqa: F401  (registers the models)
from src.callbacks import external, poutyne
from src.callbacks.profile import profile
from src.callbacks.progress import Progress
from src.callbacks.tensorboard import TensorBoard
from src.config import Failed, Refused, check, nearest
from src.data.dataset import Batches, Data
from src.distributed import GlobalBatch, Team, unreached_draws
from src.metrics import Accuracy, Sums
from src.models.summary import summarise
from src.run import Run, read_checkpoint
from src.stop import Stopped, StopRequest

Built = TypeVar("Built")
BUCKET_MB = 25  # of gradients that DistributedDataParallel sums at once
ADVICE = "try a lower learning rate, or training_loop.detect_anomaly=True"
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("n_epochs", "batch_size", "accumulate", "log_every", "steps_per_epoch", "stop_at"), (1, math.inf)),
    "n_workers": (0, math.inf), "seed": (0, 2**63 - 1), "ema_decay": (0, 1), "clip_norm": (1e-9, math.inf),
}  # fmt: skip


@gin.register("training_loop", denylist=["run", "stop", "team"])
@dataclass(eq=False)
class TrainingLoop:
    """What a run can be told; `train` does it."""

    run: Run  # its folder
    stop: StopRequest  # the signals that ask for a stop
    team: Team  # the processes that torchrun has started
    # What builds the parts, uncalled: the loop seeds, then builds. It supplies input_shape and n_classes, the
    # optimizer's params, and parameters to callbacks that ask for them.
    data: Callable[..., Data]
    model: Callable[..., nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    trainer: Callable[..., poutyne.Model] | None = None  # a subclass of Trainer with a step of its own
    loss: Callable[..., nn.Module] = nn.CrossEntropyLoss
    metrics: Sequence[Callable[..., nn.Module]] = (Accuracy,)
    callbacks: Sequence[Callable[..., poutyne.Callback]] = ()
    n_epochs: int = 1  # the run ends after this epoch; it may be raised later with reload=True
    batch_size: int = 128  # images a batch, of all processes together; the last one of an epoch may be smaller
    accumulate: int = 1  # batches an optimizer step; their gradients make the mean over all their images
    clip_norm: float | None = None  # the largest norm of all gradients together; larger ones are scaled down to it
    # 0.999, say: validation, best.pt and the test take an exponential moving average of the weights over the steps
    # (Polyak and Juditsky 1992), with the last step's buffers. At step n the decay is at most
    # (1 + n) / (10 + n), as in TensorFlow, so that the random weights of the beginning are forgotten.
    ema_decay: float | None = None
    # 'bf16': the forward in bfloat16 where autocast does; weights and loss stay in fp32. 'fp64': for checks.
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    compile: bool = False  # torch.compile; it pays on a GPU, and takes a minute at the start
    channels_last: bool = True  # memory format of images and their network: faster convolutions
    fused: bool = True  # the optimizer's fused form where torch has one for the device
    seed: int = 0  # of the weights, the order of the data, its augmentation and dropout
    monitor: str = "val_acc"  # the column of history.csv whose largest or smallest value is the best epoch
    monitor_mode: Literal["min", "max"] = "max"
    device: str = "auto"  # 'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1', 'mps'
    deterministic: bool = False  # deterministic algorithms, for the same bits on a GPU
    reload: bool = False  # goes on from the last commit if there is one
    accept_changes: bool = False  # goes on with settings or data that change the result; the record keeps both
    commit_every: int | str | None = None  # commits inside an epoch, too: 500 (batches) or '10min'
    init_from: str | None = None  # a run's folder: starts from its best weights
    log_every: int = 50  # batches between two looks at the loss; the device is not waited for in between
    steps_per_epoch: int | None = None  # fewer batches an epoch, for debugging; also of validation
    stop_at: int | None = None  # stops at so many batches in all, or the next one, committed, as a signal would
    n_workers: int | None = None  # processes that read data which are streamed; None: one for each core, 0: none
    sync_batch_norm: bool = True  # of several processes: mean and variance over the rows of all, as a single one has
    detect_anomaly: bool = False  # torch's anomaly detection: names the operation behind a NaN. Slow.

    def train(self) -> Data:
        """Trains the model into the run's folder and returns the data.

        All is built and tried on one batch in memory first; a mistake leaves no trace. Raises Refused if something
        does not fit, Stopped if a signal or stop_at asked for it, Failed if loss or weights are no longer finite.
        """
        run, stop, team = self.run, self.stop, self.team
        for name, (least, most) in LIMITS.items():
            if (value := getattr(self, name)) is not None and not least <= value <= most:
                limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise Refused(f"training_loop.{name} = {value}, but it must be {limits}")
        self.commit_steps, self.commit_seconds = read_interval(self.commit_every)
        self.place = find_device(self.device)
        team.start(self.place)

        # The data, and whether the folder holds a run of them, with these settings, to go on with.
        data = self.dataset = self._fetch()
        n = len(data.train)
        if not team.size <= self.batch_size <= n:
            expected = f"{data.name} has {n} images to train on: give {team.size} to {n}"
            raise Refused(f"training_loop.batch_size = {self.batch_size}, but {expected}")
        if data.choice is not None:
            run.config = run.config.choose("data", data.choice)
        sizes = {"n_train": n, "n_valid": len(data.valid), "n_test": len(data.test), "n_classes": data.n_classes}
        if empty := [split for split in ("n_valid", "n_test") if not sizes[split]]:
            raise Refused(f"{data.name}: {empty[0]} is 0: let each split have some")
        about = {"name": data.name, "fingerprint": data.fingerprint, "input_shape": list(data.input_shape), **sizes}
        state = run.last_commit()
        run.refuse_changes(about, state, accept=self.accept_changes)
        is_pruned, state, run.changed = team.share((run.is_pruned, state, run.changed))
        if is_pruned:
            print(f"{run.path}: is finished, nothing is left to train")
            team.end()
            return data

        # All parts, tried in memory.
        self._set_torch()
        trainer = build(self.trainer or Trainer, Trainer, loop=self)
        callbacks = build_callbacks(trainer)
        print(try_one_batch(trainer))
        if team.size > 1:
            warn_of_other_numbers(trainer)
        model_name = run.config.flat()["training_loop.model"][1:]
        facts = {"data": about, "model": model_name, "parameters": sum(p.numel() for p in trainer.parameters)}
        facts |= {"seed": self.seed, "monitor": self.monitor, "monitor_mode": self.monitor_mode}
        if self.init_from and not state:
            facts["init_from"] = start_from(self.init_from, trainer)
        if state:
            with refusing(f"{run.path}: the run's last commit does not fit the settings as they are now"):
                trainer.restore(state)

        # From here on the folder is the run's.
        with stop.deferred():
            run.open()
            team.share(None)  # the others wait until the folder is there
            start = {"device": str(self.place), "threads": torch.get_num_threads(), "processes": team.size}
            run.record(state, facts, start)
            stop.signal = max(team.collect(stop.signal))
        stop.raise_if_asked()

        # Trained, unless it is done.
        at = Position(**{key: state[key] for key in vars(Position())}) if state else Position()
        at.stopped &= not run.changed
        if {"training_loop.monitor", "training_loop.monitor_mode"} & run.changed.keys():
            value = at.history[at.best["epoch"] - 1].get(self.monitor) if at.best["epoch"] else None
            at.best["value"] = value  # of the weights that best.pt holds
        first, n_epochs = at.epoch + 1, at.epoch if at.stopped else max(self.n_epochs, at.epoch)
        left = f"epoch {first} to {n_epochs}" if first <= n_epochs else "nothing is left to train"
        print(f"{run.path}: {model_name} on {data.name} ({n} images), {self.place}, {left}")
        if first <= n_epochs:
            run.unfinish()
        tensorboard = None
        if team.part.rank == 0:
            shown = {key: value for key, value in run.config.flat().items() if key in run.settings.bindings}
            tensorboard = TensorBoard(run.path, at.history, run.config.text(), shown)
        called = [*callbacks, Commits(self, trainer, callbacks, tensorboard, at, state)]
        if tensorboard:  # what stands behind the commits sees committed epochs only
            called += [tensorboard, Progress(run.output.terminal, trainer.batches)]
        if run.profile:
            called.append(profile(run.path / "profile.json"))
        with stop.deferred():
            trainer.fit_generator(
                trainer.batches, trainer.valid, epochs=n_epochs, initial_epoch=first, verbose=False, callbacks=called
            )
        stop.signal = max(team.collect(stop.signal))
        stop.raise_if_asked()  # what is left may take long
        team.end()
        if tensorboard:
            tensorboard.finish(at.history[-1])
        return data

    def _fetch(self) -> Data:
        """The data, which are the same for all processes; the first one downloads what is missing."""
        data = build(self.data, Data) if self.team.part.rank == 0 else None
        fingerprint = self.team.share(data and data.fingerprint)
        data = data or build(self.data, Data)
        if data.fingerprint != fingerprint:
            raise Refused(f"{data.name} is not the same here, for rank {self.team.part.rank}, as for rank 0")
        return data

    def _set_torch(self) -> None:
        """Torch's switches and all seeds, those of Python and numpy for models and callbacks that use them."""
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cudnn.benchmark = not self.deterministic
        torch.autograd.set_detect_anomaly(self.detect_anomaly)
        torch.manual_seed(self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)


# --- what is built, and tried in memory -----------------------------------------------------------


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Errors that settings lead to become Refused: `what: the error (file:line)`, where the last code of ours is."""
    try:
        yield
    except Refused as refusal:
        raise Refused(refusal.message) from None  # without what gin adds
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, ImportError, AssertionError) as error:
        place = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename][-1]
        said = str(error).partition("\n  In call to configurable")[0]  # by gin
        raise Refused(f"{what}: {said} ({place.filename}:{place.lineno})") from None


def build(builder: Callable[..., Any], kind: type[Built], **supplied: Any) -> Built:
    """Calls the builder with the supplied arguments that it takes. Raises Refused for an error, another kind."""
    parameters = inspect.signature(builder.__init__ if inspect.isclass(builder) else builder).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    with refusing(builder.__name__):
        built = builder(**{k: v for k, v in supplied.items() if takes_all or k in parameters})
        if not isinstance(built, kind):
            raise TypeError(f"gives a {type(built).__name__}, but here it must be a {kind.__name__}")
        return built


def build_optimizer(
    optimizer: Callable[..., torch.optim.Optimizer], parameters: Sequence[nn.Parameter], fused: bool
) -> torch.optim.Optimizer:
    """The optimizer, in its fused form if that is wanted, not bound otherwise, and to be had on the device."""
    built = build(optimizer, torch.optim.Optimizer, params=parameters)
    if fused and built.defaults.get("fused", False) is None and not built.defaults.get("foreach"):
        with suppress(RuntimeError, TypeError, ValueError):  # not on this device, with these settings, or at all
            built = optimizer(params=parameters, fused=True)
    return built


def memory_format_of(data: Data, channels_last: bool) -> torch.memory_format:
    """That of the network and its batches: channels_last, if it is wanted, for images alone."""
    return torch.channels_last if channels_last and len(data.input_shape) == 3 else torch.contiguous_format


def read_interval(commit_every: int | str | None) -> tuple[int | None, float | None]:
    """commit_every as batches and seconds, at most one of them not None. Raises Refused."""
    minutes = re.fullmatch(r"(\d*\.?\d+) ?min", str(commit_every))
    if minutes and float(minutes[1]) > 0:
        return None, 60 * float(minutes[1])
    if commit_every is not None and not (isinstance(commit_every, int) and commit_every >= 1):
        advice = "give batches, such as 500, or minutes, such as '10min'"
        raise Refused(f"training_loop.commit_every = {commit_every!r}: {advice}")
    return commit_every, None


def find_device(name: str) -> torch.device:
    """The device, or Refused. 'auto' is cuda, then mps, then cpu; of several processes each has a GPU of its own."""
    n_processes, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()  # on this machine
    if name == "auto":
        name = "cuda" if n_gpus else "mps" if torch.backends.mps.is_available() and n_processes == 1 else "cpu"
    if n_processes > 1 and name.startswith("cuda"):
        if name != "cuda" or n_processes > n_gpus:
            raise Refused(f"training_loop.device = {name!r}: {n_processes} processes need a GPU each of {n_gpus} here")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with refusing(f"training_loop.device = {name!r}: cannot be used here"):
        return torch.empty(0, device=name).device


def build_callbacks(trainer: "Trainer") -> list[poutyne.Callback]:
    """The callbacks. Raises Refused if one, or the loop, watches what is no column of history.csv, if one does not say
    what it remembers, or is a scheduler that refuses its settings.
    """
    loop, columns = trainer.loop, [p + name for p in ("", "val_") for name in ("loss", *trainer.sums.names)]
    callbacks = [build(callback, poutyne.Callback, parameters=trainer.parameters) for callback in loop.callbacks]
    monitors = [(type(c).__name__, c.monitor) for c in callbacks if hasattr(c, "monitor")]
    for owner, name in [("training_loop", loop.monitor), *monitors]:
        if name not in columns:
            advice = f"{nearest(name, columns)}: there are {', '.join(columns)}"
            raise Refused(f"{owner}.monitor = {name!r} is no metric{advice}")
    for callback in callbacks:
        external.state_dict(callback)
        if hasattr(callback, "torch_lr_scheduler"):
            with refusing(type(callback).__name__):  # it changes the learning rate of an optimizer to throw away
                other = build(loop.optimizer, torch.optim.Optimizer, params=[nn.Parameter(torch.zeros(1))])
                callback.torch_lr_scheduler(other, *callback.args, **callback.kwargs)
    return callbacks


def try_one_batch(trainer: "Trainer") -> str:
    """One forward of one batch in eval mode, with the random numbers put back; gives the summary.

    Raises Refused if the network does not take the data, or its output does not fit loss or metrics.
    """
    network, batches, loop = trainer.network, trainer.batches, trainer.loop
    x, y = trainer.first_batch()
    name, shape, expected = type(network).__name__, list(x.shape), [len(x), loop.dataset.n_classes]
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), torch.no_grad():
        with refusing(f"{name} does not take a batch of shape {shape}"):
            output, summary = summarise(network, x)
        if not isinstance(output, Tensor):
            raise Refused(f"{name} gives a {type(output).__name__}, but it must be one tensor")
        if not y.is_floating_point() and list(output.shape[:2]) != expected:
            raise Refused(f"{name} gives an output of shape {list(output.shape)}, but it must be {expected}")
        if y.is_floating_point() and y.ndim != output.ndim:  # a loss would broadcast them
            raise Refused(f"{name} gives an output of shape {list(output.shape)} for targets of shape {list(y.shape)}")
        with refusing(f"the loss or a metric does not take {name}'s output"):
            loss = trainer.sums.update(output, y, batches.n_images(0, 1))
            if loss.numel() != 1:
                raise ValueError(f"the loss gives {loss.numel()} numbers, not one")
            trainer.sums.compute()
            trainer.sums.reset()
        n_last = batches.n_images(batches.n_batches - 1, batches.n_batches)
        if n_last < 2 * (1 if loop.sync_batch_norm else trainer.team.size):
            advice = "choose another training_loop.batch_size"  # batch norm cannot normalise a single value
            with refusing(f"the last batch of an epoch would have one image only, {advice}"):
                copy.deepcopy(network).train()(x[:1])
    return summary


def start_from(folder: str, trainer: "Trainer") -> dict[str, Any]:
    """Loads the best weights of another run. Raises Refused without a run or with other shapes."""
    what, best = f"training_loop.init_from = {folder!r}", Path(folder, "best.pt")
    if not best.exists():
        raise Refused(f"{what}: there is no {best}")
    with refusing(what):
        for network in (trainer.network, trainer.shown):
            network.load_state_dict(read_checkpoint(best)["network"])
    return {"run": folder, "sha256": hashlib.sha256(best.read_bytes()).hexdigest()}


def warn_of_other_numbers(trainer: "Trainer") -> None:
    """Warns, for the record, of what makes several processes compute other numbers than one."""
    network, loss, causes = trainer.network, trainer.sums.loss, []
    x, y = trainer.first_batch()
    kind, synced = nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm
    norms = [k for k, m in network.named_modules() if isinstance(m, kind) and not isinstance(m, synced)]
    if norms and not trainer.loop.sync_batch_norm:
        causes.append(f"batch norm takes the rows of each process ({', '.join(norms[:3])}) without sync_batch_norm")
    with torch.no_grad():
        output = copy.deepcopy(network).eval()(x)
        halves = [loss(o, t) * len(t) / len(y) for o, t in zip(output.chunk(2), y.chunk(2), strict=True)]
        if not torch.isclose(loss(output, y), torch.stack(halves).sum(), rtol=1e-3):
            causes.append(f"{type(loss).__name__} is no mean over rows (reduction, weights of classes, pairs)")
    if unreached_draws(network, x):
        how = "by other means than dropout, as stochastic depth and attention do, each process for its rows"
        causes.append(f"{type(network).__name__} draws random numbers {how}")
    for cause in causes:
        trainer.loop.run.warn(f"{cause}: the numbers are not those of a single process")


# --- the step -------------------------------------------------------------------------------------


class Trainer(poutyne.Model):
    """Poutyne's model with a step that never waits for the device, built of what the loop's settings name.

    `updated` says whether the last batch ended in an optimizer step, for callbacks that count them. Of several
    processes each has its rows of a batch; DistributedDataParallel averages the gradients. A project's own step is a
    subclass, registered with gin with denylist=["loop"], that overrides `_fit_batch`.
    """

    def __init__(self, loop: TrainingLoop) -> None:
        self.loop, self.team, data, place = loop, loop.team, loop.dataset, loop.place
        memory_format = memory_format_of(data, loop.channels_last)
        network = build(loop.model, nn.Module, input_shape=data.input_shape, n_classes=data.n_classes)
        network.to(place, torch.float64 if loop.precision == "fp64" else None, memory_format=memory_format)  # type: ignore[call-overload]
        if self.team.size > 1 and loop.sync_batch_norm and place.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        metrics = [build(metric, nn.Module, n_classes=data.n_classes).to(place) for metric in loop.metrics]
        self.sums = Sums(build(loop.loss, nn.Module).to(place), metrics, self.team)
        mean_loss = nn.Module()  # Poutyne asks for it before the metrics, with which it is forgotten
        vars(mean_loss).update(compute=self.sums.mean_loss, reset=lambda: None)
        optimizer = build_optimizer(loop.optimizer, self.parameters, loop.fused)
        super().__init__(network, optimizer, mean_loss, epoch_metrics=[(self.sums.names, self.sums)])
        there = place, memory_format, self.team.part, loop.n_workers
        self.batches = Batches(data.train, loop.batch_size, loop.seed, loop.steps_per_epoch, *there)
        self.valid = Batches(data.valid, loop.batch_size, None, loop.steps_per_epoch, *there)
        self.accumulate, self.clip_norm, self.precision = loop.accumulate, loop.clip_norm, loop.precision
        self.averaged = copy.deepcopy(network).eval() if loop.ema_decay is not None else None
        self.n_averaged = 0  # optimizer steps in the average
        self.shown = network if self.averaged is None else self.averaged  # validated, saved as the best and tested
        self.trained = torch.compile(network) if loop.compile else network
        self.validated = self.trained if self.averaged is None else self.averaged
        if self.team.size > 1:
            parallel = nn.parallel.DistributedDataParallel
            known = inspect.signature(parallel).parameters  # torch 2.14 has renamed it
            buffers: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
            size = sum(p.numel() * p.element_size() for p in network.parameters()) / 2**20
            # Gradients of a small network go in one message: by default the first MB goes ahead alone.
            self.trained = parallel(self.trained, bucket_cap_mb=BUCKET_MB if size < BUCKET_MB else None, **buffers)
            self.global_batch = GlobalBatch(self.team.part, loop.sync_batch_norm)
        self.updated = True

    def first_batch(self) -> tuple[Tensor, Tensor]:
        """Our rows of a batch, x [rows, ...] and y [rows, ...], in order and not augmented."""
        in_order = copy.copy(self.batches)
        in_order.seed = None
        x, y = next(iter(in_order))
        return x.double() if self.precision == "fp64" else x, y

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts back what `Commits` has taken of this object, but for optimizer settings that were changed since."""
        self.network.load_state_dict(state["network"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"] or state["network"])
            self.n_averaged = state["n_averaged"]
        changed, name = self.loop.run.changed, self.loop.run.config.flat()["training_loop.optimizer"][1:]
        anew = r".*(training_loop\.optimizer|\.amsgrad|\.centered|RMSprop\.momentum)"  # its state is another one then
        if not any(re.fullmatch(anew, key) for key in changed):
            self.optimizer.load_state_dict(state["optimizer"])
        defaults = self.optimizer.defaults  # of which the loop sets one: fused
        accepted = {k: v for k, v in defaults.items() if {f"{name}.{k}", f"training_loop.{k}"} & changed.keys()}
        for group in self.optimizer.param_groups:
            base = group.get("initial_lr", group["lr"])  # what schedules start from
            factor = group["lr"] / base if base else 1.0  # where they are
            group.update(accepted)
            if "lr" in accepted:
                group |= {"lr": accepted["lr"] * factor, "initial_lr": accepted["lr"]}
        if state["step"]:
            self.sums.load_pending(state["sums"], self.loop.place)

    @torch.no_grad()
    def _average(self) -> None:
        assert self.averaged is not None and self.loop.ema_decay is not None
        self.n_averaged += 1
        decay = min(self.loop.ema_decay, (1 + self.n_averaged) / (10 + self.n_averaged))
        averages: list[Tensor] = list(self.averaged.parameters())
        torch._foreach_lerp_(averages, list(self.network.parameters()), 1 - decay)
        for old, new in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
            old.copy_(new)

    def _fit_batch(self, x: Any, y: Any, *, callback: Any, step: int, **_: Any) -> tuple[Tensor, tuple[()], None]:
        """One batch of training: forward, loss and metrics, backward and, if it is time, the optimizer's step.

        x, y: our rows of it. Calls callback.on_backward_end(step), and returns the loss, (), None.
        """
        k = self.batches.start + step - 1  # of the epoch; Poutyne counts from where it began
        first = k - k % self.accumulate
        after = min(first + self.accumulate, self.batches.n_batches)
        self.updated = k + 1 == after
        if k == first:
            self.optimizer.zero_grad()
        if self.team.size == 1:
            loss = self._compute_loss_and_metrics(x, y)[0]
            own = self.sums.values[-1]
            if after - first > 1:  # the mean over all images of the optimizer's step
                loss = loss * (len(y) / self.batches.n_images(first, after))
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            summed = nullcontext() if self.updated else self.trained.no_sync()  # type: ignore[attr-defined]
            with self.global_batch.of(self.batches.n), summed:
                loss = self._compute_loss_and_metrics(x, y)[0]
                own = loss.detach()
                loss = loss * (len(y) * self.team.size / self.batches.n_images(first, after))
                loss.backward()  # type: ignore[no-untyped-call]
        callback.on_backward_end(step)
        if self.updated:
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
            self.optimizer.step()
            if self.averaged is not None:
                self._average()
        return own, (), None

    def _compute_loss_and_metrics(self, x: Any, y: Any, **_: Any) -> tuple[Tensor, tuple[()], None]:
        network, n = (self.trained, self.batches.n) if self.network.training else (self.validated, self.valid.n)
        return self.sums.update(forward(network, x, self.precision), y, n), (), None


def forward(network: Callable[[Tensor], Tensor], x: Tensor, precision: str) -> Tensor:
    """The network's output [B, ...] for a batch x [B, ...], as training_loop.precision says."""
    if precision == "bf16":
        with torch.autocast(x.device.type, torch.bfloat16):
            return network(x).float()
    return network(x.double() if precision == "fp64" else x)


# --- commits --------------------------------------------------------------------------------------


@dataclass
class Position:
    """Where a run is: what a commit holds beside tensors."""

    epoch: int = 0  # the last one that is done
    step: int = 0  # batches of the next one that are done
    total_steps: int = 0  # batches of all epochs
    lr: float = 0.0  # of the last step
    seconds: float = 0.0  # that starts before took for the next epoch
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=lambda: {"epoch": 0, "value": None})
    stopped: bool = False  # by a callback: nothing is left to train


@dataclass(eq=False)
class Commits(poutyne.Callback):
    """Puts the last commit back when training begins; commits at the end of each epoch, when it is time to inside one,
    and when a signal asks for a stop; checks that the loss is finite.
    """

    loop: TrainingLoop
    trainer: Trainer
    callbacks: Sequence[poutyne.Callback]
    tensorboard: TensorBoard | None
    at: Position
    state: dict[str, Any] | None  # the last commit, until it is gone on from
    due_time: float | None = None  # of the next commit inside an epoch

    def __post_init__(self) -> None:
        super().__init__()
        loop = self.loop
        self.run, self.stop, self.team, self.log_every = loop.run, loop.stop, loop.team, loop.log_every
        self.stop_at = loop.stop_at or math.inf
        self.commit_s = 0.0
        self._plan()

    def on_train_begin(self, logs: dict[str, Any]) -> None:
        # Only now: schedulers are made when training begins, and set the learning rate then.
        if self.at.step == 0:
            self._go_on()
        self._follow()

    def on_epoch_begin(self, epoch_number: int, logs: dict[str, Any]) -> None:
        at, batches = self.at, self.trainer.batches
        self._go_on()  # inside an epoch only now: the others were told that it begins
        batches.begin(epoch_number, at.step)
        self.logged = at.step - at.step % self.log_every
        self.at_train_end = self._pending() if at.step >= batches.n_batches else None
        self.seconds_before = at.seconds
        self.began = self.train_end = time.perf_counter()

    def _go_on(self) -> None:
        """Puts back the last commit, if that was not done yet."""
        if self.state is None:
            return
        state, self.state = self.state, None
        self.trainer.restore(state)
        for callback in self.callbacks:  # the list may be an accepted change
            for k, (name, saved) in enumerate(state["callbacks"]):
                if name == type(callback).__name__:
                    external.load_state_dict(callback, saved)
                    del state["callbacks"][k]
                    break
        rngs = state["rngs"]  # they differ where each process draws for its rows alone
        set_rng(rngs[self.team.part.rank] if len(rngs) == self.team.size else rngs[0], self.loop.place)
        if self.run.changed:  # from now on a commit holds the accepted settings
            self._commit(self._pending())
            self.run.write_settings()

    def on_backward_end(self, batch_number: int) -> None:
        self.at.lr = self.trainer.optimizer.param_groups[0]["lr"]  # of this step; schedules come after

    def on_train_batch_end(self, batch_number: int, logs: dict[str, Any]) -> None:
        at = self.at
        at.step += 1
        at.total_steps += 1
        self.run.beat(at.total_steps)
        is_last = at.step == self.trainer.batches.n_batches
        if is_last or at.step % self.log_every == 0:
            losses, self.logged = self._losses()[self.logged :], at.step
            if self.tensorboard:
                self.tensorboard.add("step", {"loss": float(losses.mean())}, at.total_steps)
        if is_last:
            self.train_end = time.perf_counter()
            # Without sync_batch_norm each process has its own.
            networks = dict.fromkeys((self.trainer.network, self.trainer.shown))
            self.team.copy_first([buffer for network in networks for buffer in network.buffers()])
            self.trainer.sums.feed()
            self.at_train_end = self._pending()
        if self.trainer.updated:  # never inside an accumulation
            self._commit_if_due()

    def on_valid_batch_end(self, batch_number: int, logs: dict[str, Any]) -> None:
        self.run.beat(self.at.total_steps)
        self._commit_if_due()

    def on_epoch_end(self, epoch_number: int, logs: dict[str, Any]) -> None:
        at, batches, seconds = self.at, self.trainer.batches, max(self.train_end - self.began, 1e-9)
        row = {
            "epoch": epoch_number,
            "time": logs["time"] + self.seconds_before,
            "lr": at.lr,
            **{key: float(value) for key, value in logs.items() if key not in ("epoch", "time")},
            "images_per_s": max(batches.n_images(batches.start, at.step), 0) / seconds,
            "data_wait": batches.waited / seconds,
            "commit_s": self.commit_s,
            "valid_s": time.perf_counter() - self.train_end,
            "peak_mb": peak_memory(self.loop.place),
        }
        value, best = row[self.loop.monitor], at.best["value"]
        if best is None or math.isnan(best) or (value > best if self.loop.monitor_mode == "max" else value < best):
            at.best = {"epoch": epoch_number, "value": value}
        at.history.append(row)
        self.trainer.stop_training = self.team.share(self.trainer.stop_training)
        at.epoch, at.step, at.seconds, at.stopped = epoch_number, 0, 0.0, self.trainer.stop_training
        self.commit_s = 0.0  # this epoch's own commit stands in the next row
        self._commit(self._pending())
        self._follow()
        logs.clear()
        logs.update(row)  # for those that stand behind

    def _follow(self) -> None:
        """Writes what follows from a commit: history.csv, best.pt."""
        at, began = self.at, time.perf_counter()
        if at.history:
            self.run.write_history(at.history)
            if at.step == 0 and at.best["epoch"] == at.epoch:
                self.run.write_best({"epoch": at.epoch, "network": self.trainer.shown.state_dict()})
        self.commit_s += time.perf_counter() - began

    def _losses(self) -> Tensor:
        """The epoch's losses [steps], on the CPU. Raises Failed at the first that is not finite."""
        losses = self.trainer.sums.losses()
        if len(bad := (~losses.isfinite()).nonzero()):
            step = int(bad[0])
            raise Failed(f"the loss is {losses[step].item()} at epoch {self.at.epoch + 1}, step {step + 1}: {ADVICE}")
        return losses

    def _pending(self) -> dict[str, Any]:
        """What an epoch under way has gathered, and our random numbers' state: a commit collects those of all."""
        self._losses()  # all finite
        return {"sums": self.trainer.sums.pending(), "rng": get_rng(self.loop.place)}

    def _commit_if_due(self) -> None:
        at = self.at
        is_due = self.due_time is not None and time.monotonic() > self.due_time
        if is_due:
            self.due_time = None  # asked for once; the commit plans the next
        signal, rank, is_due = self.team.agree(self.stop.signal, is_due)
        is_stop = signal or at.total_steps >= self.stop_at
        if is_stop or is_due or at.total_steps >= self.due_step:
            at.seconds = self.seconds_before + time.perf_counter() - self.began
            # During validation the sums are those of the valid split: take what the training left.
            self._commit(self.at_train_end or self._pending())
        if is_stop:
            sent = f", sent to rank {rank}," if signal and self.team.size > 1 else ""  # whose machine may be going
            place, advice = f"epoch {at.epoch + 1}, after step {at.step}", "go on with training_loop.reload=True"
            where = f"{sent} in {place}; all is saved: {advice}"
            self.stop.signal = signal
            self.stop.raise_if_asked(where)
            raise Stopped(f"stopped by stop_at{where}", 0)

    def _commit(self, pending: Mapping[str, Any]) -> None:
        began, trainer = time.perf_counter(), self.trainer
        if not torch.stack([p.isfinite().all() for p in trainer.network.parameters()]).all():
            raise Failed(f"the weights are no longer finite at epoch {self.at.epoch + bool(self.at.step)}: {ADVICE}")
        self.run.commit(
            {
                **vars(self.at),
                "network": trainer.network.state_dict(),
                "averaged": trainer.averaged.state_dict() if trainer.averaged is not None else {},
                "n_averaged": trainer.n_averaged,
                "optimizer": trainer.optimizer.state_dict(),
                "callbacks": [[type(c).__name__, plain(external.state_dict(c))] for c in self.callbacks],
                "sums": pending["sums"],
                "rngs": self.team.collect(pending["rng"]),
            }
        )
        self._plan()
        self.commit_s += time.perf_counter() - began

    def _plan(self) -> None:
        """When the next commit inside an epoch is due: at a step, or at a time by the first process's clock."""
        steps, seconds = self.loop.commit_steps, self.loop.commit_seconds
        self.due_step = self.at.total_steps + (steps or math.inf)
        self.due_time = time.monotonic() + seconds if seconds and self.team.part.rank == 0 else None


def peak_memory(device: torch.device) -> float:
    """In MB, since the start: of the GPU if the device is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def get_rng(device: torch.device) -> dict[str, Any]:
    """The state of all generators of random numbers, that of the device too."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    numpy = plain(np.random.get_state())
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": numpy}


def set_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts back what `get_rng` returned; a run may go on with another device."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's: the checkpoint holds no class that needs code to load."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


# --- names ----------------------------------------------------------------------------------------

# The second is for sparse gradients, the third calls the forward itself, several times a step.
not_offered = (torch.optim.Optimizer, torch.optim.SparseAdam, torch.optim.LBFGS)
for part in vars(torch.optim).values():
    if inspect.isclass(part) and issubclass(part, torch.optim.Optimizer) and part not in not_offered:
        gin.external_configurable(part, module="torch.optim", denylist=["params"])
for name, part in vars(nn).items():
    if name.endswith("Loss"):
        gin.external_configurable(part, module="torch.nn")

configure = check  # settings are checked against all that has a name by now
