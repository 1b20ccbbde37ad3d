"""What a recipe can name as a network or a teacher: something that builds a module on its site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from torch import nn

from fewstep.algebra.prediction import PAIRS
from fewstep.algebra.process import EDM
from fewstep.config import OneOf, RecipeError


@dataclass(frozen=True)
class Site:
    """Where a role is built: the data's shape and classes, the roles built so far, the seed of its weights.

    image: (c', h', w') of the picture in the data's conditions, None for none.
    renumbered: why a label of the data is not the number that its class is named by.
    """

    shape: tuple[int, ...]
    classes: int
    roles: Mapping[str, nn.Module]
    seed: int
    image: tuple[int, ...] | None = None
    renumbered: str = ""

    def role(self, name: str, asked_by: str) -> nn.Module:
        if name not in self.roles:
            raise RecipeError(f"{asked_by}: refers to role {name!r}, which this recipe does not have")
        return self.roles[name]


class Opened(Protocol):
    """Something that stands on files, opened for samples of a shape; Absent or UserError names one that cannot be."""

    @property
    def of(self) -> str:
        """What it is called in messages."""
        ...

    def files(self) -> list[Path]: ...

    def open(self, shape: tuple[int, ...]) -> Any: ...


def check_labels(site: Site, key: str) -> None:
    """RecipeError for a part that knows classes by their numbers, where the data has renumbered its own."""
    if site.renumbered:
        raise RecipeError(
            f"{key}: knows classes by their numbers, and in the data {site.renumbered}; rename the folders 0, 1, 2, ... "
            "(an empty one stands for a class without pictures), or say renumber: true of the data where their order "
            "is that of the classes"
        )


def check_image(site: Site, channels: int, key: str, *, able: bool = True) -> None:
    """RecipeError unless a network that takes a picture of so many channels (0 none) is for the data's conditions.

    able: whether its kind has a key `image`.
    """
    if site.image is None:
        if channels:
            raise RecipeError(
                f"{key}: {channels}, and the data's conditions hold no picture; train on data: {{name: degraded, ...}}"
            )
    elif channels != site.image[0]:
        shown = "takes no picture" if not channels else f"takes a picture of {channels} channels"
        remedy = f"give image: {site.image[0]}" if able else "take dit, unet2d or unet-text, or other data"
        raise RecipeError(f"{key}: {shown}, and the data's conditions hold one of {list(site.image)}; {remedy}")


def seeded(site: Site, build: Any) -> nn.Module:
    """Build with a fixed seed without disturbing the caller's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(site.seed)
        return build()


MOST_WEIGHTS = 1 << 30
"""Of a network that a recipe describes: 4 GiB in float32."""


def check_weights(count: int, what: str) -> None:
    """ValueError for sizes that make a network of more than MOST_WEIGHTS weights; count: about how many they make."""
    if count > MOST_WEIGHTS:
        raise ValueError(f"{what}: make a network of about {count:.1e} weights; at most {MOST_WEIGHTS:.1e} are built")


def check_prediction(prediction: str, process: Any) -> None:
    if prediction not in PAIRS:
        raise ValueError(f"prediction {prediction!r} is not one of {', '.join(PAIRS)}")
    if prediction in ("edm", "cm") and not isinstance(process, EDM):
        raise ValueError(f"prediction {prediction!r} needs the process edm, not {process.name}")


class Spec(Protocol):
    """A frozen part that builds one role."""

    @property
    def name(self) -> str: ...
    def build(self, site: Site) -> nn.Module:
        """The module on the CPU, its weights from the site's seed."""
        ...


NetworkPart = Annotated[Spec, OneOf("network")]
TeacherPart = Annotated[Spec, OneOf("teacher")]
