"""diffusers folders as denoisers: process, prediction and time input are read from the scheduler's own config."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from fewstep.config import UserError
from fewstep.networks.denoiser import Denoiser, TimeInput
from fewstep.process import EDM, DiscreteVP, Flow, Process

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
)
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def resolve(path: str) -> Path:
    """A folder; `assets:NAME` is one that ships with fewstep."""
    if path.startswith("assets:"):
        return Path(str(files("fewstep.assets"))) / path.removeprefix("assets:")
    return Path(path).expanduser()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object")
    return data


def read_scheduler(config: dict[str, Any], where: str) -> tuple[Process, str, TimeInput]:
    """(process, prediction, time input) of a scheduler_config.json. Raises UserError where it is ambiguous."""
    name = config.get("_class_name")
    if name == "CMStochasticIterativeScheduler":
        keys = ("sigma_min", "sigma_max", "rho", "sigma_data")
        return EDM(**{k: float(config[k]) for k in keys if k in config}), "cm", "250log_sigma"
    if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise UserError(
                f"{where}: {name} with prediction_type {config['prediction_type']!r}; only 'epsilon'"
            )
        keys = ("sigma_min", "sigma_max", "rho", "sigma_data")
        return EDM(**{k: float(config[k]) for k in keys if k in config}), "edm", "log_sigma/4"
    if name == "FlowMatchEulerDiscreteScheduler":
        return Flow(), "velocity", "1000t"
    if name not in DDPM_FAMILY:
        known = ("CMStochasticIterativeScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler")
        raise UserError(
            f"{where}: scheduler {name!r} is not supported; known: {', '.join(known + DDPM_FAMILY)}"
        )
    if "prediction_type" not in config:
        raise UserError(
            f"{where}: prediction_type is missing; add one of {', '.join(map(repr, _PREDICTIONS))} as trained"
        )
    if config["prediction_type"] not in _PREDICTIONS:
        raise UserError(
            f"{where}: prediction_type {config['prediction_type']!r} is not one of {', '.join(_PREDICTIONS)}"
        )
    schedule = config.get("beta_schedule", "linear")
    if schedule not in ("linear", "scaled_linear"):
        raise UserError(f"{where}: beta_schedule {schedule!r} is not one of 'linear', 'scaled_linear'")
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(key):
            raise UserError(f"{where}: {key} is set, which is not supported")
    process = DiscreteVP(
        schedule=schedule,
        beta_start=float(config.get("beta_start", 1e-4)),
        beta_end=float(config.get("beta_end", 0.02)),
        steps=int(config.get("num_train_timesteps", 1000)),
    )
    return process, _PREDICTIONS[config["prediction_type"]], "index"


def _check_whole(path: str, unet: Path) -> None:
    from safetensors import SafetensorError, safe_open

    for file in sorted(unet.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"teacher {path}: unet/{file.name} is truncated or damaged ({file.stat().st_size} bytes): {error}"
            ) from None


def load_denoiser(path: str, classes: int | None = None) -> Denoiser:
    """Open a pipeline folder (unet/ and scheduler/) with a UNet2DModel as a Denoiser in float32.

    Args:
        path: the folder, or assets:NAME.
        classes: number of real classes, when the embedding may hold a null class beside them.

    Raises UserError naming the file for anything missing, unsupported or truncated.
    """
    root = resolve(path)
    if not root.is_dir():
        raise UserError(
            f"teacher {path}: no such folder; train one with `fewstep run digits-teacher` or give a path"
        )
    unet, schedule = root / "unet", root / "scheduler" / "scheduler_config.json"
    for needed in (unet / "config.json", schedule):
        if not needed.is_file():
            raise UserError(
                f"teacher {path}: {needed.relative_to(root)} is missing; a diffusers pipeline has it"
            )
    config = _read_json(unet / "config.json")
    if config.get("_class_name") != "UNet2DModel":
        raise UserError(
            f"{unet / 'config.json'}: class {config.get('_class_name')!r} is not supported; supported: UNet2DModel"
        )
    if not any(unet.glob("*.safetensors")):
        found = [p.name for p in unet.glob("*.bin")]
        extra = f"; {found[0]} is a pickle: convert it with safetensors first" if found else ""
        raise UserError(f"teacher {path}: unet/ has no .safetensors file{extra}")
    process, prediction, time_input = read_scheduler(_read_json(schedule), str(schedule))
    _check_whole(path, unet)
    from diffusers import UNet2DModel
    from safetensors import SafetensorError

    from fewstep.networks.unet2d import UNet2D

    try:
        model, told = UNet2DModel.from_pretrained(
            unet,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"teacher {path}: the weights in unet/ cannot be loaded: {error}") from None
    # diffusers only warns and leaves what the file lacks at random.
    for kind, what in (("missing_keys", "lack"), ("unexpected_keys", "hold the unknown")):
        if told[kind]:
            raise UserError(
                f"teacher {path}: the weights in unet/ {what} {sorted(told[kind])[0]} "
                f"({len(told[kind])} in all); they are of another network than unet/config.json says"
            )
    if model.config.out_channels != model.config.in_channels:
        raise UserError(
            f"teacher {path}: has {model.config.out_channels} output channels for {model.config.in_channels} input "
            "channels; networks that also predict a variance are not supported"
        )
    rows = model.config.num_class_embeds or 0
    if rows and classes is None:
        classes = rows
    if rows and classes not in (rows, rows - 1):
        raise UserError(
            f"teacher {path}: has {rows} class embeddings, which fits {rows} classes (or {rows - 1} and a null "
            f"class), not {classes}"
        )
    net = UNet2D(model, classes if rows and classes else 0)
    return Denoiser(net, process, prediction, time_input).eval()
