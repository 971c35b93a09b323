"""Bad days: a folder that is gone, a clock set back, odd names, changed settings and code, signals at any time."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.kill import difference, run_difference
from src import results
from src.callbacks import WarmupCosine
from src.config import ROOT
from src.reproduce import parts_of
from src.run import read_checkpoint, read_meta, write_checkpoint
from tests.conftest import copy_code, refusal_of_unprivileged
from tests.test_callbacks import read_events
from tests.test_refusals import contents

# Runs the Python text in the file `train.30` at the 30th batch of a start that it trains on, for once. The first
# of valid is the trial before the folder is made. With WATCHED that in `begin`, `begin.2` and `end.2`, too.
ACTING = """
import multiprocessing, os, shutil, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path

import gin
import torch
from poutyne import Callback
from src import results
from src.models.mlp import MLP
from src.run import is_locked, read_checkpoint


def run_act(moment):
    act = Path(moment)
    if act.exists():
        exec(act.rename("done").read_text())


@gin.register(denylist=["input_shape", "n_classes"])
class Acting(MLP):
    def __init__(self, input_shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__(input_shape, n_classes, n_hidden=[32], dropout=0.3)
        self.seen = Counter()

    def forward(self, x):
        kind = "train" if self.training else "test" if torch.is_inference_mode_enabled() else "valid"
        self.seen[kind] += 1
        run_act(f"{kind}.{self.seen[kind]}")
        return super().forward(x)


@gin.register
class Watcher(Callback):
    n_begun = 0

    def on_train_begin(self, logs):
        run_act("begin")

    def on_epoch_begin(self, epoch_number, logs):
        self.n_begun += 1
        run_act(f"begin.{epoch_number}")

    def on_epoch_end(self, epoch_number, logs):
        run_act(f"end.{epoch_number}")

    def state_dict(self):
        return {"n_begun": self.n_begun}

    def load_state_dict(self, state):
        self.n_begun = state["n_begun"]


@gin.register
def without_a_number(nothing: float = float("nan")):
    return torch.nn.CrossEntropyLoss()
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
WATCHED = ("-b", "training_loop.callbacks=[@Watcher]")


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


def killed(main, *arguments: str) -> bool:
    """Whether a child of this process that trains is killed."""
    child = get_context("fork").Process(target=main, args=("train", *arguments))
    child.start()
    child.join()
    return child.exitcode == -signal.SIGKILL


def assert_goes_on_exactly(main, run: str, *arguments: str) -> None:
    assert main("train", "whole", "a.gin", *arguments) == 0
    assert main("train", run, "a.gin", *arguments, *RELOAD) == 0
    assert results.status(Path(run)) == "finished"
    assert run_difference(Path("whole"), Path(run)) is None


# --- the folder and the clock


def test_the_heartbeat_goes_on(main, monkeypatch):
    monkeypatch.setattr("src.run.HEARTBEAT_SECONDS", 0.0)
    act("train.40", "subprocess.run(['cp', 'run/HEARTBEAT', 'beat'], check=True)")
    assert main("train", "run", "a.gin") == 0
    assert int(Path("beat").read_text().split()[1]) >= 38
    assert Path("run/HEARTBEAT").read_text().startswith("step 66 ")


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


def ask_for(run: str, code: Path = ROOT) -> str:
    """An act: another process asks for the run, and is refused."""
    command = [sys.executable, str(code / "bin/train.py"), run, "a.gin", *RELOAD]
    return (
        f"second = subprocess.run({command}, capture_output=True, text=True)\n"
        "assert second.returncode == 2 and 'is writing to this run' in second.stderr, second\n"
    )


def test_to_look_at_the_own_run_does_not_give_its_lock_away(main):
    act(
        "end.1",
        "assert is_locked(Path('run')) and results.overview(Path('run'))['status'] == 'running'\n" + ask_for("run"),
    )
    assert main("train", "run", "a.gin", *WATCHED) == 0
    assert Path("done").exists()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["runs", "experiments/a"])
