"""Tests are found where one looks: a folder for each room, and four that belong to none."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
APART = {"laws", "structure", "helpers"}
"""Laws hold for many methods at once; structure is of the checkout; helpers hold no test."""


def test_every_folder_of_tests_is_a_room():
    rooms = {p.name for p in (ROOT / "fewstep").iterdir() if (p / "__init__.py").is_file()} | {
        "kernels",
        "eval",
    }
    folders = {p.name for p in TESTS.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= rooms | APART
    assert rooms - folders == set()


def test_tests_lie_in_folders_and_helpers_hold_none():
    assert [p.name for p in TESTS.glob("*.py")] == ["conftest.py"]
    assert not list((TESTS / "helpers").glob("test_*.py"))
    for path in TESTS.rglob("*.py"):
        if path.parent.name != "helpers" and path.name != "conftest.py":
            assert path.name.startswith("test_"), path


def test_files_stay_short():
    """A file is one idea: 400 lines at most; a method, 150."""
    long = {
        str(path.relative_to(ROOT)): count
        for top in ("fewstep", "kernels", "eval")
        for path in (ROOT / top).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert long == {}
    methods = (ROOT / "fewstep" / "methods").glob("*.py")
    assert [p.name for p in methods if len(p.read_text().splitlines()) > 150] == []
