"""A device profile as TOML text that profiles/device.py reads again."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from profiles.device import Device, Figure


def to_toml(device: Device, comment: str) -> str:
    """What is not known is left out; `comment` stands above everything."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    tables: list[str] = []
    for field in fields(device):
        value = getattr(device, field.name)
        if value is None or value == ():
            continue
        if isinstance(value, tuple):
            for item in value:
                tables += ["", f"[[{field.name}]]", *_entries(item)]
        elif hasattr(value, "__dataclass_fields__"):
            tables += ["", f"[{field.name}]", *_entries(value)]
        else:
            lines.append(f"{field.name} = {_scalar(value)}")
    return "\n".join(lines + tables) + "\n"


def _entries(value: Any) -> list[str]:
    found = ((field.name, getattr(value, field.name)) for field in fields(value))
    return [f"{name} = {_value(item)}" for name, item in found if item is not None]


def _value(value: Any) -> str:
    if not isinstance(value, Figure):
        return _scalar(value)
    parts = ", ".join(f"{field.name} = {_scalar(getattr(value, field.name))}" for field in fields(value))
    return f"{{ {parts} }}"


def _scalar(value: str | int | float) -> str:
    """JSON's strings and numbers are TOML's, too."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
