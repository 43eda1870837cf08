"""Settings files: YAML or JSON text to a mapping, one mapping laid over another, every mistake in one line."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from disagg_plugin.errors import ConfigError


def merge(base: Mapping[str, object], overrides: Mapping[str, object]) -> dict[str, object]:
    """``base`` with the fields of ``overrides``; sections are merged field by field, lists are replaced."""
    merged = dict(base)
    for name, value in overrides.items():
        below = merged.get(name)
        merged[name] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_mapping(path: Path) -> dict[str, object]:
    """The mapping in a YAML or JSON file; an empty file is an empty mapping.

    Raises:
        ConfigError: The file cannot be read, is not well formed, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)  # a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{path}: {line}{one_line(error.problem or 'not YAML')}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {one_line(str(error))}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}: must hold fields and values")
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(problem=f"{key.value} twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def one_line(text: str) -> str:
    """``text`` with every run of white space as one space."""
    return " ".join(text.split())
