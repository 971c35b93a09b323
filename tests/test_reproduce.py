"""bin/reproduce.py and benchmarks/kill.py: a run's folder is enough to repeat it; a killed run is the same run."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.kill import run_difference
from src.reproduce import parts_of, surroundings
from src.results import first_difference, load_config
from src.run import read_meta
from tests.conftest import ROOT, copy_code
from tests.test_refusals import contents

SMALL = """
training_loop.data = @digits
digits.padding = 1
training_loop.model = @MLP
MLP.n_hidden = (32,)
MLP.dropout = 0.2
training_loop.optimizer = @SGD
SGD.lr = 0.05
SGD.momentum = 0.9
training_loop.callbacks = [@ExponentialLR]
ExponentialLR.gamma = 0.9
training_loop.batch_size = 50
training_loop.n_epochs = 3
"""


@pytest.fixture
def clone(small, tmp_path):
    """A copy of the code without git, in `code`, beside small.gin."""
    return copy_code(tmp_path / "code")


def call(clone: Path, script: str, *arguments, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(clone / "bin" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_a_run_is_repeated_from_its_folder_alone(clone):
    """After stops inside an epoch, changed settings, an edited working tree and a move."""
    call(clone, "train.py", "run", "small.gin", "-b", "training_loop.stop_at=30")
    again = "training_loop.reload=True"
    changes = f"{again};SGD.momentum=0.5;training_loop.accept_changes=True"
    call(clone, "train.py", "run", "small.gin", "-b", f"{changes};training_loop.n_epochs=2")
    model = clone / "src/models/mlp.py"
    model.write_text(model.read_text().replace("nn.ReLU()", "nn.Tanh()"))  # as people do
    changes = f"{again};SGD.momentum=0.5"
    warned = call(clone, "train.py", "run", "small.gin", "-b", f"{changes};training_loop.n_epochs=4").stderr
    assert "the code has changed since the run's last start: src/models/mlp.py" in warned
    meta = json.loads(Path("run/meta.json").read_text())
    parts = parts_of(meta["starts"])
    assert [(p["total_steps"], p["code"]) for p in parts] == [
        (0, "code.tar.gz"), (30, "code.tar.gz"), (44, "code.3.tar.gz")
    ]  # fmt: skip
    assert [p["config"].count("momentum = 0.5") for p in parts] == [0, 1, 1]

    model.write_text("raise RuntimeError('a later edit')\n")
    Path("elsewhere").mkdir()
    shutil.move("run", "elsewhere/moved run")
    done = call(ROOT, "reproduce.py", "elsewhere/moved run", "again")
    assert done.stdout.endswith("elsewhere/moved run, again: identical\n")
    assert "not as it was" not in done.stderr

    history = Path("elsewhere/moved run/history.csv")
    lines = history.read_text().splitlines()
    row = lines[3].split(",")
    row[lines[0].split(",").index("val_loss")] = "0.5"
    history.write_text("\n".join([*lines[:3], ",".join(row), *lines[4:]]) + "\n")
    assert first_difference("elsewhere/moved run", "again").startswith("epoch 3, val_loss: 0.5 -> ")


@pytest.mark.slow
def test_what_differs_is_said(clone):
    call(clone, "train.py", "run", "small.gin", "-b", "training_loop.n_epochs=1")
    meta = json.loads(Path("run/meta.json").read_text())
    meta["starts"][0]["versions"]["torch"] = "1.0"
    meta["starts"][0]["config"] = meta["starts"][0]["config"].replace("SGD.lr = 0.05", "SGD.lr = 0.04")
    Path("run/meta.json").write_text(json.dumps(meta))
    done = call(ROOT, "reproduce.py", "run", "again", code=1)
    assert "run, again: epoch 1, lr: 0.05 -> 0.04 (-0.01)" in done.stdout
    assert "warning: not as it was: torch: 1.0 -> " in done.stderr
    assert "again: is there already: choose a new folder" in call(ROOT, "reproduce.py", "run", "again", code=2).stderr
    assert "nothing/meta.json: No such file" in call(ROOT, "reproduce.py", "nothing", "new", code=2).stderr


def archive_with(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    """An archive of a file that may be unpacked, and of one more."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("src/new.py"))
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc"
        tar.addfile(info)
    return archive.getvalue()


