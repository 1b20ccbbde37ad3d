"""One-line edits of a source by rules: what a test suite should notice. Nothing is imported or run."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

SIGNS: dict[type[ast.operator], tuple[str, str]] = {ast.Add: ("+", "-"), ast.Sub: ("-", "+")}
COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
}
Place = tuple[int, int, int]
"""Line from 1, first and last column from 0 in characters."""


@dataclass(frozen=True, order=True)
class Edit:
    """One line of a file, before and after; `rule` says what was done."""

    file: str
    line: int
    rule: str
    before: str
    after: str

    def apply(self, text: str) -> str:
        """The text with the line replaced. ValueError when it does not hold the line."""
        lines = text.splitlines(keepends=True)
        if lines[self.line - 1].rstrip("\n") != self.before:
            raise ValueError(f"{self.file}:{self.line} is no longer {self.before.strip()!r}")
        lines[self.line - 1] = lines[self.line - 1].replace(self.before, self.after)
        return "".join(lines)


def edits_of(text: str, file: str = "") -> list[Edit]:
    """Every edit that the rules allow in a source, in order; each changes one line and its meaning, and parses.

    sign: + and -, a minus dropped. comparison: < and <=, > and >=, == and !=. constant: an integer one more, a float
    doubled, 0.0 one, True and False. detach: `.detach()` dropped, no_grad made enable_grad. swap: two arguments by
    position exchanged. refusal: the condition of an `if` that only raises made False. Messages, annotations, assertions
    and docstrings are left alone.
    """
    return [edit for edit in _candidates(text, file) if _means_another(edit, text)]


def draw(files: Sequence[tuple[str, Path]], count: int, seed: int, room: str) -> list[Edit]:
    """`count` edits of (name, path) files without repetition, each rule as likely as the others; same for one seed."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in sorted(files)}
    rules: dict[str, list[Edit]] = {}
    for name, text in texts.items():
        for edit in _candidates(text, name):
            rules.setdefault(edit.rule, []).append(edit)
    chance = random.Random(f"{seed} {room}")
    drawn: list[Edit] = []
    while rules and len(drawn) < count:
        rule = chance.choice(sorted(rules))
        edit = rules[rule].pop(chance.randrange(len(rules[rule])))
        if not rules[rule]:
            del rules[rule]
        # Parsed when drawn: all of a room's would take minutes.
        if _means_another(edit, texts[edit.file]):
            drawn.append(edit)
    return drawn


def _candidates(text: str, file: str) -> list[Edit]:
    """Edits in order, some of which may not parse."""
    lines, found = text.splitlines(), set()
    for rule, (number, start, stop), new in _changes(ast.parse(text), lines):
        before = lines[number - 1]
        after = before[:start] + new + before[stop:]
        if after != before:
            found.add(Edit(file, number, rule, before, after))
    return sorted(found)


def _means_another(edit: Edit, text: str) -> bool:
    try:
        return ast.dump(ast.parse(edit.apply(text))) != ast.dump(ast.parse(text))
    except SyntaxError:
        return False


def _changes(tree: ast.Module, lines: Sequence[str]) -> Iterator[tuple[str, Place, str]]:
    for node in _looked_at(tree):
        if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
            yield from _operator("sign", node.left, node.right, SIGNS[type(node.op)], lines)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield from _only("sign", _within(node, lines), lambda s: s.removeprefix("-").strip(), lines)
        elif isinstance(node, ast.Compare):
            for (left, right), op in zip(pairwise([node.left, *node.comparators]), node.ops, strict=True):
                if type(op) in COMPARISONS:
                    yield from _operator("comparison", left, right, COMPARISONS[type(op)], lines)
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            yield from _only("constant", _within(node, lines), lambda _, v=node.value: _other(v), lines)
        elif isinstance(node, ast.Call):
            yield from _calls(node, lines)
        elif isinstance(node, ast.If) and not node.orelse and [type(n) for n in node.body] == [ast.Raise]:
            yield from _only("refusal", _within(node.test, lines), lambda _: "False", lines)
    for number, line in enumerate(lines, 1):
        if line.strip() in ("with torch.no_grad():", "@torch.no_grad()"):
            start = line.index("no_grad")
            yield "detach", (number, start, start + len("no_grad")), "enable_grad"


def _calls(node: ast.Call, lines: Sequence[str]) -> Iterator[tuple[str, Place, str]]:
    called = node.func
    if isinstance(called, ast.Attribute) and called.attr == "detach" and not node.args:
        line, stop = node.end_lineno or 0, _column(lines, node.end_lineno, node.end_col_offset)
        start = lines[line - 1].rfind(".detach", 0, stop)
        if start >= 0:
            yield "detach", (line, start, stop), ""
    for a, b in pairwise(node.args):
        one, other = _within(a, lines), _within(b, lines)
        if one and other and one[0] == other[0] and not isinstance(a, ast.Starred) and not isinstance(b, ast.Starred):
            text = lines[one[0] - 1]
            between = text[one[2] : other[1]]
            yield "swap", (one[0], one[1], other[2]), text[other[1] : other[2]] + between + text[one[1] : one[2]]


def _looked_at(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes in whose place an edit says something about the code's behaviour."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "msg"):
            continue
        for child in value if isinstance(value, list) else [value]:
            # A message is not behaviour, and positions inside an f-string are not to be trusted.
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr):
                yield from _looked_at(child)


def _other(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return str(not value)
    return str(value + 1) if isinstance(value, int) else repr(value * 2 or 1.0)


def _only(
    rule: str, place: Place | None, change: Callable[[str], str], lines: Sequence[str]
) -> Iterator[tuple[str, Place, str]]:
    if place is not None:
        number, start, stop = place
        yield rule, place, change(lines[number - 1][start:stop])


def _operator(
    rule: str, left: ast.expr, right: ast.expr, signs: tuple[str, str], lines: Sequence[str]
) -> Iterator[tuple[str, Place, str]]:
    """The one operator between two operands that end and begin on one line."""
    if left.end_lineno != right.lineno:
        return
    number, start = right.lineno, _column(lines, left.end_lineno, left.end_col_offset)
    gap = lines[number - 1][start : _column(lines, right.lineno, right.col_offset)]
    where = gap.find(signs[0])
    if where >= 0:
        yield rule, (number, start + where, start + where + len(signs[0])), signs[1]


def _within(node: ast.expr, lines: Sequence[str]) -> Place | None:
    """Where a node stands, None where that is more than one line."""
    if node.lineno != node.end_lineno:
        return None
    start, stop = node.col_offset, node.end_col_offset
    return node.lineno, _column(lines, node.lineno, start), _column(lines, node.end_lineno, stop)


def _column(lines: Sequence[str], number: int | None, offset: int | None) -> int:
    """ast counts bytes of UTF-8."""
    return len(lines[(number or 1) - 1].encode()[: offset or 0].decode())
