"""What ran: the command, the code, the packages, written into a run's folder."""

import gzip
import io
import os
import platform
import re
import shlex
import subprocess
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from src.config import ROOT, Refused

MAX_CODE_FILE = 2**20  # bytes; larger files are data, not code


def command(arguments: Sequence[str], folder: Path, number: int, time: str, n_threads: int) -> str:
    """One entry of command.sh: the directory, relative to the run's folder if both are in the clone; the variables
    that change what is computed; the command. All quoted.
    """
    here, folder = Path.cwd(), folder.resolve()
    script, *rest = arguments
    if here.is_relative_to(ROOT) and folder.is_relative_to(ROOT):
        directory = f'"$(dirname "$0")"/{shlex.quote(os.path.relpath(here, folder))}'
        script = os.path.relpath(script)  # a shell's exec makes it absolute
        script = script if "/" in script else f"./{script}"
    else:
        directory = shlex.quote(str(here))
    given = [name for name in ("DATA_DIR", "CUDA_VISIBLE_DEVICES") if name in os.environ]
    words = [f"{name}={shlex.quote(os.environ[name])}" for name in given]
    words += [f"OMP_NUM_THREADS={n_threads}", *torchrun(), shlex.join([script, *rest])]
    return f"# start {number}, {time}\n(cd {directory} && {' '.join(words)})\n"


def torchrun() -> list[str]:
    """The torchrun that has started this process, as a person types it; none for a single process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    nodes, where = os.environ["GROUP_WORLD_SIZE"], ["--standalone"]
    if nodes != "1":  # on each of the machines
        where = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={os.environ['MASTER_ADDR']}:29400"]
    return ["torchrun", *where, f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"]


def git(*arguments: str) -> str | None:
    """What git prints in the repository, or None without git or outside a work tree."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")


def git_state() -> str:
    """Commit, branch, changed files and the diff to the commit."""
    if git("rev-parse", "--is-inside-work-tree") is None:
        return "not a git repository: code.tar.gz holds the code\n"
    commit = (git("rev-parse", "HEAD") or "none yet").strip()
    branch = (git("branch", "--show-current") or "none (detached)").strip()
    status, diff = git("status", "--short") or "", git("diff", "HEAD") or ""
    return f"commit {commit}\nbranch {branch}\n\n{status}\n{diff}"


def code_files() -> dict[str, bytes]:
    """The code as it is now: what git tracks or would, up to 1 MB a file, without results/.

    Without git: all such files of the root and of the project's own folders.
    """
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed is not None:
        paths = [Path(name) for name in listed.split("\0") if name]
    else:
        folders = ("bin", "src", "configs", "experiments", "tests", "benchmarks")
        files = [*ROOT.glob("*.*"), *(f for name in folders for f in (ROOT / name).rglob("*"))]
        paths = [f.relative_to(ROOT) for f in files if "__pycache__" not in f.parts and f.name != "e.local.sh"]
    code = {}
    runs = {path.parent for path in paths if path.name == "HEARTBEAT"}  # no code; and to read their lock is to lose it
    for path in sorted(set(paths)):
        file = ROOT / path
        small = file.is_file() and file.stat().st_size <= MAX_CODE_FILE
        if small and path.parts[0] != "results" and runs.isdisjoint(path.parents):
            code[path.as_posix()] = file.read_bytes()
    return code


def code_archive(code: Mapping[str, bytes]) -> bytes:
    """code.tar.gz: the same files give the same bytes."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in code.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mode = 0o755 if os.access(ROOT / name, os.X_OK) else 0o644
            tar.addfile(member, io.BytesIO(content))
    return gzip.compress(archive.getvalue(), compresslevel=6, mtime=0)


def read_archive(path: Path) -> dict[str, bytes]:
    """The files of code.tar.gz by their names. Raises Refused if it cannot be read, whole."""
    files = {}
    try:
        content = gzip.decompress(path.read_bytes())  # all of it first: its checksum stands at the end
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() else None
                if not file:
                    raise tarfile.TarError(f"{member.name} is no plain file")
                files[member.name] = file.read()
        return files
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise Refused(f"{path}: cannot be read: {error}") from None


def changed_files(code: Mapping[str, bytes] | Path, archive: Path) -> list[str]:
    """Files of `code`, or of an archive of it, that are not as in `archive`; only what computes counts: no tests,
    texts, data.
    """
    try:
        before, now = read_archive(archive), read_archive(code) if isinstance(code, Path) else code
    except Refused as refusal:
        return [f"not known which, {refusal}"]
    changed = [name for name in sorted(now.keys() | before.keys()) if now.get(name) != before.get(name)]
    computes = (".py", ".sh", ".toml", "requirements.txt")
    return [name for name in changed if name.endswith(computes) and not name.startswith("tests/")]


def copy_configs(files: Sequence[Path], folder: Path) -> None:
    """The input configs as they were; another file of the same name gets a number."""
    folder.mkdir(exist_ok=True)
    for file in files:
        content, number = file.read_bytes(), 1
        target = folder / file.name
        while target.exists() and target.read_bytes() != content:
            number += 1
            target = folder / f"{file.stem}.{number}{file.suffix}"
        target.write_bytes(content)


def environment() -> str:
    """environment.txt: Python, the system, and each installed package with its version."""
    packages = set()
    for distribution in metadata.distributions():
        # distribution.metadata parses all of it, for half a millisecond a package.
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        said = dict(re.findall(r"^(Name|Version): (.*)", text.partition("\n\n")[0], re.M))
        if len(said) == 2:
            packages.add(f"{said['Name']}=={said['Version']}")
    system = f"# Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return "\n".join([system, *sorted(packages, key=str.lower)]) + "\n"
