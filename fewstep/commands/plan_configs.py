"""A recipe's roles and data from configs alone: networks of fake tensors, and conditions that have sizes and no text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fewstep.algebra.draws import Draws
from fewstep.config import Absent, UserError
from fewstep.export.forecast import bare_model, outlined_teacher, refuse_code
from fewstep.files import read_json
from fewstep.networks import hub
from fewstep.networks.adapters import frozen
from fewstep.networks.denoiser import Rescheduled
from fewstep.networks.diffusers import DTYPES
from fewstep.networks.folder import read_folder, resolve
from fewstep.networks.outline import shapes
from fewstep.networks.parts import Site
from fewstep.networks.roles import Roles
from fewstep.recipe.schema import Recipe
from fewstep.train.build import build_roles
from fewstep.train.live import make_fake
from fewstep.train.session import Session

CLIP_TOKENS = 77
"""Of CLIP's text, which pipelines without `max_sequence_length` have, and SD3 before its T5's."""
MOST_TOKENS = 512
"""Of a transformer without a stock pipeline."""
SHIPPED = "configs"
"""The folder of shipped configs: `assets:configs/NAME`."""


@dataclass(frozen=True)
class Sizes:
    """What only files would tell: the shape of x, the tokens and width of a text; None: as the family has it."""

    shape: tuple[int, ...] | None = None
    text: tuple[int, int] | None = None


def sizes_of(shape: str | None, text: str | None) -> Sizes:
    """Of `--shape 4x128x128` and `--text 77x2048`. UserError for what are no such numbers."""
    x, words = _numbers("--shape", shape, (3, 4)), _numbers("--text", text, (2,))
    return Sizes(x, None if words is None else (words[0], words[1]))


def _numbers(option: str, given: str | None, lengths: tuple[int, ...]) -> tuple[int, ...] | None:
    if given is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})*", given) or given.count("x") + 1 not in lengths:
        example = "channels x height x width, 4x128x128" if 3 in lengths else "tokens x width, 77x2048"
        raise UserError(f"{option} {given}: expected {example}")
    return tuple(map(int, given.split("x")))


def shipped() -> dict[str, Path]:
    """Folders of the shipped configs by the hub's id that they are of."""
    root = resolve(f"assets:{SHIPPED}")
    return {read_json(file)["id"]: file.parent for file in sorted(root.glob("*/about.json"))}


def located(path: str) -> str:
    """A teacher's folder: itself where it is there, or the shipped configs of the hub's repository of that name."""
    if path.startswith("assets:") or resolve(path).exists():
        return path
    known, repo = shipped(), hub.repository(path)
    called = Path(repo.name if repo else path).name
    name = next((folder.name for key, folder in known.items() if called == Path(key).name), None)
    if name is None:
        fetch = f"; fetch its own with `{repo.command}` or --download" if repo and hub.hint(path) else ""
        raise Absent(
            f"teacher {path}: no such folder, and no shipped configs of that name; those are of {', '.join(known)}{fetch}"
        )
    return f"assets:{SHIPPED}/{name}"


class ShapedData:
    """Rows of a shape, zeros all of them, with one condition for each: what a trace looks at of a data set.

    Args:
        row: a condition of one row, of text; None for classes and for none.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, row: Mapping[str, Tensor] | None) -> None:
        self.shape, self.classes, self.text = shape, classes, row

    def batch(self, draws: Draws) -> tuple[Tensor, Any]:
        return torch.zeros(len(draws.index), *self.shape), self.conditions(draws)

    def conditions(self, draws: Draws) -> Any:
        b = len(draws.index)
        if self.text is None:
            return torch.zeros(b, dtype=torch.long) if self.classes else None
        return {key: torch.cat([value] * b) for key, value in self.text.items()}

    def null(self, cond: Any) -> Any:
        return {k: v.clone() for k, v in cond.items()} if isinstance(cond, dict) else cond

    def all(self) -> tuple[Tensor, Tensor | None]:
        raise UserError("data: a plan from configs has no rows")


def bare_session(recipe: Recipe, sizes: Sizes, mode: Any) -> Session:
    """The roles and data of a recipe, none of its weights, latents or texts read.

    Args:
        recipe: without averages and its switches off, as `plan` has it.
        mode: of the fake tensors.

    Raises UserError for a shape or a text that the teacher does not take, and for code that the recipe names.
    """
    spec: Any = recipe.teacher
    role: nn.Module | None = None
    # On the meta device first, for peft moves what it makes, which fake tensors refuse.
    with shapes():
        if spec is not None and spec.name == "diffusers":
            refuse_code("teacher", spec)
            asked, place = spec.folder, located(spec.folder)
            spec = spec if place == asked else replace(spec, path=place, revision=None)
            name = asked if place == asked else f"{place} in place of {asked}"
            known = sizes.shape or getattr(recipe.data, "shape", None)
            teacher = outlined_teacher(spec, SimpleNamespace(shape=known or ()), model=_model(spec))
            wrapper: Any = teacher.net
            shape, classes = tuple(known or (wrapper.channels(), *wrapper.sample_size())), int(wrapper.classes)
            spec.check(teacher, Site(shape, classes, {}, 0))
            _hand_whole(wrapper)
            role = frozen(teacher if spec.process is None else Rescheduled(teacher, spec.process))
    if role is None:
        known, classes = recipe.data.outline()
        shape = sizes.shape or known
    data = ShapedData(shape, classes, None if role is None else _row(wrapper, recipe, sizes))
    told = f"configs: {'none' if role is None else name}, x {_sides(shape)}"
    if data.text is not None:
        told += f", text {_sides(data.text['text'].shape[1:])}"

    with nullcontext() if role is None else shapes():  # what has no folder is small, and may look at values
        roles = build_roles(recipe, data, role)
    make_fake(roles.values(), mode)
    _make_fake_beside(roles, mode)
    return BareSession(recipe, data, Roles(**dict(roles)), told)


def _sides(shape: Sequence[int]) -> str:
    """As `--shape` and `--text` have them."""
    return "x".join(map(str, shape))


class _Whole:
    """A mask of ones (b, n) for a module that counts them in Python, which fake tensors do not let it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def sum(self, dim: int) -> _Whole:
        return self

    def tolist(self) -> list[int]:
        return [self.shape[1]] * self.shape[0]


