"""The environment: what is stated where, and e.sh in real shells.

The shell tests run e.sh in a small clone of its own. Its project has the form of ours, no
dependencies and a build backend of a few lines, so that pip needs seconds and no network.
"""

import importlib.metadata
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]


def pins() -> dict[str, str]:
    """The versions in requirements.txt by canonical name; every line has to be NAME==VERSION."""
    versions: dict[str, str] = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.!+]+)", line).groups()
            assert canonicalize_name(name) not in versions, f"{name} is pinned twice"
            versions[canonicalize_name(name)] = version
    return versions


# ---------------------------------------------------------------------------- what is stated where


def test_conda_environment_installs_from_pyproject() -> None:
    text = (ROOT / "e.yml").read_text()
    environment = yaml.safe_load(text)
    python, pip, from_pip = environment["dependencies"]
    assert text.startswith(f"name: {PROJECT['name']}\n")  # e.sh reads the first line
    assert python == f"python {PROJECT['requires-python']}"
    assert pip == "pip"
    assert from_pip == {"pip": ["-c requirements.txt", ".[dev]"]}


def test_e_sh_takes_the_pythons_of_pyproject() -> None:
    text = (ROOT / "e.sh").read_text()
    candidates = [int(minor) for minor in re.findall(r" python3\.(\d+)(?= )", text)]
    assert candidates == list(range(max(candidates), min(candidates) - 1, -1))
    assert f"(3, {min(candidates)}) <= sys.version_info < (3, {max(candidates) + 1})" in text
    assert f"Python 3.{min(candidates)} to 3.{max(candidates)}" in text
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [minor for minor in range(40) if f"3.{minor}" in allowed] == candidates[::-1]


def test_pins_are_in_the_ranges() -> None:
    versions = pins()
    for requirement in REQUIREMENTS:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)])


@pytest.mark.parametrize(
    ("package", "versions"), [("torch", ["2.9.0", "2.15.0"]), ("torchvision", ["0.24.0", "0.30.0"])]
)
def test_ranges_admit_several_versions(package: str, versions: list[str]) -> None:
    (requirement,) = (r for r in REQUIREMENTS if r.name == package)
    assert all(version in requirement.specifier for version in versions)


def test_all_that_is_needed_is_pinned() -> None:
    """Follows the dependencies of dependencies as they are installed here."""
    pinned = pins()
    todo = list(REQUIREMENTS)
    seen = set()
    while todo:
        requirement = todo.pop()
        if (key := str(requirement)) in seen:
            continue
        seen.add(key)
        assert canonicalize_name(requirement.name) in pinned, f"{requirement.name} has no pin"
        for line in importlib.metadata.requires(requirement.name) or []:
            needed = Requirement(line)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                todo.append(needed)


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements.txt", "e.yml", "e.sh"])
def test_no_package_index_and_no_path_of_one_machine(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"://|index-url|find-links|/home/|/Users/|/root/|/tmp/", text)


def test_github_and_pre_commit_call_what_ci_calls() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert all(version in allowed for version in workflow["strategy"]["matrix"]["python"])
    assert workflow["steps"][-1]["run"].endswith("bash .ci/run")
    script = (ROOT / ".ci/run").read_text()
    (tests,) = re.findall(r"^pytest.*$", (ROOT / "README.md").read_text(), re.M)
    assert f"\n./e.sh {tests} | tee" in script
    (hooks,) = (repo["hooks"] for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"])
    assert len(hooks) == 3
    for hook in hooks:
        assert f"\n{hook['entry'].removesuffix(' --fix')}" in script, hook["entry"]


@pytest.mark.slow
def test_installing_brings_no_code_and_leaves_no_litter(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / "src").mkdir(parents=True)
    (clone / "src" / "code.py").touch()
    shutil.copy(ROOT / "pyproject.toml", clone)
    before = sorted(clone.rglob("*"))
    pip = [sys.executable, "-I", "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", tmp_path / "site", clone], check=True)
    assert sorted(clone.rglob("*")) == before
    stem = f"{PROJECT['name'].replace('-', '_')}-{PROJECT['version']}"
    assert [p.name for p in (tmp_path / "site").iterdir()] == [f"{stem}.dist-info"]


