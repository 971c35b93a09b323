"""Bad days: a folder that is gone, a clock set back, odd names, changed settings and code, signals at any time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks.kill import run_difference
from src import config, results
from src.config import ROOT, Refused
from src.run import Run, read_checkpoint, read_meta
from tests.test_refusals import contents

# Runs the Python text in the file `train.30` at the 30th batch of a start that it trains on, for once. The first
# of valid is the trial before the folder is made.
ACTING = """
import os, shutil, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path

import gin
import torch
from src.models.mlp import MLP


@gin.register(denylist=["input_shape", "n_classes"])
class Acting(MLP):
    def __init__(self, input_shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__(input_shape, n_classes, n_hidden=[32], dropout=0.3)
        self.seen = Counter()

    def forward(self, x):
        kind = "train" if self.training else "test" if torch.is_inference_mode_enabled() else "valid"
        self.seen[kind] += 1
        act = Path(f"{kind}.{self.seen[kind]}")
        if act.exists():
            exec(act.rename("done").read_text())
        return super().forward(x)
"""
# 22 batches an epoch of training, 8 of validation.
CONFIG = """
import acting
training_loop.data = @digits
training_loop.model = @Acting
training_loop.optimizer = @SGD
SGD.lr = 0.05
SGD.momentum = 0.9
training_loop.batch_size = 50
training_loop.n_epochs = 3
"""
RELOAD = ("-b", "training_loop.reload=True")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with a config, in which acts are written, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    Path("acting.py").write_text(ACTING)
    Path("a.gin").write_text(CONFIG)


def act(moment: str, text: str) -> None:
    Path(moment).write_text(text)


def assert_goes_on_exactly(main, run: str, *arguments: str) -> None:
    assert main("train", "whole", "a.gin", *arguments) == 0
    assert main("train", run, "a.gin", *arguments, *RELOAD) == 0
    assert results.status(Path(run)) == "finished"
    assert run_difference(Path("whole"), Path(run)) is None


# --- the folder and the clock


@pytest.mark.parametrize("moment", ["train.3", "valid.4", "train.30", "valid.25", "test.2"])
def test_a_folder_removed_under_the_run(main, capfd, moment):
    act(moment, "shutil.rmtree('run')")
    assert main("train", "run", "a.gin") == 1
    assert capfd.readouterr().err == "train.py: run: was removed while the run was writing to it\n"
    assert not Path("run").exists()


@pytest.mark.parametrize("moment", ["train.30", "test.2"])
def test_nothing_is_written_into_anothers_folder_of_the_same_name(main, capfd, moment):
    act(moment, "shutil.rmtree('run'); os.mkdir('run'); Path('run/HEARTBEAT').touch()")
    assert main("train", "run", "a.gin") == 1
    assert "was removed" in capfd.readouterr().err
    assert not {path.name for path in Path("run").iterdir()} & {"meta.json", "checkpoint.pt", "FINISHED"}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("faketime"), reason="needs faketime")
def test_a_clock_set_back(main, train, tmp_path):
    preload = subprocess.run(["faketime", "-f", "+0", "printenv", "LD_PRELOAD"], capture_output=True, text=True)
    clock = {"LD_PRELOAD": preload.stdout.strip(), "FAKETIME_TIMESTAMP_FILE": str(tmp_path / "clock")}
    # The monotonic clock is not set; this one's sleep() fails in a Python process that sleeps.
    clock |= {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    Path("clock").write_text("+0\n")
    act("train.30", "Path('clock').write_text('-1d\\n')")
    look = [sys.executable, str(ROOT / "bin/runs.py"), "run", "--json"]
    act("train.40", f"with open('seen', 'w') as file:\n    subprocess.run({look}, stdout=file, check=True)")
    done = train("run", "a.gin", env=os.environ | clock)
    assert done.returncode == 0, done.stderr
    start = read_meta(Path("run"))["starts"][0]
    assert start["stop"] < start["start"]
    assert json.loads(Path("seen").read_text())[0]["status"] == "running"
    assert results.status(Path("run")) == "finished"
    assert all(row["time"] > 0 and row["images_per_s"] > 0 for row in results.load_history("run"))
    assert Path("run/stderr.txt").read_text() == ""
    assert main("train", "whole", "a.gin") == 0
    assert run_difference(Path("whole"), Path("run")) is None


# --- names

NAMES = [
    " a  b ",
    "it's",
    'a"b',
    "$(touch x)`touch x`",
    "a\nb",
    "-a",
    "--help",
    "ünï🙂",
    "a;b&c|d*?[x]",
    "%s\\n",
    "~",
    "#c",
]


def test_a_folder_may_have_any_name(main, capfd):
    for name in NAMES:
        run = str(Path("runs", name)) if name[0] != "-" else name
        assert main("train", "-b", "training_loop.n_epochs=1;digits.n_train=50", "--", run, "a.gin") == 0, name
        capfd.readouterr()
        assert main("evaluate", "--json", "--", run) == 0
        assert json.loads(capfd.readouterr().out)["run"] == run
        assert not results.load_model(run).training
        assert main("runs", "--json", "--", run) == 0
        row = json.loads(capfd.readouterr().out)[0]
        assert (row["run"], row["status"]) == (run, "finished")
    assert main("runs", "--json", "runs") == 0
    listed = {Path(row["run"]).name for row in json.loads(capfd.readouterr().out)}
    assert listed == {name for name in NAMES if name[0] != "-"}
    assert not list(Path().rglob("x"))


@pytest.mark.slow
def test_command_sh_repeats_the_run_whatever_its_name(main):
    name = "-" + " ".join(NAMES)
    odd = "the $(touch x)\n'config.gin"
    Path("a.gin").rename(odd)
    assert main("train", "-b", "training_loop.monitor='val_loss'", "--bindings=SGD.lr=0.03", "--", name, odd) == 0
    Path(name).rename("first")
    Path("elsewhere").mkdir()
    shutil.copy("first/command.sh", "elsewhere/again.sh")
    subprocess.run(["bash", "again.sh"], check=True, cwd="elsewhere", capture_output=True)
    assert run_difference(Path("first"), Path(name)) is None
    assert not list(Path().rglob("x"))


# --- settings and code


def test_accepted_changes_count_and_are_kept(main, capfd):
    assert main("train", "run", "a.gin") == 0
    first = Path("run/config.gin").read_text()
    changes = "SGD.lr=0.01;training_loop.batch_size=60;training_loop.n_epochs=4"
    assert main("train", "run", "a.gin", *RELOAD, "-b", changes) == 2
    assert main("train", "run", "a.gin", *RELOAD, "-b", f"{changes};training_loop.accept_changes=True") == 0
    assert results.load_history("run")[-1]["lr"] == 0.01
    now = results.load_config("run")
    assert (now["SGD.lr"], now["training_loop.batch_size"], now["training_loop.n_epochs"]) == ("0.01", "60", "4")
    assert now["training_loop.reload"] == now["training_loop.accept_changes"] == "False"
    meta = read_meta(Path("run"))
    warnings = "\n".join(meta["warnings"])
    assert "SGD.lr: 0.05 -> 0.01" in warnings and "training_loop.batch_size: 50 -> 60" in warnings
    assert [start.get("config") for start in meta["starts"]] == [first, Path("run/config.gin").read_text()]
    # They are the run's own from now on.
    assert main("train", "run", "a.gin", *RELOAD, "-b", changes) == 0
    capfd.readouterr()
    accept = "training_loop.batch_size=60;training_loop.n_epochs=5;training_loop.accept_changes=True"
    other = f"{accept};training_loop.optimizer=@Adam;Adam.lr=0.002"
    assert main("train", "run", "a.gin", *RELOAD, "-b", other) == 0  # which begins anew
    assert results.load_history("run")[-1]["lr"] == 0.002
    before = contents(Path("run"))
    assert main("train", "run", "a.gin", *RELOAD, "-b", f"{other};training_loop.model=@MLP;MLP.n_hidden=(9,)") == 2
    assert "weights do not fit the model as it is now" in capfd.readouterr().err
    assert contents(Path("run")) == before


def test_what_does_not_change_the_result_needs_no_asking(main):
    assert main("train", "run", "a.gin", "-b", "training_loop.n_epochs=2") == 0
    free = "training_loop.device='cpu';training_loop.log_every=7;training_loop.commit_every=20"
    assert_goes_on_exactly(main, "run", "-b", free)
    assert read_meta(Path("run"))["warnings"] == []
    # The run has the epochs that were made.
    assert main("train", "run", "a.gin", *RELOAD, "-b", "training_loop.n_epochs=1") == 0
    assert len(results.load_history("run")) == 3
    assert results.load_config("run")["training_loop.n_epochs"] == "3"


@pytest.mark.slow
def test_code_that_has_changed_is_warned_of_and_kept(tmp_path):
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    clone = tmp_path / "clone"
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists() and not name.startswith("results/"):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    subprocess.run(["git", "init", "--quiet"], cwd=clone, check=True)
    command = [sys.executable, str(clone / "bin/train.py"), str(tmp_path / "run"), "a.gin", *RELOAD]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("src/models/mlp.py", "tests/conftest.py", "README.md"):
        with open(clone / name, "a") as file:
            file.write("# changed\n")
    (clone / "src/new.py").write_text("")
    (clone / "src/reproduce.py").unlink()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    changed = "src/models/mlp.py, src/new.py, src/reproduce.py"
    warning = f"the code has changed since the run's last start: {changed}"
    assert f"warning: {warning}\n" in done.stderr
    meta = read_meta(Path("run"))
    assert meta["warnings"] == [warning]
    assert [start["code"] for start in meta["starts"]] == ["code.tar.gz", "code.2.tar.gz"]
    for archive, is_new in (("code.tar.gz", False), ("code.2.tar.gz", True)):
        with tarfile.open(Path("run", archive)) as tar:
            assert tar.extractfile("src/models/mlp.py").read().endswith(b"# changed\n") == is_new
            assert ("src/new.py" in tar.getnames()) == is_new


# --- commits inside an epoch, and signals


@pytest.mark.slow
def test_what_commit_every_asks_for_is_committed_inside_an_epoch(start, main):
    """Two runs side by side, killed in their second epoch."""
    acts = {"9": {}, "'0.01min'": {"train.30": "time.sleep(0.7)"}}
    processes = {}
    for number, (commit_every, before) in enumerate(acts.items()):
        folder = Path(f"{number}")
        folder.mkdir()
        for moment, text in (before | {"train.38": "os.kill(os.getpid(), signal.SIGKILL)"}).items():
            act(folder / moment, text)
        bindings = ("-b", f"training_loop.commit_every={commit_every}")
        processes[folder / "run"] = start("run", "../a.gin", *bindings, cwd=folder)
    for run, process in processes.items():
        assert process.wait(60) == -signal.SIGKILL
        assert results.status(run) == "dead"
        state = read_checkpoint(run / "checkpoint.pt")
        assert state["epoch"] == 1 and 8 <= state["step"] < 16
    assert main("train", "whole", "a.gin") == 0
    for run in processes:
        assert main("train", run, "a.gin", *RELOAD) == 0
        assert run_difference(Path("whole"), run) is None


def test_stop_at_stops_there_and_goes_on_exactly(main):
    assert main("train", "run", "a.gin", "-b", "training_loop.stop_at=31") == 0
    assert results.status(Path("run")) == "stopped"
    state = read_checkpoint(Path("run/checkpoint.pt"))
    assert (state["epoch"], state["step"], state["total_steps"]) == (1, 9, 31)
    assert results.load_config("run")["training_loop.stop_at"] == "None"
    assert_goes_on_exactly(main, "run")


def test_a_second_ctrl_c_stops_at_once_and_what_was_committed_stays(main):
    act("train.30", "os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)")
    assert main("train", "run", "a.gin") == 128 + signal.SIGINT
    assert results.status(Path("run")) == "stopped"
    state = read_checkpoint(Path("run/checkpoint.pt"))
    assert (state["epoch"], state["step"]) == (1, 0)
    assert_goes_on_exactly(main, "run")


@pytest.mark.parametrize(
    "moment, position", [("valid.1", None), ("valid.4", (0, 22)), ("valid.11", (1, 22)), ("test.2", (3, 0))]
)
def test_a_stop_outside_of_the_steps(main, moment, position):
    act(moment, "os.kill(os.getpid(), signal.SIGTERM)")
    assert main("train", "run", "a.gin") == 128 + signal.SIGTERM
    assert Path("run").exists() == bool(position)
    if position:
        assert results.status(Path("run")) == "stopped"
        state = read_checkpoint(Path("run/checkpoint.pt"))
        assert (state["epoch"], state["step"]) == position
    assert_goes_on_exactly(main, "run")


def test_a_stop_during_the_imports_cannot_be_swallowed_by_them(main, capfd):
    Path("swallows.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\nexcept Exception:\n    pass\n"
    )
    Path("b.gin").write_text("import swallows\n")
    assert main("train", "run", "a.gin", "b.gin") == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "train.py: stopped by SIGTERM\n"
    assert not Path("run").exists()


def test_a_stop_while_the_start_is_recorded(main, tmp_path, monkeypatch):
    """By the first git that it calls."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for n_starts in (1, 2):
        Path("git").write_text('#!/bin/bash\nrm "$0"\nkill -TERM $PPID\nexec git "$@"\n')
        Path("git").chmod(0o755)
        assert main("train", "run", "a.gin", *RELOAD) == 128 + signal.SIGTERM
        assert [start["status"] for start in read_meta(Path("run"))["starts"]] == ["stopped"] * n_starts
    assert_goes_on_exactly(main, "run")


def test_accumulated_batches_are_one_large_one_and_are_never_torn(main):
    plain = "training_loop.model=@MLP;SGD.momentum=0.0;training_loop.n_epochs=1"
    # 22 batches: five times four, and two that are left, the last one smaller.
    assert main("train", "large", "a.gin", "-b", f"{plain};training_loop.batch_size=200") == 0
    assert main("train", "small", "a.gin", "-b", f"{plain};training_loop.accumulate=4") == 0
    large, small = (read_checkpoint(Path(run, "best.pt"))["network"] for run in ("large", "small"))
    for name, weights in large.items():
        torch.testing.assert_close(small[name], weights, rtol=0, atol=1e-6)

    accumulate = ("-b", "training_loop.accumulate=4")
    act("train.31", "os.kill(os.getpid(), signal.SIGTERM)")  # batch 9 of the second epoch
    assert main("train", "run", "a.gin", *accumulate) == 128 + signal.SIGTERM
    state = read_checkpoint(Path("run/checkpoint.pt"))
    assert (state["epoch"], state["step"]) == (1, 12)
    assert_goes_on_exactly(main, "run", *accumulate)


# --- refused, and nothing created

REFUSED = {
    "SGD.lr=-1": "SGD: Invalid learning rate: -1 (",
    "training_loop.model=@MLP;MLP.dropout=2.0": "MLP: dropout probability has to be between 0 and 1, but got 2.0 (",
    "training_loop.model=@SimpleCNN;SimpleCNN.n_dense=-3": "negative dimension -3",
    "training_loop.callbacks=[@LRSchedule];LRSchedule.base_lr=0.1;LRSchedule.schedule=[[5,1.0],[2,0.1]]": (
        "LRSchedule: schedule = [[5, 1.0], [2, 0.1]]: its epochs must rise"
    ),
    "training_loop.callbacks=[@WarmupCosine];WarmupCosine.total_steps=9;WarmupCosine.warmup_steps=9": (
        "WarmupCosine: warmup_steps = 9 must be below total_steps = 9"
    ),
    "training_loop.metrics=[@Accuracy,@torchmetrics.ConfusionMatrix];torchmetrics.ConfusionMatrix.task='multiclass'": (
        "the metric confusion_matrix gives 100 numbers: it must be one"
    ),
    "training_loop.model=@ResNet18;training_loop.batch_size=1078": "the last batch of an epoch would have one image",
    "training_loop.model=@ResNet18;training_loop.batch_size=1": "the last batch of an epoch would have one image",
    **{
        f"training_loop.commit_every={value}": f"training_loop.commit_every = {value}"
        for value in ("0", "-3", "2.5", "True", "''", "'10'", "'min'", "'0min'", "'-1min'", "'nanmin'", "'infmin'")
    },
    "training_loop.stop_at=0": "training_loop.stop_at = 0",
}


@pytest.mark.parametrize("bindings", REFUSED)
def test_a_bad_value_is_refused_with_one_message(main, capfd, tmp_path, bindings):
    before = contents(tmp_path)
    assert main("train", "run", "a.gin", "-b", bindings) == 2
    errors = capfd.readouterr().err
    assert REFUSED[bindings] in errors and len(errors.splitlines()) == 1 and errors.startswith("train.py: ")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 2500, "a\udcffb"], ids=["long name", "long path", "no UTF-8"])
def test_a_name_that_no_folder_can_have_is_refused(main, capfd, tmp_path, name):
    before = contents(tmp_path)
    assert main("train", name, "a.gin") == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert contents(tmp_path) == before


def test_a_folder_below_one_that_cannot_be_read_is_refused(tmp_path):
    """As an unprivileged user: root may read anything."""
    Path("locked").mkdir(mode=0o000)
    for parent in (tmp_path, *tmp_path.parents[:-1]):
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o055)
    child = os.fork()
    if child == 0:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            Run("locked/run", config.read(["a.gin"]), [])
        except Refused as refusal:
            os._exit(3 if "locked/run: cannot be looked at: Permission denied" in refusal.message else 4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