def _hand_whole(wrapper: Any) -> None:
    if getattr(wrapper, "counts", ""):
        module = wrapper.model.get_submodule(wrapper.counts)
        module.register_forward_pre_hook(lambda _module, args: (args[0], _Whole(tuple(args[1].shape))))


def _make_fake_beside(roles: Roles, mode: Any) -> None:
    """Tables that models keep as plain tensors (Qwen-Image's positions, Lumina 2's list) are on the CPU, like buffers."""

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_meta:
            with mode:
                return torch.empty(value.shape, dtype=value.dtype, device="cpu")
        return value

    for module in {id(m): m for role in roles.values() for m in role.modules()}.values():
        for key, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, key, fake(value))
            elif isinstance(value, list) and any(isinstance(v, Tensor) and v.is_meta for v in value):
                setattr(module, key, [fake(v) for v in value])


class BareSession(Session):
    """A session of roles that are there already and go to no device, for tracing turns.

    told: the configs, shape and text that it is of, in a line.
    """

    def __init__(self, recipe: Recipe, data: ShapedData, roles: Roles, told: str) -> None:
        self.recipe, self.data, self.roles, self.told = recipe, data, roles, told
        self.accelerator = Accelerator(cpu=True)
        self.ema, self.sharded, self.offload = [], False, None


def _model(spec: Any) -> nn.Module:
    """The network of a teacher's folder in its dtype; what diffusers keeps in float32 is kept so."""
    model: nn.Module = bare_model(read_folder(spec.folder))
    kept, dtype = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()), DTYPES[spec.dtype]
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None and p.is_floating_point() and not any(k in f"{name}.{key}" for k in kept):
                module._parameters[key] = nn.Parameter(p.detach().to(dtype))
    return model.eval()


def _row(wrapper: Any, recipe: Recipe, sizes: Sizes) -> dict[str, Tensor] | None:
    """A condition of one row as the wrapper takes it, its text as long as the family's pipeline pads it."""
    example = wrapper.example(1)
    if not isinstance(example, dict) or "text" not in example:
        if sizes.text:
            raise UserError(f"--text: {wrapper.pipeline or 'this teacher'} takes no text; leave it out")
        return None
    width = example["text"].shape[-1]
    tokens, wide = sizes.text or (_tokens(wrapper, recipe), width)
    if wide != width:
        raise UserError(f"--text {tokens}x{wide}: the text of this teacher is {width} wide")
    longer = {"text": torch.zeros(1, tokens, *example["text"].shape[2:]), "mask": torch.ones(1, tokens)}
    # Cutting looks at values; without a mask the text is whole.
    cuts = bool(getattr(wrapper, "cuts", False))
    return {k: longer.get(k, v) for k, v in example.items() if k != "mask" or not cuts}


def _tokens(wrapper: Any, recipe: Recipe) -> int:
    """The recipe's encoder's length, or what the pipeline pads or cuts a prompt to by itself."""
    clip = CLIP_TOKENS if wrapper.pipeline == "StableDiffusion3Pipeline" else 0
    asked = getattr(getattr(recipe.data, "encoder", None), "length", None)
    if asked is None:
        asked = padded(wrapper.pipeline) or (CLIP_TOKENS if wrapper.component == "unet" else MOST_TOKENS)
    return int(asked) + clip


def padded(pipeline: str) -> int | None:
    """The tokens that a stock pipeline pads or cuts a prompt to by itself; None where its call has no number for it."""
    import diffusers

    kind = getattr(diffusers, pipeline, None) if pipeline else None
    known = None if kind is None else inspect.signature(kind.__call__).parameters.get("max_sequence_length")
    return known.default if known is not None and isinstance(known.default, int) else None
