"""The house: who may import whom, what the folders hold, that each package's table of contents is whole."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.config import ROOT

FILES = sorted((ROOT / "src").rglob("*.py")) + sorted((ROOT / "bin").glob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_poutyne_appears_in_the_loop_and_the_callbacks_only():
    users = {f.relative_to(ROOT).as_posix() for f in FILES if re.search(r"\bpoutyne\b", f.read_text())}
    allowed = {f for f in users if f.startswith("src/callbacks/") or f in ("src/training_loop.py", "src/run.py")}
    assert users == allowed  # run.py records its version
    assert not any("poutyne" in name for name in imports(ROOT / "src/run.py"))


@pytest.mark.parametrize("package", ["data", "models", "callbacks"])
def test_imports_point_down(package):
    for file in (ROOT / "src" / package).glob("*.py"):
        for name in imports(file):
            if name.startswith("src."):
                assert name.startswith(("src.config", f"src.{package}")), (file.name, name)


def test_what_a_table_of_contents_names_is_there():
    for package in ("data", "models", "callbacks"):
        module = __import__(f"src.{package}", fromlist=["__all__"])
        assert all(hasattr(module, name) for name in module.__all__)


def test_scripts_are_executable_and_thin():
    for script in (ROOT / "bin").glob("*.py"):
        text = script.read_text()
        assert text.startswith("#!/usr/bin/env python3\n") and script.stat().st_mode & 0o111
        assert len(text.splitlines()) < 110


FRAMEWORKS = re.compile(r"_|on_|forward$|(load_)?state_dict$")  # private, or what a framework says of it holds


def public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef, str]]:
    """Public functions, classes and methods: name, node, docstring (of a method its class's with it)."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node, ast.get_docstring(node) or ""
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef) and not FRAMEWORKS.match(method.name):
                    own = ast.get_docstring(method) or ""
                    yield f"{node.name}.{method.name}", method, own and f"{own} {ast.get_docstring(node)}"


def test_every_public_name_has_a_docstring_that_tells_shapes():
    names = 0
    for file in FILES:
        for name, node, docstring in public(ast.parse(file.read_text())):
            names += 1
            assert docstring or file.parent.name == "bin", (file.name, name)
            if isinstance(node, ast.FunctionDef):
                arguments = [a.annotation for a in (*node.args.args, *node.args.kwonlyargs)]
                if any(a and ast.unparse(a) == "Tensor" for a in arguments):
                    assert "[" in docstring, f"{file.name}: {name} takes a tensor: of which shape?"
    assert names > 200
