"""JSON to frozen dataclasses and back, refusing whatever is not expected: files from elsewhere are not trusted."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, TypeVar

from runtime.errors import BundleError

T = TypeVar("T")
_MAX_DEPTH = 12


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON, refusing duplicate keys, NaN / Infinity, absurd integers and deep nesting.

    Raises BundleError naming `where`.
    """
    if data.count(b"[") + data.count(b"{") > 200_000:
        raise BundleError(f"{where}: more than 200,000 nested values")
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant, parse_int=_bounded_int
        )
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not valid JSON ({error})") from None
    _check_depth(value, where)
    return value


def from_dict(cls: type[T], data: Any, where: str) -> T:
    """Build the frozen dataclass `cls` from a JSON object; keys and types must match exactly.

    Raises BundleError naming the field.
    """
    if not isinstance(data, dict):
        raise BundleError(f"{where}: expected an object, found {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise BundleError(f"{where}: unknown field {unknown[0]!r} (known: {', '.join(fields)})")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise BundleError(f"{where}: field {name!r} is missing")
    return cls(**values)


def to_dict(value: Any) -> Any:
    """The inverse of from_dict, as plain JSON values."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in args:
            raise BundleError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{where}: expected a list, found {type(value).__name__}")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected an object, found {type(value).__name__}")
        return {k: _convert(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise BundleError(f"{where}: expected {hint.__name__}, found {type(value).__name__} {value!r:.60}")
    if hint is float and not math.isfinite(value):
        raise BundleError(f"{where}: {value} is not a finite number")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} occurs twice")
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not allowed")


def _bounded_int(text: str) -> int:
    if len(text) > 19:
        raise ValueError(f"integer of {len(text)} digits")
    return int(text)


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [c for v in level for c in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
        if not level:
            return
    raise BundleError(f"{where}: nested deeper than {_MAX_DEPTH} levels")
