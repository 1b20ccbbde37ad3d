"""Where encoders of prompts and pictures compute: the accelerator where there is one, or as a command or a run says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

from fewstep.config import UserError

Told = Callable[[int, int], None]
"""Called with rows that are done and rows in all."""


@dataclass(frozen=True)
class _Place:
    device: torch.device | None = None
    told: Told | None = None


_ANYWHERE = _Place()
_PLACE: ContextVar[_Place] = ContextVar("place of encoders", default=_ANYWHERE)


@contextmanager
def encoding(device: torch.device | str | None = None, told: Told | None = None) -> Iterator[None]:
    """Within it encoders compute on `device`, and `told` hears how far they are; what is left out stays as it was.

    UserError for the name of a device that is not here.
    """
    place = _PLACE.get()
    if device is not None:
        place = replace(place, device=device if isinstance(device, torch.device) else device_named(device))
    mark = _PLACE.set(place if told is None else replace(place, told=told))
    try:
        yield
    finally:
        _PLACE.reset(mark)


def placed() -> torch.device:
    """The device that encoders compute on."""
    device = _PLACE.get().device
    if device is not None:
        return device
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def tell(done: int, count: int) -> None:
    """Say how far an encoder is, where somebody listens."""
    told = _PLACE.get().told
    if told is not None:
        told(done, count)


def device_named(name: str) -> torch.device:
    """A device that is here. UserError naming those that are."""
    here = ["cpu"]
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None:
        here += [f"{found.type}:{i}" for i in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (str(device) not in here and str(device) != (None if found is None else found.type)):
        raise UserError(f"device {name}: is not here; there is {', '.join(here)}")
    return device
