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
import math
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gin
from gin import config_parser

ROOT = Path(__file__).resolve().parent.parent
LOOP_SUPPLIES = ("input_shape", "n_classes", "params")


class Refused(Exception):
    """A mistake of the user's: shown as one message, without traceback, exit 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True)
class Reference:
    """`@scope/name`, or `@scope/name()` when gin calls it."""

    scope: str
    name: str
    called: bool


@dataclass(frozen=True)
class Macro:
    """`%name`: stands for the value that `name = value` gives it."""

    name: str


@dataclass(frozen=True)
class Binding:
    """One `scope/name.parameter = value`, with the place it was read from."""

    scope: str
    name: str
    parameter: str
    value: Any
    where: str
    typed: bool  # given with -b


@dataclass(frozen=True)
class Settings:
    """What was read, in order: later bindings win. `files` are the inputs and their includes."""

    bindings: list[Binding]
    imports: list[tuple[str, str]]
    files: list[Path]
    unused_macros: list[Binding]

    def last(self, parameter: str, default: Any) -> Any:
        """The last value given to the parameter, written as `training_loop.reload`."""
        name, parameter = parameter.split(".")
        values = [
            b.value for b in self.bindings if not b.scope and b.name.split(".")[-1] == name and b.parameter == parameter
        ]
        return values[-1] if values else default


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean X?)` for the nearest of the names, or nothing when none is near."""
    lower = {n.lower(): n for n in sorted(names)}
    found = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean {lower[found[0]]}?)" if found else ""


# --- reading: text alone -------------------------------------------------------------------------


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_name: str, evaluate: bool) -> Reference:
        scope, _, name = scoped_name.rpartition("/")
        return Reference(scope, name, evaluate)

    def macro(self, name: str) -> Macro:
        return Macro(name)


def _parse(text: str, where: Callable[[int], str]) -> Iterator[Any]:
    """gin's statements; `where` says the place of a line."""
    try:
        yield from config_parser.ConfigParser(io.StringIO(text), _Delegate())
    except SyntaxError as error:
        # Python's and gin's line may be a tuple of gin's Location: (file, line, column, text).
        detail = (error.msg or "syntax error").strip().replace("\n   ", "")
        raise Refused(f"{where(error.lineno or 1)}: {detail}{_shown(error.text)}") from None
    except tokenize.TokenError as error:
        raise Refused(f"{where(error.args[1][0])}: {error.args[0]}: an unclosed bracket or quote?") from None
    except ValueError as error:
        raise Refused(f"{where(1)}: {error}") from None


def _shown(line: str | None) -> str:
    return f"\n    {line.strip()}" if line and line.strip() else ""


def split_bindings(text: str) -> list[str]:
    """Splits at `;` and newlines, but not inside quotes or brackets. Raises Refused if one is open."""
    refusal = Refused(f"-b {text!r}: an unclosed bracket or quote?")
    inside = f"({text}\n)"  # in brackets Python's tokenizer takes no notice of lines and indentation
    line_starts = [0, *itertools.accumulate(len(line) + 1 for line in inside.split("\n"))]
    cuts, depth = [0], 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(inside).readline):
            start = line_starts[token.start[0] - 1] + token.start[1]
            if token.type == tokenize.ERRORTOKEN and token.string[-1] in "\"'":
                raise refusal
            if token.type == tokenize.OP:
                depth += (token.string in "([{") - (token.string in ")]}")
            if depth == 1 and (token.string == ";" or token.type == tokenize.NL):
                cuts.append(start)
            if depth == 0 and start < len(inside) - 1:
                raise refusal
    except (tokenize.TokenError, SyntaxError):
        raise refusal from None
    parts = (inside[begin + 1 : end].strip() for begin, end in itertools.pairwise(cuts))
    return [part for part in parts if part]


def find_file(name: str, beside: Path | None = None) -> Path | None:
    """Looks beside the including file, in the current folder, in the repository."""
    for folder in ([beside] if beside else []) + [Path(), ROOT]:
        if (folder / name).is_file():
            return folder / name
    return None


