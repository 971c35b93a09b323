"""experiments/tune_lr: prepared, run, paused, reported, copied; what the report says of runs made by hand."""

import contextlib
import filecmp
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.config import ROOT
from src.results import find_runs, mean_interval, status

BASE = "training_loop.data=@digits\ntraining_loop.model=@SimpleCNN\ntraining_loop.optimizer=@SGD\n"
EXAMPLE = ROOT / "results/example_run"
RATES = {"0.001": (90.0, 91.0, 92.0), "0.03": (98.0, 98.2, 98.4), "1.0": (40.0, 50.0, 45.0)}


def tune(folder: Path, command: str, *options: str, script: Path = ROOT / "experiments/tune_lr/main.py", code: int = 0):
    command = [sys.executable, str(script), command, "--folder", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def made(tmp_path):
    """A prepared folder, with finished runs made from results/example_run whose val_acc are RATES."""
    folder = tmp_path / "tuned"
    tune(folder, "prepare")
    for rate, values in RATES.items():
        for seed, value in enumerate(values):
            run = folder / f"runs/lr={rate},seed={seed}"
            run.mkdir(parents=True)
            for name in ("meta.json", "history.csv", "eval_results.json", "FINISHED"):
                shutil.copy(EXAMPLE / name, run / name)
            config = (EXAMPLE / "config.gin").read_text()
            config = re.sub(r"training_loop.seed = .*", f"training_loop.seed = {seed}", config)
            (run / "config.gin").write_text(config + f"\nSGD.lr = {rate}\n")
            with_last_val_acc(run, value)
            test = json.loads((run / "eval_results.json").read_text()) | {"acc": value - 1}
            (run / "eval_results.json").write_text(json.dumps(test))
    return folder


def with_last_val_acc(run: Path, value: float) -> None:
    header, *rows = (run / "history.csv").read_text().splitlines()
    for k, row in enumerate(rows):
        cells = row.split(",")
        cells[header.split(",").index("val_acc")] = str(value - 5 * (len(rows) - 1 - k))
        rows[k] = ",".join(cells)
    (run / "history.csv").write_text("\n".join([header, *rows, ""]))


def test_prepare_gives_the_same_bytes_again(tmp_path):
    tune(tmp_path, "prepare")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    tune(tmp_path, "prepare")
    assert len([path for path in files if path.suffix == ".gin"]) == 9
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_prepare_names_a_run_whose_config_is_another_and_writes_nothing(made):
    config = made / "configs/lr=0.03,seed=2.gin"
    config.write_text(config.read_text() + "SGD.nesterov = True\n")
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    refused = tune(made, "prepare", code=2)
    assert "runs/lr=0.03,seed=2\n" in refused.stderr and "seed=1" not in refused.stderr
    assert before == {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}


def test_the_best_rate_by_valid_with_its_test_metric_alone(made):
    found = json.loads(tune(made, "report", "--json").stdout)
    assert found["best"] == 0.03 and found["left_out"] == {}
    assert "Test acc: 97.20 ± 0.50 %, 95 % interval, n = 3" in found["verdict"][0]  # t(2) 4.3027 x 0.2 / sqrt(3)
    assert "differs from the second, 0.001" in found["verdict"][1]
    assert len(found["verdict"]) == 2  # not at the edge
    assert [row["mean"] for row in found["table"]] == pytest.approx([91, 98.2, 45])
    assert [row["SGD.lr"] for row in found["table"]] == [0.001, 0.03, 1.0]
    page = (made / "report/report.html").read_text()
    assert "90.00" in page and "97.20" in page and "44.00" not in page  # the test metric of another rate
    links = re.findall(r'href="([^"]+)"', page)
    assert len(set(links)) == 9 and all((made / "report" / link).is_dir() for link in links)


@pytest.fixture
def browser():
    from tests.browser import browser

    with browser(900, 2000) as driver:
        yield driver


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ("chromium", "chromedriver"))), reason="needs chromium, chromium-driver")
def test_a_browser_shows_table_and_plots_and_follows_the_links(made, browser):
    shutil.rmtree(made / "runs/lr=1.0,seed=0")
    tune(made, "report")
    browser.get((made / "report/report.html").as_uri())
    assert browser.title == "Which learning rate is best?"
    rows = [row.text for row in browser.find_elements("css selector", "#summary tr")]
    assert rows[0] == "learning rate val_acc (%) standard deviation 95 % interval n"
    assert rows[2] == "0.03 98.20 0.20 ± 0.50 3" and len(rows) == 4
    for image in browser.find_elements("tag name", "img"):
        assert image.get_property("naturalWidth") == 900 and image.size["width"] == 800, image.get_attribute("alt")
        assert image.size["height"] == pytest.approx(800 * 3 / 4.5, abs=1)
    runs = [row.text for row in browser.find_elements("css selector", "#runs tr")]
    assert "lr=1.0,seed=0 missing: not started yet" in runs and "lr=0.03,seed=2 98.40" in runs
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert not browser.get_log("browser")
    links = {a.get_attribute("href") for a in browser.find_elements("css selector", "#runs a")}
    links = [link for link in links if "lr=1.0,seed=0" not in link]
    assert len(links) == 8
    for link in links:
        browser.get(link)
        assert "history.csv" in browser.find_element("tag name", "body").text


