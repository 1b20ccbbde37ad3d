"""The leaderboard: groups by needs, rows that replace their own, what has no place on it."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from board_rows import TEACHER, comparison, row
from pydantic import Field

from fewstep.bench.board import OWN, main, refuse, taken
from fewstep.bench.board_table import lines, table
from fewstep.bench.boards import BOARDS, GROUPS, Board, digest_of, group_of, ranked, settings_of
from fewstep.commands.compare.one_run import NEVER, identity, teacher_of
from fewstep.commands.judge import preset_of
from fewstep.commands.record import teacher_as_it_is
from fewstep.config import UserError, config
from fewstep.files import read_json
from fewstep.recipe.schema import Stage
from fewstep.recipe.store import load
from fewstep.train import bands
from fewstep.train.build import build_roles


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("digits-kd", 0),
        ("digits-sid", 0),
        ("toy/dmd2", 0),  # its first stage, which trains the teacher's copy on data, does not count
        ("digits-eve", 0),  # its teachers have names of their own
        ("digits-dmd2", 1),
        ("digits-cd", 1),
        ("digits-ladd", 1),  # the teacher is the discriminator's trunk
        ("digits-ect", 2),
        ("digits-tcm", 2),  # the first stage's student is no teacher
        ("toy/self-e", 2),
    ],
)
def test_rows_are_grouped_by_what_distilling_needs(name: str, group: int):
    assert group_of(load(name)) == GROUPS[group]


def test_only_students_of_the_datas_own_distribution_are_ranked():
    found = ranked(BOARDS["digits"])
    assert {"digits-dmd2", "digits-sid", "digits-imm"} <= set(found)
    assert not {"digits-teacher", "digits-dmd2-ink", "digits-x2-sid", "digits-x2-teacher", "digits-deblur-ibmd"} & set(
        found
    )


def test_a_row_replaces_its_own_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = comparison(tmp_path / "a.json", row("digits-kd", 3.0))
    other = comparison(tmp_path / "b.json", row("digits-cd", 2.0))
    again = comparison(tmp_path / "c.json", row("digits-kd", 1.0))
    main(["digits", "--take", str(first), str(other), str(again), "--out", str(tmp_path)])
    content = read_json(tmp_path / "board-digits.json")
    assert [(r["group"], r["metrics"]["FD (x)"]["value"]) for r in content["rows"]] == [
        ("digits-cd", 2.0),
        ("digits-kd", 1.0),
    ]
    assert len(content["teachers"]) == 1
    assert (tmp_path / "board-digits.png").stat().st_size > 1000
    told = capsys.readouterr().out
    cells = "| `digits-kd` | kd | 1 | 1.00 ± 0.25 | 2 | 75.0 % | 1.00 | 0.500 | 2.00 | 1,400 | 8 | 4 | 512 | 0123456 |"
    assert cells in told
    alone, beside = told.index(GROUPS[0]), told.index(GROUPS[1])
    assert alone < told.index(cells) < beside < told.index("`digits-cd`")
    assert "| teacher, 8 steps | 8 | 0.50 ± 0.25 |" in told
    missing = told[told.index("Not run: ") :]
    assert "`digits-sid`" in missing
    assert "`digits-kd`" not in missing


def test_a_row_says_what_its_runs_went_through(tmp_path: Path):
    file = tmp_path / "board-digits.json"
    gone = [{"recipe": "digits-kd", "seed": 2, "message": "no"}, {"recipe": "digits-sid", "seed": 0, "message": "no"}]
    made = comparison(tmp_path / "a.json", row("digits-kd", 1.0), run={"resumes": 2}, seeds=[0, 1, 2], failed=gone)
    told = table(BOARDS["digits"], taken(BOARDS["digits"], file, made))
    assert "| 2 of 3 |" in told
    assert "| 1,400 (interrupted) |" in told
    assert "Failed: `digits-sid`." in told
    assert "`digits-sid`" not in told[told.index("Not run: ") :]
    stale = comparison(tmp_path / "b.json", row("digits-kd", 1.0), run={"identity": "of before"})
    told = table(BOARDS["digits"], taken(BOARDS["digits"], file, stale))
    assert "Of an earlier recipe, to be made again: `digits-kd`." in told
    assert "1.00 ± 0.25" not in told
    # Its teacher's rows stay, with what they are of; its curve goes with it.
    assert "| teacher, 8 steps |" in told
    assert "5,000 samples, preset `digits`" in told
    assert lines(BOARDS["digits"], read_json(file)) == {}
    guided = comparison(tmp_path / "c.json", row("digits-tdd", 1.0))
    assert "| `digits-tdd` (guided) |" in table(BOARDS["digits"], taken(BOARDS["digits"], file, guided))


def test_the_teacher_may_be_measured_under_a_fitted_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which changes no recipe, so that the board takes it."""
    asked: list[list[str]] = []

    def compare(recipes: Any, budget: str, seeds: int, folder: Path, resume: bool, settings: list[str], *_: Any) -> Path:
        asked.append(settings)
        return comparison(tmp_path / "a.json", row("digits-kd", 1.0), settings=settings)

    monkeypatch.setattr("fewstep.bench.board.compare", compare)
    monkeypatch.setattr("fewstep.bench.board.dirty", lambda: False)
    main(["digits", "digits-kd", "--fitted", "--out", str(tmp_path)])
    main(["digits", "digits-kd", "--out", str(tmp_path)])
    assert asked == [["evaluate.metric=digits", "evaluate.fitted=true"], ["evaluate.metric=digits"]]
    assert len(read_json(tmp_path / "board-digits.json")["rows"]) == 1


