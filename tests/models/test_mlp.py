import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from src.models import MLP


@settings(max_examples=40, deadline=None)
@given(
    input_shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    n_classes=st.integers(1, 12),
    n_hidden=st.lists(st.integers(1, 16), max_size=3),
)
def test_fits_any_shape_and_learns_everywhere(input_shape, n_classes, n_hidden):
    network = MLP(input_shape, n_classes, n_hidden=n_hidden)
    logits = network(torch.randn(3, *input_shape))
    assert logits.shape == (3, n_classes)
    F.cross_entropy(logits, torch.zeros(3, dtype=torch.int64)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_number_of_parameters():
    n_parameters = sum(p.numel() for p in MLP((1, 8, 8), 10, n_hidden=(20,)).parameters())
    assert n_parameters == (64 + 1) * 20 + (20 + 1) * 10


def test_dropout_acts_in_training_alone():
    network, x = MLP((1, 8, 8), 10, dropout=0.5), torch.randn(16, 1, 8, 8)
    assert not network(x).equal(network(x))
    network.eval()
    assert network(x).equal(network(x))
