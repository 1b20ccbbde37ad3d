"""One optimiser per set of parameters that steps together, with its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fewstep.config import UserError
from fewstep.networks.roles import Roles
from fewstep.recipe.schema import AdamW
from fewstep.train.parallel import is_sharded


class TurnOptimizer:
    """AdamW over the roles of a turn, one parameter group a role.

    `updates` counts optimiser steps, `skipped` the non-finite ones that were refused, `in_a_row` those since
    the last good one.
    """

    def __init__(self, roles: Roles, names: tuple[str, ...], specs: Mapping[str, AdamW], total: int) -> None:
        self.names = names
        self.specs = [specs[n] for n in names]
        self.total = total
        self.updates = 0
        self.skipped = 0
        self.in_a_row = 0
        self.parameters = roles.parameters(*names)
        groups = [
            {
                "params": roles.parameters(name),
                "lr": spec.lr,
                "betas": spec.betas,
                "eps": spec.eps,
                "weight_decay": spec.weight_decay,
            }
            for name, spec in zip(names, self.specs, strict=True)
        ]
        first = self.specs[0]  # a recipe gives roles that step together one rule and bits
        self.adam = _made(first.rule, first.bits, groups)
        self._options = [{k: v for k, v in g.items() if k != "params"} for g in self.adam.param_groups]

    def rate(self, spec: AdamW) -> float:
        """Learning rate of the next update."""
        lr = spec.lr
        if spec.warmup:
            lr *= min(1.0, (self.updates + 1) / spec.warmup)
        left = max(0.0, 1 - self.updates / max(self.total, 1))
        if spec.decay == "linear":
            lr *= left
        elif spec.decay == "cosine":
            lr *= 0.5 * (1 + math.cos(math.pi * (1 - left)))
        return lr

    def step(self) -> None:
        for group, spec in zip(self.adam.param_groups, self.specs, strict=True):
            group["lr"] = self.rate(spec)
        self.adam.step()
        self.updates += 1
        self.in_a_row = 0

    def use_own_options(self) -> None:
        """The recipe's betas, eps and weight decay, where loading a state has put back those it was saved with."""
        for group, options in zip(self.adam.param_groups, self._options, strict=True):
            group.update(options)

    def refuse(self) -> None:
        """Count an update that was not made."""
        self.skipped += 1
        self.in_a_row += 1

    def zero(self) -> None:
        self.adam.zero_grad(set_to_none=True)


def _made(rule: str, bits: int, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser of the groups; UserError where its package is missing."""
    if rule == "came":
        return _came(groups)
    if bits == 32:
        return torch.optim.AdamW(groups, fused=True)
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(
            "optim.bits: 8-bit moments need bitsandbytes, which is not installed: pip install bitsandbytes, or set "
            "bits to 32"
        ) from None
    return bitsandbytes.optim.AdamW8bit(groups)


def _came(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if any(is_sharded(p) for group in groups for p in group["params"]):
        raise UserError("optim.rule: came factors whole matrices, and train.parallel fsdp cuts them; use ddp or adamw")
    try:
        from pytorch_optimizer import CAME
    except ImportError:
        raise UserError(
            "optim.rule: came needs pytorch-optimizer, which is not installed: pip install pytorch-optimizer, or set "
            "rule to adamw"
        ) from None
    own = [{k: v for k, v in group.items() if k != "eps"} for group in groups]
    return CAME([{**group, "betas": (*group["betas"], 0.9999), "eps1": 1e-30, "eps2": 1e-16} for group in own])