# -------------------------------------------------------------------------------------------- e.sh

# Builds a wheel without files from [project]. It says that it builds, and waits while `hold` is
# there: a test can stop or kill pip in the middle of its work.
BACKEND = """
import tomllib, time, zipfile
from pathlib import Path

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with open("built", "a") as f:
        f.write("x")
    for _ in range(3000):
        if not Path("hold").exists():
            break
        time.sleep(0.02)
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    stem = f"{project['name'].replace('-', '_')}-{project['version']}"
    metadata = f"Metadata-Version: 2.1\\nName: {project['name']}\\nVersion: {project['version']}\\n"
    metadata += "".join(f"Requires-Dist: {d}\\n" for d in project["dependencies"])
    metadata += "Provides-Extra: dev\\n"
    wheel = "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    with zipfile.ZipFile(Path(wheel_directory) / f"{stem}-py3-none-any.whl", "w") as z:
        z.writestr(f"{stem}.dist-info/METADATA", metadata)
        z.writestr(f"{stem}.dist-info/WHEEL", wheel)
        z.writestr(f"{stem}.dist-info/RECORD", "")
    return f"{stem}-py3-none-any.whl"
"""


def write_project(folder: Path, name: str, dependencies: list[str]) -> None:
    (folder / "pyproject.toml").write_text(
        f"""[project]
name = "{name}"
version = "1.0"
dependencies = {dependencies}
optional-dependencies.dev = []

[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[tool.ruff]
line-length = 100
"""
    )
    (folder / "backend.py").write_text(BACKEND)


class Clone:
    """A small clone and a home folder beside it."""

    def __init__(self, parent: Path) -> None:
        self.folder = parent / "it's a clone"  # a path with a space and a quote
        self.home = parent / "home"
        self.elsewhere = parent / "elsewhere"
        for folder in (self.folder, self.home, self.elsewhere):
            folder.mkdir()
        shutil.copy(ROOT / "e.sh", self.folder)
        (self.folder / "e.yml").write_text("name: small-clone\n")
        (self.folder / "requirements.txt").write_text("# nothing is needed\n")
        write_project(self.folder, "small-clone", [])
        self.venv = self.folder / ".venv"
        self.env = {
            key: value
            for key, value in os.environ.items()
            if key not in ("CONDA_PREFIX", "VIRTUAL_ENV", "PYTHONPATH", "BASH_ENV", "ZDOTDIR")
        } | {"HOME": str(self.home)}

    def run(self, *command: str | Path, **kwargs) -> subprocess.CompletedProcess[str]:
        """The command, run from another folder."""
        kwargs = {"cwd": self.elsewhere, "env": self.env, "stdin": subprocess.DEVNULL} | kwargs
        return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)

    def e(self, *command: str, **kwargs) -> subprocess.CompletedProcess[str]:
        """The command, run through e.sh."""
        return self.run(self.folder / "e.sh", *command, **kwargs)

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        """The command in a process group of its own."""
        return subprocess.Popen(
            command,
            cwd=self.elsewhere,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def builds(self) -> int:
        """How often pip has begun to build the project."""
        built = self.folder / "built"
        return len(built.read_text()) if built.exists() else 0


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone whose environment is made. A test may change it, but leaves it in working order."""
    clone = Clone(tmp_path_factory.mktemp("clone"))
    done = clone.e("true")
    assert done.returncode == 0, done.stderr
    assert "making the environment" in done.stderr
    return clone


@pytest.fixture(params=["bash", "zsh"])
def shell(request: pytest.FixtureRequest) -> list[str]:
    """A shell without its start files, up to the script."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return {"bash": ["bash", "--norc", "-c"], "zsh": ["zsh", "-f", "-c"]}[request.param]


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize("link", [False, True])
def test_an_environment_of_another_making_stays(tmp_path: Path, link: bool) -> None:
    clone = Clone(tmp_path)
    made = tmp_path / "made" if link else clone.venv
    made.mkdir()
    (made / "pyvenv.cfg").write_text("precious")
    if link:
        clone.venv.symlink_to(made)
    done = clone.e("true")
    assert done.returncode == 1 and "was not made by e.sh" in done.stderr
    assert [file.name for file in made.iterdir()] == ["pyvenv.cfg"]


@pytest.mark.parametrize("how", ["here", "by name", "from above", "from elsewhere", "by a link"])
def test_sourced(clone: Clone, shell: list[str], how: str) -> None:
    link = clone.elsewhere / "link.sh"
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(clone.folder / "e.sh", clone.elsewhere))
    cwd, file = {
        "here": (clone.folder, "./e.sh"),
        "by name": (clone.folder, "e.sh"),
        "from above": (clone.folder.parent, f"{clone.folder.name}/e.sh"),
        "from elsewhere": (clone.elsewhere, str(clone.folder / "e.sh")),
        "by a link": (clone.elsewhere, "./link.sh"),
    }[how]
    script = f'source "{file}"; echo "$?|$(command -v python)|$VIRTUAL_ENV|$PWD"'
    done = clone.run(*shell, script, cwd=cwd)
    assert done.stdout == f"0|{clone.venv}/bin/python|{clone.venv}|{cwd}\n"
    assert done.stderr == ""


