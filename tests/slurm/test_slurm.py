"""src/slurm.py on a real Slurm of one node, which tests/slurm/up brings up: arrays, limits, signals, what goes on."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from src import results
from src.jobs import read_batch, state
from src.record import code_archive, code_files
from src.run import read_meta
from tests.conftest import ROOT
from tests.test_jobs import TINY, batch, end, launch, lines_of, place, start, train_line, wait_for  # noqa: F401  (place: a fixture)

HERE = ROOT / "tests/slurm"
DAEMONS = all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))) and os.getuid() == 0
needs_slurm = pytest.mark.skipif(not DAEMONS, reason="needs root and munge, slurmctld, slurmd, slurm-client")


@pytest.fixture(scope="module")
def cluster():
    """One node that says it has 4 cores and 2 GPUs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm."))
    folder.chmod(0o755)  # munge wants its socket to be reached by all
    subprocess.run([HERE / "up", folder, "4", "2"], check=True)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield folder
    subprocess.run([HERE / "down", folder], check=True)
    del os.environ["SLURM_CONF"]
    shutil.rmtree(folder)


@pytest.fixture
def slurm(cluster, place):  # noqa: F811
    """An empty folder, the current one; what is in the queue after the test is cancelled."""
    yield place
    subprocess.run(["scancel", "--user", "root"], check=True)
    wait_for(lambda: not queue(), 60)


