"""Gin files and -b bindings: read, check, explain.

`read` needs the text alone (no torch, some milliseconds). `check` runs after the imports: every name,
parameter and type is looked at, and the result is the run's config: each setting that takes effect,
defaults included. `Config.apply` gives it to gin, which builds; `Config.text` is the run's config.gin.
"""

import difflib
import importlib
import inspect
import io
import itertools
import re
import tokenize
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import gin
from gin import config_parser

ROOT = Path(__file__).resolve().parent.parent
LOOP = "training_loop"  # the configurable from which all is reached
LOOP_SUPPLIES = ("input_shape", "n_classes", "params", "parameters", "loop")
Register = Callable[[str], None]  # registers a library's part, of this full name, with gin
LIBRARIES: dict[str, Register] = {}  # by the prefix of the names
Name = TypeVar("Name", bound=str)  # of a configurable: `name` or `scope/name`, plain or as a Reference


class Failed(Exception):
    """The run cannot go on, by no bug: shown as one message, exit 1. What it has committed stays."""

    exit_code = 1


class Refused(Exception):
    """A mistake of the user's: shown as one message, without traceback, exit 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean X?)` for the nearest of the names, or nothing when none is near."""
    lower = {n.lower(): n for n in sorted(names)}
    found = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean {lower[found[0]]}?)" if found else ""


# --- values -----------------------------------------------------------------------------------------
class Reference(str):
    """`@scope/name`; the text is without the @."""

    def __repr__(self) -> str:
        return f"@{self}"


class Called(Reference):
    """`@scope/name()`: stands for what gin gets when it calls it."""

    def __repr__(self) -> str:
        return f"@{self}()"


class Macro(str):
    """`%name`: stands for the value that `name = value` gives it."""


class _Float(float):
    def __repr__(self) -> str:
        return super().__repr__().replace("inf", "1e999")  # gin has no word for it


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


def format_value(value: Any) -> str:
    """The value as gin reads it back."""
    return repr(_map(_Float, value, float))


# --- reading: text alone ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Binding:
    """`part.parameter = value`, or a macro's `part = value`, and where it was read."""

    part: str  # `scope/name`
    parameter: str
    value: Any
    where: str
    typed: bool  # given with -b

    @property
    def key(self) -> str:
        """What stands at the left of the `=`."""
        return f"{self.part}.{self.parameter}".strip(".")


@dataclass(frozen=True)
class Settings:
    """What was read, in order: later bindings win. `files` are the inputs and their includes."""

    bindings: list[Binding]
    imports: list[tuple[str, str]]  # module and where
    files: list[Path]
    unused_macros: list[Binding]

    def last(self, key: str, default: Any) -> Any:
        """The last value given to a parameter, named as in `training_loop.reload`."""
        return next((b.value for b in reversed(self.bindings) if f".{b.key}".endswith(f".{key}")), default)

    def binds(self, key: str) -> bool:
        """Whether a file or -b gives a value to a setting, in whatever scope; `key` as in `Config.flat`."""
        bare = key.rpartition("/")[2]
        return any(f".{b.key.rpartition('/')[2]}".endswith(f".{bare}") for b in self.bindings)


class _Delegate:
    macro = Macro

    def configurable_reference(self, name: str, called: bool) -> Reference:
        return Called(name) if called else Reference(name)


def split_bindings(text: str) -> list[str]:
    """Splits at `;` and newlines, but not inside quotes or brackets. Raises Refused if one is open."""
    # A text in quotes, a comment, a continued line, or else one character.
    pieces = re.finditer(r"""(?s)('{3}|"{3}|'|")(?:\\.|(?!\1)[^\\])*\1|#[^\n]*|\\\n|.""", text)
    parts, depth = "", 0
    for piece in (match.group() for match in pieces):
        depth += (piece in "([{'\"") - (piece in ")]}")  # a single quote is one that nothing closes
        parts += "\0" if piece in ";\n" and depth == 0 else piece
    if depth:
        raise Refused(f"-b {text!r}: an unclosed bracket or quote?")
    return [part.strip() for part in parts.split("\0") if part.strip()]


def find_file(name: str, beside: Path = Path()) -> Path | None:
    """Looks beside the including file, in the current folder, in the repository."""
    return next((path for folder in (beside, Path(), ROOT) if (path := folder / name).is_file()), None)


def _find_module(module: str, beside: Path) -> str:
    """A module beside the config gets its full name in the repository, so that config.gin finds it."""
    path = beside.joinpath(*module.split(".")).resolve()
    is_ours = ROOT in path.parents and (path.with_suffix(".py").is_file() or path.is_dir())
    return ".".join(path.relative_to(ROOT).parts) if is_ours else module