def test_sourced_twice_changes_path_once(clone: Clone, shell: list[str]) -> None:
    done = clone.run(*shell, f'source "{clone.folder}/e.sh"; source "{clone.folder}/e.sh"; echo $PATH')
    assert done.stdout.split(":").count(f"{clone.venv}/bin") == 1


@pytest.mark.parametrize("works", [True, False])
def test_sourced_leaves_nothing_behind(clone: Clone, shell: list[str], works: bool) -> None:
    """Also in a shell with strict options and aliases, and when there is no environment."""
    if shell[0] == "bash":
        setup = "shopt -s expand_aliases failglob nocaseglob; IFS=/; trap 'echo bye' USR1"
        state = "{ compgen -v; compgen -A function; compgen -a; shopt; set -o; trap; umask; }"
        own = {"BASH_LINENO", "FUNCNAME", "PIPESTATUS", "_"}
    else:
        setup = "setopt ksharrays shwordsplit globsubst; autoload -Uz add-zsh-hook; IFS=/"
        state = "{ typeset + | sed 's/.* //'; functions; alias; setopt; trap; umask; }"
        own = {"_"}
    setup += "; set -uC; alias cd='echo cd' cat='echo cat' rm='rm -i'"
    file = clone.folder / "e.sh"
    if not works:
        broken = clone.elsewhere / "broken"
        shutil.copytree(clone.folder, broken, ignore=lambda *_: [".venv"], dirs_exist_ok=True)
        (broken / ".venv").write_text("a file, where no environment can be made")
        file = broken / "e.sh"
    script = f'{setup}; {state} >|a\nsource "{file}"\nstatus_was=$?\n{state} >|b\necho $status_was'
    done = clone.run(*shell, f"status_was=0; VIRTUAL_ENV=; {script}")
    assert done.stdout == ("0\n" if works else "1\n"), done.stderr
    before, after = ((clone.elsewhere / x).read_text().splitlines() for x in "ab")
    assert set(before) ^ set(after) <= own


def test_failure_returns_1_and_the_shell_lives(clone: Clone, shell: list[str]) -> None:
    pyproject = (clone.folder / "pyproject.toml").read_text()
    write_project(clone.folder, "small-clone", ["missing @ file:///missing"])
    try:
        done = clone.run(*shell, f'source "{clone.folder}/e.sh"; echo "status $?"; command -v python')
        assert done.stdout.startswith("status 1\n")
        assert str(clone.venv) not in done.stdout
        assert "pip could not install" in done.stderr
        assert clone.e("echo", "never").returncode == 1
    finally:
        (clone.folder / "pyproject.toml").write_text(pyproject)
    # Nothing was changed, so nothing is made again.
    assert clone.e("true").stderr == ""


def test_run_through(clone: Clone) -> None:
    script = "import sys; print(sys.prefix, sys.argv[1:], sys.stdin.read()); sys.exit(7)"
    done = clone.e("python", "-c", script, "a b", "*", "", input="typed", stdin=None)
    assert done.stdout == f"{clone.venv} ['a b', '*', ''] typed\n"
    assert (done.returncode, done.stderr) == (7, "")


