"""bin/compare.py: what two runs do not have in common."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from src.record import code_archive, read_archive
from tests.awkward import EXAMPLE, ROWS


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two copies of one run, a and b, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        shutil.copytree(EXAMPLE, name)
    return tmp_path


def edit(file: str, old: str, new: str) -> Callable[[], object]:
    """Writes something else into a file of run b."""

    def change() -> None:
        text = Path("b", file).read_text()
        assert old in text
        Path("b", file).write_text(text.replace(old, new))

    return change


def edit_code(name: str) -> Callable[[], object]:
    def change() -> None:
        archive = Path("b/code.tar.gz")
        archive.write_bytes(code_archive(read_archive(archive) | {name: b"# new\n"}))

    return change


def spoil_code() -> None:
    Path("b/code.tar.gz").write_bytes(b"no archive")


def lose_epoch() -> None:
    Path("b/history.csv").write_text("".join(Path("a/history.csv").read_text().splitlines(keepends=True)[:2]))


def test_a_copy_does_not_differ(runs, main, capfd):
    assert main("compare", "a", "b") == 0
    assert capfd.readouterr().out == "nothing differs\n"
    assert main("compare", "a", "b", "--json") == 0
    assert not any(json.loads(capfd.readouterr().out).values())


NEW_FINGERPRINT = edit("meta.json", '"fingerprint": "ecb23fc4', '"fingerprint": "00000000')
DIFFERENCES = {
    "setting": ("settings", "SGD.lr: 0.05 -> 0.1", edit("config.gin", "SGD.lr = 0.05", "SGD.lr = 0.1")),
    "added": ("settings", "digits.flip: (not set) -> 1", edit("config.gin", "digits.p", "digits.flip = 1\ndigits.p")),
    "data": ("data", "fingerprint: ecb23fc4", NEW_FINGERPRINT),
    "code": ("code", "src/run.py", edit_code("src/run.py")),
    "new code": ("code", "src/models/new.py", edit_code("src/models/new.py")),
    "no code": ("code", "not known which, b/code.tar.gz: cannot be read", spoil_code),
    "torch": ("versions", "torch: 2.14.1 -> 2.15.0", edit("meta.json", '"torch": "2.14.1"', '"torch": "2.15.0"')),
    "python": ("versions", "python: 3.11.7 -> 3.12.0", edit("meta.json", '"python": "3.11.7"', '"python": "3.12.0"')),
    "threads": ("versions", "threads: 2 -> 4", edit("meta.json", '"threads": 2', '"threads": 4')),
    "device": ("versions", "device: cpu -> cuda", edit("meta.json", '"device": "cpu"', '"device": "cuda"')),
    "history": ("history", "epoch 2, val_loss: 0.2357", edit("history.csv", ROWS[-1].split(",")[5], "0.5")),
    "epochs": ("history", "epoch 2, epoch: 2.0 -> (not set)", lose_epoch),
    "test": ("history", "test, acc: 96.1", edit("eval_results.json", "96.1", "95.1")),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_named_alone_and_counts(runs, main, capfd, name):
    section, line, change = DIFFERENCES[name]
    change()
    assert main("compare", "a", "b", "--json") == 1
    found = {section: lines for section, lines in json.loads(capfd.readouterr().out).items() if lines}
    assert list(found) == [section] and len(found[section]) == 1 and line in found[section][0]
    assert main("compare", "a", "b") == 1
    out = capfd.readouterr().out
    first, *others = out.splitlines()
    assert first.startswith(section) and line in first
    assert others == ([] if section == "history" else ["history   no epoch differs"])


def test_times_texts_and_tests_are_no_difference(runs, main, capfd):
    time = Path("b/history.csv").read_text().splitlines()[1].split(",")[1]
    edit("history.csv", time, "9.5")()
    edit_code("README.md")()
    edit_code("tests/test_new.py")()
    assert main("compare", "a", "b") == 0


def test_what_is_no_run_is_refused(runs, main, capfd):
    (runs / "empty").mkdir()
    example = json.loads((EXAMPLE / "meta.json").read_text())
    for folder in ("nowhere", "empty"):
        assert main("compare", "a", folder) == main("compare", folder, "a") == 2
        out, err = capfd.readouterr()
        assert out == "" and err == 2 * f"compare.py: {folder}/meta.json: No such file or directory\n"
    for file, content, message in (
        ("meta.json", "[]", "b/meta.json: list indices must be integers"),
        ("config.gin", "", "b/config.gin: is not as a run writes it"),
        ("history.csv", "epoch\n1,2\n", "b/history.csv: line 2 has 2 values under 1 columns"),
        ("eval_results.json", "[]", "b/eval_results.json: 'list' object has no attribute 'items'"),
        ("meta.json", json.dumps(example | {"starts": []}), "b/meta.json: list index out of range"),
    ):
        whole = (runs / "b" / file).read_bytes()
        (runs / "b" / file).write_text(content)
        assert main("compare", "a", "b") == 2
        assert message in capfd.readouterr().err
        (runs / "b" / file).write_bytes(whole)
