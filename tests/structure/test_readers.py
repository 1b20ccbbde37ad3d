"""What comes from outside has one reader: JSON, and paths with ~."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OWN = {
    "fewstep/files/read.py": 1,  # the reader
    "fewstep/recipe/cards.py": 1,  # an asset of the package
    "fewstep/export/experts.py": 1,  # a line of code on a card
    "fewstep/networks/wrapped.py": 1,  # within a printed command
}
"""Files that may call json.load or json.loads on more than what they have just written, and how often."""


def calls(pattern: str) -> dict[str, int]:
    found = {}
    for top in ("fewstep", "eval", "kernels"):
        for path in (ROOT / top).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if count := len(re.findall(pattern, path.read_text())):
                found[name] = count
    return found


def test_json_from_files_goes_through_the_checked_reader():
    """json.loads(json.dumps(...)) is a copy; a bench reads what a child of its own has printed."""
    found = calls(r"json\.loads?\((?!json\.dumps)")
    assert {name: n for name, n in found.items() if "/bench/" not in name} == OWN


def test_a_home_is_looked_up_in_one_place():
    assert calls(r"\.expanduser\(|Path\.home\(") == {"fewstep/files/places.py": 1}
