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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gin
from gin import config_parser

ROOT = Path(__file__).resolve().parent.parent
LOOP_SUPPLIES = ("input_shape", "n_classes", "params", "parameters", "parts")


class Failed(Exception):
    """The run cannot go on, by no bug: shown as one message, exit 1. What it has committed stays."""

    status, exit_code = "failed", 1


class Refused(Exception):
    """A mistake of the user's: shown as one message, without traceback, exit 2."""

    status, exit_code = "failed", 2

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean X?)` for the nearest of the names, or nothing when none is near."""
    lower = {n.lower(): n for n in sorted(names)}
    found = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean {lower[found[0]]}?)" if found else ""


@dataclass(frozen=True)
class Reference:
    """`@scope/name`, or `@scope/name()` when gin calls it."""

    scope: str
    name: str
    called: bool


class Macro(str):
    """`%name`: stands for the value that `name = value` gives it."""


class _Verbatim(str):
    __repr__ = str.__str__  # stands in the repr of a list or dict as it is


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


def format_value(value: Any, names: Mapping[str, str]) -> str:
    """The value as gin reads it back; `names` maps full names of configurables to those written."""

    def written(leaf: Any) -> _Verbatim:
        if isinstance(leaf, Reference):
            name = f"{leaf.scope}/{names.get(leaf.name, leaf.name)}".lstrip("/")
            return _Verbatim(f"@{name}()" if leaf.called else f"@{name}")
        return _Verbatim(repr(leaf).replace("inf", "1e999") if isinstance(leaf, float) else repr(leaf))

    return repr(_map(written, value))


# --- reading: text alone ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Binding:
    """`scope/name.parameter = value`, or a macro's `scope/name = value`, and where it was read."""

    scope: str
    name: str
    parameter: str
    value: Any
    where: str
    typed: bool  # given with -b

    @property
    def key(self) -> str:
        """What stands at the left of the `=`."""
        return f"{self.scope}/{self.name}.{self.parameter}".strip("/.")


@dataclass(frozen=True)
class Settings:
    """What was read, in order: later bindings win. `files` are the inputs and their includes."""

    bindings: list[Binding]
    imports: list[tuple[str, str]]  # module and where
    files: list[Path]
    unused_macros: list[Binding]

    def last(self, key: str, default: Any) -> Any:
        """The last value given to a parameter, named as in `training_loop.reload`."""
        values = (b.value for b in reversed(self.bindings) if not b.scope and f".{b.key}".endswith(f".{key}"))
        return next(values, default)

    def binds(self, key: str) -> bool:
        """Whether a file or -b gives a value to a setting, in whatever scope; `key` as in `Config.flat`."""
        wanted = f".{key.rpartition('/')[2]}"
        return any(f".{b.name}.{b.parameter}".endswith(wanted) for b in self.bindings)


class _Delegate:
    macro = Macro

    def configurable_reference(self, name: str, called: bool) -> Reference:
        return Reference(name.rpartition("/")[0], name.rpartition("/")[2], called)


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


def _read_file(path: Path, name: str, settings: Settings, including: tuple[Path, ...] = ()) -> None:
    if path.resolve() in (file.resolve() for file in including):
        raise Refused(f"{name}: includes itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{name}: cannot be read: {error}") from None
    settings.files.append(path)
    _read_text(text, name, settings, (*including, path))


def _read_text(text: str, name: str, settings: Settings, files: tuple[Path, ...] = ()) -> None:
    """Appends what the text says. It is that of the last of the files, each including the next, or of a -b."""
    place: Callable[[int], str] = (lambda line: f"{name}:{line}") if files else (lambda line: name)
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
        raise Refused(f"{name}: {error}") from None
    if files and not statements:
        raise Refused(f"{name}: is empty: it sets nothing")
    for statement in statements:
        where = place(statement.location.line_num)
        match statement:
            case config_parser.BindingStatement(scope, configurable, parameter, value):
                settings.bindings.append(Binding(scope, configurable, parameter, value, where, typed=not files))
            case _ if not files:
                raise Refused(f"{where}: is no binding: write name.parameter=value")
            case config_parser.ImportStatement(module, is_from, alias):
                if is_from or alias:
                    raise Refused(f"{where}: write it as `import module`")
                settings.imports.append((_find_module(module, files[-1].parent), where))
            case config_parser.IncludeStatement(include):
                if not (found := find_file(include, beside=files[-1].parent)):
                    raise Refused(f"{where}: include '{include}': no such file beside it, in {Path.cwd()} or in {ROOT}")
                _read_file(found, str(found), settings, files)


def read(configs: Sequence[str], bindings: Sequence[str] = ()) -> Settings:
    """Reads the gin files, layered, then the -b texts; macros are replaced by their values.

    Raises Refused for a missing file or include, a syntax error, a macro without value.
    """
    settings = Settings([], [], [], [])
    for config in configs:
        if not (found := find_file(config)):
            kind = "is a folder, not a gin file" if Path(config).is_dir() else "no such config"
            raise Refused(f"{config}: {kind}{nearest(config, map(str, Path(config).parent.glob('*.gin')))}")
        _read_file(found, config, settings)
    for part in [part for text in bindings for part in split_bindings(text)]:
        _read_text(part, f"-b {part!r}", settings)
    return _without_macros(settings)


def _without_macros(settings: Settings) -> Settings:
    macros = {b.key: b for b in settings.bindings if not b.parameter}
    used = {name for b in settings.bindings for name in _leaves(b.value, Macro)}

    def value(v: Any, where: str, *inside: str) -> Any:
        for name in _leaves(v, Macro):
            if name in inside:
                raise Refused(f"{where}: the macro %{name} stands for itself")
            if name not in macros:
                raise Refused(f"{where}: the macro %{name} has no value{nearest(name, macros)}: add {name} = ...")
        return _map(lambda name: value(macros[name].value, where, *inside, name), v, Macro)

    bindings = [replace(b, value=value(b.value, b.where)) for b in settings.bindings if b.parameter]
    return replace(settings, bindings=bindings, unused_macros=[b for name, b in macros.items() if name not in used])


@dataclass(frozen=True)
class Config:
    """A checked config: every configurable that is reached from the root, with every setting.

    `values` maps (scope, full name) to parameters; `short` a full name to the one people write;
    `warnings` are what the person should hear and the run's record keeps.
    """

    root: str
    values: dict[tuple[str, str], dict[str, Any]]
    short: dict[str, str]
    imports: list[str]
    warnings: list[str]

    def flat(self) -> dict[str, str]:
        """`{"SGD.lr": "0.1", ...}`: what config.gin holds, as text."""
        return {
            f"{scope}/{self.short.get(name, name)}.{parameter}".lstrip("/"): format_value(value, self.short)
            for (scope, name), parameters in self.values.items()
            for parameter, value in parameters.items()
        }

    def text(self) -> str:
        """config.gin: what `read` and `check` turn back into this config."""
        lines = [f"import {module}" for module in self.imports]
        for _, group in itertools.groupby(self.flat().items(), lambda item: item[0].rpartition(".")[0]):
            lines += ["", *(f"{key} = {value}" for key, value in group)]
        return "\n".join(lines).strip() + "\n"

    def apply(self) -> None:
        """Makes this the whole of gin's configuration."""
        gin.clear_config()
        gin.parse_config(replace(self, short={}, imports=[]).text())  # gin finds more short names ambiguous

    def set(self, key: str, value: Any) -> "Config":
        """The config with another value for a key of `flat`, unchecked. Raises KeyError if that is not reached."""
        configurable, _, parameter = key.rpartition(".")
        scope, _, short = configurable.rpartition("/")
        node = scope, {short: name for name, short in self.short.items()}[short]
        values = {**self.values, node: {**self.values[node], parameter: value}}
        return replace(self, values=_walk(self.root, lambda *node: values[node]))

    def choose(self, parameter: str, choice: int) -> "Config":
        """Puts member `choice` of first_available's list where `parameter` names first_available."""
        chooser = self.values["", self.root][parameter]
        member = self.values[chooser.scope, chooser.name]["of"][choice]
        return self.set(f"{self.short[self.root]}.{parameter}", replace(member, scope=member.scope or chooser.scope))


def _walk(root: str, values: Callable[[str, str], dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """All that is reached by references from the root; who names no scope stays in its caller's."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    todo = [("", root)]
    for node in todo:
        if node not in found:
            found[node] = values(*node)
            todo += [(r.scope or node[0], r.name) for r in _leaves(found[node], Reference)]
    return found


# --- checking: names, parameters, types -------------------------------------------------------------
class _Names:
    """gin's registry, asked by name."""

    def __init__(self, external: Mapping[str, Callable[[str], None]]) -> None:
        self.external = external  # prefix -> what registers a name that begins with it
        self.registry = gin.config._REGISTRY

    def matches(self, name: str) -> list[str]:
        """The full names that end in it; a library's only where none of ours and torch's do."""
        matches = [name] if name in self.registry else self.registry.matching_selectors(name)
        return [m for m in matches if not m.startswith(tuple(self.external))] or matches

    def resolve(self, name: str) -> str:
        """The full name. Raises Refused for a name that is unknown or has several owners."""
        for prefix, register in self.external.items():
            if name.startswith(prefix) and name not in self.registry:
                register(name)
        matches = self.matches(name)
        if len(matches) > 1:
            raise Refused(f"{name} is the name of several: {', '.join(sorted(matches))}")
        if not matches:
            known = (selector.rpartition(".")[2] for selector, _ in self.registry.items())
            raise Refused(f"nothing is named {name}{nearest(name, known)}")
        return matches[0]

    def short(self, selector: str) -> str:
        """The name that people write: bare, if that is clear; a library's with its prefix."""
        if selector.startswith(tuple(self.external)):
            return selector
        bare = selector.rpartition(".")[2]
        return bare if self.matches(bare) == [selector] else str(self.registry.minimal_selector(selector))

    def settable(self, selector: str) -> dict[str, inspect.Parameter]:
        """The parameters that a config may set; `**` stands for all other names, where they are taken."""
        known = self.registry[selector]
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


def check(settings: Settings, root: str, external: Mapping[str, Callable[[str], None]] | None = None) -> Config:
    """Checks names, parameters and types of all bindings, and completes them with the defaults.

    `root` is the configurable from which all is reached; `external` maps a prefix (`torchmetrics.`)
    to the function that registers a name with this prefix. Imports the modules that the files
    import. Raises Refused, with the file and line and the nearest name.
    """
    for module, where in settings.imports:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise
            raise Refused(f"{where}: import {module}: no such module beside it, in {ROOT} or installed") from None
    names = _Names(external or {})
    root = names.resolve(root)
    bindings = []
    for b in settings.bindings:
        try:
            bindings.append(_checked(b, names))
        except Refused as refusal:
            raise Refused(f"{b.where}: {refusal.message}") from None
    nodes = _walk(root, lambda scope, name: _values(scope, name, bindings, names))
    # The loop builds what its own settings name, with what it supplies.
    for scope, name in [("", root), *((r.scope, r.name) for r in _leaves(nodes["", root], Reference))]:
        for parameter, p in names.settable(name).items():
            if p.default is p.empty and parameter not in {"**", *LOOP_SUPPLIES, *nodes[scope, name]}:
                key = f"{names.short(name)}.{parameter}"
                raise Refused(f"{key} has no value: add a line {key} = ... to a config")
    used = {(outer, name) for scope, name in nodes for outer in _scopes(scope)}
    unused = [replace(b, name=names.short(b.name)) for b in bindings if (b.scope, b.name) not in used]
    unused += settings.unused_macros
    if typed := [b for b in unused if b.typed]:
        loops = [f"{names.short(root)}.{key}" for key in nodes["", root] if key == typed[0].name]
        raise Refused(f"{typed[0].where}: nothing uses {typed[0].key} in this config{nearest(typed[0].key, loops)}")
    short = {name: names.short(name) for _, name in nodes}
    imports = list(dict.fromkeys(module for module, _ in settings.imports))
    return Config(root, nodes, short, imports, warnings=[f"{b.where}: nothing uses {b.key}" for b in unused])


def _checked(b: Binding, names: _Names) -> Binding:
    """The binding with full names, after its name, parameter and type were checked."""
    name = names.resolve(b.name)
    short, settable = names.short(name), names.settable(name)
    if b.parameter in (names.registry[name].denylist or ()):
        raise Refused(f"{short}.{b.parameter} is given by the code, it cannot be set")
    parameter = settable.get(b.parameter, settable.get("**"))
    if parameter is None:
        raise Refused(f"{short} has no parameter {b.parameter}{nearest(b.parameter, settable)}")
    value = _map(lambda r: replace(r, name=names.resolve(r.name)), b.value, Reference)
    if not _fits(value, parameter.annotation):
        given = format_value(b.value, {}) + (
            "" if isinstance(b.value, Reference | None) else f" ({type(b.value).__name__})"
        )
        expected = inspect.formatannotation(parameter.annotation).replace("collections.abc.", "")
        text = b.value if isinstance(b.value, str) else ""  # perhaps a name or a number in quotes
        hint = f": write @{text}" if names.matches(text) else f": write {text}" if re.fullmatch(r"[\d.]+", text) else ""
        if isinstance(b.value, Reference) and b.value.called:
            hint = ": write it without ()"
        elif "Sequence[" in expected and not isinstance(b.value, list | tuple):
            hint = f": write [{text or format_value(b.value, {})}]"
        raise Refused(f"{short}.{b.parameter} = {given}, but it must be {expected}{hint}")
    return replace(b, name=name, value=value)


def _fits(value: Any, expected: Any) -> bool:
    """Whether the value is of the expected type, as far as it can be known before gin builds."""
    from typeguard import CollectionCheckStrategy, ForwardRefPolicy, TypeCheckError, check_type

    if expected is inspect.Parameter.empty or isinstance(expected, str):
        return True  # no type, or none that can be read
    if any(r.called for r in _leaves(value, Reference)):
        return "Callable" not in str(expected)  # else gin has not called it yet
    if _leaves(value, bool) and not re.search("bool|Any|object", str(expected)):
        return False  # Python's bool is an int; a config's is not
    built = _map(lambda r: gin.config._REGISTRY[r.name].wrapped, value, Reference)
    every = CollectionCheckStrategy.ALL_ITEMS
    try:
        check_type(built, expected, forward_ref_policy=ForwardRefPolicy.IGNORE, collection_check_strategy=every)
        return True
    except TypeCheckError:
        return False


def _values(scope: str, name: str, bindings: list[Binding], names: _Names) -> dict[str, Any]:
    """The parameters of a configurable: its defaults, then the bindings from outer to inner scope."""

    def literal(leaf: Any) -> Any:
        if type(leaf) in (bool, int, float, str, type(None)) and leaf == leaf:  # no config can write NaN
            return leaf
        known = gin.config._inverse_lookup(leaf) if callable(leaf) else None
        return Reference("", known.selector, False) if known else inspect.Parameter.empty  # stays the code's

    values = {p.name: _map(literal, p.default) for p in names.settable(name).values()}
    for outer in _scopes(scope):
        values |= {b.parameter: b.value for b in bindings if (b.scope, b.name) == (outer, name)}
    return {k: v for k, v in values.items() if inspect.Parameter.empty not in _leaves(v)}


def _scopes(scope: str) -> list[str]:
    """`a/b` -> ["", "a", "a/b"]: gin lets inner scopes win."""
    return ["", *itertools.accumulate(scope.split("/"), "{}/{}".format)]