def _find_module(module: str, beside: Path) -> str:
    """A module beside the config gets its full name in the repository, so that config.gin finds it."""
    parts = module.split(".")
    path = beside.joinpath(*parts).resolve()
    if not (path.with_suffix(".py").is_file() or path.is_dir()) or ROOT not in path.parents:
        return module
    return ".".join(path.relative_to(ROOT).parts)


def _read_file(path: Path, name: str, settings: Settings, including: tuple[Path, ...]) -> None:
    if path.resolve() in including:
        raise Refused(f"{name}: includes itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{name}: cannot be read: {error}") from None
    settings.files.append(path)
    n_before = len(settings.bindings), len(settings.imports), len(settings.files)
    for statement in _parse(text, lambda line: f"{name}:{line}"):
        where = f"{name}:{statement.location.line_num}"
        match statement:
            case config_parser.BindingStatement():
                settings.bindings.append(_binding(statement, where, typed=False))
            case config_parser.IncludeStatement():
                found = find_file(statement.filename, beside=path.parent)
                if not found:
                    raise Refused(
                        f"{where}: include '{statement.filename}': no such file beside {name}, "
                        "in the current folder or in the repository"
                    )
                _read_file(found, str(found), settings, (*including, path.resolve()))
            case config_parser.ImportStatement():
                if statement.is_from or statement.alias:
                    raise Refused(f"{where}: write it as `import module`")
                settings.imports.append((_find_module(statement.module, path.parent), where))
    if n_before == (len(settings.bindings), len(settings.imports), len(settings.files)):
        raise Refused(f"{name}: is empty: it sets nothing")


def _binding(statement: config_parser.BindingStatement, where: str, *, typed: bool) -> Binding:
    scope, name, parameter = statement.scope, statement.selector, statement.arg_name
    if parameter == "value" and name.split(".")[-1] == "macro":  # the long form of `name = value`
        scope, name, parameter = "", scope, ""
    if not parameter:
        scope, name = "", f"{scope}/{name}" if scope else name
    return Binding(scope, name, parameter, statement.value, where, typed)


def read(configs: Sequence[str], bindings: Sequence[str] = ()) -> Settings:
    """Reads the gin files, layered, then the -b texts; macros are replaced by their values.

    Raises Refused for a missing file or include, a syntax error, a macro without value.
    """
    settings = Settings([], [], [], [])
    for config in configs:
        found = find_file(config)
        if not found:
            kind = "is a folder, not a gin file" if Path(config).is_dir() else "no such config"
            folder = Path(config).parent
            near = nearest(config, (str(p) for p in folder.glob("*.gin")))
            raise Refused(f"{config}: {kind}{near}")
        _read_file(found, config, settings, ())
    for text in bindings:
        for part in split_bindings(text):
            for statement in _parse(part, lambda _: f"-b {part!r}"):  # noqa: B023 (used at once)
                if not isinstance(statement, config_parser.BindingStatement):
                    raise Refused(f"-b {part!r}: is no binding: write name.parameter=value")
                settings.bindings.append(_binding(statement, f"-b {part!r}", typed=True))
    return _without_macros(settings)


def _without_macros(settings: Settings) -> Settings:
    macros = {b.name: b for b in settings.bindings if not b.parameter}
    used: set[str] = set()

    def value(v: Any, where: str, inside: tuple[str, ...] = ()) -> Any:
        if isinstance(v, Macro):
            if v.name in inside:
                raise Refused(f"{where}: the macro %{v.name} stands for itself")
            if v.name not in macros:
                raise Refused(
                    f"{where}: the macro %{v.name} has no value{nearest(v.name, macros)}: add a line {v.name} = ..."
                )
            used.add(v.name)
            return value(macros[v.name].value, where, (*inside, v.name))
        return _rebuilt(v, lambda item: value(item, where, inside))

    bindings = [
        Binding(b.scope, b.name, b.parameter, value(b.value, b.where), b.where, b.typed)
        for b in settings.bindings
        if b.parameter
    ]
    unused = [b for name, b in macros.items() if name not in used]
    return Settings(bindings, settings.imports, settings.files, unused)


