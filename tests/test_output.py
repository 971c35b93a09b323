"""What is printed: kept in files whatever happens, shown on the terminal, with a bar and a debugger there."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from src.run import read_meta
from tests.conftest import RUN_FILES

ROOT = Path(__file__).parents[1]
# By four ways at once. No flush, and the last lines of C and Python end without a newline.
SAY = """
import ctypes, os, sys

def say(name):
    print(name, "python")
    print(name, "python error", file=sys.stderr)
    os.write(1, f"{name} descriptor\\n".encode())
    os.system(f"echo {name} child; echo {name} child error >&2")
    ctypes.CDLL(None).puts(f"{name} C".encode())
"""
SAID = "{0} python\n{0} descriptor\n{0} child\n{0} C\n"
SAID_ERRORS = "{0} python error\n{0} child error\n"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes a Python script that uses src.output; gives the command that runs it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    Path("say.py").write_text(SAY)

    def write(body: str) -> list[str]:
        head = "import ctypes, os, signal, sys, time\nfrom pathlib import Path\nfrom say import say\n"
        Path("script.py").write_text(f"{head}from src.output import Output\nHERE = Path()\n{body}")
        return [sys.executable, "script.py"]

    return write


def run(command, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def kept() -> tuple[str, str]:
    """What stdout.txt and stderr.txt of the current folder hold."""
    return Path("stdout.txt").read_text(), Path("stderr.txt").read_text()


def follower(process: subprocess.Popen) -> int:
    """The process that shows the files; the last one if another has just ended."""
    table = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(maxsplit=2) for line in table.stdout.splitlines()]
    return max(int(pid) for pid, parent, args in rows if int(parent) == process.pid and "output.py" in args)


def fill(descriptor: int) -> None:
    """Fills a pipe or terminal, so that who writes to it waits."""
    os.set_blocking(descriptor, False)
    for block in (b"x" * 512, b"x"):
        try:
            while True:
                os.write(descriptor, block)
        except BlockingIOError:
            pass
    os.set_blocking(descriptor, True)


def wait_for_text(path: Path, text: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, f"no {text!r} in {path}"
        time.sleep(0.01)


class Terminal:
    """A program with a pseudo-terminal of its own."""

    def __init__(self, command, **options) -> None:
        self.descriptor, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            **({"stdin": slave, "stdout": slave, "stderr": slave} | options),
            env=os.environ | {"TERM": "xterm", "INPUTRC": os.devnull},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
            pass_fds=[slave],
        )
        os.close(slave)
        self.bytes = b""
        self.seen = 0  # bytes up to the end of what was waited for

    def until(self, text: str, seconds: float = 60) -> None:
        """Reads until the text is seen once more, or, with an empty text, to the end."""
        deadline = time.monotonic() + seconds
        while not text or text.encode() not in self.bytes[self.seen :]:
            ready, _, _ = select.select([self.descriptor], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.bytes.decode()}"
            try:
                block = os.read(self.descriptor, 1 << 16)
            except OSError:  # Linux: all who had the terminal have closed it
                block = b""
            if not block:
                assert not text, f"no {text!r} in {self.bytes.decode()}"
                return
            self.bytes += block
        self.seen = self.bytes.index(text.encode(), self.seen) + len(text)

    def type(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def end(self) -> int:
        """Reads the rest; gives the exit code."""
        self.until("")
        os.close(self.descriptor)
        return self.process.wait(10)

    def screen(self) -> list[str]:
        """The lines one sees."""
        lines, column = [""], 0
        for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|.", self.bytes.decode(), re.DOTALL):
            if token == "\n":
                lines.append("")
            elif token == "\r":
                column = 0
            elif token == "\b":
                column -= 1
            elif token == "\x1b[K":
                lines[-1] = lines[-1][:column]
            elif token[0] != "\x1b":
                lines[-1] = lines[-1][:column].ljust(column) + token + lines[-1][column + 1 :]
                column += 1
        return lines


@pytest.fixture
def terminal():
    """Terminal; what is left of its program is killed after the test."""
    terminals = []

    def open_terminal(command, **options) -> Terminal:
        terminals.append(Terminal(command, **options))
        return terminals[-1]

    yield open_terminal
    for opened in terminals:
        opened.process.kill()
        opened.process.wait()


# --- files


def test_all_that_was_written_is_there_after_a_kill_in_order_and_appended(script):
    command = script(
        "output = Output()\nsay('early')\noutput.move_to(HERE)\nsay('late')\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    expected = [text.format("early") + text.format("late") for text in (SAID, SAID_ERRORS)]
    for n_starts in (1, 2):
        done = run(command)
        assert done.returncode == -signal.SIGKILL
        assert [done.stdout, done.stderr] == expected
        assert kept() == (n_starts * expected[0], n_starts * expected[1])


def test_a_kill_before_the_folder_is_there_loses_nothing_on_the_terminal(script):
    done = run(script("output = Output()\nsay('early')\nos.kill(os.getpid(), signal.SIGKILL)"))
    assert (done.stdout, done.stderr) == (SAID.format("early"), SAID_ERRORS.format("early"))


def test_lines_without_an_end_are_kept_at_the_end(script):
    done = run(
        script(
            "output = Output()\noutput.move_to(HERE)\nprint('by python', end='')\n"
            "ctypes.CDLL(None).printf(b', by C')\noutput.close()"
        )
    )
    assert kept()[0] == done.stdout == "by python, by C"


def test_much_output_is_the_same_on_the_terminal_and_in_the_file(script):
    """Through a pipe that is read late and that the caller has made non-blocking."""
    command = script(
        "output = Output()\noutput.move_to(HERE)\n"
        "for i in range(20000):\n    print('line', i)\n    print('error', i, file=sys.stderr)\noutput.close()"
    )
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    time.sleep(0.5)
    with open(reader) as file:
        shown = file.read()
    assert process.wait(10) == 0
    assert kept()[0] == shown == "".join(f"line {i}\n" for i in range(20000))
    assert kept()[1] == "".join(f"error {i}\n" for i in range(20000))


def test_descriptors_that_the_caller_closed(script):
    command = script("output = Output()\nsay('early')\noutput.move_to(HERE)\nsay('late')\noutput.close()")
    done = run(["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *command])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert kept() == tuple(t.format("early") + t.format("late") for t in (SAID, SAID_ERRORS))


def test_a_signal_to_all_processes_does_not_end_the_follower(script):
    command = script("output = Output()\nprint('ready')\ninput()\nprint('more')\noutput.close()")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        os.kill(follower(process), number)
    assert process.communicate("\n", timeout=10) == ("more\n", None)


def test_stderr_is_shown_when_stdout_is_no_longer_read(script):
    command = script(
        "output = Output()\nfor _ in range(100):\n    print('a line')\n    time.sleep(0.01)\n"
        "print('an error', file=sys.stderr)\noutput.close()"
    )
    done = run(["bash", "-c", '"$@" | head -1', "bash", *command])
    assert (done.stdout, done.stderr) == ("a line\n", "an error\n")


def test_a_crash_in_c_says_where_it_was(script):
    body = "output = Output()\noutput.move_to(HERE)\nprint('before')\n{}"
    done = run(script(body.format("ctypes.string_at(0)")))
    assert done.returncode == -signal.SIGSEGV
    assert kept() == (done.stdout, done.stderr)
    assert done.stdout == "before\n"
    assert "Fatal Python error: Segmentation fault" in done.stderr and "script.py" in done.stderr
    # An error in move_to: a person sees it.
    done = run(script("output = Output()\ntry:\n    output.move_to(HERE / 'no')\nfinally:\n    output.close()"))
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stderr and "ValueError" not in done.stderr


# --- the debugger

DEBUGGED = """
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
output = Output()
output.move_to(HERE)
print("begin", end="", flush=True)
for _ in range(3):
    print(" .", end="", flush=True)
    time.sleep(0.1)
