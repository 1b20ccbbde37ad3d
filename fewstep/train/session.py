"""What a run stands on: processes and their device, the data, and the roles with every switch of the recipe applied."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.config import UserError
from fewstep.data.base import Data
from fewstep.data.placed import encoding
from fewstep.kernels import check_device
from fewstep.networks.adapters import enable_checkpointing
from fewstep.networks.roles import Roles
from fewstep.recipe.schema import Recipe, Stage
from fewstep.train.build import build_roles, trained_roles
from fewstep.train.ema import EMA
from fewstep.train.launch import launched
from fewstep.train.log import check_trackers
from fewstep.train.origins import origins_of
from fewstep.train.parallel import is_sharded, shard
from fewstep.train.switches import Offload, compile_roles, use_channels_last


class Session:
    """Data, roles and averages of a recipe, placed and switched as its `train` says.

    UserError for a batch that the processes cannot share, and for attention that the device or a method cannot use.
    """

    def __init__(self, recipe: Recipe, *, cpu: bool = False) -> None:
        train = recipe.train
        self.recipe = recipe
        check_trackers(train.trackers)
        self.accelerator = _accelerator(cpu, train.precision)
        world = self.accelerator.num_processes
        if train.batch % (world * train.accumulate):
            raise UserError(
                f"train.batch {train.batch} must be divisible by processes x train.accumulate "
                f"= {world} x {train.accumulate}"
            )
        self._check_attention()
        with encoding(self.device):  # prompts, before a network is there
            self.data: Data = recipe.data.open()
        for opened in dict.fromkeys(part for stage in recipe.stages() for part in stage.method.needs().parts):
            opened.open(tuple(self.data.shape))
        self.roles: Roles = build_roles(recipe, self.data)
        # A teacher without gradients keeps no activations, so there is nothing to save.
        through_teacher = any(stage.method.needs().teacher_grad for stage in recipe.stages())
        for name, module in self.roles.items():
            module.to(self.device)
            if train.checkpointing and (name != "teacher" or through_teacher):
                enable_checkpointing(module)
        self.ema = [EMA(self.roles.student, decay, train.ema_warmup) for decay in train.ema]
        self.sharded = train.parallel == "fsdp" and world > 1
        if self.sharded:
            shard([*self.roles.values(), *(e.module for e in self.ema)], self.device)
            self.roles = Roles(**dict(self.roles))
        if train.channels_last:
            use_channels_last([*self.roles.values(), *(e.module for e in self.ema)])
        compile_roles(self.roles, train.compile)
        self.offload = Offload(self.roles, self.device) if train.offload else None

    def _check_attention(self) -> None:
        wanted = self.recipe.train.attention
        try:
            check_device(wanted, self.device)
        except ValueError as error:
            raise UserError(f"train.attention: {error}") from None
        if wanted == "xformers" and any(s.method.needs().jvp for s in self.recipe.stages()):
            raise UserError("train.attention: 'xformers' has no tangent, which this method needs; use auto")

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def product(self) -> nn.Module:
        """The weights that are sampled, evaluated and exported."""
        use_ema = self.recipe.train.product == "ema" and self.ema
        return self.ema[0].module if use_ema else self.roles.student

    @cached_property
    def origins(self) -> dict[str, str]:
        """Digests of the files that it stands on, as they were when they were first asked for."""
        return origins_of(self.recipe)

    def modules(self) -> dict[str, nn.Module]:
        """Everything with weights that a checkpoint holds."""
        names = [*trained_roles(self.recipe), *(["state"] if "state" in self.roles else [])]
        return {name: self.roles[name] for name in names} | {ema.name: ema.module for ema in self.ema}

    def make_state(self, stage: Stage) -> None:
        """The method's own buffers as the role `state`, in place of those of the stage before."""
        make = stage.method.needs().state
        self.roles = self.roles.with_state(make(self.data).to(self.device) if make else None)

    def batch(self, stage: Stage, place: tuple[int, ...], micro: int) -> Batch:
        """The micro-batch of this process: rows of one global batch that does not depend on how it is split.

        place: what the random numbers of this update are for: stage, step, turn, repeat.
        """
        train = self.recipe.train
        share = train.batch // self.accelerator.num_processes
        size = share // train.accumulate
        first = self.accelerator.process_index * share + micro * size
        index = torch.arange(first, first + size, device=self.device)
        key = fold(train.seed, "train", *place)
        needs = stage.method.needs()
        source = Draws(fold(key, "data"), index)
        x0, cond = self.data.batch(source) if needs.data else (None, self.data.conditions(source))
        return Batch(Draws(key, index), self.data.shape, x0, cond, self.data.null(cond), place[1])

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Average gradients over processes in one flat buffer.

        Explicit rather than DistributedDataParallel: a turn may call one network several times, or leave a
        head unused, and accelerate's accumulation keeps one counter for all roles. Sharded ones are averages already.
        """
        parameters = [p for p in parameters if not is_sharded(p)]
        if self.accelerator.num_processes == 1 or not parameters:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
        flat = self.accelerator.reduce(flat, reduction="mean")
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def means(self, values: dict[str, list[float]]) -> dict[str, list[float]]:
        """The mean over processes of each reading."""
        if self.accelerator.num_processes == 1 or not values:
            return values
        flat = torch.tensor([v for vs in values.values() for v in vs], dtype=torch.float64, device=self.device)
        mean: Any = self.accelerator.reduce(flat, reduction="mean")
        parts = mean.split([len(vs) for vs in values.values()])
        return {k: part.tolist() for k, part in zip(values, parts, strict=True)}

    def any(self, flag: bool) -> bool:
        """True on every process once it is on one: a signal reaches them at different steps."""
        if self.accelerator.num_processes == 1:
            return flag
        asked: Any = self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum")
        return bool(asked > 0)


def _accelerator(cpu: bool, precision: str) -> Accelerator:
    """The group of processes; UserError where a launcher started several and they would train apart."""
    count = launched()
    if count == 1 or "MASTER_ADDR" in os.environ:
        # Without `cpu` accelerate forms no group on a machine that has no accelerator.
        alone = cpu or not torch.accelerator.is_available()
        made = Accelerator(cpu=alone, mixed_precision="bf16" if precision == "bf16" else "no")
        if made.num_processes == count:
            return made
    raise UserError(
        f"WORLD_SIZE says that {count} processes were started, but they form no group, so each would train alone in "
        "one directory; launch them with `python -m torch.distributed.run` or `accelerate launch`, or unset WORLD_SIZE"
    )