def test_a_teacher_in_another_process_is_the_same_one_but_has_no_row(tmp_path: Path):
    board, file = BOARDS["digits"], tmp_path / "board-digits.json"
    names = ("digits-cd", "digits-imm")  # of which one has it as a flow
    recipes = [load(name) for name in names]
    told = [teacher_of(r, SimpleNamespace(roles=build_roles(r, r.data.open()))) for r in recipes]  # type: ignore[arg-type]
    assert told[0] is not None
    assert told[0] == told[1]
    taken(board, file, comparison(tmp_path / "a.json", row("digits-cd", 1.0)))
    before = read_json(file)["teachers"]
    other = row("teacher, 8 steps", 0.125, 8, training={}, group="")
    content = taken(board, file, comparison(tmp_path / "b.json", row("digits-imm", 1.0), teachers=[other]))
    assert content["teachers"] == before
    assert {r["group"] for r in content["rows"]} == set(names)
    failed = [{"recipe": "digits-imm", "seed": 0, "message": "no"}]
    content = taken(board, file, comparison(tmp_path / "c.json", teachers=[other], failed=failed))
    assert content["teachers"] == before
    both = comparison(tmp_path / "d.json", row("digits-cd", 1.0), teachers=[other], failed=failed)
    assert taken(board, file, both)["teachers"] == before  # which of the two it was measured with is not known
    # The ring's teacher is a flow by itself.
    assert [teacher_as_it_is([f"toy/{name}"]) for name in ("dmd2", "scd")] == [True, False]
    assert [teacher_as_it_is([name]) for name in names] == [True, False]
    assert not teacher_as_it_is(["digits-cd"], ["teacher.process={name: flow}"])
    with pytest.raises(UserError, match="--fitted: digits-imm has its teacher in another process"):
        main(["digits", "digits-imm", "--fitted", "--out", str(tmp_path)])


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_takes_what_a_comparison_of_its_recipes_measures(name: str):
    """`fewstep compare` keeps each recipe's own seed of samples, which is part of the protocol."""
    board, told = BOARDS[name], {"budget": OWN, "settings": settings_of(BOARDS[name]), "teachers": []}
    for recipe in ranked(board):
        spec = load(recipe, settings_of(board)).evaluate
        assert spec is not None
        made = preset_of(replace(spec, samples=board.samples))
        refuse(board, told | {"rows": [row(recipe, 1.0, preset_hash=made.hash)]}, Path("x"))
        with pytest.raises(UserError, match="is measured by"):
            refuse(board, told | {"rows": [row(recipe, 1.0, preset_hash=replace(made, first_seed=1).hash)]}, Path("x"))


def test_a_board_of_another_teacher_has_no_row_of_the_earlier_one(tmp_path: Path):
    board, file = BOARDS["digits"], tmp_path / "board-digits.json"
    taken(board, file, comparison(tmp_path / "a.json", row("digits-kd", 1.0)), busy=True)
    other = [row("teacher, 1 step", 9.0, training={}, group="")]
    changed = comparison(
        tmp_path / "b.json", row("digits-kd", 1.0), run={"teacher": TEACHER | {"sha256": "u"}}, teachers=other
    )
    content = taken(board, file, changed, busy=True)
    assert [r["name"] for r in content["teachers"]] == ["teacher, 1 step"]


def test_what_is_no_row_of_a_board_is_refused(tmp_path: Path):
    board, file = BOARDS["digits"], tmp_path / "board-digits.json"
    taken(board, file, comparison(tmp_path / "a.json", row("digits-kd", 3.0)))
    before = file.read_bytes()
    machine = {"commit": "c", "torch": "2", "device": "CPU", "threads": "2", "machine": "m"}
    wrong: dict[str, dict[str, Any]] = {
        "is a comparison under 250 updates; a board takes --budget own": {"budget": "250 updates"},
        r"changes the recipes \(train.batch=8\)": {"settings": ["train.batch=8"]},
        r"changes the recipes \(evaluate.guidance=2\)": {"settings": ["evaluate.guidance=2"]},
        "digits-cd is measured by digits with 100 samples; this board takes digits with 5,000": {
            "rows": [row("digits-cd", 1.0, preset_hash="b", number=100)]
        },
        "toy/cd has no place on this board": {"rows": [row("toy/cd", 1.0)]},
        "was trained in a changed checkout of 0123456; commit first": {"run": {"commit": "0123456789-dirty"}},
        "had other weights as its teacher than the rows of board-digits.json": {
            "run": {"teacher": TEACHER | {"sha256": "u"}}
        },
        "'threads': '2'.*are of .*'threads': '1'.*; a board is of one machine": {"environment": machine},
    }
    for message, change in wrong.items():
        with pytest.raises(UserError, match=message):
            taken(board, file, comparison(tmp_path / "b.json", row("digits-cd", 2.0), **change))
    mixed = json.loads(comparison(tmp_path / "b.json", row("digits-cd", 2.0)).read_text())
    mixed["runs"].append(mixed["runs"][0] | {"commit": "another"})
    (tmp_path / "b.json").write_text(json.dumps(mixed))
    with pytest.raises(UserError, match="the runs of digits-cd are of several commits or recipes; train them together"):
        taken(board, file, tmp_path / "b.json")
    del mixed["runs"][0]["identity"], mixed["runs"][1]
    (tmp_path / "b.json").write_text(json.dumps(mixed))
    with pytest.raises(UserError, match="its runs do not tell their identity; compare again"):
        taken(board, file, tmp_path / "b.json")
    with pytest.raises(UserError, match="digits-teacher: has no place on the board digits; those that have: digits-any"):
        main(["digits", "digits-teacher", "--out", str(tmp_path)])
    assert file.read_bytes() == before


