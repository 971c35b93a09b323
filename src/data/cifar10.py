import io
import os
import pickle
import tarfile
import warnings

import gin
import torch
from torch import Tensor

from src.data.augment import cutout as random_cutout
from src.data.augment import random_crop, random_flip
from src.data.dataset import Data, TensorSplit, Unavailable, data_dir, fingerprint, stratified_split
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
    timeout: float = 10.0,
) -> Data:
    """60,000 colour images of 32x32 in 10 classes, split 45,000/5,000/10,000. Downloaded once.

    n_train: use only so many for training, balanced.
    padding, flip, cutout: pixels of the random crop, flip, and pixels of the square that is cut out of the
    training images; 0 and False: none.
    timeout: seconds after which a server that cannot be reached or is silent is given up.
    Raises Unavailable, with what to do, if the data are not in DATA_DIR and cannot be downloaded.
    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009), chapter 3.
    """
    try:
        archive = download(url, data_dir() / ARCHIVE, md5=md5, timeout=timeout)
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"CIFAR-10 cannot be had: {error}.\nPut {url}\n"
            f"into DATA_DIR (it may name another folder) by hand, as {os.path.relpath(data_dir() / ARCHIVE)},\n"
            'or train on digits, which need no network: -b "training_loop.data=@digits"'
        ) from error
    *batches, (x_test, y_test) = _read(archive)
    x, y = map(torch.cat, zip(*batches, strict=True))
    tenth = len(x) // 10
    train, valid = stratified_split(y, [len(x) - tenth, tenth], n_train=n_train)
    augment = ([random_crop(padding)] if padding else []) + ([random_flip] if flip else [])
    augment += [random_cutout(cutout)] if cutout else []
    splits = (
        TensorSplit(x.index_select(0, train), y[train], mean=MEAN, std=STD, augment=augment),
        TensorSplit(x.index_select(0, valid), y[valid], mean=MEAN, std=STD),  # twice as fast as x[valid]
        TensorSplit(x_test, y_test, mean=MEAN, std=STD),
    )
    return Data("cifar10", *splits, (3, 32, 32), 10, fingerprint(*splits))


def _read(archive: bytes) -> list[tuple[Tensor, Tensor]]:
    """x [N, 3, 32, 32] uint8 and y [N] of each of BATCHES, which are pickles made by Python 2.

    A pickle can run anything: `archive` has to be the one whose checksum is known. Takes a second.
    """
    batches = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of the old names in the files
        for member in tar:
            if member.name in BATCHES and (file := tar.extractfile(member)):
                batch = pickle.load(file, encoding="bytes")
                x = torch.from_numpy(batch[b"data"]).view(-1, 3, 32, 32)
                batches[member.name] = x, torch.tensor(batch[b"labels"])
    return [batches[name] for name in BATCHES]
