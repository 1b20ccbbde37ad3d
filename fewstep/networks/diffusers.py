"""diffusers folders as denoisers: class, process, prediction and time input are read from the folder's own configs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from fewstep.config import UserError
from fewstep.networks import unet2d as _unet2d  # noqa: F401  registers UNet2DModel
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.folder import Folder, check_network_config, read_folder, resolve as resolve
from fewstep.networks.refused import why
from fewstep.networks.scheduler import DDPM_FAMILY as DDPM_FAMILY, PREDICTIONS, read_scheduler as read_scheduler
from fewstep.networks.wrappers import WRAPPERS, Wrapper

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_denoiser(
    path: str | Path,
    classes: int | None = None,
    *,
    size: tuple[int, ...] | None = None,
    prediction: str | None = None,
    guidance: float | None = None,
    wrapper: str | None = None,
    dtype: str = "fp32",
) -> Denoiser:
    """Open a pipeline folder (unet/ or transformer/, scheduler/) as a Denoiser.

    Args:
        path: the folder, or assets:NAME.
        classes: number of real classes, when the embedding may hold a null class beside them.
        size: height and width of x, of a video frames before them; the model's own when left out. A dynamic flow shift
            depends on it.
        prediction: diffusers' prediction_type, for a scheduler config that does not say.
        guidance: embedded guidance scale where the condition brings none (Flux-dev).
        wrapper: a Wrapper of your own, "module:Class" or "file.py:Class"; one registered here when left out.
        dtype: of the weights, a key of DTYPES. Predictions are float32 whatever it is.

    Raises UserError naming the file for anything missing, unsupported, ambiguous or truncated; whether model_index.json
    agrees is for `Folder.require_agreement` to say.

    >>> teacher = fewstep.load_denoiser("assets:digits-teacher")
    >>> x, t = torch.zeros(2, 1, 8, 8), torch.ones(2)
    >>> teacher(x, t, torch.tensor([3, 7])).x0.shape
    torch.Size([2, 1, 8, 8])
    >>> teacher.process.sigma_max
    80.0
    """
    path = str(path)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    folder = read_folder(path, DTYPES[dtype])
    check_network_config(folder.config, str(folder.root / folder.component / "config.json"))
    cls = wrapper_of(folder, wrapper)
    latents = folder.latents
    folder.require_components(text=False)
    schedule = dict(folder.scheduler)
    if prediction is not None:
        said = schedule.get("prediction_type", prediction)
        if said != prediction or prediction not in PREDICTIONS:
            allowed = f"{folder.scheduler_file} says {said!r}" if said != prediction else ", ".join(PREDICTIONS)
            raise UserError(f"teacher {path}: prediction {prediction!r}: {allowed}")
        schedule["prediction_type"] = prediction
    read_scheduler(schedule, str(folder.scheduler_file), tokens=256)  # before the weights, which take long
    model: Any = cls.load(folder)
    pixels = latents.pixels if latents else 1
    rows = int(getattr(model.config, "num_class_embeds", 0) or 0) if hasattr(model, "config") else 0
    net = cls(model, real_classes(rows, classes, path), guidance=guidance, pixels=pixels)
    if net.pipeline:
        folder.require_pipeline(net.pipeline)
    sides: list[Any] = [getattr(getattr(model, "config", None), f"{k}_channels", None) for k in ("in", "out")]
    if latents and net.image_channels:
        raise UserError(
            f"teacher {path}: takes {net.image_channels} channels of a picture beside {net.channels()} latent "
            "channels, for inpainting or super-resolution of latents; only networks of pixels are trained with one"
        )
    if folder.component == "unet" and sides[0] != sides[1]:
        what = "networks that also predict a variance are not supported"
        if sides[0] > sides[1]:
            what = "the others are a mask, a picture or the like beside x (inpainting, editing), which is not supported"
        raise UserError(f"teacher {path}: has {sides[1]} output channels for {sides[0]} input channels; {what}")
    if latents and latents.channels != net.channels():
        raise UserError(
            f"teacher {path}: the VAE has {latents.channels} latent channels, the network takes {net.channels()}"
        )
    tokens = net.tokens(size or net.sample_size())
    process, kind, time_input = read_scheduler(schedule, str(folder.scheduler_file), tokens, net.mu)
    return Denoiser(net, process, kind, time_input).eval()


def real_classes(rows: int, classes: int | None, path: str) -> int:
    """Classes of a network with so many class embeddings, of which one may be the null class's. UserError for others."""
    if rows and classes is not None and classes not in (rows, rows - 1):
        raise UserError(
            f"teacher {path}: has {rows} class embeddings, which fits {rows} classes (or {rows - 1} and a null "
            f"class), not {classes}"
        )
    return (rows if classes is None else classes) if rows else 0


def wrapper_of(folder: Folder, name: str | None = None) -> type[Wrapper]:
    """The wrapper class for a folder's network. UserError lists the supported classes for an unknown one."""
    if name is not None:
        return import_wrapper(name)
    if (folder.root / "transformer_2").is_dir():
        raise UserError(
            f"teacher {folder.shown}: has two networks, transformer/ for the noisier levels and transformer_2/ below "
            "boundary_ratio; only families of one are supported, such as Wan 2.1"
        )
    if folder.kind not in WRAPPERS:
        known = ", ".join(sorted(WRAPPERS))
        raise UserError(
            f"{folder.root / folder.component / 'config.json'}: class {folder.kind!r} is not supported: "
            f"{why(folder.kind)}; supported: {known}. Give a wrapper of your own with `wrapper: file.py:Class`"
        )
    return WRAPPERS[folder.kind]


def import_wrapper(name: str) -> type[Wrapper]:
    """The Wrapper subclass `module:Class` or `file.py:Class`. This runs that module's code."""
    cls = import_name(name, "wrapper")
    if not (isinstance(cls, type) and issubclass(cls, Wrapper)):
        raise UserError(f"wrapper {name!r}: is not a subclass of fewstep.networks.wrappers.Wrapper")
    return cls


def import_name(name: str, what: str) -> Any:
    """What `module:Name` or `file.py:Name` is; UserError calls it `what`. This runs that module's code."""
    source, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise UserError(f"{what} {name!r}: expected module:Name or file.py:Name")
    try:
        module = _from_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
        return getattr(module, attribute)
    except (ImportError, OSError, AttributeError) as error:
        raise UserError(f"{what} {name!r}: cannot be imported: {error}") from None


def _from_file(path: Path) -> Any:
    name = f"fewstep_user_{path.stem}"
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(path.resolve()):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"{path}: no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
