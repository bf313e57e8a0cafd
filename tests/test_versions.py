"""What is installed, what was tested, and what pyproject admits say the same."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
}
DIRECT = [
    Requirement(line)
    for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"])
    if not line.startswith(PROJECT["name"])
]


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_constraints_pin_every_direct_dependency_within_the_bounds_of_pyproject(requirement):
    assert requirement.specifier.contains(CONSTRAINTS[canonicalize_name(requirement.name)])


def closure(name: str, extras: frozenset[str] = frozenset(), found: dict | None = None) -> dict[str, str]:
    """Installed distributions that `name[extras]` needs, itself included, with their versions."""
    found = {} if found is None else found
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in (*extras, "")):
            continue
        key = canonicalize_name(requirement.name)
        if key not in found:
            found[key] = metadata.version(key)
            closure(key, frozenset(requirement.extras), found)
    return found


def test_constraints_pin_everything_that_an_installation_for_tests_brings():
    needed = closure("hf-sparse-peft", frozenset({"test", "recipes"})).keys() - {"hf-sparse-peft"}
    assert not needed - CONSTRAINTS.keys()


def test_transformers_that_ask_for_an_unreleased_peft_are_not_admitted():
    (transformers,) = (r for r in DIRECT if r.name == "transformers")
    assert not transformers.specifier.contains("5.24.0")
    assert transformers.specifier.contains("5.23.0")