def _read_file(path: Path, settings: Settings, including: tuple[Path, ...] = ()) -> None:
    if path.resolve() in (file.resolve() for file in including):
        raise Refused(f"{path}: includes itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: cannot be read: {error}") from None
    settings.files.append(path)
    _read_text(text, settings, (*including, path))


def _read_text(text: str, settings: Settings, files: tuple[Path, ...] = ()) -> None:
    """Appends what the text says. It is that of the last of the files, each including the next, or of a -b."""
    source = str(files[-1]) if files else f"-b {text!r}"
    place: Callable[[int], str] = (lambda line: f"{source}:{line}") if files else (lambda line: source)
    try:
        statements = list(config_parser.ConfigParser(io.StringIO(text), _Delegate()))
    except SyntaxError as error:
        detail = (error.msg or "syntax error").strip().replace("\n   ", "")
        if detail.startswith("malformed node"):  # a bare word
            detail = "no value: write True or False, a number, 'a text' in quotes, or @name for a part"
        raise Refused(f"{place(error.lineno or 1)}: {detail}\n    {(error.text or '').strip()}".rstrip()) from None
    except tokenize.TokenError as error:
        raise Refused(f"{place(error.args[1][0])}: {error.args[0]}: an unclosed bracket or quote?") from None
    except TypeError as error:  # a list as a key of a dict
        raise Refused(f"{source}: {error}") from None
    if files and not statements:
        raise Refused(f"{source}: is empty: it sets nothing")
    for statement in statements:
        where = place(statement.location.line_num)
        match statement:
            case config_parser.BindingStatement(scope, name, parameter, value):
                part = f"{scope}/{name}".lstrip("/")
                settings.bindings.append(Binding(part, parameter, value, where, typed=not files))
            case _ if not files:
                raise Refused(f"{where}: is no binding: write name.parameter=value")
            case config_parser.ImportStatement(module, is_from, alias):
                if is_from or alias:
                    raise Refused(f"{where}: write it as `import module`")
                settings.imports.append((_find_module(module, files[-1].parent), where))
            case config_parser.IncludeStatement(include):
                if not (found := find_file(include, beside=files[-1].parent)):
                    raise Refused(f"{where}: include '{include}': no such file beside it, in {Path.cwd()} or in {ROOT}")
                _read_file(found, settings, files)


def read(configs: Sequence[str], bindings: Sequence[str] = ()) -> Settings:
    """Reads the gin files, layered, then the -b texts; macros are replaced by their values.

    Raises Refused for a missing file or include, a syntax error, a macro without value.
    """
    settings = Settings([], [], [], [])
    for config in configs:
        if not (found := find_file(config)):
            kind = "is a folder, not a gin file" if Path(config).is_dir() else "no such config"
            raise Refused(f"{config}: {kind}{nearest(config, map(str, Path(config).parent.glob('*.gin')))}")
        _read_file(found, settings)
    for text in itertools.chain.from_iterable(map(split_bindings, bindings)):
        _read_text(text, settings)
    return _without_macros(settings)


def _without_macros(settings: Settings) -> Settings:
    macros = {b.key: b for b in settings.bindings if not b.parameter}
    used = set()

    def value(v: Any, where: str, *inside: str) -> Any:
        def of(name: str) -> Any:
            if name in inside:
                raise Refused(f"{where}: the macro %{name} stands for itself")
            if name not in macros:
                raise Refused(f"{where}: the macro %{name} has no value{nearest(name, macros)}: add {name} = ...")
            used.add(name)
            return value(macros[name].value, where, *inside, name)

        return _map(of, v, Macro)

    bindings = [replace(b, value=value(b.value, b.where)) for b in settings.bindings if b.parameter]
    return replace(settings, bindings=bindings, unused_macros=[b for name, b in macros.items() if name not in used])


