"""Checkpoints: safetensors per role, optimiser state, counters. Written aside, checked, then renamed into place."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.config import UserError
from fewstep.files import crc32_of
from fewstep.networks.adapters import load_own_state, own_state
from fewstep.train.parallel import (
    gathered_optimizer,
    is_sharded,
    read_sharded,
    scattered_optimizer,
    write_sharded,
)


@dataclass
class Progress:
    """Where a run stands. `stage` and `step` name the next step to do; step counts within the stage."""

    stage: int = 0
    step: int = 0
    done: int = 0
    """Steps done over all stages."""
    skipped: int = 0
    optim: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per turn: updates and skipped."""
    ema: dict[str, int] = field(default_factory=dict)
    """Updates of each average."""
    meter: dict[str, list[float]] = field(default_factory=dict)
    """Readings since the last log record."""


def _flush(path: Path) -> None:
    """Make a file or folder outlive a loss of power."""
    # Not every system can open or flush a folder; its files are safe then, but not the order of what happens to it.
    with suppress(OSError) if path.is_dir() else nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file of contiguous CPU copies."""
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; UserError names it when it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict strictly; UserError says that the checkpoint belongs to another recipe."""
    try:
        load_own_state(module, tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if len(str(error).splitlines()) > 1 else str(error)
        raise UserError(f"{path}: does not fit this recipe's network: {first}") from None


def save_checkpoint(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    progress: Progress,
    keep: int,
    sharded: bool | None = None,
) -> Path:
    """Write checkpoints/step-N, complete or not at all, then drop all but the newest `keep`.

    sharded: None for one process that holds everything. Where networks are sharded every process calls this, one of
    them with True: the parts are joined, so that any number of processes can read the checkpoint.

    Raises UserError when the disk is full; nothing half-written is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{progress.done:08d}"
    aside = folder / f".{final.name}.{os.getpid() if sharded is None else 'shared'}.tmp"
    if sharded is not False:
        shutil.rmtree(aside, ignore_errors=True)
    try:
        if sharded is not False:
            aside.mkdir()
        if sharded is not None:
            _write_parts(aside, modules, optimizers, sharded)
            if not sharded:
                return final
        else:
            for name, module in modules.items():
                save_tensors(own_state(module), aside / f"{name}.safetensors")
            for name, optimizer in optimizers.items():
                torch.save(optimizer.state_dict(), aside / f"optim-{name}.pt")
        manifest = {p.name: [p.stat().st_size, crc32_of(p)] for p in sorted(aside.iterdir())}
        state = {"progress": progress.__dict__, "files": manifest}
        (aside / "state.json").write_text(json.dumps(state, indent=1))
        for p in (*aside.iterdir(), aside):
            _flush(p)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _flush(folder)  # the new name is on the disk before an older checkpoint goes, so keep = 1 always has one
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full; free some space and continue with --resume" if full else str(error)
        raise UserError(f"{final}: the checkpoint could not be written: {reason}") from None
    for old in checkpoints(folder)[:-keep]:
        # Renamed first: a kill within rmtree would leave a folder that no later pass recognises.
        os.rename(old, folder / f".{old.name}.old.tmp")
    for stale in folder.glob(".step-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    return final


def _write_parts(
    aside: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer], main: bool
) -> None:
    torch.distributed.barrier()  # the folder is there
    for name, module in modules.items():
        tensors = own_state(module)
        if any(is_sharded(t) for t in tensors.values()):
            write_sharded(tensors, aside / f"{name}.safetensors", main)
        elif main:
            save_tensors(tensors, aside / f"{name}.safetensors")
    for name, optimizer in optimizers.items():
        whole = gathered_optimizer(optimizer.state_dict())
        if main:
            torch.save(whole, aside / f"optim-{name}.pt")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if re.fullmatch(r"step-\d{8}", p.name) and (p / "state.json").is_file())
    return sorted(found)


def read_state(path: Path) -> tuple[Progress, dict[str, Any]]:
    """Progress and manifest of one checkpoint, every file checked for size and checksum."""
    try:
        state = json.loads((path / "state.json").read_text())
        progress, manifest = Progress(**state["progress"]), state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'state.json'}: cannot be read: {error}; {_remedy(path)}") from None
    for name, (size, crc) in manifest.items():
        p = path / name
        if not p.is_file():
            raise UserError(f"{p}: is missing from the checkpoint; {_remedy(path)}")
        if p.stat().st_size != size or crc32_of(p) != crc:
            raise UserError(f"{p}: is damaged ({p.stat().st_size} of {size} bytes, checksum differs); {_remedy(path)}")
    return progress, manifest


def _remedy(path: Path) -> str:
    if any(p.name < path.name for p in checkpoints(path.parent)):
        return f"delete {path.name} to use an older one"
    return "no older checkpoint was kept (train.keep), so the run has to start again with --force"


def load_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> Progress:
    """Restore modules and optimisers in place."""
    progress, _ = read_state(path)
    for name, module in modules.items():
        file, tensors = path / f"{name}.safetensors", own_state(module)
        if any(is_sharded(t) for t in tensors.values()):
            read_sharded(tensors, file)
        else:
            load_into(module, load_tensors(file), file)
    for name, optimizer in optimizers.items():
        file = path / f"optim-{name}.pt"
        if not file.is_file():
            raise UserError(f"{file}: is missing from the checkpoint; it belongs to another recipe")
        whole = torch.load(file, weights_only=True, map_location="cpu")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.load_state_dict(scattered_optimizer(whole, parameters))
    return progress
