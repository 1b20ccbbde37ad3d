"""Edits by rules: one line each, valid, meaningful, and the same for the same seed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fewstep.bench.edits import Edit, draw, edits_of
from fewstep.bench.mutants import ROOMS, ROOT, sources

TEXT = '''"""A docstring - of 2 words."""
@part("x", "y")
class C:
    n: Annotated[int, 3] = 4
    """At least 1."""

    def f(self, a: int, b: float = 0.5) -> int:
        if a <= 0 and not b:
            raise ValueError(f"a must be at least {1 + 1}, not {a - 2}")
        é = g(a, -b.detach()) * 2
        with torch.no_grad():
            assert a - 1 == 3
            return (é +
                    1)
'''


def changes(text: str) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for e in edits_of(text):
        found.setdefault(e.rule, []).append((e.before.strip(), e.after.strip()))
    return found


def test_each_rule_finds_its_places_and_no_other():
    call = "é = g(a, -b.detach()) * 2"
    test = "if a <= 0 and not b:"
    assert changes(TEXT) == {
        "constant": [
            ("n: Annotated[int, 3] = 4", "n: Annotated[int, 3] = 5"),
            ("def f(self, a: int, b: float = 0.5) -> int:", "def f(self, a: int, b: float = 1.0) -> int:"),
            (test, "if a <= 1 and not b:"),
            (call, "é = g(a, -b.detach()) * 3"),
            ("1)", "2)"),
        ],
        "comparison": [(test, "if a < 0 and not b:")],
        "refusal": [(test, "if False:")],
        "sign": [(call, "é = g(a, b.detach()) * 2")],
        "detach": [(call, "é = g(a, -b) * 2"), ("with torch.no_grad():", "with torch.enable_grad():")],
        "swap": [
            ('@part("x", "y")', '@part("y", "x")'),
            (call, "é = g(-b.detach(), a) * 2"),
        ],
    }


@pytest.mark.parametrize(
    ("line", "rule", "wanted"),
    [
        ("x = (a) - (b)", "sign", {"x = (a) + (b)"}),
        ("x = a - b - c", "sign", {"x = a + b - c", "x = a - b + c"}),
        ("x = a < b != c", "comparison", {"x = a <= b != c", "x = a < b == c"}),
        ("x = 0.0, True", "constant", {"x = 1.0, True", "x = 0.0, False"}),
        ("f(a, *b, c, c, k=d)", "swap", set()),
        ("f(g(a), (b), c)", "swap", {"f(b, (g(a)), c)", "f(g(a), (c), b)"}),
        ("x = y in z", "comparison", set()),
        ("if a:\n    raise B\nelse:\n    c()", "refusal", set()),
    ],
)
def test_edges(line: str, rule: str, wanted: set[str]):
    assert {e.after for e in edits_of(line) if e.rule == rule} == wanted


@pytest.mark.parametrize("room", ROOMS)
def test_drawn_edits_change_one_line_are_valid_and_are_drawn_again(room: str):
    files = sources(ROOT, room)[-5:]
    drawn = draw(files, 12, 0, room)
    assert len(set(drawn)) == len(drawn) == 12
    assert draw(files[::-1], 6, 0, room) == drawn[:6]
    assert draw(files, 6, 1, room) != drawn[:6]
    assert len({e.rule for e in drawn}) >= 3
    for e in drawn:
        text = (ROOT / e.file).read_text()
        edited = e.apply(text)
        ast.parse(edited)
        pairs = zip(text.splitlines(), edited.splitlines(), strict=True)
        assert [n for n, (a, b) in enumerate(pairs, 1) if a != b] == [e.line]


def test_few_places_are_all_drawn_and_a_line_that_moved_is_refused(tmp_path: Path):
    (tmp_path / "a.py").write_text("x = 1 - 2\n")
    drawn = draw([("a.py", tmp_path / "a.py")], 99, 0, "room")
    assert {e.after for e in drawn} == {"x = 2 - 2", "x = 1 - 3", "x = 1 + 2"}
    with pytest.raises(ValueError, match=r"^a\.py:1 is no longer 'x = 1'$"):
        Edit("a.py", 1, "sign", "x = 1", "x = 2").apply("y = 3\n")
