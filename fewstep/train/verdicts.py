"""Is my run healthy? Verdicts in words from a log's records, each with its value, its line and the knob to turn.

`verdicts(records)` is what `fewstep health`, the progress display and a run's page show. It is a pure function of the
records of log.jsonl. Two kinds of readings are judged:

- Those of the method's own batches (`health/`, the discriminator's accuracy): the last fifth of the stage's records,
  against the stage's own best or against what the reading is when all is well.
- Those of samples drawn beside the training (`samples/`, `fewstep.train.samples`) and refused updates: the last two
  readings, so that a few updates tell; and of the method's own samples a leap (`fewstep.train.pulse`) or a drift
  (`fewstep.train.drift`). These are what `train.guard` acts on, by `Course`.

A student that is only on its way is no alarm: one is raised where two readings of samples in a row are beyond their line,
or one is far beyond it, *and* two in a row have been nearer to the reference before; or where two of their means in a row
leave what it has been for long. One that never was near it is a warning.

Critic lag is a slope, that of fresh samples on the critic's answers, and not the critic's loss against its best: the
least loss there is moves with the student, whereas the slope of a critic at its optimum is 1 for every student. Methods
without a critic, and a Phased DMD phase that ends above clean samples, have none.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from fewstep.train.drift import Drift
from fewstep.train.hacking import REMEDY, Rise
from fewstep.train.lines import FADE, SAMPLES, SATURATE, SHRINK, SLOWER
from fewstep.train.pulse import LEAPS
from fewstep.train.track import RECENT, Track

Record = Mapping[str, Any]

FEWEST = 10
"""Records of a stage below which nothing is said of the method's readings: a mean over fewer is mostly noise."""
LAG = 0.2
"""Distance of the critic's slope on fresh samples from 1, above which the critic does not follow."""
WIN = 0.95
"""Discriminator accuracy above which the student sees no usable gradient."""
LOSE = 0.45
"""Discriminator accuracy below which it tells nothing (0.5 is a coin)."""
SKIPS = 0.01
"""Share of refused updates above which numerics are in trouble."""
ODD = 2
"""Refused updates of a stage that are no trouble, however short it is."""
COPIES = 0.01
"""Spread of the method's own samples over the best that two records in a row had: below, they are nearly copies."""
SUDDEN = "sudden change"
"""The alarm on a leap."""
DRASTIC = 3.0
"""Lines from the reference at which one reading of samples is enough, not the nearer of two in a row, once it has
settled: an adversarial student may lurch and come back within its first updates."""
NEAR = 0.5
"""Lines within which a reading has been near; beyond its line it is then an alarm."""
FARTHER = 0.9
"""By how many lines one that has not been near must be farther than it was, to be an alarm. Of a student that is still on
its way, half a line is nothing (latent consistency on the ring: spread 0.8, 0.7, 0.5, 0.7)."""


@dataclass(frozen=True)
class Verdict:
    """One finding about a reading; `fine` ones have no remedy."""

    name: str
    """What was found, in two or three words."""
    level: Literal["fine", "warn", "alarm"]
    """warn: is not as it should be, but never was; alarm: goes wrong."""
    value: float
    """The reading."""
    line: float
    """Where the reading's line is on the side that it is nearer to."""
    sentence: str
    """The finding in words."""
    remedy: str = ""
    """Which knob to turn."""

    @property
    def fine(self) -> bool:
        return self.level == "fine"


def series(records: Sequence[Record], key: str) -> list[float]:
    """The values of a reading in the records that have it."""
    return [float(r[key]) for r in records if isinstance(r.get(key), int | float)]