print()
breakpoint()
print("one")
print("two")
print("three")
while len(sys.argv) > 1 and not asked:
    time.sleep(0.02)
print("asked to stop", bool(asked))
output.close()
"""


def test_breakpoint_on_a_terminal(script, terminal):
    debugged = terminal([*script(DEBUGGED), "wait"])
    debugged.until("(Pdb) ")
    debugged.type("6*7\x01100+\n")  # Ctrl-A: to the beginning of the line
    debugged.until("142")
    debugged.until("(Pdb) ")
    debugged.type("\x1b[A\x7f9\n")  # the line before, its last character replaced
    debugged.until("154")
    debugged.until("(Pdb) ")
    for _ in range(2):
        debugged.type("n\n")
        debugged.until("(Pdb) ")
    debugged.type("c\n")
    debugged.until("three")
    debugged.type("\x03")
    debugged.until("asked to stop")
    assert debugged.end() == 0
    # What was printed stands before the prompt that comes after it.
    shown = [re.sub(r"^> .*", ">", line) for line in debugged.screen()]
    assert shown[:3] == ["begin . . .", ">", '-> print("one")']
    begin = shown.index("(Pdb) n")
    assert shown[begin - 1] == "154"
    assert shown[begin:] == [
        *["(Pdb) n", "one", ">", '-> print("two")'],
        *["(Pdb) n", "two", ">", '-> print("three")'],
        *["(Pdb) c", "three", "asked to stop True", ""],
    ]
    assert kept() == ("begin . . .\none\ntwo\nthree\nasked to stop True\n", "")


def test_breakpoint_without_a_terminal_is_pythons_own(script):
    command = script(DEBUGGED.replace("breakpoint()", "breakpoint()  # pdb"))
    with_output = run(command, input="p 6*7\nc\n")
    assert with_output.returncode == 0 and "(Pdb) 42" in with_output.stdout
    assert kept() == (with_output.stdout, with_output.stderr)
    plain = re.sub(r"output = .*|output\..*", "pass", Path("script.py").read_text())
    Path("script.py").write_text(plain)
    assert run(command, input="p 6*7\nc\n").stdout == with_output.stdout
    at_the_end = run(script(DEBUGGED), stdin=subprocess.DEVNULL)
    assert at_the_end.returncode == 1 and "bdb.BdbQuit" in at_the_end.stderr


# --- bin/train.py

MODEL = """
import os, signal, time, gin
from torch import nn
from say import say

