"""Checkpoints: safetensors per role, optimiser state, counters. Written aside, checked, then renamed into place."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.config import UserError
from fewstep.files import crc32_of, read_json
from fewstep.networks.adapters import load_own_state, own_state
from fewstep.train.parallel import (
    all_finite,
    gathered_optimizer,
    is_sharded,
    read_sharded,
    scattered_optimizer,
    write_sharded,
)

FORMAT = 3
"""Of state.json; another one is refused by name."""


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

    @classmethod
    def read(cls, held: Any) -> Progress:
        """From what `vars` gave, checked for every field and its type; ValueError names the one that is wrong."""
        names = [f.name for f in fields(cls)]
        if not isinstance(held, dict) or sorted(held) != sorted(names):
            raise ValueError(f"progress: expected the fields {', '.join(names)}")
        for name in names[:4]:
            if not _count(held[name]):
                raise ValueError(f"progress.{name}: expected a whole number from 0, got {held[name]!r}")
        checks = {
            "optim": lambda v: (
                isinstance(v, dict) and sorted(v) == ["skipped", "updates"] and all(map(_count, v.values()))
            ),
            "ema": _count,
            "meter": lambda v: isinstance(v, list) and all(isinstance(x, float | int) for x in v),
        }
        for name, good in checks.items():
            wrong = [k for k, v in held[name].items() if not good(v)] if isinstance(held[name], dict) else ["it"]
            if wrong:
                raise ValueError(f"progress.{name}: {wrong[0]} is not as fewstep writes it")
        return cls(**held)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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


def no_best(folder: Path) -> Path | None:
    """Of a folder whose checkpoints nobody ranks."""
    return None


def save_checkpoint(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    progress: Progress,
    keep: int,
    sharded: bool | None = None,
    sound: bool = True,
    origins: Mapping[str, str] | None = None,
    guard: Mapping[str, Any] | None = None,
    best: Callable[[Path], Path | None] = no_best,
) -> Path:
    """Write checkpoints/step-N, complete or not at all, then drop all but the newest `keep` and the best.

    sound: no update is being refused. Where it is False, or a weight is not finite, no sound checkpoint is dropped:
    a run that diverges does not push its last good state out.

    origins: digests of what the run stands on outside its folder, by name.

    guard: what the guard knows of this state (`fewstep.train.guard`); best: which checkpoint of a folder stays as well.

    sharded: None for one process that holds everything. Where networks are sharded every process calls this, one of
    them with True: the parts are joined, so that any number of processes can read the checkpoint.

    Raises UserError when the disk is full; nothing half-written is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / _name(progress.done)
    aside = folder / f".{final.name}.{os.getpid() if sharded is None else 'shared'}.tmp"
    sound = all_finite(t for m in modules.values() for t in own_state(m).values()) and sound
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
        told = {"sound": sound, "origins": dict(origins or {}), "progress": vars(progress), "files": manifest}
        state: dict[str, Any] = {"format": FORMAT, **told, **({"guard": dict(guard)} if guard else {})}
        (aside / "state.json").write_text(json.dumps({**state, "crc32": _checksum(state)}, indent=1))
        for p in (*aside.iterdir(), aside):
            _flush(p)
        if final.exists():
            # Renamed and not deleted: this is the one to go back to, and a kill within rmtree would leave none.
            set_aside(final)
        aside.rename(final)
        _flush(folder)  # the new name is on the disk before an older checkpoint goes, so keep = 1 always has one
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or _no_room(folder)
        reason = "the disk is full; free some space and continue with --resume" if full else str(error)
        raise UserError(f"{final}: the checkpoint could not be written: {reason}") from None
    best_one = best(folder)
    for old in _past(folder, keep):
        if old != best_one:
            set_aside(old)
    sweep(folder)
    return final


def set_aside(checkpoint: Path) -> None:
    """Take a checkpoint off the list; `sweep` deletes it.

    Renamed first: a kill within rmtree would leave a folder that no later pass recognises.
    """
    aside = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(checkpoint, aside)


