"""Which stock diffusers scheduler takes a sampler's steps exactly, by process and parametrisation; else a refusal.

A student of one step is drawn alike by every kind of sampler. Beyond that a scheduler is chosen only where its
formula is the sampler's own; the export still measures the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import Any

import torch

from fewstep.algebra.fitted import multistep
from fewstep.algebra.noising import angle_of
from fewstep.algebra.process import EDM, DiscreteVP, Flow, Process, Trig
from fewstep.algebra.sampling import Sampler
from fewstep.export.base import ExportRefused, Stock
from fewstep.export.levels import is_even
from fewstep.networks.denoiser import Denoiser

INSTEAD = "`fewstep sample` draws from the run itself"
TCD_ETA = 0.3
"""TCDScheduler's default, which pipelines without an `eta` argument use."""


def schedule(steps: Sequence[float]) -> tuple[int, dict[str, Any]]:
    """(num_train_timesteps, call arguments) that make CMStochasticIterativeScheduler visit levels u exactly.

    The scheduler's grid is Karras's between its own sigma_max and sigma_min. With sigma_max set to the level of
    the first step, level u stands at u / steps[0] of it, and its k-th point of T at 1 - k / (T - 1). Evenly spaced
    levels are its own spacing for T = N + 1; others need T - 1 to be a common denominator, passed as `timesteps`.
    Raises ExportRefused when there is none below 10,000.
    """
    depth = [1 - u / steps[0] for u in steps]
    if is_even(steps, steps[0]):
        return len(steps) + 1, {"num_inference_steps": len(steps)}
    fractions = [Fraction(d).limit_denominator(9_999) for d in depth]
    common = lcm(*(f.denominator for f in fractions))
    if common > 9_999 or any(abs(float(f) - d) > 1e-9 for f, d in zip(fractions, depth, strict=True)):
        raise ExportRefused(f"steps {list(steps)} lie on no grid of up to 10,000 points; round them, say to 1/1000")
    index = [int(f * common) for f in fractions]
    return common + 1, {"num_inference_steps": None, "timesteps": index[::-1]}


def check_drawn(sampler: Sampler) -> None:
    """ExportRefused for what a sampler does between its calls that is in no stock pipeline, whatever the network."""
    if sampler.dynamic is not None and len(sampler.steps) > 1:
        raise ExportRefused(
            "dynamic guidance hands the student another scale at each step, which no stock pipeline does; "
            "set method.dynamic=null for one scale"
        )
    if sampler.noise_scale != 1:
        raise ExportRefused(
            f"noise_scale {sampler.noise_scale:g}: scales the noise of every step, which no stock scheduler does; set "
            "method.noise_scale=1"
        )


def plain_kind(sampler: Sampler, process: Process) -> str:
    """renoise, map or gamma; a kind whose switches make it another is called by that one's name."""
    check_drawn(sampler)
    if sampler.clip is not None and len(sampler.steps) > 1:
        raise ExportRefused(f"no stock scheduler limits x0 to a quantile between steps; {INSTEAD}")
    if sampler.kind == "ode":
        if sampler.solver != "ddim":
            raise ExportRefused(f"an ODE sampler with solver {sampler.solver} is a teacher's; {INSTEAD}")
        return "map"
    if sampler.kind == "map" and sampler.keep_noise and len(sampler.steps) > 1:
        first = process.grid(torch.tensor(sampler.steps[0], dtype=torch.float64))
        if float(process.alpha(first)) > 0:
            raise ExportRefused(f"no stock scheduler keeps the start noise (noise correction) above alpha = 0; {INSTEAD}")
    if sampler.kind == "ancestral":
        if len(sampler.steps) > 1:
            raise ExportRefused(f"ancestral steps are not exported; set the sampler's kind to renoise or map; {INSTEAD}")
        return "renoise"
    if sampler.kind == "gamma" and sampler.eta in (0.0, 1.0):
        return "renoise" if sampler.eta else "map"
    if sampler.kind == "gamma" and isinstance(process, Flow) and len(sampler.steps) > 1:
        raise ExportRefused(f"no stock flow scheduler takes steps of eta {sampler.eta}; set it to 0 or 1")
    return sampler.kind