def _rebuilt(value: Any, function: Callable[[Any], Any]) -> Any:
    """The list, tuple or dict with the function applied to its items; other values as they are."""
    if isinstance(value, list | tuple):
        return type(value)(function(item) for item in value)
    if isinstance(value, dict):
        return {function(k): function(v) for k, v in value.items()}
    return value


# --- checking: names, parameters, types -----------------------------------------------------------

Node = tuple[str, str]  # scope and full name of a configurable


@dataclass(frozen=True)
class Config:
    """A checked config: every configurable that is reached from the root, with every setting.

    `values` maps (scope, full name) to parameters; `short` a full name to the one people write;
    `warnings` are what the person should hear and the run's record keeps.
    """

    root: str
    values: dict[Node, dict[str, Any]]
    short: dict[str, str]
    imports: list[str]
    warnings: list[str]

    def flat(self) -> dict[str, str]:
        """`{"SGD.lr": "0.1", ...}`: what config.gin holds, as text."""
        return {
            f"{scope}/{self.short[name]}.{key}".lstrip("/"): format_value(value, self.short)
            for (scope, name), parameters in self.values.items()
            for key, value in parameters.items()
        }

    def text(self) -> str:
        """config.gin: what `read` and `check` turn back into this config."""
        lines = [f"import {module}" for module in self.imports]
        group = ""
        for key, value in self.flat().items():
            if group != (group := key.rpartition(".")[0]):
                lines.append("")
            lines.append(f"{key} = {value}")
        return "\n".join(lines).strip() + "\n"

    def apply(self) -> None:
        """Makes this the whole of gin's configuration."""
        full = {name: name for name in self.short}
        gin.clear_config()
        gin.parse_config(
            [
                f"{scope}/{name}.{key} = {format_value(value, full)}".lstrip("/")
                for (scope, name), parameters in self.values.items()
                for key, value in parameters.items()
            ]
        )

    def choose(self, parameter: str, choice: int) -> "Config":
        """Puts member `choice` of first_available's list where `parameter` names first_available."""
        root = self.values["", self.root]
        reference = root[parameter]
        of = self.values[reference.scope, reference.name]["of"]
        values = {**self.values, ("", self.root): {**root, parameter: of[choice]}}
        return replace(self, values=_walk(self.root, lambda *node: values[node]))


