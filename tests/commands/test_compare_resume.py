"""An interrupted comparison prints the command that continues it, and refuses one that would not."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.commands.compare import compare


def test_the_command_that_continues_is_the_whole_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def stop(tasks: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_all", stop)
    first = ["compare", "toy/kd", "--budget", "updates=4", "--seeds", "1", "--samples", "64"]
    first += ["--steps", "1,2", "--set", "train.batch=6", "--out", str(tmp_path / "out")]

    def told(arguments: list[str], code: int) -> str:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        out, err = capfd.readouterr()
        assert caught.value.code == code, out + err
        return out + err

    line = told(first, 130).partition("continue with: ")[2].splitlines()[0]
    again = shlex.split(line)[1:]
    assert set(again) == {*first, "--resume"}
    assert told(again, 130).partition("continue with: ")[2].splitlines()[0] == line
    other = [a if a != "1,2" else "1,2,4" for a in again]
    assert "is a comparison with another steps" in told(other, 2)
