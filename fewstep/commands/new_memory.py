"""`fewstep new --memory`: the first way of training, from whole networks to LoRA sets on a bf16 base, whose plan fits."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.commands.new_lines import Lines, power_below, rendered
from fewstep.commands.plan import plan
from fewstep.commands.plan_configs import Sizes
from fewstep.config import UserError
from fewstep.recipe.store import load

GIB = 2**30
SHARE = 0.9
"""Of the memory that tensors may take; the rest is for workspaces of libraries and what an allocator leaves unused."""
BATCH = 32
"""Of the recipes that are written."""


@dataclass(frozen=True)
class Fit:
    """How a recipe is made to fit: LoRA sets or whole networks, the teacher's dtype, idle roles away, micro-batch."""

    lora: bool
    dtype: str = "fp32"
    offload: bool = False
    micro: int = 1
    source: str = ""
    """What the lines say of it."""

    def least(self, weights: int) -> int:
        """Bytes that so many weights take at least, before any activation."""
        own = weights * (4 if self.dtype == "fp32" else 2)
        # Two networks with Adam's moments and the gradients of one; offloaded, one with all of it.
        return own if self.lora else 16 * weights if self.offload else own + 28 * weights

    def __str__(self) -> str:
        kind = "LoRA sets on one frozen base" if self.lora else "whole networks"
        return f"{kind}, teacher in {self.dtype}" + (", idle roles in main memory" if self.offload else "")


WHOLE = (Fit(False), Fit(False, "bf16"), Fit(False, "bf16", offload=True))
SETS = (Fit(True), Fit(True, "bf16"))


def memory_of(text: str) -> int:
    """Bytes of `--memory 24G`. UserError for what is no such size."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d+)?) ?([MGT])i?B?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise UserError(f"--memory {text}: expected the memory of one device, such as 24G")
    return int(float(found[1]) * 2 ** {"M": 20, "G": 30, "T": 40}[found[2].upper()])


def fitted(memory: str, lora: bool, net: Any, lines: Callable[[Fit], Lines]) -> Lines:
    """The lines of the first way whose plan from configs leaves a tenth of a device's memory free.

    Args:
        memory: as `--memory` has it.
        lora: only LoRA sets are asked for.
        net: the family's network without weights.
        lines: the recipe of a way.

    Raises UserError, with the smallest plan, where none fits.
    """
    room = SHARE * memory_of(memory)
    weights = sum(p.numel() for p in net.parameters())
    least, how = float("inf"), ""

    def total(way: Fit, micro: int) -> int:
        return int(_planned(lines(replace(way, micro=micro, source="to be planned"))).total)

    for way in (*(() if lora else WHOLE), *SETS):
        if way.least(weights) > room:
            if way.least(weights) < least:
                kept = "its weights" if way.lora else "weights, gradients and moments"
                least, how = way.least(weights), f"{way}: {kept} alone take"
            continue
        known = {1: total(way, 1)}
        if known[1] < least:
            least, how = known[1], f"{way}, one sample at a time, by `fewstep plan` still takes"
        if known[1] > room:
            continue
        # The second sample tells what each further one needs; gradients are there once, whatever the samples.
        known[2] = total(way, 2)
        micro = min(BATCH, max(2, power_below(1 + int((room - known[1]) // max(known[2] - known[1], 1)))))
        while micro not in known or known[micro] > room:
            if micro in known:
                micro //= 2
            else:
                known[micro] = total(way, micro)
        said = f"--memory {memory}: {known[micro] / GIB:.3g} GiB by `fewstep plan --weights none`, an estimate"
        return lines(replace(way, micro=micro, source=said))
    raise UserError(
        f"--memory {memory}: {how} {least / GIB:.3g} GiB, and a tenth of the memory is left for libraries; give a larger "
        "device, or a teacher with fewer weights"
    )


def _planned(lines: Lines) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "new.yaml"
        file.write_text(rendered(lines))
        return plan(load(str(file)), ways=False, sizes=Sizes())
