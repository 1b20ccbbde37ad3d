"""Options that several commands read."""

from __future__ import annotations

from fewstep.config import UserError


def parse_classes(text: str, classes: int) -> list[int]:
    """'0-9', '3' or '1,4,7-9' as class numbers; UserError when out of range."""
    if not classes:
        raise UserError("--classes: this model is unconditional")
    out: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
            raise UserError(f"--classes {text!r}: expected numbers and ranges such as 0-9 or 1,4,7")
        out += range(int(first), int(last or first) + 1)
    wrong = [c for c in out if not 0 <= c < classes]
    if wrong or not out:
        raise UserError(f"--classes {text!r}: classes are 0..{classes - 1}" + (f", not {wrong[0]}" if wrong else ""))
    return out


def parse_steps(text: str | None, option: str = "--steps") -> tuple[int, ...]:
    """'4' or '1,2,4' as numbers of steps; UserError names what is not one."""
    pieces = [] if text is None else [p.strip() for p in text.split(",")]
    wrong = [p for p in pieces if not (p.isascii() and p.isdigit() and int(p) > 0)]
    if wrong:
        raise UserError(f"{option} {text!r}: expected whole numbers of at least 1 such as 1,2,4, not {wrong[0]!r}")
    return tuple(sorted({int(p) for p in pieces}))