def check_history(process: Process, sampler: Sampler) -> None:
    """ExportRefused for a history that no stock scheduler has."""
    if not any(sampler.history):
        return
    if not isinstance(process, DiscreteVP):
        raise ExportRefused(
            "stock schedulers use earlier answers (DPM-Solver++) on a DDPM table, and this is "
            f"{type(process).__name__}; fit it again with --no-history for the levels alone; {INSTEAD}"
        )
    if any(abs(a - b) > 1e-9 for a, b in zip(sampler.history, multistep(process, sampler.steps), strict=True)):
        raise ExportRefused(
            "no stock scheduler has a free weight of history a step; the loop that draws it is in the fit's README.md. "
            f"Fit it again with --solver 2m or --no-history for one that has; {INSTEAD}"
        )


def unet_stock(net: Denoiser, sampler: Sampler) -> Stock:
    """The scheduler for a plain denoiser (no inputs beside the time); ExportRefused says why there is none."""
    process: Any = net.process
    prediction, time_input = net.prediction, net.time_input
    kind, one = plain_kind(sampler, process), len(sampler.steps) == 1
    check_history(process, sampler)
    if isinstance(process, EDM) and prediction == "cm" and time_input == "250log_sigma":
        if one or kind == "renoise":
            return _consistency(process, sampler)
        raise ExportRefused(
            f"no stock scheduler takes {kind} steps in the parametrisation 'cm': "
            "CMStochasticIterativeScheduler only re-noises and EDMEulerScheduler wants prediction 'edm' with "
            f"time input log_sigma/4. Sample it in one step, train a method that re-noises, or use a teacher "
            f"whose scheduler is EDMEulerScheduler; {INSTEAD}"
        )
    if isinstance(process, EDM) and prediction == "edm" and time_input == "log_sigma/4":
        if one or kind == "map":
            return _edm_euler(process, sampler)
        raise ExportRefused(
            "EDMEulerScheduler has no noise to add between steps as this student needs it; train with "
            f"prediction 'cm', which CMStochasticIterativeScheduler re-noises; {INSTEAD}"
        )
    if isinstance(process, DiscreteVP) and prediction in _NAMES and time_input == "index":
        return _ddpm(process, prediction, sampler, kind)
    if isinstance(process, Flow) and prediction in ("velocity", "psi") and time_input == "1000t":
        return _flow(process, sampler, kind)
    if isinstance(process, Trig) and prediction in ("trig", "v") and time_input in ("t", "angle"):
        return scm_stock(process, sampler, kind)
    raise ExportRefused(
        f"no stock scheduler reads prediction {prediction!r} with time input {time_input!r} on "
        f"{type(process).__name__}; train from a teacher in diffusers format, whose parametrisation a student "
        f"keeps; {INSTEAD}"
    )


def _consistency(process: EDM, sampler: Sampler) -> Stock:
    first = sampler.steps[0]
    count, call = schedule(sampler.steps)
    config = {
        "num_train_timesteps": count,
        "sigma_min": process.sigma_min,
        "sigma_max": float(process.grid(torch.tensor(first, dtype=torch.float64))),
        "sigma_data": process.sigma_data,
        "rho": process.rho,
        "clip_denoised": False,  # training never clamps between steps
    }
    levels = Sampler(kind="renoise", steps=tuple(u / first for u in sampler.steps))
    return Stock("CMStochasticIterativeScheduler", config, call, levels)


def _edm_euler(process: EDM, sampler: Sampler) -> Stock:
    """Its Karras grid ends at the last level: it goes from there to 0 by itself."""
    steps, n = sampler.steps, len(sampler.steps)
    span = steps[0] - steps[-1]
    if n > 2 and any(abs(u - (steps[0] - span * i / (n - 1))) > 1e-9 for i, u in enumerate(steps)):
        raise ExportRefused(
            f"steps {list(steps)} are not evenly spaced, and EDMEulerScheduler has no others in a pipeline; {INSTEAD}"
        )
    first, last = (float(process.grid(torch.tensor(u, dtype=torch.float64))) for u in (steps[0], steps[-1]))
    low = process.sigma_min if n == 1 else last
    config = {"sigma_min": low, "sigma_max": first, "sigma_data": process.sigma_data, "rho": process.rho}
    levels = Sampler(kind="map", steps=(1.0,) if n == 1 else tuple((u - steps[-1]) / span for u in steps))
    # It starts from sqrt(sigma^2 + 1) times the noise, which one step can make good and several cannot.
    scale = first / (first**2 + 1) ** 0.5 if n == 1 else 1.0
    return Stock("EDMEulerScheduler", config, {"num_inference_steps": n}, levels, scale)


_NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def _table(process: DiscreteVP, prediction: str, steps: Sequence[float]) -> tuple[dict[str, Any], list[int]]:
    """(config of a scheduler on a process's table, the rows of the steps); ExportRefused where there is none."""
    if process.snr_shift != 1.0:
        raise ExportRefused(f"only CogVideoX's schedulers read its shift of the table, and none is written; {INSTEAD}")
    index = [u * process.steps - 1 for u in steps]
    if any(abs(i - round(i)) > 1e-6 for i in index):
        raise ExportRefused(
            f"steps {list(steps)} fall between the {process.steps} indices of the table, which "
            f"stock schedulers do not visit; choose multiples of 1/{process.steps}"
        )
    table: dict[str, Any] = {
        "num_train_timesteps": process.steps,
        "beta_schedule": process.schedule,
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "prediction_type": _NAMES[prediction],
        **({"trained_betas": list(process.betas)} if process.betas else {}),
        **({"rescale_betas_zero_snr": True} if process.zero_snr else {}),
        # Not used by the spacings and lists below; pipelines complain at length about any other value.
        "steps_offset": 1,
    }
    return table, [round(i) for i in index]


def begun_stock(net: Denoiser, sampler: Sampler) -> Stock:
    """The scheduler of a sampler on a DDPM table that goes on from a picture noised to its first level.

    Unlike from noise alone deterministic steps may begin anywhere: nothing scales what they begin with. Raises
    ExportRefused where there is none.
    """
    process: Any = net.process
    if not isinstance(process, DiscreteVP) or net.prediction not in _NAMES or net.time_input != "index":
        raise ExportRefused(
            f"prediction {net.prediction!r} on {type(process).__name__} begins from a picture in no stock scheduler"
        )
    kind, n = plain_kind(sampler, process), len(sampler.steps)
    if any(sampler.history):
        raise ExportRefused(f"no stock scheduler with a memory of earlier steps begins below its first level; {INSTEAD}")
    table, rows = _table(process, net.prediction, sampler.steps)
    call = {"num_inference_steps": n, "timesteps": rows}
    visits = {"timesteps": rows}
    if n == 1 or kind == "renoise":
        return Stock("LCMScheduler", _lcm(table), call, Sampler(kind="renoise", steps=sampler.steps), levels=visits)
    eta = sampler.eta if kind == "gamma" else 0.0
    written = Sampler(kind=kind, steps=sampler.steps, eta=sampler.eta)  # type: ignore[arg-type]
    return Stock("TCDScheduler", _tcd(table, process), call | {"eta": eta}, written, levels=visits)


def _lcm(table: dict[str, Any]) -> dict[str, Any]:
    # Its boundary scalings stand at |c_skip| < 1e-6 from index 50 on with this scaling of the time.
    return table | {"clip_sample": False, "timestep_scaling": 10.0}


def _tcd(table: dict[str, Any], process: DiscreteVP) -> dict[str, Any]:
    # TCDScheduler ends at index 0 of its table, not at x0; these betas make the two one.
    tcd = table | {"trained_betas": process.clean_first_betas(), "clip_sample": False}
    tcd.pop("rescale_betas_zero_snr", None)  # these betas have it in them
    return tcd