def test_a_run_inside_of_the_clone_is_no_code(tmp_path, folder):
    """Where git does not ignore it, and without git among the folders of code."""
    clone = copy_code(tmp_path / "clone")
    if folder == "runs":
        subprocess.run(["git", "init", "--quiet"], cwd=clone, check=True)
    run = f"clone/{folder}/run"
    act("train.10", ask_for(run, clone))
    twice = (
        "import sys\nsys.path.insert(0, 'clone')\nfrom bin.train import main\n"
        "for n in (1, 2):\n"
        f"    bindings = f'training_loop.reload=True;training_loop.n_epochs={{n}}'\n"
        f"    assert main(['train.py', '{run}', 'a.gin', '-b', bindings]) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", twice], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path("done").exists() and done.stderr == ""
    assert read_meta(Path(run))["warnings"] == []
    with tarfile.open(f"{run}/code.tar.gz") as tar:
        assert "src/run.py" in tar.getnames()
        assert not any(name.startswith(folder) for name in tar.getnames())


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
    before, unfit = contents(Path("run")), "training_loop.n_epochs=6;training_loop.model=@MLP;MLP.n_hidden=(9,)"
    assert main("train", "run", "a.gin", *RELOAD, "-b", f"{other};{unfit}") == 2
    assert "last commit does not fit the settings as they are now: Error" in capfd.readouterr().err
    assert contents(Path("run")) == before


@pytest.mark.parametrize("moment", ["begin", "begin.2", "train.3"])
@pytest.mark.parametrize("change", ["SGD.lr=0.01", "training_loop.optimizer=@Adam;Adam.lr=0.01"])
def test_accepted_changes_are_in_force_after_a_kill(main, moment, change):
    """Before a commit holds them, and after."""
    assert main("train", "run", "a.gin", *WATCHED, "-b", "training_loop.n_epochs=1") == 0
    shutil.copytree("run", "whole")
    accepted = ("a.gin", *WATCHED, *RELOAD, "-b", f"{change};training_loop.accept_changes=True")
    assert main("train", "whole", *accepted) == 0
    act(moment, "os.kill(os.getpid(), signal.SIGKILL)")
    assert killed(main, "run", *accepted)
    assert main("train", "run", *accepted) == 0
    assert results.load_history("run")[-1]["lr"] == 0.01
    assert run_difference(Path("whole"), Path("run")) is None
    parts = parts_of(read_meta(Path("run"))["starts"])
    assert [(part["total_steps"], ".lr = 0.01" in part["config"]) for part in parts] == [(0, False), (22, True)]


def test_accepted_changes_that_came_to_nothing_are_not_repeated(main):
    assert main("train", "run", "a.gin", *WATCHED, "-b", "training_loop.n_epochs=1") == 0
    act("begin", "os.kill(os.getpid(), signal.SIGKILL)")
    changed = ("-b", "SGD.lr=0.01;digits.n_train=500;training_loop.accept_changes=True")
    assert killed(main, "run", "a.gin", *WATCHED, *RELOAD, *changed)
    assert read_meta(Path("run"))["data"]["n_train"] == 1079
    assert results.evaluate("run")[0]["n"] == 359  # the data are still those that it was trained on
    assert_goes_on_exactly(main, "run", *WATCHED)
    assert "SGD.lr = 0.05" in parts_of(read_meta(Path("run"))["starts"])[-1]["config"]


def test_accepted_changes_need_something_to_train(main, capfd):
    assert main("train", "run", "a.gin", "-b", "training_loop.n_epochs=1") == 0
    before = contents(Path("run"))
    changed = "training_loop.n_epochs=1;training_loop.accept_changes=True;digits.n_train=500"
    assert main("train", "run", "a.gin", *RELOAD, "-b", changed) == 2
    assert "nothing is left to train: raise training_loop.n_epochs" in capfd.readouterr().err
    assert main("train", "run", "a.gin", *RELOAD, "-b", "training_loop.init_from='elsewhere'") == 2
    assert "the run began from random weights" in capfd.readouterr().err
    assert contents(Path("run")) == before


