import hashlib
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import BinaryIO
from urllib.request import urlopen

from src.data.dataset import shown


def download(url: str, path: Path, *, md5: str, timeout: float) -> bytes:
    """The content of the file `path`, which is got from `url` first if there is none.

    The file is made beside and renamed: all of it or nothing, and several processes do no harm.
    timeout: seconds to the first byte, name look-up and connection included, then to the next.
    Raises OSError, or ValueError for a wrong checksum.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as beside:
            part = Path(beside, path.name)
            with open(part, "wb") as file:
                _fetch(url, file, timeout)
            _verified(part.read_bytes(), md5, url)
            os.replace(part, path)
    return _verified(path.read_bytes(), md5, shown(path))


def _verified(content: bytes, md5: str, origin: str) -> bytes:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{origin} has a wrong checksum: md5 {found}, not {md5}")
    return content


def _fetch(url: str, file: BinaryIO, timeout: float) -> None:
    """Write what `url` gives.

    A thread does it and is left behind when the time is up: urlopen's own limit starts anew for
    each address and each read, and does not hold for the name look-up.
    """
    errors: list[Exception] = []

    def fetch() -> None:
        try:
            with urlopen(url, timeout=timeout) as response:
                while chunk := response.read1(1 << 16):
                    file.write(chunk)
                total = int(response.headers.get("Content-Length", 0))
            if file.tell() < total:
                raise EOFError(f"broke off after {file.tell():,} of {total:,} bytes")
        except Exception as error:
            errors.append(error)

    print(f"Downloading {url}", file=sys.stderr)
    thread = Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(timeout)
    done = 0
    while thread.is_alive() and file.tell() > done:
        done = file.tell()
        print(f"  {done / 1e6:.0f} MB", file=sys.stderr)
        thread.join(timeout)
    if thread.is_alive():
        errors.append(TimeoutError(f"nothing came for {timeout:g} s"))
    if errors:
        raise OSError(f"{url}: {errors[0]}") from errors[0]