@gin.register(denylist=["input_shape", "n_classes"])
class Loud(nn.Module):
    def __init__(self, input_shape, n_classes, end=""):
        super().__init__()
        self.dense = nn.Linear(64, n_classes)
        self.end, self.step = end, 0

    def forward(self, x):
        logits = self.dense(x.flatten(1))
        if self.training:
            self.step += 1
            time.sleep(0.04)
            if self.step % 5 == 4:
                print("step", self.step)
            if self.step == 14:
                self.last_words()
        return logits

    def last_words(self):
        if self.end == "debug":
            breakpoint()
        say("last")
        if self.end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.end == "raise":
            raise KeyError("the bug")
"""
CONFIG = """
import loud
training_loop.data = @digits
training_loop.model = @Loud
training_loop.optimizer = @SGD
training_loop.batch_size = 100
training_loop.n_epochs = 2
"""
STEPS = "".join(f"step {step}\n" for step in (4, 9, 14))


@pytest.fixture
def loud(script):
    """The command of bin/train.py, but for the run's folder, with a model that prints."""
    Path("loud.py").write_text(MODEL)
    Path("loud.gin").write_text(CONFIG)

    def command(run_dir: str, end: str = "") -> list[str]:
        return [sys.executable, str(ROOT / "bin/train.py"), run_dir, "loud.gin", "-b", f"Loud.end='{end}'"]

    return command


EPOCH_LINE = r"epoch (\d)/2  loss .*  val_acc .*  [\d,]+ images/s  \d:\d\d left"


def assert_complete(run_dir: str) -> None:
    written = Path(run_dir, "stdout.txt").read_text()
    assert re.findall(EPOCH_LINE, written) == ["1", "2"]
    assert SAID.format("last") in written and STEPS.splitlines()[2] in written
    assert written.endswith("\n") and "\ntest  n 359" in written
    assert Path(run_dir, "stderr.txt").read_text() == SAID_ERRORS.format("last")
    assert not re.search("[█░\x1b\r]", written)
    assert (read_meta(Path(run_dir))["status"], RUN_FILES - set(os.listdir(run_dir))) == ("finished", set())


