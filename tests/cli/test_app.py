"""Commands take what their functions say, wrapped or not."""

from __future__ import annotations

import pytest
from typer.main import get_command

from fewstep.cli import app


@pytest.mark.parametrize("path", ["run", "plan", "recipes show", "recipes check"])
def test_settings_are_arguments_of_every_command_that_has_them(path: str):
    command = get_command(app)
    for name in path.split():
        command = command.commands[name]  # type: ignore[attr-defined]
    assert next(p.nargs for p in command.params if p.name == "settings") == -1