def test_a_damaged_or_hostile_archive_is_refused_and_nothing_written(small, main, capfd, tmp_path):
    assert main("train", "run", small, "-b", "training_loop.n_epochs=1") == 0
    archive, before = Path("run/code.tar.gz"), contents(tmp_path)
    whole = archive.read_bytes()
    checksum = bytes([*whole[:-8], whole[-8] ^ 1, *whole[-7:]])
    links = (archive_with("link", tarfile.SYMTYPE), archive_with("link", tarfile.LNKTYPE))
    cases = [(content, "cannot be read") for content in (b"", b"text", whole[:-1], whole[: len(whole) // 2], checksum)]
    cases += [(archive_with(name), "is no plain file inside") for name in ("../../new.py", f"{tmp_path}/new.py")]
    cases += [(content, "link is no plain file inside") for content in links]
    for content, message in cases:
        archive.write_bytes(content)
        assert main("reproduce", "run", "new") == 2
        errors = capfd.readouterr().err
        assert errors.startswith("reproduce.py: run/code.tar.gz: ") and message in errors and errors.count("\n") == 1
        assert not Path(tempfile.gettempdir(), "new.py").exists()
        archive.write_bytes(whole)
        assert contents(tmp_path) == before
    archive.unlink()
    assert main("reproduce", "run", "new") == 2


def test_a_folder_that_has_lost_its_record_is_refused(small, main, capfd):
    assert main("train", "run", small, "-b", "training_loop.n_epochs=1") == 0
    Path("run/meta.json").unlink()
    capfd.readouterr()
    assert main("reproduce", "run", "new") == 2
    assert capfd.readouterr().err == "reproduce.py: run/meta.json: No such file or directory\n"


@pytest.mark.slow
def test_ctrl_c_saves_the_repeated_run(small, main):
    assert main("train", "run", small, "-b", "training_loop.n_epochs=2") == 0
    meta = json.loads(Path("run/meta.json").read_text())
    meta["starts"][0]["config"] += "SGD.lr = 1e-4\ntraining_loop.batch_size = 1\n"  # it takes longer
    Path("run/meta.json").write_text(json.dumps(meta))
    command = [sys.executable, str(ROOT / "bin/reproduce.py"), "run", "new"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    while process.poll() is None and not Path("new/checkpoint.pt").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.endswith("cannot be repeated: its code ended with exit code 130, see above\n")
    assert read_meta(Path("new"))["status"] == "stopped"


@pytest.mark.slow
def test_the_weights_begun_from_are_compared(small, main, capfd):
    one = "training_loop.n_epochs=1"
    begun = f"{one};training_loop.init_from='a'"
    assert main("train", "a", small, "-b", one) == 0
    assert main("train", "b", small, "-b", begun) == 0
    assert main("train", "b", small, "-b", "training_loop.n_epochs=2;training_loop.reload=True") == 0
    assert load_config("b")["training_loop.init_from"] == "'a'"
    again = ("train", "c", "b/config.gin")
    assert main(*again) == 0 and surroundings(Path("b")) == surroundings(Path("c"))
    assert run_difference(Path("b"), Path("c")) is None
    shutil.rmtree("a")
    assert main("train", "a", small, "-b", f"{one};training_loop.seed=1") == 0
    capfd.readouterr()
    assert main("reproduce", "b", "d") == 1
    said = capfd.readouterr()
    old, new = (read_meta(Path(run))["init_from"]["sha256"] for run in "bd")
    assert said.err.endswith(f"warning: not as it was: init_from: {old} -> {new}\n")
    assert "b, d: epoch 1, loss: " in said.out


@pytest.mark.slow
def test_runs_killed_at_random_moments_are_the_same_runs():
    seed = random.randrange(2**32)
    command = [sys.executable, str(ROOT / "benchmarks/kill.py"), "--kills", "10", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr)  # with the seed
    assert done.returncode == 0 and done.stdout.endswith("10/10 identical\n")
