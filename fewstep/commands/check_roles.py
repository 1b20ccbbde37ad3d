"""The roles of a recipe without their weights: what cannot be built is refused by line, what is not here is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.algebra.draws import Draws, fold
from fewstep.config import Absent, RecipeError, Source, UserError, path_of
from fewstep.data.latents import vae_files
from fewstep.export.forecast import bare_student, outlined_teacher, refuse_code
from fewstep.files import expanded
from fewstep.networks.adapters import network_of, own_state
from fewstep.networks.blocks import intervals_of
from fewstep.networks.denoiser import Rescheduled
from fewstep.networks.folder import read_folder
from fewstep.networks.outline import UNetOutline, whole
from fewstep.networks.parts import Site
from fewstep.networks.rewards import check_reward
from fewstep.networks.routed import Routed, innermost, source_of
from fewstep.recipe.faults import check_views
from fewstep.recipe.schema import Recipe
from fewstep.train.build import TRIED

SHAPING = (
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "add_attention",
    "resnet_time_scale_shift",
)
"""What decides the shapes of a UNet2DModel's weights beside the layers that its outline has."""


@dataclass
class Roles:
    """Roles by name in `modules`, why a key is not known in `absent`; the rest is the data's, where it is here."""

    shape: tuple[int, ...] = ()
    classes: int | None = None
    image: tuple[int, ...] | None = None
    renumbered: str = ""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def look(recipe: Recipe, source: Source | None = None) -> Roles:
    """Outline every role. RecipeError, with `source` beginning with file and line, for what would be refused later."""
    found = Roles()

    def attempt(key: str, work: Callable[[], Any], name: str = "") -> Any:
        try:
            return work()
        except Absent as error:
            found.absent[key] = str(error)
        except (RecipeError, UserError) as error:
            raise _at(source, key, name, error) from None
        except Exception as error:  # a config that diffusers cannot build is for building it to explain
            found.absent[key] = f"{key}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        return None

    data: Any = recipe.data
    told = attempt("data", data.outline, data.name)
    if told is not None:
        found.shape, found.classes = told
        found.image = data.image_outline() if hasattr(data, "image_outline") else None
        found.renumbered = data.renumbered() if hasattr(data, "renumbered") else ""
        if data.conditions is None:
            attempt("data", lambda: recipe.check_conditions("classes" if found.classes else "none"))
    if encoder := getattr(data, "encoder", None):
        attempt("data.encoder", encoder.files, encoder.name)
    if vae := getattr(data, "vae", None):
        attempt("data.vae", partial(vae_files, vae))
    for name in recipe.role_names():
        spec = recipe.spec(name)
        key = f"roles.{name}" if name in recipe.roles else name
        module = attempt(key, partial(_role, recipe, name, spec, found), getattr(spec, "name", name))
        if isinstance(module, nn.Module):
            found.modules[name] = module
    _copies(recipe, found, source)
    _aligned(recipe, found, source)
    if found.shape:
        _seen(recipe, found.shape, source)
    for number, stage in enumerate(recipe.stages()):
        key = f"before.{number}.method" if number < len(recipe.before) else "method"
        for part in stage.method.needs().parts if found.shape else ():
            attempt(key, partial(part.open, found.shape))
    if "reward" in found.modules:
        attempt("roles.reward", partial(_reward, recipe, found))
    for key, path in _measured_with(recipe).items():
        if not path.exists():
            found.absent[key] = f"{key} {path}: no such file or folder"
    return found


def _role(recipe: Recipe, name: str, spec: Any, found: Roles) -> nn.Module | None:
    kind = getattr(spec, "name", name)
    if name == "teacher":
        return _teacher(spec, recipe.data, found)
    source, inner = source_of(spec), innermost(spec)
    if source is not None and source not in found.modules:
        return None  # why that one is not known is said
    if not found.shape:
        return None
    site = Site(found.shape, found.classes or 0, found.modules, 0, found.image, found.renumbered)
    refuse_code(f"roles.{name}" if name in recipe.roles else name, spec)
    if kind in ("lpips", "clip"):
        spec.check(site)
        return None
    if name == "discriminator":
        _taps(spec, found.modules[spec.trunk])
        return None
    if kind == "logvar":
        return spec.build(site)
    if inner.name == "lora":
        _lora(recipe, inner, found.modules[inner.of])
    return bare_student(spec, site)


