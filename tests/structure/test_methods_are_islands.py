"""Methods are islands: a module that registers a method is imported by no other module of the room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fewstep.methods

ROOM = Path(fewstep.methods.__file__).parent


def registers(tree: ast.Module) -> bool:
    """True when a class of the module is decorated with part("method", ...)."""
    decorators = [d for node in tree.body if isinstance(node, ast.ClassDef) for d in node.decorator_list]
    return any(ast.unparse(d).startswith("part('method',") for d in decorators)


def imported(tree: ast.Module) -> Iterator[str]:
    """Modules of the room that are imported anywhere in a module, in functions too."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = "fewstep.methods" if node.level else str(node.module)
            inside = node.module if node.level and node.module else ""
            names = [f"{origin}.{inside}" if inside else f"{origin}.{alias.name}" for alias in node.names]
            names += [origin]
        for name in names:
            if name.startswith("fewstep.methods."):
                yield name.split(".")[2]


def bridges(sources: dict[str, str]) -> list[str]:
    """`a imports b` for all methods a, b of the room's sources by module name."""
    trees = {name: ast.parse(text) for name, text in sources.items()}
    methods = {name for name, tree in trees.items() if registers(tree)}
    return sorted({f"{a} imports {b}" for a in methods for b in imported(trees[a]) if b in methods - {a}})


def sources() -> dict[str, str]:
    return {path.stem: path.read_text() for path in ROOM.glob("*.py") if path.stem != "__init__"}


def test_no_method_imports_another():
    assert bridges(sources()) == []


def test_a_bridge_is_seen_however_it_is_written():
    room = sources()
    assert {"dmd2", "meanflow", "joint"} <= {n for n, text in room.items() if registers(ast.parse(text))}
    for line in (
        "from fewstep.methods.meanflow import MeanFlow",
        "from fewstep.methods import meanflow",
        "import fewstep.methods.meanflow as m",
        "from .meanflow import MeanFlow",
        "from . import meanflow",
        "def f():\n    from fewstep.methods.meanflow import MeanFlow",
    ):
        assert bridges({**room, "imm": f"{room['imm']}\n{line}\n"}) == ["imm imports meanflow"], line
