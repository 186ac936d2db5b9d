"""pyproject.toml against the Pythons that it promises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib")  # Python 3.11
PROJECT: dict[str, Any] = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
PYTHONS = [found[1] for line in PROJECT["classifiers"] if (found := re.fullmatch(r".* :: (3\.\d+)", line))]


def named(name: str, python: str) -> list[Requirement]:
    """The test requirements of that name that count on that Python, on the usual machine."""
    environment = {"python_version": python, "sys_platform": "linux", "platform_machine": "x86_64", "extra": "test"}
    found = [Requirement(line) for line in PROJECT["optional-dependencies"]["test"]]
    return [r for r in found if r.name == name and (r.marker is None or r.marker.evaluate(environment))]


def test_the_pythons_are_those_of_the_limits() -> None:
    assert PYTHONS == ["3.10", "3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == ">=3.10,<3.14"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_reference_is_one_release_that_python_can_have(python: str) -> None:
    """transformers left Python 3.10 with its release 5.21, and `make test` found nothing to install there."""
    (reference,) = named("transformers", python)
    assert reference.specifier.contains("5.20.2") == (python == "3.10")
    assert reference.specifier.contains("5.23.0") == (python != "3.10")


def test_no_extra_wants_the_package_itself() -> None:
    """`make test` ended with pip 22.0.2 (Ubuntu 22.04) in an AssertionError of its ordering, likely over this."""
    extras = PROJECT["optional-dependencies"]
    assert not [line for lines in extras.values() for line in lines if Requirement(line).name == PROJECT["name"]]
    assert set(extras["rtx"]) <= set(extras["test"])
