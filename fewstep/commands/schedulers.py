"""A folder's scheduler as diffusers builds it, and the simplest one of its schedule, for check-teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fewstep.algebra.process import EDM, DiscreteVP, Flow, Process, ShiftedFlow
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.folder import Folder
from fewstep.networks.scheduler import DDPM_FAMILY, EDM_FAMILY, SHIFTED, own_steps


def own_scheduler(folder: Folder) -> Any:
    """The folder's scheduler as diffusers builds it, with its class's defaults for what the config leaves out."""
    import diffusers

    return getattr(diffusers, str(folder.scheduler["_class_name"])).from_config(dict(folder.scheduler))


def scheduler_of(folder: Folder, wrapper: Any, size: tuple[int, ...], steps: int) -> Any:
    """The folder's own scheduler with `steps` steps set; grids that say how to sample, not how to call, are left out."""
    scheduler = own_scheduler(folder)
    known = scheduler.config
    grids = {"original_inference_steps": known.get("num_train_timesteps"), "scale_factors": None}
    changes = {k: v for k, v in grids.items() if known.get(k) is not None}
    if "s_noise" in known:  # a consistency model's table is of the levels to visit
        changes["num_train_timesteps"] = 40
    scheduler = type(scheduler).from_config(known, **changes)
    dynamic = folder.scheduler.get("use_dynamic_shifting")
    more = {"mu": wrapper.mu(folder.scheduler, wrapper.tokens(size), steps=steps)} if dynamic else {}
    if type(scheduler).__name__ == "SCMScheduler":
        more = {"intermediate_timesteps": None}
    scheduler.set_timesteps(steps, **more)
    return scheduler


def times_set(scheduler: Any, process: Process) -> Tensor:
    """Times of a process, float64, at which a scheduler calls the network as its timesteps are set."""
    stamps = scheduler.timesteps.double()
    if isinstance(process, DiscreteVP):
        return stamps + 1
    if type(scheduler).__name__ == "SCMScheduler":
        angle = stamps[:-1]
        return angle.sin() / (angle.cos() + angle.sin())
    return scheduler.sigmas[: len(stamps)].double()


def first_order(folder: Folder, net: Denoiser, size: tuple[int, ...], steps: int) -> tuple[Any, Tensor]:
    """A deterministic one-call-a-step scheduler of the folder's own schedule, and its timesteps float64.

    size: of x without its channels, on which a dynamic shift depends.
    """
    import diffusers

    name = folder.scheduler.get("_class_name")
    config: dict[str, Any] = dict(folder.scheduler) | dict(own_scheduler(folder).config)
    wrapper: Any = net.net
    if name == "SCMScheduler":
        scheduler: Any = diffusers.SCMScheduler.from_config(config)
        scheduler.set_timesteps(steps, intermediate_timesteps=None)
        return scheduler, scheduler.timesteps[:-1].double()
    if isinstance(net.process, Flow):
        shift = config.get("flow_shift", config.get("shift", 1.0))
        keys = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
        more = {k: config[k] for k in ("use_dynamic_shifting", *keys) if config.get(k) is not None}
        if wrapper.pipeline and not (wrapper.levels or wrapper.even) and steps > 1:
            # The pipeline hands its scheduler a number of steps and nothing else.
            inner, low = own_steps(net.process.shift if isinstance(net.process, ShiftedFlow) else 1.0, steps)
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=inner, shift_terminal=low)
            scheduler.set_timesteps(steps)
            return scheduler, scheduler.timesteps.double()
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **more)
        mu = {"mu": wrapper.mu(config, wrapper.tokens(size), steps=steps)} if config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], **mu)
    elif name in DDPM_FAMILY:
        changes: dict[str, Any] = {
            "clip_sample": False,
            "set_alpha_to_one": True,
            "timestep_spacing": "trailing",
            "thresholding": False,
        }
        kept = (
            "beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "trained_betas", "rescale_betas_zero_snr",
            "snr_shift_scale",
        )  # fmt: skip
        own = {k: config[k] for k in kept if config.get(k) is not None}
        own["prediction_type"] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[net.prediction]
        if name in SHIFTED:
            del changes["thresholding"]
        scheduler = (diffusers.CogVideoXDDIMScheduler if name in SHIFTED else diffusers.DDIMScheduler)(**own, **changes)
        if "variance_type" in config:
            # DDIM has none, but IFPipeline reads it to tell how many channels are the mean's.
            scheduler.register_to_config(variance_type=config["variance_type"])
        scheduler.set_timesteps(steps)
    elif name in EDM_FAMILY:
        # Where its levels lie and whether the last step ends at 0 say how to sample, not what the network is.
        changes = {"sigma_schedule": "karras", "final_sigmas_type": "zero"}
        scheduler = diffusers.EDMEulerScheduler.from_config(config, **changes)
        scheduler.set_timesteps(steps)
    else:
        assert isinstance(net.process, EDM)
        changes = {"clip_denoised": False, "s_noise": 1.0, "num_train_timesteps": steps + 1}
        scheduler = diffusers.CMStochasticIterativeScheduler.from_config(config, **changes)
        scheduler.set_timesteps(steps)
    return scheduler, scheduler.timesteps.double()