@pytest.mark.parametrize("change", ["training_loop.batch_size=60", "training_loop.seed=3", "digits.n_train=500"])
def test_what_would_mix_two_orders_of_an_epoch_waits_for_its_end(main, capfd, change):
    assert main("train", "run", "a.gin", "-b", "training_loop.stop_at=5") == 0
    before = contents(Path("run"))
    changed = f"{change};training_loop.accept_changes=True"
    assert main("train", "run", "a.gin", *RELOAD, "-b", changed) == 2
    assert "cannot change inside an epoch: finish epoch 1 with the old one first" in capfd.readouterr().err
    assert contents(Path("run")) == before


def test_accepted_settings_of_a_scheduler_and_another_list_of_callbacks(main):
    callbacks = "training_loop.callbacks=[@Watcher, @StepLR];StepLR.step_size=1;StepLR.gamma={}"
    assert main("train", "run", "a.gin", "-b", callbacks.format(0.5) + ";training_loop.n_epochs=2") == 0
    accept = ";training_loop.n_epochs=4;training_loop.accept_changes=True;training_loop.monitor='acc'"
    changed = callbacks.format(0.1).replace("[@", "[@EarlyStopping, @") + accept
    assert main("train", "run", "a.gin", *RELOAD, "-b", changed) == 0
    lrs = [row["lr"] for row in results.load_history("run")]
    assert lrs == pytest.approx([0.05, 0.025, 0.0125, 0.00125])
    state = read_checkpoint(Path("run/checkpoint.pt"))
    assert dict(state["callbacks"])["Watcher"] == {"n_begun": 4}
    assert state["best"]["epoch"] >= 3  # by what is watched now


@pytest.mark.parametrize("setting", ["AdamW.amsgrad=True", "RMSprop.centered=True", "RMSprop.momentum=0.9"])
def test_an_accepted_setting_that_the_optimizers_state_lacks(main, setting):
    settings = f"training_loop.optimizer=@{setting.partition('.')[0]};training_loop.n_epochs="
    assert main("train", "run", "a.gin", "-b", f"{settings}1") == 0
    accepted = f"{settings}2;{setting};training_loop.accept_changes=True"
    assert main("train", "run", "a.gin", *RELOAD, "-b", accepted) == 0


def test_the_best_weights_stay_the_best_by_an_accepted_monitor(main):
    assert main("train", "run", "a.gin", "-b", "training_loop.n_epochs=2") == 0
    best = read_checkpoint(Path("run/best.pt"))
    accepted = "training_loop.accept_changes=True;training_loop.monitor='val_loss';training_loop.monitor_mode='min'"
    worse = f"{accepted};training_loop.n_epochs=3;SGD.lr=30.0"
    assert main("train", "run", "a.gin", *RELOAD, "-b", worse) == 0
    history = results.load_history("run")
    assert history[-1]["val_loss"] > history[best["epoch"] - 1]["val_loss"]
    assert read_checkpoint(Path("run/best.pt"))["epoch"] == best["epoch"] == results.evaluate("run")[0]["epoch"]


def test_other_last_bits_by_threads_are_warned_of(main, monkeypatch):
    assert main("train", "run", "a.gin", "-b", "training_loop.n_epochs=1") == 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert main("train", "run", "a.gin", *RELOAD) == 0
    assert "1 threads until now, 3 from here on" in read_meta(Path("run"))["warnings"][0]


