import inspect
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import gin
import pytest
import torch
from torchvision import models

from src.config import Refused
from src.models.torchvision_models import register, replace_last_layer

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


def built(name, shape=(3, 32, 32), n_classes=7, binding=None):
    register(PREFIX + name)
    gin.parse_config(f"{PREFIX}{name}.{binding}" if binding else "")
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
    theirs = inspect.signature(inspect.signature(models.get_model_builder(name)).return_annotation).parameters
    not_settable = {"num_classes", "kwargs", "aux_logits", "transform_input", "init_weights"}
    assert set(parameters) == {"input_shape", "n_classes", "weights", *theirs} - not_settable
    assert parameters["weights"].default is None
    for wrong in ("dropuot", "num_classes", "input_shape"):
        with pytest.raises(ValueError, match=wrong):
            gin.bind_parameter(f"{PREFIX}{name}.{wrong}", 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("regnet") or n.endswith("mf")])
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_every_network_is_torchvisions_and_its_last_layer_can_be_replaced(name):
    without_heads = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    # The meta device has shapes and no memory, but regnet cannot be built there.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        replaced = models.get_model(name, **without_heads)
        replace_last_layer(replaced, 7)
        networks = [built(name), models.get_model(name, num_classes=7, **without_heads), replaced]
    ours, *theirs = [
        ({k: m.extra_repr() for k, m in n.named_modules()}, {k: v.shape for k, v in n.state_dict().items()})
        for n in networks
    ]
    assert theirs == [ours, ours]


@pytest.mark.parametrize(
    ("name", "size", "binding"),
    [
        ("mobilenet_v3_small", 32, "dropout = 0.1"),
        ("resnet18", 32, "zero_init_residual = True"),
        ("squeezenet1_0", 64, "dropout = 0.1"),
        ("vit_b_32", 32, "image_size = 32"),
        ("efficientnet_b0", 32, "dropout = 0.3"),  # the class has no default
        pytest.param("inception_v3", 75, "dropout = 0.1", marks=pytest.mark.slow),
        pytest.param("googlenet", 32, "dropout = 0.1", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_logits_in_both_modes(name, size, binding):
    network, x = built(name, (3, size, size), binding=binding), torch.randn(2, 3, size, size)
    assert network(x).shape == network.eval()(x).shape == (2, 7)


def test_a_setting_takes_effect_and_is_recorded():
    assert built("mobilenet_v3_small", binding="dropout = 0.625").classifier[2].p == 0.625
    recorded = re.findall(r"^\S+ = .*", gin.operative_config_str(), re.M)
    settings = ("dropout = 0.625", "weights = None")
    assert recorded == [f"mobilenet_v3_small.{setting}" for setting in settings]


# ResNet is a class, no builder; segmentation is not classification.
@pytest.mark.parametrize("name", ["resnet19", "MobileNetV3_small", "ResNet", "segmentation.fcn_resnet50"])
def test_unknown_network(name):
    for _ in range(2):
        with pytest.raises(Refused, match=f"torchvision.models has no network {name}"):
            register(PREFIX + name)


def test_settings_that_torchvision_refuses():
    with pytest.raises(Refused, match=r"resnet18 takes images \[3, H, W\], not data of shape \(1, 8, 8\)"):
        built("resnet18", (1, 8, 8))
    with pytest.raises(Refused, match=r"vit_b_32 cannot be built: .*Input shape indivisible by patch size!"):
        built("vit_b_32", (3, 33, 33), binding="image_size = 33")
    with pytest.raises(
        Refused, match=r"resnet18 cannot be built: .*multiple values for .*'layers'"
    ):  # the builder's choice
        built("resnet18", binding="layers = [1, 1, 1, 1]")


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
    network = built(name, (3, size, size), binding="weights = 'DEFAULT'")
    state = {key: value.clone() for key, value in network.state_dict().items()}
    assert network(torch.randn(2, 3, size, size)).shape == (2, 7)
    assert not any("aux" in key.lower() for key in state)
    fitted = {key for key in state if key.startswith(f"{last}.")}
    assert {len(state[key]) for key in fitted} == {7}
    assert all(state[key].equal(given[key]) for key in set(state) - fitted)
    state = built(name, (3, size, size), n_classes=1000).state_dict()
    assert all(state[key].equal(given[key]) for key in state)


@pytest.mark.parametrize("content", [None, b"", b"<html>log in first</html>", "another network"])
def test_weights_that_cannot_be_loaded(checkpoints, content):
    path = checkpoints / weights_file("mobilenet_v3_small")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(models.squeezenet1_1().state_dict(), path)
    with pytest.raises(Refused) as refusal:
        built("mobilenet_v3_small", binding="weights = 'DEFAULT'")
    message = refusal.value.message
    assert message.startswith("torchvision.models.mobilenet_v3_small cannot be built: ")
    assert message.endswith(f"/{path.name} into {checkpoints}, or set weights=None")
    assert len(message) < 700
    assert path.exists() == (content is not None)
