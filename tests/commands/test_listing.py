"""What ships is listed one a line, whole in a pipe and readable on any terminal, and found by words and by method."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fewstep.cli import main
from fewstep.commands.methods import list_methods
from fewstep.commands.recipes import list_recipes
from fewstep.commands.write_recipe import LINE, own_copy
from fewstep.config import RecipeError, UserError
from fewstep.recipe.cards import cards
from fewstep.recipe.source import outlines, read, shipped
from fewstep.recipe.store import load


def printed(job: Callable[..., None], *arguments: Any, width: int = 80, terminal: bool = False, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    with console.capture() as shown:
        job(*arguments, **options, console=console)
    return shown.get()


def test_outlines_say_what_the_merged_files_say():
    rows = outlines()
    assert [r["name"] for r in rows] == list(shipped())
    for row in rows:
        data = read(row["name"]).data
        method = data.get("method", {})
        assert row["methods"][0] == method.get("name", ""), row["name"]
        assert (row["about"], row["results"]) == (data.get("about", ""), data.get("results", [])), row["name"]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_recipe_is_a_line(terminal: bool, width: int):
    lines = printed(list_recipes, width=width, terminal=terminal).splitlines()
    names = [line.split()[0] for line in lines]
    assert names == ["recipe"] * terminal + list(shipped())
    about = next(line for line in lines if line.startswith("paper/dmd2-sdxl-4step-lora"))
    if terminal:
        assert all(len(line) <= width for line in lines)
        assert "DMD2 of SDXL" in about
    else:
        assert about.endswith("DMD2 of SDXL to four steps, the student a LoRA set (paper settings, not run here)")


def test_words_and_methods_filter():
    found = printed(list_recipes, ["SDXL", "lora"]).splitlines()
    assert found
    assert all("sdxl" in line.lower() and "lora" in line.lower() for line in found)
    assert len(found) < len(printed(list_recipes, ["sdxl"]).splitlines())
    rows = json.loads(printed(list_recipes, [], "dmd2", True))
    assert {"digits-dmd2", "paper/dmd2-sd15"} <= {r["name"] for r in rows}
    assert all("dmd2" in r["methods"] for r in rows)
    assert next(r for r in rows if r["name"] == "digits-dmd2")["results"][0]["source"] == "measured"
    # A paper's name stands for its method.
    assert printed(list_recipes, [], "lcm") == printed(list_recipes, [], "consistency")
    with pytest.raises(UserError, match=r"no shipped recipe has 'nothing like it'; .* lists all \d+"):
        list_recipes(["nothing like it"])
    with pytest.raises(RecipeError, match="did you mean 'meanflow'"):
        list_recipes([], "meanflwo")


def test_methods_likewise():
    lines = printed(list_methods).splitlines()
    assert [line.split()[0] for line in lines] == sorted(cards())
    assert all(len(x) <= 80 for x in printed(list_methods, terminal=True).splitlines())
    assert [line.split()[0] for line in printed(list_methods, ["swiftbrush"]).splitlines()] == ["vsd"]
    assert {"name", "title", "needs", "aliases", "cites"} == set(json.loads(printed(list_methods, [], True))[0])
    with pytest.raises(UserError, match="no method has 'zebra'"):
        list_methods(["zebra"])


@pytest.mark.parametrize("name", ["digits-dmd2", "toy/dmd2", "paper/dmd2-sdxl-4step-lora", "emoji-dmd2"])
def test_a_copy_is_the_recipe_without_what_was_measured_of_it(name: str, tmp_path: Path):
    to = tmp_path / "mine.yaml"
    with pytest.raises(SystemExit) as caught:
        main(["recipes", "cp", name, str(to)])
    assert caught.value.code == 0
    copy, text = load(str(to)), to.read_text()
    assert copy.results == ()
    assert copy.expected is None
    assert ("#" in text.removeprefix(LINE)) == name.startswith("paper/")  # where published settings are from stays
    ours, theirs = (yaml.safe_load(t) for t in (text, shipped()[name].read_text()))
    for key in ("results", "expected"):
        theirs.pop(key, None)
    assert ours == theirs


def test_comments_go_and_marks_in_quotes_stay():
    text = 'about: "a # b"  # of digits\n# all of it\nresults:\n  - {metric: FD}\n\n  # more\ntrain: {steps: 3}\n'
    assert own_copy(text, sources=False) == 'about: "a # b"\ntrain: {steps: 3}\n'
    assert own_copy(text, sources=True) == 'about: "a # b"  # of digits\n# all of it\ntrain: {steps: 3}\n'
