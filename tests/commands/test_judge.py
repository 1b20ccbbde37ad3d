"""Which errors of a measurement are the user's to mend, and which keep their traceback."""

from __future__ import annotations

import pytest

from fewstep.commands import judge
from fewstep.config import UserError
from fewstep.eval.errors import InputError
from fewstep.eval.protocol.preset import load_preset


@pytest.mark.parametrize("error", [InputError, FileNotFoundError, PermissionError, ModuleNotFoundError])
def test_what_was_given_wrong_is_one_message(error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise error("there: not what it should be")

    monkeypatch.setattr(judge, "preset_reference", refuse)
    with pytest.raises(UserError, match=r"^there: not what it should be$"):
        judge.open_judge(load_preset("energy"), {})


@pytest.mark.parametrize("error", [ValueError, ZeroDivisionError, KeyError, RuntimeError])
def test_an_error_of_the_code_stays_what_it_is(error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise error("a mistake")

    monkeypatch.setattr(judge, "preset_reference", broken)
    with pytest.raises(error, match="a mistake"):
        judge.open_judge(load_preset("energy"), {})


def test_a_preset_that_is_not_there_and_one_that_is_no_yaml_are_the_users(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    for name, why in (("nothing", "not one of"), (str(tmp_path / "bad.yaml"), "not YAML")):
        with pytest.raises((FileNotFoundError, InputError), match=why):
            load_preset(name)