def format_value(value: Any, names: Mapping[str, str]) -> str:
    """The value as gin reads it back; `names` maps full names of configurables to those written."""
    if isinstance(value, Reference):
        scope = f"{value.scope}/" if value.scope else ""
        return f"@{scope}{names.get(value.name, value.name)}{'()' if value.called else ''}"
    if isinstance(value, list):
        return "[" + ", ".join(format_value(v, names) for v in value) + "]"
    if isinstance(value, tuple):
        inner = ", ".join(format_value(v, names) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        items = (f"{format_value(k, names)}: {format_value(v, names)}" for k, v in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    return repr(value)


def _references(value: Any) -> Iterator[Reference]:
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)
    elif isinstance(value, dict):
        yield from _references([*value.keys(), *value.values()])


def _walk(root: str, values: Callable[[str, str], dict[str, Any]]) -> dict[Node, dict[str, Any]]:
    """All that is reached by references from the root; who names no scope stays in its caller's."""
    found: dict[Node, dict[str, Any]] = {}
    todo = [("", root)]
    for scope, name in todo:
        if (scope, name) not in found:
            found[scope, name] = values(scope, name)
            for r in _references(list(found[scope, name].values())):
                todo.append((r.scope or scope, r.name))
    return found


class _Names:
    """gin's registry, asked by name."""

    def __init__(self, external: Mapping[str, Callable[[str], None]]) -> None:
        self.external = external  # prefix -> what registers a name that begins with it
        self.registry = gin.config._REGISTRY

    def resolve(self, name: str, where: str) -> str:
        """The full name. Raises Refused for a name that is unknown or has several owners."""
        for prefix, register in self.external.items():
            if name.startswith(prefix) and name not in self.registry:
                try:
                    register(name)
                except Refused as refusal:
                    raise Refused(f"{where}: {refusal.message}") from None
        matches = [name] if name in self.registry else self.registry.matching_selectors(name)
        # Bare names are ours and torch's; a library's have its prefix.
        own = [m for m in matches if not m.startswith(tuple(self.external))]
        matches = own or matches
        if len(matches) == 1:
            return str(matches[0])
        if matches:
            raise Refused(f"{where}: {name} is the name of several: {', '.join(sorted(matches))}")
        known = {selector.rpartition(".")[2] for selector, _ in self.registry.items()}
        raise Refused(f"{where}: nothing is named {name}{nearest(name, known)}")

    def short(self, selector: str) -> str:
        if selector.startswith(tuple(self.external)):
            return selector
        bare = selector.rpartition(".")[2]
        try:
            self.resolve(bare, "")
        except Refused:
            return str(self.registry.minimal_selector(selector))
        return bare

    def denied(self, selector: str, parameter: str) -> bool:
        known = self.registry[selector]
        return parameter in (known.denylist or ()) or (bool(known.allowlist) and parameter not in known.allowlist)

    def function(self, selector: str) -> Callable[..., Any]:
        return typing.cast(Callable[..., Any], self.registry[selector].wrapped)

    def parameters(self, selector: str) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function(selector)).parameters

    def literal(self, value: Any) -> Any:
        """A default as a config can write it; raises ValueError where there is no such form."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple | dict):
            return _rebuilt(value, self.literal)
        known = gin.config._inverse_lookup(value) if callable(value) else None
        if known is None:
            raise ValueError(value)
        return Reference("", known.selector, False)


def check(settings: Settings, root: str, external: Mapping[str, Callable[[str], None]] | None = None) -> Config:
    """Checks names, parameters and types of all bindings, and completes them with the defaults.

    `root` is the configurable from which all is reached; `external` maps a prefix (`torchmetrics.`)
    to the function that registers a name with this prefix. Imports the modules that the files
    import. Raises Refused, with the file and line and the nearest name.
    """
    names = _Names(external or {})
    for module, where in settings.imports:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise
            raise Refused(
                f"{where}: import {module}: no such module beside the file, in the repository or installed"
            ) from None
    root = names.resolve(root, "")
    bindings = [_resolved(binding, names) for binding in settings.bindings]
    nodes = _walk(root, lambda scope, name: _values(scope, name, bindings, names))
    for name, parameter, where in _missing(root, nodes, names):
        raise Refused(f"{where} has no value: add a line {name}.{parameter} = ... to a config")
    warnings = []
    for b in [*(b for b in bindings if not _is_consumed(b, nodes)), *settings.unused_macros]:
        key = f"{b.scope}/{names.short(b.name) if b.parameter else b.name}".lstrip("/")
        key += f".{b.parameter}" if b.parameter else ""
        if b.typed:
            raise Refused(f"{b.where}: nothing uses {key} in this config")
        warnings.append(f"{b.where}: nothing uses {key}")
    return Config(
        root=root,
        values=nodes,
        short={name: names.short(name) for _, name in nodes},
        imports=list(dict.fromkeys(module for module, _ in settings.imports)),
        warnings=warnings,
    )


def _resolved(b: Binding, names: _Names) -> Binding:
    """The binding with full names, after its name, parameter and type were checked."""
    selector = names.resolve(b.name, b.where)
    short = names.short(selector)
    parameters = names.parameters(selector)
    if names.denied(selector, b.parameter):
        raise Refused(f"{b.where}: {short}.{b.parameter} is given by the code, it cannot be set")
    open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    settable = [
        p.name
        for p in parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and not names.denied(selector, p.name)
    ]
    if b.parameter not in settable and not open_ended:
        raise Refused(f"{b.where}: {short} has no parameter {b.parameter}{nearest(b.parameter, settable)}")

    def resolved(value: Any) -> Any:
        if isinstance(value, Reference):
            return Reference(value.scope, names.resolve(value.name, b.where), value.called)
        return _rebuilt(value, resolved)

    value = resolved(b.value)
    expected = _annotation(names.function(selector), b.parameter)
    if not _fits(value, expected, names):
        raise Refused(
            f"{b.where}: {short}.{b.parameter} = {_described(b.value)}, but it must be "
            f"{_readable(expected)}" + _hint(b.value, names)
        )
    return replace(b, name=selector, value=value)


def _annotation(function: Callable[..., Any], parameter: str) -> Any:
    """The parameter's type, or Any where it has none that can be read."""
    annotated = function.__init__ if inspect.isclass(function) else function
    given = inspect.signature(function).parameters.get(parameter)
    if given is None or given.annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(given.annotation, str):
        return given.annotation
    try:
        return typing.get_type_hints(annotated).get(parameter, Any)
    except (NameError, TypeError):  # a name that only type checkers import
        return Any