def ask(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def queue() -> dict[str, str]:
    """Task -> its state, as squeue names both."""
    return dict(line.split() for line in ask("squeue", "-h", "-r", "-o", "%i %T").splitlines())


def submit(options: str = "", *more: str, **keywords) -> str:
    return launch("--slurm", options, *more, **keywords)


def array_of(printed: str) -> str:
    found = re.search(r"^array (\d+): ", printed, re.M)
    assert found, printed
    return found[1]


# --- without Slurm


def test_without_sbatch_it_is_refused_and_nothing_created(place):  # noqa: F811
    batch("echo a")
    assert "--slurm: there is no squeue on PATH" in submit("", code=2, environment={"PATH": ""})
    assert [f.name for f in place.iterdir()] == ["batch.sh"]


def test_one_job_is_run_by_its_name_and_waited_for_if_it_runs_elsewhere(place):  # noqa: F811
    """As a task does."""
    batch("echo a >> out; sleep 2; echo b >> out", "echo other >> out")
    name = read_batch("batch.sh")[0].path.name
    first = start("--only", name)
    wait_for(lambda: lines_of("out") == ["a"])
    began = time.monotonic()
    assert "started" not in launch("--only", name) and time.monotonic() - began > 0.5  # it has waited for its end
    assert "1 of 1 jobs are finished" in end(first) and lines_of("out") == ["a", "b"]
    assert "batch.sh: holds no job 0000" in launch("--only", "0000", code=2)


# --- arrays


@needs_slurm
def test_what_sbatch_refuses_is_told(slurm):
    batch("echo a")
    assert "launch.py: sbatch: " in submit("--partition=none", code=2)
    assert "unrecognized option '--no-option'" in submit("--no-option", code=2)
    assert "launch.py: sbatch: " in submit("--comment='a", code=2)
    assert "echo a: is no line as prepare writes it" in submit("", "--frozen", code=2)
    assert not Path("batch.sh.jobs").exists() and not queue()


@needs_slurm
@pytest.mark.slow
def test_each_job_runs_once_with_a_limit_of_jobs_at_a_time(slurm):
    """6 jobs; the node has room for 4."""
    batch(*(f"echo {k} begins >> out; sleep 1; echo {k} ends >> out" for k in range(6)))
    printed = submit("", "--workers", "2")
    assert "6 of 6 jobs to submit, 0 are in the queue" in printed and ": 6 jobs" in printed
    assert re.search(r"0 of 6 jobs to submit, [56] are in the queue", submit())
    wait_for(lambda: not queue(), 300)
    running, most, begun = 0, 0, []
    for k, what in (line.split() for line in Path("out").read_text().splitlines()):
        running += 1 if what == "begins" else -1
        most = max(most, running)
        begun += [int(k)] if what == "begins" else []
    assert most == 2 and sorted(begun) == list(range(6))
    assert "0 of 6 jobs to submit, 0 are in the queue" in submit()


@needs_slurm
@pytest.mark.slow
def test_a_failing_job_stops_no_other_and_is_submitted_again_alone(slurm):
    batch("echo a >> out", "echo why >&2; [ -e fixed ]", "[ -e again ] || { touch again; exit 1; }")
    first = array_of(submit("", "--retry", "1"))
    wait_for(lambda: not queue(), 300)
    assert [state(job) for job in read_batch("batch.sh")] == ["finished", "waiting", "finished"]
    said = Path(f"batch.sh.jobs/slurm.{first}_1.log").read_text()
    assert "exit code 1" in said and "| why" in said
    Path("fixed").touch()
    assert "1 of 3 jobs to submit" in submit()
    wait_for(lambda: not queue(), 300)
    assert {state(job) for job in read_batch("batch.sh")} == {"finished"} and lines_of("out") == ["a"]


# --- runs


def long_run(epochs: int = 8) -> None:
    """A batch of one run, which takes some seconds; and the same one undisturbed, in calm/."""
    Path("tiny.gin").write_text(TINY)
    settings = ("training_loop.batch_size=4", f"training_loop.n_epochs={epochs}")
    subprocess.run(["bash", "-c", train_line("calm", *settings)], check=True, capture_output=True)
    batch(train_line("run", *settings))


def go_on_at_once(task: str) -> None:
    """Until the run is finished. What goes back into the queue would wait there for two minutes."""
    time.sleep(2)  # in the second of its end Slurm refuses to start it again
    subprocess.run(["scontrol", "update", f"JobId={task}", "StartTime=now"], check=True)
    wait_for(lambda: results.status(Path("run")) == "finished", 300)


def committed() -> bool:
    return Path("run/history.csv").exists() and len(results.load_history("run")) >= 2


@needs_slurm
@pytest.mark.slow
def test_a_run_whose_time_is_up_goes_back_into_the_queue_and_goes_on(slurm):
    """The signal that Slurm sends ahead of the time limit; the test sends it, since the least limit is a minute."""
    long_run()
    array = array_of(submit("--time=5"))
    wait_for(committed, 300)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{array}_0"], check=True)
    wait_for(lambda: queue().get(f"{array}_0") == "PENDING", 300)
    assert results.status(Path("run")) == "stopped"
    assert re.search(r"0 of 1 jobs to submit, 1 are in the queue", submit())
    go_on_at_once(f"{array}_0")
    assert results.first_difference("run", "calm") is None


@needs_slurm
@pytest.mark.slow
def test_a_cancelled_run_has_saved_everything_and_is_submitted_again(slurm):
    long_run()
    array = array_of(submit("--comment='two words'"))
    wait_for(committed, 300)
    subprocess.run(["scancel", array], check=True)
    wait_for(lambda: not queue(), 300)
    assert results.status(Path("run")) == "stopped"
    assert "1 of 1 jobs to submit" in submit()
    wait_for(lambda: not queue(), 300)
    assert results.first_difference("run", "calm") is None and results.status(Path("run")) == "finished"


@needs_slurm
@pytest.mark.slow
@pytest.mark.parametrize("options", ["--ntasks-per-node=2", "--nodes=1 --gpus-per-node=2"])
def test_a_distributed_run_goes_back_into_the_queue_and_goes_on(slurm, options):
    """Two processes: of two tasks, by srun, an agent of torchrun each; or one agent for two (pretended) GPUs."""
    Path("tiny.gin").write_text(TINY + "training_loop.device = 'cpu'\n")
    settings = ("training_loop.batch_size=8", "training_loop.n_epochs=6")
    calm = train_line("calm", *settings).replace(sys.executable, "torchrun --standalone --nproc-per-node=2")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", calm], check=True, capture_output=True, env=os.environ | {"PATH": path})
    batch(train_line("run", *settings))
    array = array_of(submit(options))
    wait_for(committed, 300)
    assert read_meta(Path("run"))["starts"][0]["processes"] == 2
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{array}_0"], check=True)
    wait_for(lambda: queue().get(f"{array}_0") == "PENDING", 300)
    assert read_meta(Path("run"))["status"] == "stopped"
    go_on_at_once(f"{array}_0")
    assert results.first_difference("run", "calm") is None


@needs_slurm
@pytest.mark.slow
def test_frozen_code_is_run_by_tasks(slurm):
    folder = Path("a folder")
    folder.mkdir()
    (folder / "code.tar.gz").write_bytes(code_archive(code_files()))
    Path("tiny.gin").write_text(TINY)
    batch(train_line("run", "training_loop.n_epochs=1")).rename(folder / "batch.sh")
    submit("", "--frozen", path=folder / "batch.sh")
    wait_for(lambda: not queue(), 300)
    assert results.status(Path("run")) == "finished"
    assert "/code/" in Path("run/command.sh").read_text()
