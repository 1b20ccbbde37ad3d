"""Whether a student will export, said before it is trained: the exporter is asked, with a network without weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fewstep.config import Absent, UserError
from fewstep.data.base import image_shape, renumbered
from fewstep.export.base import Parts
from fewstep.export.choose import parts_of
from fewstep.export.levels import check_product
from fewstep.networks import code
from fewstep.networks.adapters import Adapted, lora_layers
from fewstep.networks.denoiser import Denoiser, Rescheduled
from fewstep.networks.diffusers import real_classes, wrapper_of
from fewstep.networks.folder import Folder, read_folder
from fewstep.networks.outline import outline, shapes
from fewstep.networks.parts import Site
from fewstep.networks.routed import Routed
from fewstep.networks.scheduler import read_scheduler
from fewstep.networks.specs import Copy, UNet2DSpec
from fewstep.recipe.schema import Recipe
from fewstep.train.product import Product, product_of


def weightless(net: nn.Module) -> nn.Module:
    """A copy without adapters on torch's meta device, shapes without memory; an adapter's is that of its base."""
    if isinstance(net, Routed):
        return Routed([weightless(m) for m in net.members], net.route)
    source = net.base if isinstance(net, Adapted) else net
    memo: dict[int, Any] = {}
    for t in (*source.parameters(), *source.buffers()):
        bare = torch.empty(t.shape, dtype=t.dtype, device="meta")
        memo[id(t)] = nn.Parameter(bare, t.requires_grad) if isinstance(t, nn.Parameter) else bare
    for layer in lora_layers(source):
        memo[id(layer)] = copy.deepcopy(layer.base_layer, memo)
    return copy.deepcopy(source, memo)


def foretold(product: Product) -> Parts:
    """What the exporter decides about a product; UserError is its refusal. No weight is copied."""
    bare = replace(product, net=weightless(product.net))
    check_product(bare)
    return parts_of(bare)


def warning(product: Callable[[], Product]) -> str:
    """One line: that a product will not export and why; "" for one that will. Never an error, training may go on."""
    try:
        foretold(product())
    except UserError as error:
        return refused(error)
    except Exception as error:  # a network of the user's own that cannot be copied still trains
        return f"whether it will export is not checked: {_line(error)}"
    return ""


def refused(error: Exception) -> str:
    """The line for a refusal of the exporter."""
    return f"will not export to a stock pipeline: {_line(error)}"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def outlined(recipe: Recipe) -> Product:
    """The product of a recipe from configs alone: no weights are read and no text is encoded.

    Raises UserError or RecipeError where only building it tells.
    """
    teacher: Any = recipe.teacher
    roles: dict[str, nn.Module] = {}
    if teacher is not None and teacher.name == "diffusers":
        refuse_code("teacher", teacher)
        net = outlined_teacher(teacher, recipe.data)
        wrapper: Any = net.net
        shape = (wrapper.channels(), *_size(recipe.data, wrapper))
        image = recipe.data.image_outline() if hasattr(recipe.data, "image_outline") else None
        data: Any = _Data(shape, wrapper.classes, image, _said(recipe.data))
        roles["teacher"] = net if teacher.process is None else Rescheduled(net, teacher.process)
    elif teacher is None or teacher.name == "ring":
        data = _opened(recipe.data)
        if teacher is not None:
            roles["teacher"] = teacher.build(Site(data.shape, data.classes, {}, 0, image_shape(data), renumbered(data)))
    else:
        raise Absent("the student's process is known only once it is built")
    site = Site(data.shape, data.classes, roles, 0, image_shape(data), renumbered(data))
    return product_of(recipe, bare_student(recipe.student, site), data, "student")


class _Data:
    text = None

    def __init__(
        self, shape: tuple[int, ...], classes: int, image: tuple[int, ...] | None = None, renumbered: str = ""
    ) -> None:
        self.shape, self.classes, self.image_shape, self.renumbered = shape, classes, image, renumbered


def _said(spec: Any) -> str:
    """`renumbered` of data that are not opened; nothing where they are not here, as the teacher tells the shapes."""
    try:
        return spec.renumbered() if hasattr(spec, "renumbered") else ""
    except UserError:
        return ""


def _opened(spec: Any) -> Any:
    if hasattr(spec, "image_outline"):
        shape, classes = spec.outline()
        return _Data(shape, classes, spec.image_outline(), _said(spec))
    if getattr(spec, "encoder", None) is None:
        return spec.open()
    return _Data(spec.shape, 0) if hasattr(spec, "shape") else replace(spec, encoder=None).open()


def _size(data: Any, wrapper: Any) -> tuple[int, ...]:
    return data.shape[1:] if len(getattr(data, "shape", ())) in (3, 4) else wrapper.sample_size()


def bare_student(spec: Any, site: Site) -> nn.Module:
    """A role of a spec without weights where its config tells; adapters are left out."""
    if isinstance(spec, UNet2DSpec) and (model := outline(spec.settings(site))):
        return spec.around(model, site)
    if spec.name == "controlnet":
        with shapes():
            return replace(spec, path=None).build(site)
    return _spec(spec).build(site)


def _spec(spec: Any) -> Any:
    """A student's spec without what needs weights: an adapter exports as its base does."""
    if spec.name == "lora":
        return Copy(of=spec.of)
    if spec.name in ("experts", "by_class"):
        return replace(spec, of=_spec(spec.of))
    if spec.name == "pruned":
        return replace(spec, run=None)
    return replace(spec, max_frequency=None) if spec.name == "copy" else spec


