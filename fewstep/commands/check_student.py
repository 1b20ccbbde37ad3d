"""`fewstep check-student`: does the installed diffusers call an export at the noise levels that it was trained at?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from fewstep.commands.hushed import hushed
from fewstep.config import UserError
from fewstep.export.card import as_code
from fewstep.export.image_to_image import run_from
from fewstep.export.levels import Levels, levels_set
from fewstep.export.picture import whole_model
from fewstep.export.stock import open_stock, run_stock
from fewstep.files import read_json
from fewstep.networks.controlnet import Controlled
from fewstep.networks.diffusers import wrapper_of
from fewstep.networks.folder import Folder, read_folder
from fewstep.networks.unet2d import UNet2D
from fewstep.train.note import Note, read_note

CLOSE = 2e-6
"""Largest difference of sigma / (alpha + sigma): float32 schedulers hold flows' levels to 6e-8, tables to 1e-6."""
_SIZES = ("height", "width", "num_frames", "frames")


@dataclass(frozen=True)
class StudentReport:
    """The levels of an export's steps as trained and as its pipeline calls the network, sigma / (alpha + sigma)."""

    path: str
    pipeline: str
    call: Mapping[str, Any]
    trained: tuple[float, ...]
    visited: tuple[float, ...]
    calls: int
    """Of the network, in all."""
    failed: str = ""
    """What the pipeline said in place of a sample."""
    written: str = "?"
    """The diffusers that the export was written with."""

    @property
    def gap(self) -> float:
        """Between a trained level and the visited one; infinite for another number of them."""
        pairs = zip(self.trained, self.visited, strict=False)
        return max((abs(a - b) for a, b in pairs), default=math.inf) if self.as_many else math.inf

    @property
    def as_many(self) -> bool:
        return len(self.trained) == len(self.visited) == self.calls

    @property
    def ok(self) -> bool:
        return not self.failed and self.gap <= CLOSE

    def verdict(self) -> str:
        """One or two sentences, with the remedy where there is one."""
        now = version("diffusers")
        if self.ok:
            steps = f"{self.calls} step{'s' * (self.calls > 1)}"
            return f"{self.path}: {self.pipeline} of diffusers {now} calls the network at the trained levels, {steps}."
        again = (
            f"export the run again with this diffusers (`fewstep export RUN --out {self.path} --force`); the export was "
            f"written with diffusers {self.written}, and a scheduler_config.json or model_index.json that was changed "
            "since then can be put back"
        )
        if self.failed:
            return f"{self.path}: {self.pipeline} of diffusers {now} cannot draw from it: {self.failed}. Remedy: {again}."
        how = f"up to {self.gap:.2g} apart" if self.as_many else f"in {self.calls} calls, not {len(self.trained)}"
        return (
            f"{self.path}: {self.pipeline} of diffusers {now} calls the network at other levels than the trained ones, "
            f"{how}; a student answers well only at those. Remedy: {again}."
        )

    def text(self) -> str:
        """The lines that the command prints."""
        rows = [("step", "trained", "diffusers"), *self._rows()]
        wide = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "noise levels, sigma / alpha:",
            *("  ".join(c.rjust(w) for c, w in zip(r, wide, strict=True)) for r in rows),
        ]
        called = f"as called by pipe(..., {as_code(self.call)})"
        return "\n".join([*lines, called, *NOT_CHECKED, "", self.verdict()])

    def _rows(self) -> list[tuple[str, str, str]]:
        count = max(len(self.trained), len(self.visited))
        columns = [[*map(_ratio, shares), *["-"] * (count - len(shares))] for shares in (self.trained, self.visited)]
        return [(str(i + 1), a, b) for i, (a, b) in enumerate(zip(*columns, strict=True))]


NOT_CHECKED = (
    "not checked: the weights (the export compared them with fewstep's sampler, see its README.md), guidance or steps",
    "that a caller sets otherwise, and programs other than diffusers (ComfyUI and the like have schedulers of their own)",
)


def _ratio(share: float) -> str:
    return "pure noise" if share >= 1 else f"{share / (1 - share):.6g}"


def check_student(path: str) -> StudentReport:
    """Call an export's own pipeline as its card does, the network stood in for, and look where it is called.

    The network is built from its config without weights; scheduler, VAE and the pipeline's code are the real ones.

    Raises UserError for a folder that is no export of a student, with what it is where that can be told.
    """
    note, folder = read_student(path)
    assert note.levels is not None
    told = read_json(folder.scheduler_file).get("_diffusers_version", "?")
    name = str(folder.index.get("_class_name"))
    with hushed():
        try:
            visited, calls = _visits(folder, note)
        except (AttributeError, ImportError, IndexError, KeyError, OSError, TypeError, ValueError, RuntimeError) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return StudentReport(path, name, note.call, note.levels, (), 0, said, str(told))
    return StudentReport(path, name, note.call, note.levels, visited.shares(), calls, "", str(told))


