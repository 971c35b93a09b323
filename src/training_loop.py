"""The training loop: builds what gin configured, trains it by Poutyne, commits, and can go on.

Read from `training_loop` down. Poutyne appears here and in callbacks/ only.
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
from typing import Any, Literal, NoReturn

import gin
import numpy as np
import torch
from torch import Tensor, nn

import src.models.torchvision_models  # noqa: F401  (registers the models)
from src.callbacks import WarmupCosine, external, poutyne
from src.callbacks.profile import Profile
from src.callbacks.progress import Progress
from src.callbacks.tensorboard import TensorBoard
from src.config import LOOP_SUPPLIES, Config, Failed, Refused, Settings, check, nearest
from src.data.dataset import Batches, Data
from src.distributed import GlobalBatch, Team, norms_of_one_process, unreached_draws
from src.metrics import Accuracy, LossList, MetricList
from src.models.summary import summarise
from src.run import Run, Shadow, read_checkpoint
from src.stop import Stopped, StopRequest

BUCKET_MB = 25  # of gradients that DistributedDataParallel sums at once


# Over 100 lines, half of them settings: the one list of what a run can be told, then all that it does, in order.
@gin.register(denylist=["run", "stop", "team"])
def training_loop(
    run: Run | Shadow,  # its folder
    stop: StopRequest,  # the signals that ask for a stop
    team: Team,  # the processes that torchrun has started
    # What builds the parts, uncalled: the loop seeds, then builds. It supplies input_shape and n_classes, the
    # optimizer's params, and parameters to callbacks that ask for them.
    data: Callable[..., Data],
    model: Callable[..., nn.Module],
    optimizer: Callable[..., torch.optim.Optimizer],
    trainer: Callable[..., poutyne.Model] | None = None,  # a subclass of Trainer with a step of its own
    loss: Callable[..., nn.Module] = nn.CrossEntropyLoss,
    metrics: Sequence[Callable[..., nn.Module]] = (Accuracy,),
    callbacks: Sequence[Callable[..., poutyne.Callback]] = (),
    n_epochs: int = 1,  # the run ends after this epoch; it may be raised later with reload=True
    batch_size: int = 128,  # images a batch, of all processes together; the last one of an epoch may be smaller
    accumulate: int = 1,  # batches an optimizer step; their gradients make the mean over all their images
    clip_norm: float | None = None,  # the largest norm of all gradients together; larger ones are scaled down to it
    # 0.999, say: validation, best.pt and the test take an exponential moving average of the weights over the steps
    # (Polyak and Juditsky 1992), with the last step's buffers. In the first n steps the decay is at most
    # (1 + n) / (10 + n), as in TensorFlow, so that the random weights of the beginning are forgotten.
    ema_decay: float | None = None,
    # 'bf16': the forward in bfloat16 where autocast does; weights and loss stay in fp32. 'fp64': for checks.
    precision: Literal["fp32", "bf16", "fp64"] = "fp32",
    compile: bool = False,  # torch.compile; it pays on a GPU, and takes a minute at the start
    channels_last: bool = True,  # memory format of images and their network: faster convolutions
    fused: bool = True,  # the optimizer's fused form where torch has one for the device
    seed: int = 0,  # of the weights, the order of the data, its augmentation and dropout
    monitor: str = "val_acc",  # the column of history.csv whose largest or smallest value is the best epoch
    monitor_mode: Literal["min", "max"] = "max",
    device: str = "auto",  # 'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1', 'mps'
    deterministic: bool = False,  # deterministic algorithms, for the same bits on a GPU
    reload: bool = False,  # goes on from the last commit if there is one
    accept_changes: bool = False,  # goes on with settings or data that change the result; the record keeps both
    commit_every: int | str | None = None,  # commits inside an epoch, too: 500 (batches) or '10min'
    init_from: str | None = None,  # a run's folder: starts from its best weights
    log_every: int = 50,  # batches between two looks at the loss; the device is not waited for in between
    steps_per_epoch: int | None = None,  # fewer batches an epoch, for debugging; also of validation
    stop_at: int | None = None,  # stops after so many batches in all, committed, as a signal would
    n_workers: int | None = None,  # processes that read data which are streamed; None: one for each core, 0: none
    sync_batch_norm: bool = True,  # of several processes: mean and variance over the rows of all, as a single one has
    detect_anomaly: bool = False,  # torch's anomaly detection: names the operation behind a NaN. Slow.
) -> Data:
    """Trains `model` on `data` into the run's folder and returns the data.

    Everything is built and tried on one batch in memory first; a mistake leaves no trace.

    Raises:
        Refused: something does not fit; the folder is as it was.
        Stopped: a signal asked for it, or stop_at. The exit code is 128 + signal, or 0.
        Failed: the loss or the weights are no longer finite, or the data can no longer be read.
    """
    # What needs no data: numbers, the device, the other processes.
    counts = {"n_epochs": n_epochs, "batch_size": batch_size, "accumulate": accumulate, "log_every": log_every}
    for name, value in (counts | {"steps_per_epoch": steps_per_epoch, "stop_at": stop_at}).items():
        if value is not None and value < 1:
            raise Refused(f"training_loop.{name} = {value}, but it must be at least 1")
    commit_steps, commit_seconds = read_interval(commit_every)
    place = find_device(device)
    team.start(place)
    set_torch(deterministic, detect_anomaly)

    # The data, and whether the folder holds a run of them, with these settings, to go on with.
    dataset = fetch(data, team)
    if batch_size > (n := len(dataset.train)):
        raise Refused(f"training_loop.batch_size = {batch_size}, but {dataset.name} has only {n} images to train on")
    if batch_size < team.size:
        raise Refused(f"training_loop.batch_size = {batch_size}, but {team.size} processes share it")
    if dataset.choice is not None:
        run.config = run.config.choose("data", dataset.choice)
    about_data = describe(dataset)
    run.refuse_changes(about_data, accept=accept_changes)
    is_pruned, has_commit, run.changed = team.share((run.is_pruned, run.has_commit, run.changed))
    if is_pruned:
        print(f"{run.path}: is finished, nothing is left to train")
        team.end()
        return dataset

    # All parts.
    seed_all(seed)
    network = build(model, input_shape=dataset.input_shape, n_classes=dataset.n_classes)
    memory_format = memory_format_of(dataset, channels_last)
    network.to(place, torch.float64 if precision == "fp64" else None, memory_format=memory_format)
    if team.size > 1 and sync_batch_norm and place.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    trainable = [p for p in network.parameters() if p.requires_grad]
    there = place, memory_format, team.part, n_workers
    train = Batches(dataset.train, batch_size, seed, steps_per_epoch, *there)
    valid = Batches(dataset.valid, batch_size, None, steps_per_epoch, *there)
    losses = LossList(build(loss).to(place), team)
    metric_list = MetricList([build(m, n_classes=dataset.n_classes).to(place) for m in metrics], team)
    parts = Parts(
        network, build_optimizer(optimizer, trainable, fused), losses, metric_list, train, valid, team,
        accumulate, clip_norm, ema_decay, precision, compile, sync_batch_norm,
    )  # fmt: skip
    stepper: Trainer = build(trainer or Trainer, parts=parts)
    built_callbacks = [build(callback, parameters=trainable) for callback in callbacks]

    # They are tried, in memory.
    refuse_unknown_monitors(monitor, built_callbacks, metric_list.names)
    n_steps = n_epochs * math.ceil(train.n_batches / accumulate)
    for callback in built_callbacks:
        external.try_callback(callback, build(optimizer, params=[nn.Parameter(torch.zeros(1))]))
        if isinstance(callback, WarmupCosine) and callback.total_steps < n_steps:
            steps = f"{n_epochs} epochs have {n_steps} optimizer steps"
            rest = f"in the rest the learning rate stays at {callback.final:g} of the optimizer's"
            run.warn(f"WarmupCosine.total_steps = {callback.total_steps}, but {steps}: {rest}")
    print(try_one_batch(stepper, dataset.n_classes))
    if team.size > 1:
        warn_of_other_numbers(run, stepper)
    model_name = run.config.flat()["training_loop.model"][1:]
    facts = {"data": about_data, "model": model_name, "parameters": sum(p.numel() for p in trainable)}
    facts |= {"seed": seed, "monitor": monitor, "monitor_mode": monitor_mode}
    if init_from and not has_commit:
        facts["init_from"] = start_from(init_from, network)

    # From here on the folder is the run's.
    with stop.deferred():
        state = team.share(run.open())
        if state:
            refuse_unfit(state, stepper)
        run.record(state, facts, {"device": str(place), "threads": torch.get_num_threads(), "processes": team.size})
    stop.raise_if_asked()
    at = Position.of(state)
    tensorboard = None
    if team.part.rank == 0:
        tensorboard = TensorBoard(run.path, at.history, run.config.text(), hparams(run))
    commits = Commits(
        run, stop, stepper, built_callbacks, tensorboard, at, state,
        monitor, monitor_mode, log_every, stop_at, commit_steps, commit_seconds,
    )  # fmt: skip

    # Trained, unless it is done.
    if state and (at.stopped or at.epoch >= n_epochs):
        commits.follow(state["averaged"] or state["network"])
        print(f"{run.path}: {at.epoch} epochs are done, nothing is left to train")
    else:
        run.unfinish()
        begin = f"on in epoch {at.epoch + 1}, after step {at.step}" if state else f"seed {seed}"
        where = f"{team.size} processes, {place.type}" if team.size > 1 else str(place)
        print(f"{run.path}: {model_name} on {dataset.name} ({len(dataset.train)} images), {where}, {begin}")
        called = [*built_callbacks, commits]  # what stands behind it sees committed epochs only
        if tensorboard:
            called += [tensorboard, Progress(run.output.terminal if run.output else None, train, batch_size)]
        if run.profile:
            called.append(Profile(run.path))
        with stop.deferred():
            stepper.fit_generator(
                train, valid, epochs=n_epochs, initial_epoch=at.epoch + 1, verbose=False, callbacks=called
            )
        stop.signal = max(team.collect(stop.signal))
        stop.raise_if_asked()  # what is left may take long
    team.end()
    if tensorboard:
        tensorboard.finish(at.history[-1])
    return dataset


# --- what is built, and tried ---------------------------------------------------------------------


def build(builder: Callable[..., Any], **supplied: Any) -> Any:
    """Calls the builder with those of the supplied arguments that it takes. Raises Refused for what it refuses."""
    function = builder.__init__ if inspect.isclass(builder) else builder
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    supplies = set(LOOP_SUPPLIES) - set(supplied)
    if missing := [p.name for p in parameters.values() if p.name in supplies and p.default is p.empty]:
        raise Refused(f"{builder.__name__} cannot stand where it does: it needs {missing[0]}, which is not given there")
    with refusing(builder.__name__):
        return builder(**{k: v for k, v in supplied.items() if takes_all or k in parameters})


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Errors that settings lead to become Refused: `what: the error (file:line)`, of our own code if some is in it."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, ImportError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        others = ("src/training_loop.py", "src/models/summary.py")
        ours = [f for f in frames if "site-packages" not in f.filename and not f.filename.endswith(others)]
        place = (ours or frames)[-1]
        said = str(error).partition("\n  In call to configurable")[0]  # by gin
        raise Refused(f"{what}: {said} ({place.filename}:{place.lineno})") from None


def build_optimizer(
    optimizer: Callable[..., torch.optim.Optimizer], parameters: Sequence[nn.Parameter], fused: bool
) -> torch.optim.Optimizer:
    """The optimizer, in its fused form if that is wanted, not bound otherwise, and to be had on the device."""
    built: torch.optim.Optimizer = build(optimizer, params=parameters)
    if fused and built.defaults.get("fused", False) is None and not built.defaults.get("foreach"):
        with suppress(RuntimeError, ValueError):  # not on this device, or not with these settings
            built = optimizer(params=parameters, fused=True)
    return built


def memory_format_of(data: Data, channels_last: bool) -> torch.memory_format:
    """That of the network and its batches: channels_last, if it is wanted, for images alone."""
    return torch.channels_last if channels_last and len(data.input_shape) == 3 else torch.contiguous_format


def read_interval(commit_every: int | str | None) -> tuple[int | None, float | None]:
    """commit_every as batches and seconds, one of them None. Raises Refused."""
    if commit_every is None or (isinstance(commit_every, int) and commit_every >= 1):
        return commit_every, None
    minutes = re.fullmatch(r"(\d*\.?\d+) ?min", str(commit_every))
    if minutes is None or float(minutes[1]) == 0:
        advice = "give batches, such as 500, or minutes, such as '10min'"
        raise Refused(f"training_loop.commit_every = {commit_every!r}: {advice}")
    return None, 60 * float(minutes[1])


def find_device(name: str) -> torch.device:
    """The device, or Refused. 'auto' is cuda, then mps, then cpu; of several processes each has a GPU of its own."""
    n_here, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()  # here: processes
    refusal = f"training_loop.device = {name!r}: cannot be used here"
    if name == "auto":
        mps = torch.backends.mps.is_available() and n_here == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if n_here > 1 and name.startswith("cuda"):
        if name != "cuda" or n_here > n_gpus:
            advice = "give torchrun another --nproc-per-node, or set training_loop.device='cpu'"
            raise Refused(f"{refusal}: {n_here} processes need a GPU each, and {n_gpus} are here: {advice}")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"{refusal}: {str(error).splitlines()[0]}") from None
    return device


def set_torch(deterministic: bool, detect_anomaly: bool) -> None:
    """Torch's switches, as the settings of these names say."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.autograd.set_detect_anomaly(detect_anomaly)


