import hashlib
from functools import partial

import gin
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from src.config import Refused
from src.data.augment import random_crop, random_flip
from src.data.dataset import Data, Unavailable, data_dir, stratified_split
from src.data.stream import StreamSplit

SUFFIXES = (".jpg", ".jpeg", ".png")


@gin.register
def image_folder(
    folder: str,
    size: int = 64,
    n_train: int | None = None,
    padding: int = 0,
    flip: bool = True,
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
    std: tuple[float, float, float] = (0.229, 0.224, 0.225),
) -> Data:
    """JPEG and PNG files in a folder for each class, read by worker processes. Split 80/10/10.

    folder: in DATA_DIR, or anywhere if absolute. size: each image is scaled and cut to size x size.
    n_train: use only so many for training, balanced. padding, flip: of the random crop and flip of
    the training images; 0 and False: none.
    mean, std: of red, green and blue in 0..1; ImageNet's. The fingerprint is of names and sizes in bytes.
    Raises Unavailable if there is no such folder, Refused if it holds no two classes of images.
    """
    root = data_dir() / folder
    if not root.is_dir():
        raise Unavailable(f"image_folder.folder = {folder!r}: there is no folder {root}")
    files = sorted(f for f in root.glob("*/*") if f.suffix.lower() in SUFFIXES)
    classes, y = np.unique([f.parent.name for f in files], return_inverse=True)
    if len(classes) < 2 or len(files) < 10:
        raise Refused(
            f"{root}: has {len(files)} images in {len(classes)} folders: it needs a folder for each of two classes "
            "or more, and ten images"
        )
    labels, tenth = torch.from_numpy(y), len(files) // 10
    parts = stratified_split(labels, [len(files) - 2 * tenth, tenth, tenth], n_train=n_train)
    augment = ([random_crop(padding)] if padding else []) + ([random_flip] if flip else [])
    read = partial(read_image, size=size)
    train, valid, test = (  # the last two are never augmented, whatever they hold
        StreamSplit([str(files[row]) for row in rows.tolist()], labels[rows], read, mean=mean, std=std, augment=augment)
        for rows in parts
    )
    known = "\n".join(f"{f.relative_to(root).as_posix()} {f.stat().st_size}" for f in files)
    digest = hashlib.sha256(f"{known}\n{size} {mean} {std} {len(train)}".encode()).hexdigest()
    return Data("image_folder", train, valid, test, (3, size, size), len(classes), digest)


def read_image(path: str, size: int) -> Tensor:
    """The image as [3, size, size], uint8, RGB: scaled so that its shorter side fits, cut at the centre."""
    with Image.open(path) as image:
        fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
