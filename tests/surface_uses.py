"""What a connector's source takes from its engine, as far as the source says it; no engine is needed to find it.

What an attribute belongs to that is read on an untyped argument the source does not say: such names are in a
connector's ``surface.py`` because somebody put them there.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from disagg_plugin.surface import Surface

_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


class Use(NamedTuple):
    """A dotted name of the engine, and the file that has it."""

    name: str
    file: str


class Override(NamedTuple):
    """A method of a class of ours whose base is the engine's; the base may have no such method."""

    base: str
    method: str


def uses(folder: Path, package: str) -> set[Use]:
    """Imports, the first attribute read on what was imported, and strings that name something of the engine.

    Imports for type checking count too. A string may be put together from constants of its module; a logger's name is
    none of the engine's things.

    Args:
        folder: The connector's package.
        package: The engine's, as Python calls it.
    """
    found = set()
    for path in _sources(folder):
        tree = ast.parse(path.read_text())
        imported = _imported(tree, package)
        names = {*imported.values(), *_attributes(tree, imported), *_strings(tree, package)}
        found |= {Use(name, path.name) for name in names}
    return found


def overrides(folder: Path, package: str) -> set[Override]:
    """Every method of every class that has a class of the engine as its base."""
    found = set()
    for path in _sources(folder):
        tree = ast.parse(path.read_text())
        imported = _imported(tree, package)
        for node in ast.walk(tree):
            bases = [imported.get(ast.unparse(base)) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            methods = [one.name for one in ast.iter_child_nodes(node) if isinstance(one, _FUNCTIONS)]
            found |= {Override(base, method) for base in bases if base is not None for method in methods}
    return found


def uncovered(surface: Surface, names: set[Use]) -> list[Use]:
    """The names that a table has neither by themselves nor as the place of something else."""
    known = {str(name) for name in surface.names}
    places = {".".join(parts[:end]) for parts in (name.split(".") for name in known) for end in range(len(parts))}
    return sorted(use for use in names if use.name not in known | places)


def _sources(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.py")) if path.name != "surface.py"]


def _imported(tree: ast.Module, package: str) -> dict[str, str]:
    """Names of a file (or ``a.b``, as an import without ``as`` binds it), and what of the engine they stand for."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {ours: theirs for ours, theirs in found.items() if theirs.split(".")[0] == package}


def _attributes(tree: ast.Module, imported: dict[str, str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (owner := imported.get(ast.unparse(node.value))) is not None:
            yield f"{owner}.{node.attr}"


def _strings(tree: ast.Module, package: str) -> Iterator[str]:
    constants: dict[str, str] = {}
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if (text := _text(value, constants)) is not None:
                constants[name] = text
    dotted = re.compile(rf"{package}(\.\w+)+")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loggers = [argument for call in calls if "getLogger" in ast.unparse(call.func) for argument in call.args]
    for node in ast.walk(tree):
        text = _text(node, constants)
        if text is not None and dotted.fullmatch(text) and node not in loggers:
            yield text


def _text(node: ast.AST, constants: dict[str, str]) -> str | None:
    """A string, also an f-string of constants; None if it is anything else."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.FormattedValue(value=ast.Name(id=name)):
            return constants.get(name)
        case ast.JoinedStr(values=values):
            parts = [_text(value, constants) for value in values]
            return "".join(part or "" for part in parts) if None not in parts else None
        case _:
            return None