def test_the_code_is_the_same_with_git_and_without(tmp_path):
    clone = copy_code(tmp_path / "clone")
    mine = "experiments/mine/data/parts.py"
    for name in (".venv/lib.py", "data/a.csv", "results/a/b.py", "e.local.sh", "src/__pycache__/a.pyc", mine):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    names = [sys.executable, "-c", "from src.record import code_files; print(*sorted(code_files()), sep='\\n')"]
    printed = [subprocess.run(names, cwd=clone, capture_output=True, text=True, check=True).stdout]
    subprocess.run(["git", "init", "--quiet"], cwd=clone, check=True)
    printed.append(subprocess.run(names, cwd=clone, capture_output=True, text=True, check=True).stdout)
    assert printed[0] == printed[1] and ".ci/run" in printed[0] and mine in printed[0]


def test_a_start_that_committed_nothing_leaves_no_facts(main):
    one = "training_loop.n_epochs=1"
    assert main("train", "a", "a.gin", "-b", one) == 0
    act("begin", "os.kill(os.getpid(), signal.SIGKILL)")
    assert killed(main, "run", "a.gin", *WATCHED, "-b", f"{one};training_loop.init_from='a'")
    assert read_meta(Path("run"))["init_from"]["run"] == "a"
    assert main("train", "run", "a.gin", *WATCHED, *RELOAD, "-b", one) == 0
    assert "init_from" not in read_meta(Path("run"))
    assert main("train", "run", "a.gin", *WATCHED, *RELOAD) == 0
    assert results.load_config("run")["training_loop.init_from"] == "None"


def test_points_of_a_start_that_committed_nothing_are_gone(main):
    act("train.15", "os.kill(os.getpid(), signal.SIGKILL)")
    every = "training_loop.n_epochs=1;training_loop.log_every=5"
    assert killed(main, "run", "a.gin", "-b", every)
    assert [*Path("run").glob("events.out.tfevents.*")]
    assert main("train", "run", "a.gin", *RELOAD, "-b", f"{every};training_loop.seed=1") == 0
    assert main("train", "other", "a.gin", "-b", f"{every};training_loop.seed=1") == 0
    points = [[(p.step, p.value) for p in read_events(run).Scalars("step/loss")] for run in ("run", "other")]
    assert points[0] == points[1] and len(points[0]) == 5


def test_an_accepted_rate_is_scheduled_from_its_first_step_on(main):
    schedule = "training_loop.callbacks=[@WarmupCosine];WarmupCosine.total_steps=66;WarmupCosine.warmup_steps=10"
    assert main("train", "run", "a.gin", "-b", f"{schedule};training_loop.stop_at=30") == 0
    changed = f"{schedule};SGD.lr=0.01;training_loop.accept_changes=True;training_loop.stop_at=31"
    assert main("train", "run", "a.gin", *RELOAD, "-b", changed) == 0
    state = read_checkpoint(Path("run/checkpoint.pt"))
    assert state["total_steps"] == 31
    assert state["lr"] == pytest.approx(0.01 * WarmupCosine(66, 10).factor(30))


