"""Gin files and -b bindings: read, check, explain.

`read` needs the text alone (no torch, some milliseconds). `check` runs after the imports: every name, parameter and
type is looked at, and the result is the run's config: each setting that takes effect, defaults included.
"""

import difflib
import importlib
import inspect
import io
import math
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import Parameter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gin
from gin import config_parser

ROOT = Path(__file__).resolve().parent.parent
LOOP = "training_loop"  # the configurable from which all is reached
LOOP_SUPPLIES = ("input_shape", "n_classes", "params", "parameters", "loop")
REGISTRY = gin.config._REGISTRY  # what gin knows, by full names
Register = Callable[[str], None]  # registers a library's part, of this full name, with gin
LIBRARIES: dict[str, Register] = {}  # by the prefix of the names
# A text in quotes or a comment, which is the first group; or what separates two settings of a -b.
SEPARATOR = r"""(?s)(('{3}|"{3}|'|")(?:\\.|(?!\2)[^\\])*\2|#[^\n]*)|[;\n]\s*"""


class Failed(Exception):
    """The run cannot go on, by no bug: shown as one message, exit 1. What it has committed stays."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("Failed: ")[2].strip())  # a worker's comes with its traceback


class Refused(Exception):
    """A mistake of the user's: shown as one message, without traceback, exit 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message  # to str() gin adds where it has called what refuses


# What the content of a damaged file may lead to, and what a setting may.
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
MISTAKE = (Refused, ImportError, RecursionError, SyntaxError)


