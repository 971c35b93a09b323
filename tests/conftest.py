"""What all tests share."""

import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `src`, as the scripts see it

# The ten typical edits fit the template itself, not a project that was edited since.
collect_ignore = [] if (ROOT / "copier.yml").exists() else ["test_edits.py"]

# A finished run's folder, but for TensorBoard's files; a run of one epoch has no checkpoint.prev.pt.
RUN_FILES = {"command.sh", "config.gin", "configs", "code.tar.gz", "git.txt", "meta.json", "environment.txt"}
RUN_FILES |= {"stdout.txt", "stderr.txt", "history.csv", "checkpoint.pt", "checkpoint.prev.pt", "best.pt"}
RUN_FILES |= {"eval_results.json", "HEARTBEAT", "FINISHED"}

# 11 batches an epoch.
SMALL = """
training_loop.data = @digits
digits.padding = 1
training_loop.model = @SimpleCNN
SimpleCNN.n_filters = [8, 8]
SimpleCNN.n_dense = 16
SimpleCNN.dropout = 0.2
training_loop.optimizer = @SGD
SGD.lr = 0.05
SGD.momentum = 0.9
training_loop.batch_size = 100
training_loop.n_epochs = 2
"""

# A busy machine is no failure.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
# With it set, lines that a killed process had not flushed would seem safe.
os.environ.pop("PYTHONUNBUFFERED", None)
# Networks this small are fastest so, and several processes do not fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Under -n a test that is marked alone waits for those of the other processes, and they for it."""
    with open(__file__) as file:
        fcntl.flock(file, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        try:
            return (yield)
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a process that the test has left has it, too


def copy_code(folder: Path) -> Path:
    """The code as it is now, in another folder, without git."""
    from src.record import code_files

    for name, content in code_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def refusal_of_unprivileged(run: str, gin_file: str) -> str:
    """The message that refuses the run to a user who is not root, since root may read and write anywhere; or ""."""
    from src import config
    from src.run import Run

    for parent in (Path.cwd(), *Path.cwd().parents[:-1]):
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o055)
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            Run(run, config.read([gin_file]), [])
        except (config.Refused, OSError) as refusal:
            os.write(sender, str(refusal).encode())
        finally:
            os._exit(0)
    os.close(sender)
    os.waitpid(child, 0)
    with open(receiver) as message:
        return message.read()


def _command(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "bin/train.py"), *map(str, arguments)]


@pytest.fixture
def small(request, tmp_path, monkeypatch):
    """A small config, small.gin, in the current folder: SMALL, or that of the test's module."""
    monkeypatch.chdir(tmp_path)
    Path("small.gin").write_text(getattr(request.module, "SMALL", SMALL))
    return "small.gin"


@pytest.fixture
def train():
    """Runs bin/train.py to its end in a process of its own."""

    def run(*arguments, **options) -> subprocess.CompletedProcess[str]:
        return subprocess.run(_command(*arguments), capture_output=True, text=True, timeout=300, **options)

    return run


@pytest.fixture
def start():
    """Starts bin/train.py; what is left of it is killed after the test."""
    processes = []

    def run(*arguments, **options) -> subprocess.Popen[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        processes.append(subprocess.Popen(_command(*arguments), **options))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def main():
    """Runs a script of bin/ in this process: main("train", "run", "a.gin") gives its exit code."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def run(script: str, *arguments) -> int:
        path = ROOT / "bin" / f"{script}.py"
        spec = importlib.util.spec_from_file_location(f"bin_{script}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main([str(path), *map(str, arguments)])

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
