"""Imports go one way: no module of the package imports, by whatever detour, one that imports it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_multimodal"


def modules() -> dict[str, Path]:
    """{dotted name: file}."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that one imports: at the top, inside functions, and for type checkers alone."""
    found = set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*above, *(node.module.split(".") if node.module else [])])
            inside = [f"{target}.{alias.name}" for alias in node.names]
            # The package's own __init__ is left out where a module of it is meant.
            found |= {i for i in inside if i in known} | ({target} if any(i not in known for i in inside) else set())
    return (found & known.keys()) - {name}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, ahead = set(), [start]
        while ahead:
            for after in graph[ahead.pop()] - seen:
                seen.add(after)
                ahead.append(after)
        reached[start] = seen
    found: list[set[str]] = []
    for name in graph:
        circle = {other for other in reached[name] if name in reached[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, file, known) for name, file in known.items()}


FLOORS = ["core", "encoders", "nn", "methods", "training", "files"]


def test_floors_import_what_is_below():
    floor = {name: FLOORS.index(name.split(".")[1]) for name in modules() if len(name.split(".")) > 1 and name.split(".")[1] in FLOORS}  # fmt: skip
    assert set(floor.values()) == set(range(len(FLOORS)))
    upwards = [(name, other) for name, others in graph().items() for other in others if floor.get(name, 9) < floor.get(other, -1)]  # fmt: skip
    assert upwards == []


def test_no_circle():
    assert circles(graph()) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    known = modules()
    assert "peft_multimodal.core.registry" in imports(
        "peft_multimodal.core.switching", known["peft_multimodal.core.switching"], known
    )
