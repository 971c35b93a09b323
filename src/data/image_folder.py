import hashlib
from functools import partial

import gin
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from src.config import Failed, Refused
from src.data.augment import augmentations
from src.data.dataset import Data, Split, Unavailable, data_dir, stratified_split


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
    n_train: use only so many for training, balanced. padding, flip: of the random crop and flip in training; 0 and
    False: none. mean, std: of red, green and blue in 0..1; ImageNet's. The fingerprint is of names and sizes in bytes.
    Raises Unavailable if there is no such folder, Refused if it holds no two classes of images.
    """
    root = data_dir() / folder
    if not root.is_dir():
        raise Unavailable(f"image_folder.folder = {folder!r}: there is no folder {root}")
    files = sorted(f for f in root.glob("*/*") if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
    classes, y = np.unique([f.parent.name for f in files], return_inverse=True)
    if len(classes) < 2 or len(files) < 10:
        there = f"{root}: has {len(files)} images in {len(classes)} folders"
        raise Refused(f"{there}: it needs a folder for each of two classes or more, and ten images")
    labels, tenth = torch.from_numpy(y), len(files) // 10
    rows = stratified_split(labels, [len(files) - 2 * tenth, tenth, tenth], n_train)
    names = np.array([str(f) for f in files])
    whole = Split(names, labels, mean, std, augmentations(padding, flip), partial(read_image, size=size))
    splits = whole.divided(rows)
    known = "\n".join(f"{f.relative_to(root).as_posix()} {f.stat().st_size}" for f in files)
    digest = hashlib.sha256(f"{known}\n{size} {mean} {std} {len(splits[0])}".encode()).hexdigest()
    return Data("image_folder", *splits, (3, size, size), len(classes), digest)


def read_image(path: str, size: int) -> Tensor:
    """The image as [3, size, size] pixels, uint8, RGB: scaled so that its shorter side fits, cut at the centre.

    Raises Failed if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Failed(f"{path}: cannot be read: {error}") from None
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
