"""Callbacks of others by their names: torch's LR schedulers, and Poutyne's with their prefix; what each remembers."""

import inspect
import os
from typing import Any

import poutyne
from torch.optim import lr_scheduler

from src.config import Refused, library, nearest, register_builder

# Torch's LR schedulers that Poutyne has as callbacks, but for the base class and those made from other schedulers.
NOT_OFFERED = ("LRScheduler", "SequentialLR", "ChainedScheduler")
SCHEDULERS = [name for name in lr_scheduler.__all__ if hasattr(poutyne, name) and name not in NOT_OFFERED]
# Poutyne's callbacks that remember nothing a run needs to go on, beside its loggers.
STATELESS = ("TerminateOnNaN", "LambdaCallback", "ClipNorm", "ClipValue")


@library("poutyne.")
def register(full_name: str) -> None:
    """Registers a callback of Poutyne's with gin: `poutyne.X`, or torch's scheduler X, stepped at the end of an epoch.

    Raises Refused if Poutyne has no such callback.
    """
    name = full_name.rpartition(".")[2]
    callback = getattr(poutyne, name, None)
    if not (inspect.isclass(callback) and issubclass(callback, poutyne.Callback)):
        raise Refused(f"poutyne has no callback {name}{nearest(name, vars(poutyne))}")

    def build(**settings: Any) -> Any:
        if name.endswith("Logger") and os.environ.get("RANK", "0") != "0":  # of several processes the first logs
            return poutyne.LambdaCallback()  # does nothing
        return callback(**settings)

    parameters = dict(inspect.signature(callback).parameters)
    if name in SCHEDULERS:  # Poutyne's take any keyword
        parameters |= inspect.signature(getattr(lr_scheduler, name)).parameters
        del parameters["optimizer"]
    register_builder(full_name, build, parameters.values())


for scheduler in SCHEDULERS:
    register(f"torch.optim.lr_scheduler.{scheduler}")


def state_dict(callback: poutyne.Callback) -> dict[str, Any]:
    """What the callback remembers. Raises Refused if it does not say what that is."""
    name, module = type(callback).__name__, type(callback).__module__
    if hasattr(callback, "state_dict"):
        # A scheduler is made when training begins.
        return callback.state_dict() if getattr(callback, "scheduler", True) else {}
    if isinstance(callback, poutyne.EarlyStopping):
        return {k: v for k, v in vars(callback).items() if k in ("wait", "best", "stopped_epoch")}
    is_known = module.startswith("poutyne.") and (name in STATELESS or name.endswith("Logger"))
    if not is_known and not getattr(callback, "stateless", False):
        advice = "give it state_dict and load_state_dict, or say `stateless = True` in its class"
        raise Refused(f"callback {name}: {advice}")
    return {}


def load_state_dict(callback: poutyne.Callback, state: dict[str, Any]) -> None:
    """Gives the callback what `state_dict` returned."""
    if isinstance(callback, poutyne.EarlyStopping) and not hasattr(callback, "load_state_dict"):
        vars(callback).update(state)
    elif hasattr(callback, "torch_lr_scheduler"):  # its settings are the config's, its base rates the optimizer's
        settings = {*inspect.signature(callback.torch_lr_scheduler).parameters, "base_lrs"} - {"last_epoch"}
        callback.load_state_dict({name: value for name, value in state.items() if name not in settings})
    elif state:
        callback.load_state_dict(state)
