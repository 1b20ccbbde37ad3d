"""Samplers for inference, as pure functions of (denoiser, start noise, condition, source of fresh noise)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.algebra.bridge import is_source
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.jump import Solver, ask, calls, clean, solver_step, times_of
from fewstep.algebra.noising import transition
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import DiscreteVP, Process, bc
from fewstep.algebra.rollout import renoise
from fewstep.config import Positive, config

Fresh = Callable[[int], Tensor]
"""Gives the noise (b, *d) that enters after step i."""


@config
class Sampler:
    """How a denoiser is sampled: its levels and what happens between two of them.

    >>> fewstep.Sampler(kind="renoise", steps=(1.0, 0.5)).network_calls()
    2
    >>> fewstep.Sampler(kind="ode", steps=(1.0, 0.5), solver="heun").network_calls()
    3
    """

    kind: Literal["renoise", "ode", "gamma", "map", "ancestral"] = "renoise"
    """renoise: a fresh re-noising of x0 between steps (CM, DMD2, LCM); ode: the solver below; gamma: TCD;
    map: the student's own jumps from level to level (flow maps, segments, DDIM students); ancestral: a draw from
    q(x_s | x_t, x0), as DDPM, Euler ancestral and I2SB take their steps."""
    steps: tuple[float, ...] = (1.0,)
    """Levels u in (0, 1], decreasing. The last call's x0 is the sample."""
    solver: Solver = "ddim"
    """ODE solver of kind ode."""
    eta: float = 0.3
    """Stochasticity of kind gamma: 0 deterministic, 1 re-noises (TCD, arXiv 2402.19159)."""
    counts: tuple[int, ...] | None = None
    """Numbers of steps the student was trained for; left out: that of `steps`, and any number for kind ode."""
    lists: tuple[tuple[float, ...], ...] = ()
    """Levels for each number of steps that the student was trained for, where these are lists of their own."""
    knots: int | None = None
    """Intervals of the grid that the student was trained on, where it was one: other numbers of steps stand on it."""
    guidance: float | None = None
    """Guidance scale handed to a student that has it as an input."""
    dynamic: tuple[float, float] | None = None
    """Levels (low, high) of dynamic guidance: the scale holds up to low and falls to 1 at high (iCD, sec. 3.3)."""
    clip: float | None = None
    """Quantile in (0, 1] of |x0| within a sample: between steps x0 is limited to its size there, at least 1, and the
    noise follows from it (x0 clipping of TDD, arXiv 2409.01347). Keeps high guidance from overshooting."""
    keep_noise: bool = False
    """Kind map: leave the first level with the start noise in place of the predicted one, which is exact at
    alpha = 0 (noise correction, Imagine Flash, arXiv 2405.05224, sec. 4.3)."""
    history: tuple[float, ...] = ()
    """Kinds map and ode with ddim: step i uses x0_i + history[i] (x0_i - x0_{i-1}) in place of x0_i; one weight a step,
    the first 0 (D-ODE, arXiv 2309.16421; DPM-Solver++(2M), arXiv 2211.01095, is such a list). None when left out."""

    noise_scale: Positive = 1.0
    """Factor on the start noise and on all that enters between steps. Below 1 samples are more alike and nearer to the
    mode, a temperature (protein backbones by SiD are trained at 1 and drawn at .45, arXiv 2510.03095)."""

    def __post_init__(self) -> None:
        if self.lists and self.counts is None:
            object.__setattr__(self, "counts", tuple(sorted(map(len, self.lists))))
        if not self.history:
            return
        if self.kind != "map" and (self.kind, self.solver) != ("ode", "ddim"):
            raise ValueError(f"history: is for kind map, or kind ode with solver ddim, not for kind {self.kind}")
        if len(self.history) != len(self.steps):
            raise ValueError(f"history: has {len(self.history)} weights for {len(self.steps)} steps; give one a step")
        if self.history[0] != 0:
            raise ValueError(f"history: begins with {self.history[0]}; the first step has nothing before it, give 0")

    def guidance_at(self, level: float) -> float | None:
        """The scale handed to the student at a level u in [0, 1]."""
        if self.guidance is None or self.dynamic is None:
            return self.guidance
        return dynamic_guidance(level, self.guidance, *self.dynamic)

    def network_calls(self, process: Process | None = None) -> int:
        """Network calls per sample (guidance not counted) of a net of this process.

        The source of a bridge is left by noise, which takes one call also with heun.
        """
        count = len(self.steps)
        if self.kind != "ode" or self.history:
            return count
        if count > 1 and process is not None and is_source(process, times_of(self.steps[:1], process)):
            return 1 + calls(count - 1, self.solver)
        return calls(count, self.solver)


def any_steps(steps: Sequence[float], counts: Sequence[int] = (1, 2, 4, 8)) -> tuple[int, ...]:
    """Numbers of steps of a student that trains on all times: `counts` and that of its own levels."""
    return tuple(sorted({*counts, len(steps)}))


