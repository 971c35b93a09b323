"""image_folder: real files, read by worker processes; the same batches whatever their number."""

import os
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from src.config import Failed, Refused
from src.data import image_folder
from src.data.augment import random_crop
from src.data.dataset import Batches, Split, Unavailable
from src.data.image_folder import read_image


@pytest.fixture
def images(tmp_path, monkeypatch):
    """60 images of several sizes and formats in 3 classes, below DATA_DIR."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    for k in range(60):
        height, width = torch.randint(8, 30, (2,), generator=generator).tolist()
        pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        path = tmp_path / "images" / "abc"[k % 3] / f"{k:02}.{('png', 'jpg', 'JPEG')[k % 5 % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    (tmp_path / "images/a/notes.txt").write_text("no image")
    return tmp_path / "images"


@pytest.mark.parametrize("n_workers, damage", [(0, "cut off"), (1, "cut off"), (0, "no PNG"), (0, "too large")])
def test_a_file_that_cannot_be_read_is_named(images, n_workers, damage):
    data = image_folder("images", size=12)
    broken = Path(data.train.x[3])
    Image.new("L", (20_000, 10_000) if damage == "too large" else (9, 9)).save(broken, "PNG")
    whole = broken.read_bytes()
    kinds = {"cut off": whole[:40], "no PNG": whole.replace(b"IDAT", b"I\0AT"), "too large": whole}
    broken.write_bytes(kinds[damage])
    with pytest.raises(Failed) as failed:
        list(Batches(data.train, 8, n_workers=n_workers))
    assert str(failed.value).startswith(f"{broken}: cannot be read: ") and "\n" not in str(failed.value)


def test_a_broken_test_image_is_named_by_train_and_evaluate(images, main, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.gin").write_text(
        "training_loop.data = @image_folder\nimage_folder.folder = 'images'\nimage_folder.size = 12\n"
        "training_loop.model = @MLP\nMLP.n_hidden = (8,)\ntraining_loop.optimizer = @SGD\nSGD.lr = 0.1\n"
        "training_loop.batch_size = 12\ntraining_loop.n_workers = 0\n"
    )
    broken = Path(image_folder("images", size=12).test.x[0])
    broken.write_bytes(broken.read_bytes()[:40])
    assert main("train", "run", "a.gin") == 1
    assert f"train.py: {broken}: cannot be read: " in capfd.readouterr().err
    assert main("evaluate", "run") == 1
    assert capfd.readouterr().err.startswith(f"evaluate.py: {broken}: cannot be read: ")


def test_batches_are_those_of_the_same_images_in_memory(images):
    data = image_folder("images", size=12, padding=2, flip=False)
    assert (data.input_shape, data.n_classes) == ((3, 12, 12), 3)
    assert [len(s) for s in (data.train, data.valid, data.test)] == [48, 6, 6]
    x = torch.stack([read_image(path, 12) for path in data.train.x])
    assert x.shape == (48, 3, 12, 12) and x.dtype == torch.uint8
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    memory = Split(x, data.train.y, mean=mean, std=std, augment=[random_crop(2)])
    for seed, epoch, start in ((None, 0, 0), (3, 2, 0), (3, 2, 2)):
        made = [Batches(memory, 20, seed), *(Batches(data.train, 20, seed, n_workers=n) for n in (0, 1, 2))]
        for batches in made:
            batches.begin(epoch, start)
        expected, *streamed = map(list, made)
        for got in streamed:
            assert len(got) == len(expected)
            for (x_got, y_got), (x_expected, y_expected) in zip(got, expected, strict=True):
                assert torch.equal(x_got, x_expected) and torch.equal(y_got, y_expected)


def test_each_image_is_in_one_split_with_its_class(images):
    data = image_folder("images", size=8)
    paths = [path for split in (data.train, data.valid, data.test) for path in split.x]
    assert sorted(paths) == sorted(str(f) for f in images.glob("*/*") if f.suffix != ".txt")
    for split in (data.train, data.valid, data.test):
        assert ["abc".index(Path(path).parent.name) for path in split.x] == split.y.tolist()


def test_reading_draws_no_random_numbers_of_the_models(images):
    data = image_folder("images", size=8)
    before = torch.get_rng_state()
    next(islice(Batches(data.train, 8, seed=0, n_workers=1), 1, None))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fingerprint_is_of_the_files_and_the_size(images):
    first = image_folder("images", size=8).fingerprint
    assert image_folder("images", size=8, padding=1).fingerprint == first
    assert image_folder("images", size=9).fingerprint != first
    assert image_folder("images", size=8, n_train=20).fingerprint != first
    moved = images.with_name("moved")
    shutil.move(images, moved)
    assert image_folder(str(moved), size=8).fingerprint == first
    os.remove(next(moved.glob("a/*.png")))
    assert image_folder("moved", size=8).fingerprint != first


def test_what_is_no_folder_of_classes_is_refused(images):
    with pytest.raises(Unavailable, match="there is no folder"):
        image_folder("nothing")
    with pytest.raises(Refused, match="has 0 images in 0 folders"):
        image_folder("images/a")
    shutil.rmtree(images / "c")
    files = [f for f in sorted(images.glob("*/*")) if f.suffix != ".txt"]
    for file in files[5:-4]:
        file.unlink()
    with pytest.raises(Refused, match="has 9 images in 2 folders: it needs"):
        image_folder("images")
    shutil.copy(files[0], images / f"b/more{files[0].suffix}")
    assert len(image_folder("images").test) == 1