def refuse_code(key: str, spec: Any) -> None:
    """Absent for code of the role under `key` that nobody has allowed: asking about a recipe runs none."""
    for where, name in code.named_by(key, spec).items():
        if not code.is_allowed(name):
            raise Absent(f"{where}: {name} is code, which is run by `fewstep run` alone")


def outlined_teacher(spec: Any, data: Any = None, classes: int | None = None, model: Any = None) -> Denoiser:
    """`load_denoiser` up to the weights, for a teacher's spec; x has the size of `data` where its spec tells one.

    model: the network in place of one without weights.
    """
    folder = read_folder(spec.folder)
    schedule = dict(folder.scheduler) | ({"prediction_type": spec.prediction} if spec.prediction else {})
    read_scheduler(schedule, str(folder.scheduler_file), tokens=256)
    # A wrapper of the user's own may look at any part of the model.
    known = folder.kind == "UNet2DModel" and spec.wrapper is None
    model = model or (outline(folder.config) if known else None) or bare_model(folder)
    rows = int(getattr(model.config, "num_class_embeds", 0) or 0)
    classes = rows if classes is None else real_classes(rows, spec.classes or classes, spec.path)
    pixels = folder.latents.pixels if folder.latents else 1
    net: Any = wrapper_of(folder, spec.wrapper)(model, classes, guidance=spec.guidance, pixels=pixels)
    process, kind, time_input = read_scheduler(schedule, str(folder.scheduler_file), net.tokens(_size(data, net)), net.mu)
    return Denoiser(net, process, kind, time_input)


def bare_model(folder: Folder) -> Any:
    """The network of a folder as its config says, on torch's meta device."""
    import diffusers

    cls: Any = getattr(diffusers, folder.kind, None)
    if cls is None:
        raise UserError(f"{folder.root / folder.component / 'config.json'}: no class {folder.kind!r}")
    with shapes():
        return cls.from_config(dict(folder.config))


def about(recipe: Recipe) -> tuple[Product | None, Parts | None, str]:
    """(outlined product, its export, line about it) of a recipe; None where that is not known or there is none."""
    try:
        product = outlined(recipe)
    except Exception as error:  # a config that diffusers cannot build is for building the roles to explain
        return None, None, f"not checked: {_line(error)}"
    try:
        return product, foretold(product), ""
    except UserError as error:
        return product, None, refused(error)
