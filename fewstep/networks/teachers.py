"""Teachers as recipe parts: a diffusers folder, a function of yours, the exact denoiser of the ring."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

import fewstep.networks.specs  # noqa: F401  registers the networks that are chosen among
from fewstep.algebra.condition import check_keys
from fewstep.algebra.process import EDM, Flow, ProcessPart
from fewstep.config import Count, UserError, part
from fewstep.networks.adapters import frozen
from fewstep.networks.analytic import Length, ring
from fewstep.networks.denoiser import Denoiser, Rescheduled, TimeInput
from fewstep.networks.folder import resolve
from fewstep.networks.hub import NAME
from fewstep.networks.parts import NetworkPart, Site, check_labels, check_prediction


@part("teacher", "diffusers")
class DiffusersTeacher:
    """A frozen teacher from a diffusers folder; class, process and prediction are read from its own configs."""

    path: str
    """Folder, assets:NAME for one that ships with fewstep, or org/name in the Hugging Face cache."""
    revision: str | None = None
    """Branch, tag or commit of org/name; main when left out. What a run writes down is the commit."""
    classes: int | None = None
    """Real classes when the folder does not say (UNets with a null class have one embedding more)."""
    process: ProcessPart | None = None
    """Re-express it in this process by matching noise levels; its own when left out."""
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the network predicts, for a scheduler config that does not say (early SD 1.x folders)."""
    guidance: float | None = None
    """Guidance scale that the network takes as an input (Flux-dev 3.5); not a guided call."""
    wrapper: str | None = None
    """A wrapper of your own, module:Class or file.py:Class, whose code is run; chosen by the class when left out."""
    ignore: tuple[str, ...] = ()
    """Keys of conditions that it is not shown: [image] is a teacher that does not know the control (JDM)."""
    see: dict[str, str] = Field(default_factory=dict)
    """Keys that it is shown another one's picture for: {image: easy} is data.easy's (scale distillation)."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the frozen weights; copies and adapters that are trained are kept in fp32."""

    def __post_init__(self) -> None:
        check_keys((*self.ignore, *self.see, *self.see.values()), "ignore, see")
        if self.revision is None:
            return
        named = NAME.fullmatch(self.path)
        if named is None:
            raise ValueError(f"revision {self.revision!r} is of a hub's repository, path: org/name, not of {self.path}")
        if named[2] is not None or not NAME.fullmatch(self.folder):
            raise ValueError(f"revision {self.revision!r}: expected one branch, tag or commit for {self.path}")

    @property
    def folder(self) -> str:
        """The path, with the revision behind an @ where one is given; `read_folder` takes it."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    def files(self) -> list[Path]:
        """The network's config and weights, and its noise schedule."""
        root = resolve(self.folder)
        component = root / ("transformer" if (root / "transformer").is_dir() else "unet")
        weights = list(component.glob("*.safetensors"))
        # Beside plain weights their variants (x.fp16.safetensors) are not read.
        plain = [p for p in weights if "." not in p.stem] or weights
        return [*plain, component / "config.json", root / "scheduler" / "scheduler_config.json"]

    def build(self, site: Site) -> nn.Module:
        from fewstep.networks.diffusers import load_denoiser
        from fewstep.networks.folder import read_folder

        size = site.shape[1:] if len(site.shape) in (3, 4) else None
        teacher = load_denoiser(
            self.folder,
            classes=self.classes or site.classes,
            size=size,
            prediction=self.prediction,
            guidance=self.guidance,
            wrapper=self.wrapper,
            dtype=self.dtype,
        )
        read_folder(self.folder).require_agreement()
        self.check(teacher, site)
        teacher.ignore, teacher.see = self.ignore, self.see
        return frozen(teacher if self.process is None else Rescheduled(teacher, self.process))

    def check(self, teacher: nn.Module, site: Site) -> None:
        """UserError for a network that is not for the data: other channels, classes, or a size that it cannot take."""
        net: Any = teacher.net
        channels = net.channels()
        if channels != site.shape[0]:
            raise UserError(f"teacher {self.path}: takes {channels} channels, but the data has shape {list(site.shape)}")
        own = int(net.classes)
        if site.classes and own and own != site.classes:
            raise UserError(
                f"teacher {self.path}: has {own} classes, the data {site.classes}; their numbers (and the null class "
                f"{own}) must mean the same"
            )
        if own and site.classes:
            check_labels(site, f"teacher {self.path}")
        shown = None if "image" in (*self.ignore, *self.see) else site.image
        if shown is not None and net.image_channels != shown[0]:
            takes = f"takes a picture of {net.image_channels} channels" if net.image_channels else "takes no picture"
            raise UserError(
                f"teacher {self.path}: {takes}, and the data's conditions hold one of {list(shown)}; with "
                "ignore: [image] it is not shown"
            )
        if wrong := net.refuses_size(site.shape[1:]):
            raise UserError(f"teacher {self.path}: {wrong}, and the data has {site.shape[1]} x {site.shape[2]}")


@part("teacher", "module")
class ModuleTeacher:
    """A frozen teacher from a function of yours, for networks that are in no diffusers folder."""

    factory: str
    """module:function or file.py:function, called without arguments; returns the loaded network. Its code is run."""
    arguments: dict[str, str]
    """Names of the network's arguments by x, time and the keys of a condition: {x: sample, time: t, label: y}."""
    prediction: str
    """What it predicts: eps, v, x0, velocity, psi, score, edm, trig."""
    time_input: TimeInput
    """What it takes as its time."""
    process: ProcessPart
    """The noising process that it was trained in."""
    taps: dict[str, str] = Field(default_factory=dict)
    """Sub-modules that a discriminator may look at, by tap name, as dotted paths."""

    def __post_init__(self) -> None:
        check_prediction(self.prediction, self.process)

    def build(self, site: Site) -> nn.Module:
        from fewstep.networks.diffusers import import_name
        from fewstep.networks.wrappers import Declared

        model = import_name(self.factory, "teacher.factory")()
        if not isinstance(model, nn.Module):
            raise UserError(f"teacher.factory {self.factory!r}: returned a {type(model).__name__}, not a torch module")
        classes = site.classes if "label" in self.arguments else 0
        if classes:
            check_labels(site, f"teacher.factory {self.factory}")
        net = Declared.by_names(model, self.arguments, self.taps, classes=classes)
        return frozen(Denoiser(net, self.process, self.prediction, self.time_input))


@part("teacher", "network")
class NetworkTeacher:
    """A network of ours that a stage before fills: `before: [{method: {name: denoise}}]`, `copy: {teacher: student}`."""

    of: NetworkPart
    """The network, of the student's kind and sizes."""

    def build(self, site: Site) -> nn.Module:
        return frozen(self.of.build(site))


@part("teacher", "ring")
class RingTeacher:
    """The exact denoiser of the ring data set, in EDM coordinates or re-expressed in another process."""

    modes: Count = 8
    """Gaussians on the circle; the data's."""
    radius: Length = 1.25
    """Of the circle; the data's."""
    std: Length = 0.1
    """Of every Gaussian; the data's."""
    process: ProcessPart = Flow()
    """The process in which it answers."""

    def build(self, site: Site) -> nn.Module:
        exact = ring(EDM(sigma_max=1000.0), self.modes, self.radius, self.std)
        return frozen(Rescheduled(exact, self.process))
