from importlib.metadata import distribution

import gin
import numpy as np
import torch
from torch import Tensor

from src.data.augment import augmentations
from src.data.dataset import Data, Split, divide, stratified_split


@gin.register
def digits(n_train: int | None = None, padding: int = 0) -> Data:
    """1,797 handwritten digits, 8x8 in 17 greys, that come with scikit-learn. Split 60/20/20.

    n_train: use only so many for training, balanced. padding: of a random crop, in training.
    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI (1998); its test set.
    """
    x, y = read()
    whole = Split(x, y, mean=[0.3053], std=[0.3760], augment=augmentations(padding))
    return divide("digits", whole, stratified_split(y, n_train=n_train), n_classes=10)


def read() -> tuple[Tensor, Tensor]:
    """The images x [1797, 1, 8, 8], 0..1, and y [1797]. Importing sklearn.datasets would take a second."""
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = torch.from_numpy(np.loadtxt(str(file), delimiter=",", dtype=np.int64))
    return table[:, :64].view(-1, 1, 8, 8).float() / 16, table[:, 64]
