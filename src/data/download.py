import hashlib
import os
import sys
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any
from urllib.request import urlopen


def download(url: str, path: Path, *, md5: str, timeout: float) -> bytes:
    """The content of the file `path`, which is got from `url` first if there is none.

    The file is made beside and renamed: all of it or nothing, and several processes do no harm.
    timeout: seconds to the answer, name look-up and connection included, then to the next byte.
    Raises OSError, or ValueError for a wrong checksum.
    """
    if path.exists():
        return _verified(path.read_bytes(), md5, os.path.relpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _verified(_fetch(url, timeout), md5, url)
    with TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as beside:
        part = Path(beside, path.name)
        part.write_bytes(content)
        os.replace(part, path)
    return content


def _verified(content: bytes, md5: str, origin: str) -> bytes:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{origin} has a wrong checksum: md5 {found}, not {md5}")
    return content


def _fetch(url: str, timeout: float) -> bytes:
    """What `url` gives.

    A thread opens it, and is left behind when the time is up: urlopen's own limit starts anew for
    each address and each header, and does not hold for the name look-up.
    """
    opened: Future[Any] = Future()

    def open_url() -> None:
        try:
            opened.set_result(urlopen(url, timeout=timeout))
        except Exception as error:
            opened.set_exception(error)

    print(f"Downloading {url}", file=sys.stderr)
    Thread(target=open_url, daemon=True).start()
    try:
        with opened.result(timeout) as response:
            if size := response.headers["Content-Length"]:
                print(f"{int(size) / 1e6:.1f} MB", file=sys.stderr)
            content: bytes = response.read()
    except Exception as error:
        raise OSError(f"{url}: {str(error) or f'nothing came for {timeout:g} s'}") from error
    return content