def dynamic_guidance(level: float, scale: float, low: float, high: float) -> float:
    """`scale` up to level low, 1 from high on, linear between; a step where they agree (arXiv 2406.14539, sec. 3.3)."""
    share = min(max((high - level) / (high - low), 0.0), 1.0) if high > low else float(level <= low)
    return 1 + (scale - 1) * share


def sample(
    sampler: Sampler,
    net: Callable[..., Prediction],
    noise: Tensor,
    cond: Any = None,
    fresh: Fresh | None = None,
    start: Tensor | None = None,
    seen: Callable[[int, Prediction], None] | None = None,
) -> Tensor:
    """Draw samples.

    Args:
        net: denoiser with a `process`.
        noise: standard normal start noise (b, *d); scaled to the process's prior here.
        fresh: noise after step i, needed by renoise and gamma when there is more than one step.
        start: a state (b, *d) at the first level to go on from, in place of the prior, as it is.
        seen: told the number of every step and what the net says at its level, as it is used.

    Returns:
        x0 of shape (b, *d), not clamped. Raises ValueError when fresh noise is needed and not given.

    >>> exact = fewstep.load("toy/dmd2").data.open().mixture
    >>> noise, fresh = fewstep.seeded(0, torch.arange(5), (2,))
    >>> fewstep.sample(fewstep.Sampler(steps=(1.0, 0.5)), exact, noise, fresh=fresh).shape
    torch.Size([5, 2])
    """
    process: Process = net.process  # type: ignore[attr-defined]
    times = times_of(sampler.steps, process).to(noise.device)
    b = noise.shape[0]
    if sampler.noise_scale != 1:
        noise, fresh = sampler.noise_scale * noise, _scaled(fresh, sampler.noise_scale)
    x = process.prior(noise, times[0].expand(b)) if start is None else start
    if sampler.kind == "ode" and not sampler.history:
        for i, (t, s) in enumerate(pairwise(times)):
            here = net if seen is None else told(net, i, seen)
            if is_source(process, t):
                if fresh is None:
                    raise ValueError("an ode sampler leaves the source of a bridge by noise: it needs `fresh` noise")
                x = renoise(process, here(x, t.expand(b), cond).x0, fresh(i), s.expand(b))
                continue
            x = solver_step(here, x, t.expand(b), s.expand(b), cond, sampler.solver)
        last_answer = net(x, times[-1].expand(b), cond)
        if seen is not None:
            seen(len(times) - 1, last_answer)
        return last_answer.x0
    kind = "map" if sampler.kind == "ode" else sampler.kind
    if len(sampler.steps) > 1 and fresh is None and kind != "map":
        raise ValueError(f"a {kind} sampler of {len(sampler.steps)} steps needs `fresh` noise")
    if kind == "map" and len(times) > 1 and is_source(process, times[:1]):
        raise ValueError(
            "a bridge is its source at level 1, where nothing says in which direction to go: start kind map below 1, or "
            "leave by noise with kind renoise or ancestral"
        )
    before: Tensor | None = None
    for i, t in enumerate(times):
        t, scale = t.expand(b), sampler.guidance_at(sampler.steps[i])
        call = {} if scale is None else {"w": times.new_full((b,), scale)}
        last = i + 1 == len(times)
        s = clean(process, t) if last else times[i + 1].expand(b)
        aim = _aim(sampler, process, s, last)
        prediction = net(x, t, cond) if sampler.kind == "ode" else ask(net, x, t, aim, cond, **call)
        if sampler.history:
            answer = prediction.x0
            if before is not None and sampler.history[i] != 0:
                prediction = from_x0(process, x, t, answer + sampler.history[i] * (answer - before))
            before = answer
        if seen is not None:
            seen(i, prediction)
        if last:
            break
        if sampler.clip is not None:
            prediction = clipped(prediction, sampler.clip)
        if kind == "map":
            correct = sampler.keep_noise and i == 0
            x = (replace(prediction, eps=noise) if correct else prediction).at(s)
            continue
        assert fresh is not None
        if kind == "renoise":
            x = renoise(process, prediction.x0, fresh(i), s)
        elif kind == "ancestral":
            x = ancestral_step(prediction, s, fresh(i))
        else:
            x = gamma_step(prediction, s, sampler.eta, fresh(i))
    return prediction.x0


def _scaled(fresh: Fresh | None, scale: float) -> Fresh | None:
    return None if fresh is None else lambda i: scale * fresh(i)