def test_the_same_runs_give_the_same_bytes(made, tmp_path):
    tune(made, "report")
    shutil.copytree(made / "report", tmp_path / "first")
    for run in find_runs(made / "runs"):
        meta = json.loads((run / "meta.json").read_text())
        meta["starts"][0]["start"] = "2001-01-01T00:00:00+00:00"
        (run / "meta.json").write_text(json.dumps(meta))
    tune(made, "report")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["accuracy.pdf", "accuracy.png", "curves.pdf", "curves.png", "report.html", "table.csv", "table.md"]
    assert filecmp.cmpfiles(tmp_path / "first", made / "report", names, shallow=False)[0] == names


def test_missing_failed_and_diverged_runs_are_listed(made):
    shutil.rmtree(made / "runs/lr=1.0,seed=0")
    failed, diverged = made / "runs/lr=1.0,seed=1", made / "runs/lr=0.03,seed=1"
    (failed / "FINISHED").unlink()
    meta = json.loads((failed / "meta.json").read_text()) | {"status": "failed"}
    (failed / "meta.json").write_text(json.dumps(meta))
    header, *rows = (diverged / "history.csv").read_text().splitlines()
    cells = rows[-1].split(",")
    cells[header.split(",").index("loss")] = "nan"
    (diverged / "history.csv").write_text("\n".join([header, *rows[:-1], ",".join(cells), ""]))
    found = json.loads(tune(made, "report", "--json").stdout)
    assert [Path(run).name for run in found["left_out"]] == ["lr=0.03,seed=1", "lr=1.0,seed=0", "lr=1.0,seed=1"]
    assert [row["n"] for row in found["table"]] == [3, 2, 1]
    assert "cannot tell" in found["verdict"][1]
    page = (made / "report/report.html").read_text()
    assert "missing: not started yet" in page and "failed" in page and "diverged" in page


def test_settings_that_all_finished_runs_share_count(made):
    """The first rate alone is finished, or has a seed of its own; one run has lost its test."""
    for path in [*made.glob("runs/lr=0.03*"), *made.glob("runs/lr=1.0*")]:
        shutil.rmtree(path)
    (made / "runs/lr=0.001,seed=2/eval_results.json").unlink()
    found = json.loads(tune(made, "report", "--json").stdout)
    assert found["best"] == 0.001 and [row["n"] for row in found["table"]] == [2, 0, 0]
    assert "missing or not finite" in found["left_out"][str(made / "runs/lr=0.001,seed=2")]


def test_values_that_are_lists_give_runs_of_their_own(tmp_path):
    from src.grid import prepare
    from src.jobs import read_batch

    base = tmp_path / "base.gin"
    base.write_text(BASE)
    batch = prepare(tmp_path / "a", base, {"SimpleCNN.n_filters": [[32], [32, 64]]})
    assert [job.run.name for job in read_batch(batch)] == ["n_filters=_32_", "n_filters=_32,_64_"]
    assert read_batch(prepare(tmp_path / "b", base, {"SGD.lr": [0.1]}))[0].run == tmp_path / "b/runs/run"


def test_the_best_rate_at_the_edge_is_flagged(made):
    for seed in range(3):
        with_last_val_acc(made / f"runs/lr=1.0,seed={seed}", 99 + seed / 10)
    assert "Warning: 1 is at the edge of the grid" in tune(made, "report").stdout


def test_a_report_without_a_run_says_so(tmp_path):
    tune(tmp_path, "prepare")
    assert "No run is finished" in tune(tmp_path, "report").stdout


def test_a_wrong_name_is_refused_before_anything_is_written(tmp_path):
    from src.config import Refused
    from src.grid import prepare

    base = tmp_path / "base.gin"
    base.write_text(BASE)
    with pytest.raises(Refused, match=r"SGD\.lrr = 0\.1': SGD has no parameter lrr"):
        prepare(tmp_path / "new", base, {"SGD.lrr": [0.1]})
    base.write_text(f"{BASE}SGD.lrrr = 1\n")
    with pytest.raises(Refused, match=r"base\.gin:4: SGD has no parameter lrrr"):
        prepare(tmp_path / "new", base, {"SGD.lr": [0.1]})
    (tmp_path / "more.gin").write_text("SGD.momentum = 0.5\n")
    base.write_text(f"include 'more.gin'\n{BASE}")
    with pytest.raises(Refused, match=r"base\.gin: includes .*more\.gin: put its lines here"):
        prepare(tmp_path / "new", base, {"SGD.lr": [0.1]})
    assert not (tmp_path / "new").exists()


