"""The command line as a test calls it, in this process."""

from __future__ import annotations

from typing import Any

import pytest

from fewstep.cli import main


def called(capfd: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, what was printed, and what was printed of errors."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0), *capfd.readouterr()
