"""Who takes part in a run, by name, and who is trained at the moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fewstep.networks.adapters import own_parameters


class Roles(Mapping[str, nn.Module]):
    """An open mapping of role names to modules: teacher, student, critic, discriminator, ...

    Each module registers only the parameters it owns, so no tensor belongs to two roles. `roles.student` and
    `roles["student"]` are the same; a missing role raises AttributeError or KeyError with the names present.

    >>> roles = fewstep.Roles(student=torch.nn.Linear(2, 2), critic=torch.nn.Linear(2, 2))
    >>> list(roles), len(roles.parameters("student"))
    (['student', 'critic'], 2)
    >>> roles.train_only("critic")
    >>> roles.student.weight.requires_grad
    False
    """

    def __init__(self, **modules: nn.Module) -> None:
        self._modules = dict(modules)
        self._own = {name: own_parameters(m) for name, m in modules.items()}
        owners: dict[int, str] = {}
        for name, own in self._own.items():
            for p in own:
                if owners.setdefault(id(p), name) != name:
                    raise ValueError(f"roles {owners[id(p)]!r} and {name!r} own the same parameter")

    def __getitem__(self, name: str) -> nn.Module:
        try:
            return self._modules[name]
        except KeyError:
            raise KeyError(f"role {name!r} is not part of this run; it has {', '.join(self)}") from None

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name not in modules:
            raise AttributeError(f"role {name!r} is not part of this run; it has {', '.join(modules)}")
        return modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def with_state(self, state: nn.Module | None) -> Roles:
        """The same roles with a method's buffers as the role `state`, or without any."""
        others = {name: m for name, m in self._modules.items() if name != "state"}
        return Roles(**others, **({"state": state} if state is not None else {}))

    def parameters(self, *names: str) -> list[nn.Parameter]:
        """The trainable set of some roles, in order."""
        for name in names:
            self[name]  # raises for an unknown role, with the roles there are
        return [p for name in names for p in self._own[name]]

    def train_only(self, *names: str) -> None:
        """requires_grad for exactly these roles, set before the turn's graph is built."""
        for name, own in self._own.items():
            wanted = name in names
            for p in own:
                if p.requires_grad is not wanted and p.is_floating_point():
                    p.requires_grad_(wanted)
