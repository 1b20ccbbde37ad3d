"""The guard of a training: alarms as they come, which checkpoint is the best, and how often one goes back to it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.config import UserError
from fewstep.recipe.schema import Recipe, Stage
from fewstep.train.lines import TIE
from fewstep.train.log import Meter, read_log
from fewstep.train.pulse import KEYS, LEAST, Pulse
from fewstep.train.samples import SampleReadings
from fewstep.train.session import Session
from fewstep.train.state import Progress, checkpoints, is_sound, read_guard
from fewstep.train.verdicts import SUDDEN, Course, Record, Verdict

KNOB = "student"
"""The role whose rate is lowered: a critic follows a student that moves less (two time scales)."""
LOWER = 0.25
"""Factor on the student's rate at each return."""
RETURNS = 2
"""Returns to the best checkpoint, after which the training stops."""


class Stopped(UserError):
    """A training that its guard has ended."""


class Guard:
    """What is known of a stage's samples and updates while it trains.

    Args:
        session: what is trained.
    """

    def __init__(self, session: Session) -> None:
        self.recipe = session.recipe
        train = self.recipe.train
        self.mode = train.guard
        self.readings = None if self.mode == "off" else SampleReadings(session, train.readings_every)
        self.acts: list[dict[str, Any]] = []
        """Returns so far, as they stand in the log."""
        self.course, self.stage = Course(), 0
        self.pulse = Pulse()
        self.sudden = False
        """The update's own samples have leapt, which the log has not told yet."""
        self._session = session
        self.share = train.batch // train.accumulate // session.accelerator.num_processes
        """Samples of a micro-batch of one process."""
        self._known: set[str] = set()
        self._noted = ""
        self.by = "metric" if train.eval_every and self.recipe.evaluate else "readings"
        self._measured: tuple[int, float | None] = (-1, None)
        self.ended: tuple[int, dict[str, Any]] = (-1, {})
        """Step at which the weights are those of a checkpoint from before, and what that one holds of itself."""

    def blind(self, log: Path | None) -> str | None:
        """What it judges by where no samples are compared; None where some are, or where the log says it already."""
        if self.readings is None or self.readings.source() is not None:
            return None
        back = "; it goes back to the newest checkpoint without an alarm" * (
            self.mode == "restore" and self.by != "metric"
        )
        line = (
            f"train.guard={self.mode}: no samples are compared, there is neither a teacher that stays as it is nor data; "
            f"refused updates{', changes of own samples' * (self.share >= LEAST)} and copies in a batch remain{back}"
        )
        noted = line == self._noted or (log is not None and any(r.get("note") == line for r in read_log(log)))
        self._noted = line
        return None if noted else line

    def read(self, stage: Stage, progress: Progress, meter: Meter, first: bool = False) -> dict[str, float]:
        """The readings that are due after an update, and before a stage's first one; empty where none is.

        meter: with what the update has added.
        """
        if self.readings is None:
            return {}
        leaps = self._leaps(meter, first)
        due = first or self.readings.due(stage, progress.done)
        return {**leaps, **(self.readings.read(stage, progress.step) if due and self.readings.source() else {})}

    def _leaps(self, meter: Meter, first: bool) -> dict[str, float]:
        """Leaps of the update's own samples."""
        if first:
            self.pulse = Pulse()
            self._known.discard(SUDDEN)
        own = {key: values for key in KEYS if (values := meter.newest(key))}
        self.sudden = False
        if first or len(own) < len(KEYS) or self.share < LEAST:
            return {}
        means = self._session.means(own)
        leaps = self.pulse.add([sum(means[key]) / len(means[key]) for key in KEYS])
        self.sudden = bool(leaps) and SUDDEN not in self._known
        return leaps

    def add(self, record: Record) -> list[Verdict]:
        """Take the next record of the log; the alarms that no record of the stage has raised before."""
        if self.mode == "off":
            return []
        if record["stage"] != self.stage:
            self.course, self.stage, self._known = Course(), record["stage"], set()
        self.course.add(record)
        alarms = self.course.alarms()
        new = [v for v in alarms if v.name not in self._known]
        self._known |= {v.name for v in alarms}
        return addressed(new, self.recipe, record["stage"])

    def again(self, records: Iterable[Record], checkpoint: Path) -> None:
        """Stand where a log ends, and a checkpoint, which need not be there."""
        self.course, self.stage, self._known = Course(), 0, set()
        self.pulse = Pulse((read_guard(checkpoint) or {}).get("pulse", ()))
        for record in records:
            if "stage" in record:
                self.add(record)

    def measured(self, done: int, value: float | None, run: Path | None) -> bool:
        """Take what the run's metric says of a state, less being better; whether no checkpoint is as good."""
        self._measured = (done, value)
        score = self.mark(done, self.stage).get("score")
        if score is None or run is None:
            return False
        best = best_of(run / "checkpoints", self.stage)
        held = read_guard(best) if best else None
        return held is None or held["by"] != self.by or score < held["score"]

    def mark(self, done: int, stage: int) -> dict[str, Any]:
        """What a checkpoint holds of it: returns so far, whether there is no alarm, and the score, less being better.

        stage: that of the last step, or the one that is about to begin.
        """
        if self.mode == "off" and not self.acts:
            return {}
        if self.ended[0] == done:
            return {**self.ended[1], "acts": self.acts, "copy": True}
        here = stage == self.stage
        calm = not (here and self.course.alarms())
        score = self.course.drift() if here else None
        if self.by == "metric":
            score = self._measured[1] if self._measured[0] == done else None
        good = calm and score is not None and math.isfinite(score)
        held = {"stage": stage, "calm": calm, "by": self.by, "score": score if good else None, "acts": self.acts}
        if here and self.by != "metric" and math.isfinite(self.course.least):
            held["least"] = self.course.least
        return {**held, "pulse": [list(row) for row in self.pulse.rows]}

    def worse(self, done: int, stage: int, held: Mapping[str, Any]) -> bool:
        """Whether a state is worse than a checkpoint of this mark; of one that no evaluation was made of nobody knows."""
        here = self.mark(done, stage)
        unknown = self.by == "metric" and self._measured[0] != done and here["calm"]
        if unknown or held["by"] != self.by:
            return False
        if here["score"] is None or held["score"] is None:
            return here["score"] is None
        alike = self.by != "metric" and as_good(here["score"], [held, here])
        return here["score"] > held["score"] and not alike

    def act(self, alarm: Verdict, at: int, to: int, stage: int) -> dict[str, Any]:
        """A return to step `to` of a stage, which may have no record yet, as log and checkpoints hold it."""
        value = alarm.value if math.isfinite(alarm.value) else None
        knob = rate_of(self.recipe, LOWER ** (len(self.acts) + 1), stage)
        return {"alarm": alarm.name, "value": value, "line": alarm.line, "at": at, "to": to, "knob": knob}

    def rates(self) -> dict[str, float]:
        """Factors on learning rates, by role."""
        return {KNOB: LOWER ** len(self.acts)} if self.acts else {}