# --- a checked config -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """Every configurable that is reached from the loop, named as people do, with every setting.

    `warnings` are what the person should hear and the run's record keeps.
    """

    values: dict[str, dict[str, Any]]
    imports: list[str]
    warnings: list[str]

    def flat(self) -> dict[str, str]:
        """`{"SGD.lr": "0.1", ...}`: what config.gin holds, as text."""
        return {f"{part}.{p}": format_value(v) for part, values in self.values.items() for p, v in values.items()}

    def text(self) -> str:
        """config.gin: what `read` and `check` turn back into this config."""
        lines = [f"import {module}" for module in self.imports]
        for _, group in itertools.groupby(self.flat().items(), lambda item: item[0].rpartition(".")[0]):
            lines += ["", *(f"{key} = {value}" for key, value in group)]
        return "\n".join(lines).strip() + "\n"

    def apply(self) -> None:
        """Makes this the whole of gin's configuration, by full names, since gin finds more short ones ambiguous."""

        def full(part: Name) -> Name:
            scope, slash, _ = part.rpartition("/")
            return type(part)(scope + slash + _known(part).selector)

        values = {full(part): _map(full, values, Reference) for part, values in self.values.items()}
        gin.clear_config()
        gin.parse_config(replace(self, values=values, imports=[]).text())

    def set(self, key: str, value: Any) -> "Config":
        """The config with another value for a key of `flat`, unchecked. Raises KeyError if that is not reached."""
        part, _, parameter = key.rpartition(".")
        values = self.values | {part: self.values[part] | {parameter: value}}
        return replace(self, values=_walk(values.__getitem__))

    def choose(self, parameter: str, choice: int) -> "Config":
        """Puts member `choice` of first_available's list where `parameter` names first_available."""
        chooser = self.values[LOOP][parameter]
        return self.set(f"{LOOP}.{parameter}", _within(chooser, self.values[chooser]["of"][choice]))


