import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from src.models import SimpleCNN


@settings(max_examples=40, deadline=None)
@given(
    input_shape=st.tuples(st.integers(1, 4), st.integers(1, 33), st.integers(1, 33)),
    n_classes=st.integers(1, 12),
    n_filters=st.lists(st.integers(1, 8), max_size=5),
)
def test_fits_any_image_and_learns_everywhere(input_shape, n_classes, n_filters):
    network = SimpleCNN(input_shape, n_classes, n_filters=n_filters, n_dense=5)
    logits = network(torch.randn(2, *input_shape))
    assert logits.shape == (2, n_classes)
    F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_gradient_reaches_every_parameter():
    network = SimpleCNN((1, 8, 8), 10)
    F.cross_entropy(network(torch.randn(64, 1, 8, 8)), torch.arange(64) % 10).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 50), (3, 32, 32), (3, 224, 224)])
def test_extreme_sizes(shape):
    assert SimpleCNN(shape, 10).eval()(torch.randn(1, *shape)).shape == (1, 10)


def test_a_batch_of_one_can_be_trained_on():
    """The last batch of an epoch may be one image: batch norm needs maps of more than a pixel."""
    assert SimpleCNN((1, 8, 8), 10)(torch.randn(1, 1, 8, 8)).shape == (1, 10)


def test_pools_as_long_as_two_pixels_remain():
    assert SimpleCNN((3, 32, 32), 10).features(torch.randn(2, 3, 32, 32)).shape == (2, 128, 4, 4)
    assert SimpleCNN((1, 8, 8), 10).features(torch.randn(2, 1, 8, 8)).shape == (2, 128, 2, 2)


def test_number_of_parameters():
    assert sum(p.numel() for p in SimpleCNN((3, 32, 32), 10).parameters()) == 357_034


def test_dropout_acts_in_training_alone():
    network, x = SimpleCNN((1, 8, 8), 10, dropout=0.5), torch.randn(16, 1, 8, 8)
    assert not network(x).equal(network(x))
    network.eval()
    assert network(x).equal(network(x))


def test_in_eval_mode_images_do_not_see_each_other():
    network, x = SimpleCNN((1, 8, 8), 10).eval(), torch.randn(16, 1, 8, 8)
    torch.testing.assert_close(network(x)[:1], network(x[:1]))