@pytest.mark.slow
@pytest.mark.alone
def test_runs_finish_whatever_becomes_of_the_terminal(loud, request):
    """They run side by side, since each takes seconds to start."""
    pipe = subprocess.PIPE
    runs = {}

    def start(name: str, command: list[str], **options) -> None:
        runs[name] = subprocess.Popen(command, text=True, **({"stdout": pipe, "stderr": pipe} | options))
        request.addfinalizer(runs[name].kill)

    start("head", ["bash", "-c", '"$@" | head -1; exit ${PIPESTATUS[0]}', "bash", *loud("head")])
    dead, slave = pty.openpty()
    start("closed", ["bash", "-c", 'exec "$@" >&-', "bash", *loud("closed")], stderr=slave)
    os.close(slave)
    reader, writer = os.pipe()
    master, slave = pty.openpty()
    fill(writer)
    fill(slave)
    start("blocked", loud("blocked"), stdout=writer, stderr=slave)
    os.close(writer)
    os.close(slave)
    start("orphan", loud("orphan"))
    start("killed", loud("killed", "kill"))
    start("raised", loud("raised", "raise"))

    wait_for_text(Path("orphan/stdout.txt"), "epoch 1")
    os.kill(follower(runs["orphan"]), signal.SIGKILL)
    os.close(dead)

    assert runs["blocked"].wait(60) == 0
    assert time.time() - Path("blocked/FINISHED").stat().st_mtime < 2 + 3  # and Python's own end
    shown = {name: process.communicate(timeout=60) for name, process in runs.items()}
    os.close(reader)
    os.close(master)
    codes = {name: process.returncode for name, process in runs.items()}
    assert codes == {"head": 0, "closed": 0, "blocked": 0, "orphan": 0, "killed": -9, "raised": 1}
    for name in ("head", "closed", "blocked", "orphan"):
        assert_complete(name)
    assert shown["head"][0].count("\n") == 1
    assert shown["head"][1] == SAID_ERRORS.format("last")
    for name in ("killed", "raised"):
        files = tuple(Path(name, file).read_text() for file in ("stdout.txt", "stderr.txt"))
        assert files == shown[name]
        assert files[0].endswith(STEPS.splitlines()[2] + "\n" + SAID.format("last"))
        assert files[1].startswith(SAID_ERRORS.format("last"))
    assert "KeyError: 'the bug'" in shown["raised"][1] and "loud.py" in shown["raised"][1]


def test_a_bar_and_the_debugger_on_a_terminal(loud, terminal):
    training = terminal(loud("run", "debug"))
    training.until("(Pdb) ")
    training.type("self.n\x7fstep*3\x01100+\n")
    training.until("142")
    training.until("(Pdb) ")
    training.type("c\n")
    assert training.end() == 0
    assert_complete("run")
    drawn = re.findall(r"\r\x1b\[K(epoch \d/2 █*░* \d+/11  [\d,]+ images/s  0:00 left)", training.bytes.decode())
    assert len(drawn) >= 4 and all("░" in bar for bar in drawn[:2])
    lines = [line for line in training.screen() if line]
    assert not any("█" in line or "░" in line for line in lines)
    written = Path("run/stdout.txt").read_text().splitlines()
    assert "(Pdb)" not in "".join(written)
    errors = SAID_ERRORS.format("last").splitlines()
    assert [line for line in lines if line in written] == [line for line in written if line]
    assert [line for line in lines if line in errors] == errors
    debugger = [line for line in lines if line not in written + errors]
    assert debugger[0].startswith("> ") and "loud.py" in debugger[0]
    assert "142" in debugger and debugger[-1].endswith("(Pdb) c")


def test_a_bar_is_for_the_terminal_of_stderr(script, terminal):
    command = script("output = Output()\nprint(output.terminal is not None)\noutput.close()")
    for where, bar in (({"stdout": subprocess.PIPE}, True), ({"stderr": subprocess.PIPE}, False)):
        opened = terminal(command, **where)
        shown = opened.process.communicate(timeout=10)[0] or b""
        opened.until("")
        assert f"{bar}\n".encode() == shown + opened.bytes.replace(b"\r\x1b[K", b"").replace(b"\r\n", b"\n")