def sweep(folder: Path) -> None:
    """Delete what was set aside, and what a kill left half-written."""
    for stale in folder.glob(".step-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)


def _past(folder: Path, keep: int) -> list[Path]:
    """Checkpoints to drop: all but the newest `keep`, and of these none that is sound while the newest is not."""
    every = checkpoints(folder)
    if is_sound(every[-1]):
        return every[:-keep]
    return [p for p in every[:-1] if not is_sound(p)]


def is_sound(path: Path) -> bool:
    """Whether a checkpoint was written while updates went through and with finite weights."""
    try:
        return bool(read_json(path / "state.json")["sound"])
    except (UserError, KeyError):
        return False


def _no_room(folder: Path) -> bool:
    """torch.save words a full disk as an assertion about positions in a file."""
    with suppress(OSError):
        return shutil.disk_usage(folder).free < 1 << 20
    return False


def _checksum(state: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


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


def _name(done: int) -> str:
    return f"step-{done:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if re.fullmatch(r"step-\d{8}", p.name) and (p / "state.json").is_file())
    return sorted(found)


def _read(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, whole and of this format."""
    file = path / "state.json"
    try:
        state = read_json(file)
    except UserError as error:
        raise UserError(f"{error}; {_remedy(path)}") from None
    if "progress" not in state:
        raise UserError(f"{file}: cannot be read: it is not what fewstep writes; {_remedy(path)}")
    if state.get("format") != FORMAT:
        raise UserError(
            f"{file}: has format {state.get('format')}, this fewstep reads {FORMAT}; continue the run with the "
            "version that began it"
        )
    if _checksum({k: v for k, v in state.items() if k != "crc32"}) != state.get("crc32"):
        raise UserError(f"{file}: cannot be read: its checksum differs, so it is damaged or was edited; {_remedy(path)}")
    return state


def read_origins(path: Path) -> dict[str, str]:
    """The digests that `save_checkpoint` was given."""
    held = _read(path).get("origins")
    if not isinstance(held, dict) or not all(isinstance(v, str) for v in held.values()):
        raise UserError(f"{path / 'state.json'}: cannot be read: origins: expected digests by name; {_remedy(path)}")
    return held


def read_guard(path: Path) -> dict[str, Any] | None:
    """What the guard has left in a checkpoint; None where it was off, or where it is not as fewstep writes it."""
    try:
        held = read_json(path / "state.json").get("guard")
    except UserError:
        return None
    kinds = {"stage": int, "calm": bool, "by": str, "score": int | float | None, "acts": list}
    if not isinstance(held, dict) or any(not isinstance(held.get(k, ...), t) for k, t in kinds.items()):
        return None
    whole = all(isinstance(act, dict) and isinstance(act.get("to"), int) for act in held["acts"])
    known = all(math.isfinite(v) for k in ("score", "least") if isinstance(v := held.get(k), int | float))
    return held if whole and known else None


def read_state(path: Path) -> tuple[Progress, dict[str, Any]]:
    """Progress and manifest of one checkpoint, every file checked for size and checksum."""
    state = _read(path)
    try:
        progress, manifest = Progress.read(state["progress"]), _manifest(state.get("files"))
        moments = {f"optim-{name}.pt" for name in progress.optim}
        if path.name != _name(progress.done) or moments != {n for n in manifest if n.startswith("optim-")}:
            raise ValueError("its counters do not belong to this checkpoint")
    except ValueError as error:
        raise UserError(f"{path / 'state.json'}: cannot be read: {error}; {_remedy(path)}") from None
    for name, (size, crc) in manifest.items():
        p = path / name
        if not p.is_file():
            raise UserError(f"{p}: is missing from the checkpoint; {_remedy(path)}")
        if p.stat().st_size != size or crc32_of(p) != crc:
            raise UserError(f"{p}: is damaged ({p.stat().st_size} of {size} bytes, checksum differs); {_remedy(path)}")
    return progress, manifest


def _manifest(held: Any) -> dict[str, list[int]]:
    whole = isinstance(held, dict) and held and all(re.fullmatch(r"[\w.+-]+", name) for name in held)
    if not whole or not all(isinstance(v, list) and len(v) == 2 and all(map(_count, v)) for v in held.values()):
        raise ValueError("files: expected the size and checksum of every file")
    return dict(held)


def _remedy(path: Path) -> str:
    if any(p.name < path.name for p in checkpoints(path.parent)):
        return f"delete {path.name} to use an older one"
    return "no older checkpoint was kept (train.keep), so the run has to start again with --force"


def load_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> Progress:
    """Restore modules and optimisers in place.

    Raises UserError naming the file for one that is missing, damaged or of another recipe; then some modules may hold
    the checkpoint's weights.
    """
    progress, manifest = read_state(path)
    for name in (*(f"{m}.safetensors" for m in modules), *(f"optim-{o}.pt" for o in optimizers)):
        if name not in manifest:
            raise UserError(f"{path / name}: is missing from the checkpoint; it belongs to another recipe")
    for name, module in modules.items():
        file, tensors = path / f"{name}.safetensors", own_state(module)
        if any(is_sharded(t) for t in tensors.values()):
            read_sharded(tensors, file)
        else:
            load_into(module, load_tensors(file), file)
    for name, optimizer in optimizers.items():
        file = path / f"optim-{name}.pt"
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        whole = _optimizer_state(file, optimizer, parameters)
        if name in progress.optim:
            _check_steps(file, whole, progress.optim[name]["updates"])
        optimizer.load_state_dict(scattered_optimizer(whole, parameters))
    return progress


def _optimizer_state(file: Path, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> dict[str, Any]:
    """An optimiser's state, checked against the parameters that it is for: their number, groups and sizes."""
    try:
        whole = torch.load(file, weights_only=True, map_location="cpu")
    except Exception:  # an unpickler fed with anything raises anything
        # Their own texts advise to load without `weights_only`, which runs whatever code a file brings.
        raise UserError(f"{file}: is not an optimiser's state as fewstep writes it; {_remedy(file.parent)}") from None
    try:
        sizes = [len(group["params"]) for group in whole["param_groups"]]
        fits = sizes == [len(group["params"]) for group in optimizer.param_groups]
        order = [i for group in whole["param_groups"] for i in group["params"]]
        own = dict(zip(order, parameters, strict=True)) if fits else {}
        for i, held in whole["state"].items():
            fits = fits and i in own and all(_fits(k, v, own[i]) for k, v in held.items())
    except (KeyError, TypeError, AttributeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"{file}: its moments do not fit this recipe's parameters; it belongs to another recipe")
    return dict(whole)


def _fits(name: str, value: Any, parameter: Tensor) -> bool:
    """Whether a moment may belong to a parameter: Adam's have its shape, others (factored, 8-bit) are no larger."""
    if name in ("exp_avg", "exp_avg_sq"):
        return isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
    if name == "step":
        return math.isfinite(float(value)) if not isinstance(value, Tensor) or value.numel() == 1 else False
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | str)
    return value.shape == parameter.shape or value.numel() <= max(256, math.prod(parameter.shape))


def _check_steps(file: Path, whole: dict[str, Any], updates: int) -> None:
    """The updates that an optimiser counted itself are those of state.json."""
    counted = {int(held["step"]) for held in whole["state"].values() if "step" in held}
    if counted and max(counted) != updates:
        raise UserError(f"{file}: counts {max(counted)} updates, state.json {updates}; {_remedy(file.parent)}")