def _windows(values: Sequence[float]) -> list[float]:
    """Means of five consecutive, nearly equal parts."""
    edges = [round(i * len(values) / 5) for i in range(6)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def critic(records: Sequence[Record]) -> Verdict | None:
    """Critic lag: a critic at its optimum for the present student has slope 1 on fresh samples.

    Its denoising loss alone does not tell: that of a perfect critic grows as samples spread.
    """
    values = series(records, "health/critic_slope")
    if len(values) < FEWEST:
        return None
    slope = _windows(values)[-1]
    line = 1 + math.copysign(LAG, slope - 1)
    text = f"slope of fresh samples on the critic's answers is {slope:.2f}, 1 when it follows"
    if not abs(slope - 1) <= LAG:
        knob = "raise method.critic.steps or optim.critic.lr, or lower optim.student.lr"
        return Verdict("critic too slow", "alarm", slope, line, text, knob)
    return Verdict("critic", "fine", slope, line, text)


def _no_number(name: str, line: float, text: str) -> Verdict:
    """A reading that no comparison finds beyond its line."""
    knob = "go on from a checkpoint before it, with lower optim.*.lr or train.precision=fp32"
    return Verdict(f"{name}: no number", "alarm", math.nan, line, text, knob)


def _within(
    value: float,
    text: str,
    low: float,
    high: float,
    *,
    names: tuple[str, str, str],
    knobs: tuple[str, str],
    centre: float,
) -> Verdict:
    """A reading between two lines. names: below, between and above them; knobs: for what lies below and above."""
    if math.isnan(value):
        return _no_number(names[1], high, text)
    if value > high:
        return Verdict(names[2], "alarm", value, high, text, knobs[1])
    if value < low:
        return Verdict(names[0], "alarm", value, low, text, knobs[0])
    return Verdict(names[1], "fine", value, high if value > centre else low, text)


def discriminator(records: Sequence[Record]) -> Verdict | None:
    """Discriminator accuracy on real and generated samples."""
    values = series(records, "discriminator_accuracy")
    if len(values) < FEWEST:
        return None
    last = _windows(values)[-1]
    knobs = (
        "raise optim.discriminator.lr or method.gan.discriminator_weight",
        "lower optim.discriminator.lr, raise method.gan.r1_weight, or show it noisier samples (method.gan.times)",
    )
    names = ("discriminator lost", "discriminator", "discriminator winning")
    text = f"discriminator is right on {100 * last:.0f} % of samples"
    return _within(last, text, LOSE, WIN, names=names, knobs=knobs, centre=0.0)


def diversity(records: Sequence[Record]) -> Verdict | None:
    """Spread of a batch of samples against the best it has had in this stage."""
    values = series(records, "health/diversity")
    if len(values) < FEWEST:
        return None
    parts = _windows(values)
    if max(parts) == 0:
        return None  # one sample at a time
    share = parts[-1] / max(max(parts), 1e-12)
    text = f"spread of the samples is {share:.2f} of its best"
    if math.isnan(share):
        return _no_number("diversity", SHRINK, text)
    if share < SHRINK:
        knob = "lower optim.student.lr or the guidance, raise method.critic.steps, or lower method.gan.weight"
        return Verdict("collapsing", "alarm", share, SHRINK, text, knob)
    return Verdict("diversity", "fine", share, SHRINK, text)


def contrast(records: Sequence[Record]) -> Verdict | None:
    """Size of samples against the teacher's opinion of them at low noise."""
    values = series(records, "health/contrast")
    if len(values) < FEWEST:
        return None
    last = _windows(values)[-1]
    text = f"samples are {last:.2f} times as large as the teacher's denoiser makes them"
    knobs = (
        "train longer; check that the student's first level is the prior",
        "lower method.guidance, or strengthen the critic's term",
    )
    names = ("washed out", "contrast", "oversaturated")
    return _within(last, text, FADE, SATURATE, names=names, knobs=knobs, centre=1.0)


CHECKS: tuple[Callable[[Sequence[Record]], Verdict | None], ...] = (critic, discriminator, diversity, contrast)


class Course:
    """Refused updates, readings of drawn samples and rewards, copies, leaps and drifts of own samples, of one stage.

    Folded record by record; it is all that the guard looks at.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.tracks, self.rise = {key: Track(reading) for key, reading in SAMPLES.items()}, Rise()
        self.leap: dict[str, float] = {}
        self.drifting = Drift()
        self.least = math.inf
        """Of what `drift` has been without an alarm."""
        self.leapt: tuple[float, str, float] | None = None
        """The stage's first leap: steps done, key, value."""
        self.own, self.widest = deque[float](maxlen=RECENT), 0.0
        self.first: tuple[float, float] | None = None
        self.last, self.rows = (0.0, 0.0), 0
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """The next record of the stage."""
        if isinstance(record.get("skips"), int | float) and "done" in record:
            self.last = (float(record["done"]), float(record["skips"]))
            self.first, self.rows = self.first or self.last, self.rows + 1
        self.rise.add(record)
        self.drifting.add(record)
        if isinstance(record.get("health/diversity"), int | float):
            self.own.append(float(record["health/diversity"]))
            self.widest = max(self.widest, min(self.own)) if len(self.own) == RECENT else 0.0
        self.leap = {key: float(record[key]) for key in LEAPS if isinstance(record.get(key), int | float)}
        for key, value in self.leap.items():
            self.leapt = self.leapt or (float(record.get("done", 0)), key, value)
        for key, track in self.tracks.items():
            if isinstance(record.get(key), int | float):
                track.add(float(record[key]), record.get(track.reading.course))
        if any(key in record for key in self.tracks) and not self.alarms():
            known = [t for t in self.tracks.values() if t.recent]
            if known and all(t.count >= RECENT for t in known):
                self.least = min(self.least, self.drift() or 0.0)

    def verdicts(self) -> list[Verdict]:
        """What is said of it now."""
        # A reward moves samples on purpose; whether too far, `hacking` tells.
        found = [_of_samples(track, moves=not self.rise.known) for track in self.tracks.values()]
        found += [_sudden(key, value) for key, value in self.leap.items()]
        if self.leapt and not self.leap:
            done, key, value = self.leapt
            found.append(_sudden(key, value, done))
        found.append(self._moving({v.name for v in found if v is not None and v.level == "alarm"}))
        return [v for v in [*found, self._copies(), _of_reward(self.rise), self._skipped()] if v is not None]

    def alarms(self) -> list[Verdict]:
        return [v for v in self.verdicts() if v.level == "alarm"]

    def drift(self) -> float | None:
        """How far samples are from the reference, in lines, root of the sum of squares; None before the first reading.

        Of each reading the worse of the last two: a state that has just begun to leave is none to go back to.
        """
        worst = [max(map(t.reading.badness, t.recent)) for t in self.tracks.values() if t.recent]
        return math.hypot(*worst) if worst else None

    def _moving(self, told: set[str]) -> Verdict | None:
        """Samples of the method that move away, where drawn ones, if there are any, have not come nearer meanwhile.

        told: alarms that drawn samples raise already.
        """
        left = None if self.rise.known else self.drifting.left()
        if left is None or self.tracks["samples/mean"].nearer():
            return None
        value, limit = left
        reading = SAMPLES["samples/mean"]
        name, knob = (reading.below if value < 0 else reading.above) or (reading.fine, SLOWER)
        text = f"the mean of the method's own samples has moved by {value:+.2f} of their standard deviations"
        return None if name in told else Verdict(name, "alarm", value, limit, text, knob)

    def _copies(self) -> Verdict | None:
        """Samples of one update that have become nearly the same, whatever other samples of the student are.

        Only an alarm: how far they spread is told by `diversity`.
        """
        if not max(self.own, default=math.inf) < COPIES * self.widest:
            return None
        share = max(self.own) / self.widest
        text = f"the samples of an update spread {share:.2g} times as far as they did"
        knob = "see whether every sample has noise and a condition of its own (data, sampler, ranks of one seed)"
        return Verdict("copies in a batch", "alarm", share, COPIES, text, knob)

    def _skipped(self) -> Verdict | None:
        """Updates that were refused because a gradient was not finite."""
        if self.first is None or self.rows < FEWEST:
            return None
        refused = self.last[1] - self.first[1]
        share = refused / max(1.0, self.last[0] - self.first[0])
        text = f"{self.last[1]:.0f} updates had a non-finite gradient"
        if share > SKIPS and refused > ODD:
            knob = "use train.precision=fp32 or lower optim.*.lr"
            return Verdict("non-finite gradients", "alarm", share, SKIPS, text, knob)
        return Verdict("numerics", "fine", share, SKIPS, text)


def _of_samples(track: Track, moves: bool = True) -> Verdict | None:
    """What is said of a reading of drawn samples; moves: that it leaves where it has settled, too."""
    if track.count < RECENT:
        return None
    reading, latest = track.reading, track.recent[-1]
    alone = reading.badness(latest) > DRASTIC and track.settled
    nearest = latest if alone else min(track.recent, key=reading.badness)
    value = next((v for v in track.recent if not math.isfinite(v)), nearest)
    badness, line = reading.badness(value), reading.line(value)
    told = reading.text.format(value)
    beyond = reading.below if value < reading.centre else reading.above
    allowed = max(1.0, track.best + (FARTHER if track.best > NEAR else 0.0))
    if moves and badness <= allowed and (left := track.left()) is not None:
        now, limit, was = left
        name, knob = (reading.below if now < reading.centre else reading.above) or (reading.fine, SLOWER)
        text = f"{reading.text.format(now)} and moves away; for long it was {was:.2f} off"
        return Verdict(name, "alarm", now, limit, text, knob)
    if badness <= 1:
        return Verdict(reading.fine, "fine", value, line if line is not None else reading.centre, told)
    if beyond is None or line is None or not math.isfinite(value):
        return Verdict("not finite", "alarm", value, reading.high, "samples are not finite", SLOWER)
    if badness > allowed:
        return Verdict(beyond[0], "alarm", value, line, told, beyond[1])
    if track.count < FEWEST:
        return None
    return Verdict(beyond[0], "warn", value, line, f"{told}, and never were much nearer", beyond[1])


def _sudden(key: str, value: float, done: float | None = None) -> Verdict:
    """A leap; done: where one was that is over, samples having stayed where it took them or come back."""
    text, line = LEAPS[key]
    if done is None:
        return Verdict(SUDDEN, "alarm", value, line, text.format(value), SLOWER)
    return Verdict(SUDDEN, "warn", value, line, f"{text.format(value)} at step {done:.0f}", SLOWER)


def _of_reward(rise: Rise) -> Verdict | None:
    """Whether a reward is earned at the samples' cost; None without readings of one."""
    if not rise.known:
        return None
    value, line, text = rise.worst()
    if rise.hacked():
        return Verdict("reward hacking", "alarm", value, line, text, REMEDY)
    return Verdict("reward", "fine", value, line, text)


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Findings about the last stage of a log; empty when it is too short to say anything."""
    last = last_stage(records)
    return [v for check in CHECKS if (v := check(last)) is not None] + Course(last).verdicts()


LOOKS = 100
"""Number of moments of a log at which `alarms` looks at the method's own readings."""


def alarms(records: Sequence[Record]) -> dict[str, int]:
    """Each alarm that a stage's log raises while it grows, with the number of steps done when it came first.

    `records` are those of one stage. Samples are looked at after each record, as the guard does, the method's own
    readings at no more than LOOKS evenly spaced moments.
    """
    first: dict[str, int] = {}
    course = Course()
    moments = {*range(FEWEST, len(records) + 1, max(1, len(records) // LOOKS)), len(records)}
    for n, record in enumerate(records, 1):
        course.add(record)
        found = course.alarms()
        if n in moments:
            found += [v for check in CHECKS if (v := check(records[:n])) is not None and v.level == "alarm"]
        for v in found:
            first.setdefault(v.name, int(record.get("done", 0)))
    return first


def last_stage(records: Sequence[Record]) -> list[Record]:
    """The records of a log's last stage."""
    training = [r for r in records if "stage" in r]
    return [r for r in training if r["stage"] == training[-1]["stage"]]
