"""Is my run healthy? Verdicts in words from a run's log, each with the knob to turn.

Every verdict compares readings over the last fifth of the last stage's records with the stage's own best or with
what the reading is when all is well; the thresholds are constants below.

Critic lag is read as a slope, that of fresh student samples on the critic's answers, and not as the critic's denoising
loss against its running best: the least loss there is moves with the student (it grows as samples spread and falls as
they collapse), so that a best of the past says nothing of today's critic, whereas the slope of a critic at its optimum
is 1 for every student. Methods without a critic, and a Phased DMD phase that ends above clean samples, have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fewstep.config import UserError
from fewstep.train.log import read_log

FEWEST = 10
"""Records of a stage below which nothing is said: a mean over fewer is mostly noise."""
LAG = 0.2
"""Distance of the critic's slope on fresh samples from 1, above which the critic does not follow."""
WIN = 0.95
"""Discriminator accuracy above which the student sees no usable gradient."""
LOSE = 0.45
"""Discriminator accuracy below which it tells nothing (0.5 is a coin)."""
SHRINK = 0.6
"""Diversity over its best window, below which samples are collapsing."""
SATURATE = 1.35
"""Root mean square of samples over the teacher's denoiser of them at low noise, above which they oversaturate."""
FADE = 0.75
"""The same ratio, below which samples are washed out."""
SKIPS = 0.01
"""Share of refused updates above which numerics are in trouble."""


@dataclass(frozen=True)
class Verdict:
    """One finding; `fine` verdicts have no advice."""

    name: str
    fine: bool
    text: str
    advice: str = ""


