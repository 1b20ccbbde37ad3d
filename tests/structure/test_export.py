"""Calls are data and refusals are plain sentences: no text comes back by eval, no message needs surgery."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ("fewstep", "eval", "kernels")


def called(tops: tuple[str, ...], name: str) -> list[str]:
    """Files under these folders that call this builtin."""
    files = sorted(p for top in tops for p in (ROOT / top).rglob("*.py"))
    return [p.relative_to(ROOT).as_posix() for p in files if name in builtin_calls(ast.parse(p.read_text()))]


def builtin_calls(tree: ast.AST) -> set[str]:
    """Of eval and exec those that are called by name; `net.eval()` is none."""
    names = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return names & {"eval", "exec"}


def test_no_text_comes_back_by_eval():
    assert called((*PACKAGE, "tests"), "eval") == []
    # The loader of an experts' card is run as its reader runs it.
    assert called(PACKAGE, "exec") == ["fewstep/export/experts.py"]


@pytest.mark.parametrize(
    ("code", "calls"),
    [("eval('1')", {"eval"}), ("net.eval()", set()), ("def f():\n    return exec(text, {})", {"exec"})],
)
def test_calls_are_told_from_methods(code: str, calls: set[str]):
    assert builtin_calls(ast.parse(code)) == calls


def test_refusals_do_not_begin_with_a_name_of_the_exporter():
    for path in sorted((ROOT / "fewstep" / "export").glob("*.py")):
        raised = [n.exc for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Raise) and n.exc]
        texts = [s.value for e in raised for s in ast.walk(e) if isinstance(s, ast.Constant)]
        assert not [t for t in texts if isinstance(t, str) and t.startswith("export")], path.name
