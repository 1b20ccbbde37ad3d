"""Pictures beside what is left of them under an operator: low resolution, blur, edges, as conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.operators import Operator, OperatorPart
from fewstep.config import NotNegative, UserError, part
from fewstep.data.base import Conditions, Data, DataPart, renumbered
from fewstep.data.latents import Encoder, vae_folder
from fewstep.networks.folder import read_latents


@part("data", "degraded")
class Degraded:
    """Samples of other data, each conditioned by cond["image"] = A(x) + noise.

    Methods without data are given such conditions alone, never the samples.
    """

    of: DataPart
    """The data whose samples these are; `held_out` of it is what evaluation degrades and compares with."""
    by: OperatorPart
    """The operator A."""
    noise: NotNegative = 0.0
    """Standard deviation of the noise on A(x), drawn anew each time."""
    keep: bool = True
    """The classes or texts of the data stand beside the picture; false drops them."""
    easy: OperatorPart | None = None
    """Another operator, whose picture is cond["easy"], for a teacher that says `see: {image: easy}`."""
    vae: str | None = None
    """Folder of a VAE or a pipeline: samples are the latents of the pictures, drawn from its posterior as they are
    needed, and the pictures in the conditions stay pictures, as a ControlNet takes them."""
    conditions: ClassVar[Conditions] = "image"

    def files(self) -> list[Path]:
        """Those of the data, where it stands on any."""
        return self.of.files() if hasattr(self.of, "files") else []

    @property
    def encoder(self) -> Any:
        """The text encoder of the data."""
        return getattr(self.of, "encoder", None) if self.keep else None

    @property
    def negative(self) -> str:
        """The negative prompt of the data."""
        return getattr(self.of, "negative", "")

    @property
    def zeros(self) -> bool | None:
        """Whether guidance of the data's text moves away from zeros."""
        return getattr(self.of, "zeros", None)

    @property
    def text_cache(self) -> str | None:
        """Folder of embeddings of the data."""
        return getattr(self.of, "text_cache", None)

    def outline(self) -> tuple[tuple[int, ...], int]:
        """As `open` has them."""
        shape, classes = self.of.outline()
        self._shapes(shape)
        return self.latents(shape), classes if self.keep else 0

    def renumbered(self) -> str:
        """As the pictures' own."""
        return self.of.renumbered() if self.keep and hasattr(self.of, "renumbered") else ""

    def image_outline(self) -> tuple[int, ...]:
        """(c', h', w') of the picture in the conditions; errors as `outline`."""
        return self._shapes(self.of.outline()[0])

    def latents(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a sample of pictures of a shape (c, h, w). UserError for pictures that the VAE cannot take."""
        if self.vae is None:
            return tuple(shape)
        told = read_latents(vae_folder(self.vae) / "config.json")
        assert told is not None
        colours, high, wide = shape
        if told.frames or colours != 3 or high % told.pixels or wide % told.pixels:
            raise UserError(
                f"data.vae {self.vae}: takes RGB pictures whose sides are multiples of {told.pixels}, and these are "
                f"{list(shape)}; set data.of.size, or take a VAE of pictures"
            )
        return told.channels, high // told.pixels, wide // told.pixels

    def _shapes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if getattr(self.of, "vae", None) is not None:
            raise UserError(
                "data.of: latents are no pictures, and operators are of pictures; degrade the pictures and name the VAE "
                "as data.vae"
            )
        try:
            if self.easy is not None:
                self.easy.shape(shape)
            return self.by.shape(shape)
        except ValueError as error:
            raise UserError(f"data.by: {error}") from None

    def open(self) -> DegradedData:
        inner = self.of.open()
        return DegradedData(inner, self, self._shapes(tuple(inner.shape)))


@dataclass(frozen=True)
class Examples:
    """Pictures that evaluation compares with, by number: truth (b, c, h, w), their conditions, classes (b,) or None."""

    truth: Tensor
    cond: Any
    labels: Tensor | None


class DegradedData:
    """An opened data set and the operator; `image_shape` is that of the picture in a condition."""

    def __init__(self, inner: Data, spec: Degraded, image: tuple[int, ...]) -> None:
        self.inner, self.spec, self.image_shape = inner, spec, image
        self.shape = spec.latents(tuple(inner.shape))
        self._encoder: Encoder | None = None
        self.classes = inner.classes if spec.keep else 0
        self.renumbered = renumbered(inner) if spec.keep else ""

    @property
    def held(self) -> Sequence[int] | Tensor:
        """Numbers of the pictures that are held out."""
        return getattr(self.inner, "held", ())

    @property
    def operator(self) -> Operator:
        return self.spec.by

    def degraded(self, x0: Tensor, own: Any, draws: Draws) -> dict[str, Tensor]:
        """The condition of samples x0 (b, c, h, w) whose own condition is `own`."""
        image = self.spec.by(x0)
        if self.spec.noise:
            image = image + self.spec.noise * draws.normal_like(image)
        cond = {"image": image} if self.spec.easy is None else {"image": image, "easy": self.spec.easy(x0)}
        if own is None or not self.spec.keep:
            return cond
        return ({"label": own} if isinstance(own, Tensor) else dict(own)) | cond

    def batch(self, draws: Draws) -> tuple[Tensor, Any]:
        x0, own = self.inner.batch(draws)
        cond = self.degraded(x0, own, draws)
        return (x0 if self.spec.vae is None else self.encoded(x0, draws)), cond

    def conditions(self, draws: Draws) -> Any:
        x0, own = self.inner.batch(draws)
        return self.degraded(x0, own, draws)

    def encoded(self, x0: Tensor, draws: Draws) -> Tensor:
        """Latents of pictures (b, c, h, w), drawn from the VAE's posterior."""
        assert self.spec.vae is not None
        if self._encoder is None or self._encoder.device != draws.device:
            self._encoder = Encoder(self.spec.vae, draws.device)
        parts = [self._encoder(part) for part in x0.split(8)]
        mean, std = (torch.cat(t).to(draws.device) for t in zip(*parts, strict=True))
        return mean + std * draws.normal_like(mean)

    def null(self, cond: Any) -> Any:
        """The null class or text beside the same picture; None where there is neither."""
        own = {k: v for k, v in cond.items() if k not in ("image", "easy")}
        if not own:
            return None
        null = self.inner.null(own["label"] if set(own) == {"label"} else own)
        return {**cond, **({"label": null} if isinstance(null, Tensor) else null)}

    def all(self) -> tuple[Tensor, Tensor | None]:
        return self.inner.all()

    def reference(self) -> Any:
        """What samples are compared with as a set: that of the data."""
        return self.inner.reference() if hasattr(self.inner, "reference") else self.inner.all()

    def about(self) -> str:
        """What was read, and how it is degraded."""
        own = self.inner.about() if hasattr(self.inner, "about") else f"data {self.spec.of.name}"
        noise = f" + noise {self.spec.noise:g}" if self.spec.noise else ""
        return f"{own}; conditioned by {self.spec.by.name}{noise}, {list(self.image_shape)}"

    def examples(self, index: Tensor) -> Examples:
        """Those that are held out, or all where none are, in their order and over again: the same at every call."""
        inner: Any = self.inner
        if not hasattr(inner, "held"):
            raise UserError(f"data {self.spec.of.name}: has no pictures by number that samples could be compared with")
        chosen = inner.held if len(inner.held) else inner.rows
        k = chosen[index.cpu() % len(chosen)]
        truth = inner.pictures(k)
        own = inner.condition(k)
        labels = own if isinstance(own, Tensor) and not own.is_floating_point() else None
        return Examples(truth, self.degraded(truth, own, Draws(fold("examples"), k)), labels)
