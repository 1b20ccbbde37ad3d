"""Readings of a few samples drawn beside the training: brightness, contrast, colours, grid and spread.

Every reading compares the student's samples with those of the teacher from the same noise and conditions, or with the
data's where there is no teacher: the `samples/` keys of a log's record. The draws are functions of the seed alone, so
that training is bit for bit what it is without them. Why these: few-step students of late 2026 darken until black
within some hundred updates (byliutao/CDM#6, Tongyi-MAI/Z-Image#56), become alike (Z-Image#16) or get grids
(Qwen-Image-Lightning#69).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.condition import rows
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.guidance import guided_teacher
from fewstep.algebra.sampling import Sampler, many_step, sample, seeded
from fewstep.data.base import conditions_of
from fewstep.methods.readings import spread
from fewstep.methods.reward import follows_reward
from fewstep.networks.specs import innermost_denoiser
from fewstep.recipe.schema import Stage
from fewstep.train.session import Session

MOST = 32
"""Samples of a reading, or as many as a batch has, but ALIKE at least: one tells nothing of what chance does."""
ALIKE = 4
"""Samples of each condition."""
TEACHER_STEPS = 8
"""Heun steps of the teacher's samples."""
JUDGED = 256
"""Samples of a reading where a reward is trained on, or as many as a quarter of NUMBERS holds: fewer tell no hacking."""
REAL = 256
"""Samples of the data where they are the reference."""
NUMBERS = 1 << 24
"""Numbers in a reading's samples; large pictures are fewer."""
CHANCE = 2.0
"""Standard errors by which two means may differ and be the same."""
ROUNDING = 1e-5
"""Of the size of samples: what copies of one sample differ by, in half precision not even that."""
FLOOR = 0.01
"""Of the mean power, added to what a spectral peak is compared with: a peak that nobody sees is none."""

Figures = dict[str, Tensor]


def figures(x: Tensor, group: Tensor, patch: int | None) -> Figures:
    """What is compared, of samples x (n, c, h, w) or vectors (n, d) whose conditions are numbered by group (n,).

    mean (c,) of each channel and noise (c,), the variance of that mean by chance; scale and contrast, scalars: the
    standard deviation of all values about their channel's mean, and within a sample; spread: see
    `fewstep.methods.readings.spread`; of three channels saturation, the mean of largest minus smallest; with a patch the
    grid, see `peaks`.
    """
    x = x.double()
    dims = [0, *range(2, x.ndim)]
    mean = x.mean(dims)
    around = x - mean.reshape(1, -1, *[1] * (x.ndim - 2))
    scale = around.pow(2).mean().sqrt()
    each = x.flatten(2).mean(2) if x.ndim > 2 else x
    noise = (each - mean).pow(2).sum(0) / max(1, len(x) - 1) / len(x)
    out = {"mean": mean, "noise": noise, "scale": scale, "contrast": scale}
    if len(x) > 1:
        apart = spread(x, group)
        out["spread"] = apart * (apart > ROUNDING * scale)
    if x.ndim == 4:
        out["contrast"] = (x - x.mean((2, 3), keepdim=True)).pow(2).mean().sqrt()
    if x.ndim == 4 and x.shape[1] == 3:
        out["saturation"] = saturation(x)
    if patch is not None:
        out["grid"] = peaks(x, patch)
    return out


def saturation(x: Tensor) -> Tensor:
    """How strong the colours of images (n, 3, h, w) in [-1, 1] are: mean of the largest minus the smallest channel.

    >>> fewstep.train.samples.saturation(torch.tensor([1.0, -1.0, 0.0]).reshape(1, 3, 1, 1)).item()
    2.0
    """
    return (x.amax(1) - x.amin(1)).mean()


