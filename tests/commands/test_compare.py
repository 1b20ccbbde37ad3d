"""fewstep compare: exact budgets, accounts that survive kills, ranks with errors, failures that stay their own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import apart
from tiny_compare import ARGUMENTS, drive_account, drive_compare, train
from tiny_runs import contents, same

from fewstep.algebra.sampling import many_step
from fewstep.bench.readme import comparison_table
from fewstep.cli import main
from fewstep.commands.compare.budget import Accounted, Budget, bank_key, counted, lengths, with_lengths
from fewstep.commands.compare.curve import marks
from fewstep.commands.compare.one_run import Task
from fewstep.commands.compare.ranking import facts, join, rank, write
from fewstep.commands.compare.spent import Spent
from fewstep.commands.report import with_error
from fewstep.config import UserError
from fewstep.eval.metrics.estimate import Estimate
from fewstep.eval.metrics.frechet import standard_error
from fewstep.eval.protocol.evaluation import Evaluation, PresetMismatch
from fewstep.eval.protocol.preset import load_preset
from fewstep.methods.pairs import Pairs
from fewstep.recipe.schema import Evaluate
from fewstep.recipe.store import load


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> str:
        capfd.readouterr()
        before = sorted(p.name for p in tmp_path.iterdir())
        with pytest.raises(SystemExit) as caught:
            main(["compare", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert caught.value.code == 2, err
        assert "Traceback" not in out + err
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        return err[err.index("error: ") :].removeprefix("error: ").strip()

    return call


def test_bad_arguments_are_named_before_anything_runs(refused: Callable[..., str], tmp_path: Path):
    budget = ("--budget", "updates=4")
    for text in ("updates=0", "updates=1.5", "steps=5", "seconds", "calls=-1", "seconds=nan", "calls=inf"):
        assert refused("toy/cd", "--budget", text).startswith(f"--budget {text!r}: ")
    assert refused("toy/cdd", *budget).startswith("recipe 'toy/cdd' is not shipped")
    assert refused("toy/cd", *budget, "--set", "train.btach=3").startswith("argument 'train.btach=3'")
    assert refused("toy/cd", "digits-cd", *budget) == (
        "toy/cd is measured by energy and digits-cd by fd-house-digits: they cannot stand in one table"
    )
    assert refused("toy/cd", *budget, "--set", "evaluate=null").startswith("toy/cd: has evaluate: null")
    assert refused("toy/cd", *budget, "--seeds", "0") == "--seeds must be at least 1, not 0"
    assert refused("toy/cd", *budget, "--samples", "1") == "--samples must be at least 2, not 1"
    assert refused("toy/cd", *budget, "--steps", "1,0").startswith("--steps '1,0': expected whole numbers")
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: toy/cd\nevaluate: {metric: energy, samples: 77}\n")
    assert refused("toy/cd", mine, *budget).endswith("and " + str(mine) + " with 77; give one number to all with "
                                                     "--samples")  # fmt: skip
    (tmp_path / "toy-cd.yaml").write_text("extends: toy/cd\n")
    assert "would use the folder 'toy-cd' of toy/cd; rename it" in refused("toy/cd", "toy-cd.yaml", *budget)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    assert refused("toy/cd", *budget, "--out", "letters") == (
        "letters: is not empty and no comparison that fewstep made; choose another folder"
    )
    assert refused("toy/cd", *budget, "--out", "mine.yaml") == "mine.yaml: is a file; choose another folder"


def test_updates_are_shared_out_exactly():
    recipe = load("digits-disback")
    flags = counted(recipe)
    assert flags == [False, False, True, True, True]  # two stages train the critic alone
    for amount in (3, 7, 100, 619, 620, 5000):
        steps = lengths(recipe, Budget("updates", amount))
        assert sum(n for n, f in zip(steps, flags, strict=True) if f) == amount
        assert min(steps) >= 1
    assert lengths(recipe, Budget("updates", 620)) == [stage.steps for stage in recipe.stages()]
    with pytest.raises(UserError, match="2 updates are fewer"):
        lengths(recipe, Budget("updates", 2))
    # Costs of (first, further) step: 40 a + 40 a + 60 b + ... scaled to the amount.
    costs = [(5.0, 1.0), (1.0, 1.0), (2.0, 2.0), (2.0, 2.0), (3.0, 3.0)]
    steps = lengths(recipe, Budget("calls", 4000), costs)
    spent = sum(a + b * (n - 1) for (a, b), n in zip(costs, steps, strict=True))
    assert abs(spent - 4000) < 3 * len(steps)
    with pytest.raises(UserError, match=r"ends before each stage has taken one step \(13 needed\)"):
        lengths(recipe, Budget("calls", 13), costs)


def test_a_curriculum_in_steps_is_shortened_with_its_stage():
    recipe = with_lengths(load("digits-ict"), [50])
    method: Any = recipe.method
    assert (recipe.train.steps, method.pairing.total) == (50, 50)
    assert with_lengths(recipe, [500]) == load("digits-ict")


def test_calls_are_counted_as_the_method_makes_them():
    # Knowledge distillation: 4 Heun steps of the teacher are 7 calls; the student's 1 with its backward pass is 3.
    assert train("toy/kd", 5, "method.teacher_steps=4").spent.calls == 5 * 6 * (7 + 3)
    # DMD2 with one critic turn: the student's call and its gradient, teacher and critic without; then the critic's
    # turn: the student's sample without a gradient and the critic with one.
    settings = ("method.gan=null", "method.critic.steps=1", "method.steps=[1.0]")
    assert train("toy/dmd2", 4, *settings).spent.calls == 4 * 6 * ((3 + 1 + 1) + (1 + 3))


def test_an_account_continues_where_its_run_was_cut(tmp_path: Path):
    told = json.loads(apart(drive_account, tmp_path).splitlines()[-1])
    # One teacher call and the student's 3 are 24 a step of 6 samples: 738 calls are 30.75 steps.
    assert {name: account[:2] for name, account in told.items()} == {name: [31, 31 * 24] for name in told}
    a, b = (contents(tmp_path / name / "checkpoints" / "step-00000031") for name in ("whole", "cut"))
    for state in (a, b):
        state["progress"]["meter"].pop("seconds", None)
    assert same(a, b) == []
    assert told["finished"][2] == pytest.approx(told["again"][2], abs=0.5)
    (tmp_path / "cut" / "account.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="does not tell what step 31 had cost"):
        train("toy/kd", 60, "method.teacher_steps=1", "train.ema=[0.9]", run=tmp_path / "cut")


def test_a_bank_of_pairs_is_made_once_and_charged_to_all(tmp_path: Path):
    settings = ("method.pairs=50", "method.pair_steps=3")
    first = train("toy/dmd", 2, *settings, "train.seed=0", banks=tmp_path)
    made = list(tmp_path.iterdir())
    second = train("toy/dmd", 2, *settings, "train.seed=1", banks=tmp_path)
    alone = train("toy/dmd", 2, *settings, "train.seed=1")
    assert list(tmp_path.iterdir()) == made
    assert len(made) == 1
    assert first.spent.calls == second.spent.calls == alone.spent.calls
    for a, b in ((first, second), (second, alone)):
        torch.testing.assert_close(a.trainer.roles.state.x0, b.trainer.roles.state.x0, rtol=0, atol=0)
    assert torch.equal(
        second.trainer.product.state_dict()["net.last.weight"],
        alone.trainer.product.state_dict()["net.last.weight"],
    )
    pairs = Pairs(50, second.trainer.data)
    keys = {bank_key(second.trainer.roles.teacher, pairs, many_step(n), g) for n in (3, 4) for g in (1.0, 2.0)}
    assert len(keys) == 4
    made[0].write_bytes(made[0].read_bytes()[:-40])
    again = train("toy/dmd", 2, *settings, banks=tmp_path)  # a damaged bank is made anew
    assert again.spent.calls == alone.spent.calls


def row(values: list[float], influences: list[np.ndarray] | None, curvature: np.ndarray | None) -> Evaluation:
    parts = []
    for i, value in enumerate(values):
        metrics = {"FD (x)": {"value": value}, "class accuracy (x)": {"value": 0.5 + i / 10}}
        known = {"influence": influences[i], "curvature": curvature} if influences else {}
        parts.append(
            Evaluation(
                name="r",
                preset="p",
                preset_hash="0",
                extractor="x",
                number=40,
                metrics=metrics,
                seconds=1.0,
                steps=1,
                frechet=[Estimate(value=value, **known)],
            )
        )
    run = {"updates": 3, "seconds": 2.0, "cpu_seconds": 1.5, "network_calls": 7, "peak_memory_mib": 1.0}
    return join("r", [{**run, "method": "m"}] * len(values), parts)


def test_errors_join_seeds_and_sampling_and_pairing_cancels_what_is_shared():
    generator = np.random.default_rng(0)
    noise, curvature = generator.normal(size=(2, 40)), np.zeros(6)
    a = row([1.0, 3.0, 5.0], [noise[0] * s for s in (1, 2, 3)], curvature)
    sampling = standard_error(2 * noise[0], curvature)
    entry = a.metrics["FD (x)"]
    assert a.distance.value == 3.0
    assert entry["spread"] == pytest.approx(2.0)
    assert entry["sampling_error"] == pytest.approx(sampling)
    assert a.distance.standard_error == pytest.approx(math.sqrt(4 / 3 + sampling**2))
    assert a.value("class accuracy") == pytest.approx(0.6)
    b = row([2.0], [2 * noise[0]], curvature)
    assert b.metrics["FD (x)"]["spread"] is None
    assert b.distance.standard_error == pytest.approx(sampling)
    (first, none), (second, apart) = rank([a, b])
    assert [first.distance.value, second.distance.value, none] == [2.0, 3.0, None]
    # The influences agree, so only the seeds' spread is left of the difference's error.
    assert apart is not None
    assert apart.value == pytest.approx(1.0)
    assert apart.standard_error == pytest.approx(math.sqrt(4 / 3))
    c = row([9.0], [noise[1]], curvature)
    apart = rank([b, c])[1][1]
    assert apart is not None
    assert apart.standard_error == pytest.approx(standard_error(noise[1] - 2 * noise[0], curvature))
    bare = row([4.0, 6.0], None, None)
    assert bare.metrics["FD (x)"]["sampling_error"] is None
    assert bare.distance.standard_error == pytest.approx(1.0)
    assert rank([row([7.0], None, None)])[0][0].distance.standard_error is None


def test_the_report_is_of_the_evaluations_and_refuses_other_protocols(tmp_path: Path):
    a, b = row([1.0, 3.0], None, None), row([2.0], None, None)
    a.name, b.name = "one", "two"
    teacher = replace(b, name="teacher, 8 steps", training={})
    about = facts(Budget("updates", 3), (0, 1), (), Evaluate())
    ranked = rank([a, b])
    write(tmp_path, "T", about, ranked, [teacher], [{"recipe": "x", "seed": 0, "message": "gone"}], [])
    told = results(tmp_path)
    assert [(r["name"], r["rank"]) for r in told["rows"]] == [(e.name, i) for i, (e, _) in enumerate(ranked, 1)]
    assert Evaluation.from_json(told["teachers"][0]).distance == teacher.distance
    assert "| teacher, 8 steps |  | None | 2 |  | 50.0 % |" in comparison_table(tmp_path / "results.json")
    page = (tmp_path / "report.html").read_text()
    assert "spread over 2 seeds 1.4" in page
    assert "training cpu seconds" in page
    teacher.preset_hash = "1"
    with pytest.raises(PresetMismatch, match="different protocols"):
        write(tmp_path, "T", about, ranked, [teacher], [], [])


def test_numbers_have_the_decimals_of_their_error():
    told = ((1.2345, 0.034), (123.456, 12.3), (0.5, None), (2.0, 0.0))
    assert [with_error(Estimate(value=v, standard_error=e)) for v, e in told] == [
        "1.234 ± 0.034",
        "123 ± 12",
        "0.5",
        "2.000 ± 0.000",
    ]
    assert with_error(Estimate(value=1.0, standard_error=0.5), "+") == "+1.00 ± 0.50"


def results(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def but_for_the_clock(report: Any) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "latency", "training")}
        | {k: r["training"][k] for k in ("method", "updates", "network_calls")}
        for r in report["rows"]
    ]


def test_a_comparison_survives_kills_and_failures(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    bad = tmp_path / "bad.yaml"
    # A learning rate that leaves only NaN behind: the trainer stops with the reason.
    bad.write_text("extends: toy/kd\noptim: {default: {lr: 1e30}}\n")
    recipes = ["toy/kd", "toy/cd", str(bad)]
    printed = apart(drive_compare, tmp_path, *recipes)
    assert '["teachers/toy-kd/result.json", "toy-kd/seed-0/result.json"]' in printed
    assert "toy/kd, seed 0: done before" in printed
    assert printed.count("toy/kd, seed 0: started") == 2  # killed/ and straight/
    out, straight = tmp_path / "killed", tmp_path / "straight"
    report = results(out)
    assert [r["recipe"] for r in report["failed"]] == [str(bad)] * 2
    assert all("in a row had non-finite gradients" in r["message"] for r in report["failed"])
    assert {r["name"] for r in report["rows"]} == {"toy/kd", "toy/cd"}
    energies = [r["metrics"]["energy x1000"] for r in report["rows"]]
    assert all(len(entry["values"]) == 2 for entry in energies)
    assert all(r["training"]["updates"] == 20 for r in report["rows"])
    protocol = replace(load_preset("energy"), number=64)
    assert {r["preset_hash"] for r in [*report["rows"], *report["teachers"]]} == {protocol.hash}
    assert but_for_the_clock(report) == but_for_the_clock(results(straight))
    resumes = {(r["recipe"], r["seed"]): r["resumes"] for r in report["runs"]}
    assert resumes.pop(("toy/kd", 1)) == 1
    assert set(resumes.values()) == {0}
    best, entry = report["rows"][0], energies[0]
    estimate = Estimate(value=entry["value"], standard_error=entry["standard_error"])
    table = comparison_table(out / "results.json").splitlines()
    seeds = "2 (interrupted)" if best["group"] == "toy/kd" else "2"  # it was killed in its second seed
    lead = f"| `{best['name']}` | {best['training']['method']} | 1 | {with_error(estimate)} | {seeds} |"
    assert table[2].startswith(lead)
    assert sum("(interrupted)" in line for line in table) == 1
    assert "20 updates each, " in table[-1]
    assert "64 samples, energy" in table[-1]
    assert f"Failed: `{bad}`" in table[-1]
    page = (out / "report.html").read_text()
    assert "toy/kd" in page
    assert "non-finite" in page

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["compare", *recipes, *ARGUMENTS, "--out", str(out), *more])
        assert caught.value.code == 2
        return capfd.readouterr().err

    assert "is a comparison with another settings" in refused("--resume", "--set", "train.clip=4")
    assert "holds a comparison; continue it with --resume" in refused()
    run = out / "toy-kd" / "seed-0" / "recipe.yaml"
    run.write_text(run.read_text().replace("teacher_steps: 16", "teacher_steps: 15"))
    assert "toy-kd/seed-0: was trained with another recipe; delete" in refused("--resume")


def test_runs_in_processes_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    arguments = ["compare", "toy/kd", *ARGUMENTS, "--budget", "calls=9000", "--seeds", "1"]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--steps", "1,2", "--curve", "3", "--out", str(tmp_path / "out")])
    told, complaints = capfd.readouterr()
    assert left.value.code == 0, complaints[-2000:]
    (row,) = results(tmp_path / "out")["rows"]
    assert (row["rank"], row["steps"], row["number"]) == (1, 1, 64)
    spent = row["training"]
    # A step is 24 calls, and each of the two stages rounds to a whole one.
    assert abs(spent["network_calls"] - 9000) <= 2 * 24
    assert 100 < spent["peak_memory_mib"] < 5000
    assert 0 < spent["cpu_seconds"] <= (os.cpu_count() or 1) * spent["seconds"] + 0.1
    assert any(line.split()[:2] == ["1", "toy/kd"] for line in told.splitlines()), told
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| 1 | `toy/kd` |" in report
    assert "](curves.png)" in report
    assert (tmp_path / "out" / "curves.png").is_file()
    (run,) = results(tmp_path / "out")["runs"]
    *points, end = run["curve"]
    length = json.loads((tmp_path / "out" / "toy-kd" / "lengths.json").read_text())["steps"]
    assert {p["updates"] for p in points} == marks(length, 3)
    assert len(points) > 1
    for count, whole in (("updates", run["updates"]), ("network_calls", spent["network_calls"])):
        assert end[count] == whole
        assert all(a[count] < b[count] for a, b in pairwise(run["curve"]))
    assert end["value"] == row["metrics"]["energy x1000"]["value"]
    # More of the teacher's steps are no other comparison, and are measured.
    more = ["--set", "evaluate.teacher_steps=[1, 2]", "--steps", "1,2", "--curve", "3", "--resume"]
    with pytest.raises(SystemExit) as left:
        main([*arguments, *more, "--out", str(tmp_path / "out")])
    assert left.value.code == 0, capfd.readouterr().err[-2000:]
    again = results(tmp_path / "out")
    assert [t["steps"] for t in again["teachers"]] == [1, 2]
    assert again["runs"][0]["cpu_seconds"] == run["cpu_seconds"]  # not trained again


def test_a_teachers_measurement_is_kept_while_it_has_the_steps_asked_for(tmp_path: Path):
    """On its own grid 8 steps may have 7 levels."""
    metrics = {"FD (x)": {"value": 2.0}}
    about = {"preset": "x", "preset_hash": "0", "extractor": "x", "number": 64, "metrics": metrics}
    rows = [Evaluation(name=f"teacher, {n}", steps=n, calls=n, **about).as_json() for n in (1, 7)]
    spec = load("digits-dmd2").evaluate
    assert spec is not None

    def kept(steps: tuple[int, ...], grid: Any, **told: Any) -> bool:
        (tmp_path / "result.json").write_text(json.dumps({"recipe": "digits-dmd2", "rows": rows, **told}))
        asked = replace(spec, teacher_steps=steps, teacher_grid=grid)
        return Task("digits-dmd2", tmp_path, (), Budget.parse("own"), asked, (), None).kept() is not None

    assert kept((1, 8), "own", asked=[1, 8])
    assert kept((8,), "own", asked=[1, 8])
    assert not kept((1, 8, 12), "own", asked=[1, 8])
    # A file of before tells its rows' levels alone.
    assert [kept((1, 8), "own"), kept((1, 7), "even"), kept((1, 8), "even")] == [True, True, False]


@pytest.mark.parametrize(
    "name", ["digits-dmd2", "digits-progressive", "digits-ect", "toy/tcm", "digits-kd", "fashion-dmd2"]
)
def test_a_recipes_own_budget_is_the_recipe_as_it_is(name: str):
    own = Budget.parse("own")
    recipe = load(name)
    assert with_lengths(recipe, lengths(recipe, own)) == recipe
    assert (own.in_steps, str(own)) == (True, "the recipe's own updates")


def test_memory_of_a_measurement_is_none_of_the_trainings(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("fewstep.commands.compare.budget.peak_memory", lambda: now[0])
    account = Accounted(load("toy/kd", ["before=[]", "train.guard=off", "train.batch=6"]), None)
    assert account.settle().peak_memory_mib == 100.0
    with account.aside():
        now[0] = 900.0
    assert account.settle().peak_memory_mib == 100.0
    account.charge(Spent(seconds=2.0, peak_memory_mib=5000.0))
    assert account.settle().peak_memory_mib == 100.0


def test_spent_reads_in_the_budgets_unit():
    spent = Spent(3, 2.5, 70)
    assert [spent.of(kind) for kind in ("seconds", "calls")] == [2.5, 70.0]
    assert str(Budget.parse("calls=1e6")) == "1,000,000 network calls"
