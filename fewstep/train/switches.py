"""Memory and speed switches of a run that change no result: layout, compilation, idle roles in main memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fewstep.config import UserError
from fewstep.networks.adapters import Adapted
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.roles import Roles

BACKEND = "inductor"
"""Of torch.compile."""


def use_channels_last(modules: Iterable[nn.Module]) -> None:
    """Store convolution weights with the channels innermost, which is how tensor cores read them."""
    for module in modules:
        for p in module.parameters():
            if p.ndim == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)


def compile_roles(roles: Roles, names: Iterable[str]) -> None:
    """torch.compile the networks of some roles in place; names in checkpoints stay. Raises UserError.

    Of a wrapped diffusers model the model itself: the wrapper's hooks for taps would be compiled anew at each call. Of a
    ControlNet the ControlNet; the UNet beside it is compiled under the name of its own role.
    """
    for name in names:
        if name not in roles:
            raise UserError(f"train.compile: role {name!r} is not in this recipe; it has {', '.join(roles)}")
        module = roles[name]
        if isinstance(module, Adapted):
            raise UserError(
                f"train.compile: the {name} is an adapter; name the role that holds the weights, whose compiled network "
                "serves all adapters"
            )
        nets: list[Any] = networks(module)
        if not nets:
            raise UserError(f"train.compile: the {name} is a {type(module).__name__}, which has no network")
        for net in nets:
            inner = net.controlnet if hasattr(net, "with_own_base") else getattr(net, "model", net)
            inner.compile(backend=BACKEND)


def networks(module: nn.Module) -> list[nn.Module]:
    """The networks of all denoisers inside a role; none for heads and adapters."""
    return [m.net for m in module.modules() if isinstance(m, Denoiser)]


def move(module: nn.Module, device: torch.device) -> None:
    """Move weights in place; parameters keep their identity, so optimisers and averages follow."""
    module.to(device)


class Offload:
    """Keeps roles that a turn does not call, and the moments of optimisers that do not step, in main memory.

    What a turn calls is learned as it runs: a role that is called while it is away comes back at once, and stays away
    from the next such turn on if it was not called. The student never leaves, its averages are taken on the device.
    An adapter's weights go with those of the role that carries them.
    """

    def __init__(self, roles: Roles, device: torch.device) -> None:
        self.roles, self.device = roles, device
        self.away: set[str] = set()
        self.called: dict[tuple[str, ...], set[str]] = {}
        self._turn: tuple[str, ...] = ()
        self._homes = {
            name: next((n for n, r in roles.items() if isinstance(m, Adapted) and r is m.base), name)
            for name, m in roles.items()
        }
        for name, module in roles.items():
            if not isinstance(module, Adapted):
                for net in networks(module) or [module]:
                    net.register_forward_pre_hook(self._calling(name))

    def _calling(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            self.called.setdefault(self._turn, set()).add(name)
            self._bring(name)

        return hook

    def _bring(self, name: str) -> None:
        if name in self.away:
            move(self.roles[name], self.device)
            self.away.discard(name)

    def begin(self, updates: tuple[str, ...], optimizers: Mapping[str, Any]) -> None:
        """Before a turn that updates these roles: send away what it will not call, bring what it steps."""
        self._turn = updates
        here = {self._homes[n] for n in (*updates, "student")}
        known = self.called.get(updates)
        for name in self.roles:
            home = self._homes[name]
            if known is not None and home == name and name not in here | known and name not in self.away:
                move(self.roles[name], torch.device("cpu"))
                self.away.add(name)
        for name in here:
            self._bring(name)
        for optimizer in optimizers.values():
            target = self.device if optimizer.names == updates else torch.device("cpu")
            for state in optimizer.adam.state.values():
                for key, value in state.items():
                    if isinstance(value, torch.Tensor) and value.ndim:
                        state[key] = value.to(target)