@pytest.mark.parametrize("stop_at", [44, 50])  # between epochs, and inside the third
@pytest.mark.parametrize(
    "schedule",
    ["@StepLR];StepLR.step_size=1;StepLR.gamma=0.1", "@LRSchedule];LRSchedule.schedule=[[1,1.0],[2,0.1],[3,0.01]]"],
)
def test_a_schedule_goes_on_from_where_it_is_with_an_accepted_rate(main, schedule, stop_at):
    settings = f"training_loop.callbacks=[{schedule}"
    assert main("train", "run", "a.gin", "-b", f"{settings};training_loop.stop_at={stop_at}") == 0
    changed = f"{settings};SGD.lr=0.5;training_loop.fused=False;training_loop.accept_changes=True"
    assert main("train", "run", "a.gin", *RELOAD, "-b", changed) == 0
    assert [row["lr"] for row in results.load_history("run")] == pytest.approx([0.05, 0.005, 0.005])
    assert read_checkpoint(Path("run/checkpoint.pt"))["optimizer"]["param_groups"][0]["fused"] is None


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
    clone = copy_code(tmp_path / "clone")
    subprocess.run(["git", "init", "--quiet"], cwd=clone, check=True)
    command = [sys.executable, str(clone / "bin/train.py"), str(tmp_path / "run"), "a.gin", *RELOAD]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("src/models/mlp.py", "tests/conftest.py", "README.md"):
        with open(clone / name, "a") as file:
            file.write("# changed\n")
    (clone / "src/new.py").write_text("")
    (clone / "src/reproduce.py").unlink()
    changed = "src/models/mlp.py, src/new.py, src/reproduce.py"
    evaluate = [sys.executable, str(clone / "bin/evaluate.py"), "run"]
    done = subprocess.run(evaluate, check=True, capture_output=True, text=True)
    assert done.stderr == f"warning: run: the code is not the run's: {changed}\n"
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    warning = f"the code has changed since the run's last start: {changed}"
    assert f"warning: {warning}\n" in done.stderr
    assert subprocess.run(evaluate, check=True, capture_output=True, text=True).stderr == ""
    meta = read_meta(Path("run"))
    assert meta["warnings"] == [warning]
    assert [start["code"] for start in meta["starts"]] == ["code.tar.gz", "code.2.tar.gz"]
    for archive, is_new in (("code.tar.gz", False), ("code.2.tar.gz", True)):
        with tarfile.open(Path("run", archive)) as tar:
            assert tar.extractfile("src/models/mlp.py").read().endswith(b"# changed\n") == is_new
            assert ("src/new.py" in tar.getnames()) == is_new


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "no archive"])
def test_a_damaged_archive_of_code_does_not_keep_a_run_from_going_on(main, damage):
    assert main("train", "run", "a.gin", "-b", "training_loop.n_epochs=1") == 0
    archive = Path("run/code.tar.gz")
    whole = content = archive.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    kinds = {"empty": b"", "truncated": content[:middle], "flipped": flipped, "no archive": b"text"}
    archive.unlink()
    if damage in kinds:
        archive.write_bytes(kinds[damage])
    assert_goes_on_exactly(main, "run")
    [warning] = read_meta(Path("run"))["warnings"]
    assert "the code has changed since the run's last start: not known which, run/code.tar.gz: cannot" in warning
    assert Path("run/code.2.tar.gz").read_bytes() == whole


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


def test_commit_every_is_kept_to_when_batches_are_accumulated(main):
    """Four batches a step, 22 an epoch, the end of which is a commit."""
    for k in (9, 17, 23, 31, 39):
        last = "read_checkpoint(Path('run/checkpoint.pt'))['total_steps']"
        act(f"train.{k}", f"with open('seen', 'a') as file:\n    print({k}, {last}, file=file)")
    bindings = "training_loop.accumulate=4;training_loop.commit_every=7;training_loop.n_epochs=2"
    assert main("train", "run", "a.gin", "-b", bindings) == 0
    assert Path("seen").read_text().splitlines() == ["9 8", "17 16", "23 22", "31 30", "39 38"]


def test_stop_at_stops_there_and_goes_on_exactly(main):
    assert main("train", "run", "a.gin", "-b", "training_loop.stop_at=31") == 0
    assert results.status(Path("run")) == "stopped"
    state = read_checkpoint(Path("run/checkpoint.pt"))
    assert (state["epoch"], state["step"], state["total_steps"]) == (1, 9, 31)
    assert results.load_config("run")["training_loop.stop_at"] == "None"
    assert_goes_on_exactly(main, "run")


def test_a_callback_counts_an_epoch_that_is_gone_on_with_once(main):
    act("train.30", "os.kill(os.getpid(), signal.SIGTERM)")
    assert main("train", "run", "a.gin", *WATCHED) == 128 + signal.SIGTERM
    assert_goes_on_exactly(main, "run", *WATCHED)
    assert read_checkpoint(Path("run/checkpoint.pt"))["callbacks"] == [["Watcher", {"n_begun": 3}]]


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_a_deterministic_run_goes_on_exactly(main, device):
    bindings = f"training_loop.deterministic=True;training_loop.device='{device}';training_loop.model=@SimpleCNN"
    bindings += ";SimpleCNN.n_filters=(8,);SimpleCNN.dropout=0.3"
    assert main("train", "run", "a.gin", "-b", bindings, "-b", "training_loop.stop_at=31") == 0
    assert read_checkpoint(Path("run/checkpoint.pt"))["step"] == 9
    assert_goes_on_exactly(main, "run", "-b", bindings)
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


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


