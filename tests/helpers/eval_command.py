"""`fewstep eval` as a test calls it, in this process."""

from __future__ import annotations

from typing import Any

import pytest
from calling import called


def eval_refusal(capfd: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The message of a call that is refused: exit code 2 and no traceback."""
    code, out, err = called(capfd, "eval", *arguments)
    assert code == 2, out + err
    assert "Traceback" not in out + err
    return err[err.index("error: ") :].removeprefix("error: ").strip()
