"""JSON and YAML as files hold them: what is ambiguous, infinite or nested without end is refused, not guessed at."""

from __future__ import annotations

import json
from typing import Any

import yaml


def from_json(text: str | bytes, nan: bool = False) -> Any:
    """The content of a JSON text.

    Args:
        nan: take NaN and infinities, which Python writes and JSON does not have.

    Raises:
        ValueError: if it is no JSON, names a key twice, or is nested too deeply.

    >>> from_json('{"value": 0.5}')
    {'value': 0.5}
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=float if nan else _no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def from_yaml(text: str) -> Any:
    """The content of a YAML text.

    Raises:
        ValueError: if it is no YAML, names a key twice, or is nested too deeply.

    >>> from_yaml("runs: [{run: first, gpu: true}]")
    {'runs': [{'run': 'first', 'gpu': True}]}
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, TypeError, AttributeError) as error:  # of the last two kinds for keys that are no texts
        raise ValueError(" ".join(str(error).split())) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r} twice")
    return content


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")


class _Loader(yaml.SafeLoader):
    """The safe loader, which would take the last of two values under one key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"it names {twice!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)
