"""src/jobs.py and bin/launch.py: each job once, whoever is killed; real shells, processes and signals."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from src import results
from src.jobs import TRAIN, read_batch, state
from src.run import read_meta
from tests.conftest import ROOT, copy_code
from tests.test_refusals import contents

LAUNCH = ROOT / "bin/launch.py"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder, the current one. What jobs still run there after the test is killed."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield folder
    for pid in processes_in(folder):
        os.kill(pid, signal.SIGKILL)


def processes_in(folder: Path) -> list[int]:
    """The processes whose current folder it is, but for this one."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder) and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def batch(*lines: str) -> Path:
    path = Path("batch.sh")
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def start(*options, script=LAUNCH, environment=None, path="batch.sh") -> subprocess.Popen[str]:
    command = [sys.executable, str(script), str(path), *map(str, options)]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **(environment or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def end(process: subprocess.Popen[str], code: int = 0, seconds: float = 600) -> str:
    """What it printed."""
    printed, errors = process.communicate(timeout=seconds)
    assert process.returncode == code, printed + errors
    assert "Traceback" not in errors
    return printed + errors


def launch(*options, code: int = 0, **keywords) -> str:
    return end(start(*options, **keywords), code)


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def lines_of(path: str) -> list[str]:
    return Path(path).read_text().split() if Path(path).exists() else []


# --- the batch


def test_the_run_folder_of_a_line_is_known_when_the_line_is_a_single_call_of_train(place):
    known = {
        "bin/train.py runs/a a.gin": "runs/a",
        "A=1 OMP_NUM_THREADS=2 ./e.sh bin/train.py 'runs/b c' a.gin -b 'x=1;y=2' -b \"z=';'\" > log 2>&1": "runs/b c",
        "python3 -O /somewhere/bin/train.py runs/d=@x,+y": "runs/d=@x,+y",
        "bin/train.py 'runs/l[1]~$' a.gin  # as before": "runs/l[1]~$",
    }  # fmt: skip
    others = [
        "bin/train.py runs/f a.gin && echo done", "bin/train.py $RUNS/g a.gin", "cd x; bin/train.py runs/h a.gin",
        "bin/train.py runs/*", "bin/train.py", "mybin/train.py runs/j", "bin/train.py -b a=1 runs/k a.gin",
        "echo 'a' # don't", "(bin/train.py runs/m a.gin)", "bin/train.py runs/n a.gin &",
    ]  # fmt: skip
    jobs = read_batch(batch("# a comment", "", *(f"  {line}" for line in known), *others))
    assert [job.run and str(job.run) for job in jobs] == [*known.values(), *(None for _ in others)]
    assert TRAIN.fullmatch("A=1 python3 -u bin/train.py r a.gin")["python"] == "python3 -u "  # torchrun takes its place
    assert jobs[0].path.name.endswith(".a") and jobs[3].path.name.endswith(".l_1_")
    assert [job.line for job in jobs] == [*known, *others] and {state(job) for job in jobs} == {"waiting"}


def refuse_batch() -> dict[str, tuple[list[str], list[str], str]]:
    """Lines, options, what the message says."""
    run = "bin/train.py runs/a a.gin"
    return {
        "no jobs": (["# nothing", ""], [], "batch.sh: holds no job"),
        "equal lines": (["echo", "# b", " echo "], [], "batch.sh:3: has the line or run folder of another, echo:"),
        "equal runs": (
            [run, "./e.sh bin/train.py runs/a b.gin"],
            [],
            "sh:2: has the line or run folder of another, runs/a",
        ),
        "no workers": (["echo"], ["--workers", "0"], "--workers a number of jobs at a time, from 1"),
        "both": (["echo"], ["--workers", "2", "--gpus", "0"], "give --gpus the name of each GPU, such as 0,1, or"),
        "gpus and slurm": (["echo"], ["--gpus", "0", "--slurm", "-p gpu"], "not allowed with argument"),
        "no gpus": (["echo"], ["--gpus", "0,"], "give --gpus the name of each GPU"),
        "not frozen": ([run], ["--frozen"], "code.tar.gz: is missing: --frozen"),
        "not to be frozen": (
            [run, "python a.py"],
            ["--frozen"],
            "--frozen: python a.py: is no line as prepare writes it",
        ),
    }


@pytest.mark.parametrize("name", refuse_batch())
def test_a_wrong_batch_or_option_is_refused_and_nothing_created(place, name):
    lines, options, message = refuse_batch()[name]
    batch(*lines)
    before = contents(place)
    said = launch(*options, code=2)
    assert message in said and "launch.py: " in said
    assert contents(place) == before


def test_without_a_batch_usage_and_options_in_any_order(place, main, capsys):
    batch("echo")
    with pytest.raises(SystemExit) as ended:
        main("launch")
    assert ended.value.code == 2 and "the following arguments are required: batch" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main("launch", "--slurm", "--partition=gpu", "batch.sh", "--workers", "0")
    assert "--workers a number of jobs at a time" in capsys.readouterr().err


def test_a_batch_that_cannot_be_read_is_refused(place, main, capsys):
    assert main("launch", "none.sh") == 2
    said = capsys.readouterr().err
    assert said.startswith("launch.py: none.sh: cannot be read: ") and "No such file or directory" in said
    assert main("launch", ".") == 2
    Path("latin.sh").write_bytes(b"echo \xe9\n")
    assert main("launch", "latin.sh") == 2
    Path("damaged.sh").write_text("bin/train.py runs/a a.gin\n")
    Path("code.tar.gz").write_bytes(b"none")
    assert main("launch", "damaged.sh", "--frozen") == 2
    assert {f.name for f in place.iterdir()} == {"latin.sh", "damaged.sh", "code.tar.gz"}


# --- once each


def test_jobs_run_where_the_launcher_was_called_and_leave_log_and_mark(place):
    Path("sub").mkdir()
    jobs = read_batch(batch("pwd; echo wrong >&2; cat").rename("sub/batch.sh"))
    printed = launch(path="sub/batch.sh")
    assert re.search(r"\[1/1\] finished  pwd; echo wrong >&2; cat  \d+ s\n1 of 1 jobs are finished\n$", printed)
    assert Path(f"{jobs[0].path}.log").read_text() == f"$ {jobs[0].line}\n{place}\nwrong\n"  # cat had nothing to read
    assert jobs[0].path.parent == Path("sub/batch.sh.jobs") and state(jobs[0]) == "finished"
    assert "0 of 1 jobs to do" in launch(path="sub/batch.sh")
    assert Path(f"{jobs[0].path}.log").read_text().count("\nwrong") == 1
    batch("echo another line").rename("sub/batch.sh")
    assert "1 of 1 jobs to do" in launch(path="sub/batch.sh")


def test_launchers_share_a_batch_and_wait_for_one_another(place):
    batch(*(f"echo {k} >> out; sleep 0.2" for k in range(12)))
    launchers = [start("--workers", 2) for _ in range(3)]
    printed = [end(process) for process in launchers]
    assert sorted(map(int, lines_of("out"))) == list(range(12))
    assert all("12 of 12 jobs are finished" in text for text in printed)
    assert sum(text.count("started") for text in printed) == 12


def test_a_job_that_another_launcher_has_left_unfinished_is_run(place):
    failing, alone = (f"until [ -e {name} ]; do sleep 0.1; done" for name in ("failing", "alone"))
    batch(f"[ -e begun ] || {{ touch begun; {failing}; exit 1; }}; {alone}; echo done >> out")
    first = start()
    wait_for(Path("begun").exists)
    second = start()
    assert "1 of 1 jobs to do" in second.stdout.readline()
    Path("failing").touch()
    assert "1 failed" in end(first, code=1)
    Path("alone").touch()
    assert "1 of 1 jobs are finished" in end(second)
    assert lines_of("out") == ["done"]


def test_the_jobs_of_a_killed_launcher_go_on_and_are_not_started_again(place):
    batch(*(f"echo {k} >> begun; sleep 1; echo {k} >> out" for k in range(4)))
    first = start("--workers", 2)
    wait_for(lambda: len(lines_of("begun")) == 2)
    first.kill()
    first.communicate()
    printed = launch("--workers", 2)
    assert sorted(lines_of("begun")) == sorted(lines_of("out")) == list("0123")
    assert printed.count("started") == 2  # the mark is the orphans' own
    assert "4 of 4 jobs are finished" in printed


def test_a_process_that_outlives_its_shell_keeps_the_job(place):
    """Its shells are killed, it is not: a retry waits for its end."""
    batch("echo a >> begun; echo $$ $PPID > shells; sleep 1; echo a >> out")
    process = start("--retry", 1)
    wait_for(lambda: len(lines_of("shells")) == 2)
    for pid in reversed(lines_of("shells")):
        os.kill(int(pid), signal.SIGKILL)
    began = time.monotonic()
    printed = end(process)
    assert "exit code 137, to be run again" in printed and lines_of("begun") == ["a", "a"]
    assert lines_of("out") == ["a"] and time.monotonic() - began > 1.5  # 1 s of the first, and another


# --- stop, fail, retry


@pytest.mark.alone
def test_sigterm_stops_the_jobs_and_the_same_command_goes_on(place):
    Path("saves.py").write_text(
        "import signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.3)\n    open('saved', 'w').close()\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "open('begun', 'a').write('s\\n')\n"
        "for _ in range(20):\n    time.sleep(0.05)\n"
    )
    saves = f"{sys.executable} saves.py; echo s >> out"
    batch(saves, "echo a >> begun; sleep 1; echo a >> out", "echo b >> begun; echo b >> out")
    process = start("--workers", 2)
    wait_for(lambda: len(lines_of("begun")) == 2)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    printed = end(process, code=143)
    assert time.monotonic() - began < 0.9
    # One that saves and exits with 0 when it is asked to stop has not finished.
    assert printed.count("stopped  ") == 2
    assert "stopped by SIGTERM: 0 of 3 jobs are finished; the same command goes on" in printed
    assert Path("saved").exists() and lines_of("out") == [] and not processes_in(place)
    launch("--workers", 2)
    assert sorted(lines_of("out")) == ["a", "b", "s"]
    assert Counter(lines_of("begun")) == {"a": 2, "s": 2, "b": 1}


def test_a_second_ctrl_c_stops_at_once(place):
    """The job wants two SIGINTs, as bin/train.py does inside of a step that does not end."""
    job = "trap 'n=x$n; [ $n != xx ] || exit 9' INT; touch begun; while :; do sleep 0.05; done"
    batch(job)
    process = start()
    wait_for(Path("begun").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "stopped by SIGINT: 0 of 1 jobs are finished, 1 failed" in end(process, code=130, seconds=5)


def test_a_failed_job_is_reported_and_stops_no_other(place):
    batch("seq 7; exit 3", "no_such_command", "kill -9 $$", "if", "echo a >> out")
    printed = launch("--workers", 1, code=1)
    assert re.search(r"\[1/5\] failed    seq 7; exit 3  \d+ s  exit code 3\n    seq 7; exit 3\n    \| 3\n", printed)
    assert "| 7\n" in printed and "| 2\n" not in printed
    assert "exit code 127" in printed and "no_such_command: command not found" in printed
    assert "exit code 137" in printed and "syntax error" in printed
    assert printed.endswith("1 of 5 jobs are finished, 4 failed\n")
    assert lines_of("out") == ["a"]


def test_a_failed_job_is_run_again_after_the_others(place):
    third_time = "echo x >> tries; [ $(wc -l < tries) = 3 ]"
    batch(third_time, "echo a; exit 1", "echo b > out")
    assert "1 of 3 jobs are finished, 2 failed" in launch("--workers", 1, "--retry", 1, code=1)
    printed = launch("--workers", 1, "--retry", 2, code=1)
    assert lines_of("tries") == ["x"] * 3 and "2 of 3 jobs are finished, 1 failed" in printed
    ends = re.findall(r"\[(\d)/3\] (finished|failed)", printed)
    assert ends == [("1", "finished"), *[("2", "failed")] * 3]
    assert printed.count("    | a\n") == 3  # of each attempt its own part of the log


# --- threads and GPUs


@pytest.mark.parametrize("options, asked", [((), None), (("--workers", 1), None), (("--workers", 64), None), ((), "3")])
def test_the_threads_of_jobs_fit_the_cores(place, options, asked):
    cores = len(os.sched_getaffinity(0))
    batch("echo $OMP_NUM_THREADS > out", "OMP_NUM_THREADS=77 bash -c 'echo $OMP_NUM_THREADS' > own")
    environment = {"OMP_NUM_THREADS": asked or ""}
    printed = launch(*options, environment=environment)
    threads = int(asked) if asked else max(1, cores // (options[1] if options else 8))
    workers = options[1] if options else min(2, max(1, cores // threads))
    assert lines_of("out") == [str(threads)] and lines_of("own") == ["77"]
    assert f"{workers} at a time" in printed


def test_one_job_at_a_time_on_each_gpu_also_with_a_killed_launchers_jobs(place):
    job = "mkdir gpu.$CUDA_VISIBLE_DEVICES || exit 1; echo $CUDA_VISIBLE_DEVICES >> out; sleep 0.3; "
    job += "rmdir gpu.$CUDA_VISIBLE_DEVICES; echo "
    batch(*(f"{job}{k}" for k in range(7)))
    first = start("--gpus", "0,GPU-a/1")
    Path("gpu.GPU-a").mkdir()
    wait_for(lambda: len(lines_of("out")) >= 2)
    first.kill()
    first.communicate()
    launchers = [start("--gpus", "0,GPU-a/1") for _ in range(2)]
    printed = [end(process) for process in launchers]
    assert not any("failed" in text for text in printed)
    assert len(lines_of("out")) == 7 and set(lines_of("out")) == {"0", "GPU-a/1"}


# --- runs of bin/train.py

TINY = """
include 'configs/digits.gin'
digits.n_train = 256
SimpleCNN.n_filters = (8, 8)
SimpleCNN.n_dense = 16
training_loop.reload = True
"""


def train_line(run: str, *bindings: str) -> str:
    bound = f' -b "{";".join(bindings)}"' if bindings else ""
    return f"OMP_NUM_THREADS=1 {sys.executable} {ROOT / 'bin/train.py'} {run} tiny.gin{bound}"


@pytest.mark.slow
def test_the_run_folder_says_what_is_finished(place):
    Path("tiny.gin").write_text(TINY)
    job, refused = train_line("runs/a", "training_loop.n_epochs=1"), train_line("runs/b", "SGD.lrr=1")
    jobs = read_batch(batch(job, refused))
    printed = launch(code=1)
    assert [state(j) for j in jobs] == ["finished", "waiting"]
    assert "exit code 2" in printed and "did you mean lr" in printed and not Path("runs/b").exists()
    assert not list(Path("batch.sh.jobs").glob("*.done"))
    shutil.rmtree("batch.sh.jobs")
    assert "1 of 2 jobs to do" in launch(code=1)
    assert len(results.load_history("runs/a")) == 1
    Path("runs/a/meta.json").write_text("{")
    assert state(jobs[0]) == "unreadable"


@pytest.mark.slow
def test_a_run_stops_with_everything_saved_and_goes_on_and_one_by_hand_is_waited_for(place):
    Path("tiny.gin").write_text(TINY)
    run = Path("runs/a")
    line = train_line("runs/a", "training_loop.batch_size=4", "training_loop.n_epochs=8")
    jobs = read_batch(batch(line))
    process = start()
    wait_for((run / "history.csv").exists, 60)
    process.send_signal(signal.SIGINT)
    assert "stopped by SIGINT: 0 of 1 jobs are finished" in end(process, code=130)
    assert state(jobs[0]) == "stopped"
    by_hand = subprocess.Popen(["bash", "-c", line], stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: state(jobs[0]) == "running", 60)
    printed = launch()
    assert by_hand.wait() == 0 and "1 of 1 jobs are finished" in printed and "started" not in printed
    assert len(results.load_history(run)) == 8


@pytest.mark.slow
def test_killed_workers_and_launchers_change_nothing(place):
    """9 trainings, 20 kills of jobs' processes and launchers: each job finishes once, as when it is left alone."""
    Path("tiny.gin").write_text(TINY)
    rng = random.Random(20261124)
    for folder in ("calm", "killed"):
        Path(folder).mkdir()
        lines = [
            train_line(f"{folder}/lr={rate},seed={seed}", f"SGD.lr={rate}", f"training_loop.seed={seed}",
                       "training_loop.batch_size=16", "training_loop.n_epochs=60")
            for rate in (0.02, 0.05, 0.1) for seed in range(3)
        ]  # fmt: skip
        batch(*lines).rename(f"{folder}/batch.sh")
    launch("--workers", 1, path="calm/batch.sh")
    jobs, calm = read_batch("killed/batch.sh"), read_batch("calm/batch.sh")

    victims = Counter()
    options = ("--workers", 2, "--retry", 20)
    process = start(*options, path="killed/batch.sh")
    while victims.total() < 20:
        time.sleep(rng.uniform(0.1, 1.2))
        others = [pid for pid in processes_in(place) if pid != process.pid]
        if process.poll() is None and others and rng.random() < 0.7:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(rng.choice(others), signal.SIGKILL)
                victims["job"] += 1
        else:
            victims["launcher"] += process.poll() is None
            process.kill()
            process.communicate()
            if all(state(job) == "finished" for job in jobs):
                break
            process = start(*options, path="killed/batch.sh")
    assert victims.total() == 20 and victims["job"] >= 5 and victims["launcher"] >= 3, victims
    process.kill()
    process.communicate()
    printed = launch(*options, path="killed/batch.sh")
    assert "9 of 9 jobs are finished" in printed

    for job, undisturbed in zip(jobs, calm, strict=True):
        assert results.first_difference(job.run, undisturbed.run) is None
        assert len(results.load_history(job.run)) == 60 and (job.run / "eval_results.json").exists()
        assert [s["status"] for s in read_meta(job.run)["starts"]].count("finished") == 1
        said = Path(f"{job.path}.log").read_text()
        assert "is writing to this run" not in said  # no second process was ever started on a run


@pytest.mark.slow
def test_a_task_starts_a_call_of_train_as_several_processes(place):
    """As on a node of Slurm with two GPUs."""
    Path("tiny.gin").write_text(TINY + "training_loop.device = 'cpu'\n")
    name = read_batch(batch(train_line("run", "training_loop.n_epochs=1")))[0].path.name
    assert "1 of 1 jobs are finished" in launch("--only", name, environment={"SLURM_GPUS_ON_NODE": "2"})
    assert read_meta(Path("run"))["starts"][0]["processes"] == 2
    assert (
        f"torchrun --standalone --nproc-per-node=2 {ROOT}/bin/train.py run tiny.gin"
        in Path("run/command.sh").read_text()
    )


# --- frozen code


def test_frozen_jobs_run_the_code_as_it_was(place, tmp_path):
    """Its bin/train.py only says how old it is, and is edited, and broken, meanwhile."""
    clone = copy_code(tmp_path / "clone")
    subprocess.run(["git", "init", "-q", clone], check=True)  # what runs must not be asked of this repository
    folder = clone / "results/tune"
    folder.mkdir(parents=True)
    script = clone / "bin/train.py"

    def freeze(age: str) -> None:
        script.write_text(
            f"#!{sys.executable}\nimport os, sys\nfrom pathlib import Path\n"
            "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))\n"
            f"from src import record\nprint('{age}', *sys.argv[1:], os.environ.get('DATA_DIR'), sys.flags.optimize)\n"
            "print('bin/train.py' in record.code_files(), record.git_state())\n"
        )
        program = (
            "import sys; from src.record import code_archive as a, code_files; sys.stdout.buffer.write(a(code_files()))"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=clone, capture_output=True, check=True)
        (folder / "code.tar.gz").write_bytes(done.stdout)
        script.write_text("this is no Python")

    def said(*options: str) -> list[str]:
        shutil.rmtree(folder / "batch.sh.jobs", ignore_errors=True)
        keywords = {"script": clone / "bin/launch.py", "path": folder / "batch.sh", "environment": {"DATA_DIR": ""}}
        launch(*options, code=1, **keywords)  # no run is made
        return [Path(name).read_text() if Path(name).exists() else "" for name in ("one", "two")]

    freeze("old")
    lines = ("bin/train.py 'a;b' > one", f"A=1 {sys.executable} -O {script} runs/x bin/train.py > two")
    batch(*lines).rename(folder / "batch.sh")
    one, two = said("--frozen")
    assert one.startswith(f"old a;b {clone}/data 0\nTrue not a git repository")
    assert two.startswith(f"old runs/x bin/train.py {clone}/data 1\n")
    frozen = list((folder / "code").iterdir())
    assert len(frozen) == 1
    assert said() == ["", ""]
    freeze("new")  # prepared again: the folder of the code before is not taken for this one's
    assert [text[:3] for text in said("--frozen")] == ["new", "new"]
