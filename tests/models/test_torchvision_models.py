import inspect
import subprocess
import sys
import urllib.request
from pathlib import Path

import gin
import pytest
import torch
from torchvision import models

from src.config import Refused
from src.models.torchvision_models import _replace_last_layer, register

PREFIX = "torchvision.models."
NAMES = models.list_models(module=models)


@pytest.fixture(autouse=True)
def no_settings():
    yield
    gin.clear_config()


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """The folder of weights, empty; and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it would keep an older proxy
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def built(name, shape=(3, 32, 32), n_classes=7):
    register(PREFIX + name)
    return gin.get_configurable(PREFIX + name)(input_shape=shape, n_classes=n_classes)


def weights_file(name):
    return Path(models.get_model_weights(name)["DEFAULT"].url).name


def test_torchvision_is_imported_only_when_asked_for():
    code = "import sys, src.models.torchvision_models, src.models.summary; print(*sys.modules)"
    root = Path(__file__).parents[2]
    modules = subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).split()
    assert "src.models.resnet" in modules
    assert "torchvision" not in modules


@pytest.mark.parametrize("name", NAMES)
def test_every_network_is_registered_with_its_settings(name):
    register(PREFIX + name)
    register(PREFIX + name)
    parameters = inspect.signature(gin.get_configurable(PREFIX + name)).parameters
    assert list(parameters)[:4] == ["input_shape", "n_classes", "weights", "progress"]
    assert parameters["weights"].default is None
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert not {"num_classes", "kwargs", "aux_logits"} & set(parameters)
    for setting in list(parameters)[2:]:
        gin.bind_parameter(f"{PREFIX}{name}.{setting}", parameters[setting].default)
    for wrong in ("dropuot", "num_classes", "input_shape"):
        with pytest.raises(ValueError, match=wrong):
            gin.bind_parameter(f"{PREFIX}{name}.{wrong}", 7)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mobilenet_v2.width_mult", 1.0),
        ("convnext_tiny.stochastic_depth_prob", 0.1),  # the class's is 0.0, the builder's 0.1
        ("efficientnet_b4.dropout", 0.4),  # the class has none
        ("vit_b_16.image_size", 224),
        ("resnext50_32x4d.groups", 32),
    ],
)
def test_defaults_are_those_that_take_effect(setting, value):
    name, parameter = setting.split(".")
    register(PREFIX + name)
    signature = inspect.signature(gin.get_configurable(PREFIX + name))
    assert signature.parameters[parameter].default == value


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("regnet") or n.endswith("mf")])
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_every_network_with_its_defaults_is_torchvisions_but_for_the_last_layer(name):
    register(PREFIX + name)
    parameters = inspect.signature(gin.get_configurable(PREFIX + name)).parameters
    for setting in list(parameters)[2:]:
        gin.bind_parameter(f"{PREFIX}{name}.{setting}", parameters[setting].default)
    without_heads = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    # The meta device has shapes and no memory, but regnet cannot be built there.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        network = built(name)
        other = models.get_model(name, **without_heads)
        _replace_last_layer(other, 1000, 7)
    modules, others = ({k: m.extra_repr() for k, m in n.named_modules()} for n in (network, other))
    assert modules == others
    shapes = {k: v.shape for k, v in network.state_dict().items()}
    assert shapes == {k: v.shape for k, v in other.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "size", "binding"),
    [
        ("mobilenet_v3_small", 32, "dropout = 0.1"),
        ("resnet18", 32, "zero_init_residual = True"),
        ("squeezenet1_0", 64, "dropout = 0.1"),
        ("vit_b_32", 32, "image_size = 32"),
        pytest.param("inception_v3", 75, "dropout = 0.1", marks=pytest.mark.slow),
        pytest.param("googlenet", 32, "dropout = 0.1", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_logits_in_both_modes(name, size, binding):
    register(PREFIX + name)
    gin.parse_config(f"{PREFIX}{name}.{binding}")
    network, x = built(name, (3, size, size)), torch.randn(2, 3, size, size)
    assert network(x).shape == network.eval()(x).shape == (2, 7)


def test_a_setting_takes_effect_and_is_recorded():
    register(PREFIX + "mobilenet_v3_small")
    gin.parse_config(f"{PREFIX}mobilenet_v3_small.dropout = 0.625")
    assert built("mobilenet_v3_small").classifier[2].p == 0.625
    operative = gin.operative_config_str()
    assert "mobilenet_v3_small.dropout = 0.625" in operative
    assert "mobilenet_v3_small.weights = None" in operative


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", r"no network resnet19 \(did you mean resnet18\?\)"),
        ("MobileNetV3_small", r"did you mean mobilenet_v3_small\?"),
        ("ResNet", r"no network ResNet"),  # a class, no builder
        ("segmentation.fcn_resnet50", r"no network segmentation.fcn_resnet50"),
    ],
)
def test_unknown_network(name, message):
    for _ in range(2):
        with pytest.raises(Refused, match=message):
            register(PREFIX + name)


def test_other_than_3_channels():
    with pytest.raises(Refused) as refusal:
        built("resnet18", (1, 8, 8))
    assert refusal.value.message == ("torchvision.models.resnet18 takes images [3, H, W], not data of shape (1, 8, 8)")


def test_settings_that_torchvision_refuses():
    register(PREFIX + "vit_b_32")
    gin.parse_config(f"{PREFIX}vit_b_32.image_size = 33")
    with pytest.raises(Refused) as refusal:
        built("vit_b_32", (3, 33, 33))
    assert refusal.value.message == "torchvision.models.vit_b_32: Input shape indivisible by patch size!"


@pytest.mark.parametrize(
    ("name", "size", "last"),
    [
        ("mobilenet_v3_small", 32, "classifier.3"),
        ("squeezenet1_1", 64, "classifier.1"),  # a convolution
        pytest.param("googlenet", 32, "fc", marks=pytest.mark.slow),
        pytest.param("inception_v3", 75, "fc", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_weights(checkpoints, name, size, last):
    given = models.get_model(name).state_dict()
    torch.save(given, checkpoints / weights_file(name))
    register(PREFIX + name)
    gin.parse_config(f"{PREFIX}{name}.weights = 'DEFAULT'")

    network = built(name, (3, size, size))
    assert network(torch.randn(2, 3, size, size)).shape == (2, 7)
    network = built(name, (3, size, size))  # whose batch norm has seen nothing
    state = network.state_dict()
    assert not any("aux" in key.lower() for key in state)
    fitted = {key for key in state if key.startswith(f"{last}.")}
    assert fitted
    assert all(len(state[key]) == 7 for key in fitted)
    assert all(state[key].equal(given[key]) for key in set(state) - fitted)

    state = built(name, (3, size, size), n_classes=1000).state_dict()
    assert all(state[key].equal(given[key]) for key in state)


def test_weights_that_cannot_be_downloaded(checkpoints):
    register(PREFIX + "mobilenet_v3_small")
    gin.parse_config(f"{PREFIX}mobilenet_v3_small.weights = 'DEFAULT'")
    path = checkpoints / weights_file("mobilenet_v3_small")
    with pytest.raises(Refused) as refusal:
        built("mobilenet_v3_small")
    message = refusal.value.message
    assert message.startswith(
        f"torchvision.models.mobilenet_v3_small.weights = 'DEFAULT': cannot be loaded from {path} (<urlopen error"
    )
    assert message.endswith(f"put the file {path.name} of torchvision's there, or set weights=None")
    assert list(checkpoints.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"<html>log in first</html>", "another network"])
def test_weights_that_do_not_fit(checkpoints, content):
    path = checkpoints / weights_file("mobilenet_v3_small")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(models.squeezenet1_1().state_dict(), path)
    register(PREFIX + "mobilenet_v3_small")
    gin.parse_config(f"{PREFIX}mobilenet_v3_small.weights = 'DEFAULT'")
    with pytest.raises(Refused) as refusal:
        built("mobilenet_v3_small")
    assert str(path) in refusal.value.message
    assert len(refusal.value.message) < 700
