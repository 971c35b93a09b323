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

# Files that carry the name, or speak of the template.
NAMED = ("pyproject.toml", "e.yml", "requirements.txt", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md")
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
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}  # not deleted


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
    speaks = [name for name in NAMED if re.search(rb"vanilla.pytorch", theirs[name], re.I)]
    assert speaks == ["CHANGELOG.md"]  # where it comes from
    readme = (project / "README.md").read_text()
    own = ours["README.md"].decode()
    for heading in ("Make it yours", "Beside other templates"):
        assert f"\n## {heading}\n" in own and heading not in readme and heading.lower().replace(" ", "-") not in readme
    kept = [line for line in own.splitlines() if line.startswith("## ") and line[3:] not in (heading, "Make it yours")]
    assert [line for line in readme.splitlines() if line.startswith("## ")] == kept
    assert "copier" not in (project / "CONTRIBUTING.md").read_text()
    assert os.access(project / "e.sh", os.X_OK) and os.access(project / "bin/train.py", os.X_OK)


def test_the_author_and_a_name_that_no_package_can_have(template):
    project = project_of(template, "with-author", "-d", "author=A. Person")
    licence = (project / "LICENSE").read_text()
    assert licence == (template / "LICENSE").read_text().replace("the authors of vanilla-pytorch", "A. Person")
    assert "A. Person" in licence
    command = [sys.executable, "-m", "copier", "copy", "--defaults", "-d", "name=Deep Thoughts", template, "refused"]
    done = subprocess.run(command, cwd=template.parent, capture_output=True, text=True)
    assert done.returncode and "small letters, digits and hyphens" in done.stderr
    assert not (template.parent / "refused").exists()


@pytest.mark.slow
def test_a_project_trains_and_passes_its_tests_at_once(template):
    project = project_of(template, "deep", "-d", "name=deep-thoughts")
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    command = [sys.executable, "bin/train.py", "results/first", "configs/digits.gin", "configs/debug.gin"]
    subprocess.run(command, cwd=project, check=True, capture_output=True, env=environment)
    named = [f"tests/test_{name}.py" for name in ("layout", "readme", "environment")]  # what the files named above hold
    for marked, tests in (("not slow", named), ("slow", ["tests/test_environment.py", "-k", "installing"])):
        command = [sys.executable, "-m", "pytest", "-q", "-m", marked, *tests]
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


