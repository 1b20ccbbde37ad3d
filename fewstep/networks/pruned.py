"""A network with one block in the place of each run of blocks, as a recipe part (PPCL, arXiv 2511.16156)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fewstep.config import Absent, RecipeError, UserError, load_yaml, part
from fewstep.files import expanded
from fewstep.networks.adapters import plain_copy
from fewstep.networks.blocks import Intervals, holder, lists_of, prune, replaced
from fewstep.networks.parts import Site


@part("network", "pruned")
class Pruned:
    """A trainable copy of another role with one block in the place of each run of blocks (PPCL, arXiv 2511.16156)."""

    of: str = "teacher"
    """Role to copy, a network of blocks: dit, mlp with `residual`, a diffusers transformer."""
    intervals: tuple[tuple[NonNegativeInt, NonNegativeInt], ...]
    """First and last block of each run, from 0 over all lists of blocks; `fewstep probe RECIPE` proposes them."""
    run: str | None = None
    """A run by method contiguous whose trained blocks these intervals begin with; any subset of its intervals will do."""

    def __post_init__(self) -> None:
        if not self.intervals:
            raise ValueError("intervals is empty; name at least one, such as [[3, 5]]")

    def files(self) -> list[Path]:
        """The weights of `run`."""
        return [] if self.run is None else [weights_of(self.run)[0]]

    def build(self, site: Site) -> nn.Module:
        source = site.role(self.of, "pruned.of")
        if not list(source.parameters()):
            raise RecipeError(f"pruned.of: the {self.of} is analytic and has no blocks to prune")
        twin = plain_copy(source)
        try:
            lengths = {name: len(blocks) for name, blocks in lists_of(twin).items()}
            prune(twin, self.intervals)
        except ValueError as error:
            raise RecipeError(f"pruned.{'' if str(error).startswith('intervals') else 'of: '}{error}") from None
        if self.run is not None:
            self._take(twin, lengths, self.run)
        for p in twin.parameters():
            p.requires_grad_(True)
        return twin.eval()

    def _take(self, twin: nn.Module, lengths: dict[str, int], run: str) -> None:
        """The run's blocks for these intervals in place of the middle ones. UserError where it has none."""
        file, theirs = weights_of(run)
        if missing := [list(pair) for pair in self.intervals if pair not in theirs]:
            raise UserError(
                f"pruned.run {run}: was trained for the intervals {list(map(list, theirs))}, not {missing[0]}"
            )
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from None
        root = next(name for name, m in twin.named_modules() if m is holder(twin))
        for pair, block in zip(self.intervals, replaced(twin), strict=True):
            place, own = f"{root}.{place_of(pair, theirs, lengths)}", block.state_dict()
            mine = {k: tensors[f"{place}.{k}"] for k in own if f"{place}.{k}" in tensors}
            if any(k not in mine or mine[k].shape != own[k].shape for k in own):
                raise UserError(f"pruned.run {run}: {place} is no block of this network; it pruned another one")
            block.load_state_dict(mine)


def place_of(pair: tuple[int, int], intervals: Intervals, lengths: dict[str, int]) -> str:
    """LIST.NUMBER of the block for an interval in a network pruned by `intervals`; lengths: of the whole one's lists."""
    first = 0
    for name, length in lengths.items():
        if pair[0] < first + length:
            gone = sum(v - u for u, v in intervals if first <= u < pair[0])
            return f"{name}.{pair[0] - first - gone}"
        first += length
    raise ValueError(f"intervals: {list(pair)} lies beyond the blocks")


def weights_of(run: str) -> tuple[Path, list[tuple[int, int]]]:
    """(the weights of a run's product in its newest checkpoint, the intervals that it was pruned by).

    Raises:
        UserError: it is no such run; Absent for a folder that is not there.
    """
    root = expanded(run)
    if not root.is_dir():
        raise Absent(f"pruned.run {run}: no such folder")
    recipe: Any = load_yaml(root / "recipe.yaml", f"{run}/recipe.yaml").data
    student, train = recipe.get("student") or {}, recipe.get("train") or {}
    if student.get("name") != "pruned":
        raise UserError(f"pruned.run {run}: its student is not pruned; name a run by method contiguous")
    found = (p for p in (root / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))
    newest = max((p for p in found if (p / "state.json").is_file()), default=None)
    if newest is None:
        raise UserError(f"pruned.run {run}: has no checkpoint yet")
    averaged = train.get("product") == "ema" and train.get("ema")
    name = f"ema_{train['ema'][0]}" if averaged else "student"
    return newest / f"{name}.safetensors", [(u, v) for u, v in student["intervals"]]
