"""Method cards, the bibliography and the commands that print them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import fewstep
from fewstep.cards import card, cards, cite, listing, show, table
from fewstep.cli import app
from fewstep.config import REGISTRY, RecipeError
from fewstep.recipe import shipped

ROOT = Path(fewstep.__file__).parent


def test_every_method_has_a_card_and_every_card_points_at_code_that_exists():
    assert set(REGISTRY["method"]) <= set(cards())
    for c in cards().values():
        files = re.findall(r"fewstep/[a-z_0-9/]+\.py", c.code)
        assert files, c.name
        assert all((ROOT.parent / f).is_file() for f in files), c.code
        for recipe in re.findall(r"toy/[a-z0-9-]+", c.code):
            assert recipe in shipped(), c.code
        if c.name in REGISTRY["method"]:
            assert set(c.cites) & set(REGISTRY["method"][c.name].cites), c.name


def test_a_number_in_a_card_says_where_it_comes_from():
    for c in cards().values():
        assert all(r.source == "paper" for r in c.paper_results)
        assert all(r.commit and r.updates > 0 and r.seeds > 0 for r in c.our_results)


def test_show_prints_the_deviations_and_says_when_nothing_was_measured():
    text = show("uni_instruct")
    assert "released code" in text
    assert "arXiv 2505.20755" in text
    unmeasured = next(c.name for c in cards().values() if not c.our_results)
    assert "none measured yet" in show(unmeasured)
    with pytest.raises(RecipeError, match="did you mean 'phased_dmd'"):
        card("phased_dm")


def test_cite_covers_every_stage_and_the_parts_of_a_joint_method():
    text = cite("toy/joint")
    ids = re.findall(r"eprint = \{(.*?)\}", text)
    assert ids == ["2510.08431", "2405.14867", "2311.18828", "2206.00364"]
    assert text.count("@misc{") == 4
    assert text.count("{") == text.count("}")
    entry = cite("toy/sid").split("\n\n")[0]
    assert "title = {{Score identity Distillation: Exponentially Fast" in entry


def test_bibliography_is_complete_enough_and_has_unique_keys():
    known = yaml.safe_load((ROOT / "methods" / "bibliography.yaml").read_text())
    assert len({v[0] for v in known.values()}) == len(known)
    assert all(re.fullmatch(r"\d{4}\.\d{5}", k) and len(v) == 3 for k, v in known.items())


def test_commands_list_show_and_cite():
    run = CliRunner()
    listed = run.invoke(app, ["methods", "ls"])
    assert listed.exit_code == 0
    assert "phased_dmd" in listed.output
    shown = run.invoke(app, ["methods", "show", "vsd"])
    assert "SwiftBrush" in shown.output
    cited = run.invoke(app, ["cite", "toy/dmd2"])
    assert cited.output.startswith("@misc{yin2024improved")
    assert {row[0] for row in listing()} >= set(REGISTRY["method"])
    assert table().count("\n") == len(cards()) + 1
