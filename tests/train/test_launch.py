"""What stands in the environment where a launcher tells of its group."""

from __future__ import annotations

import pytest

from fewstep.commands.processes import world
from fewstep.config import UserError
from fewstep.train.launch import RANKS, SIZES, launched
from fewstep.train.session import _accelerator


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SIZES, *RANKS, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", [*SIZES, *RANKS])
@pytest.mark.parametrize("text", ["abc", "", "1.5", "-7", "9" * 5000, "²"])
def test_what_is_no_number_is_named_before_anybody_reads_it(name: str, text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, text)
    for read in (launched, lambda: _accelerator(True, "fp32"), lambda: world().__enter__()):
        with pytest.raises(UserError) as told:
            read()
        assert str(told.value).startswith(
            f"{name} is {text[:40]!r} in the environment, where launchers put a whole number"
        )


def test_a_rank_lies_in_its_group(monkeypatch: pytest.MonkeyPatch):
    assert launched() == 1
    for name, value in {"RANK": "1", "LOCAL_RANK": "-1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched() == 2
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK is 2, but WORLD_SIZE is 2, so ranks are 0 to 1"):
        launched()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "abc")
    with pytest.raises(UserError, match="MASTER_PORT is 'abc'"):
        launched()