def test_a_stop_at_the_very_end_comes_before_the_test(main):
    act("end.3", "os.kill(os.getpid(), signal.SIGTERM)")
    assert main("train", "run", "a.gin", *WATCHED) == 128 + signal.SIGTERM
    assert results.status(Path("run")) == "stopped"
    assert read_checkpoint(Path("run/checkpoint.pt"))["epoch"] == 3
    assert not Path("run/eval_results.json").exists() and not Path("run/FINISHED").exists()
    assert_goes_on_exactly(main, "run", *WATCHED)


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


# --- users' code, workers, and what a commit costs


def test_a_worker_that_is_killed_stops_the_run_with_one_message(main, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    for k in range(100):
        file = Path("images", "ab"[k % 2], f"{k}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (k, 2 * k, 0)).save(file)
    images = "training_loop.data=@image_folder;image_folder.folder='images';image_folder.size=8"
    streamed = ("-b", f"{images};training_loop.n_workers=2;training_loop.batch_size=5")
    act("train.20", "os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)\ntime.sleep(5)")
    assert main("train", "run", "a.gin", *streamed) == 1
    errors = capfd.readouterr().err
    assert errors.startswith("train.py: a process that reads the data was killed") and errors.count("\n") == 1, errors
    assert results.status(Path("run")) == "failed"
    assert_goes_on_exactly(main, "run", *streamed)


def test_a_default_that_is_no_number(main):
    assert main("train", "run", "a.gin", "-b", "training_loop.loss=@without_a_number") == 0
    assert main("train", "again", "run/config.gin") == 0
    assert run_difference(Path("run"), Path("again")) is None


def test_users_code_that_exits_fails(main):
    act("train.30", "sys.exit(3)")
    assert main("train", "run", "a.gin") == 1
    meta = read_meta(Path("run"))
    assert (meta["status"], meta["exit"]) == ("failed", 1)
    assert_goes_on_exactly(main, "run")


def test_poutynes_callbacks_that_remember_nothing(main):
    callbacks = "training_loop.callbacks=[@poutyne.ClipNorm,@poutyne.ClipValue,@poutyne.CSVLogger]"
    settings = "poutyne.ClipNorm.max_norm=0.0;poutyne.ClipValue.clip_value=1.0;poutyne.CSVLogger.filename='log.csv'"
    assert main("train", "run", "a.gin", "-b", f"{callbacks};{settings};training_loop.n_epochs=1") == 0
    assert Path("log.csv").read_text().count("\n") == 2
    # Nothing is left of the gradients.
    assert main("train", "whole", "a.gin", "-b", "SGD.lr=0.0;training_loop.n_epochs=1") == 0
    a, b = (read_checkpoint(Path(run, "best.pt"))["network"] for run in ("run", "whole"))
    assert difference(a, b) is None


def commit_seconds(main, run: str, *arguments: str) -> float:
    """The median of an epoch's commit_s in a run; the first row holds no commit of an epoch."""
    assert main("train", run, *arguments) == 0
    seconds = [row["commit_s"] for row in results.load_history(run)[1:]]
    print(f"{run}: commit_s {', '.join(f'{s:.3f}' for s in seconds)}")
    return statistics.median(seconds)


def test_what_a_commit_of_a_small_network_costs(main):
    assert commit_seconds(main, "small", "configs/digits.gin", "-b", "training_loop.n_epochs=6") < 0.1


@pytest.mark.slow
def test_what_a_commit_of_a_large_network_costs(main):
    resnet = "training_loop.model=@ResNet18;training_loop.n_epochs=2;training_loop.steps_per_epoch=1"
    assert commit_seconds(main, "large", "a.gin", "-b", f"{resnet};training_loop.batch_size=8") < 1.0


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
        "the loss or a metric does not take Acting's output: confusion_matrix gives 100 numbers, not one"
    ),
    "training_loop.model=@ResNet18;training_loop.batch_size=1078": "the last batch of an epoch would have one image",
    "training_loop.model=@ResNet18;training_loop.batch_size=1": "the last batch of an epoch would have one image",
    **{
        f"training_loop.commit_every={value}": f"training_loop.commit_every = {value}"
        for value in ("0", "-3", "2.5", "True", "''", "'10'", "'min'", "'0min'", "'-1min'", "'nanmin'", "'infmin'")
    },
    "training_loop.stop_at=0": "training_loop.stop_at = 0",
    "training_loop.clip_norm=-1.0": "training_loop.clip_norm = -1.0, but it must be at least",
    "training_loop.ema_decay=1.5": "training_loop.ema_decay = 1.5, but it must be from 0 to 1",
    "training_loop.n_workers=-1": "training_loop.n_workers = -1, but it must be at least 0",
    "training_loop.seed=100000000000000000000": "training_loop.seed = 100000000000000000000, but it must be from 0 to",
    "training_loop.metrics=[@Accuracy,@loss/torchmetrics.Accuracy];torchmetrics.Accuracy.task='multiclass'": (
        "a metric is named loss, as another column of history.csv is: give it a scope"
    ),
    "training_loop.data=@first_available;first_available.of=[@image_folder,@digits]": (
        "image_folder.folder has no value: add a line image_folder.folder = ..."
    ),
}


