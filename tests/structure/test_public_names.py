"""The names of `fewstep` itself: one face, of one kind whatever is imported first."""

from __future__ import annotations

import ast
from pathlib import Path

from tiny_runs import python

import fewstep

ROOT = Path(__file__).resolve().parents[2]

ORDERS = """
import importlib, os, sys
import accelerate, torch  # seconds, which each child would need again
orders = (
    ("fewstep.algebra.rollout", "fewstep.algebra.jump", "fewstep"),
    ("fewstep", "fewstep.networks.roles", "fewstep.recipe.schema"),
    ("fewstep.train.trainer", "fewstep"),
)
for order in orders:
    child = os.fork()
    if not child:
        for module in order:
            importlib.import_module(module)
        import fewstep
        print({n: type(getattr(fewstep, n)).__name__ for n in fewstep.__all__}, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_public_name_has_one_kind_in_every_order_of_imports():
    kinds = set(python(ORDERS).stdout.splitlines())
    assert len(kinds) == 1, kinds
    assert "module" not in kinds.pop()


def test_editors_see_what_is_imported():
    """Names are resolved on first use, which no reader of types follows: they are imported for it as well."""
    tree = ast.parse((ROOT / "fewstep" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    found = {alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert found == {name: f"fewstep.{home}" for name, home in fewstep._HOMES.items()}
    assert set(fewstep.__all__) <= set(dir(fewstep))


def test_no_public_name_is_a_room():
    """A submodule would take the place of a function of its name once it is imported."""
    for name in fewstep.__all__:
        assert not (ROOT / "fewstep" / name).is_dir(), name
        assert not (ROOT / "fewstep" / f"{name}.py").is_file(), name


def test_the_root_has_fourteen_rooms_at_most():
    plain = {"__init__.py", "__main__.py", "__pycache__", "py.typed", "README.md"}
    assert len([p for p in (ROOT / "fewstep").iterdir() if p.name not in plain]) <= 14
