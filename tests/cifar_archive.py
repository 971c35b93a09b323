"""Makes an archive in CIFAR-10's own format, of random images."""

import gzip
import hashlib
import io
import struct
import tarfile
from pathlib import Path

import numpy as np

BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def make_archive(path: Path, n_per_batch: int = 20) -> str:
    """Write cifar-10-python.tar.gz with `n_per_batch` images, balanced, in each batch file; return its md5."""
    rng = np.random.RandomState(0)
    files = {}
    for name in BATCHES:
        labels = rng.permutation(np.arange(n_per_batch) % 10)
        images = rng.randint(0, 256, (n_per_batch, 3072), np.uint8)
        files[f"cifar-10-batches-py/{name}"] = batch_pickle(images, labels.tolist())
    write_archive(path, files)
    return md5_of(path)


def md5_of(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    """A .tar.gz of `files`, the same bytes each time."""
    with (
        open(path, "wb") as file,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def batch_pickle(images: np.ndarray, labels: list[int]) -> bytes:
    """A batch file, [N, 3072] uint8, as Python 2 pickled CIFAR-10's. Python 3 cannot write such."""
    shape = b"".join(b"J" + struct.pack("<i", n) for n in images.shape) + b"\x86"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = b"T" + struct.pack("<i", images.nbytes) + images.tobytes()
    data = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + shape + dtype + b"\x89" + raw + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x06labels" + numbers + b"U\x04data" + data + b"u."
