"""Any of torchvision's classification networks, by its name: `@torchvision.models.resnet18`."""

import functools
import inspect
import socket
from pickle import UnpicklingError
from typing import Any, Literal

import gin
import torch
from torch import nn

from src.config import Refused, nearest

PREFIX = "torchvision.models."
# The loop's (num_classes), or torchvision's choice, which depends on the weights.
NOT_SETTABLE = ("num_classes", "aux_logits", "transform_input", "init_weights")


@functools.cache  # gin takes a name only once
def register(full_name: str) -> None:
    """Registers `torchvision.models.X` with gin: a builder that fits network X to the classes.

    x [B, 3, H, W] -> logits [B, n_classes]. How small H and W may be depends on the network.
    Its settings are those of torchvision's builder and of the network's class, but for NOT_SETTABLE.
    weights: None or a name of torchvision's ("DEFAULT", "IMAGENET1K_V1"), downloaded if need be;
    then the last layer is a new one, unless the number of classes is that of the weights. The
    auxiliary heads of googlenet and inception_v3 are left out.
    Raises Refused if torchvision has no such network. The builder raises Refused if the data are no
    images of 3 channels, torchvision refuses a setting, or the weights cannot be loaded.
    """
    from torchvision import models

    name = full_name.removeprefix(PREFIX)
    names = models.list_models(module=models)
    if name not in names:
        raise Refused(f"torchvision.models has no network {name}{nearest(name, names)}")

    keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    choice: Any = Literal.__getitem__(tuple(models.get_model_weights(name).__members__))
    own = [keyword("input_shape"), keyword("n_classes"), keyword("progress", default=True, annotation=bool)]
    weights = keyword("weights", default=None, annotation=choice | None)
    network_class = inspect.signature(models.get_model_builder(name)).return_annotation
    theirs = [
        keyword(p.name, default=..., annotation=p.annotation)  # no config shows it: the builder may have another
        for p in inspect.signature(network_class).parameters.values()
        if p.kind is not p.VAR_KEYWORD and p.name not in NOT_SETTABLE
    ]
    build = functools.partial(_build, name)
    build.__signature__ = inspect.Signature([*own, weights, *theirs])  # type: ignore[attr-defined]
    gin.external_configurable(build, name=name, module="torchvision.models", denylist=["input_shape", "n_classes"])


def _build(
    name: str, input_shape: tuple[int, ...], n_classes: int, weights: str | None = None, **settings: Any
) -> nn.Module:
    from torchvision import models

    if len(input_shape) != 3 or input_shape[0] != 3:
        raise Refused(f"{PREFIX}{name} takes images [3, H, W], not data of shape {input_shape}")
    known = models.get_model_weights(name)[weights] if weights else None
    settings |= {} if known else {"num_classes": n_classes}
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)  # for each address; torch.hub would wait for minutes
    try:
        network: nn.Module = models.get_model(name, weights=known, **settings)
    except (AssertionError, EOFError, OSError, RuntimeError, TypeError, UnpicklingError, ValueError) as error:
        place = f"{torch.hub.get_dir()}/checkpoints"
        hint = f"\nPut the weights {known.url} into {place}, or set weights=None" if known else ""
        raise Refused(f"{PREFIX}{name} cannot be built: {str(error) or repr(error):.300}{hint}") from None
    finally:
        socket.setdefaulttimeout(timeout)
    # torchvision leaves the auxiliary heads out in the same way.
    for attribute, value in dict(AuxLogits=None, aux1=None, aux2=None, aux_logits=False).items():
        if hasattr(network, attribute):
            setattr(network, attribute, value)
    if known and len(known.meta["categories"]) != n_classes:
        replace_last_layer(network, n_classes)
    return network


def replace_last_layer(network: nn.Module, n_classes: int) -> None:
    """Puts a new layer with n_classes outputs in the place of the last."""
    name, old = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(old.in_features, n_classes, bias=old.bias is not None)
    else:
        new = nn.Conv2d(old.in_channels, n_classes, 1)
    network.set_submodule(name, new)