@pytest.mark.parametrize("bindings", REFUSED)
def test_a_bad_value_is_refused_with_one_message(main, capfd, tmp_path, bindings):
    before = contents(tmp_path)
    assert main("train", "run", "a.gin", "-b", bindings) == 2
    errors = capfd.readouterr().err
    assert REFUSED[bindings] in errors and len(errors.splitlines()) == 1 and errors.startswith("train.py: ")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 2500], ids=["long name", "long path"])
def test_a_name_that_no_folder_can_have_is_refused(main, capfd, tmp_path, name):
    before = contents(tmp_path)
    assert main("train", name, "a.gin") == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert contents(tmp_path) == before


def test_a_run_that_has_lost_its_record_or_is_of_an_older_version_is_refused(main, capfd):
    assert main("train", "run", "a.gin", "-b", "training_loop.n_epochs=1") == 0
    shutil.copytree("run", "older")
    older = read_checkpoint(Path("older/checkpoint.pt"))
    write_checkpoint(Path("older/checkpoint.pt"), {k: v for k, v in older.items() if k != "config"})
    shutil.copytree("run", "lost")
    Path("lost/meta.json").unlink()
    Path("run/meta.json").write_bytes(b"\xff{")
    said = {
        "run": "run/meta.json: ",
        "lost": "lost/meta.json: No such file",
        "older": "older: was made by an older version",
    }
    for run, message in said.items():
        before = contents(Path(run))
        capfd.readouterr()
        assert main("train", run, "a.gin", *RELOAD) == 2
        errors = capfd.readouterr().err
        assert errors.startswith(f"train.py: {message}") and len(errors.splitlines()) == 1
        assert contents(Path(run)) == before
    assert main("train", os.fsdecode(b"a\xff"), "a.gin") == 2
    assert "its name is not UTF-8" in capfd.readouterr().err


def test_a_folder_below_one_that_cannot_be_read_is_refused():
    Path("locked").mkdir(mode=0o000)
    message = refusal_of_unprivileged("locked/run", "a.gin")
    assert message == "[Errno 13] Permission denied: 'locked/run'"
