from importlib.metadata import distribution

import gin
import numpy as np
import torch
from torch import Tensor

from src.data.augment import random_crop
from src.data.dataset import Data, TensorSplit, fingerprint, stratified_split

MEAN, STD = [0.3053], [0.3760]  # of all 1,797 images


@gin.register
def digits(n_train: int | None = None, padding: int = 0) -> Data:
    """1,797 handwritten digits, 8x8 in 17 greys, that come with scikit-learn. Split 60/20/20.

    n_train: use only so many for training, balanced. padding: of a random crop, in training.
    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository (1998); its test set.
    """
    x, y = read()
    fifth = len(x) // 5
    train, valid, test = stratified_split(y, [len(x) - 2 * fifth, fifth, fifth], n_train=n_train)
    splits = (
        TensorSplit(x[train], y[train], mean=MEAN, std=STD, augment=[random_crop(padding)] if padding else []),
        TensorSplit(x[valid], y[valid], mean=MEAN, std=STD),
        TensorSplit(x[test], y[test], mean=MEAN, std=STD),
    )
    return Data("digits", *splits, (1, 8, 8), 10, fingerprint(*splits))


def read() -> tuple[Tensor, Tensor]:
    """The images x [1797, 1, 8, 8], 0..1, and y [1797]. Importing sklearn.datasets would take a second."""
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = torch.from_numpy(np.loadtxt(str(file), delimiter=",", dtype=np.int64))
    assert table.shape == (1797, 65)
    return table[:, :64].view(-1, 1, 8, 8).float() / 16, table[:, 64]