def _reward(recipe: Recipe, found: Roles) -> None:
    """Try the reward on noise as a run does; captions are not at hand."""
    asked = {stage.method.needs().reward for stage in recipe.stages()} - {""}
    if asked and recipe.data.conditions != "text" and getattr(recipe.data, "encoder", None) is None:
        noise = Draws(fold("reward"), torch.arange(TRIED))
        cond: Any = torch.arange(TRIED) % found.classes if found.classes else None
        if found.image is not None:
            cond = ({} if cond is None else {"label": cond}) | {"image": noise.normal(*found.image)}
        try:
            check_reward(found.modules["reward"], noise.normal(*found.shape), cond, gradient="gradient" in asked)
        except UserError as error:
            raise UserError(str(error).removeprefix("roles.reward: ")) from None


def _teacher(spec: Any, data: Any, found: Roles) -> nn.Module:
    refuse_code("teacher", spec)
    site = Site(found.shape, found.classes or 0, {}, 0, found.image, found.renumbered)
    if spec.name != "diffusers":
        return spec.build(site)
    net = outlined_teacher(spec, data, found.classes)
    wrapper: Any = net.net
    if found.shape:
        spec.check(net, site)
    else:
        found.shape = (wrapper.channels(), *wrapper.sample_size())
    read_folder(spec.folder).require_agreement()
    return net if spec.process is None else Rescheduled(net, spec.process)


def _lora(recipe: Recipe, spec: Any, base: nn.Module) -> None:
    """What building an adapter would refuse, without peft."""
    if getattr(recipe.spec(spec.of), "name", None) == "lora":
        raise RecipeError(f"lora.of: the {spec.of} is an adapter itself; name the role with the weights")
    if not list(base.parameters()):
        raise RecipeError(f"lora.of: the {spec.of} is analytic and has no weights to adapt")
    if spec.file is not None and not expanded(spec.file).exists():
        raise Absent(f"lora.file {spec.file}: no such file")
    if spec.targets is None or isinstance(base, Routed):
        return
    net = network_of(base)
    outlines = [m for m in net.modules() if isinstance(m, UNetOutline)]
    if outlines:  # of whose layers only a few are known
        net = whole(outlines[0])
    for target in spec.targets:
        if not any(name == target or name.endswith(f".{target}") for name, _ in net.named_modules()):
            raise RecipeError(f"lora.targets: {target!r} ends the name of no layer of the {spec.of}")


def _taps(spec: Any, trunk: nn.Module) -> None:
    allowed = taps_of(trunk)
    unknown = [tap for tap in spec.taps if allowed is not None and tap not in allowed]
    if unknown:
        told = ", ".join(allowed or ()) or "none: it is analytic"
        raise RecipeError(f"discriminator.taps: the {spec.trunk} has no {unknown[0]!r}; it has {told}")


def taps_of(module: Any) -> list[str] | None:
    """The names of the features that a role can be tapped at, in order; None where only its code tells."""
    if isinstance(module, Routed):
        return taps_of(module.members[0])
    if isinstance(module, Rescheduled):
        return taps_of(module.denoiser)
    net = getattr(module, "net", None)
    if net is None:
        return []
    model = getattr(net, "model", None)
    if isinstance(model, UNetOutline):
        config: Any = model.config
        sides = (("down", config.down_block_types), ("up", config.up_block_types))
        return ["mid", *(f"{side}{i}" for side, blocks in sides for i in range(len(blocks)))]
    if hasattr(net, "blocks"):
        blocks = net.blocks
        return list(blocks()) if callable(blocks) and model is not None else [f"block{i}" for i in range(len(blocks))]
    return ["mid"] if hasattr(net, "layers") else None


def _copies(recipe: Recipe, found: Roles, source: Source | None) -> None:
    for number, stage in enumerate(recipe.stages()):
        start: tuple[str | int, ...] = ("before", number) if number < len(recipe.before) else ()
        for target, origin in stage.copy.items():
            if target not in found.modules or origin not in found.modules:
                continue
            if wrong := _differ(recipe, target, origin, found.modules):
                path = (*start, "copy", target)
                where = f"{source.where(path)}: " if source else ""
                raise RecipeError(
                    f"{where}{'.'.join(map(str, path))}: {target} and {origin} are different networks, so the weights "
                    f"cannot be copied: {wrong}"
                )