def _ddpm(process: DiscreteVP, prediction: str, sampler: Sampler, kind: str) -> Stock:
    table, rows = _table(process, prediction, sampler.steps)
    n, explicit = len(rows), {"num_inference_steps": None, "timesteps": rows}
    from_prior = rows[0] == process.steps - 1
    if kind == "map" and n > 1 and not from_prior:
        raise ExportRefused(
            f"steps {list(sampler.steps)} do not begin at the prior, and stock schedulers that go on "
            f"deterministically scale their noise for it; begin at 1.0; {INSTEAD}"
        )
    if process.zero_snr and from_prior and (sampler.history or (kind == "map" and not _stands(process, sampler.steps))):
        raise ExportRefused(
            "stock solvers put an alpha of 2^-12 in place of this table's pure noise, and DDIMScheduler, which does not, "
            f"takes even steps of a divisor of {process.steps}; train at 1 - i / n; {INSTEAD}"
        )
    if sampler.history:
        # Of this solver's last step, to sigma 0, the order is one whatever lower_order_final says.
        midpoint = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
        multi = table | midpoint | {"lower_order_final": False, "final_sigmas_type": "zero"}
        again = Sampler(kind="map", steps=sampler.steps, history=sampler.history)
        return Stock("DPMSolverMultistepScheduler", multi, explicit, again)
    if from_prior and (n == 1 or kind == "map"):
        sampler = Sampler(kind="map", steps=sampler.steps)
        if _stands(process, sampler.steps):
            ddim = table | {"clip_sample": False, "timestep_spacing": "trailing"}
            return Stock("DDIMScheduler", ddim, {"num_inference_steps": n}, sampler)
        # Its init_noise_sigma is sqrt(sigma^2 + 1) in this spacing, the variance preserving prior.
        return Stock("EulerDiscreteScheduler", table | {"timestep_spacing": "leading"}, explicit, sampler)
    if n == 1 or kind == "renoise":
        return Stock("LCMScheduler", _lcm(table), explicit, Sampler(kind="renoise", steps=sampler.steps))
    if sampler.eta != TCD_ETA:
        raise ExportRefused(
            f"TCDScheduler is called with its default eta {TCD_ETA} by the pipeline, not {sampler.eta}; set "
            f"the method's eta to {TCD_ETA}, to 0 (DDIM) or to 1 (re-noising)"
        )
    written = Sampler(kind="gamma", steps=sampler.steps, eta=sampler.eta)
    return Stock("TCDScheduler", _tcd(table, process), explicit, written)


def _stands(process: DiscreteVP, steps: Sequence[float]) -> bool:
    """True where DDIMScheduler's trailing spacing is the levels."""
    return is_even(steps, steps[0]) and process.steps % len(steps) == 0


def _flow(process: Flow, sampler: Sampler, kind: str) -> Stock:
    """A config holds linspace(1, .001, N), or that stretched to end at its last level: 1 - i/N, or any two levels."""
    n = len(sampler.steps)
    times = process.grid(torch.tensor(sampler.steps, dtype=torch.float64)).tolist()
    if times[0] != 1.0 or (n > 2 and not is_even(times, times[0])):
        raise ExportRefused(
            f"levels {times} are not 1 - i/{n}, and a flow scheduler's config holds no others for a "
            f"pipeline without `sigmas`; {INSTEAD}"
        )
    name = "FlowMatchLCMScheduler" if n > 1 and kind == "renoise" else "FlowMatchEulerDiscreteScheduler"
    config = {"num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": times[-1] if n > 1 else None}
    again = Sampler(kind="renoise" if kind == "renoise" else "map", steps=tuple(times))
    return Stock(name, config, {"num_inference_steps": n}, again)


def scm_stock(process: Trig | Flow, sampler: Sampler, kind: str) -> Stock:
    """SCMScheduler at the angles of a process's levels; ExportRefused for steps that are no re-noising."""
    n = len(sampler.steps)
    if n > 1 and kind != "renoise":
        raise ExportRefused(f"SCMScheduler re-noises between steps, this student takes {kind} steps; {INSTEAD}")
    flow = isinstance(process, Flow)
    times = process.grid(torch.tensor(sampler.steps, dtype=torch.float64))
    angles = angle_of(process, times) if flow else times
    call = {
        "num_inference_steps": n,
        "timesteps": [*angles.tolist(), 0.0],
        "max_timesteps": None,
        "intermediate_timesteps": None,
    }
    # Of SANA-Sprint's pipeline, whose state is so much of the network's.
    return Stock("SCMScheduler", {"sigma_data": 0.5 if flow else 1.0}, call, Sampler(kind="renoise", steps=sampler.steps))


def pipeline_of(name: str, classes: int) -> str:
    """The stock pipeline class that drives a UNet2DModel with a scheduler of that class; ExportRefused without one."""
    if name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"):
        if classes:
            raise ExportRefused(
                f"no stock pipeline drives a class-conditional UNet2DModel with {name} (DDPMPipeline is "
                f"unconditional, ConsistencyModelPipeline calls scale_model_input, which it lacks); {INSTEAD}"
            )
        return "DDPMPipeline"
    if name == "SCMScheduler":
        raise ExportRefused(
            "SCMScheduler is driven by SanaSprintPipeline alone, which has no UNet2DModel; train the student "
            f"in its teacher's own process to export it; {INSTEAD}"
        )
    return "ConsistencyModelPipeline"
