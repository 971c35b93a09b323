"""tests/edits: typical changes, each a patch that touches little, trains, and goes on to the bit when it is stopped.

Before its first `diff --git` a patch says what it is, `$ ` what to run, and `> ` what the test metrics must reach.
"""

import json
import operator
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kill import run_difference
from src.config import ROOT
from tests.conftest import copy_code

PATCHES = sorted((ROOT / "tests/edits").glob("*.patch"))
MOST_FILES, MOST_LINES = 2, 30  # that are there already: files touched, and lines added or removed in them
HOLDS = {">=": operator.ge, "<=": operator.le}


def read(patch: Path) -> tuple[str, list[str], list[tuple[str, str, float]]]:
    """Title, commands, and bounds (metric, sign, number) of a patch."""
    title, *lines = patch.read_text().partition("diff --git")[0].strip().splitlines()
    assert all(line.startswith(("$ ", "> ")) for line in lines), patch.name
    bounds = [line.split()[1:] for line in lines if line[0] == ">"]
    return title, [line[2:] for line in lines if line[0] == "$"], [(name, sign, float(n)) for name, sign, n in bounds]


def test_the_readme_names_each_of_ten_edits():
    readme = (ROOT / "README.md").read_text()
    assert len(PATCHES) == 10
    for patch in PATCHES:
        title, commands, bounds = read(patch)
        assert f"](tests/edits/{patch.name})" in readme, patch.name
        assert title and 1 <= len(commands) <= 2 and bounds, patch.name
        assert commands[-1].startswith("bin/train.py results/"), patch.name


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """mypy's, so that it reads torch once."""
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.slow
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_an_edit_is_small_trains_and_goes_on(patch, tmp_path, cache):
    code = copy_code(tmp_path / "code")
    for script in (ROOT / "bin").glob("*.py"):
        shutil.copymode(script, code / "bin" / script.name)
    environment = {key: value for key, value in os.environ.items() if key != "DATA_DIR"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(command: str) -> str:
        ran = subprocess.run(
            ["bash", "-c", command], cwd=code, env=environment, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
        return ran.stdout

    run("git init -q && git add -A && git -c user.name=a -c user.email=a@example.org commit -qm before")
    run(f"git apply '{patch}'")
    touched = [line.split("\t") for line in run("git diff --numstat HEAD").splitlines()]  # without new files
    assert len(touched) <= MOST_FILES, touched
    assert sum(int(added) + int(removed) for added, removed, _ in touched) <= MOST_LINES, touched
    run(f"ruff check . && ruff format --check . && mypy --cache-dir '{cache}'")
    run("pytest -q tests/test_layout.py")
    parts = r"^\+\+\+ b/src/(?:data|models|callbacks)/\w+\.py\n(?:[^d].*\n)*?\+@gin\.register.*\n\+(?:class|def) (\w+)"
    for name in re.findall(parts, patch.read_text(), re.M):  # what is registered is tested
        assert "1 passed" in run(f"pytest -q tests/test_components.py -k '{name}]'")

    _, commands, bounds = read(patch)
    for command in commands:
        run(command)
    last = commands[-1]
    folder = re.match(r"bin/train\.py (\S+)", last)[1]
    reached = json.loads((code / folder / "eval_results.json").read_text())
    for metric, sign, number in bounds:
        assert HOLDS[sign](reached[metric], number), (metric, reached)

    again = last.replace(folder, "results/again", 1)
    run(f"{again} -b training_loop.stop_at=3")
    stopped = json.loads((code / "results/again/meta.json").read_text())["status"]
    assert stopped == "stopped" and not (code / "results/again/history.csv").exists()  # inside the first epoch
    run(f"{again} -b training_loop.reload=True")
    assert run_difference(code / folder, code / "results/again") is None
