"""copier.yml: a project made from this repository, and brought up to a later version of it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src.config import ROOT
from tests.conftest import copy_code

NAMED = ("pyproject.toml", "e.yml", "requirements.txt", "README.md", "LICENSE")  # files that carry the name
OWN = {"copier.yml", "tests/test_template.py", "{{_copier_conf.answers_file}}.jinja", *(f"{n}.jinja" for n in NAMED)}


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def release(folder: Path, tag: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", tag)
    git(folder, "tag", tag)


def copier(*arguments: str | Path, folder: Path) -> str:
    command = [sys.executable, "-m", "copier", *map(str, arguments), "--quiet"]
    environment = os.environ | {
        f"GIT_{w}_{k}": "a@example.org" for w in ("AUTHOR", "COMMITTER") for k in ("NAME", "EMAIL")
    }
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def files(folder: Path) -> dict[str, bytes]:
    names = git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return {name: (folder / name).read_bytes() for name in names if name}


@pytest.fixture
def template(tmp_path):
    """This repository as it is now, as version 1.0.0 of the template, and results/example_run."""
    folder = copy_code(tmp_path / "template")
    for file in [f for f in (ROOT / "results/example_run").rglob("*") if f.is_file()]:
        path = folder / file.relative_to(ROOT)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read_bytes())
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        shutil.copymode(ROOT / path.relative_to(folder), path)
    git(folder, "init", "-q")
    release(folder, "1.0.0")
    return folder


def project_of(template: Path, name: str, *options: str) -> Path:
    project = template.parent / name
    copier("copy", "--defaults", *options, template, project, folder=template.parent)
    git(project, "init", "-q")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "begin")
    return project


def test_with_the_defaults_it_is_this_repository_byte_for_byte(template):
    project = project_of(template, "same")
    own = {name: content for name, content in files(template).items() if name not in OWN}
    made = files(project)
    assert made.pop(".copier-answers.yml")
    assert made == own


def test_a_project_of_another_name(template):
    answers = ("-d", "name=deep-thoughts", "-d", "author=A. Person", "-d", "licence=none")
    project = project_of(template, "deep", *answers)
    ours, theirs = files(template), files(project)
    assert {name for name in theirs if theirs[name] != ours.get(name)} == {*NAMED, ".copier-answers.yml"}
    assert (project / "README.md").read_text().startswith("# deep-thoughts\n")
    assert (project / "LICENSE").read_text() == "Copyright (c) 2026 A. Person. All rights reserved.\n"
    assert (project / "e.yml").read_text().startswith("name: deep-thoughts\n")
    assert not any(re.search(rb"vanilla.pytorch", content, re.I) for name, content in theirs.items() if name in NAMED)
    assert os.access(project / "e.sh", os.X_OK) and os.access(project / "bin/train.py", os.X_OK)


@pytest.mark.slow
def test_a_project_trains_and_passes_its_tests_at_once(template):
    project = project_of(template, "deep", "-d", "name=deep-thoughts")
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    command = [sys.executable, "bin/train.py", "results/first", "configs/digits.gin", "configs/debug.gin"]
    subprocess.run(command, cwd=project, check=True, capture_output=True, env=environment)
    quick = [
        "tests/test_layout.py",
        "tests/test_config.py",
        "tests/test_train.py",
        "tests/models",
        "tests/test_readme.py",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *quick]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout


def next_version(template: Path) -> None:
    """Changes a docstring, and a default that a project may have changed, too."""
    for name, old, new in (
        ("src/models/mlp.py", "(256, 256)", "(512, 256)"),
        ("src/stop.py", '"""Signals that ask a run to stop', '"""Later: signals that ask a run to stop'),
        ("README.md", "## Limits", "## Known limits"),
    ):
        text = (template / name).read_text()
        assert old in text
        (template / name).write_text(text.replace(old, new, 1))
    release(template, "1.1.0")


def edit(project: Path, name: str, old: str, new: str) -> None:
    text = (project / name).read_text()
    assert old in text
    (project / name).write_text(text.replace(old, new, 1))
    git(project, "add", "-A")
    git(project, "commit", "-qm", "edit")


def test_an_update_goes_into_an_edited_project(template):
    project = project_of(template, "edited", "-d", "name=deep-thoughts")
    (project / "src/models/mine.py").write_text('"""My model."""\n')
    edit(project, "configs/debug.gin", "training_loop.n_epochs = 1", "training_loop.n_epochs = 2")
    next_version(template)
    copier("update", "--defaults", folder=project)
    assert "(512, 256)" in (project / "src/models/mlp.py").read_text()
    assert (project / "src/stop.py").read_text().startswith('"""Later')
    readme = (project / "README.md").read_text()
    assert readme.startswith("# deep-thoughts\n") and "## Known limits" in readme
    assert "n_epochs = 2" in (project / "configs/debug.gin").read_text() and (project / "src/models/mine.py").exists()
    assert "1.1.0" in (project / ".copier-answers.yml").read_text()
    assert not git(project, "diff", "--name-only", "--diff-filter=U")


def test_an_edit_that_an_update_touches_is_a_conflict_that_keeps_both(template):
    project = project_of(template, "torn")
    edit(project, "src/models/mlp.py", "(256, 256)", "(64, 64)")
    next_version(template)
    copier("update", "--defaults", "--conflict", "inline", folder=project)
    assert git(project, "diff", "--name-only", "--diff-filter=U").split() == ["src/models/mlp.py"]
    text = (project / "src/models/mlp.py").read_text()
    assert "<<<<<<<" in text and "(64, 64)" in text and "(512, 256)" in text
    assert (project / "src/stop.py").read_text().startswith('"""Later')


def test_a_clone_merges_a_later_tag(template):
    clone = template.parent / "clone"
    git(template.parent, "clone", "-q", str(template), str(clone))
    edit(clone, "configs/debug.gin", "training_loop.n_epochs = 1", "training_loop.n_epochs = 2")
    next_version(template)
    git(clone, "fetch", "-q", "--tags")
    git(clone, "merge", "-q", "-m", "later", "1.1.0")
    assert "(512, 256)" in (clone / "src/models/mlp.py").read_text()
    assert "n_epochs = 2" in (clone / "configs/debug.gin").read_text()


def test_the_house_stays_small(capsys):
    lines = {
        folder: sum(len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py"))
        for folder in ("bin", "src", "experiments")
    }
    with capsys.disabled():
        print(f"\nlines of Python: {lines}, {sum(lines.values())} in all")
    # With several processes and Slurm. In a project of your own delete this file.
    assert sum(lines.values()) <= 6300, "what comes in has to push something out"