def read_student(path: str) -> tuple[Note, Folder]:
    """The note and the folder of an exported student; UserError for others."""
    from fewstep.networks.folder import resolve

    root = resolve(path)
    what = f"student {path}"
    if not root.is_dir():
        raise UserError(f"{what}: no such folder; give one that `fewstep export` wrote, such as runs/NAME/export")
    if (root / "checkpoints").is_dir() or (root / "recipe.yaml").is_file():
        raise UserError(f"{what}: is a run; give its export, {path}/export, or make one with `fewstep export {path}`")
    for name, says in (
        ("classes.json", "holds a pipeline for each group of classes; check its folders student-0, student-1, ..."),
        ("steps.json", "holds experts and, in README.md, the loop that draws; no scheduler of diffusers does"),
        ("pytorch_lora_weights.safetensors", "is an adapter, which runs in a pipeline and scheduler of your own; "
         "check a merged export, `fewstep export RUN` without --lora"),
    ):  # fmt: skip
        if (root / name).is_file():
            raise UserError(f"{what}: {says}")
    note = read_note(root)
    if note.sampler is None:
        known = "is a teacher; `fewstep check-teacher` reads those" if (root / "fewstep.json").is_file() else (
            "has no fewstep.json, so nobody says at which levels it was trained; its author's card may"
        )  # fmt: skip
        raise UserError(f"{what}: {known}")
    if note.levels is None:
        raise UserError(f"{what}: fewstep.json does not hold the trained levels; export the run again")
    return note, read_folder(path)


def _visits(folder: Folder, note: Note) -> tuple[Levels, int]:
    """(levels that the pipeline's scheduler stood at, calls of the network) of one sample drawn as the note says."""
    cls = wrapper_of(folder)
    latents = folder.latents
    net: Any = cls(_outlined(folder), note.classes or 0, pixels=latents.pixels if latents else 1)
    model: Any = whole_model(net)  # of a picture the pipeline counts the channels too
    _hollow(net.model)
    _hollow(model)
    pipe = open_stock(folder.root, **{folder.component: model})
    if getattr(pipe, "controlnet", None) is not None:
        net = Controlled(net, pipe.controlnet)  # which asks for a picture
    size = note.size or net.sample_size()
    start = torch.zeros(1, net.channels(), *size)
    calls = 0

    class Answer(tuple[Any, ...]):
        """Read as a tuple by most pipelines and by name by some."""

        @property
        def sample(self) -> Any:
            return self[0]

    def forward(*_: Any, **__: Any) -> Answer:
        nonlocal calls
        calls += 1
        return Answer((net.own(start.clone()),))

    model.forward = forward
    if isinstance(net, UNet2D):
        classes = {"class_labels": [0]} if note.classes else {}
        pipe(batch_size=1, output_type="np", **note.call, **classes)
    else:
        told = {k: v for k, v in note.settings.items() if k not in _SIZES}
        cond = net.example(1, torch.Generator().manual_seed(0))
        if isinstance(net, Controlled):
            cond |= net.picture_at(size, 1, torch.Generator().manual_seed(0))
        draw = run_from if "strength" in note.call else run_stock
        draw(pipe, net, start, cond, {**told, **note.call})
    return levels_set(pipe.scheduler), calls


def _outlined(folder: Folder) -> Any:
    """The network of a folder by its config, on the meta device, where a wrapper still parts and joins its layers."""
    import diffusers
    from accelerate import init_empty_weights

    cls: Any = getattr(diffusers, folder.kind, None)
    if not hasattr(cls, "from_config"):
        raise UserError(f"{folder.root / folder.component / 'config.json'}: diffusers has no class {folder.kind!r}")
    with init_empty_weights():
        model: Any = cls.from_config(dict(folder.config))
    return model.eval()


def _hollow(model: nn.Module) -> None:
    """Leave out all weights but one number each that says device and dtype."""
    for module in model.modules():
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(()), requires_grad=False)


def main(path: str) -> int:
    """Print the report; the exit code: 0 when the trained levels are visited, 1 when they are not."""
    report = check_student(path)
    print(report.text())
    return 0 if report.ok else 1
