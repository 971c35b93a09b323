import pytest
import torch
from torch import nn
from torchvision import models

from src.models import MLP, ResNet18, SimpleCNN
from src.models.summary import summarise

NETWORKS = {
    "SimpleCNN": lambda: SimpleCNN((3, 32, 32), 10),
    "MLP": lambda: MLP((3, 32, 32), 10),
    "ResNet18": lambda: ResNet18((3, 32, 32), 10),
    "one layer": lambda: nn.Flatten(),
    "deep": lambda: models.mobilenet_v3_small(),
    "parameters beside parts": lambda: models.VisionTransformer(32, 8, 2, 2, 16, 32),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_table(name):
    network, x = NETWORKS[name](), torch.randn(2, 3, 32, 32)
    output, text = summarise(network, x)
    assert output.equal(network.eval()(x))
    assert not output.requires_grad
    header, *rows, total = text.splitlines()
    assert header.split() == ["layer", "type", "output", "parameters"]
    assert len({len(line) for line in [header, *rows]}) == 1
    assert len(header) <= 100
    n_total = sum(p.numel() for p in network.parameters())
    assert sum(int(row.split()[-1].replace(",", "")) for row in rows) == n_total
    assert total == f"{n_total:,} parameters, {n_total:,} of them trainable"


def test_text():
    network = SimpleCNN((1, 8, 8), 10, n_filters=[4], n_dense=3)
    network.features.requires_grad_(False)
    _, text = summarise(network, torch.randn(5, 1, 8, 8))
    assert text == (
        "layer         type         output  parameters\n"
        "features.0    Conv2d       4x8x8           36\n"
        "features.1    MaxPool2d    4x4x4            0\n"
        "features.2    BatchNorm2d  4x4x4            8\n"
        "features.3    ReLU         4x4x4            0\n"
        "classifier.0  Flatten      64               0\n"
        "classifier.1  Linear       3              195\n"
        "classifier.2  ReLU         3                0\n"
        "classifier.3  Dropout      3                0\n"
        "classifier.4  Linear       10              40\n"
        "279 parameters, 235 of them trainable"
    )


def test_several_outputs_and_unused_parts():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.unused = nn.GRU(4, 6, batch_first=True), nn.Linear(2, 2)

        def forward(self, x):
            return self.recurrent(x)[0][:, -1]

    _, text = summarise(Network(), torch.randn(2, 5, 4))
    assert [line.split()[:3] for line in text.splitlines()[1:3]] == [
        ["recurrent", "GRU", "-"],
        ["unused", "Linear", "-"],
    ]


@pytest.mark.parametrize("size", [8, 16])
def test_the_network_is_left_as_it_was(size):
    network = SimpleCNN((1, 8, 8), 10)
    network.features.eval()  # frozen
    state = {k: v.clone() for k, v in network.state_dict().items()}
    x = torch.randn(2, 1, size, size)
    if size == 8:
        summarise(network, x)
    else:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            summarise(network, x)
    assert not any(m._forward_hooks for m in network.modules())
    assert network.training and network.classifier.training
    assert not any(m.training for m in network.features.modules())
    assert all(v.equal(state[k]) for k, v in network.state_dict().items())