def seed_all(seed: int) -> None:
    """Seeds torch, and Python and numpy for models and callbacks that use them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def fetch(data: Callable[..., Data], team: Team) -> Data:
    """The data. Raises Refused if they are not the same for all processes."""
    fetched = build(data) if team.part.rank == 0 else None
    team.share(None)  # the others wait until what is missing is there
    dataset: Data = fetched or build(data)
    if team.share(dataset.fingerprint) != dataset.fingerprint:
        raise Refused(f"{dataset.name} is not the same here, for rank {team.part.rank}, as for rank 0")
    return dataset


def describe(data: Data) -> dict[str, Any]:
    """The data's part of meta.json."""
    sizes = {"n_train": len(data.train), "n_valid": len(data.valid), "n_test": len(data.test)}
    shape = {"input_shape": list(data.input_shape), "n_classes": data.n_classes}
    return {"name": data.name, "fingerprint": data.fingerprint, **shape, **sizes}


def hparams(run: Run | Shadow) -> dict[str, float | str]:
    """The settings that files and -b give, as TensorBoard's hparams: one value each."""
    given: dict[str, float | str] = {key: v for key, v in run.config.flat().items() if run.settings.binds(key)}
    for key, text in given.items():
        with suppress(ValueError):
            given[key] = float(text)
    return given


