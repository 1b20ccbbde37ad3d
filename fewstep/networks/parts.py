"""What a recipe can name as a network or a teacher: something that builds a module on its site."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Protocol

from torch import nn

from fewstep.config import OneOf

if TYPE_CHECKING:
    from fewstep.networks.specs import Site


class Spec(Protocol):
    """A frozen part that builds one role."""

    @property
    def name(self) -> str: ...
    def build(self, site: Site) -> nn.Module:
        """The module on the CPU, its weights from the site's seed."""
        ...


NetworkPart = Annotated[Spec, OneOf("network")]
TeacherPart = Annotated[Spec, OneOf("teacher")]