def _fits(value: Any, expected: Any, names: _Names) -> bool:
    from typeguard import CollectionCheckStrategy, ForwardRefPolicy, TypeCheckError, check_type

    if any(r.called for r in _references(value)):
        return True  # known only when gin has called it

    def built(v: Any) -> Any:
        return names.function(v.name) if isinstance(v, Reference) else _rebuilt(v, built)

    if _has_bool(value) and not any(t in str(expected) for t in ("bool", "Any", "object")):
        return False  # Python's bool is an int; a config's is not
    try:
        check_type(
            built(value),
            expected,
            forward_ref_policy=ForwardRefPolicy.IGNORE,
            collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS,
        )
    except TypeCheckError:
        return False
    return True


def _has_bool(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_bool, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple):
        return any(map(_has_bool, value))
    return isinstance(value, bool)


def _readable(expected: Any) -> str:
    text = expected.__name__ if inspect.isclass(expected) else str(expected)
    if isinstance(expected, types.GenericAlias):
        text = str(expected)
    return text.replace("typing.", "").replace("collections.abc.", "").replace("NoneType", "None")


def _described(value: Any) -> str:
    if any(True for _ in _references(value)) or value is None:
        return format_value(value, {})
    return f"{format_value(value, {})} ({type(value).__name__})"


def _hint(value: Any, names: _Names) -> str:
    if isinstance(value, str):
        known = {selector.rpartition(".")[2] for selector, _ in names.registry.items()}
        if value in known:
            return f": write @{value}"
        if value.replace(".", "", 1).isdigit():
            return f": write {value}"
    return ""


def _values(scope: str, name: str, bindings: list[Binding], names: _Names) -> dict[str, Any]:
    """The parameters of a configurable: its defaults, then the bindings from outer to inner scope."""
    values = {}
    for p in names.parameters(name).values():
        if p.default is not p.empty and not names.denied(name, p.name):
            try:
                values[p.name] = names.literal(p.default)
            except ValueError:
                continue  # an object that no config can write: it stays the code's
    for outer in _scopes(scope):
        values |= {b.parameter: b.value for b in bindings if (b.scope, b.name) == (outer, name)}
    order = list(names.parameters(name))
    return dict(sorted(values.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _scopes(scope: str) -> list[str]:
    """`a/b` -> ["", "a", "a/b"]: gin lets inner scopes win."""
    parts = scope.split("/") if scope else []
    return ["/".join(parts[:n]) for n in range(len(parts) + 1)]


def _is_consumed(binding: Binding, nodes: Mapping[Node, dict[str, Any]]) -> bool:
    return any(binding.name == name and binding.scope in _scopes(scope) for scope, name in nodes)


def _missing(root: str, nodes: Mapping[Node, dict[str, Any]], names: _Names) -> Iterator[tuple[str, str, str]]:
    """Parameters without a value, of the root and of what the loop builds itself."""
    built = [(r.scope, r.name) for r in _references(list(nodes["", root].values()))]
    for scope, name in [("", root), *built]:
        for p in names.parameters(name).values():
            needed = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty
            supplied = names.denied(name, p.name) or p.name in LOOP_SUPPLIES
            if needed and not supplied and p.name not in nodes[scope, name]:
                short = names.short(name)
                yield short, p.name, f"{short}.{p.name}"