def test_run_through_is_the_command(clone: Clone) -> None:
    """The command takes the place of e.sh, so that a signal to it arrives."""
    process = subprocess.Popen(
        [clone.folder / "e.sh", "sh", "-c", "echo $$; exec sleep 60"], stdout=subprocess.PIPE, text=True, env=clone.env
    )
    assert int(process.stdout.readline()) == process.pid
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM


def test_run_through_by_zsh_and_sh(clone: Clone, shell: list[str]) -> None:
    done = clone.run(shell[0], clone.folder / "e.sh", "python", "-c", "import sys; print(sys.prefix)")
    assert done.stdout == f"{clone.venv}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_command_usage(tmp_path: Path, arguments: list[str]) -> None:
    clone = Clone(tmp_path)
    done = clone.e(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ./e.sh COMMAND")
    assert not clone.venv.exists()


@pytest.mark.alone
def test_second_call_adds_under_100_ms(clone: Clone, shell: list[str]) -> None:
    def median_seconds(script: str) -> float:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            assert clone.run(*shell, script).returncode == 0
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    assert median_seconds(f'source "{clone.folder}/e.sh"') - median_seconds(":") < 0.1


def test_other_settings_in_pyproject_change_nothing(clone: Clone) -> None:
    pyproject = clone.folder / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("line-length = 100", "line-length = 88"))
    assert clone.e("true").stderr == ""


def test_a_change_of_dependencies_is_brought_up_to_date(clone: Clone) -> None:
    tiny = clone.home / "tiny"
    tiny.mkdir()
    write_project(tiny, "tiny", [])
    (clone.venv / "mark").touch()
    write_project(clone.folder, "small-clone", [f"tiny @ {tiny.as_uri()}"])
    done = clone.e("python", "-c", "import importlib.metadata as m; print(m.version('tiny'))")
    assert done.stdout == "1.0\n"
    assert "bringing .venv up to date" in done.stderr
    assert clone.e("true").stderr == ""
    with open(clone.folder / "requirements.txt", "a") as f:
        f.write("# another pin\n")
    assert "bringing .venv up to date" in clone.e("true").stderr
    assert clone.e("true").stderr == ""
    assert (clone.venv / "mark").exists()  # it was not made again


@pytest.fixture
def held(clone: Clone) -> Iterator[Clone]:
    """The clone with changed dependencies; pip will stop in the middle of the update."""
    with open(clone.folder / "requirements.txt", "a") as f:
        f.write("# a change\n")
    hold = clone.folder / "hold"
    hold.touch()
    yield clone
    hold.unlink(missing_ok=True)
    assert clone.e("true").returncode == 0


def test_two_at_once(held: Clone) -> None:
    builds = held.builds()
    first = held.start(held.folder / "e.sh", "true")
    wait_until(lambda: held.builds() == builds + 1)
    second = held.start(held.folder / "e.sh", "true")
    assert "waiting for another e.sh" in second.stderr.readline()
    (held.folder / "hold").unlink()
    assert (first.wait(60), second.wait(60)) == (0, 0)
    assert held.builds() == builds + 1
    assert second.stderr.read() == ""


@pytest.mark.slow
def test_the_lock_outlives_a_killed_shell(held: Clone) -> None:
    """pip goes on when only the shell is killed; nobody may make .venv under it."""
    (held.venv / "stamp").unlink()  # made again: what was in .venv is removed, but for the lock
    builds = held.builds()
    shell = held.start("bash", held.folder / "e.sh", "_environment")
    wait_until(lambda: held.builds() == builds + 1)
    shell.kill()
    shell.wait()
    second = held.start(held.folder / "e.sh", "true")
    assert "waiting for another e.sh" in second.stderr.readline()
    (held.folder / "hold").unlink()
    assert second.wait(60) == 0
    assert "making the environment" in second.stderr.read()


