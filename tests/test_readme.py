"""README.md: every command and every piece of code in it is run, in a copy of the repository, in order.

A python block says in its first line what it is: a file, an addition to a file, or a script.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from src import config, results
from src.config import ROOT
from src.record import code_files
from tests.conftest import RUN_FILES

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
ELSEWHERE = (  # tests of their own hold these
    "conda env create --file e.yml",  # test_environment.py: by form, there is no conda here
    "pytest -n 2",  # this
    "source e.sh",  # test_environment.py
)


def commands(block: str) -> list[str]:
    return [line for line in block.splitlines() if line and not line.startswith("#")]


def test_paths_in_the_readme_exist():
    for path in re.findall(r"\]\(((?!http|#)[^)]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        assert (ROOT / path).exists(), path
    headings = {
        re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", README, re.M)
    }
    assert headings >= set(re.findall(r"\]\(#([^)]+)\)", README))


@pytest.mark.parametrize("script", ["bin/train.py", "bin/runs.py", "bin/launch.py"])
def test_options_named_in_the_readme_exist(script):
    named = re.findall(rf"`(?:\./e\.sh )?{script} ([^`]*)`", README)
    options = {option for words in named for option in re.findall(r"(?:^| )(--[a-z]+)", re.sub(r'"[^"]*"', "", words))}
    told = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert named and all(option in told for option in options), options


def test_the_table_of_the_run_folder_names_every_file():
    table = README.split("## The run folder")[1].split("## ")[0]
    for name in RUN_FILES:
        assert re.search(rf"^\|.*\b{re.escape(name)}", table, re.M), name


def test_settings_named_in_the_readme_exist():
    from src.training_loop import configure

    own = ("Wide", "arrays", "WeightNorm", "cifar10", "poutyne.")
    base = [str(ROOT / "configs/digits.gin")]
    lines = re.findall(r'-b[= ]"([^"]+)"', README)
    assert len(lines) >= 6
    for line in lines:
        if not any(name in line for name in own):
            configure(config.read(base, [line]))
    rows = [re.findall(r"`([\w.]+ = [^`]+)`", line) for line in README.splitlines() if line.startswith("| ")]
    rows = [bindings for bindings in rows if len(bindings) > 1]
    assert len(rows) >= 3
    for bindings in rows:
        configure(config.read(base, bindings))
    named = {f"training_loop.{name}" for name in re.findall(r"(?<!/)\btraining_loop\.(?!py\b)(\w+)", README)}
    assert named <= configure(config.read(base)).flat().keys()


@pytest.mark.slow
def test_every_command_and_example_works(tmp_path):
    clone = tmp_path / "clone"
    for name, content in code_files().items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(content)
        shutil.copymode(ROOT / name, clone / name)
    environment = {key: value for key, value in os.environ.items() if key != "DATA_DIR"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = 0
    for language, block in BLOCKS:
        first, _, rest = block.partition("\n")
        kind, _, target = first.removeprefix("# ").partition(": ")
        if language == "bash":
            for command in commands(block):
                if command in ELSEWHERE:
                    continue
                if command.startswith("tensorboard"):
                    look_at_tensorboard(command, clone, environment)
                elif command.startswith("export "):
                    environment["DATA_DIR"] = str(clone / "data")
                    (clone / "data").mkdir(exist_ok=True)
                else:
                    command = command.removeprefix("./e.sh ")
                    ran = subprocess.run(
                        ["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True
                    )
                    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
                done += 1
        elif language == "python" and kind == "file":
            (clone / target).write_text(rest)
        elif language == "python" and kind == "add to":
            contents = (clone / target).read_text()
            (clone / target).write_text(contents + rest)
        elif language == "python":
            assert kind == "run in", first
            (clone / "script.py").write_text(rest)
            subprocess.run([sys.executable, "script.py"], cwd=clone, env=environment, check=True)
            done += 1
    assert done >= 12
    assert len(results.load_history(clone / "save_to_folder")) == 5
    assert (clone / "save_to_folder/model.pt2").exists()
    assert results.load_history(clone / "results/norm")[1]["weight_norm"] > 0
    for run in results.find_runs(clone):
        assert results.status(run) == "finished", run
    same = [results.load_history(clone / "results" / run)[-1]["val_loss"] for run in ("wide", "again")]
    assert same[0] == same[1]
    for tool in (["ruff", "check", "--ignore", "E402,I001,RUF100"], ["mypy"]):  # but for the order of the added lines
        subprocess.run([sys.executable, "-m", *tool], cwd=clone, check=True)


def look_at_tensorboard(command, folder, environment):
    """Starts it on a free port and asks it for its runs."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*command.split(), "--port", str(port), "--host", "127.0.0.1"],
        cwd=folder,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/tags", timeout=5) as answer:
                    if b"epoch/val_acc" in answer.read():
                        return
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError("tensorboard shows no epoch/val_acc")
    finally:
        process.terminate()
        process.wait()
