import gzip
import io
import pickle
import tarfile
import warnings

import gin
import numpy as np
import torch
from torch import Tensor

from src.data.augment import augmentations
from src.data.dataset import Data, Split, data_dir, divide, stratified_split
from src.data.download import download

ARCHIVE = "cifar-10-python.tar.gz"  # as torchvision names it, so that both can share a folder
BATCHES = [*(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)), "cifar-10-batches-py/test_batch"]
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]  # of the 50,000 training images


@gin.register
def cifar10(
    n_train: int | None = None,
    padding: int = 4,
    flip: bool = True,
    cutout: int = 0,
    url: str = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5: str = "c58f30108f718f92721af3b95e74349a",
) -> Data:
    """60,000 colour images of 32x32 in 10 classes, split 45,000/5,000/10,000. Downloaded once.

    n_train: use only so many for training, balanced. padding, flip, cutout: pixels of the random crop, flip, and
    pixels of the square that is cut out of the training images; 0 and False: none.
    Raises Unavailable, with what to do, if the data are not in DATA_DIR and cannot be downloaded.
    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009), chapter 3.
    """
    x, y = _read(download(url, data_dir() / ARCHIVE, md5))
    n = len(y) // 6 * 5  # the last of the six files is the test split
    rows = stratified_split(y[:n], [n - n // 10, n // 10], n_train=n_train)
    whole = Split(x, y, MEAN, STD, augmentations(padding, flip, cutout))
    return divide("cifar10", whole, [*rows, torch.arange(n, len(y))], n_classes=10)


def _read(archive: bytes) -> tuple[Tensor, Tensor]:
    """x [60000, 3, 32, 32] uint8 and y [60000] of BATCHES, which are pickles made by Python 2. Takes a second.

    A pickle can run anything: `archive` has to be the one whose checksum is known.
    """
    # Of numpy's warnings, of the old names in the files, none is shown.
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(archive))) as tar, warnings.catch_warnings(action="ignore"):
        files = map(tar.extractfile, BATCHES)
        batches = [pickle.load(file, encoding="bytes") for file in files if file]
    x = torch.from_numpy(np.concatenate([batch[b"data"] for batch in batches])).view(-1, 3, 32, 32)
    return x, torch.tensor([label for batch in batches for label in batch[b"labels"]])
