"""What an export is made of, and the one way it gets onto the disk: aside, opened again, compared, then in place."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep.algebra.sampling import Sampler
from fewstep.config import UserError
from fewstep.export.stock import difference
from fewstep.files import parse_json, whole_folder
from fewstep.networks.weights import not_finite
from fewstep.train.note import read_note

PARITY = 1e-4
"""Largest allowed `difference` between an export and fewstep.

In float32 most stay below 4e-6. EDMEulerScheduler does not: it has x0 by x - sigma (x - x0) / sigma, which rounds at the
size of x, several hundred at sigma = 80; 8e-5 was measured.
"""

HALF_PARITY = 1e-2
"""The same for a network written in float16 against its float32 weights.

Rounding a weight moves it by up to 4.9e-4 of itself; of the shipped emoji teacher's x0 that left 2.0e-3.
"""

KIND = "export"
"""What the mark of an export's folder says."""

NOTED = ("_name_or_path", "name_or_path")
"""Keys of a config under which a folder may stand, or the hub's name, which stays."""

Rows = Sequence[tuple[str, str]]
"""Measured (name, value) rows of a model card."""


class ExportRefused(UserError):
    """What cannot be exported; the message says why, and what to do instead, for the caller to make a sentence of."""


def halved(model: nn.Module) -> nn.Module:
    """A copy on the CPU in float16, as teachers are written; ExportRefused for weights that it cannot hold."""
    out = copy.deepcopy(model).cpu().eval()
    for p in out.parameters():
        p.data = p.data.half()
    if bad := not_finite(out.named_parameters()):
        raise ExportRefused(
            f"float16, in which teachers are written, cannot hold {bad}: it ends at 65504; train with a lower rate"
        )
    return out


@dataclass(frozen=True)
class Stock:
    """A stock scheduler by its class and config, and how a pipeline that has it is called.

    name: the class in diffusers. config: its constructor's arguments. call: keyword arguments of the pipeline that make
    it visit the trained levels. sampler: the one whose samples the pipeline draws, with levels on the grid that the
    written scheduler config describes. input_scale: factor for the first convolution's weights where the scheduler starts
    from another scale than the sampler; one step only. levels: what the pipeline hands to the scheduler's `set_timesteps`
    where that is not its call.
    """

    name: str
    config: dict[str, Any]
    call: dict[str, Any]
    sampler: Sampler
    input_scale: float = 1.0
    levels: dict[str, Any] | None = None

    @property
    def visits(self) -> dict[str, Any]:
        """The arguments of `set_timesteps`."""
        return self.call if self.levels is None else self.levels

    @cached_property
    def scheduler(self) -> Any:
        """The scheduler itself; the first look imports diffusers."""
        import diffusers

        return getattr(diffusers, self.name)(**self.config)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an export is made of, decided without reading a weight, so that `forecast` asks the same with none.

    usage: the lines of code that run it, given the folder as they name it. card: README.md from these lines, the
    parity and measured rows. note: (name, text) of the file that marks the folder as an export. save: writes networks
    and scheduler into an empty folder. pairs: opens that folder again and gives (fewstep's tensor, the folder's), to
    be compared, to `limit`. scheduler: class of the stock scheduler, "" where there is none or each network has its own.
    members: further exports, by subfolder. differs: the words for a comparison that fails.
    """

    usage: Callable[[str], str]
    card: Callable[[str, float, Rows], str]
    note: tuple[str, str]
    save: Callable[[Path], None] = lambda folder: None
    pairs: Callable[[Path], Iterator[tuple[Tensor, Tensor]]] = lambda folder: iter(())
    limit: float = PARITY
    scheduler: str = ""
    members: Mapping[str, Parts] = field(default_factory=dict)
    differs: str = "the pipeline differs from fewstep's sampler"


@dataclass(frozen=True)
class Exported:
    """Where an export went, how to call it and how well it agrees; 0 where there is nothing to compare."""

    folder: Path
    usage: str
    parity: float


def write_checked(parts: Parts, folder: Path, *, results: Rows = (), shown: str | None = None) -> Exported:
    """Write an export and compare it with fewstep, or leave nothing.

    Args:
        parts: what to write.
        folder: must not exist, be empty or hold an earlier export, which then stays until the new one is complete.
        results: measured rows for the model card.
        shown: the folder as the usage lines name it.

    Raises ExportRefused when what was written is not finite or differs from fewstep by more than its limit, UserError
    when the folder is something else's or cannot be written.
    """
    place = shown or str(folder)
    with _aside_of(folder) as aside:
        members = [
            write_checked(member, aside / name, shown=f"{place}/{name}").parity for name, member in parts.members.items()
        ]
        parts.save(aside)
        forget_places(aside)
        name, text = parts.note
        (aside / name).write_text(text)
        read_note(aside)  # as whoever opens it will
        parity = max([0.0, *members, _largest(parts, aside)])
        usage = parts.usage(place)
        (aside / "README.md").write_text(parts.card(usage, parity, results))
    return Exported(folder, usage, parity)


def forget_places(folder: Path) -> None:
    """Drop the folders of this machine, which diffusers and transformers note in the configs of what they have opened."""

    def kept(held: Any) -> Any:
        if not isinstance(held, dict):
            return held
        return {k: kept(v) for k, v in held.items() if not (k in NOTED and isinstance(v, str) and is_place(v))}

    for file in (f for f in folder.rglob("*.json") if f.name.endswith(("config.json", "index.json"))):
        try:
            held = parse_json(file.read_bytes(), file)
        except UserError:  # of a folder that was copied: no config, so nothing is noted
            continue
        if (left := kept(held)) != held:
            file.unlink()  # it may be read-only, as where it was copied from
            file.write_text(json.dumps(left, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_place(name: str) -> bool:
    """Whether it is a folder and not the hub's name of a model."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or (name.count("/") != 1 and Path(name).exists())


@torch.no_grad()
def _largest(parts: Parts, folder: Path) -> float:
    largest = 0.0
    for ours, theirs in parts.pairs(folder):
        gap = difference(ours, theirs)
        if not gap <= parts.limit:  # NaN too
            raise ExportRefused(f"{parts.differs} by {gap:.2e} > {parts.limit:.0e}")
        largest = max(largest, gap)
    return largest


@contextmanager
def _aside_of(folder: Path) -> Iterator[Path]:
    """`whole_folder` for an export."""
    try:
        with whole_folder(folder, KIND, "export") as aside:
            yield aside
    except SafetensorError as error:
        raise UserError(f"{folder}: the export could not be written: {error}") from None
