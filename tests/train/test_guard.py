"""The guard: it fires in time, goes back to the best state, and a kill in between changes nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from collapsing import ONSET, kill_points, short, start
from tiny_runs import contents, import_before_forks, in_child, killed, records, same

from fewstep.commands.health import findings
from fewstep.config import RecipeError
from fewstep.recipe.store import dump, load
from fewstep.train.guard import LOWER, RETURNS, Guard, Stopped, addressed, best_of, rate_of, way_back
from fewstep.train.lines import SAMPLES, TIE
from fewstep.train.pulse import Pulse
from fewstep.train.resume import end_at_best
from fewstep.train.samples import SampleReadings
from fewstep.train.state import checkpoints, read_guard
from fewstep.train.track import RECENT
from fewstep.train.verdicts import Course, Verdict

DARKER = 0.06
"""Per update, into a velocity: after some ten of them samples are beyond the line below their mean."""


def darker(share: float) -> float:
    return DARKER if share == 1 else 0.0


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    run = tmp_path_factory.mktemp("guard") / "run"
    trainer = start(run, "train.guard=restore", bias=darker)
    trainer.fit()
    return run, trainer.lines


def test_a_healthy_run_says_nothing(tmp_path: Path):
    trainer = start(tmp_path / "run", "train.guard=restore")
    trainer.fit()
    assert trainer.lines == []
    assert trainer.progress.done == 120
    assert best_of(tmp_path / "run" / "checkpoints") is not None


def test_the_rate_that_is_lowered_is_named_by_its_key():
    recipe = load("digits-dmd2-kd")
    assert rate_of(recipe, 0.5, 0) == "before.0.rates.student 0.0005 -> 0.00025, later stages' rates alike"
    assert rate_of(recipe, 0.5, 1) == "optim.student.lr 0.0001 -> 5e-05"
    # Refused updates may end a stage before its first record, of which the guard would learn that it has begun.
    guard: Any = SimpleNamespace(recipe=recipe, acts=[], stage=0)
    act = Guard.act(guard, SimpleNamespace(name="refused updates", value=1.0, line=0.5), 2010, 2000, 1)  # type: ignore[arg-type]
    assert act["knob"] == f"optim.student.lr 0.0001 -> {1e-4 * LOWER:g}"
    assert rate_of(load("digits-cd"), 0.5, 0) == "optim.default.lr of the student 0.0005 -> 0.00025"


def test_a_remedy_names_the_keys_of_its_own_stage():
    recipe = load("digits-phased-dmd", ["before.0.rates={student: 1e-3}"])
    text = "lower optim.student.lr or method.gan.weight, raise optim.critic.lr or method.critic.steps; optim.*.lr"
    alarm = Verdict("x", "alarm", 1.0, 0.0, "text", text)
    (first,), (last,) = (addressed([alarm], recipe, n) for n in (0, 1))
    # Phased DMD has no discriminator, so that its stage has no such key.
    assert first.remedy == (
        "lower before.0.rates.student or method.gan.weight, which this stage has not, "
        "raise optim.critic.lr or before.0.method.critic.steps; "
        "optim.*.lr or before.0.rates"
    )
    assert load("digits-phased-dmd", ["before.0.rates.student=1", "before.0.method.critic.steps=3"])
    assert last == alarm
    (told,) = addressed([alarm], load("digits-phased-dmd"), 0)
    told_of_both = text.replace("method.critic", "before.0.method.critic")
    assert told.remedy == told_of_both.replace("method.gan.weight", "method.gan.weight, which this stage has not")


def test_the_guard_and_health_tell_a_stages_own_keys(tmp_path: Path):
    recipe = load("digits-dmd2-kd")
    guard = Guard.__new__(Guard)
    guard.mode, guard.recipe, guard.stage, guard.course, guard._known = "warn", recipe, 0, Course(), set()
    records = [{"stage": 0, "done": 10 * k, "samples/mean": 1.0 - 0.5 * k, "skips": 0} for k in range(1, 40)]
    told = [v.remedy for record in records for v in guard.add(record)]
    assert any("before.0.rates.student" in remedy for remedy in told)
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    found = [v.remedy for v in findings(tmp_path, records) if v.level == "alarm"]
    assert any("before.0.rates.student" in remedy for remedy in found)


def test_restore_goes_back_to_the_best_state_with_a_lower_rate(restored: tuple[Path, list[str]]):
    run, lines = restored
    (act,) = [r["guard"] for r in records(run) if "guard" in r]
    assert act["alarm"] == "darkening"
    assert ONSET < act["at"] <= ONSET + 50
    assert act["to"] <= ONSET
    assert act["value"] < act["line"] < 0
    assert act["knob"] == f"optim.student.lr 0.001 -> {0.001 * LOWER}"
    assert "ALARM darkening" in lines[0]
    assert lines[1].endswith(f"Back to step {act['to']}, {act['knob']}")
    done = [r["done"] for r in records(run) if "stage" in r]
    assert done == list(range(4, 121, 4))  # what was gone back over is not there twice
    rates = {r["done"]: r["lr/student"] for r in records(run) if "lr/student" in r}
    after = min(d for d in rates if d > act["to"])
    assert rates[after] < 0.3 * rates[after - 4]
    means = [r["samples/mean"] for r in records(run) if "samples/mean" in r]
    assert min(means[-5:]) > -0.35
    kept = [p.name for p in checkpoints(run / "checkpoints")]
    assert len(kept) in (2, 3)
    assert all(read_guard(p)["acts"] == [act] for p in checkpoints(run / "checkpoints"))


@pytest.mark.parametrize("point", sorted(kill_points()))
def test_a_kill_within_a_return_changes_nothing(restored: tuple[Path, list[str]], tmp_path: Path, point: str):
    run, whole = tmp_path / "run", restored[0]
    import_before_forks()

    def job() -> None:
        kill_points()[point]()
        start(run, "train.guard=restore", bias=darker).fit()

    assert killed(in_child(job))
    start(run, "train.guard=restore", bias=darker).fit()
    assert records(run) == records(whole)
    assert [p.name for p in checkpoints(run / "checkpoints")] == [p.name for p in checkpoints(whole / "checkpoints")]
    for own, other in zip(checkpoints(run / "checkpoints"), checkpoints(whole / "checkpoints"), strict=True):
        assert read_guard(own) == read_guard(other)
        assert same(*({k: v for k, v in contents(c).items() if k != "progress"} for c in (own, other))) == []


def test_after_two_returns_it_stops_at_the_best_state(tmp_path: Path):
    run = tmp_path / "run"
    trainer = start(run, "train.guard=restore", bias=lambda share: DARKER)
    with pytest.raises(Stopped, match=r"darkening.*gone back 2 times.*6\.25e-05.*the newest checkpoint is the stage's"):
        trainer.fit()
    acts = [r["guard"] for r in records(run) if "guard" in r]
    assert len(acts) == RETURNS
    newest = checkpoints(run / "checkpoints")[-1]
    assert newest == best_of(run / "checkpoints")
    assert trainer.progress.done == int(newest.name.removeprefix("step-")) <= ONSET
    assert records(run)[-1]["done"] <= trainer.progress.done
    # Who continues it stands there with the lowered rate, and is stopped again at the same place.
    again = start(run, "train.guard=restore", bias=lambda share: DARKER)
    assert again.guard.acts == acts
    with pytest.raises(Stopped, match="gone back 2 times"):
        again.fit()


def test_without_a_checkpoint_of_the_stage_it_stops_and_says_so():
    trainer = start(None, "train.guard=restore", bias=darker)
    with pytest.raises(Stopped, match="There is no checkpoint of this stage to go back to"):
        trainer.fit()


def test_stop_saves_and_warn_goes_on(tmp_path: Path):
    stopped = start(tmp_path / "stop", "train.guard=stop", bias=darker)
    with pytest.raises(Stopped, match=r"stopped by train\.guard at step \d+: darkening; the mean of samples"):
        stopped.fit()
    assert checkpoints(tmp_path / "stop" / "checkpoints")[-1].name == f"step-{stopped.progress.done:08d}"
    assert not read_guard(checkpoints(tmp_path / "stop" / "checkpoints")[-1])["calm"]
    warned = start(tmp_path / "warn", "train.guard=warn", bias=darker)
    warned.fit()
    assert warned.progress.done == 120
    assert sum("ALARM darkening" in line for line in warned.lines) == 1  # once, not at every record
    (told,) = [r for r in records(tmp_path / "warn") if r.get("alarm") == "darkening"]
    assert told["done"] == stopped.progress.done
    off = start(tmp_path / "off", "train.guard=off", bias=darker)
    off.fit()
    assert off.lines == []
    assert not any(k.startswith("samples/") for r in records(tmp_path / "off") for k in r)
    assert read_guard(checkpoints(tmp_path / "off" / "checkpoints")[-1]) is None
    # The same training, but for what is read of it.
    for name in ("student", "critic"):
        own, other = warned.roles[name].state_dict(), off.roles[name].state_dict()
        assert all(torch.equal(own[k], other[k]) for k in own)


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path: Path):
    run = tmp_path / "run"
    start(run, "train.guard=warn", bias=darker).fit()
    held = checkpoints(run / "checkpoints")
    best = best_of(run / "checkpoints")
    assert [p.name for p in held[1:]] == ["step-00000115", "step-00000120"]
    assert best == held[0]
    assert int(best.name.removeprefix("step-")) <= ONSET


def test_refused_updates_are_gone_back_from(tmp_path: Path):
    """A student whose gradients are no numbers from some step on, as long as its rate is the first one."""
    run = tmp_path / "run"
    settings = ("train.guard=restore", "train.max_skips=2")
    trainer = start(run, *settings, bias=lambda share: float("nan") if share == 1 else 0.0)
    trainer.fit()
    acts = [r["guard"] for r in records(run) if "guard" in r]
    assert [a["alarm"] for a in acts] == ["non-finite gradients"]
    assert trainer.progress.skipped == 0  # neither those of before nor one by gradients that they left
    assert trainer.progress.done == 120
    assert all(bool(torch.isfinite(p).all()) for p in trainer.roles.student.parameters())


def test_marks_are_chosen_by_metric_first_then_readings_then_age(tmp_path: Path):
    def make(done: int, **mark: object) -> Path:
        own = {"stage": 1, "calm": True, "by": "readings", "score": None, "acts": [], **mark}
        path = tmp_path / f"step-{done:08d}"
        path.mkdir()
        (path / "state.json").write_text(json.dumps({"sound": True, "guard": own}))
        return path

    assert best_of(tmp_path) is None
    old, begun = make(10, stage=0, score=0.1), make(20)
    assert best_of(tmp_path) is None
    assert way_back(tmp_path, 1) == begun
    assert best_of(tmp_path, 0) == old
    good, worse = make(30, score=0.4), make(40, score=0.9)
    make(50, calm=False)
    assert best_of(tmp_path) == way_back(tmp_path, 1) == good
    measured = make(60, by="metric", score=7.0)
    assert best_of(tmp_path) == measured
    make(70, by="metric", score=8.0)
    assert best_of(tmp_path) == measured
    assert way_back(tmp_path, 2) is None
    (worse / "state.json").write_text("{")
    assert best_of(tmp_path) == measured


def test_of_checkpoints_as_good_but_for_chance_the_newest_is_the_best_and_each_is_held_against_the_least(tmp_path: Path):
    """Else every new best a little worse than the one before would lead away from the reference."""

    def make(done: int, score: float | None, least: float) -> Path:
        own = {"stage": 1, "calm": score is not None, "by": "readings", "score": score, "acts": [], "least": least}
        path = tmp_path / f"step-{done:08d}"
        path.mkdir()
        (path / "state.json").write_text(json.dumps({"sound": True, "guard": own}))
        return path

    first = make(10, 0.5, 0.5)
    assert best_of(tmp_path) == first
    second = make(20, 0.1, 0.1)
    assert best_of(tmp_path) == second
    third = make(30, 0.1 + TIE, 0.1)
    assert best_of(tmp_path) == second  # nothing newer tells that the third is not about to leave
    make(40, 0.11 + TIE, 0.1)
    make(50, None, 0.1)
    assert best_of(tmp_path) == second
    make(60, 0.3, 0.1)
    assert best_of(tmp_path) == third
    shutil.rmtree(second)
    assert best_of(tmp_path) == third
    seventh = make(70, 0.0, 0.0)
    assert best_of(tmp_path) == seventh  # those before are as good no more
    shutil.rmtree(seventh)
    make(80, None, 0.0)  # which knows how near it has been
    assert best_of(tmp_path) == tmp_path / "step-00000040"  # none is as good as that: of those that are left


def test_a_state_gone_back_to_is_the_best_while_nothing_newer_has_proved_so_and_an_earlier_return_is_forgotten(
    tmp_path: Path,
):
    def make(done: int, score: float, *to: int, copy: bool = False) -> Path:
        acts = [{"to": step} for step in to]
        own = {"stage": 1, "calm": True, "by": "readings", "score": score, "acts": acts} | (
            {"copy": True} if copy else {}
        )
        path = tmp_path / f"step-{done:08d}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        (path / "state.json").write_text(json.dumps({"sound": True, "guard": own}))
        return path

    first, second = make(100, 0.1), make(200, 0.12, 200)
    assert best_of(tmp_path) == second
    make(300, 0.9, 200)
    assert best_of(tmp_path) == second
    make(400, 0.12, 200, copy=True)  # an end that took the second one's weights proves nothing
    assert best_of(tmp_path) == second
    make(400, 0.12, 200, 100)
    assert best_of(tmp_path) == second  # the last but one that is good
    shutil.rmtree(tmp_path / "step-00000400"), shutil.rmtree(tmp_path / "step-00000300")
    make(200, 0.12, 200, 100)
    assert best_of(tmp_path) == first


@pytest.mark.parametrize("bad", [{"acts": [{}]}, {"acts": ["x"]}, {"score": math.nan}, {"least": math.nan}, {"acts": 5}])
def test_a_mark_that_fewstep_did_not_write_is_none(tmp_path: Path, bad: dict[str, Any]):
    own = {"stage": 1, "calm": True, "by": "readings", "score": 0.1, "acts": [], "least": 0.1}
    (tmp_path / "state.json").write_text(json.dumps({"guard": own}))
    assert read_guard(tmp_path) == own
    (tmp_path / "state.json").write_text(json.dumps({"guard": own | bad}))
    assert read_guard(tmp_path) is None


def test_an_end_as_good_as_the_best_but_for_chance_is_kept():
    guard = guard_of("readings")
    for key, reading in SAMPLES.items():
        track = guard.course.tracks[key]
        for _ in range(RECENT):
            track.add(reading.at(0.3) if key == "samples/mean" else reading.centre)
    assert guard.mark(120, 1)["score"] == pytest.approx(0.3)
    assert not guard.worse(120, 1, {"by": "readings", "score": 0.31 - TIE})
    assert guard.worse(120, 1, {"by": "readings", "score": 0.29 - TIE})
    assert guard.worse(120, 1, {"by": "readings", "score": 0.29, "least": 0.0})
    assert not guard.worse(120, 1, {"by": "readings", "score": 0.31, "least": 0.0})  # better than what it would end with


def test_a_guard_without_samples_to_compare_says_once_what_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SampleReadings, "source", lambda self: None)
    run, few = tmp_path / "run", ("before.0.steps=2", "train.steps=4")
    trainer = start(run, "train.guard=restore", *few)
    trainer.fit()
    (line,) = trainer.lines
    assert line == (
        "train.guard=restore: no samples are compared, there is neither a teacher that stays as it is nor data; "
        "refused updates, changes of own samples and copies in a batch remain; it goes back to the newest checkpoint "
        "without an alarm"
    )
    assert records(run)[0] == {"done": 0, "note": line}
    assert not any(k.startswith("samples/") for r in records(run) for k in r)
    again = start(run, "train.guard=restore", few[0], "train.steps=6")
    again.fit()
    assert again.progress.done == 8
    assert again.lines == []
    assert sum("note" in r for r in records(run)) == 1
    warned = start(None, *few)
    warned.fit(), warned.fit()
    (line,) = warned.lines
    assert line.endswith("copies in a batch remain")
    off = start(None, "train.guard=off", *few)
    off.fit()
    assert off.lines == []


def test_samples_are_compared_with_a_teacher_that_stays_as_it_is_or_with_data():
    def source(*settings: str) -> str | None:
        recipe = short("before=[]", *settings)
        session: Any = SimpleNamespace(recipe=recipe, roles={"teacher": None})
        readings = SampleReadings.__new__(SampleReadings)
        readings.session = session
        return readings.source()

    assert source("copy={}") == "teacher"
    assert source("copy={teacher: student}") is None
    assert source("copy={teacher: student}", "discriminator={taps: [mid], width: 8}", "method.gan.weight=0.1") == "data"


def test_settings_are_checked():
    with pytest.raises(RecipeError, match="'retreat' is not one of off, warn, stop, restore"):
        short("train.guard=retreat")
    with pytest.raises(RecipeError, match="readings_every must be at least 1"):
        short("train.readings_every=0")


def test_a_run_that_went_back_ends_at_its_best(tmp_path: Path):
    """After the return a smaller drift goes on: too little for an alarm, enough that the end is worse."""
    run = tmp_path / "run"
    trainer = start(run, "train.guard=restore", bias=lambda share: DARKER if share == 1 else 0.012)
    shown: list[torch.Tensor] = []
    trainer.hooks.on_step = lambda t: shown.append(next(t.roles.student.parameters()).detach().clone())
    trainer.fit()
    assert torch.equal(shown[-1], next(trainer.roles.student.parameters()))  # what a picture of the end would show
    (act,) = [r["guard"] for r in records(run) if "guard" in r]
    (end,) = [r for r in records(run) if "ends_with" in r]
    assert trainer.progress.done == end["done"] == 120
    assert act["to"] <= end["ends_with"] < 120
    course, far = Course(), {}
    for row in records(run):
        if row.get("stage") == 1:
            course.add(row)
            far[row["done"]] = course.drift()
    ended = max(d for d in far if d <= end["ends_with"])
    assert far[ended] <= course.least + TIE < far[120]
    best = best_of(run / "checkpoints")
    assert best.name == f"step-{end['ends_with']:08d}"
    last = checkpoints(run / "checkpoints")[-1]
    assert last.name == "step-00000120"
    held, ended = contents(best), contents(last)
    same_weights = same(*({k: v for k, v in c.items() if k != "progress"} for c in (held, ended)))
    assert [line for line in same_weights if "/param_groups/0/lr:" not in line] == []  # set anew at every step
    assert read_guard(last) == read_guard(best) | {"copy": True}
    assert "ends with that one's weights" in trainer.lines[-1]
    assert act["to"] <= ONSET
    # Who opens the run finds it finished.
    again = start(run, "train.guard=restore")
    assert again.progress.done == again.total_steps


def guard_of(by: str, measured: tuple[int, float | None] = (-1, None), mode: str = "restore") -> Guard:
    """A guard that went back once, in stage 1, and has no reading since."""
    guard = Guard.__new__(Guard)
    guard.by, guard.mode, guard.acts, guard.stage, guard.course = by, mode, [{"to": 10}], 1, Course()
    guard._measured, guard.ended, guard.pulse = measured, (-1, {}), Pulse()
    return guard


def test_an_end_that_nobody_has_measured_is_kept():
    held = {"by": "metric", "score": 2.0}
    assert not guard_of("metric").worse(120, 1, held)
    assert not guard_of("metric", (100, 9.0)).worse(120, 1, held)
    assert [guard_of("metric", (120, v)).worse(120, 1, held) for v in (1.0, 2.0, 2.01, math.nan)] == [
        False,
        False,
        True,
        True,
    ]
    assert not guard_of("metric", (120, 3.0)).worse(120, 1, {"by": "readings", "score": 0.1})  # these do not compare
    assert guard_of("readings").worse(120, 1, {"by": "readings", "score": 0.1})


@pytest.mark.parametrize("mode", ["off", "warn", "stop"])
def test_only_a_guard_that_restores_ends_at_the_best(mode: str, tmp_path: Path):
    nothing: Any = None  # neither the loop nor a checkpoint is looked at
    assert end_at_best(nothing, tmp_path, guard_of("readings", mode=mode), 1) is None
    with pytest.raises(AttributeError):
        end_at_best(nothing, tmp_path, guard_of("readings"), 1)