def told(net: Callable[..., Prediction], step: int, seen: Callable[[int, Prediction], None]) -> Any:
    """The net, whose first answer is shown to `seen`."""
    asked: list[int] = []

    def call(x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        prediction = net(x, t, cond)
        if not asked:
            seen(step, prediction)
        asked.append(step)
        return prediction

    return call


def clipped(prediction: Prediction, quantile: float) -> Prediction:
    """x0 (b, *d) within the `quantile` of its own size, per sample and at least 1; eps such that x stays as it is."""
    size = prediction.x0.flatten(1).abs().quantile(quantile, dim=1).clamp_min(1)
    limit = bc(size, prediction.x0)
    x0 = torch.maximum(torch.minimum(prediction.x0, limit), -limit)
    return from_x0(prediction.process, prediction.x, prediction.t, x0)


def _aim(sampler: Sampler, process: Process, s: Tensor, last: bool) -> Tensor:
    """Where the call's answer is used: the next level, TCD's way point, or the clean end."""
    if sampler.kind in ("renoise", "ancestral") or last:
        return clean(process, s)
    return way_point(process, s, sampler.eta) if sampler.kind == "gamma" else s


def way_point(process: Process, s: Tensor, eta: float) -> Tensor:
    """s' = (1 - eta) s of TCD, counted from the clean end; on a DDPM table rounded down to an index, 0 being clean.

    The table's rule is that of the published sampler (floor of (1 - eta) times the index); CTM's has
    1 - eta = sqrt(1 - gamma^2).
    """
    if isinstance(process, DiscreteVP):
        # A level such as .75 of 1000 carries a rounding error that must not cost an index.
        index = torch.floor((1 - eta) * (s - 1) + 1e-6)
        return torch.where(index > 0, index + 1, torch.zeros_like(s))
    end = clean(process, s)
    return end + (1 - eta) * (s - end)


def gamma_step(prediction: Prediction, s: Tensor, eta: float, noise: Tensor) -> Tensor:
    """TCD's step: DDIM to s' = (1 - eta) s, then diffuse s' -> s (arXiv 2402.19159, alg. 4).

    eta = 1 is `renoise`: there s' is the clean end, at which x0 itself stands, also where that is sigma_min.
    """
    process = prediction.process
    waypoint = way_point(process, s, eta)
    there = bc(waypoint, prediction.x0) > bc(clean(process, s), prediction.x0)
    x = torch.where(there, prediction.at(waypoint), prediction.x0)
    alpha, sigma = transition(process, waypoint, s)
    return bc(alpha, x) * x + bc(sigma, x) * noise


def ancestral_step(prediction: Prediction, s: Tensor, noise: Tensor) -> Tensor:
    """A draw from q(x_s | x_t, x0) at times s (b,) below t: DDPM's step (arXiv 2006.11239, eq. 7), I2SB's in y.

    With S = sigma / alpha it is DDIM to S_s^2 / S_t, then noise up to S_s; Euler ancestral's sigma_down is that place.
    """
    p, t, x0 = prediction.process, prediction.t, prediction.x0
    alpha_t, alpha_s, sigma_s = p.alpha(t), p.alpha(s), p.sigma(s)
    variance = p.sigma(t) ** 2
    safe = torch.where(variance == 0, torch.ones_like(variance), variance)  # a bridge's source, where x is 0
    kept = sigma_s**2 * alpha_t / (alpha_s * safe)
    share = kept * alpha_t / alpha_s
    mean = bc(alpha_s * (1 - share), x0) * x0 + bc(kept, x0) * prediction.x
    return mean + bc(sigma_s * torch.sqrt((1 - share).clamp_min(0)), x0) * noise


def seeded(seed: int, index: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Fresh]:
    """Start noise and fresh noise per global sample index: the same images for any batch or world size.

    Args:
        seed: of the whole set.
        index: global indices int64 (b,).
        shape: of one sample.

    >>> noise, fresh = fewstep.seeded(0, torch.arange(8), (2,))
    >>> alone, _ = fewstep.seeded(0, torch.tensor([3]), (2,))
    >>> noise[3:4].equal(alone), fresh(0).shape
    (True, torch.Size([8, 2]))
    """
    start = Draws(fold(seed, "start"), index).normal(*shape)
    return start, lambda i: Draws(fold(seed, "fresh", i), index).normal(*shape)


def knot_levels(steps: int, knots: int) -> tuple[float, ...]:
    """`steps` levels on a grid of `knots` intervals, from the prior down, where LCMScheduler and TDD place them.

    Knots are counted from above by floor(i knots / steps). Raises ValueError for more steps than knots.
    """
    if not 1 <= steps <= knots:
        raise ValueError(f"steps must lie in 1..{knots}, the knots of the grid, not {steps}")
    return tuple((knots - i * knots // steps) / knots for i in range(steps))


def many_step(steps: int, solver: Solver = "heun") -> Sampler:
    """A teacher's ODE sampler with `steps` levels, evenly spaced in u from the prior to sigma's low end.

    Raises:
        ValueError: no step.

    >>> fewstep.many_step(4).steps
    (1.0, 0.75, 0.5, 0.25)
    >>> fewstep.many_step(0)
    Traceback (most recent call last):
    ValueError: steps must be at least 1, not 0
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    levels = tuple(1 - i / steps for i in range(steps))
    return Sampler(kind="ode", steps=levels, solver=solver)
