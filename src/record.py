"""What ran: the command, the code, the packages, written into a run's folder."""

import gzip
import io
import os
import platform
import re
import shlex
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.config import ROOT, Refused

MAX_CODE_FILE = 2**20  # bytes; larger files are data, not code
NO_CODE = (".git", ".venv", ".hypothesis", "data", "results", "e.local.sh")  # in the root
COMPUTES = (".py", ".sh", ".toml", "requirements.txt")  # ends of names of code; the others are texts and data


def command(arguments: Sequence[str], folder: Path, number: int, time: str, n_threads: int) -> str:
    """One entry of command.sh: the directory, relative to the run's folder if both are in the clone; the variables
    that change what is computed; the command. All quoted.
    """
    here, folder, (script, *rest) = Path.cwd(), folder.resolve(), arguments
    directory = shlex.quote(str(here))
    if here.is_relative_to(ROOT) and folder.is_relative_to(ROOT):
        directory = f'"$(dirname "$0")"/{shlex.quote(os.path.relpath(here, folder))}'
        script = f"./{os.path.relpath(script)}"  # a shell's exec makes it absolute
    given = {name: os.environ[name] for name in ("DATA_DIR", "CUDA_VISIBLE_DEVICES") if name in os.environ}
    words = [f"{name}={shlex.quote(value)}" for name, value in (given | {"OMP_NUM_THREADS": str(n_threads)}).items()]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun; on each of the machines
        nodes, where = os.environ["GROUP_WORLD_SIZE"], ["--standalone"]
        if nodes != "1":
            where = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={os.environ['MASTER_ADDR']}:29400"]
        words += ["torchrun", *where, f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"]
    return f"\n# start {number}, {time}\n(cd {directory} && {' '.join(words)} {shlex.join([script, *rest])})\n"


def git(*arguments: str) -> str:
    """What git prints in the repository; nothing without git or outside a work tree."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def git_state() -> str:
    """Commit, branch, changed files and the diff to the commit."""
    if commit := git("rev-parse", "--verify", "HEAD"):
        branch = git("branch", "--show-current") or "none (detached)\n"
        return f"commit {commit}branch {branch}\n{git('status', '--short')}\n{git('diff', 'HEAD')}"
    return "not a git repository, or one without a commit: code.tar.gz holds the code\n"


def code_files() -> dict[str, bytes]:
    """The code as it is now: what git tracks or would, up to 1 MB a file, without results/ and other run folders.

    Without git: all but for what git would ignore.
    """
    if listed := git("ls-files", "-z", "--cached", "--others", "--exclude-standard"):
        files = [ROOT / name for name in listed.split("\0") if name]
    else:
        top = [f for f in ROOT.iterdir() if f.name not in NO_CODE and not f.match(".*_cache")]
        files = [f for path in top for f in (path, *path.rglob("*")) if "__pycache__" not in f.parts]
    # Runs and results are no code; and to read the lock of the own run is to lose it.
    others = {ROOT / "results", *(f.parent for f in files if f.name == "HEARTBEAT")}
    code = {f for f in files if others.isdisjoint(f.parents) and f.is_file() and os.access(f, os.R_OK)}
    return {f.relative_to(ROOT).as_posix(): f.read_bytes() for f in sorted(code) if f.stat().st_size <= MAX_CODE_FILE}


def code_archive(code: Mapping[str, bytes]) -> bytes:
    """code.tar.gz: the same files give the same bytes."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in code.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mode = 0o755 if os.access(ROOT / name, os.X_OK) else 0o644
            tar.addfile(member, io.BytesIO(content))
    return gzip.compress(archive.getvalue(), mtime=0)


def read_archive(path: Path) -> dict[str, bytes]:
    """The files of code.tar.gz by their names. Raises Refused if it cannot be read, whole, or is none of ours."""
    files = {}
    try:
        content = gzip.decompress(path.read_bytes())  # all of it first: its checksum stands at the end
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                name = Path(member.name)
                file = tar.extractfile(member) if member.isreg() else None
                if not file or name.is_absolute() or ".." in name.parts:
                    raise tarfile.TarError(f"{name} is no plain file inside of its folder")
                files[member.name] = file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise Refused(f"{path}: cannot be read: {error}") from None
    return files


def unpack(archive: Path, folder: Path) -> None:
    """Writes the archive's files into the folder. Raises Refused, with nothing written, as `read_archive` does."""
    for name, content in read_archive(archive).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def changed_files(code: Mapping[str, bytes] | Path, archive: Path) -> list[str]:
    """Files of `code`, or of an archive of it, that are not as in `archive`; only what computes counts: no tests,
    texts, data.
    """
    try:
        before, now = read_archive(archive), read_archive(code) if isinstance(code, Path) else code
    except Refused as refusal:
        return [f"not known which, {refusal}"]
    changed = [name for name in sorted(now.keys() | before.keys()) if now.get(name) != before.get(name)]
    return [name for name in changed if name.endswith(COMPUTES) and not name.startswith("tests/")]


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, str]:
    """`name: in a -> in b` for each name that has another value, or none, in the other; NaN is equal to NaN here."""
    lines = {}
    for name in dict.fromkeys([*a, *b]):
        x, y = (values.get(name, "(not set)") for values in (a, b))
        if x != y and not (x != x and y != y):
            step = f" ({y - x:+.3g})" if isinstance(x, float) and isinstance(y, float) else ""
            lines[name] = f"{name}: {x} -> {y}{step}"
    return lines


def copy_configs(files: Sequence[Path], folder: Path) -> None:
    """The input configs as they were; another file of the same name gets a number."""
    folder.mkdir(exist_ok=True)
    for file in files:
        target, content, number = folder / file.name, file.read_bytes(), 1
        while target.exists() and target.read_bytes() != content:
            number += 1
            target = folder / f"{file.stem}.{number}{file.suffix}"
        target.write_bytes(content)


def environment() -> str:
    """environment.txt: Python, the system, and each installed package with its version."""
    # By the names of their folders: to read what is in them would take half a millisecond a package.
    found = (re.match(r"(.+?)-([^-]+).*\.(dist|egg)-info", f.name) for p in sys.path for f in Path(p).glob("*-info"))
    packages = {f"{name[1].replace('_', '-')}=={name[2]}" for name in found if name}
    system = f"# Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return "\n".join([system, *sorted(packages, key=str.lower)]) + "\n"
