"""The lock holds a version of everything that development needs, within the ranges that users get."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]


def needed(extra: str) -> Iterator[Requirement]:
    """What an extra installs beside the package's own needs, extras of its own included."""
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name == PROJECT["name"]:
            for inner in sorted(requirement.extras):
                yield from needed(inner)
        else:
            yield requirement


NEEDED = {str(r): r for r in (*map(Requirement, PROJECT["dependencies"]), *needed("dev"))}


@pytest.mark.parametrize("requirement", NEEDED.values(), ids=str)
def test_every_requirement_is_locked_within_its_range(requirement: Requirement):
    name = canonicalize_name(requirement.name)
    versions = [str(pin.specifier).removeprefix("==") for pin in PINS if canonicalize_name(pin.name) == name]
    assert versions, f"{requirement} isn't in requirements.lock: run make lock"
    assert all(requirement.specifier.contains(Version(version)) for version in versions), (requirement, versions)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_every_python_and_system_has_one_version_of_each(python: str, system: str):
    environment = {"python_full_version": f"{python}.1", "python_version": python, "sys_platform": system}
    environment |= {"platform_machine": "x86_64", "extra": ""}
    names = [pin.name for pin in PINS if pin.marker is None or pin.marker.evaluate(environment)]
    assert len(names) == len(set(names))
    assert {"torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "ruff", "mypy"} <= set(names)


def test_a_changed_lock_installs_anew():
    """`make install` looks at the lock: its stamp is out of date once the lock is newer."""
    asked = subprocess.run(
        ["make", "--dry-run", "--what-if=requirements.lock", "install"], cwd=ROOT, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    commands = [line for line in asked.stdout.splitlines() if re.search(r"pip install", line)]
    assert commands
    assert all("--constraint requirements.lock" in command for command in commands)