def kill_in_the_middle_of_pip(clone: Clone) -> None:
    builds = clone.builds()
    process = clone.start(clone.folder / "e.sh", "true")
    wait_until(lambda: clone.builds() == builds + 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (clone.folder / "hold").unlink()
    (clone.venv / "half-made").touch()


def assert_made_again(clone: Clone) -> None:
    done = clone.e("python", "-c", "import importlib.metadata as m; m.version('small-clone')")
    assert done.returncode == 0, done.stderr
    assert "making the environment" in done.stderr
    assert not (clone.venv / "half-made").exists()
    assert clone.e("true").stderr == ""


@pytest.mark.slow
def test_an_interrupted_first_use_is_made_again(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    (clone.folder / "hold").touch()
    kill_in_the_middle_of_pip(clone)
    assert_made_again(clone)


@pytest.mark.slow
def test_an_interrupted_update_is_made_again(held: Clone) -> None:
    kill_in_the_middle_of_pip(held)
    assert_made_again(held)


@pytest.mark.slow
def test_without_its_python_it_is_made_again(clone: Clone) -> None:
    """The Python that .venv was made with may be removed: a dead link stays."""
    (clone.venv / "bin" / "python").unlink()
    assert_made_again(clone)


@pytest.mark.slow
def test_a_moved_folder_gets_a_new_environment(clone: Clone, tmp_path: Path) -> None:
    moved = Clone(tmp_path)
    shutil.rmtree(moved.folder)
    shutil.copytree(clone.folder, moved.folder, symlinks=True)
    done = moved.e("pip", "--version")  # a script that names its folder in the first line
    assert str(moved.venv) in done.stdout
    assert "making the environment" in done.stderr
    assert moved.e("true").stderr == ""


@pytest.mark.slow
def test_no_python_is_said_and_e_local_can_bring_one(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "awk", "cksum", "find", "mkdir", "rm", "true"):
        (tools / tool).symlink_to(shutil.which(tool))
    old = tools / "python3"  # too old: it fails the question for its version
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    clone.env["PATH"] = str(tools)
    done = clone.e("true")
    assert done.returncode == 1
    assert "needs Python 3.11 to 3.14" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not clone.venv.exists()

    pythons = tmp_path / "pythons"
    pythons.mkdir()
    (pythons / "python3.11").symlink_to(sys.executable)
    (clone.folder / "e.local.sh").write_text(
        f'export PATH="$PATH:{pythons}"\nexport DATA_DIR=/my/data\n[ -d /none ] && echo none\n'
    )
    done = clone.e("python", "-c", "import os; print(os.environ['DATA_DIR'])")
    assert (done.returncode, done.stdout) == (0, "/my/data\n")


def test_e_local_is_sourced(clone: Clone, shell: list[str]) -> None:
    local = clone.folder / "e.local.sh"
    local.write_text("export DATA_DIR=/my/data; on_this_machine() { echo called; }; false\n")
    try:
        script = f'source "{clone.folder}/e.sh" && echo $DATA_DIR && on_this_machine'
        assert clone.run(*shell, script).stdout == "/my/data\ncalled\n"
        assert clone.e("sh", "-c", "echo $DATA_DIR").stdout == "/my/data\n"
    finally:
        local.unlink()


@pytest.mark.parametrize("how", ["listed", "active"])
def test_conda_environment_is_preferred(tmp_path: Path, shell: list[str], how: str) -> None:
    clone = Clone(tmp_path)
    prefix = tmp_path / "conda envs" / "small-clone"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True)
    if how == "active":
        clone.env["CONDA_PREFIX"] = str(prefix)
    else:
        clone.env["CONDA_PREFIX"] = str(prefix.parent)  # base
        (clone.home / ".conda").mkdir()
        (clone.home / ".conda" / "environments.txt").write_text(
            f"{prefix.parent}\n{prefix}-other\n{tmp_path}/removed/small-clone\n{prefix}\n"
        )
    script = f'source "{clone.folder}/e.sh"; command -v python; echo "<${{VIRTUAL_ENV-}}>"'
    done = clone.run(*shell, script)
    assert (done.stdout, done.stderr) == (f"{prefix}/bin/python\n<>\n", "")
    done = clone.e("python", "-c", "import sys; print(sys.prefix)")
    assert (done.stdout, done.stderr) == (f"{prefix}\n", "")
    assert not clone.venv.exists()
