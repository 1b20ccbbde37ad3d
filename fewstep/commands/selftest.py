"""`fewstep eval --selftest`: the harness checked on this machine."""

from __future__ import annotations

from fewstep.commands.report import console
from fewstep.config import UserError


def check() -> None:
    """Print every check; UserError when one fails."""
    from fewstep.eval.tools.selftest import selftest

    checks, rows = selftest()
    for c in checks:
        state = f"skipped: {c.skipped}" if c.skipped else ("ok" if c.passed else "FAILED")
        console.print(f"{c.name}: {c.deviation:.2g} (allowed {c.allowed:.2g}) {state}", soft_wrap=True)
    for row in rows:
        console.print(f"FD after {row.step}: {row.value:.4g} ({row.change:+.4g})", soft_wrap=True)
    failed = [c.name for c in checks if not c.passed and not c.skipped]
    if failed:
        raise UserError(f"selftest: {len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}")