def _seen(recipe: Recipe, shape: tuple[int, ...], source: Source | None) -> None:
    """Every view of a method's is one of the data's samples."""
    try:
        check_views(recipe, shape)
    except RecipeError as error:
        key = str(error).partition(":")[0]
        raise RecipeError(f"{source.where(path_of(key))}: {error}" if source else str(error)) from None


CRITICS = {"alignment": "student", "reset_every": "teacher"}
"""Settings of a critic and the role whose weights it is given by them."""


def _aligned(recipe: Recipe, found: Roles, source: Source | None) -> None:
    """A critic that moves towards the student's weights, or goes back to the teacher's, has to have their shape."""
    for (number, stage), (key, of) in product(enumerate(recipe.stages()), CRITICS.items()):
        methods = [stage.method, *(share.method for share in getattr(stage.method, "methods", ()))]
        asked = any(getattr(getattr(m, "critic", None), key, 0) for m in methods)
        if not asked or not {"critic", of} <= set(found.modules):
            continue
        if wrong := _differ(recipe, "critic", of, found.modules):
            start: tuple[str | int, ...] = ("before", number) if number < len(recipe.before) else ()
            path = (*start, "method", *(() if len(methods) > 1 else ("critic", key)))
            where = f"{source.where(path)}: " if source else ""
            raise RecipeError(
                f"{where}{'.'.join(map(str, path))}: critic.{key} needs a critic of the {of}'s shape: {wrong}"
            )


def _differ(recipe: Recipe, target: str, origin: str, modules: dict[str, nn.Module]) -> str:
    """What of two roles' weights differs, "" where nothing is known to."""
    if intervals_of(modules[target]) and not intervals_of(modules[origin]):
        return ""  # the weights of the blocks that are left
    specs = [recipe.spec(role) for role in (target, origin)]
    adapters = [getattr(spec, "name", None) == "lora" for spec in specs]
    if any(adapters):
        if not all(adapters):
            return f"{target if adapters[0] else origin} is an adapter, the other has whole weights"
        ranks = [spec.rank for spec in specs]
        return f"their ranks are {ranks[0]} and {ranks[1]}" if ranks[0] != ranks[1] else ""
    ours, theirs = ({k: tuple(v.shape) for k, v in own_state(modules[role]).items()} for role in (target, origin))
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            shown = [f"{role} has {list(s[key]) if key in s else 'no such weight'}"
                     for role, s in ((target, ours), (origin, theirs))]  # fmt: skip
            return f"{key}: {shown[0]}, {shown[1]}"
    # The outline of a UNet has a few of its layers; the others follow from its config.
    one, other = ([m.config for m in modules[r].modules() if isinstance(m, UNetOutline)] for r in (target, origin))
    for a, b in zip(one, other, strict=False):
        for key in SHAPING:
            if list_of(getattr(a, key)) != list_of(getattr(b, key)):
                return f"{key}: {target} has {getattr(a, key)}, {origin} has {getattr(b, key)}"
    return ""


def list_of(value: Any) -> Any:
    """JSON's lists and a spec's tuples are one."""
    return list(value) if isinstance(value, tuple) else value


def _measured_with(recipe: Recipe) -> dict[str, Path]:
    """Files and folders that the evaluation names, by key."""
    e = recipe.evaluate
    if e is None:
        return {}
    named = {"against": None if e.against == "data" else e.against, "extractor_path": e.extractor_path}
    named |= {"retrieval": e.retrieval, "metric": e.metric if (e.metric or "").endswith((".yaml", ".yml")) else None}
    return {f"evaluate.{key}": expanded(value) for key, value in named.items() if value is not None}


def _at(source: Source | None, key: str, name: str, error: Exception) -> RecipeError:
    """The error at the key that its message begins with, such as unet2d.channels, else at the role's own."""
    message, path = str(error), key.split(".")
    lead = re.match(rf"(?:{re.escape(name)}|copy|lora)\.(\w+)(?=[: ])", message) if name else None
    if lead:
        path, message = [*path, lead[1]], message[lead.end() :].removeprefix(": ").lstrip()
    where = f"{source.where(tuple(path))}: " if source else ""
    return RecipeError(f"{where}{'.'.join(path)}: {message}")