@contextmanager
def refused_at(place: str | Path, errors: tuple[type[Exception], ...] = DAMAGE) -> Iterator[None]:
    """Errors of these kinds become Refused, with the place before their message."""
    try:
        yield
    except errors as error:
        said = f"has no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
        raise Refused(f"{place}: {said}") from None


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean X?)` for the nearest of the names, or nothing when none is near."""
    lower = {n.lower(): n for n in sorted(names)}
    found = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean {lower[found[0]]}?)" if found else ""


# --- reading: text alone --------------------------------------------------------------------------
class Reference(str):
    """`@scope/name`; the text is without the @."""

    def __repr__(self) -> str:
        return f"@{self}"


class Macro(str):
    """`%name`: stands for the value that `name = value` gives it."""


# What the parser makes of names. None has brackets: gin calls nothing; the loop does, once it has seeded.
DELEGATE = SimpleNamespace(macro=Macro, configurable_reference=lambda n, called: Reference(f"{n}()" if called else n))


def _map(function: Callable[[Any], Any], value: Any, kind: type = object) -> Any:
    """The value with the function applied to its leaves of a kind; a leaf is what is no list, tuple or dict."""
    if isinstance(value, list | tuple):
        return type(value)(_map(function, item, kind) for item in value)
    if isinstance(value, dict):
        return {_map(function, k, kind): _map(function, v, kind) for k, v in value.items()}
    return function(value) if isinstance(value, kind) else value


def _leaves(value: Any, kind: type = object) -> list[Any]:
    leaves: list[Any] = []
    _map(leaves.append, value, kind)
    return leaves


@dataclass(frozen=True)
class Settings:
    """What was read. Where is `file:line`, or `-b` and what was typed."""

    bindings: dict[str, tuple[Any, str]]  # `scope/name.parameter`, or a macro's name: the last value, and where
    imports: dict[str, str]  # module: where
    files: list[Path]  # the inputs and their includes

    def last(self, key: str, default: Any) -> Any:
        """The value given to a setting, named as in `training_loop.reload`."""
        return self.bindings.get(key, (default,))[0]


def read(configs: Sequence[str], bindings: Sequence[str] = ()) -> Settings:
    """Reads the gin files, layered, then the -b texts; macros are replaced by their values.

    Raises Refused for a missing file or include, a syntax error, a macro without value.
    """
    settings = Settings({}, {}, [])
    for config in configs:
        _read_file(settings, config)
    for text in bindings:
        lines = re.sub(SEPARATOR, lambda found: found[1] or "\n", text).strip()
        _read_text(settings, lines, f"-b {text!r}")
    macros = {key: value for key, (value, _) in settings.bindings.items() if "." not in key}
    used = set()

    def value_of(name: str) -> Any:
        if name not in macros:
            raise Refused(f"the macro %{name} has no value{nearest(name, macros)}: add {name} = ...")
        used.add(name)
        return _map(value_of, macros[name], Macro)

    found = {}
    for key, (value, where) in settings.bindings.items():
        with refused_at(where, MISTAKE):
            found[key] = _map(value_of, value, Macro), where
    return replace(settings, bindings={key: binding for key, binding in found.items() if key not in used})


def _read_file(settings: Settings, name: str, including: tuple[Path, ...] = ()) -> None:
    """Looks beside the including file, in the current folder, in the repository."""
    folders = [*(file.parent for file in including[-1:]), Path(), ROOT]
    path = next((path for folder in folders if (path := folder / name).exists()), None)
    if path is None:
        near = [str(file) for folder in (Path(name).parent, Path("configs")) for file in folder.glob("*.gin")]
        advice = " (settings come after -b)" if "=" in name else " (RUN_DIR comes first)" * (name[-4:] != ".gin")
        raise Refused(f"{name}: no such config{nearest(name, near) or advice}")
    if any(map(path.samefile, including)):
        raise Refused(f"{path}: includes itself")
    with refused_at(path):
        text = path.read_text(encoding="utf-8")
    settings.files.append(path)
    _read_text(settings, text, str(path), (*including, path))


def _read_text(settings: Settings, text: str, source: str, files: tuple[Path, ...] = ()) -> None:
    """Adds what the text says: that of the last of the files, each of which includes the next, or of a -b."""
    try:
        statements = list(config_parser.ConfigParser(io.StringIO(text), DELEGATE))
    except (SyntaxError, tokenize.TokenError) as error:
        line = getattr(error, "lineno", None) or error.args[1][0]
        said = error.args[0].strip().splitlines()[-1].strip()  # after Python's own words
        where = f"{source}:{line}" if files else source
        advice = "an unclosed bracket or quote? write @Name for a part, 'text' for a text, True; and ; between settings"
        raise Refused(f"{where}: {said} ({advice})") from None
    if files and not statements:
        raise Refused(f"{source}: is empty: it sets nothing")
    for statement in statements:
        where = f"{source}:{statement.location.line_num}" if files else source
        match statement:
            case config_parser.BindingStatement(scope, name, parameter, value):
                settings.bindings[f"{scope}/{name}.{parameter}".strip("/.")] = value, where
            case config_parser.ImportStatement(module):
                settings.imports[module] = where
            case config_parser.IncludeStatement(name):
                with refused_at(where, MISTAKE):
                    _read_file(settings, name, files)


# --- a checked config -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """Every configurable that is reached from the loop, with every setting."""

    values: dict[str, dict[str, Any]]  # by the name of the configurable, and that of the parameter
    imports: list[str]
    warnings: list[str]  # what the person should hear and the run's record keeps

    def flat(self) -> dict[str, str]:
        """`{"SGD.lr": "0.1", ...}`: what config.gin holds, as text."""
        return {f"{part}.{p}": repr(value) for part, values in self.values.items() for p, value in values.items()}

    def text(self) -> str:
        """config.gin: what `read` and `check` turn back into this config, and `read_flat` into `flat`."""
        lines = [f"import {module}" for module in self.imports]
        for part, values in self.values.items():
            lines += ["", *(f"{part}.{name} = {value!r}" for name, value in values.items())] if values else []
        return "\n".join(lines).strip() + "\n"

    def apply(self) -> None:
        """Makes this the whole of gin's configuration."""
        for name in {part.rpartition("/")[2] for part in self.values}:
            REGISTRY[name] = _known(name)  # else a bare name is ambiguous to gin if a library's ends in it
        gin.clear_config()
        gin.parse_config(self.text())

    def set(self, key: str, value: Any) -> "Config":
        """The config with another value for a key of `flat`, unchecked. Raises KeyError if that is not reached."""
        part, _, parameter = key.rpartition(".")
        values = self.values | {part: self.values[part] | {parameter: value}}
        return replace(self, values=_walk(values.__getitem__))

    def choose(self, parameter: str, choice: int) -> "Config":
        """Puts member `choice` of first_available's list where the loop's `parameter` names first_available itself."""
        part = self.values[LOOP][parameter]
        is_itself = part.rpartition("/")[2] == "first_available"  # else another data set is made from its choice
        return self.set(f"{LOOP}.{parameter}", self.values[part]["of"][choice]) if is_itself else self


def read_flat(path: Path) -> dict[str, str]:
    """The config.gin of a run as `Config.flat` gave it. Raises Refused if it is not as `Config.text` wrote it."""
    with refused_at(path):  # by gin's parser it would take 2 ms
        text = path.read_text(encoding="utf-8")
        lines = [line for line in text.split("\n") if line and not line.startswith("import ")]
        if not lines or text[-1] != "\n" or any(" = " not in line for line in lines):
            raise ValueError("is not as a run writes it: edited, or cut off?")
        return dict(line.split(" = ", 1) for line in lines)


# --- gin's registry -------------------------------------------------------------------------------
def library(prefix: str) -> Callable[[Register], Register]:
    """Decorates what registers a part of a library once a config names it: its name begins with the prefix."""

    def decorate(register: Register) -> Register:
        LIBRARIES[prefix] = lambda name: None if name in REGISTRY else register(name)  # gin takes a name only once
        return LIBRARIES[prefix]

    return decorate


def register_builder(full_name: str, build: Callable[..., Any], parameters: Iterable[Parameter]) -> None:
    """Registers `build`, which takes any keywords, with gin, so that a config can set these parameters and its own."""
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    every = [p for p in (*inspect.signature(build).parameters.values(), *parameters) if p.kind not in variadic]
    by_name = {p.name: p.replace(kind=p.KEYWORD_ONLY) for p in every}
    build.__signature__ = inspect.Signature(list(by_name.values()))  # type: ignore[attr-defined]
    module, _, name = full_name.rpartition(".")
    gin.external_configurable(build, name=name, module=module, denylist=[n for n in LOOP_SUPPLIES if n in by_name])


def _name(selector: str) -> str:
    """What people write for a full name: a library's part has its prefix, any other no module."""
    return selector if selector.startswith(tuple(LIBRARIES)) else selector.rpartition(".")[2]


def _known(part: str) -> Any:
    """What gin knows of a configurable. Raises Refused for a name that is unknown or has several owners."""
    name = part.rpartition("/")[2]
    for prefix, register in LIBRARIES.items():
        if name.startswith(prefix):
            register(name)
    selectors = [s for s in REGISTRY.matching_selectors(name) if _name(s) == name]
    if len(selectors) > 1:
        raise Refused(f"{name} is the name of several, rename one: {', '.join(sorted(selectors))}")
    if not selectors:
        meant = nearest(name, [_name(s) for s, _ in REGISTRY.items()])
        advice = ": it needs @gin.register, and its module an import in a config"
        raise Refused(f"nothing is named {name}{meant or advice}")
    return REGISTRY[selectors[0]]


def _settable(part: str) -> dict[str, Parameter]:
    """The parameters that a config may set; `**` stands for all other names, where they are taken."""
    known = _known(part)
    try:
        signature = inspect.signature(known.wrapped, eval_str=True)
    except (AttributeError, NameError, TypeError):  # a type that only type checkers import
        signature = inspect.signature(known.wrapped)
    return {
        "**" if p.kind is p.VAR_KEYWORD else p.name: p
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.VAR_KEYWORD)
        and p.name not in (known.denylist or ())
        and p.name in (known.allowlist or [p.name])
    }


# --- checking: names, parameters, types -----------------------------------------------------------
def check(settings: Settings) -> Config:
    """Checks names, parameters and types of all bindings, and completes them with the defaults.

    Imports the modules that the files import. Raises Refused, with the file and line and the nearest name.
    """
    for module, where in settings.imports.items():
        with refused_at(where, MISTAKE):
            importlib.import_module(module)
    parts: dict[str, dict[str, Any]] = {}  # what is given to each
    for key, (value, where) in settings.bindings.items():
        part, _, parameter = key.rpartition(".")
        parts.setdefault(part, {})[parameter] = value
        if part:  # else a macro that nothing uses
            with refused_at(where, MISTAKE):
                _refuse_unfit(part, parameter, value)
    values = _walk(lambda part: _defaults(part) | parts.get(part.rpartition("/")[2], {}) | parts.get(part, {}))
    # The loop builds what its own settings name, and first_available its members, with what the loop supplies.
    for part in [LOOP, *_leaves([values[LOOP], *(given.get("of") for given in values.values())], Reference)]:
        for parameter, p in _settable(part).items():
            if p.default is p.empty and parameter not in {"**", *LOOP_SUPPLIES, *values[part]}:
                raise Refused(f"{part}.{parameter} has no value: add a line {part}.{parameter} = ... to a config")
    used = {*values, *(part.rpartition("/")[2] for part in values)}
    unused: dict[str, list[str]] = {}  # by their part: where the first is, and their names
    for key, (_, where) in settings.bindings.items():
        if (part := key.rpartition(".")[0]) not in used:
            if where.startswith("-b "):
                meant = [f" (did you mean {part}.{key}?)" for part, given in values.items() if key in given]
                raise Refused(f"{where}: nothing uses {key} in this config" + "".join(meant[:1]))
            unused.setdefault(part, [where]).append(key)
    warnings = [f"{where}: nothing uses {', '.join(keys)} in this config" for where, *keys in unused.values()]
    return Config(values, list(settings.imports), warnings)


def _refuse_unfit(part: str, name: str, value: Any) -> None:
    """Raises Refused for a part or parameter that is not there, or a value that is not of its type."""
    settable = _settable(part)
    if name in (_known(part).denylist or ()):
        raise Refused(f"{part}.{name} is given by the code, it cannot be set")
    parameter = settable.get(name, settable.get("**"))
    if parameter is None:
        meant = nearest(name, settable) or f": there are {', '.join(settable)}"
        raise Refused(f"{part} has no parameter {name}{meant}")
    if not _fits(_map(lambda reference: _known(reference).wrapped, value, Reference), parameter.annotation):
        expected = re.sub(r"\b(\w+\.)+", "", inspect.formatannotation(parameter.annotation))
        expected = re.sub(r"Callable\[\.\.\., (\w+)\]", r"@\1", expected).replace("Sequence", "list")
        raise Refused(f"{part}.{name} = {value!r}, but it must be {expected}")


def _fits(value: Any, expected: Any) -> bool:
    from typeguard import CollectionCheckStrategy, ForwardRefPolicy, TypeCheckError, check_type

    if any(map(math.isinf, _leaves(value, float))):
        return False  # gin has no word for it, which config.gin would need
    if expected is Parameter.empty or isinstance(expected, str):
        return True  # no type, or none that can be read
    if _leaves(value, bool) and not re.search("bool|Any|object", str(expected)):
        return False  # Python's bool is an int; a config's is not
    every = CollectionCheckStrategy.ALL_ITEMS
    try:
        check_type(value, expected, forward_ref_policy=ForwardRefPolicy.IGNORE, collection_check_strategy=every)
        return True
    except TypeCheckError:
        return False


def _defaults(part: str) -> dict[str, Any]:
    """The defaults of a configurable that a config can say; what it cannot stays the code's."""

    def literal(leaf: Any) -> Any:
        if type(leaf) in (bool, int, float, str, type(None)) and repr(leaf) not in ("nan", "inf", "-inf"):
            return leaf
        known = gin.config._inverse_lookup(leaf) if callable(leaf) else None
        return Reference(_name(known.selector)) if known else Parameter.empty

    values = {p.name: _map(literal, p.default) for p in _settable(part).values()}
    return {name: value for name, value in values.items() if Parameter.empty not in _leaves(value)}


def _walk(values: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The values of all parts that are reached by references from the loop, by their names."""

    def scoped(reference: str) -> Reference:  # one that names no scope stays in the part's
        return Reference(reference if "/" in reference else scope + reference)

    found: dict[str, dict[str, Any]] = {}
    todo = [LOOP]
    for part in todo:
        if part not in found:
            scope = part[: part.rfind("/") + 1]
            found[part] = _map(scoped, values(part), Reference)
            todo += _leaves(found[part], Reference)
    return found
