"""Callbacks of others by their names: torch's LR schedulers, and Poutyne's with their prefix."""

import inspect
import os
from typing import Any

import poutyne
from torch.optim import lr_scheduler

from src.config import Refused, library, nearest, register_builder

# The base class, and those that are made from other schedulers, which a config cannot build.
NOT_OFFERED = ("LRScheduler", "SequentialLR", "ChainedScheduler")
# Poutyne's callbacks that remember nothing a run needs to go on, beside its loggers.
STATELESS = ("TerminateOnNaN", "LambdaCallback", "ClipNorm", "ClipValue")


def schedulers() -> list[str]:
    """Names of torch's LR schedulers that Poutyne has as callbacks."""
    return [name for name in lr_scheduler.__all__ if hasattr(poutyne, name) and name not in NOT_OFFERED]


def register_schedulers() -> None:
    """Registers torch's LR schedulers with gin, as callbacks that step at the end of an epoch."""
    for name in schedulers():
        _register(f"torch.optim.lr_scheduler.{name}")


@library("poutyne.")
def register_poutyne(full_name: str) -> None:
    """Registers `poutyne.X` with gin. Raises Refused if Poutyne has no such callback."""
    name = full_name.removeprefix("poutyne.")
    callbacks = [n for n, c in vars(poutyne).items() if inspect.isclass(c) and issubclass(c, poutyne.Callback)]
    if name not in callbacks:
        raise Refused(f"poutyne has no callback {name}{nearest(name, callbacks)}")
    _register(full_name)


def _register(full_name: str) -> None:
    name = full_name.rpartition(".")[2]
    callback = getattr(poutyne, name)

    def build(**settings: Any) -> Any:
        if name.endswith("Logger") and os.environ.get("RANK", "0") != "0":  # of several processes the first logs
            return poutyne.LambdaCallback()  # does nothing
        return callback(**settings)

    parameters = dict(inspect.signature(callback).parameters)
    if name in schedulers():  # Poutyne's take any keyword
        parameters |= inspect.signature(getattr(lr_scheduler, name)).parameters
        del parameters["optimizer"]
    register_builder(full_name, build, parameters.values())


def state_dict(callback: poutyne.Callback) -> dict[str, Any]:
    """What the callback remembers. Raises Refused if it does not say what that is."""
    name, module = type(callback).__name__, type(callback).__module__
    if getattr(callback, "stateless", False):
        return {}
    if hasattr(callback, "state_dict"):
        # A scheduler is made when training begins.
        return callback.state_dict() if getattr(callback, "scheduler", True) else {}
    if isinstance(callback, poutyne.EarlyStopping):
        return {k: v for k, v in vars(callback).items() if k in ("wait", "best", "stopped_epoch")}
    if module.startswith("poutyne.") and (name in STATELESS or name.endswith("Logger")):
        return {}
    raise Refused(
        f"callback {name}: give it state_dict and load_state_dict, so that a run can go on, or "
        "say `stateless = True` in its class"
    )


def try_callback(callback: poutyne.Callback, optimizer: Any) -> None:
    """Raises Refused if the callback does not say what it remembers, or its scheduler refuses its settings.

    optimizer: one to throw away, since a scheduler changes the learning rate.
    """
    state_dict(callback)
    if hasattr(callback, "torch_lr_scheduler"):
        try:
            callback.torch_lr_scheduler(optimizer, *callback.args, **callback.kwargs)
        except (TypeError, ValueError) as error:
            raise Refused(f"{type(callback).__name__}: {error}") from None


def load_state_dict(callback: poutyne.Callback, state: dict[str, Any]) -> None:
    """Gives the callback what `state_dict` returned."""
    if isinstance(callback, poutyne.EarlyStopping) and not hasattr(callback, "load_state_dict"):
        vars(callback).update(state)
    elif state:
        callback.load_state_dict(state)
