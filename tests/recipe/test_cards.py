"""Method cards, the bibliography and the commands that print them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import fewstep
from fewstep.cli import app
from fewstep.config import REGISTRY, RecipeError
from fewstep.recipe.cards import card, cards, cite, listing, places, show, table
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load

ROOT = Path(fewstep.__file__).parent


def test_every_method_has_a_card_and_every_card_points_at_code_that_exists():
    assert set(REGISTRY["method"]) <= set(cards())
    for c in cards().values():
        files = re.findall(r"fewstep/[a-z_0-9/]+\.py", c.code)
        assert files, c.name
        assert all((ROOT.parent / f).is_file() for f in files), c.code
        # `places` raises for a name that its file does not define.
        assert any(line for _, _, line in places(c)), c.code
        for recipe in re.findall(r"toy/[a-z0-9-]+", c.code):
            assert recipe in shipped(), c.code
        if c.name in REGISTRY["method"]:
            assert set(c.cites) & set(REGISTRY["method"][c.name].cites), c.name


def test_a_number_in_a_card_says_where_it_comes_from():
    for c in cards().values():
        assert all(r.source in ("paper", "paper, from memory") for r in c.paper_results)
        assert all(r.commit and r.updates > 0 and r.seeds > 0 for r in c.our_results)


def test_show_prints_the_deviations_and_says_when_nothing_was_measured():
    text = show("uni_instruct")
    assert "released code" in text
    assert "arXiv 2505.20755" in text
    for c in cards().values():
        assert ("\n  compared with\n" in show(c.name)) != (f"\n  not compared: {c.not_compared}\n" in show(c.name))
    with pytest.raises(RecipeError, match="did you mean 'phased_dmd'"):
        card("phased_dm")


def test_every_card_has_a_number_of_ours_and_none_is_written_by_hand(monkeypatch: pytest.MonkeyPatch):
    assert [c.name for c in cards().values() if not c.our_results] == []
    for path in (ROOT / "methods" / "cards").glob("*.yaml"):
        assert "our_results" not in yaml.safe_load(path.read_text()), path.name
    bare = replace(card("dmd2"), our_results=())
    monkeypatch.setattr("fewstep.recipe.cards.card", lambda name: bare)
    assert "none measured yet" in show("dmd2")


def test_a_number_goes_to_the_card_of_the_recipes_name_or_alias_before_its_methods():
    for recipe, method, owner in (
        ("digits-disback", "vsd", "track"),
        ("toy/multi-student", "dmd2", "multi_student"),
        ("digits-dmd2-4step", "dmd2", "dmd2"),
        ("digits-sfd-v", "sfd", "sfd"),
        ("fashion-cd", "consistency", "consistency"),
    ):
        settings = [r.setting.split()[0] for r in cards()[owner].our_results]
        assert recipe in settings, recipe
        assert owner == method or recipe not in [r.setting for r in cards()[method].our_results]


def test_a_card_says_what_it_was_compared_with_or_why_not():
    for c in cards().values():
        for r in c.compared:
            assert re.search(r"[\w-]+/[\w-]+ @ [0-9a-f]{7}\b", r.reference), c.name
            assert re.search(r"\d", r.difference), c.name
    own = card("dmd2")
    for wrong in ({"compared": own.compared, "not_compared": "x"}, {"compared": (), "not_compared": ""}):
        with pytest.raises(ValueError, match="give compared or not_compared"):
            replace(own, **wrong)


def test_code_is_shown_with_the_line_of_the_function():
    for name, want in (("dmd2", "DMD2.gradient"), ("self_e", "SelfE"), ("phased_dmd", "add_noise")):
        file, line = re.search(rf"(fewstep/[\w/]+\.py):(\d+) {want}\b", show(name)).groups()
        text = (ROOT.parent / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {want.split('.')[-1]}\b", text), text
    gone = replace(card("dmd2"), code="fewstep/methods/dmd2.py:DMD2.gradiant")
    with pytest.raises(RecipeError, match=r"dmd2.yaml: code: .*dmd2.py defines no 'DMD2.gradiant'.*DMD2.gradient"):
        places(gone)


ALIASES = {
    "vsd": "swiftbrush diff-instruct pg-sb",
    "track": "disback",
    "contiguous": "ppcl",
    "factorised": "eve",
    "kd": "get",
    "sid": "sim inverse-matching sida",
    "consistency": "cd ct ict ect lcm codi",
    "ctm": "traflow",
    "segments": "tscd pcm",
    "meanflow": "ayf",
    "joint": "rcm",
    "scm": "scd sct tbcm",
    "multi_student": "multi-student",
}


def test_a_card_is_found_by_the_names_of_the_papers_and_of_the_toy_recipes():
    for name, others in ALIASES.items():
        assert {card(other).name for other in others.split()} == {name}
    every = [a for c in cards().values() for a in c.aliases]
    assert len(every) == len(set(every))
    assert not set(every) & set(cards())
    for recipe in shipped():
        assert not recipe.startswith("toy/") or card(recipe.removeprefix("toy/"))
    assert "covers     swiftbrush" in show("swiftbrush")
    with pytest.raises(RecipeError, match="did you mean 'swiftbrush'"):
        card("swiftbrsh")


SCORE = [
    "class_ratio",
    "decoupled_dmd",
    "dmd",
    "dmd2",
    "emd",
    "f_distill",
    "gdd",
    "ladd",
    "sid",
    "track",
    "uni_instruct",
    "vsd",
]


def test_the_networks_of_a_score_method_are_those_of_its_roles():
    for name in SCORE:
        needs = REGISTRY["method"][name]().needs()
        heads = {"discriminator"} & needs.roles
        # Heads stand on a network: the critic where there is one, else the frozen teacher.
        trunk = {"teacher"} if heads and "critic" not in needs.roles else set()
        held, trained = needs.roles - heads | trunk, needs.trained - heads
        assert cards()[name].networks == (len(held), len(trained)), name
        assert f"{len(held)} networks, {len(trained)} trained: {len(held)}x weights" in show(name)
    phased: Any = load("toy/phased-dmd").student
    assert cards()["phased_dmd"].networks == (2 + len(phased.boundaries) + 1, 2)
    several: Any = load("toy/multi-student").student
    assert cards()["multi_student"].networks == (1 + 2 * several.members, 2 * several.members)


@pytest.mark.parametrize("text", ["a: [1", "just words", "name: x", "name: 3\ntitle: [", "paper_results: 5"])
def test_a_card_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "mine.yaml").write_text(text)
    monkeypatch.setattr("fewstep.recipe.cards._folder", lambda: tmp_path)
    cards.cache_clear()
    try:
        with pytest.raises(RecipeError, match=r"^mine\.yaml: "):
            cards()
    finally:
        cards.cache_clear()


def test_cite_covers_every_stage_and_the_parts_of_a_joint_method():
    text = cite("toy/joint")
    ids = re.findall(r"eprint = \{(.*?)\}", text)
    assert ids == ["2510.08431", "2405.14867", "2311.18828", "2206.00364"]
    assert text.count("@misc{") == 4
    assert text.count("{") == text.count("}")
    # GET is cited where its loss is asked for.
    assert [("2401.08639" in cite(name), "2101.02388" in cite(name)) for name in ("digits-get", "digits-kd")] == [
        (True, True),
        (False, True),
    ]
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
    assert {row["name"] for row in listing()} >= set(REGISTRY["method"])
    assert table().count("\n") == len(cards()) + 1