def refuse_unknown_monitors(monitor: str, callbacks: Sequence[poutyne.Callback], metrics: Sequence[str]) -> None:
    """Raises Refused if the loop or a callback watches what is no column of history.csv."""
    columns = [prefix + name for prefix in ("", "val_") for name in ("loss", *metrics)]
    monitors = [(type(c).__name__, c.monitor) for c in callbacks if hasattr(c, "monitor")]
    for owner, name in [("training_loop", monitor), *monitors]:
        if name not in columns:
            advice = f"{nearest(name, columns)}: there are {', '.join(columns)}"
            raise Refused(f"{owner}.monitor = {name!r} is no metric{advice}")


def try_one_batch(trainer: "Trainer", n_classes: int) -> str:
    """One forward of one batch in eval mode, with the random numbers put back; gives the summary.

    Raises Refused if the network does not take the data, or its output does not fit loss or metrics.
    """
    network, batches, team = trainer.network, trainer.batches, trainer.team
    x, y = trainer.first_batch()
    name, shape = type(network).__name__, list(x.shape)
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), torch.no_grad():
        with refusing(f"{name} does not take a batch of shape {shape}"):
            output, summary = summarise(network, x)
        if y.is_floating_point():
            if any(isinstance(metric, Accuracy) for metric in trainer.metrics.metrics):
                advice = "set training_loop.metrics to others, or []"
                raise Refused(f"Accuracy needs classes, but the targets are numbers: {advice}")
        elif output.shape[:2] != (len(x), n_classes):
            fit = f"but the data has {n_classes} classes: it must be [{len(x)}, {n_classes}]"
            raise Refused(f"{name} gives an output of shape {list(output.shape)} for a batch of shape {shape}, {fit}")
        with refusing(f"the loss does not take {name}'s output"):
            trainer.loss.function(output, y)
        trainer.metrics.update(output, y, min(batches.batch_size, len(batches.split)))
        for metric, value in trainer.metrics.compute().items():
            if (n := torch.as_tensor(value).numel()) != 1:
                raise Refused(f"the metric {metric} gives {n} numbers: it must be one")
        trainer.metrics.reset()
        n_last = batches.n_images(batches.n_batches - 1, batches.n_batches)
        if n_last == 1 or (n_last // team.size <= 1 and not trainer.sync_batch_norm):
            advice = "choose another training_loop.batch_size"  # batch norm cannot normalise a single value
            with refusing(f"the last batch of an epoch would have one image only, {advice}"):
                copy.deepcopy(network).train()(x[:1])
    return summary


def warn_of_other_numbers(run: Run | Shadow, trainer: "Trainer") -> None:
    """Warns, for the record, of what makes several processes compute other numbers than one."""
    network, loss = trainer.network, trainer.loss.function
    x, y = trainer.first_batch()
    unlike = "the numbers are not those of a single process"
    if (norms := norms_of_one_process(network)) and not trainer.sync_batch_norm:
        run.warn(
            f"batch norm takes the rows of each process ({', '.join(norms[:3])}) without sync_batch_norm: {unlike}"
        )
    with torch.no_grad():
        output = copy.deepcopy(network).eval()(x)
        halves = [loss(o, t) * len(t) / len(y) for o, t in zip(output.chunk(2), y.chunk(2), strict=True)]
        if not torch.isclose(loss(output, y), torch.stack(halves).sum(), rtol=1e-3):
            causes = "reduction, weights of classes, ignore_index, pairs"
            run.warn(f"{type(loss).__name__} is no mean over rows ({causes}): {unlike}")
    if unreached_draws(network, x):
        how = "by other means than dropout, as stochastic depth and attention do"
        run.warn(f"{type(network).__name__} draws random numbers {how}, each process for its rows alone: {unlike}")


def start_from(folder: str, network: nn.Module) -> dict[str, Any]:
    """Loads the best weights of another run. Raises Refused without a run or with other shapes."""
    best = Path(folder) / "best.pt"
    if not best.exists():
        raise Refused(f"training_loop.init_from = {folder!r}: there is no {best}")
    weights = read_checkpoint(best)["network"]
    refuse_other_shapes(weights, network, f"training_loop.init_from = {folder!r}: the weights do not fit the model")
    network.load_state_dict(weights)
    return {"run": folder, "sha256": hashlib.sha256(best.read_bytes()).hexdigest()}


def refuse_other_shapes(weights: Mapping[str, Tensor], network: nn.Module, message: str) -> None:
    """Raises Refused, with the message and the names, if a tensor is missing or has another shape."""
    there, here = ({k: list(v.shape) for k, v in tensors.items()} for tensors in (weights, network.state_dict()))
    unfit = [name for name in here | there if there.get(name) != here.get(name)]
    if unfit:
        lines = [f"{name}: {there.get(name, 'missing')} there, {here.get(name, 'missing')} here" for name in unfit[:8]]
        raise Refused("\n  ".join([f"{message}, by {len(unfit)} tensors:", *lines]))


def refuse_unfit(state: Mapping[str, Any], trainer: "Trainer") -> None:
    """Raises Refused if the commit is of another network, as accepted changes may make it."""
    refuse_other_shapes(state["network"], trainer.network, "the run's weights do not fit the model as it is now")
    before, now = state["optimizer"]["param_groups"], trainer.optimizer.param_groups
    if [len(group["params"]) for group in before] != [len(group["params"]) for group in now]:
        raise Refused("the run trained other parameters than the model gives now to train")


# --- the step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What the loop builds a Trainer from; the last six as in `training_loop`."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    loss: LossList
    metrics: MetricList
    batches: Batches  # of training
    valid: Batches
    team: Team
    accumulate: int
    clip_norm: float | None
    ema_decay: float | None
    precision: str
    compile: bool
    sync_batch_norm: bool


class Trainer(poutyne.Model):
    """Poutyne's model with a step that never waits for the device.

    `updated` says whether the last batch ended in an optimizer step, for callbacks that count them. Of several
    processes each has its rows of a batch; DistributedDataParallel averages the gradients. A project's own step is a
    subclass, registered with gin with denylist=["parts"], that overrides `_fit_batch`.
    """

    def __init__(self, parts: Parts) -> None:
        network, optimizer, metrics, team = parts.network, parts.optimizer, parts.metrics, parts.team
        super().__init__(network, optimizer, parts.loss, epoch_metrics=[(metrics.names, metrics)])
        self.loss, self.metrics, self.team = parts.loss, metrics, team
        self.batches, self.valid = parts.batches, parts.valid
        self.accumulate, self.clip_norm = parts.accumulate, parts.clip_norm
        self.precision, self.ema_decay = parts.precision, parts.ema_decay
        self.sync_batch_norm = parts.sync_batch_norm
        self.averaged = copy.deepcopy(network).eval() if self.ema_decay is not None else None
        self.n_averaged = 0  # optimizer steps in the average
        self.trained = torch.compile(network) if parts.compile else network
        self.validated = self.trained if self.averaged is None else self.averaged
        if team.size > 1:
            parallel = nn.parallel.DistributedDataParallel
            known = inspect.signature(parallel).parameters  # torch 2.14 has renamed it
            buffers: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
            size = sum(p.numel() * p.element_size() for p in network.parameters()) / 2**20
            # Gradients of a small network go in one message: by default the first MB goes ahead alone.
            self.trained = parallel(self.trained, bucket_cap_mb=BUCKET_MB if size < BUCKET_MB else None, **buffers)
            self.global_batch = GlobalBatch(team.part, parts.sync_batch_norm)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.updated = True

    @property
    def shown(self) -> nn.Module:
        """The network that is validated, saved as the best and tested."""
        return self.network if self.averaged is None else self.averaged

    def first_batch(self) -> tuple[Tensor, Tensor]:
        """Our rows of a batch, x [rows, ...] and y [rows, ...], in order and not augmented."""
        in_order = copy.copy(self.batches)
        in_order.seed = None
        x, y = next(iter(in_order))
        return x.double() if self.precision == "fp64" else x, y

    @torch.no_grad()
    def _average(self) -> None:
        assert self.averaged is not None and self.ema_decay is not None
        self.n_averaged += 1
        decay = min(self.ema_decay, (1 + self.n_averaged) / (10 + self.n_averaged))
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
            own = self.loss.values[-1]
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
        n = (self.batches if self.network.training else self.valid).n
        output = self._output(x)
        loss = self.loss.of(output, y, n)
        self.metrics.update(output.detach(), y, n)
        return loss, (), None

    def _output(self, x: Tensor) -> Tensor:
        if self.precision == "fp64":
            x = x.double()
        network = self.trained if self.network.training else self.validated
        if self.precision == "bf16":
            with torch.autocast(x.device.type, torch.bfloat16):
                x = network(x).float()
        else:
            x = network(x)
        return x


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

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> "Position":
        """The position of a commit; the beginning without one."""
        return cls(**{key: state[key] for key in cls.__dataclass_fields__}) if state else cls()


@dataclass(eq=False)
class Commits(poutyne.Callback):
    """Puts the last commit back when training begins; commits at the end of each epoch, when it is time to inside one,
    and when a signal asks for a stop; checks that the loss is finite. The last six fields as in `training_loop`.
    """

    run: Run | Shadow
    stop: StopRequest
    trainer: Trainer
    callbacks: Sequence[poutyne.Callback]
    tensorboard: TensorBoard | None
    at: Position
    state: Mapping[str, Any] | None  # the last commit, until it is gone on from
    monitor: str
    monitor_mode: str
    log_every: int
    stop_at: int | None
    commit_steps: int | None
    commit_seconds: float | None
    stateless = True

    def __post_init__(self) -> None:
        super().__init__()
        self.team, self.device = self.trainer.team, next(self.trainer.network.parameters()).device
        self.commit_s = 0.0

    def on_train_begin(self, logs: dict[str, Any]) -> None:
        # Only now: schedulers are made when training begins, and set the learning rate then.
        if self.state:
            self._restore(self.state)
            self.follow(self.trainer.shown.state_dict())
            if self.run.changed:  # from now on a commit holds the accepted settings
                self._commit(self._pending())
                self.run.write_config()
        self._remember_commit()

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.trainer.network.load_state_dict(state["network"])
        if self.trainer.averaged is not None:
            self.trainer.averaged.load_state_dict(state["averaged"] or state["network"])
            self.trainer.n_averaged = state["n_averaged"]
        if "training_loop.optimizer" not in self.run.changed:  # another one begins anew
            self.trainer.optimizer.load_state_dict(state["optimizer"])
        self._accept_changes(self.trainer.optimizer)
        for callback, (name, saved) in zip(self.callbacks, state["callbacks"], strict=False):
            if name == type(callback).__name__:  # or it is an accepted change
                external.load_state_dict(callback, saved)
        if state["step"]:
            self.trainer.loss.load_pending(state["loss"])
            self.trainer.metrics.load_pending(state["metrics"], self.device)
        rngs = state["rngs"]  # they differ where each process draws for its rows alone
        set_rng(rngs[self.team.part.rank] if len(rngs) == self.team.size else rngs[0], self.device)

    def _accept_changes(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's settings that are new with this start: the commit has brought the old ones."""
        name = self.run.config.flat()["training_loop.optimizer"][1:]
        accepted = {key: value for key, value in optimizer.defaults.items() if f"{name}.{key}" in self.run.changed}
        if "lr" in accepted:
            accepted["initial_lr"] = accepted["lr"]  # what schedules start from
        for group in optimizer.param_groups:
            group.update(accepted)

    def on_epoch_begin(self, epoch_number: int, logs: dict[str, Any]) -> None:
        step = self.at.step
        if self.state and step:  # the others were told that an epoch begins, but this one goes on
            self._restore(self.state)
        self.trainer.batches.begin(epoch_number, step)
        is_done = step >= self.trainer.batches.n_batches
        self.read_until = step if is_done else step - step % self.log_every
        self.at_train_end = self._pending() if is_done else None
        self.state = None
        self.seconds_before = self.at.seconds
        self.began = self.train_end = time.perf_counter()

    def on_backward_end(self, batch_number: int) -> None:
        self.at.lr = self.trainer.optimizer.param_groups[0]["lr"]  # of this step; schedules come after

    def on_train_batch_end(self, batch_number: int, logs: dict[str, Any]) -> None:
        at = self.at
        at.step += 1
        at.total_steps += 1
        self.run.beat(at.total_steps)
        is_last = at.step == self.trainer.batches.n_batches
        if is_last or at.step % self.log_every == 0:
            self._read_losses()
        if is_last:
            self.train_end = time.perf_counter()
            networks = dict.fromkeys((self.trainer.network, self.trainer.shown))
            self.team.copy_first([b for n in networks for b in n.buffers()])  # without sync_batch_norm each has its own
            self.trainer.metrics.feed()
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
            "peak_mb": peak_memory(),
        }
        value, best = row[self.monitor], at.best["value"]
        if best is None or math.isnan(best) or (value > best if self.monitor_mode == "max" else value < best):
            at.best = {"epoch": epoch_number, "value": value}
        at.history.append(row)
        self.trainer.stop_training = self.team.share(self.trainer.stop_training)
        at.epoch, at.step, at.seconds, at.stopped = epoch_number, 0, 0.0, self.trainer.stop_training
        self.commit_s = 0.0  # this epoch's own commit stands in the next row
        self._commit(self._pending())
        self.follow(self.trainer.shown.state_dict())
        logs.clear()
        logs.update(row)  # for those that stand behind

    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """Writes what follows from a commit, whose network has these weights: history.csv, best.pt."""
        at, began = self.at, time.perf_counter()
        if at.history:
            self.run.write_history(at.history)
        if at.history and at.step == 0 and at.best["epoch"] == at.epoch:
            self.run.write_best({"epoch": at.epoch, "network": weights})
        self.commit_s += time.perf_counter() - began

    def _read_losses(self) -> None:
        """Looks for the first loss that is not finite, and gives TensorBoard the mean."""
        losses = self.trainer.loss.read(self.read_until)
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            self._fail(f"the loss is {losses[bad[0]].item()}", self.at.epoch + 1, self.read_until + int(bad[0]) + 1)
        self.read_until = self.at.step
        if len(losses) and self.tensorboard:
            self.tensorboard.add_loss(self.at.total_steps, float(losses.mean()))

    def _fail(self, what: str, epoch: int, step: int) -> NoReturn:
        advice = "try a lower learning rate, or training_loop.detect_anomaly=True"
        raise Failed(f"{what} at epoch {epoch}, step {step}: {advice}")

    def _pending(self) -> dict[str, Any]:
        """What an epoch under way has gathered, and our random numbers' state: a commit collects those of all."""
        loss, metrics = self.trainer.loss.pending(), self.trainer.metrics.pending()
        return {"loss": loss, "metrics": metrics, "rng": get_rng(self.device)}

    def _commit_if_due(self) -> None:
        at = self.at
        is_late = self.commit_seconds is not None and time.monotonic() - self.committed_time > self.commit_seconds
        asks = is_late and not self.asked and self.team.part.rank == 0  # one clock, and once
        self.asked |= asks
        signal, rank, is_late = self.team.agree(self.stop.signal, asks)
        is_stop = signal or (self.stop_at and at.total_steps >= self.stop_at)
        is_due = is_late or (self.commit_steps and at.total_steps - self.committed_step >= self.commit_steps)
        if is_stop or is_due:
            # During validation the sums are those of the valid split: take what the training left.
            pending = self.at_train_end or self._pending()
            if not pending["loss"]["values"].isfinite().all():
                self._read_losses()
            at.seconds = self.seconds_before + time.perf_counter() - self.began
            self._commit(pending)
        if is_stop:
            where = (
                f" in epoch {at.epoch + 1}, after step {at.step}; all is saved: go on with training_loop.reload=True"
            )
            self.stop.signal = signal
            self.stop.raise_if_asked(f", sent to rank {rank},{where}" if self.team.size > 1 else where)
            raise Stopped(f"stopped by stop_at{where}", 0)

    def _commit(self, pending: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        network = self.trainer.network
        if not torch.stack([p.isfinite().all() for p in network.parameters()]).all():
            step = self.at.step or self.trainer.batches.n_batches
            self._fail("the weights are no longer finite", self.at.epoch + bool(self.at.step), step)
        self.run.commit(
            {
                **vars(self.at),
                "network": network.state_dict(),
                "averaged": self.trainer.averaged.state_dict() if self.trainer.averaged is not None else {},
                "n_averaged": self.trainer.n_averaged,
                "optimizer": self.trainer.optimizer.state_dict(),
                "callbacks": [[type(c).__name__, plain(external.state_dict(c))] for c in self.callbacks],
                "loss": pending["loss"],
                "metrics": pending["metrics"],
                "rngs": self.team.collect(pending["rng"]),
            }
        )
        self._remember_commit()
        self.commit_s += time.perf_counter() - began

    def _remember_commit(self) -> None:
        self.committed_step, self.committed_time, self.asked = self.at.total_steps, time.monotonic(), False


def peak_memory() -> float:
    """In MB, since the start: of the GPU if one is used, else of the process."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def get_rng(device: torch.device) -> dict[str, Any]:
    """The state of all generators of random numbers, that of the device too."""
    numpys: Any = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (numpys[0], numpys[1].tolist(), *numpys[2:]),
    }


def set_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts back what `get_rng` returned; a run may go on with another device."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def plain(value: Any) -> Any:
    """numpy's numbers as Python's: the checkpoint holds no class that needs code to load."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


# --- names ----------------------------------------------------------------------------------------


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


def configure(settings: Settings) -> Config:
    """Checks the settings against all that can be named here. Raises Refused."""
    return check(settings)
