"""How readings of drawn samples are judged: their lines, and what is said beyond them (see `fewstep.train.verdicts`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHRINK = 0.6
"""Spread of samples over that of the best window, or of the reference, below which samples are alike."""
SATURATE = 1.35
"""Size of samples over the teacher's denoiser of them, or their contrast over the reference's: above, oversaturated."""
FADE = 0.75
"""The same ratios, below which samples are washed out."""
SHIFT = 0.35
"""Distance of a channel's mean from the reference's, in standard deviations of the reference. Darkening until black
(threads byliutao/CDM#6, with DMD2 too) is some 1.5 of them."""
COLOUR = 1.5
"""Saturation of samples over the reference's, or its inverse, beyond which colours have left it."""
GRID = 4.0
"""Spectral peak at multiples of the patch's frequency, over the reference's, above which a grid shows (threads
Qwen-Image-Lightning#69, TSD-SR#17)."""
TIE = 0.25
"""Lines by which the distances from the reference of two states differ by chance. digits-dmd2 is 0.13 away after 60
updates, at FD 2.2, and 0.18, 0.29, 0.27 and 0.3 after 200 to 230, at FD 1.2."""


@dataclass(frozen=True)
class Reading:
    """How a reading of drawn samples is judged."""

    fine: str
    """What it is called when all is well."""
    below: tuple[str, str] | None
    """Name and remedy of what lies beyond the lower line; None: nothing lies there that matters."""
    above: tuple[str, str] | None
    """The same of the upper line."""
    centre: float
    """The reference's own value."""
    low: float
    high: float
    text: str
    log: bool = True
    """Ratios are compared by their logarithms."""
    course: str = ""
    """The key of the same reading, chance and all, whose course tells that it moves away; of the others only lines do."""

    def badness(self, value: float) -> float:
        """0 at the centre, 1 at the line; infinite for what is no number."""
        if not math.isfinite(value):
            return math.inf
        line = self.line(value)
        if line is None:
            return 0.0
        if not self.log:
            return abs(value - self.centre) / abs(line - self.centre)
        return abs(math.log(max(value, 1e-12) / self.centre) / math.log(line / self.centre))

    def at(self, signed: float) -> float:
        """The value of this `badness`, on the lower side where it is negative; of a side that has a line."""
        line = self.low if signed < 0 else self.high
        if not self.log:
            return self.centre + abs(signed) * (line - self.centre)
        return self.centre * (line / self.centre) ** abs(signed)

    def line(self, value: float) -> float | None:
        """The line on the side of a value; None where that side has none."""
        if value < self.centre:
            return self.low if self.below else None
        return self.high if self.above else None


SLOWER = "lower optim.student.lr (train.guard=restore goes back to the best checkpoint and does), or stop earlier"
SAMPLES: dict[str, Reading] = {
    "samples/mean": Reading(
        "brightness",
        ("darkening", f"{SLOWER}; more critic updates (method.critic.steps)"),
        ("brightening", f"{SLOWER}; more critic updates (method.critic.steps)"),
        0.0,
        -SHIFT,
        SHIFT,
        "the mean of samples is {:+.2f} standard deviations from the reference's",
        log=False,
        course="samples/offset",
    ),
    "samples/contrast": Reading(
        "contrast of samples",
        ("losing contrast", f"{SLOWER}; train longer where it never had more"),
        ("contrast too high", "lower method.guidance or optim.student.lr, or raise method.critic.steps"),
        1.0,
        FADE,
        SATURATE,
        "samples have {:.2f} times the reference's contrast",
    ),
    "samples/saturation": Reading(
        "colours",
        ("colours fading", f"{SLOWER}; train longer where it never had more"),
        ("colours too strong", "lower method.guidance or optim.student.lr, or raise method.critic.steps"),
        1.0,
        1 / COLOUR,
        COLOUR,
        "samples have {:.2f} times the reference's saturation",
    ),
    "samples/grid": Reading(
        "no grid",
        None,
        ("grid artefacts", f"{SLOWER}; lower method.gan.weight, or fewer taps of the discriminator"),
        1.0,
        1.0,
        GRID,
        "peaks at the patch's frequency are {:.1f} times the reference's",
    ),
    "samples/spread": Reading(
        "spread within a class",
        ("samples alike", "lower the guidance or optim.student.lr, raise method.critic.steps, or train longer"),
        None,
        1.0,
        SHRINK,
        1.0,
        "samples of one class or prompt spread {:.2f} times as far as the reference's",
    ),
}
"""Readings of drawn samples by their key in the log."""
