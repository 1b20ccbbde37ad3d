"""The house has floors: a module imports from lower floors and its own room, never up, never in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = (
    ("config",),
    ("files", "pictures"),
    ("algebra", "kernels", "eval"),
    ("networks",),
    ("data", "objectives"),
    ("methods",),
    ("recipe",),
    ("train",),
    ("export",),
    ("commands",),
    ("cli", "bench"),
)
"""From the ground up. Rooms of one floor do not import each other."""
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
MAPPED = ("eval", "kernels")


def modules() -> dict[str, Path]:
    found = {}
    for top in ("fewstep", *MAPPED):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if top == "fewstep" else ("fewstep", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> set[str]:
    """Modules of fewstep that a file imports anywhere, inside functions too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return {m for m in found if m in MODULES and m != name}


ARROWS = {name: imports(name, path) for name, path in MODULES.items()}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str):
    here = room(name)
    if here in ("", "__main__"):  # the faces
        return
    up = {to for to in ARROWS[name] if room(to) not in ("", here) and FLOOR[room(to)] >= FLOOR[here]}
    assert not up, f"{name} (floor {FLOOR[here]}) imports {sorted(up)}"


def test_no_circles():
    faces = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graph = {name: to - faces for name, to in ARROWS.items() if name not in faces}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
