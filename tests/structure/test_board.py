"""The leaderboard: groups by needs, rows that replace their own, what has no place on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import Field

from fewstep.bench.board import OWN, main, measured, refuse, taken, was_busy
from fewstep.bench.board_table import lines, table
from fewstep.bench.boards import BOARDS, GROUPS, Board, digest_of, group_of, ranked, settings_of
from fewstep.bench.pace import TIMED, pace
from fewstep.commands.compare.one_run import NEVER, identity, teacher_of
from fewstep.commands.judge import preset_of
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


MACHINE = {"torch": "2", "device": "CPU", "threads": "1", "machine": "m"}
HASH = preset_of(replace(load("digits-dmd2").evaluate, metric="digits", samples=5000)).hash  # type: ignore[type-var]
TEACHER = {"path": "assets:digits-teacher", "sha256": "t"}


def row(name: str, value: float, steps: int = 1, **more: Any) -> dict[str, Any]:
    metrics = {
        "FD (x)": {
            "value": value,
            "standard_error": 0.25,
            "values": [value, value],
            "spread": 0.1,
            "sampling_error": 0.2,
        },
        "recall (x, k=5)": {"value": 0.5},
        "class accuracy (x)": {"value": 0.75},
        "within-class diversity (x)": {"value": 1.0},
    }
    training = {
        "method": "kd",
        "updates": 1400,
        "seconds": 9.0,
        "cpu_seconds": 8.0,
        "network_calls": 7,
        "peak_memory_mib": 512.0,
        "settled_cpu_seconds": 4.0,
    }
    return {
        "name": name,
        "group": name,
        "preset": "digits",
        "preset_hash": HASH,
        "extractor": "x",
        "number": 5000,
        "metrics": metrics,
        "calls": steps,
        "steps": steps,
        "latency": [],
        "seconds": 2.0,
        "training": training,
    } | more


def comparison(path: Path, *rows: dict[str, Any], run: Mapping[str, Any] | None = None, **more: Any) -> Path:
    """A file as `fewstep compare --budget own` writes it; run: what is otherwise in its runs."""
    teacher = row("teacher, 8 steps", 0.5, 8, training={}, group="")
    points = [{"updates": u, "cpu_seconds": u, "value": 9.0 / u} for u in (1, 2)]
    runs = [
        {
            "recipe": r["group"],
            "curve": points,
            "commit": "0123456789",
            "identity": digest_of(r["group"]) if r["group"] in ranked(BOARDS["digits"]) else "",
            "resumes": 0,
            "teacher": TEACHER,
        }
        | (run or {})
        for r in rows
    ]
    content: dict[str, Any] = {
        "budget": "the recipe's own updates",
        "seeds": [0, 1],
        "settings": ["evaluate.metric=digits"],
        "environment": MACHINE | {"commit": "of today"},
        "rows": [r | {"rank": 1, "difference": None} for r in rows],
        "teachers": [teacher],
        "failed": [],
        "runs": runs,
    }
    path.write_text(json.dumps(content | more))
    return path


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


def test_a_row_made_beside_other_work_shows_no_seconds_but_those_at_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fewstep.bench.board.dirty", lambda: False)
    monkeypatch.setattr("fewstep.bench.board.environment", lambda: MACHINE | {"commit": "of now"})
    told = {"cpu_seconds": 4.0, "timed": 25, "commit": "c"}
    monkeypatch.setattr(
        "fewstep.bench.board.pace",
        lambda recipe, counts, teachers: (
            told | {"seconds": {str(n): n / 2 for n in counts}, "teachers": {name: n / 4 for name, n in teachers}}
        ),
    )
    rows = comparison(tmp_path / "a.json", row("digits-kd", 1.0), row("digits-kd", 0.5, 2))
    where, file = ["--out", str(tmp_path)], tmp_path / "board-digits.json"
    with pytest.raises(UserError, match="--pace digits-kd: has no row"):
        main(["digits", "--pace", "digits-kd", *where])
    main(["digits", "--take", str(rows), "--busy", *where])
    shown = capsys.readouterr().out
    assert "| 1.00 | 0.500 | – | 1,400 | – | – | 512 |" in shown
    assert "| teacher, 8 steps | 8 | 0.50 ± 0.25 | 75.0 % | 1.00 | 0.500 | – |" in shown
    assert not (tmp_path / "board-digits.png").exists()
    main(["digits", "--pace", "digits-kd", *where])
    shown = capsys.readouterr().out
    assert (
        "| `digits-kd` | kd | 1 | 1.00 ± 0.25 | 2 | 75.0 % | 1.00 | 0.500 | ≈ 0.50 | 1,400 | ≈ 4 | ≈ 2 | 512 |" in shown
    )
    assert (
        "| `digits-kd` | kd | 2 | 0.50 ± 0.25 | 2 | 75.0 % | 1.00 | 0.500 | ≈ 1.00 | 1,400 | ≈ 4 | ≈ 2 | 512 |" in shown
    )
    assert "| teacher, 8 steps | 8 | 0.50 ± 0.25 | 75.0 % | 1.00 | 0.500 | ≈ 2.00 |" in shown
    assert (tmp_path / "board-digits.png").exists()
    # 2 s of one seed at its end, where the mean of both were 8: each ends at the 4 s of its training at rest.
    (runs,) = lines(BOARDS["digits"], read_json(file)).values()
    points = [[(p["updates"], p["cpu_seconds"]) for p in run] for run in runs]
    assert points == [[(1, 2.0), (2, 4.0)]] * 2
    with pytest.raises(UserError, match="--pace: times rows that are there, on a machine at rest; give it alone"):
        main(["digits", "--pace", "digits-kd", "--busy", *where])
    monkeypatch.setattr("fewstep.bench.board.environment", lambda: MACHINE | {"threads": "2"})
    with pytest.raises(UserError, match=r"--pace digits-kd: here is .*'threads': '2'.*; a board is of one machine"):
        main(["digits", "--pace", "digits-kd", *where])
    alone = comparison(tmp_path / "c.json", row("digits-cd", 1.0))
    main(["digits", "--take", str(alone), *where])
    with pytest.raises(UserError, match="--pace digits-cd: its row has seconds, taken at rest"):
        main(["digits", "--pace", "digits-cd", *where])
    main(["digits", "--take", str(rows), "--busy", *where])
    assert [t["busy"] for t in read_json(file)["teachers"]] == [False]  # one at rest has seconds, and stays
    old = comparison(tmp_path / "b.json", row("digits-kd", 1.0), run={"identity": "of before"})
    main(["digits", "--take", str(old), "--busy", *where])
    with pytest.raises(UserError, match="its row is of an earlier recipe"):
        main(["digits", "--pace", "digits-kd", *where])


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


def test_what_was_busy_stays_so_until_it_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    board, marks = BOARDS["digits"], []

    def compare(recipes: Any, budget: str, seeds: int, folder: Path, resume: bool, *_: Any) -> Path:
        marks.append(was_busy(folder / "results.json").exists())
        if folder.exists() and not resume:
            raise UserError("holds a comparison")
        folder.mkdir(exist_ok=True)
        return folder / "results.json"

    monkeypatch.setattr("fewstep.bench.board.compare", compare)
    measured(board, "digits-kd", 1, 2, tmp_path, resume=False, busy=True)
    for busy in (True, False):
        with pytest.raises(UserError, match="holds a comparison"):
            measured(board, "digits-kd", 1, 2, tmp_path, resume=False, busy=busy)
    measured(board, "digits-kd", 1, 2, tmp_path, resume=True, busy=False)
    (tmp_path / "digits-kd").rmdir()
    measured(board, "digits-kd", 1, 2, tmp_path, resume=False, busy=False)
    with pytest.raises(UserError, match="holds a comparison"):
        measured(board, "digits-kd", 1, 2, tmp_path, resume=False, busy=True)
    assert marks == [True, True, True, True, False, False]


def test_a_pace_counts_the_first_update_of_each_stage_once(monkeypatch: pytest.MonkeyPatch):
    """Stages of 3 and 1,000 updates, the first of each dearer: 7 + 2 x 2 and 50 + 999 x .5 seconds."""
    recipe = load("toy/cd", ["train.steps=1000"])
    before = recipe.stages()[0]
    recipe = replace(recipe, before=(replace(before, steps=3),))
    costs = iter([7.0, 2.0, 2.0, 50.0, *[0.5] * TIMED])
    now = 0.0

    def process_time() -> float:
        return now

    def stepped(account: Any, trainer: Any) -> None:
        nonlocal now
        now += next(costs)
        account.settle()
        account.watch(account)

    monkeypatch.setattr("fewstep.commands.compare.budget.time.process_time", process_time)
    monkeypatch.setattr("fewstep.commands.compare.budget.Accounted._stepped", stepped)
    monkeypatch.setattr("fewstep.bench.pace.seconds_per_1000", lambda make, indices: float(len(make(indices[:3]))))
    told = pace(recipe, [1, 2], [("teacher, 2 steps", 2), ("teacher fitted, 4 calls", 4)])
    assert told["teachers"] == {"teacher, 2 steps": 3.0, "teacher fitted, 4 calls": 3.0}
    assert told["cpu_seconds"] == pytest.approx(7 + 4 + 50 + 999 * 0.5)
    assert (told["timed"], told["seconds"]) == (3 + 1 + TIMED, {"1": 3.0, "2": 3.0})
    assert next(costs, None) is None


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
