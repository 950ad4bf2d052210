"""The floors in pyproject.toml are those that constraints-lowest.txt has the tests run with."""

from __future__ import annotations

import pytest
from helpers.places import REPO
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def pins(name: str) -> dict[str, Version]:
    """Package -> version, of a constraints file."""
    lines = (REPO / name).read_text(encoding="utf-8").splitlines()
    pinned = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(package): Version(version) for package, version in pinned}


def test_the_lowest_versions_are_the_floors() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(one for name in extras if name not in ("docs", "gpu", "test") for one in extras[name]),
    ]
    lowest, usual = pins("constraints-lowest.txt"), pins("constraints.txt")
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        (floor,) = (Version(one.version) for one in requirement.specifier if one.operator == ">=")
        if name != "torch":  # older ones were not tried
            assert lowest[name] == floor, name
        assert requirement.specifier.contains(lowest[name])
        assert requirement.specifier.contains(usual[name]) if name in usual else name in ("pyarrow", "pyyaml")
