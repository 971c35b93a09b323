import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from src.config import Refused
from src.data import digits
from src.data.dataset import Batches

FINGERPRINT = "ecb23fc4cc13102ef1f7b1ac8ff5a2a47c9b6f0a08a21a354716d27d8e74d801"


def test_digits_are_those_of_sklearn() -> None:
    data = digits()
    splits = (data.train, data.valid, data.test)
    ours = {
        (label, *image.flatten().mul(16).tolist())
        for split in splits
        for image, label in zip(split.x, split.y.tolist(), strict=True)
    }
    bunch = load_digits()
    theirs = {(label, *row) for label, row in zip(bunch.target, bunch.data, strict=True)}
    assert ours == theirs
    assert len(ours) == 1797  # no two are the same, so the splits share none


def test_splits() -> None:
    data = digits()
    assert (len(data.train), len(data.valid), len(data.test)) == (1079, 359, 359)
    assert (data.name, data.choice) == ("digits", None)
    assert (data.input_shape, data.n_classes) == ((1, 8, 8), 10)
    everything = torch.bincount(torch.cat([data.train.y, data.valid.y, data.test.y]))
    for split in (data.train, data.valid, data.test):
        share = len(split) / 1797
        assert (torch.bincount(split.y) - everything * share).abs().max() < 2


def test_inputs_are_normalised() -> None:
    ((x, y),) = Batches(digits().train, 2000)
    assert x.shape == (1079, 1, 8, 8)
    assert y.dtype == torch.int64
    assert abs(x.mean()) < 0.02
    assert abs(x.std() - 1) < 0.02


def test_fingerprint_stays() -> None:
    """If it changes, so did the data or the split, and old results are no longer comparable."""
    assert digits().fingerprint == FINGERPRINT
    assert digits(padding=1).fingerprint == FINGERPRINT


def test_n_train_is_balanced_and_leaves_the_other_splits() -> None:
    data, all_of_them = digits(n_train=64), digits()
    assert len(data.train) == 64
    assert set(torch.bincount(data.train.y).tolist()) == {6, 7}
    assert torch.equal(data.valid.x, all_of_them.valid.x)
    assert torch.equal(data.test.x, all_of_them.test.x)
    assert data.fingerprint != FINGERPRINT
    assert digits(n_train=1079).fingerprint == FINGERPRINT
    with pytest.raises(Refused, match="n_train = 1080"):
        digits(n_train=1080)


def test_padding_crops_the_training_images_only() -> None:
    data = digits(padding=1)
    assert [len(split.augment) for split in (data.train, data.valid, data.test, digits().train)] == [1, 0, 0, 0]


def test_sklearn_is_not_imported() -> None:
    code = "import sys; from src.data import digits; digits(); sys.exit('sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