def test_one_recipe_that_fails_takes_no_other_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = comparison(tmp_path / "a.json", row("digits-kd", 1.0))

    def measured(board: Board, name: str, *_: Any) -> Path:
        if name == "digits-sid":
            raise UserError("no run succeeded")
        return made

    monkeypatch.setattr("fewstep.bench.board.measured", measured)
    monkeypatch.setattr("fewstep.bench.board.dirty", lambda: False)
    with pytest.raises(SystemExit, match="digits-sid: no run succeeded"):
        main(["digits", "digits-sid", "digits-kd", "--out", str(tmp_path)])
    assert [r["group"] for r in read_json(tmp_path / "board-digits.json")["rows"]] == ["digits-kd"]
    monkeypatch.setattr("fewstep.bench.board.dirty", lambda: True)
    with pytest.raises(UserError, match="the checkout has changes"):
        main(["digits", "digits-kd", "--out", str(tmp_path)])


def test_a_board_without_rows_says_what_was_not_run():
    told = table(BOARDS["toy"], {"rows": [], "teachers": [], "failed": []})
    assert "Not run: `toy/anyflow`" in told


def test_bands_of_other_runs_make_no_other_recipe():
    recipe = load("digits-dmd2", list(NEVER))
    assert recipe.expected is not None
    assert identity(replace(recipe, expected=None, results=(), about="")) == identity(recipe) == digest_of("digits-dmd2")
    assert identity(replace(recipe, train=replace(recipe.train, steps=1))) != identity(recipe)


@config
class Longer(Stage):
    """A stage as it may be some day."""

    off: dict[str, float] | None = None
    more: tuple[float, ...] = ()
    also: dict[str, float] = Field(default_factory=dict)


@pytest.mark.parametrize("of", [identity, lambda recipe: bands.identity(recipe, {})])
def test_a_key_that_is_new_and_off_makes_no_other_recipe(of: Any):
    recipe = load("digits-dmd2-kd", list(NEVER))
    (stage,) = recipe.before

    def later(**keys: Any) -> str:
        found = load("digits-dmd2-kd", list(NEVER))
        held = {f.name: getattr(stage, f.name) for f in fields(stage)}
        object.__setattr__(found, "before", (Longer(**held, **keys),))
        return str(of(found))

    assert later() == str(of(recipe))
    assert len({later(), later(off={}), later(off={"a": 0.0}), later(more=(0.0,)), later(also={"a": 0.0})}) == 5


@pytest.mark.parametrize("of", [identity, lambda recipe: bands.identity(recipe, {})])
def test_false_is_not_null_to_a_digest(of: Any):
    # Null takes what the encoder says of empty prompts.
    recipes = [load("paper/dmd2-sdxl-4step", [f"data.zeros={zeros}"]) for zeros in ("null", "false", "true")]
    assert len({str(of(r)) for r in recipes}) == 3


def test_a_board_tells_what_its_number_of_samples_costs(tmp_path: Path):
    made = comparison(tmp_path / "a.json", row("digits-kd", 1.0))
    content = taken(BOARDS["digits"], tmp_path / "board-digits.json", made)
    (teacher,) = content["teachers"]
    assert "perfect samples" not in table(BOARDS["digits"], content)
    worse = json.loads(json.dumps(teacher))
    for r, value, bias in ((teacher, 0.5, 0.36), (worse, 9.0, 0.24)):
        (entry,) = [v for k, v in r["metrics"].items() if k.startswith("FD")]
        entry |= {"value": value, "bias": bias}
    content["teachers"] = [worse, teacher]
    assert "As many perfect samples would have a distance of about 0.36" in table(BOARDS["digits"], content)
    assert "fitted for as few calls: none, as one call leaves nothing to fit" in table(BOARDS["digits"], content)
    content["rows"][0]["steps"] = 4
    assert "With a sampler fitted for as few calls: not run" in table(BOARDS["digits"], content)
    worse["training"] = {"method": "fitted"}
    assert "With a sampler fitted" not in table(BOARDS["digits"], content)