def last_release() -> str:
    """The last tag, or, in a clone without tags, the commit before the version in pyproject.toml was raised."""
    tags = git(ROOT, "tag", "--list", "v*", "--merged", "HEAD", "--no-contains", "HEAD", "--sort=v:refname").split()
    raised = git(ROOT, "log", "-1", "--format=%H %P", "-G^version = ", "--", "pyproject.toml").split()
    return [*(raised[-1:] or ["HEAD"]), *tags][-1]  # the last: a repository of one commit


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """The template's own repository: the last release, tagged v0.0.1, and the tree as it is now, v0.0.2."""
    folder = tmp_path_factory.mktemp("releases") / "template"
    git(ROOT, "worktree", "prune")
    git(folder.parent, "clone", "-q", "--no-checkout", str(ROOT), str(folder))
    git(folder, "checkout", "-q", git(ROOT, "rev-parse", last_release()).strip())
    for tag in git(folder, "tag").split():
        git(folder, "tag", "-d", tag)
    git(folder, "tag", "v0.0.1")
    for file in [f for f in folder.rglob("*") if f.is_file() and ".git" not in f.parts]:
        file.unlink()
    for name in files(ROOT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    changed = folder / "src/stop.py"  # should nothing have changed since
    changed.write_text(changed.read_text().replace('"""', '"""Released: ', 1))
    release(folder, "v0.0.2")
    return folder


def edit(project: Path, name: str, old: str, new: str) -> None:
    text = (project / name).read_text()
    assert old in text
    (project / name).write_text(text.replace(old, new, 1))
    git(project, "add", "-A")
    git(project, "commit", "-qm", "edit")


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_edit_that_an_update_touches_is_a_conflict_that_keeps_both(template):
    project = project_of(template, "torn")
    edit(project, "src/models/mlp.py", "(256, 256)", "(64, 64)")
    next_version(template)
    copier("update", "--defaults", "--conflict", "inline", folder=project)
    assert git(project, "diff", "--name-only", "--diff-filter=U").split() == ["src/models/mlp.py"]
    text = (project / "src/models/mlp.py").read_text()
    assert "<<<<<<<" in text and "(64, 64)" in text and "(512, 256)" in text
    assert (project / "src/stop.py").read_text().startswith('"""Later')


@pytest.mark.slow
def test_an_edited_file_that_an_update_deletes_comes_back_as_the_readme_says(template):
    project = project_of(template, "kept")
    edit(project, "src/models/mlp.py", "(256, 256)", "(64, 64)")
    (template / "src/models/mlp.py").unlink()
    release(template, "1.1.0")
    copier("update", "--defaults", folder=project)
    assert git(project, "diff", "--diff-filter=D", "--name-only").split() == ["src/models/mlp.py"]
    git(project, "checkout", "HEAD", "--", "src/models/mlp.py")
    assert "(64, 64)" in (project / "src/models/mlp.py").read_text()


@pytest.mark.slow
def test_an_edited_project_of_the_last_release_comes_up_to_this_one_and_trains(releases, tmp_path):
    project = tmp_path / "project"
    copier("copy", "--defaults", "-r", "v0.0.1", "-d", "name=deep-thoughts", releases, project, folder=tmp_path)
    git(project, "init", "-q")
    (project / "src/models/mine.py").write_text('"""My model."""\n')
    (project / "configs/mine.gin").write_text("# Mine.\ninclude 'digits.gin'\nSGD.lr = 0.02\n")
    with open(project / "configs/debug.gin", "a") as file:
        file.write("training_loop.seed = 3\n")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "mine")
    copier("update", "--defaults", folder=project)
    assert not git(project, "diff", "--name-only", "--diff-filter=U")
    expected = project_of(releases, "expected", "-d", "name=deep-thoughts")
    now, new = files(project), files(expected)
    assert now.pop("src/models/mine.py") and now.pop("configs/mine.gin").endswith(b"SGD.lr = 0.02\n")
    assert now["configs/debug.gin"] == new["configs/debug.gin"] + b"training_loop.seed = 3\n"
    differing = {name for name in now.keys() | new.keys() if now.get(name) != new.get(name)}
    assert differing <= {"configs/debug.gin", ".copier-answers.yml"}
    command = [sys.executable, "bin/train.py", "results/first", "configs/mine.gin", "configs/debug.gin"]
    subprocess.run(command, cwd=project, check=True, capture_output=True)


@pytest.mark.slow
def test_lines_that_both_the_project_and_the_release_changed_are_conflicts_that_keep_both(releases, tmp_path):
    project = tmp_path / "project"
    copier("copy", "--defaults", "-r", "v0.0.1", releases, project, folder=tmp_path)
    git(project, "init", "-q")
    changed = git(releases, "diff", "--name-only", "--diff-filter=M", "v0.0.1", "v0.0.2", "--", "src").split()
    edited = {}
    for name in ["src/stop.py", *changed[:4]]:
        diff = git(releases, "diff", "-U0", "v0.0.1", "v0.0.2", "--", name).splitlines()
        replaced = [int(m[1]) for line in diff if (m := re.match(r"@@ -(\d+)(?:,[1-9]\d*)? \+", line))]
        if replaced:
            lines = (project / name).read_text().splitlines(keepends=True)
            lines[replaced[0] - 1] = edited[name] = lines[replaced[0] - 1].rstrip("\n") + "  # my own words\n"
            (project / name).write_text("".join(lines))
    git(project, "add", "-A")
    git(project, "commit", "-qm", "mine")
    copier("update", "--defaults", "--conflict", "inline", folder=project)
    unmerged = git(project, "diff", "--name-only", "--diff-filter=U").split()
    assert unmerged == sorted(edited) and "src/stop.py" in edited
    for name, line in edited.items():
        text = (project / name).read_text()
        assert "<<<<<<<" in text and line in text, name


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
        print(f"\nlines of Python: {lines}, {sum(lines.values())} in all", file=sys.stderr)  # -n shows it
    # With several processes and Slurm. In a project of your own delete this file.
    assert sum(lines.values()) <= 4850, "what comes in has to push something out"


def test_it_asks_for_at_most_three_packages_beside_those_it_is_about_and_says_why():
    about = {"torch", "torchvision", "poutyne", "gin-config", "tensorboard", "scikit-learn", "pandas", "matplotlib"}
    lines = (ROOT / "pyproject.toml").read_text().partition("dependencies = [\n")[2].partition("\n]")[0].splitlines()
    reasons = [re.fullmatch(r' +"([\w-]+) [^"]*", +# \w.*', line) for line in lines]
    assert all(reasons) and len({reason[1] for reason in reasons} - about) <= 3
