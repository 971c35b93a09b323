import hashlib
import os
import pickle
import shutil
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import gin
import numpy as np
import torch
from torch import Tensor

from src.data.augment import random_crop, random_flip
from src.data.dataset import Data, TensorSplit, Unavailable, data_dir, fingerprint, first_n, shown, stratified_split
from src.data.download import download

# As torchvision names them, so that both can share a folder.
FOLDER, ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
TRAIN_FILES, TEST_FILE = [f"data_batch_{i}" for i in range(1, 6)], "test_batch"
OTHER_FILES = ["batches.meta", "readme.html"]
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]  # of the 50,000 training images


@gin.register
def cifar10(
    n_train: int | None = None,
    padding: int = 4,
    flip: bool = True,
    url: str = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5: str = "c58f30108f718f92721af3b95e74349a",
    timeout: float = 10.0,
) -> Data:
    """60,000 colour images of 32x32 in 10 classes, split 45,000/5,000/10,000. Downloaded once.

    n_train: use only so many for training, balanced.
    padding, flip: of the random crop and flip of the training images; 0 and False: none.
    timeout: seconds after which a server that cannot be reached or is silent is given up.
    Raises Unavailable, with what to do, if the data are not in DATA_DIR and cannot be downloaded.
    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009), chapter 3.
    """
    try:
        folder = _folder(url, md5, timeout)
        x, y = _read([folder / name for name in TRAIN_FILES])
        x_test, y_test = _read([folder / TEST_FILE])
    except Unavailable as error:
        raise Unavailable(
            f"CIFAR-10 cannot be had. {error.message}\n"
            f"Put {url}\n"
            f"into DATA_DIR by hand, as {shown(data_dir() / ARCHIVE)},\n"
            'or train on digits, which need no network: -b "training_loop.data=@digits"'
        ) from error
    tenth = len(x) // 10
    train, valid = stratified_split(y, [len(x) - tenth, tenth])
    train = first_n(train, n_train)
    augment = ([random_crop(padding)] if padding else []) + ([random_flip] if flip else [])
    split = partial(TensorSplit, mean=MEAN, std=STD)
    splits = (
        split(x.index_select(0, train), y[train], augment=augment),  # twice as fast as x[train]
        split(x.index_select(0, valid), y[valid]),
        split(x_test, y_test),
    )
    return Data("cifar10", *splits, (3, 32, 32), 10, fingerprint(*splits))


def _folder(url: str, md5: str, timeout: float) -> Path:
    """The folder with the batch files; extracted, and before that downloaded, if need be."""
    folder, archive = data_dir() / FOLDER, data_dir() / ARCHIVE
    if all((folder / name).is_file() for name in [*TRAIN_FILES, TEST_FILE]):
        return folder
    if not archive.exists():
        download(url, archive, md5=md5, timeout=timeout)
    try:
        with open(archive, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
            if found != md5:
                raise Unavailable(
                    f"{shown(archive)} is not whole, or not the right one (md5 {found}, not {md5}): remove it."
                )
            file.seek(0)
            _extract(file, folder)
    except (OSError, EOFError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Unavailable(f"{shown(archive)} cannot be extracted: {reason}.") from error
    return folder


def _extract(archive: BinaryIO, folder: Path) -> None:
    """Put the known files of the archive into `folder`. Two processes at once do no harm."""
    names = {f"{FOLDER}/{name}": name for name in [*TRAIN_FILES, TEST_FILE, *OTHER_FILES]}
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER}.", dir=folder.parent) as beside:
        with tarfile.open(fileobj=archive) as tar:
            for member in tar:  # its path is compared, never used
                if member.name in names and member.isreg() and (source := tar.extractfile(member)):
                    with open(Path(beside) / names[member.name], "wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
        folder.mkdir(exist_ok=True)
        for path in Path(beside).iterdir():
            os.replace(path, folder / path.name)


class _Inert:
    """Stands for what a pickle calls to build an array: keeps what it is given, runs nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads what CIFAR-10's files hold, arrays as _Inert, and refuses the rest.

    pickle.load would call whatever a file names, and so run what a stranger wrote into it.
    """

    def find_class(self, module: str, name: str) -> type[_Inert]:
        if module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return _Inert
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


def _read(files: list[Path]) -> tuple[Tensor, Tensor]:
    """x [N, 3, 32, 32] uint8 and y [N] of batch files, which are pickles made by Python 2."""
    images, labels = [], []
    for path in files:
        try:
            with open(path, "rb") as file:
                entry = _Unpickler(file, encoding="bytes").load()
            _, shape, dtype, fortran, raw = entry[b"data"].state
            x = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
            y = torch.tensor(entry[b"labels"], dtype=torch.int64)
            if dtype.args[0] != b"u1" or x.shape != (len(y), 3072) or y.min() < 0 or y.max() > 9:
                raise ValueError(f"{x.shape} {dtype.args[0]}, labels {y.min()} to {y.max()}")
        except Exception as error:  # a damaged pickle can raise anything
            raise Unavailable(
                f"{shown(path)} is no batch file of CIFAR-10 ({type(error).__name__}: {error}). "
                f"Remove {shown(path.parent)}: it is made again from the archive."
            ) from error
        images.append(x)
        labels.append(y)
    return torch.from_numpy(np.concatenate(images)).view(-1, 3, 32, 32), torch.cat(labels)
