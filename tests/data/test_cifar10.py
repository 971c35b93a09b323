import io
import os
import pickle
import re
import socket
import tarfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from src.data import cifar10
from src.data.dataset import Data, Unavailable
from tests.cifar_archive import BATCHES, FOLDER, batch_pickle, make_archive, md5_of, write_archive

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
def serve(content: bytes, cut_after: int | None = None) -> Iterator[str]:
    """The address of a file on a web server, which hangs up after `cut_after` bytes if given."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:cut_after])

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/{ARCHIVE}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def listen(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that does `answer` with its first connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            connection, _ = server.accept()
            with connection:
                answer(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/{ARCHIVE}"
        thread.join()


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
    assert names(folder) == [FOLDER, ARCHIVE]
    assert names(folder / FOLDER) == sorted(BATCHES)
    assert f"Downloading {url}" in capfd.readouterr().err
    again = cifar10()  # without a server
    assert again.fingerprint == data.fingerprint
    os.umask(umask := os.umask(0))
    for path in folder.rglob("*"):  # what is shared with a group stays so
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask


def test_data(archive: Path, folder: Path) -> None:
    data = had_by_hand(archive, folder)
    assert (len(data.train), len(data.valid), len(data.test)) == (90, 10, 20)
    assert torch.bincount(data.train.y).tolist() == [9] * 10
    assert torch.bincount(data.valid.y).tolist() == [1] * 10
    assert (data.name, data.input_shape, data.n_classes) == ("cifar10", (3, 32, 32), 10)
    assert data.train.x.dtype == torch.uint8
    assert len(data.train.augment) == 2
    assert data.valid.augment == data.test.augment == ()
    assert cifar10(padding=0, flip=False).train.augment == ()
    assert cifar10(padding=0, flip=False).fingerprint == data.fingerprint
    small = cifar10(n_train=20)
    assert torch.bincount(small.train.y).tolist() == [2] * 10
    assert small.fingerprint != data.fingerprint


def had_by_hand(archive: Path, folder: Path) -> Data:
    (folder / ARCHIVE).write_bytes(archive.read_bytes())
    return cifar10(md5=md5_of(archive))


def pairs(x: Tensor, y: list[int]) -> list[tuple[int, list[int]]]:
    return [(label, image.flatten().tolist()) for image, label in zip(x, y, strict=True)]


def test_images_are_those_of_the_archive(archive: Path, folder: Path) -> None:
    """Read by Python's own pickle, as CIFAR-10's authors say."""
    data = had_by_hand(archive, folder)
    theirs = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy.core is an old name
        for name in BATCHES:
            entry = pickle.loads((folder / FOLDER / name).read_bytes(), encoding="bytes")
            images = torch.from_numpy(entry[b"data"]).view(-1, 3, 32, 32)
            theirs[name] = pairs(images, entry[b"labels"])
    assert pairs(data.test.x, data.test.y.tolist()) == theirs.pop("test_batch")
    ours = pairs(data.train.x, data.train.y.tolist()) + pairs(data.valid.x, data.valid.y.tolist())
    assert sorted(ours) == sorted(chain.from_iterable(theirs.values()))


def test_images_of_the_made_archive_can_be_learned(tmp_path: Path, folder: Path) -> None:
    md5 = make_archive(folder / ARCHIVE, n_per_batch=50, seed=1)
    assert md5 == make_archive(tmp_path / "again", n_per_batch=50, seed=1)
    data = cifar10(md5=md5)
    means = torch.stack([data.train.x[data.train.y == c].float().mean(0) for c in range(10)])
    distance = torch.cdist(data.test.x.flatten(1).float(), means.flatten(1))
    assert (distance.argmin(1) == data.test.y).float().mean() > 0.9


def test_cut_off_download_leaves_nothing_and_the_next_gets_it_whole(archive: Path, folder: Path) -> None:
    content = archive.read_bytes()
    with serve(content, cut_after=len(content) // 2) as url:
        message = refusal(url=url, md5=md5_of(archive))
    assert f"broke off after {len(content) // 2:,} of {len(content):,} bytes" in message
    assert names(folder) == []
    with serve(content) as url:
        assert len(cifar10(url=url, md5=md5_of(archive)).test) == 20


def test_wrong_checksum_is_refused_and_removed(archive: Path, folder: Path) -> None:
    with serve(archive.read_bytes()[:-1] + b"?") as url:
        assert "wrong checksum" in refusal(url=url, md5=md5_of(archive))
    assert names(folder) == []


def test_message_says_what_to_do(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"http://127.0.0.1:{port}/{ARCHIVE}"  # nothing listens there now
    message = refusal(url=url)
    assert "Connection refused" in message
    assert f"Put {url}\n" in message
    assert f"DATA_DIR by hand, as data/{ARCHIVE}" in message
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


@pytest.mark.parametrize("answer", [wait_to_be_left, drip_headers])
def test_silent_server_is_given_up(answer: Callable[[socket.socket], None]) -> None:
    with listen(answer) as url:
        start = time.monotonic()
        message = refusal(url=url, timeout=0.3)
        assert time.monotonic() - start < 3
    assert "no answer within 0.3 s" in message


def test_unknown_host_is_given_up() -> None:
    start = time.monotonic()
    message = refusal(url=f"http://cifar.invalid/{ARCHIVE}", timeout=2)
    assert time.monotonic() - start < 5
    assert f"http://cifar.invalid/{ARCHIVE} cannot be reached" in message


@pytest.mark.slow
def test_silent_server_is_given_up_within_15_s_by_default() -> None:
    with listen(wait_to_be_left) as url:
        start = time.monotonic()
        refusal(url=url)
        assert time.monotonic() - start < 15


def test_stalled_download_is_given_up_and_a_slow_one_is_not(
    archive: Path, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive.read_bytes()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content)

    def stall(connection: socket.socket) -> None:
        connection.sendall(head + content[:100])
        wait_to_be_left(connection)

    with listen(stall) as url:
        assert "broke off after 100 bytes: timed out" in refusal(url=url, timeout=0.3)
    assert names(folder) == []

    def slow(connection: socket.socket) -> None:
        connection.sendall(head)
        for i in range(8):
            connection.sendall(content[i * len(content) // 8 : (i + 1) * len(content) // 8])
            time.sleep(0.1)

    monkeypatch.setattr("src.data.download.PROGRESS_S", 0.2)
    with listen(slow) as url:
        cifar10(url=url, md5=md5_of(archive), timeout=0.5)
    assert re.search(r"\d of \d MB\n", capfd.readouterr().err)


def test_several_at_once(archive: Path, folder: Path) -> None:
    with serve(archive.read_bytes()) as url, ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(cifar10, url=url, md5=md5_of(archive)) for _ in range(4)]
        assert len({run.result().fingerprint for run in runs}) == 1
    assert names(folder) == [FOLDER, ARCHIVE]


def test_archive_by_hand_that_is_not_whole_is_refused_and_kept(archive: Path, folder: Path) -> None:
    (folder / ARCHIVE).write_bytes(archive.read_bytes()[:-100])
    message = refusal(md5=md5_of(archive))
    assert f"data/{ARCHIVE} is not whole" in message
    assert names(folder) == [ARCHIVE]


def test_folder_by_hand_is_used_without_archive(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    assert len(cifar10(url="http://127.0.0.1:9/").train) == 90


def test_folder_that_lacks_a_file_is_completed(archive: Path, folder: Path) -> None:
    had_by_hand(archive, folder)
    (folder / FOLDER / "data_batch_3").unlink()
    (folder / FOLDER / "my_notes").touch()
    assert len(cifar10(md5=md5_of(archive)).train) == 90
    assert names(folder / FOLDER) == sorted([*BATCHES, "my_notes"])


def test_damaged_batch_file_is_named(archive: Path, folder: Path) -> None:
    had_by_hand(archive, folder)
    path = folder / FOLDER / "data_batch_3"
    whole = path.read_bytes()
    grey = np.zeros((4, 1024), np.uint8)
    for wrong in (whole[:1000], b"", b"junk", batch_pickle(grey, [0] * 4)):
        path.write_bytes(wrong)
        message = refusal()
        assert f"data/{FOLDER}/data_batch_3 is no batch file" in message
        assert f"Remove data/{FOLDER}" in message


def test_unwritable_data_dir(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "file" / "data"))
    with serve(archive.read_bytes()) as url:
        assert "file/data cannot be written: Not a directory" in refusal(url=url)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_malicious_pickle_is_refused(archive: Path, folder: Path, protocol: int) -> None:
    evil = pickle.dumps({b"data": Evil(folder / "owned"), b"labels": []}, protocol)
    pickle.loads(evil)
    (folder / "owned").unlink()  # so it would have worked
    had_by_hand(archive, folder)
    (folder / FOLDER / "data_batch_1").write_bytes(evil)
    assert re.search(r"UnpicklingError: asks for \S+", refusal())
    assert names(folder) == [FOLDER, ARCHIVE]


def test_malicious_members_stay_inside(archive: Path, folder: Path, tmp_path: Path) -> None:
    outside = [f"{FOLDER}/../../owned", "../owned", str(tmp_path / "owned")]
    with tarfile.open(archive) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    write_archive(folder / ARCHIVE, files | dict.fromkeys(outside, b"!"))
    assert len(cifar10(md5=md5_of(folder / ARCHIVE)).train) == 90
    assert names(tmp_path) == ["data"]
    assert names(folder / FOLDER) == sorted(BATCHES)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_the_archive_are_not_followed(archive: Path, folder: Path, tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    with tarfile.open(archive) as tar, tarfile.open(folder / ARCHIVE, "w:gz") as out:
        for member in tar:
            content = tar.extractfile(member).read()
            if member.name.endswith("data_batch_1"):
                member.type, member.size = kind, 0
                member.linkname = str(tmp_path / "secret")
                content = b""
            out.addfile(member, io.BytesIO(content))
    assert "data_batch_1" in refusal(md5=md5_of(folder / ARCHIVE))
    assert not (folder / FOLDER / "data_batch_1").exists()


def test_archive_that_is_none(folder: Path) -> None:
    (folder / ARCHIVE).write_bytes(b"junk")
    message = refusal(md5=md5_of(folder / ARCHIVE))
    assert f"data/{ARCHIVE} cannot be extracted" in message
    assert names(folder) == [ARCHIVE]
