import hashlib
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from uuid import uuid4

from src.data.dataset import Unavailable, shown

PROGRESS_S = 5.0  # between two lines


def download(url: str, path: Path, *, md5: str, timeout: float) -> None:
    """Get `url` into the file `path`: all of it or nothing. Several processes may do so at once.

    timeout: seconds to the first byte, name look-up and connection included, then to each next.
    Raises Unavailable with the reason: no answer, broken off, wrong checksum, not writable.
    """
    part = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")
    digest = hashlib.md5(usedforsecurity=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:
            for chunk in _stream(url, timeout):
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != md5:
            raise Unavailable(f"{url} has a wrong checksum: md5 {digest.hexdigest()}, not {md5}.")
        os.replace(part, path)
    except OSError as error:
        raise Unavailable(
            f"{shown(path.parent)} cannot be written: {error.strerror}. DATA_DIR may name another folder."
        ) from error
    finally:
        with suppress(OSError):  # renamed, or never made
            part.unlink()


def _stream(url: str, timeout: float) -> Iterator[bytes]:
    """The bytes of `url` in chunks, with a line on stderr now and then."""
    response, chunk = _open(url, timeout)
    with response:
        total = int(response.headers.get("Content-Length") or 0)
        of_total = f" of {total / 1e6:.0f} MB" if total else " MB"
        print(f"Downloading {url}", file=sys.stderr)
        done, printed = 0, time.monotonic()
        while chunk:
            yield chunk
            done += len(chunk)
            if time.monotonic() - printed >= PROGRESS_S:
                print(f"  {done / 1e6:.0f}{of_total}", file=sys.stderr)
                printed = time.monotonic()
            try:
                chunk = response.read1(1 << 16)
            except (OSError, HTTPException) as error:
                raise Unavailable(f"{url} broke off after {done:,} bytes: {error}.") from error
    if done < total:
        raise Unavailable(f"{url} broke off after {done:,} of {total:,} bytes.")


def _open(url: str, timeout: float) -> tuple[Any, bytes]:
    """The response of `url` and its first byte.

    A thread asks and is left behind when the time is up, since urlopen's own limit starts anew
    for each address and each read, and does not hold for the name look-up.
    """
    answer: queue.SimpleQueue[tuple[Any, bytes] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            response = urlopen(url, timeout=timeout)
            answer.put((response, response.read(1)))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        got = answer.get(timeout=timeout)
    except queue.Empty:
        got = TimeoutError()
    if isinstance(got, Exception):
        reason = getattr(got, "reason", got)  # URLError wraps it
        if isinstance(reason, TimeoutError):
            reason = f"no answer within {timeout:g} s"
        raise Unavailable(f"{url} cannot be reached: {reason}.") from got
    return got
