"""A method trained by its turns without a trainer, each set of roles by an Adam of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.networks.roles import Roles


def turned(
    method: Any, roles: Roles, steps: int, batch: Callable[[int, int, int], Batch]
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses and readings of every update in order, and the weights of all roles after `steps` steps.

    batch: makes that of (step, number of the turn in it, repeat).
    """
    adam: dict[tuple[str, ...], Any] = {}
    seen: list[dict[str, float]] = []
    for step in range(steps):
        for number, turn in enumerate(method.turns(roles, step)):
            roles.train_only(*turn.updates)
            weights = [p for name in turn.updates for p in roles.parameters(name)]
            optimizer = adam.setdefault(turn.updates, torch.optim.Adam(weights, lr=1e-2))
            for repeat in range(turn.times):
                optimizer.zero_grad()
                for losses in turn.losses(batch(step, number, repeat)):
                    losses.total().backward()
                    seen.append({k: float(v.detach()) for k, v in {**losses, **losses.log}.items()})
                optimizer.step()
    return seen, {f"{r}.{k}": v.clone() for r, m in roles.items() for k, v in m.state_dict().items()}