def best_of(folder: Path, stage: int | None = None) -> Path | None:
    """The checkpoint with the best score among the newest one's stage, or a given one's; None where none has a score.

    By readings it is the newest that is as good as the best state there was, but for chance, with a newer one as good
    behind it where there are several: it has learnt for longest, and what went wrong right after its readings would show
    in the other's.
    """
    marks = {p: mark for p in checkpoints(folder) if is_sound(p) and (mark := read_guard(p))}
    if stage is None:
        stage = max((m["stage"] for m in marks.values()), default=None)
    marks = {p: m for p, m in marks.items() if m["stage"] == stage}
    scored = {p: m for p, m in marks.items() if m["score"] is not None and not m.get("copy")}
    # An evaluation says more than a few readings; the two do not compare.
    if measured := [p for p, m in scored.items() if m["by"] == "metric"]:
        return min(measured, key=lambda p: (scored[p]["score"], p.name))
    known = [m for m in marks.values() if m["by"] != "metric"]
    good = sorted(p for p, m in scored.items() if as_good(m["score"], known))
    if not good:  # none was saved where samples were nearest
        low = min((m["score"] for m in scored.values()), default=math.inf)
        good = sorted(p for p, m in scored.items() if m["score"] <= low + TIE)
    # The newer ones behind the state that was last gone back to are gone.
    acts = marks[max(marks)]["acts"] if marks else []
    back = [p for p in good if acts and p.name == f"step-{acts[-1]['to']:08d}"]
    return max([*good[-2:][:1], *back], default=None)


def as_good(score: float, marks: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a score by readings is the best that these marks know of, but for chance."""
    known = [m["least"] if isinstance(m.get("least"), int | float) else m["score"] for m in marks]
    return score <= min((v for v in known if v is not None), default=math.inf) + TIE


def way_back(folder: Path, stage: int) -> Path | None:
    """`best_of` a stage, or where none has a score the newest checkpoint without an alarm; None without either."""
    marks = {p: read_guard(p) for p in checkpoints(folder) if is_sound(p)}
    calm = [p for p, m in marks.items() if m and m["stage"] == stage and m["calm"]]
    return best_of(folder, stage) or (calm[-1] if calm else None)


def said(v: Verdict, done: int) -> str:
    """An alarm as a line."""
    return f"step {done}: ALARM {v.name}: {v.sentence} (line {v.line:.3g}); {v.remedy}"


def addressed(found: Sequence[Verdict], recipe: Recipe, number: int) -> list[Verdict]:
    """Findings with remedies that name the keys of the stage of this number, where a stage before the method has them."""
    if number >= len(recipe.before):
        return list(found)
    stage, own = recipe.before[number], f"before.{number}."

    def named(match: re.Match[str]) -> str:
        key = match[0]
        if key == "optim.*.lr":
            return f"{key} or {own}rates" if stage.rates else key
        if key.startswith("optim."):
            role = key.split(".")[1]
            return f"{own}rates.{role}" if role in stage.rates else key
        part: Any = stage.method
        for word in key.split(".")[1:]:
            if not hasattr(part, word):
                return f"{key}, which this stage has not"
            part = getattr(part, word)
        return own + key

    keys = re.compile(r"(?<![\w.])(?:optim\.[\w*]+\.lr|method(?:\.\w+)+)")
    return [replace(v, remedy=keys.sub(named, v.remedy)) for v in found]


def rate_of(recipe: Recipe, factor: float, number: int) -> str:
    """The lowered rate of the stage of this number in words; those of later stages are lowered with it."""
    stage, *later = recipe.stages()[number:]
    lr = recipe.optimizer(KNOB, stage).lr
    own = f"optim.{KNOB}.lr" if KNOB in recipe.optim else f"optim.default.lr of the {KNOB}"
    key = f"before.{number}.rates.{KNOB}" if KNOB in stage.rates else own
    alike = any(KNOB in {*s.rates, *stage.rates} for s in later)
    return f"{key} {lr:g} -> {lr * factor:g}" + ", later stages' rates alike" * alike
