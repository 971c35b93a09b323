"""src/distributed.py: several processes compute what one computes, and end together. Real processes under torchrun."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from benchmarks.kill import run_difference
from src import results
from src.data.augment import random_crop, random_flip
from src.data.dataset import Batches, Part, Split
from src.distributed import GlobalBatch, Team, unreached_draws
from src.run import read_meta
from tests.conftest import ROOT, SMALL
from tests.test_jobs import processes_in, wait_for

TRAIN, TORCHRUN = str(ROOT / "bin/train.py"), str(Path(sys.executable).parent / "torchrun")
# Dropout, batch norm, random crops, 11 batches an epoch, the last one of 79 images: an odd number.
FP64 = "training_loop.precision='fp64';training_loop.n_epochs=3"


@pytest.fixture
def place(small, tmp_path):
    """The current folder, with small.gin; what still runs there after the test is killed."""
    yield tmp_path
    for pid in processes_in(tmp_path):
        os.kill(pid, signal.SIGKILL)


def start(run: str, *bindings: str, config: str = "small.gin", n: int = 2, options=(), environment=None):
    starter = [sys.executable] if n == 1 else [TORCHRUN, *(options or ("--standalone", f"--nproc-per-node={n}"))]
    command = [*starter, TRAIN, run, config, *(part for text in bindings for part in ("-b", text))]
    env = os.environ | {"PYTHONPATH": str(Path.cwd())} | (environment or {})
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def end(process: subprocess.Popen[str], code: int = 0, seconds: float = 120) -> str:
    printed = process.communicate(timeout=seconds)[0]
    assert process.returncode == code, printed
    return printed


def train(run: str, *bindings: str, code: int = 0, **keywords) -> str:
    return end(start(run, *bindings, **keywords), code)


def assert_close(a: str, b: str, relative: float, epochs: int | None = None) -> None:
    """The histories and test metrics of two runs."""
    columns = ("lr", "loss", "val_loss", "acc", "val_acc")
    rows = [results.load_history(run)[:epochs] for run in (a, b)]
    assert len(rows[0]) == len(rows[1]) > 0
    for x, y in zip(*rows, strict=True):
        for name in columns:
            assert x[name] == pytest.approx(y[name], rel=relative), (x["epoch"], name)
    if epochs is None:
        tests = [json.loads(Path(run, "eval_results.json").read_text()) for run in (a, b)]
        assert tests[0]["loss"] == pytest.approx(tests[1]["loss"], rel=relative)


# --- rows


@given(n=st.integers(0, 50), of=st.integers(1, 9))
def test_each_row_has_one_process(n, of):
    rows = [row for rank in range(of) for row in range(n)[Part(rank, of).rows(n)]]
    assert rows == list(range(n))
    sizes = [len(range(n)[Part(rank, of).rows(n)]) for rank in range(of)]
    assert max(sizes) - min(sizes) <= 1


@given(n=st.integers(1, 40), batch=st.integers(1, 20), of=st.integers(1, 4), start=st.integers(0, 3))
def test_the_rows_of_all_are_the_batch_of_one_augmented_alike(n, batch, of, start):
    x = torch.randint(256, (n, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    split = Split(x, torch.arange(n), augment=[random_crop(2), random_flip])
    parts = [Batches(split, batch, seed=5, part=Part(rank, of)) for rank in range(of)]
    whole = Batches(split, batch, seed=5)
    for batches in (whole, *parts):
        batches.begin(2, start)
    for (x, y), *rows in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([own for own, _ in rows]), x) and torch.equal(
            torch.cat([own for _, own in rows]), y
        )
        assert {batches.n for batches in parts} == {len(y)}


def read_id(name: str) -> torch.Tensor:
    return torch.full((3, 2, 2), int(name), dtype=torch.uint8)


@pytest.mark.parametrize("n, batch, of", [(23, 4, 2), (25, 8, 3), (9, 4, 4), (7, 7, 2), (5, 2, 3)])
def test_streamed_samples_are_read_once_in_an_epoch_by_all_together(n, batch, of):
    split = Split([str(k) for k in range(n)], torch.arange(n), read=read_id)
    parts = [Batches(split, batch, seed=5, part=Part(rank, of), n_workers=0) for rank in range(of)]
    for epoch in (1, 2):
        for batches in parts:
            batches.begin(epoch, 0)
        each = [list(batches) for batches in parts]
        assert {len(batches) for batches in each} == {-(-n // batch)}  # all make the same steps
        ids = [round(255 * x[0, 0, 0].item()) for batches in each for xs, ys in batches for x in xs]
        assert sorted(ids) == list(range(n)) == sorted(int(y) for batches in each for _, ys in batches for y in ys)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["dropout", "dropout2d"])
def test_dropout_keeps_the_rows_of_the_mask_of_the_global_batch(name, memory_format):
    x = torch.rand(7, 4, 3, 3).contiguous(memory_format=memory_format)
    masks = []
    for rank in range(3):
        torch.manual_seed(1)
        part = Part(rank, 3)
        with GlobalBatch(part, sync_batch_norm=True).of(7):
            draw = getattr(F, name)
            masks.append(draw(x[part.rows(7)], 0.4, True))
            assert torch.equal(draw(x[part.rows(7)], 0.4, False), x[part.rows(7)])  # in eval mode as it is
    torch.manual_seed(1)
    assert torch.equal(torch.cat(masks), x * getattr(F, name)(torch.ones_like(x), 0.4))


def test_draws_that_are_no_dropout_are_found():
    from torchvision.ops import StochasticDepth

    x = torch.rand(4, 6)
    assert not unreached_draws(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)), x)
    assert unreached_draws(nn.Sequential(nn.Linear(6, 6), StochasticDepth(0.5, "row")), x)
    assert unreached_draws(
        nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (3, 8)), nn.Dropout(0.5)), x
    )  # no rows of images
    before = torch.get_rng_state()
    unreached_draws(nn.RReLU(), x)
    assert torch.equal(before, torch.get_rng_state())


# --- the same numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        "training_loop.accumulate=3;training_loop.clip_norm=0.5;training_loop.ema_decay=0.9",
        "training_loop.batch_size=1077;digits.n_train=1078",  # a last batch of one image: the other has none
        "training_loop.metrics=[@Accuracy,@torchmetrics.AUROC];torchmetrics.AUROC.task='multiclass'",
        "training_loop.commit_every=4;training_loop.loss=@MultiMarginLoss",
    ],
)
def test_two_processes_give_the_history_of_one(place, settings):
    train("one", FP64, settings, n=1)
    train("two", FP64, settings)
    assert_close("one", "two", 1e-9)
    assert results.load_config("one") == results.load_config("two")
    starts = [read_meta(Path(run))["starts"][0]["processes"] for run in ("one", "two")]
    assert starts == [1, 2] and "warnings" in read_meta(Path("two")) and not read_meta(Path("two"))["warnings"]
    assert Path("two/stdout.rank1.txt").stat().st_size and not Path("two/stderr.rank1.txt").stat().st_size
    assert "torchrun --standalone --nproc-per-node=2 " in Path("two/command.sh").read_text()


@pytest.mark.slow
def test_bf16_with_batch_norm(place):
    settings = "training_loop.precision='bf16';training_loop.n_epochs=1"
    train("one", settings, n=1)
    train("two", settings, "training_loop.commit_every='0.0001min'")
    first, second = (results.load_history(run)[0]["loss"] for run in ("one", "two"))
    assert first == pytest.approx(second, rel=0.02)


@pytest.mark.slow
def test_the_shipped_config_in_float32(place, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(place / "none"))
    config = str(ROOT / "configs/cnn.gin")
    train("one", n=1, config=config)
    printed = train("two", config=config)
    assert printed.count("TRAINING ON digits") == 1  # by the first alone
    assert_close("one", "two", 1e-5, epochs=1)


@pytest.mark.slow
def test_image_files_are_read_once_each_by_all_together(place):
    generator = torch.Generator().manual_seed(0)
    for k in range(93):
        folder = place / "data/shapes" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(128, (20, 20, 3), generator=generator, dtype=torch.uint8) + 100 * (k % 2)
        Image.fromarray(pixels.numpy()).save(folder / f"{k}.png")
    settings = (
        "training_loop.data=@image_folder;image_folder.folder='shapes';image_folder.size=16;image_folder.padding=2;"
        "training_loop.batch_size=25;training_loop.n_workers=1"
    )
    environment = {"DATA_DIR": str(place / "data")}
    train("one", FP64, settings, n=1, environment=environment)
    train("three", FP64, settings, n=3, environment=environment)
    assert_close("one", "three", 1e-9)


@pytest.mark.slow
def test_what_gives_other_numbers_is_warned_of_and_recorded(place):
    Path("parts.py").write_text(
        "import gin\nfrom torch import nn\nfrom torchvision.ops import StochasticDepth\n\n\n"
        "@gin.register(denylist=['input_shape', 'n_classes'])\n"
        "class Deep(nn.Sequential):\n"
        "    def __init__(self, input_shape, n_classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10), StochasticDepth(0.5, 'row'))\n"
    )
    Path("deep.gin").write_text(f"import parts\n{SMALL}")
    text = re.sub("SimpleCNN.*\n", "", Path("deep.gin").read_text()).replace("training_loop.model = @", "")
    Path("deep.gin").write_text(text + "training_loop.model = @Deep\n")
    settings = "training_loop.sync_batch_norm=False;CrossEntropyLoss.reduction='sum';training_loop.ema_decay=0.9"
    printed = train("two", settings, config="deep.gin")
    warnings = read_meta(Path("two"))["warnings"]
    assert len(warnings) == 3 and "of each process (2)" in warnings[0] and "stochastic depth" in warnings[2]
    assert "CrossEntropyLoss is no mean over rows" in warnings[1] and printed.count("warning: ") == 3
    # It is the same run all the same: each process goes on with its own random numbers.
    for stop_at in (11, 15):
        train(f"stopped{stop_at}", settings, f"training_loop.stop_at={stop_at}", config="deep.gin")
        train(f"stopped{stop_at}", settings, "training_loop.reload=True", config="deep.gin")
        assert run_difference(Path("two"), Path(f"stopped{stop_at}")) is None


# --- going on


@pytest.mark.slow
def test_a_run_of_two_that_is_stopped_and_killed_is_the_same_run(place):
    settings = "training_loop.n_epochs=5;training_loop.batch_size=20;training_loop.sync_batch_norm=False"
    train("whole", settings)
    going_on = (settings, "training_loop.reload=True")
    train("parts", *going_on, "training_loop.stop_at=70")
    process = start("parts", *going_on)
    wait_for(lambda: len(results.load_history("parts")) >= 2, 60)
    process.send_signal(signal.SIGTERM)
    assert end(process, code=1).count("all is saved: go on") == 1
    meta = read_meta(Path("parts"))
    assert meta["status"] == "stopped" and meta["starts"][-1]["exit"] == 143
    before = len(results.load_history("parts"))
    process = start("parts", *going_on)
    wait_for(lambda: len(results.load_history("parts")) > before, 60)
    for pid in processes_in(place):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    train("parts", *going_on)
    assert run_difference(Path("whole"), Path("parts")) is None


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(place):
    train("one", FP64, n=1)
    for run, first, then in (("up", 1, 2), ("down", 2, 1)):
        train(run, FP64, "training_loop.stop_at=15", n=first)
        train(run, FP64, "training_loop.reload=True", n=then)
        assert_close("one", run, 1e-9)
        assert [s["processes"] for s in read_meta(Path(run))["starts"]] == [first, then]
    command = [sys.executable, ROOT / "bin/reproduce.py", "up", "again"]
    repeated = subprocess.run(command, capture_output=True, text=True)
    assert repeated.stdout.endswith("identical\n"), repeated.stdout + repeated.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank, restarts", [(0, 0), (1, 0), (1, 1)])
def test_a_killed_rank_ends_the_run_by_name_or_it_goes_on_by_itself(place, rank, restarts):
    settings = ("training_loop.n_epochs=4;training_loop.batch_size=10", "training_loop.reload=True")
    process = start("run", *settings, options=("--nproc-per-node=2", f"--max-restarts={restarts}", "--standalone"))
    wait_for(Path("run/history.csv").exists, 60)
    first = read_meta(Path("run"))["starts"][0]["pid"]
    second = next(pid for pid in processes_in(place) if parent(pid) == process.pid and pid != first)
    killed = (first, second)[rank]
    os.kill(killed, signal.SIGKILL)
    began = time.monotonic()
    if restarts == 0:
        printed = end(process, code=1, seconds=30)
        assert f"rank {rank} (process {killed}) has ended" in printed and time.monotonic() - began < 30
        assert results.status(Path("run")) == ("failed" if rank == 1 else "dead")
    else:
        end(process)
        train("calm", *settings)
        assert run_difference(Path("calm"), Path("run")) is None
        assert len(read_meta(Path("run"))["starts"]) == 2
    assert not processes_in(place)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_after_the_time_limit(place):
    Path("parts.py").write_text(
        "import datetime\nfrom src import distributed\ndistributed.TIMEOUT = datetime.timedelta(seconds=5)\n"
    )
    Path("short.gin").write_text(f"import parts\n{SMALL}")
    process = start("run", "training_loop.n_epochs=40;training_loop.batch_size=10", config="short.gin")
    wait_for(Path("run/history.csv").exists, 60)
    first = read_meta(Path("run"))["starts"][0]["pid"]
    hanging = next(pid for pid in processes_in(place) if parent(pid) == process.pid and pid != first)
    os.kill(hanging, signal.SIGSTOP)
    wait_for(lambda: read_meta(Path("run"))["status"] == "failed", 30)
    assert "has ended or does not answer" in Path("run/stderr.txt").read_text()
    os.kill(hanging, signal.SIGKILL)  # torchrun would do it half a minute later
    end(process, code=1, seconds=60)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# --- ends


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(place):
    Path("parts.py").write_text(
        "import gin\nfrom src.data import digits\n\n\n@gin.register\ndef one_nan():\n    data = digits()\n"
        "    data.train.x = data.train.x.clone()\n    data.train.x[7] = float('nan')\n    return data\n"
    )
    Path("nan.gin").write_text(f"import parts\n{SMALL}\ntraining_loop.data = @one_nan\n")
    settings = "training_loop.log_every=1;SimpleCNN.n_filters=[]"
    printed = train("run", settings, config="nan.gin", code=1)
    assert printed.count("the loss is nan at epoch 1, step ") == 1 and "has ended" not in printed
    assert not processes_in(place)


@pytest.mark.slow
def test_a_refusal_is_told_once_and_a_bug_by_the_rank_that_has_it(place):
    printed = train("run", "SGD.lrr=1", code=1)
    assert printed.count("did you mean lr") == 1 and not Path("run").exists()
    assert "give 2 to 1079" in train("run", "training_loop.batch_size=1", code=1) and not Path("run").exists()
    Path("parts.py").write_text(
        "import os\nimport gin\nfrom poutyne import Callback\n\n\n@gin.register\nclass Bug(Callback):\n"
        "    stateless = True\n\n    def on_train_batch_end(self, batch_number, logs):\n"
        "        assert os.environ['RANK'] == '0' or batch_number < 5, 'a bug here'\n"
    )
    Path("bug.gin").write_text(f"import parts\n{SMALL}\ntraining_loop.callbacks = [@Bug]\n")
    printed = train("run", config="bug.gin", code=1)
    assert printed.count("AssertionError: a bug here") == 1 and "rank 1: Traceback" in printed
    assert "AssertionError: a bug here" in Path("run/stderr.rank1.txt").read_text()


def two_agents(*options: str) -> list[subprocess.Popen[str]]:
    """Two of torchrun, as on two machines, at two addresses."""
    port = 20000 + os.getpid() % 20000
    settings = "training_loop.n_epochs=4;training_loop.batch_size=10;training_loop.reload=True"
    options += ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test")
    options += (f"--rdzv-endpoint=127.0.0.1:{port}",)
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return [
        start("run", settings, options=(*options, f"--local-addr=127.0.0.{k + 1}"), environment=environment)
        for k in range(2)
    ]


@pytest.mark.slow
def test_two_agents_go_on_after_the_death_of_a_rank(place):
    agents = two_agents("--max-restarts=1")
    wait_for(Path("run/history.csv").exists, 60)
    first = read_meta(Path("run"))["starts"][0]["pid"]
    ranks = [pid for pid in processes_in(place) if parent(pid) in (agents[0].pid, agents[1].pid) and pid != first]
    os.kill(ranks[0], signal.SIGKILL)
    for agent in agents:
        end(agent)
    assert results.status(Path("run")) == "finished" and len(read_meta(Path("run"))["starts"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("killed", [None, 0, 1])
def test_two_agents_train_one_run_and_end_together(place, killed):
    agents = two_agents()
    if killed is None:
        assert "".join(end(agent) for agent in agents).count("epoch 4/4") == 1
        assert results.status(Path("run")) == "finished"
        return
    wait_for(Path("run/history.csv").exists, 60)
    agents[killed].kill()
    began = time.monotonic()
    printed = "".join(agent.communicate(timeout=30)[0] for agent in agents)
    assert time.monotonic() - began < 30
    assert re.search(r"stopped by SIGTERM, sent to rank \d, in epoch \d, after step \d+; all is saved", printed)
    wait_for(lambda: not processes_in(place), 30)
    assert results.status(Path("run")) == "stopped"


def test_what_is_said_at_one_call_is_answered_at_the_next():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    team = Team()
    team.members = [("here", 1)]  # it has met itself
    said = [(0, True), (15, False), (15, False), (0, False), (0, False)]
    answers = [(0, 0, False), (0, 0, True), (15, 0, False), (15, 0, False), (0, 0, False)]
    assert [team.agree(*words) for words in said] == answers
    team.end()
