"""What a scheduler_config.json says about the network it was trained with: process, prediction, time, spacing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fewstep.algebra.process import EDM, DiscreteVP, Flow, Process, ShiftedFlow
from fewstep.config import UserError
from fewstep.networks.denoiser import TimeInput
from fewstep.networks.folder import number
from fewstep.networks.refused import SCHEDULERS

DDPM_FAMILY = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
)
SHIFTED = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
"""Of these, the ones that read snr_shift_scale."""
RESCALED = (
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
    "TCDScheduler",
    *SHIFTED,
)
"""Of these, the ones that read rescale_betas_zero_snr."""
FLOW_FAMILY = (
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)
EDM_FAMILY = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
FLOW_SOLVERS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
"""Of the DDPM family, those that also step along a flow."""
LEVELS = 65_536
"""Of the longest table of noise levels that is made; diffusers' own have 1000."""
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS = {
    "LCMScheduler": ("scaled_linear", 0.00085, 0.012),
    "TCDScheduler": ("scaled_linear", 0.00085, 0.012),
    "HeunDiscreteScheduler": ("linear", 0.00085, 0.012),
    "CogVideoXDDIMScheduler": ("scaled_linear", 0.00085, 0.012),
    "CogVideoXDPMScheduler": ("scaled_linear", 0.00085, 0.012),
}
"""(beta_schedule, beta_start, beta_end) of the classes whose defaults are not DDPM's, by diffusers 0.42.1."""
_DDPM = ("linear", 1e-4, 0.02)


def read_scheduler(
    config: Mapping[str, Any], where: str, tokens: int | None = None, mu: Callable[..., float] | None = None
) -> tuple[Process, str, TimeInput]:
    """(process, prediction, time input) of a scheduler_config.json. Raises UserError where it is ambiguous.

    tokens: number of image tokens, on which a dynamic flow shift depends. mu: its logarithm of (config, tokens, where),
    as a family has it; `dynamic_mu` when left out.
    """
    name = config.get("_class_name")
    if number(config, "num_train_timesteps", 1000, where, whole=True) > LEVELS:
        raise UserError(f"{where}: num_train_timesteps is {config['num_train_timesteps']}; at most {LEVELS} are read")
    if name == "CMStochasticIterativeScheduler" or name in EDM_FAMILY:
        return _edm(config, where, str(name))
    if name == "SCMScheduler":
        return _scm(config, where)
    if name in FLOW_FAMILY:
        return _flow(config, where, number(config, "shift", 1.0, where), tokens, mu)
    if name not in DDPM_FAMILY:
        known = ("CMStochasticIterativeScheduler", *EDM_FAMILY, "SCMScheduler", *FLOW_FAMILY, *DDPM_FAMILY)
        remedy = f": {SCHEDULERS[str(name)]}" if name in SCHEDULERS else ""
        raise UserError(f"{where}: scheduler {name!r} is not supported{remedy}; known: {', '.join(known)}")
    kind = config.get("prediction_type")
    if kind is None:
        raise UserError(f"{where}: prediction_type is missing; add one of {', '.join(map(repr, PREDICTIONS))} as trained")
    if kind == "flow_prediction" or config.get("use_flow_sigmas"):
        if kind != "flow_prediction" or not config.get("use_flow_sigmas"):
            raise UserError(
                f"{where}: prediction_type {kind!r} with use_flow_sigmas {bool(config.get('use_flow_sigmas'))} is "
                "ambiguous; a flow model has 'flow_prediction' and true"
            )
        if name not in FLOW_SOLVERS:
            raise UserError(
                f"{where}: use_flow_sigmas is set, which {name} does not read; flows have {', '.join(FLOW_FAMILY)}, or "
                f"{', '.join(FLOW_SOLVERS)}"
            )
        return _flow(config, where, number(config, "flow_shift", 1.0, where), tokens, mu)
    if kind not in PREDICTIONS:
        raise UserError(f"{where}: prediction_type {kind!r} is not one of {', '.join(PREDICTIONS)}")
    # With another prediction diffusers does not look at the key.
    if kind == "v_prediction" and config.get("timestep_type", "discrete") != "discrete":
        raise UserError(
            f"{where}: timestep_type is {config['timestep_type']!r}, under which the network is called with "
            "ln(sigma) / 4 in place of an index, which is not supported; only 'discrete'"
        )
    return _table(config, where, str(name), PREDICTIONS[kind]), PREDICTIONS[kind], "index"


