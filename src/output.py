"""A process's stdout and stderr as files: what is written is kept, whatever becomes of the terminal.

File descriptors 1 and 2 are the files themselves, so that a SIGKILL, a crash in C or a dead terminal
loses nothing. Another process, the follower (this file run as a script), copies them to the terminal;
it may block or die without effect on the run.
"""

import contextlib
import ctypes
import faulthandler
import io
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

C = ctypes.CDLL(None)  # what C code in this process writes with
CLEAR_LINE = b"\r\x1b[K"


class Output:
    """Collects stdout and stderr in unnamed files first, in a run's folder from `move_to` on.

    `terminal` is the descriptor of the user's stderr when it is a terminal, else None. Of several processes the first
    is shown there; those of another rank get files of their own, stdout.rank1.txt and so on.
    """

    def __init__(self, rank: int = 0) -> None:
        while (spare := os.open(os.devnull, os.O_RDWR)) < 3:  # the caller closed it: `bin/train.py ... >&-`
            pass
        os.close(spare)
        sys.stdout = sys.stdout or open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = sys.stderr or open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        faulthandler.enable(2)  # a crash in C says where it was
        self._saved = [os.dup(descriptor) for descriptor in (1, 2)]
        self.rank = rank
        self.terminal = self._saved[1] if os.isatty(self._saved[1]) and rank == 0 else None
        self._files: list[Any] = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115
        # Python and C buffer whole blocks of stdout on files: after a kill the last lines would be missing.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)
        name = "__stdoutp" if sys.platform == "darwin" else "stdout"
        C.setvbuf(ctypes.c_void_p.in_dll(C, name), None, 1, 0)  # 1: _IOLBF
        self._collect()
        if "PYTHONBREAKPOINT" not in os.environ and all(map(os.isatty, (0, *self._saved))):
            sys.breakpointhook = self._breakpoint

    def move_to(self, folder: Path) -> None:
        """From now on the files are the folder's, which get what was written until now, too."""
        end = f".rank{self.rank}.txt" if self.rank else ".txt"
        files = [open(folder / f"{name}{end}", "ab+") for name in ("stdout", "stderr")]  # noqa: SIM115
        self._release()
        for file, collected in zip(files, self._files, strict=True):
            collected.seek(0)
            shutil.copyfileobj(collected, file)
            file.flush()
            collected.close()
        self._files = files
        self._collect()

    def close(self) -> None:
        """Gives the terminal back, once the follower has shown what is left (2 s at most)."""
        self._release()
        sys.breakpointhook = sys.__breakpointhook__
        for file in self._files:
            file.close()
        for descriptor in self._saved:
            os.close(descriptor)

    def _collect(self) -> None:
        """Descriptors 1 and 2 are the files; the follower shows what comes from now on."""
        _flush()
        files = [file.fileno() for file in self._files]
        if self.rank == 0:  # first: where the follower cannot be started, the error is for the terminal
            offsets = [os.fstat(file).st_size for file in files]
            self._follower = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, *map(str, (os.getpid(), *files, *offsets))],
                stdin=subprocess.PIPE,
                stdout=self._saved[0],
                stderr=self._saved[1],
                pass_fds=files,
                start_new_session=True,  # Ctrl-C at the terminal is for the run alone
            )
        for descriptor, file in zip((1, 2), files, strict=True):
            os.dup2(file, descriptor)

    def _release(self) -> None:
        """Descriptors 1 and 2 are what the caller gave; the follower has ended, if it can."""
        _flush()
        for descriptor, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, descriptor)
        if self.rank == 0:
            # It may be dead, blocked or, after an error in move_to, stopped already.
            with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
                self._follower.communicate(b"stop", timeout=2)

    def _breakpoint(self, *_: Any, **__: Any) -> None:
        """pdb on the terminal: input() edits lines only if descriptors 0 and 1 are terminals."""
        import pdb

        output = self

        class TerminalPdb(pdb.Pdb):
            def interaction(self, *arguments: Any) -> None:
                output._release()
                os.write(1, CLEAR_LINE)
                try:
                    super().interaction(*arguments)
                finally:
                    output._collect()

        # Ctrl-C still asks the run to stop once it goes on: pdb would take it over.
        TerminalPdb(nosigint=True).set_trace(sys._getframe(1))


def _flush() -> None:
    """Python's and C's buffers, into the descriptors as they are now."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    C.fflush(None)


def follow(parent: int, *files_and_offsets: int) -> None:
    """The follower: copies file 1 to stdout and file 2 to stderr until told to stop or orphaned."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a batch system sends them to all processes
    files, offsets = (dict(zip((1, 2), files_and_offsets[k : k + 2], strict=True)) for k in (0, 2))
    clear = CLEAR_LINE  # a progress bar may stand on the terminal, but not behind a part of a line
    running = True
    while running and offsets:
        running = os.getppid() == parent and not select.select([0], [], [], 0.05)[0]
        for target in list(offsets):
            try:
                while block := os.pread(files[target], 1 << 16, offsets[target]):
                    offsets[target] += len(block)
                    shown = clear + block if os.isatty(target) else block
                    while shown:
                        select.select([], [target], [])  # the caller may have made it non-blocking
                        shown = shown[os.write(target, shown) :]
                    clear = CLEAR_LINE if block.endswith(b"\n") else b""
            except OSError:  # the terminal is gone, or who read the pipe
                del offsets[target]


if __name__ == "__main__":
    follow(*map(int, sys.argv[1:]))