def peaks(x: Tensor, patch: int) -> Tensor:
    """Log of the power of x (n, c, h, w) at each multiple of the patch's frequency over that of the frequencies around.

    What repeats in every patch has power at these patch^2 - 1 points of the spectrum and nowhere else.
    """
    power = torch.fft.fft2(x).abs().pow(2).mean((0, 1))
    power[0, 0] = 0
    h, w = power.shape
    around = [power.roll((i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    ratio = (power + FLOOR * power.mean()) / (sum(around) / 8 + FLOOR * power.mean()).clamp_min(1e-300)
    return ratio[:: h // patch, :: w // patch].flatten()[1:].clamp_min(1e-300).log()


def compared(own: Figures, reference: Figures) -> dict[str, float]:
    """The readings by their keys in the log: ratios to the reference's, 1 where they agree, and of the mean 0.

    samples/offset is the mean of the channel that is farthest off, in standard deviations of the reference; samples/mean
    the same less what so few samples may be off by chance: CHANCE standard errors (of 32 points of the ring half a
    deviation, of pictures little).
    samples/reward, where there is a reward, is its mean above the reference's, in standard deviations of the reference's;
    samples/fd the Frechet distance over the variance of the reference, see `relative_frechet`.
    """
    shift = own["mean"] - reference["mean"]
    chance = CHANCE * (own["noise"] + reference["noise"]).sqrt()
    shift = shift.sign() * (shift.abs() - chance).clamp_min(0) / reference["scale"].clamp_min(1e-12)
    out = {"samples/mean": _farthest(shift)}
    # From the same noise each time: the offset's own course has no chance in it.
    out["samples/offset"] = _farthest((own["mean"] - reference["mean"]) / reference["scale"].clamp_min(1e-12))
    for name in ("contrast", "saturation", "spread"):
        if name in own and name in reference and float(reference[name]) > 0:
            out[f"samples/{name}"] = float(own[name] / reference[name])
    if "spread" in own and "spread" in reference and own["spread"] == reference["spread"] == 0:
        out["samples/spread"] = 0.0  # the reference's are copies too: they were drawn from one noise
    if "reward" in own and "reward" in reference:
        theirs, points = reference["reward"], reference["points"]
        out["samples/reward"] = float((own["reward"].mean() - theirs.mean()) / theirs.std().clamp_min(1e-12))
        out["samples/fd"] = relative_frechet(own["points"], points)
    if "grid" in own and "grid" in reference:
        # A dip of the reference, which other samples fill, makes no peak.
        out["samples/grid"] = float((own["grid"] - reference["grid"].clamp_min(0)).max().exp())
    return out


def _farthest(values: Tensor) -> float:
    return float(values[values.abs().argmax()])


def relative_frechet(x: Tensor, y: Tensor) -> float:
    """Frechet distance of points x and y, both (n, k), over the sum of y's variances; NaN for values that are no numbers.

    Of n samples it has a large bias, the same for every reading from the same noise. The trace of the covariances' root
    is the nuclear norm of the centred points' products, so that k may be any number.
    """
    if not torch.isfinite(x).all():
        return math.nan
    x, y = x.double(), y.double()
    shift, a, b = x.mean(0) - y.mean(0), x - x.mean(0), y - y.mean(0)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    size = (a**2).sum() / (len(x) - 1) + (b**2).sum() / (len(y) - 1)
    apart = (shift**2).sum() + size - 2 * cross / math.sqrt((len(x) - 1) * (len(y) - 1))
    return float(apart / ((b**2).sum() / (len(y) - 1)).clamp_min(1e-12))


def patch_of(net: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Period of the grid that a network may leave: its patch, or its levels' strides; None where none fits twice."""
    if len(shape) != 3:
        return None
    found = next((n for m in net.modules() if (n := _period(m)) is not None), 4)
    period = max(2, found)
    while period > 1 and any(side % period or side // period < 2 for side in shape[1:]):
        period //= 2
    return period if period > 1 else None


def _period(module: nn.Module) -> int | None:
    config: Any = getattr(module, "config", None)
    patch = getattr(module, "patch", None) or getattr(config, "patch_size", None)
    if isinstance(patch, int):
        return patch
    blocks = getattr(config, "down_block_types", None)
    return 2 ** (len(blocks) - 1) if blocks else None


class SampleReadings:
    """Draws a session's samples and compares them.

    Args:
        session: the run's; nothing of it is changed.
        every: updates between two readings of a sampler with at most four calls.
    """

    def __init__(self, session: Session, every: int) -> None:
        self.session, self.every = session, every
        data = session.data
        self.room = max(ALIKE, NUMBERS // math.prod(data.shape))
        self.count = min(MOST, max(ALIKE, session.recipe.train.batch), self.room)
        self.reward: Any = session.roles.get("reward")
        if self.reward is not None:
            self.count = max(ALIKE, min(JUDGED, self.room // 4))
        self.features: Callable[[Tensor], Tensor] | None = None
        """In which the distance is taken, of samples (n, *d) -> (n, k); None: in the values of the samples."""
        self.patch = patch_of(session.roles.student, data.shape)
        groups = 1 if conditions_of(data) == "none" else max(1, self.count // ALIKE)
        self.group = torch.arange(self.count, device=session.device) % groups
        self._reference: Figures | None = None

    def source(self) -> str | None:
        """What samples are compared with: teacher or data; None where there is neither."""
        recipe = self.session.recipe
        if "teacher" in self.session.roles and not recipe.overwrites_teacher():
            return "teacher"
        return "data" if any(stage.method.needs().data for stage in recipe.stages()) else None

    def due(self, stage: Stage, done: int) -> bool:
        """Whether a reading follows this update: samplers of many calls are asked less often, at about equal cost."""
        calls = stage.method.sampler().network_calls()
        return self.source() is not None and done % (self.every * max(1, calls**2 // 16)) == 0

    def read(self, stage: Stage, step: int = 0) -> dict[str, float]:
        """The readings of the student after so many updates of the stage; every process calls this and gets the same.

        Those of a reward only while it is followed: what rises or falls before says nothing of it.
        """
        if self.session.offload:  # a turn of its own: what it calls is not what the turn before it calls
            self.session.offload.begin((), {})
        if self._reference is None:
            self._reference = self._reference_of()
        # Of a reward the product is judged: the student itself swings from step to step by as much as a reward moves it.
        net: Any = self.session.roles.student if self.reward is None else self.session.product
        # As it is trained, where the reference is too: a student's temperature would read as a loss of contrast.
        x = self._draw(net, replace(stage.method.sampler(), noise_scale=1.0))
        rewarded = follows_reward(stage.method, step)
        return compared(self._figures(x, self.group, self._conditions(), rewarded), self._reference)

    def _figures(self, x: Tensor, group: Tensor, cond: Any, rewarded: bool = True) -> Figures:
        out = figures(x, group, self.patch)
        if self.reward is None or not rewarded:
            return out
        if not torch.isfinite(x).all():
            return out | {"reward": torch.full((len(x),), torch.nan, dtype=torch.float64), "points": x.flatten(1)}
        with torch.no_grad():
            value = self.reward(x, cond)
            points = x.flatten(1) if self.features is None else self.features(x).to(x.device)
        return out | {"reward": value.double(), "points": points}

    def _conditions(self) -> Any:
        """Those of all samples."""
        key = fold(self.session.recipe.train.seed, "samples", "conditions")
        return self.session.data.conditions(Draws(key, self.group))

    def _reference_of(self) -> Figures:
        session, recipe = self.session, self.session.recipe
        if self.source() == "teacher":
            scale = recipe.shown_guidance()
            teacher: Any = session.roles.teacher
            net = guided_teacher(teacher, scale, session.data.null)
            out = self._figures(self._draw(net, many_step(TEACHER_STEPS)), self.group, self._conditions())
            seen = innermost_denoiser(teacher)
            if seen is not None and seen.ignore:
                out.pop("spread", None)  # within one condition the student is to spread less than who does not see it
            return out
        index = torch.arange(max(self.count, min(REAL, self.room)), device=session.device)
        x, cond = session.data.batch(Draws(fold(recipe.train.seed, "samples", "data"), index))
        plain = isinstance(cond, Tensor) and cond.ndim == 1 and not cond.is_floating_point()
        out = self._figures(x, cond if plain and isinstance(cond, Tensor) else torch.zeros_like(index), cond)
        if cond is not None and not plain:
            out.pop("spread", None)  # one picture a caption says nothing of the spread within one
        return out

    @torch.no_grad()
    def _draw(self, net: Any, sampler: Sampler) -> Tensor:
        """All samples, each process drawing its share."""
        session, train = self.session, self.session.recipe.train
        world = session.accelerator.num_processes
        share = math.ceil(self.count / world)
        first = session.accelerator.process_index * share
        index = torch.arange(first, first + share, device=session.device) % self.count
        cond = rows(self._conditions(), index)
        part, out = max(1, train.batch // world // train.accumulate), []
        with in_evaluation(net), session.accelerator.autocast():
            for i in range(0, share, part):
                start, fresh = seeded(fold(train.seed, "samples"), index[i : i + part], session.data.shape)
                out.append(sample(sampler, net, start, rows(cond, slice(i, i + part)), fresh))
        x = torch.cat(out)
        if world > 1:
            x = session.accelerator.gather(x)
        return x[: self.count]


@contextmanager
def in_evaluation(net: Any) -> Iterator[None]:
    """Modules that train are as in evaluation meanwhile: a dropout would draw from torch's generator."""
    training = [m for m in net.modules() if m.training] if isinstance(net, nn.Module) else []
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