def test_a_second_setting_with_several_values_is_refused(tmp_path):
    """The report would take its values for seeds."""
    shutil.copytree(ROOT / "experiments/tune_lr", tmp_path / "experiments/tune_two")
    for folder in ("src", "bin"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    script = tmp_path / "experiments/tune_two/main.py"
    text = script.read_text()
    assert text.count('"training_loop.batch_size": [64]') == 1
    script.write_text(text.replace('"training_loop.batch_size": [64]', '"training_loop.batch_size": [64, 128]'))
    refused = tune(tmp_path / "two", "prepare", script=script, code=2)
    assert "training_loop.batch_size: only SGD.lr and the seed may have several values" in refused.stderr
    assert not (tmp_path / "two").exists()


def test_every_run_is_within_the_plot(tmp_path, monkeypatch):
    """Also one that lies outside of the interval of the mean."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments/tune_lr"))
    import pandas as pd
    import plots
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    monkeypatch.setattr(plots, "figure", lambda *_: contextlib.nullcontext(axes))
    values = [95.1, 95.0, 95.2, 94.9, 60.0, 95.0, 95.1, 95.0, 95.2, 94.9]
    mean, std, half, n = mean_interval(values)
    table = pd.DataFrame({"value": [0.1], "mean": [mean], "std": [std], "interval": [half], "n": [n]})
    plots.metric_by_setting(pd.DataFrame({"value": 0.1, "valid": values}), table, "rate", tmp_path / "plot")
    low, high = axes.get_ylim()
    assert mean - half > 60 and low < 60 and high > 95.2


@pytest.mark.parametrize("command", ["run", "status", "report"])
def test_what_is_not_prepared_is_refused(command, tmp_path):
    assert "main.py prepare" in tune(tmp_path / "none", command, code=2).stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_paused_and_gone_on_with_the_report_is_the_same_byte_for_byte(tmp_path):
    """A sweep of batch sizes, by a copied folder: undisturbed, and paused by Ctrl-C twice."""
    experiment = ROOT / "experiments/tune_lr"
    copied = tmp_path / "clone/experiments/tune_batch_size"
    for folder in ("src", "bin"):
        shutil.copytree(ROOT / folder, tmp_path / "clone" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(experiment, copied)
    before = (copied / "main.py").read_text()
    edits = (
        ('AXIS, LABEL = "SGD.lr", "learning rate"', 'AXIS, LABEL = "training_loop.batch_size", "batch size"'),
        ("        AXIS: [0.001, 0.03, 1.0],\n", "        AXIS: [32, 128],\n"),
        ('        "training_loop.batch_size": [64],\n', ""),
        ('"training_loop.n_epochs": [10]', '"training_loop.n_epochs": [20]'),
        ('"training_loop.seed": [0, 1, 2]', '"training_loop.seed": [0, 1]'),
    )
    after = before
    for old, new in edits:
        assert old in after
        after = after.replace(old, new, 1)
    (copied / "main.py").write_text(after)
    with open(copied / "base.gin", "a") as file:
        file.write("SGD.lr = 0.05\n")
    script = copied / "main.py"
    for name in ("smooth", "paused"):
        tune(tmp_path / name / "sweep", "prepare", script=script)
    tune(tmp_path / "smooth/sweep", "run", "--workers", "2", script=script)
    command = [sys.executable, str(script), "run", "--workers", "2", "--folder", str(tmp_path / "paused/sweep")]
    for n_begun in (1, 3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while len(list((tmp_path / "paused/sweep/runs").glob("*/history.csv"))) < n_begun:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 130 and "goes on" in said
    tune(tmp_path / "paused/sweep", "run", "--workers", "2", script=script)
    for name in ("smooth", "paused"):
        runs = find_runs(tmp_path / name / "sweep/runs")
        assert len(runs) == 4 and all(status(run) == "finished" for run in runs)
        tune(tmp_path / name / "sweep", "report", script=script)
    reports = [tmp_path / name / "sweep/report" for name in ("smooth", "paused")]
    names = sorted(path.name for path in reports[0].iterdir())
    assert filecmp.cmpfiles(*reports, names, shallow=False)[0] == names
    assert "batch size" in (reports[0] / "report.html").read_text()
