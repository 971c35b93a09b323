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
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (package, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names}
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


def test_what_reads_text_imports_nothing_above_it():
    below = {"config": (), "output": (), "stop": (), "record": ("config",), "run": ("config", "output", "record")}
    for module, allowed in below.items():
        ours = {name.split(".")[1] for name in imports(ROOT / f"src/{module}.py") if name.startswith("src.")}
        assert ours <= set(allowed), module


def test_a_table_of_contents_names_every_file():
    for package in ("data", "models", "callbacks"):
        named = imports(ROOT / f"src/{package}/__init__.py")
        for file in (ROOT / "src" / package).glob("*.py"):
            if re.search(r"^@gin\.register", file.read_text(), re.M):
                assert any(name.startswith(f"src.{package}.{file.stem}.") for name in named), file


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


SHAPE = re.compile(r"\[[\w*/, .]*\]")  # [B, C, H, W]
TENSOR = re.compile(r"(Iterator\[|tuple\[|list\[|Sequence\[)*Tensor\b")
UNITS = {  # of a parameter of this name its docstring says one of these
    "timeout": "second", "padding": "pixel|crop", "cutout": "pixel", "size": "pixel| size|process", "patience": "epoch",
    "schedule": "epoch", "total_steps": "step", "warmup_steps": "step",
}  # fmt: skip


def takes(node: ast.FunctionDef | ast.ClassDef) -> dict[str, str]:
    """The parameters of a function, or of a class, with their annotations, and "return"."""
    functions = [f for f in getattr(node, "body", []) if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    function = node if isinstance(node, ast.FunctionDef) else next(iter(functions), None)
    if function is None:
        return {}
    arguments = {a.arg: a.annotation for a in (*function.args.args, *function.args.kwonlyargs)}
    return {name: ast.unparse(a) if a else "" for name, a in (arguments | {"return": function.returns}).items()}


def test_every_public_name_has_a_docstring_that_tells_shapes_and_units():
    names = 0
    for file in FILES:
        for name, node, docstring in public(ast.parse(file.read_text())):
            names += 1
            assert docstring or file.parent.name == "bin", (file.name, name)
            if any(TENSOR.match(annotation) for annotation in takes(node).values()):
                assert SHAPE.search(docstring), f"{file.name}: {name} takes or gives a tensor: of which shape?"
            for forward in getattr(node, "body", []):
                if isinstance(forward, ast.FunctionDef) and forward.name == "forward":
                    told = f"{docstring} {ast.get_docstring(forward)}"
                    assert len(SHAPE.findall(told)) > 1 and "->" in told, f"{file.name}: {name}: shapes x -> y?"
            for parameter, unit in UNITS.items():
                if parameter in takes(node):
                    assert re.search(unit, docstring), f"{file.name}: {name}: {parameter} in which unit?"
    assert names > 150
