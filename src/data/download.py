import hashlib
import os
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from src.data.dataset import Unavailable


def download(url: str, path: Path, md5: str, timeout: float = 10.0) -> bytes:
    """The content of the file `path`, which is got from `url` first if there is none.

    timeout: seconds to the answer, name look-up and connection included, then to the next byte.
    Raises Unavailable, with what to do.
    """
    is_here, name = path.exists(), os.path.relpath(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if is_here else _fetch(url, timeout)
        if (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
            raise ValueError(f"wrong checksum: md5 {found}, not {md5}")
        if not is_here:  # written beside and renamed: all of it or nothing, and several processes do no harm
            with TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as beside:
                whole = Path(beside, path.name)
                whole.write_bytes(content)
                os.replace(whole, path)
    except Exception as error:
        raise Unavailable(
            f"{name if is_here else url}: {str(error) or 'no answer in time'}\n"
            f"Download it yourself and save it as {name} (DATA_DIR names another folder),\n"
            'or train on the digits, which need no network: -b "training_loop.data=@digits"'
        ) from error
    return content


def _fetch(url: str, timeout: float) -> bytes:
    print(f"Downloading {url}", file=sys.stderr)
    # A thread opens it, and is left behind when the time is up: urlopen's own limit starts anew for each address and
    # each header, and does not hold for the name look-up.
    with ThreadPool(1) as pool:
        response = pool.apply_async(urlopen, (url,), {"timeout": timeout}).get(timeout)
    with response:
        content: bytes = response.read()
    return content