def _table(config: Mapping[str, Any], where: str, name: str, prediction: str) -> DiscreteVP:
    betas = BETAS.get(name, _DDPM)
    schedule = config.get("beta_schedule", betas[0])
    if schedule not in SCHEDULES:
        raise UserError(f"{where}: beta_schedule {schedule!r} is not one of {', '.join(map(repr, SCHEDULES))}")
    zero = bool(config.get("rescale_betas_zero_snr"))
    if zero and name not in RESCALED:
        raise UserError(
            f"{where}: rescale_betas_zero_snr is set, which {name} does not read; name the scheduler that the network "
            f"was trained with, one of {', '.join(RESCALED)}"
        )
    if zero and prediction == "eps":
        raise UserError(
            f"{where}: rescale_betas_zero_snr with prediction_type 'epsilon': at the last index, which is pure noise, "
            "the network's answer tells nothing of the picture; such a network is trained with 'v_prediction' or 'sample'"
        )
    shift = number(config, "snr_shift_scale", 3.0, where) if name in SHIFTED else 1.0
    first = _beta(config, "beta_start", betas[1], where)
    last = _beta(config, "beta_end", betas[2], where)
    steps = int(number(config, "num_train_timesteps", 1000, where, whole=True))
    process = DiscreteVP(schedule=schedule, beta_start=first, beta_end=last, steps=steps, zero_snr=zero, snr_shift=shift)
    trained = config.get("trained_betas")
    # An export for TCDScheduler carries the same table with a clean first index.
    if trained is None or trained == process.clean_first_betas():
        return process
    if not isinstance(trained, list) or not all(isinstance(b, int | float) and not isinstance(b, bool) for b in trained):
        raise UserError(f"{where}: trained_betas is {str(trained)[:60]}; it must be a list of a number for each step")
    try:
        return DiscreteVP(steps=steps, zero_snr=zero, snr_shift=shift, betas=tuple(map(float, trained)))
    except ValueError as error:
        said = next((line for line in str(error).splitlines() if "betas:" in line), str(error))
        raise UserError(f"{where}: trained_betas make no process: {said.partition('betas:')[2].strip()}") from None


def _beta(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    beta = number(config, key, default, where)
    if beta >= 1:
        raise UserError(f"{where}: {key} is {beta:g}; it must be below 1")
    return beta


def _edm(config: Mapping[str, Any], where: str, name: str) -> tuple[Process, str, TimeInput]:
    keys = ("sigma_min", "sigma_max", "rho", "sigma_data")
    try:
        process = EDM(**{k: number(config, k, 1.0, where) for k in keys if k in config})
    except ValueError as error:
        said = next((line for line in str(error).splitlines() if line.startswith("  ")), str(error))
        raise UserError(f"{where}: {', '.join(keys)} make no process: {said.partition(' [')[0].strip()}") from None
    if name not in EDM_FAMILY:
        return process, "cm", "250log_sigma"
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise UserError(f"{where}: {name} with prediction_type {config['prediction_type']!r}; only 'epsilon'")
    return process, "edm", "log_sigma/4"


def _scm(config: Mapping[str, Any], where: str) -> tuple[Process, str, TimeInput]:
    """SANA-Sprint's network is a flow's still: its pipeline goes from TrigFlow to t = sin / (cos + sin) and back."""
    kind = config.get("prediction_type", "trigflow")
    if kind != "trigflow":
        raise UserError(f"{where}: SCMScheduler with prediction_type {kind!r}; only 'trigflow'")
    return Flow(), "velocity", "t"


def _flow(
    config: Mapping[str, Any], where: str, shift: float, tokens: int | None, rule: Callable[..., float] | None
) -> tuple[Process, str, TimeInput]:
    if number(config, "num_train_timesteps", 1000, where, whole=True) != 1000:
        raise UserError(f"{where}: num_train_timesteps {config['num_train_timesteps']} of a flow; only 1000")
    if config.get("invert_sigmas"):
        raise UserError(f"{where}: invert_sigmas is set, which is not supported")
    if config.get("use_dynamic_shifting"):
        if config.get("_class_name") == "FlowMatchHeunDiscreteScheduler":
            raise UserError(
                f"{where}: use_dynamic_shifting is set, which FlowMatchHeunDiscreteScheduler does not read; name the "
                "scheduler that the network was trained with, such as FlowMatchEulerDiscreteScheduler"
            )
        if tokens is None:
            raise UserError(f"{where}: use_dynamic_shifting is set, so the shift depends on the image size; give it")
        mu = (rule or dynamic_mu)(config, tokens, where)
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        if shift <= 0:
            raise UserError(f"{where}: base_shift and max_shift give the shift {shift:g}; it must be positive")
    return (Flow() if shift == 1.0 else ShiftedFlow(shift=shift)), "velocity", "1000t"


def dynamic_mu(config: Mapping[str, Any], tokens: int, where: str = "scheduler_config.json") -> float:
    """mu of a dynamic shift: linear in the number of image tokens (diffusers' calculate_shift)."""
    low = number(config, "base_image_seq_len", 256, where)
    high = number(config, "max_image_seq_len", 4096, where)
    if not low < high:
        raise UserError(f"{where}: base_image_seq_len is {low:g}; it must be below max_image_seq_len {high:g}")
    base = number(config, "base_shift", 0.5, where, positive=False)
    top = number(config, "max_shift", 1.15, where, positive=False)
    return base + (top - base) * (tokens - low) / (high - low)


def own_steps(shift: float, count: int) -> tuple[float, float]:
    """(shift, shift_terminal) of the FlowMatchEulerDiscreteScheduler whose own `count` steps are 1 - i / count shifted.

    Left to itself it spaces the levels from 1 to its smallest, not to 1 / count. A shift is a Moebius map and the stretch
    to shift_terminal an affine one, and for every (shift, count) one pair of them takes its spacing to the wanted one.

    Args:
        shift: of the wanted levels.
        count: of steps, 2 or more.
    """
    inner = shift
    for _ in range(200):  # a contraction: 40 rounds are enough for shifts up to 30
        lowest = inner * 0.001 / (1 + (inner - 1) * 0.001)
        slope = (1 - lowest) / (count - 1)
        inner = count * shift * slope / (count * slope * shift - (shift - 1))
    return inner, shift / (count + shift - 1)
