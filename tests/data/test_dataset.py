import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.config import Refused
from src.data.augment import Draw, random_crop, random_flip
from src.data.dataset import Batches, Split, data_dir, divide, fingerprint, stratified_split


def make_split(n: int) -> Split:
    """n random images; the target of an image is its place."""
    x = torch.randint(256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(n))
    return Split(
        x.to(torch.uint8),
        torch.arange(n),
        mean=[0.4, 0.5, 0.6],
        std=[0.1, 0.2, 0.3],
        augment=[random_crop(2), random_flip],
    )


def batches(
    split: Split, batch_size: int, seed: int | None = None, epoch: int = 0, start: int = 0, **where: Any
) -> Any:
    """An iterator over the batches of an epoch."""
    made = Batches(split, batch_size, seed, **where)
    made.begin(epoch, start)
    return iter(made)


def equal(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(xa, xb) and torch.equal(ya, yb) for (xa, ya), (xb, yb) in zip(a, b, strict=True)
    )


@settings(deadline=None)
@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 16),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
    start=st.integers(0, 41),
)
def test_batch_is_a_function_of_seed_epoch_and_place(
    n: int, batch_size: int, seed: int, epoch: int, start: int
) -> None:
    split = make_split(n)
    state = torch.get_rng_state()
    whole = list(batches(split, batch_size, seed=seed, epoch=epoch))
    rest = list(batches(make_split(n), batch_size, seed=seed, epoch=epoch, start=start))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(rest, whole[start:])
    sizes = [len(y) for _, y in whole]
    assert sizes == [batch_size] * (n // batch_size) + [n % batch_size] * (n % batch_size > 0)
    assert torch.cat([y for _, y in whole]).sort().values.tolist() == list(range(n))
    for x, _ in whole:
        assert x.dtype == torch.float32
        assert x.is_contiguous()


def test_epochs_and_seeds_differ_in_order_and_augmentation() -> None:
    split = make_split(40)
    orders = set()
    for seed in range(5):
        for epoch in range(5):
            orders.add(tuple(next(batches(split, 40, seed=seed, epoch=epoch))[1].tolist()))
    assert len(orders) == 25

    split.x = split.x[:1].expand(40, -1, -1, -1)  # what is left is the augmentation
    seen = set()
    for epoch in range(2):
        seen |= {tuple(x.flatten().tolist()) for x, _ in batches(split, 8, seed=0, epoch=epoch)}
    assert len(seen) == 10


def test_without_seed_in_order_normalised_and_not_augmented() -> None:
    split = make_split(10)
    mean = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    before = split.x.clone()
    whole = list(batches(split, 4))
    assert [y.tolist() for _, y in whole] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    x = torch.cat([x for x, _ in whole])
    torch.testing.assert_close(x, (split.x / 255 - mean) / std)
    assert torch.equal(split.x, before)
    assert equal(list(batches(split, 4, start=2)), whole[2:])


@pytest.mark.parametrize("limit", [None, 2, 9])
def test_batches_of_an_epoch(limit: int | None) -> None:
    split = make_split(14)
    train, valid = Batches(split, 4, seed=3, limit=limit), Batches(split, 4, limit=limit)
    assert not hasattr(train, "__len__")
    assert train.n_batches == valid.n_batches == min(limit or 4, 4)
    for epoch, start in ((1, 0), (2, 1), (2, train.n_batches)):
        train.begin(epoch, start)
        assert equal(list(train), list(batches(split, 4, seed=3, epoch=epoch))[start:limit])
    for _ in range(2):
        assert equal(list(valid), list(batches(split, 4))[:limit])


def test_batches_measure_the_wait_for_data() -> None:
    def slow(x: Tensor, draw: Draw) -> Tensor:
        time.sleep(0.02)
        return x

    split = make_split(12)
    split.augment = (slow,)
    made = Batches(split, 4, seed=0)
    for _ in range(2):
        for _ in made:
            time.sleep(0.1)  # the consumer's own time
        assert 0.06 <= made.waited < 0.2


def test_float_data_are_normalised_as_they_are_and_not_changed() -> None:
    x = torch.rand(6, 2, 4, 4)
    before = x.clone()
    (batch, _), *_ = batches(Split(x, torch.zeros(6), mean=[0.5, 1.0], std=[2.0, 4.0]), 6)
    torch.testing.assert_close(batch[:, 0], (before[:, 0] - 0.5) / 2)
    torch.testing.assert_close(batch[:, 1], (before[:, 1] - 1) / 4)
    (plain, _), *_ = batches(Split(x, torch.zeros(6)), 6)
    assert torch.equal(plain, before)
    assert torch.equal(x, before)


def test_whole_numbers_but_pixels_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be uint8 or float, not torch.int64"):  # they would be divided by 255
        Split(torch.arange(12).view(4, 3), torch.zeros(4, dtype=torch.int64))


def test_lengths_must_agree() -> None:
    with pytest.raises(AssertionError, match="3 inputs but 2 targets"):
        Split(torch.zeros(3, 1, 8, 8), torch.zeros(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gets_the_same_batches_without_a_wait() -> None:
    split = make_split(20)
    list(batches(split, 8, seed=1, device="cuda"))  # the first call may set things up
    on_gpu = batches(split, 8, seed=1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (x, y), (x_cpu, y_cpu) in zip(got, batches(split, 8, seed=1), strict=True):
        torch.testing.assert_close(x.cpu(), x_cpu)
        assert torch.equal(y.cpu(), y_cpu)


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    cuts=st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted),
    order=st.integers(0, 100),
)
def test_splits_are_stratified_disjoint_and_stable(counts: list[int], cuts: list[float], order: int) -> None:
    y = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(order))]
    first, second = (round(cut * len(y)) for cut in cuts)
    sizes = [first, second - first, len(y) - second]
    parts = stratified_split(y, sizes)
    assert [len(part) for part in parts] == sizes
    assert torch.cat(parts).sort().values.tolist() == list(range(len(y)))
    for part in [*parts, parts[0][: first // 2]]:
        for label, count in enumerate(counts):
            assert abs((y[part] == label).sum() - len(part) * count / len(y)) <= 2
    again = stratified_split(y, sizes)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_split_does_not_change_between_versions() -> None:
    """Results are comparable only as long as the splits stay."""
    a, b = stratified_split(torch.arange(12) % 3, [8, 4])
    assert a.tolist() == [6, 1, 5, 9, 7, 11, 3, 4]
    assert b.tolist() == [8, 0, 10, 2]


def test_by_default_three_fifths_a_fifth_and_a_fifth() -> None:
    assert [len(part) for part in stratified_split(torch.arange(18) % 3)] == [12, 3, 3]


def test_divided_into_splits_of_which_one_is_augmented() -> None:
    whole = make_split(10)
    data = divide("name", whole, [torch.arange(5), torch.tensor([9, 7]), torch.tensor([6])], n_classes=10)
    assert data.valid.y.tolist() == [9, 7] and torch.equal(data.valid.x, whole.x[[9, 7]])
    assert [len(split.augment) for split in (data.train, data.valid, data.test)] == [2, 0, 0]
    assert (data.name, data.input_shape, data.n_classes) == ("name", (3, 8, 8), 10)
    assert data.valid.std == whole.std and data.fingerprint == fingerprint(data.train, data.valid, data.test)


@pytest.mark.parametrize("n_train", [0, -1, 11])
def test_unfit_n_train_is_refused(n_train: int) -> None:
    with pytest.raises(Refused, match=rf"n_train = {n_train}\b.* 10 images.*give 1 to 10"):
        stratified_split(torch.arange(12) % 3, [10, 2], n_train=n_train)


def test_fingerprint_is_of_what_is_used() -> None:
    split = make_split(10)
    original = fingerprint(split)
    assert original == fingerprint(make_split(10))
    split.augment = ()
    assert fingerprint(split) == original
    split.y = split.y.flip(0)
    assert fingerprint(split) != original
    other_mean = Split(split.x, make_split(10).y, mean=[0.4, 0.5, 0.5], std=[0.1, 0.2, 0.3])
    assert fingerprint(other_mean) != original
    assert fingerprint(split, split) != fingerprint(split)


def test_data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.setenv("DATA_DIR", "")
    assert data_dir() == Path(__file__).parents[2] / "data"
    monkeypatch.delenv("DATA_DIR")
    assert data_dir() == Path(__file__).parents[2] / "data"
