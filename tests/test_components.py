"""Every model, data set and callback of src: trained for some steps, stopped, continued, and compared. A new one that
is registered is tested without a line here, but for the settings that it needs (SETTINGS).
"""

from pathlib import Path

import gin
import numpy as np
import pytest
import torch
from PIL import Image

import src.callbacks
import src.data
import src.models
import src.training_loop
from benchmarks.kill import run_difference
from src import results
from tests.cifar_archive import make_archive

# What has no default.
SETTINGS = {
    "cifar10": "cifar10.md5='{md5}'",
    "image_folder": "image_folder.folder='shapes'; image_folder.size=16; training_loop.n_workers=0",
    "first_available": "first_available.of=[@digits]",
    "WarmupCosine": "WarmupCosine.total_steps=6",
}


def components() -> list[tuple[str, str]]:
    """The setting that takes it, and its name, of all that gin knows from src's packages."""
    kinds = {"src.models.": "model", "src.data.": "data", "src.callbacks.": "callbacks"}
    found = []
    for _, configurable in gin.config._REGISTRY.items():
        module = getattr(configurable.wrapped, "__module__", "") + "."
        kind = next((kinds[prefix] for prefix in kinds if module.startswith(prefix)), None)
        if kind and not hasattr(configurable.wrapped, "__signature__"):  # a library's, registered by a name
            found.append((kind, configurable.name))
    return sorted(found)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """CIFAR-10's archive, of random images, and a folder of image files."""
    folder = tmp_path_factory.mktemp("data")
    for k in range(100):
        path = folder / "shapes" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return folder, make_archive(folder / "cifar-10-python.tar.gz", n_per_batch=100)


def test_the_components_are_found():
    names = {name for _, name in components()}
    for package in (src.callbacks, src.data, src.models):
        own = f"{package.__name__}."
        named = {name for name, part in vars(package).items() if getattr(part, "__module__", "").startswith(own)}
        assert len(named) >= 3 and named <= names


@pytest.mark.parametrize("kind, name", components())
def test_it_trains_and_goes_on_as_if_it_had_not_stopped(kind, name, data_dir, tmp_path, monkeypatch, main):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", str(data_dir[0]))
    default = {"data": "@digits", "model": "@MLP"} | {kind: f"[@{name}]" if kind == "callbacks" else f"@{name}"}
    settings = "".join(f"training_loop.{key}={value};" for key, value in default.items())
    settings += "training_loop.optimizer=@SGD;SGD.lr=0.05;SGD.momentum=0.9;training_loop.batch_size=32;"
    settings += "training_loop.steps_per_epoch=2;training_loop.n_epochs=4;"
    Path("a.gin").write_text(
        (settings + SETTINGS.get(name, "").format(md5=data_dir[1])).replace(";", "\n").replace("\n ", "\n")
    )
    assert main("train", "whole", "a.gin") == 0
    assert main("train", "parts", "a.gin", "-b", "training_loop.stop_at=3") == 0
    assert main("train", "parts", "a.gin", "-b", "training_loop.reload=True") == 0
    assert run_difference(Path("whole"), Path("parts")) is None
    data = gin.get_bindings("training_loop")["data"]()
    inputs = [{np.asarray(x).tobytes() for x in split.x} for split in (data.train, data.valid, data.test)]
    assert sum(map(len, inputs)) == len(set.union(*inputs))  # none is in two splits
    network = results.load_model("parts")
    x = torch.rand(3, *results.read_meta(Path("parts"))["data"]["input_shape"])
    with torch.inference_mode():
        assert torch.equal(network(x), results.load_model("whole")(x))
