"""What a data set is to a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

from pydantic import Field
from torch import Tensor

from fewstep.algebra.draws import Draws
from fewstep.config import OneOf


class Data(Protocol):
    """Gives samples and conditions for the rows of a batch; every choice comes from `draws`."""

    shape: tuple[int, ...]
    """Of one sample, (C, H, W), (d,), or (n, d) of n points."""
    classes: int
    """Number of classes; 0 for none."""

    def batch(self, draws: Draws) -> tuple[Tensor, Any]:
        """Real samples (b, *shape) in [-1, 1] and their conditions."""
        ...

    def conditions(self, draws: Draws) -> Any:
        """Conditions alone, without touching a sample, for methods that need no data."""
        ...

    def null(self, cond: Any) -> Any:
        """The null condition of the same structure, or None where there is none."""
        ...

    def all(self) -> tuple[Tensor, Tensor | None]:
        """The whole set as (images, labels), for reference statistics."""
        ...


Conditions = Literal["none", "classes", "text", "image", "points"]
"""What stands beside a sample; "image" is a picture, alone or with classes or text, "points" says which of a sample's
points are there."""


def conditions_of(data: Any) -> Conditions:
    """Those of an opened data set."""
    if image_shape(data) is not None:
        return "image"
    if getattr(data, "masked", False):
        return "points"
    if getattr(data, "text", None) is not None:
        return "text"
    return "classes" if data.classes else "none"


def image_shape(data: Any) -> tuple[int, ...] | None:
    """(c', h', w') of the picture in the conditions of an opened data set; None where they have none."""
    return getattr(data, "image_shape", None)


def renumbered(data: Any) -> str:
    """Why a label of an opened data set is not the number that its class is named by; nothing where all are."""
    return getattr(data, "renumbered", "")


class DataSpec(Protocol):
    """A data set as a recipe names it."""

    @property
    def name(self) -> str: ...
    @property
    def conditions(self) -> Conditions | None:
        """What stands beside its samples; None where only its files tell."""
        ...

    # One that may label classes otherwise than they are named has also `renumbered() -> str`, as its opened set says it.
    # A part that stands on files has also `files() -> list[Path]`: a resumed run says when they have changed.
    def outline(self) -> tuple[tuple[int, ...], int]:
        """(shape of a sample, number of classes) at little cost. Absent: it is not here; UserError: it will not open."""
        ...

    def open(self) -> Data:
        """Find and check the files; UserError says what is missing."""
        ...


class EncoderSpec(Protocol):
    """A text encoder as a recipe names it."""

    @property
    def name(self) -> str: ...
    def open(self, device: Any = "cpu") -> Any:
        """The encoder, loaded on a device: prompts to their conditions, a list of tensors where lengths differ."""
        ...


Share = Annotated[float, Field(ge=0, lt=1)]
"""A share of a data set, in [0, 1)."""
DataPart = Annotated[DataSpec, OneOf("data")]
EncoderPart = Annotated[EncoderSpec, OneOf("encoder")]
