"""Any of torchvision's classification networks, by its name: `@torchvision.models.resnet18`."""

import functools
import inspect
from inspect import Parameter
from typing import Any, Literal

import torch
from torch import nn

from src.config import Refused, library, nearest, register_builder

PREFIX = "torchvision.models."
# The loop's (num_classes), or torchvision's choice, which depends on the weights.
NOT_SETTABLE = ("num_classes", "aux_logits", "transform_input", "init_weights", "kwargs")


@library(PREFIX)
def register(full_name: str) -> None:
    """Registers `torchvision.models.X` with gin: a builder that fits network X to the classes.

    x [B, 3, H, W] -> logits [B, n_classes]. How small H and W may be depends on the network.
    Its settings are those of the network's class, but for NOT_SETTABLE, and weights: None or a name of torchvision's
    ("DEFAULT", "IMAGENET1K_V1"), downloaded if need be; then the last layer is a new one, unless the number of classes
    is that of the weights. The auxiliary heads of googlenet and inception_v3 are left out.
    Raises Refused if torchvision has no such network; the builder, if torchvision refuses a setting or the weights
    cannot be loaded.
    """
    from torchvision import models

    name = full_name.removeprefix(PREFIX)
    names = models.list_models(module=models)
    if name not in names:
        raise Refused(f"torchvision.models has no network {name}{nearest(name, names)}")
    choice: Any = Literal.__getitem__(tuple(models.get_model_weights(name).__members__))
    weights = Parameter("weights", Parameter.KEYWORD_ONLY, default=None, annotation=choice | None)
    network_class = inspect.signature(models.get_model_builder(name)).return_annotation
    theirs = inspect.signature(network_class).parameters.values()
    # No config shows their defaults: the builder may have others.
    settable = [p.replace(default=...) for p in theirs if p.name not in NOT_SETTABLE]
    register_builder(full_name, functools.partial(_build, name), [weights, *settable])


def _build(
    name: str, input_shape: tuple[int, ...], n_classes: int, weights: str | None = None, **settings: Any
) -> nn.Module:
    from torchvision import models

    if input_shape[0] != 3:
        raise Refused(f"{PREFIX}{name} takes images [3, H, W], not data of shape {input_shape}")
    known = models.get_model_weights(name)[weights] if weights else None
    settings |= {} if known else {"num_classes": n_classes}
    try:
        network: nn.Module = models.get_model(name, weights=known, **settings)
    except Exception as error:
        place = f"{torch.hub.get_dir()}/checkpoints"
        advice = f"\nPut the weights {known.url} into {place}, or set weights=None" if known else ""
        raise Refused(f"{PREFIX}{name} cannot be built: {error!r:.300}{advice}") from None
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
        network.set_submodule(name, nn.Linear(old.in_features, n_classes, bias=old.bias is not None))
    else:
        network.set_submodule(name, nn.Conv2d(old.in_channels, n_classes, 1))