def _walk(values: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """All that is reached by references from the loop."""
    found: dict[str, dict[str, Any]] = {}
    todo = [LOOP]
    for part in todo:
        if part not in found:
            found[part] = values(part)
            todo += [_within(part, reference) for reference in _leaves(found[part], Reference)]
    return found


def _within(part: str, reference: Name) -> Name:
    """The reference as it is meant in the part's settings: one that names no scope stays in the part's."""
    scope = "" if "/" in reference else part.rpartition("/")[0]
    return type(reference)(f"{scope}/{reference}".lstrip("/"))


def _outer(part: str) -> list[str]:
    """`a/b/x` -> [`x`, `a/x`, `a/b/x`]: gin lets inner scopes win."""
    *scopes, name = part.split("/")
    return ["/".join([*scopes[:k], name]) for k in range(len(scopes) + 1)]


# --- gin's registry ---------------------------------------------------------------------------------
def library(prefix: str) -> Callable[[Register], Register]:
    """Decorates what registers a part of a library once a config names it: its name begins with the prefix."""

    def decorate(register: Register) -> Register:
        # gin takes a name only once.
        LIBRARIES[prefix] = lambda name: None if name in gin.config._REGISTRY else register(name)
        return LIBRARIES[prefix]

    return decorate


def register_builder(full_name: str, build: Callable[..., Any], parameters: Iterable[inspect.Parameter]) -> None:
    """Registers `build`, which takes any keywords, with gin, so that a config can set these parameters and its own."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    every = [p for p in (*inspect.signature(build).parameters.values(), *parameters) if p.kind not in variadic]
    by_name = {p.name: p.replace(kind=p.KEYWORD_ONLY) for p in every}
    build.__signature__ = inspect.Signature(list(by_name.values()))  # type: ignore[attr-defined]
    module, _, name = full_name.rpartition(".")
    gin.external_configurable(build, name=name, module=module, denylist=[n for n in LOOP_SUPPLIES if n in by_name])


def _selectors(name: str) -> list[str]:
    """The full names that end in the name, but for a library's, which are named in full alone."""
    selectors: list[str] = gin.config._REGISTRY.matching_selectors(name)
    return [s for s in selectors if s == name or not s.startswith(tuple(LIBRARIES))]


def _known(part: str) -> Any:
    """What gin knows of a part that is there."""
    return gin.config._REGISTRY[_selectors(part.rpartition("/")[2])[0]]


def _short(part: Name) -> Name:
    """The part as people write it: its name bare, if that is clear; a library's with its prefix.

    Raises Refused for a name that is unknown or has several owners.
    """
    scope, slash, name = part.rpartition("/")
    registry = gin.config._REGISTRY
    for prefix, register in LIBRARIES.items():
        if name.startswith(prefix):
            register(name)
            return part
    selectors = _selectors(name)
    if len(selectors) > 1:
        raise Refused(f"{name} is the name of several: {', '.join(sorted(selectors))}")
    if not selectors:
        known = (s.rpartition(".")[2] for s, _ in registry.items() if not s.startswith(tuple(LIBRARIES)))
        raise Refused(f"nothing is named {name}{nearest(name, known)}")
    bare = selectors[0].rpartition(".")[2]
    short = bare if _selectors(bare) == selectors else registry.minimal_selector(selectors[0])
    return type(part)(scope + slash + short)


def _settable(part: str) -> dict[str, inspect.Parameter]:
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


# --- checking: names, parameters, types -------------------------------------------------------------
def check(settings: Settings) -> Config:
    """Checks names, parameters and types of all bindings, and completes them with the defaults.

    Imports the modules that the files import. Raises Refused, with the file and line and the nearest name.
    """
    for module, where in settings.imports:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise
            raise Refused(f"{where}: import {module}: no such module beside it, in {ROOT} or installed") from None
    bindings = []
    for b in settings.bindings:
        try:
            bindings.append(_checked(b))
        except Refused as refusal:
            raise Refused(f"{b.where}: {refusal.message}") from None
    values = _walk(lambda part: _values(part, bindings))
    # The loop builds what its own settings name, with what it supplies.
    for part in [LOOP, *_leaves(values[LOOP], Reference)]:
        for parameter, p in _settable(part).items():
            if p.default is p.empty and parameter not in {"**", *LOOP_SUPPLIES, *values[part]}:
                raise Refused(f"{part}.{parameter} has no value: add a line {part}.{parameter} = ... to a config")
    used = {outer for part in values for outer in _outer(part)}
    unused = [b for b in bindings if b.part not in used] + settings.unused_macros
    if typed := [b for b in unused if b.typed]:
        loops = [f"{LOOP}.{key}" for key in values[LOOP] if key == typed[0].part]
        raise Refused(f"{typed[0].where}: nothing uses {typed[0].key} in this config{nearest(typed[0].key, loops)}")
    imports = list(dict.fromkeys(module for module, _ in settings.imports))
    return Config(values, imports, warnings=[f"{b.where}: nothing uses {b.key}" for b in unused])


def _checked(b: Binding) -> Binding:
    """The binding with names as people write them, after its name, parameter and type were checked."""
    part = _short(b.part)
    settable, given = _settable(part), _known(part).denylist or ()
    if b.parameter in given:
        raise Refused(f"{part}.{b.parameter} is given by the code, it cannot be set")
    parameter = settable.get(b.parameter, settable.get("**"))
    if parameter is None:
        raise Refused(f"{part} has no parameter {b.parameter}{nearest(b.parameter, settable)}")
    value = _map(_short, b.value, Reference)
    if not _fits(value, parameter.annotation):
        kind = "" if isinstance(value, Reference | None) else f" ({type(value).__name__})"
        expected = inspect.formatannotation(parameter.annotation).replace("collections.abc.", "")
        text = value if isinstance(value, str) and type(value) is not Reference else ""  # a name or number in quotes?
        hint = f": write @{text}" if _selectors(text) else f": write {text}" if re.fullmatch(r"[\d.]+", text) else ""
        raise Refused(f"{part}.{b.parameter} = {format_value(b.value)}{kind}, but it must be {expected}{hint}")
    return replace(b, part=part, value=value)


def _fits(value: Any, expected: Any) -> bool:
    """Whether the value is of the expected type, as far as it can be known before gin builds."""
    from typeguard import CollectionCheckStrategy, ForwardRefPolicy, TypeCheckError, check_type

    if expected is inspect.Parameter.empty or isinstance(expected, str):
        return True  # no type, or none that can be read
    if _leaves(value, Called):
        return "Callable" not in str(expected)  # else gin has not called it yet
    if _leaves(value, bool) and not re.search("bool|Any|object", str(expected)):
        return False  # Python's bool is an int; a config's is not
    built = _map(lambda reference: _known(reference).wrapped, value, Reference)
    every = CollectionCheckStrategy.ALL_ITEMS
    try:
        check_type(built, expected, forward_ref_policy=ForwardRefPolicy.IGNORE, collection_check_strategy=every)
        return True
    except TypeCheckError:
        return False


def _values(part: str, bindings: list[Binding]) -> dict[str, Any]:
    """The parameters of a configurable: its defaults, then the bindings from outer to inner scope."""

    def literal(leaf: Any) -> Any:
        if type(leaf) in (bool, int, float, str, type(None)) and leaf == leaf:  # no config can write NaN
            return leaf
        known = gin.config._inverse_lookup(leaf) if callable(leaf) else None
        return Reference(_short(known.selector)) if known else inspect.Parameter.empty  # stays the code's

    values = {p.name: _map(literal, p.default) for p in _settable(part).values()}
    for outer in _outer(part):
        values |= {b.parameter: b.value for b in bindings if b.part == outer}
    return {k: v for k, v in values.items() if inspect.Parameter.empty not in _leaves(v)}
