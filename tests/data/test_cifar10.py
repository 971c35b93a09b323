import os
import pickle
import shutil
import socket
import socketserver
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from src.data import cifar10
from src.data.dataset import Unavailable
from src.data.download import download
from tests.cifar_archive import BATCHES, make_archive, md5_of, write_archive

ARCHIVE = "cifar-10-python.tar.gz"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DATA_DIR inside the current folder."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / ARCHIVE
    make_archive(path)
    return path


@contextmanager
def listen(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a file on a server that does `answer` with each connection."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            answer(self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/{ARCHIVE}"
        finally:
            server.shutdown()


def serve(content: bytes, cut_after: int | None = None, pause: float = 0) -> AbstractContextManager[str]:
    """Gives `content` in 8 pieces, with a pause after each; hangs up after `cut_after` bytes if given."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content))
        for piece in np.array_split(np.frombuffer(content[:cut_after], np.uint8), 8):
            connection.sendall(piece)
            time.sleep(pause)

    return listen(answer)


def refusal(**settings: object) -> str:
    """The message with which cifar10 refuses."""
    with pytest.raises(Unavailable) as refused:
        cifar10(**settings)
    return refused.value.message


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_download(archive: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder.rmdir()
    with serve(archive.read_bytes()) as url:
        data = cifar10(url=url, md5=md5_of(archive))
    assert names(folder) == [ARCHIVE]
    assert capfd.readouterr().err == f"Downloading {url}\n"
    again = cifar10(md5=md5_of(archive))  # without a server
    assert again.fingerprint == data.fingerprint
    os.umask(umask := os.umask(0))  # what is shared with a group stays so
    assert (folder / ARCHIVE).stat().st_mode & 0o777 == 0o666 & ~umask


def test_data(archive: Path, folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    (folder / ARCHIVE).write_bytes(archive.read_bytes())
    made = partial(cifar10, md5=md5_of(archive))
    data = made()
    assert not recwarn.list
    assert (len(data.train), len(data.valid), len(data.test)) == (90, 10, 20)
    assert torch.bincount(data.train.y).tolist() == [9] * 10
    assert torch.bincount(data.valid.y).tolist() == [1] * 10
    assert (data.name, data.input_shape, data.n_classes) == ("cifar10", (3, 32, 32), 10)
    assert data.train.x.dtype == torch.uint8
    assert len(data.train.augment) == 2 and len(made(cutout=8).train.augment) == 3
    assert not data.valid.augment and not data.test.augment
    assert not made(padding=0, flip=False).train.augment
    assert made(padding=0, flip=False).fingerprint == data.fingerprint
    small = made(n_train=20)
    assert torch.bincount(small.train.y).tolist() == [2] * 10
    assert small.fingerprint != data.fingerprint


def test_images_are_those_of_the_archive(archive: Path, folder: Path) -> None:
    """Extracted and read as CIFAR-10's authors say."""
    (folder / ARCHIVE).write_bytes(archive.read_bytes())
    data = cifar10(md5=md5_of(archive))
    shutil.unpack_archive(archive, folder)
    theirs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy.core is an old name
        for name in BATCHES:
            entry = pickle.loads((folder / "cifar-10-batches-py" / name).read_bytes(), encoding="bytes")
            theirs.append([*zip(entry[b"data"].tolist(), entry[b"labels"], strict=True)])
    train, valid, test = (
        [*zip(split.x.flatten(1).tolist(), split.y.tolist(), strict=True)]
        for split in (data.train, data.valid, data.test)
    )
    assert test == theirs.pop()
    assert sorted(train + valid) == sorted(chain(*theirs))


def test_cut_off_download_leaves_nothing_and_the_next_gets_it_whole(archive: Path, folder: Path) -> None:
    content = archive.read_bytes()
    with serve(content, cut_after=len(content) // 2) as url:
        message = refusal(url=url, md5=md5_of(archive))
    half = len(content) // 2
    assert f"{url}: IncompleteRead({half} bytes read, {len(content) - half} more expected)" in message
    assert names(folder) == []
    with serve(content) as url:
        assert len(cifar10(url=url, md5=md5_of(archive)).test) == 20


def test_wrong_checksum_is_refused_and_removed_unless_it_was_put_there(archive: Path, folder: Path) -> None:
    wrong = archive.read_bytes()[:-1] + b"?"
    with serve(wrong) as url:
        assert f"{url}: wrong checksum" in refusal(url=url, md5=md5_of(archive))
    assert names(folder) == []
    (folder / ARCHIVE).write_bytes(wrong)
    assert f"data/{ARCHIVE}: wrong checksum" in refusal(md5=md5_of(archive))
    assert names(folder) == [ARCHIVE]


def test_message_says_what_to_do(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"http://127.0.0.1:{port}/{ARCHIVE}"  # nothing listens there now
    message = refusal(url=url)
    assert "Connection refused" in message
    assert f"save it as data/{ARCHIVE} (DATA_DIR names another folder)" in message
    assert '-b "training_loop.data=@digits"' in message
    assert str(folder) not in message
    assert names(folder) == []


def wait_to_be_left(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def drip_headers(connection: socket.socket) -> None:
    """A byte in time, again and again: each read succeeds."""
    try:
        for byte in b"HTTP/1.1 200 OK\r\nServer: slow":
            connection.sendall(bytes([byte]))
            time.sleep(0.03)
    except OSError:
        pass


def stall(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + bytes(100))
    wait_to_be_left(connection)


@pytest.mark.alone
@pytest.mark.parametrize("answer", [wait_to_be_left, drip_headers, stall])
def test_silent_server_is_given_up(folder: Path, answer: Callable[[socket.socket], None]) -> None:
    with listen(answer) as url:
        start = time.monotonic()
        with pytest.raises(Unavailable, match=f"{url}: (no answer in time|timed out)"):
            download(url, folder / ARCHIVE, "no checksum", timeout=0.3)
        assert time.monotonic() - start < 3
    assert names(folder) == []


@pytest.mark.alone
def test_slow_download_is_not_given_up(archive: Path, folder: Path) -> None:
    with serve(archive.read_bytes(), pause=0.1) as url:
        assert download(url, folder / ARCHIVE, md5_of(archive), timeout=0.3) == archive.read_bytes()


def test_unknown_host_is_given_up(folder: Path) -> None:
    start = time.monotonic()
    with pytest.raises(Unavailable, match=f"http://cifar.invalid/{ARCHIVE}: "):
        download(f"http://cifar.invalid/{ARCHIVE}", folder / ARCHIVE, "no checksum", timeout=2)
    assert time.monotonic() - start < 5


@pytest.mark.slow
def test_silent_server_is_given_up_within_15_s_by_default() -> None:
    with listen(wait_to_be_left) as url:
        start = time.monotonic()
        refusal(url=url)
        assert time.monotonic() - start < 15


def test_several_at_once(archive: Path, folder: Path) -> None:
    with serve(archive.read_bytes()) as url, ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(cifar10, url=url, md5=md5_of(archive)) for _ in range(4)]
        assert len({run.result().fingerprint for run in runs}) == 1
    assert names(folder) == [ARCHIVE]


def test_unwritable_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "file" / "data"))
    message = refusal(url="http://127.0.0.1:9/")
    assert "Not a directory" in message and "DATA_DIR" in message


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_nothing_of_another_archive_is_run(archive: Path, folder: Path, tmp_path: Path) -> None:
    evil = pickle.dumps({b"data": Evil(tmp_path / "owned"), b"labels": []})
    write_archive(folder / ARCHIVE, {f"cifar-10-batches-py/{name}": evil for name in BATCHES})
    assert "wrong checksum" in refusal(md5=md5_of(archive))
    assert names(tmp_path) == ["data"]
