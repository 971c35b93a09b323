"""Makes an archive in CIFAR-10's own format, with images that can be learned."""

import gzip
import hashlib
import io
import struct
import tarfile
from pathlib import Path

import numpy as np

FOLDER = "cifar-10-batches-py"
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def make_archive(path: Path, n_per_batch: int = 20, seed: int = 0) -> str:
    """Write cifar-10-python.tar.gz with `n_per_batch` images in each batch file; return its md5.

    An image is the coarse pattern of its class, which is its own mirror image, plus coarse noise.
    The classes are balanced in each file.
    """
    rng = np.random.RandomState(seed)
    patterns = enlarge(rng.randint(0, 2, (10, 3, 4, 4)) * 96, 2)
    patterns = patterns + patterns[..., ::-1]  # 0 to 192
    files = {}
    for name in BATCHES:
        labels = rng.permutation(np.arange(n_per_batch) % 10)
        noise = rng.randint(0, 4, (n_per_batch, 3, 8, 8)) * 21  # 0 to 63
        images = enlarge((patterns[labels] + noise).astype(np.uint8), 4)
        files[name] = batch_pickle(images.reshape(n_per_batch, 3072), labels.tolist())
    write_archive(path, {f"{FOLDER}/{name}": content for name, content in files.items()})
    return md5_of(path)


def enlarge(images: np.ndarray, factor: int) -> np.ndarray:
    return images.repeat(factor, axis=2).repeat(factor, axis=3)


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
