import pytest
import torch
from torch.nn import functional as F

from src.models import ResNet18


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 2), (4, 17, 9)])
def test_fits_any_image_and_learns_everywhere(shape):
    network = ResNet18(shape, 7)
    logits = network(torch.randn(2, *shape))
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_gradient_reaches_every_parameter():
    network = ResNet18((3, 16, 16), 10)
    F.cross_entropy(network(torch.randn(32, 3, 16, 16)), torch.arange(32) % 10).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_is_the_network_of_the_paper():
    network = ResNet18((3, 32, 32), 10)
    assert sum(p.numel() for p in network.parameters()) == 11_173_962  # 11.17 million
    weighted = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len([m for m in weighted if getattr(m, "kernel_size", 3) != (1, 1)]) == 18
    shapes, stages = [], [network.layer1, network.layer2, network.layer3, network.layer4]
    for stage in stages:
        stage.register_forward_hook(lambda module, x, y: shapes.append(y.shape[1:]))
    network.eval()(torch.randn(1, 3, 32, 32))
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_in_eval_mode_images_do_not_see_each_other():
    network, x = ResNet18((1, 8, 8), 10), torch.randn(16, 1, 8, 8)
    before = network(x)
    network.eval()
    assert not network(x).equal(before)
    torch.testing.assert_close(network(x)[:1], network(x[:1]))
