"""Options that several commands read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fewstep.config import UserError
from fewstep.train.product import check_step_count


def parse_classes(text: str, classes: int) -> list[int]:
    """'0-9', '3' or '1,4,7-9' as class numbers; UserError when out of range."""
    if not classes:
        raise UserError("--classes: this model is unconditional")
    out: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
            raise UserError(f"--classes {text!r}: expected numbers and ranges such as 0-9 or 1,4,7")
        a, b = (_number(n, f"--classes {text!r}") for n in (first, last or first))
        if a >= classes or b >= classes:  # before a range of them is made
            raise UserError(f"--classes {text!r}: classes are 0..{classes - 1}, not {a if a >= classes else b}")
        out += range(a, b + 1)
    if not out:
        raise UserError(f"--classes {text!r}: classes are 0..{classes - 1}")
    return out


def parse_steps(text: str | None, option: str = "--steps") -> tuple[int, ...]:
    """'4' or '1,2,4' as numbers of steps; UserError names what is not one."""
    pieces = [] if text is None else [p.strip() for p in text.split(",")]
    wrong = [p for p in pieces if not (p.isascii() and p.isdigit() and p.strip("0"))]
    if wrong:
        raise UserError(f"{option} {text!r}: expected whole numbers of at least 1 such as 1,2,4, not {wrong[0]!r}")
    numbers = {_number(p, option) for p in pieces}
    for n in numbers:
        check_step_count(n, option)
    return tuple(sorted(numbers))


def _number(digits: str, what: str) -> int:
    """A number of digits; UserError for more of them than any count has."""
    if len(digits) > 18:
        raise UserError(f"{what}: {digits[:18]}... is no number that can be meant")
    return int(digits)


SAMPLES = 100_000
"""Most pictures of one sheet."""
VALUES = 1 << 30
"""Most numbers of one sheet's samples, 4 GiB in float32."""


def check_sheet(count: int, shape: Sequence[int]) -> None:
    """UserError for a number of samples that no sheet shows, or whose memory is better spent by `fewstep eval`."""
    most = min(SAMPLES, VALUES // max(1, math.prod(shape)))
    if not 1 <= count <= most:
        raise UserError(f"--count {count}: expected 1 to {most} samples of {list(shape)} on a sheet")
