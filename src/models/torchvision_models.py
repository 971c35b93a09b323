"""Any of torchvision's classification networks, by its name: `@torchvision.models.resnet18`."""

import functools
import inspect
import socket
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal
from urllib.parse import urlparse

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

    Its settings are those of torchvision's builder and of the network's class, with the values that
    take effect, but for NOT_SETTABLE. weights: None or a name of torchvision's ("DEFAULT",
    "IMAGENET1K_V1"), downloaded if need be; then the last layer is a new one, unless the number of
    classes is that of the weights. The auxiliary heads of googlenet and inception_v3 are left out.
    x [B, 3, H, W] -> logits [B, n_classes]. How small H and W may be depends on the network.
    Raises Refused if torchvision has no such network. The builder raises Refused if the data are no
    images of 3 channels, torchvision refuses a setting, or the weights cannot be loaded.
    """
    from torchvision import models

    name = full_name.removeprefix(PREFIX)
    names = models.list_models(module=models)
    if name not in names:
        raise Refused(f"torchvision.models has no network {name}{nearest(name, names)}")

    def build(**settings: Any) -> nn.Module:
        return _build(name, **settings)

    build.__signature__ = _signature(name)  # type: ignore[attr-defined]
    gin.external_configurable(build, name=name, module="torchvision.models", denylist=["input_shape", "n_classes"])


def _build(
    name: str, *, input_shape: tuple[int, ...], n_classes: int, weights: str | None = None, **settings: Any
) -> nn.Module:
    from torchvision import models

    if len(input_shape) != 3 or input_shape[0] != 3:
        raise Refused(f"{PREFIX}{name} takes images [3, H, W], not data of shape {input_shape}")
    try:
        if weights is None:
            network: nn.Module = models.get_model(name, num_classes=n_classes, **settings)
        else:
            network = _with_weights(name, weights, settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise Refused(f"{PREFIX}{name}: {error}") from None
    # torchvision leaves the auxiliary heads out in the same way.
    for attribute, value in dict(AuxLogits=None, aux1=None, aux2=None, aux_logits=False).items():
        if hasattr(network, attribute):
            setattr(network, attribute, value)
    if weights is not None:
        n_before = len(models.get_model_weights(name)[weights].meta["categories"])
        if n_before != n_classes:
            _replace_last_layer(network, n_before, n_classes)
    return network


def _with_weights(name: str, weights: str, settings: dict[str, Any]) -> nn.Module:
    from torchvision import models

    url = models.get_model_weights(name)[weights].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)  # torch.hub would wait for minutes
    try:
        network: nn.Module = models.get_model(name, weights=weights, **settings)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Refused(
            f"{PREFIX}{name}.weights = {weights!r}: cannot be loaded from {path} "
            f"({reason:.300}): put the file {path.name} of torchvision's there, or set weights=None"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return network


def _replace_last_layer(network: nn.Module, n_before: int, n_classes: int) -> None:
    """Puts a new one in the place of the last layer with n_before outputs."""
    layers = dict(network.named_modules())
    outputs = {n: getattr(m, "out_features", getattr(m, "out_channels", 0)) for n, m in layers.items()}
    name = [n for n in layers if outputs[n] == n_before][-1]
    match layers[name]:
        case nn.Linear() as old:
            new: nn.Module = nn.Linear(old.in_features, n_classes, bias=old.bias is not None)
        case nn.Conv2d() as old:
            new = nn.Conv2d(old.in_channels, n_classes, 1, bias=old.bias is not None)
    network.set_submodule(name, new)


def _signature(name: str) -> inspect.Signature:
    """The settings and the values they have if they are not set.

    torchvision's builders take **kwargs and hand them to the network's class, some with another
    default than the class's, some of which no other may be given. What a builder does is found by
    catching its call of the class.
    """
    from torchvision import models

    builder = models.get_model_builder(name)
    network_class = inspect.signature(builder).return_annotation
    choice: Any = Literal.__getitem__(tuple(models.get_model_weights(name).__members__))
    parameters = {
        "input_shape": (inspect.Parameter.empty, tuple[int, ...]),
        "n_classes": (inspect.Parameter.empty, int),
        "weights": (None, choice | None),
        "progress": (True, bool),
    }
    given = _given(builder, network_class)
    for p in inspect.signature(network_class).parameters.values():
        if p.kind is p.VAR_KEYWORD or p.name in NOT_SETTABLE:
            continue
        default = given.get(p.name, p.default)
        try:
            _given(builder, network_class, **{p.name: default})
        except TypeError:  # two values for one argument
            continue
        parameters[p.name] = default, p.annotation
    return inspect.Signature(
        [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for n, (default, kind) in parameters.items()
        ]
    )


def _given(builder: Callable[..., nn.Module], network_class: type[nn.Module], **settings: Any) -> dict[str, Any]:
    """The arguments that the builder gives to the class. The network is not built."""
    init = network_class.__init__

    class Caught(Exception):
        pass

    def catch(*args: Any, **kwargs: Any) -> None:
        raise Caught(inspect.signature(init).bind(*args, **kwargs).arguments)

    network_class.__init__ = catch  # type: ignore[method-assign]
    try:
        builder(**settings)
    except Caught as caught:
        arguments: dict[str, Any] = caught.args[0]
    finally:
        network_class.__init__ = init  # type: ignore[method-assign]
    return arguments