def _series(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [float(r[key]) for r in records if isinstance(r.get(key), (int, float))]


def _windows(values: Sequence[float]) -> list[float]:
    """Means of five consecutive, nearly equal parts."""
    n = len(values)
    edges = [round(i * n / 5) for i in range(6)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def critic(records: Sequence[dict[str, Any]]) -> Verdict | None:
    """Critic lag: a critic at its optimum for the present student has slope 1 on fresh samples.

    Its denoising loss alone does not tell: that of a perfect critic grows as samples spread.
    """
    values = _series(records, "health/critic_slope")
    if len(values) < FEWEST:
        return None
    slope = _windows(values)[-1]
    text = f"slope of fresh samples on the critic's answers is {slope:.2f}, 1 when it follows"
    if abs(slope - 1) > LAG:
        knob = "raise method.critic.steps or optim.critic.lr, or lower optim.student.lr"
        return Verdict("critic too slow", False, text, knob)
    return Verdict("critic", True, text)


def discriminator(records: Sequence[dict[str, Any]]) -> Verdict | None:
    """Discriminator accuracy on real and generated samples."""
    values = _series(records, "discriminator_accuracy")
    if len(values) < FEWEST:
        return None
    last = _windows(values)[-1]
    text = f"discriminator is right on {100 * last:.0f} % of samples"
    if last > WIN:
        knob = "lower optim.discriminator.lr, raise method.gan.r1_weight, or show it noisier samples (method.gan.times)"
        return Verdict("discriminator winning", False, text, knob)
    if last < LOSE:
        return Verdict(
            "discriminator lost",
            False,
            text,
            "raise optim.discriminator.lr or method.gan.discriminator_weight",
        )
    return Verdict("discriminator", True, text)


def diversity(records: Sequence[dict[str, Any]]) -> Verdict | None:
    """Spread of a batch of samples against the best it has had in this stage."""
    values = _series(records, "health/diversity")
    if len(values) < FEWEST:
        return None
    parts = _windows(values)
    share = parts[-1] / max(max(parts), 1e-12)
    text = f"spread of the samples is {share:.2f} of its best"
    if share < SHRINK:
        knob = "lower optim.student.lr or the guidance, raise method.critic.steps, or lower method.gan.weight"
        return Verdict("collapsing", False, text, knob)
    return Verdict("diversity", True, text)


def contrast(records: Sequence[dict[str, Any]]) -> Verdict | None:
    """Size of samples against the teacher's opinion of them at low noise."""
    values = _series(records, "health/contrast")
    if len(values) < FEWEST:
        return None
    last = _windows(values)[-1]
    text = f"samples are {last:.2f} times as large as the teacher's denoiser makes them"
    if last > SATURATE:
        return Verdict("oversaturated", False, text, "lower method.guidance, or strengthen the critic's term")
    if last < FADE:
        return Verdict("washed out", False, text, "train longer; check that the student's first level is the prior")
    return Verdict("contrast", True, text)


def skipped(records: Sequence[dict[str, Any]]) -> Verdict | None:
    """Updates that were refused because a gradient was not finite."""
    done = [r for r in records if "done" in r and isinstance(r.get("skips"), (int, float))]
    if len(done) < FEWEST:
        return None
    steps = max(1, done[-1]["done"] - done[0]["done"])
    share = (done[-1]["skips"] - done[0]["skips"]) / steps
    text = f"{done[-1]['skips']:.0f} updates had a non-finite gradient"
    if share > SKIPS:
        return Verdict("non-finite gradients", False, text, "use train.precision=fp32 or lower optim.*.lr")
    return Verdict("numerics", True, text)


CHECKS: tuple[Callable[[Sequence[dict[str, Any]]], Verdict | None], ...] = (
    critic,
    discriminator,
    diversity,
    contrast,
    skipped,
)


def verdicts(records: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Findings about the last stage of a log; empty when it is too short to say anything."""
    last = last_stage(records)
    return [v for check in CHECKS if (v := check(last)) is not None]


LOOKS = 100
"""Number of moments of a log at which `alarms` looks."""


def alarms(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Each alarm that a stage's log raises while it grows, with the number of steps done when it came first.

    `records` are those of one stage. Looks at no more than LOOKS evenly spaced moments.
    """
    first: dict[str, int] = {}
    stride = max(1, len(records) // LOOKS)
    for n in sorted({*range(FEWEST, len(records) + 1, stride), len(records)}):
        for check in CHECKS:
            v = check(records[:n])
            if v is not None and not v.fine:
                first.setdefault(v.name, int(records[n - 1].get("done", 0)))
    return first


def last_stage(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of a log's last stage."""
    training = [r for r in records if "stage" in r]
    return [r for r in training if r["stage"] == training[-1]["stage"]]


def report(run: Path) -> str:
    """All findings of a run directory as text, or the first and last readings of a log too short for findings.

    UserError when there is no log, or none of its readings.
    """
    path = run / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{run}: has no log.jsonl; is it a run directory?")
    records = read_log(path)
    found = verdicts(records)
    if not found:
        return short(run, last_stage(records))
    width = max(len(v.name) for v in found)
    since = alarms(last_stage(records))
    lines = []
    for v in found:
        when = "" if v.fine or v.name not in since else f" (alarm since step {since[v.name]})"
        lines.append(f"{'ok   ' if v.fine else 'ALARM'}  {v.name:<{width}}  {v.text}{when}")
        if v.advice:
            lines.append(f"{'':<{9 + width}}-> {v.advice}")
    wrong = [v.name for v in found if not v.fine]
    return "\n".join([*lines, "", f"{run.name}: {', '.join(wrong) if wrong else 'fine'}"])


def short(run: Path, records: Sequence[dict[str, Any]]) -> str:
    """What a log says that has no findings: where each reading began and where it is."""
    skip = ("done", "stage", "lr/", "seconds")
    keys = [k for k in dict.fromkeys(k for r in records for k in r) if not k.startswith(skip) and _series(records, k)]
    if not keys:
        raise UserError(f"{run}: has no record in its log yet; train longer or lower train.log_every")
    count = f"{len(records)} record{'s' * (len(records) > 1)} in the last stage"
    why = f"judged from {FEWEST} on: train longer or lower train.log_every"
    if len(records) >= FEWEST:
        why = "none of its readings is judged"
    width = max(map(len, keys))
    rows = [(k, _series(records, k)) for k in keys]
    return "\n".join([f"{k:<{width}}  {v[0]:.3g} -> {v[-1]:.3g}" for k, v in rows] + ["", f"{run.name}: {count}, {why}"])
