"""What a recipe alone shows will not train: roles made of what is not there, guidance without conditions, two rings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from fewstep.algebra.times import FadingBeta
from fewstep.algebra.views import seen_shape
from fewstep.config import RecipeError
from fewstep.methods.turns import updates_a_step
from fewstep.networks import code
from fewstep.objectives.legs import PowerLaw, Scales, ends

GUIDANCE = ("guidance", "correction_guidance", "distill_guidance", "sample_guidance")
"""Fields of methods that hold a guidance scale."""
STAGED = {
    **dict.fromkeys(
        ("ClassRatio", "DMD", "DMD2", "Factorised", "FDistill", "PhasedDMD", "SiD", "UniInstruct", "VSD"), "times"
    ),
    **dict.fromkeys(("Critic", "Denoise", "Gan", "OffTrajectory"), "times"),
    "FreeFlow": "correction_times",
}
"""Noise levels of this package's parts that are drawn knowing the step, as a law that changes with it must be."""


def refuse(recipe: Any) -> None:
    """ValueError beginning with the key for the first fault of a recipe whose fields are each right."""
    _sources(recipe)
    _compiled(recipe)
    _controlled(recipe)
    _rings(recipe)
    _guidance(recipe)
    _reward(recipe)
    _reference(recipe)
    _lean(recipe)
    _fading(recipe)
    _grid(recipe)
    _student(recipe)
    _together(recipe)


def check_views(recipe: Any, shape: tuple[int, ...]) -> None:
    """RecipeError beginning with the key for a view of a method's that the data, samples of this shape, do not have."""
    for key, part in _parts(recipe):
        if hasattr(part, "view"):
            try:
                seen_shape((part.view,), shape)
            except ValueError as error:
                raise RecipeError(f"{key}.view: {error}") from None


def _together(recipe: Any) -> None:
    """Roles that one optimiser steps have one rule and one size of moments."""
    for stage in recipe.stages():
        for updates in updates_a_step(stage.method, stage.steps):
            specs = {name: recipe.optim.get(name) or recipe.optim.get("default") for name in updates}
            kinds = {name: (spec.rule, spec.bits) for name, spec in specs.items() if spec is not None}
            if len(set(kinds.values())) > 1:
                told = ", ".join(f"{name} {rule} of {bits} bits" for name, (rule, bits) in kinds.items())
                raise ValueError(
                    f"optim: the roles of one update step together, so give them one rule and bits, not {told}"
                )


def _student(recipe: Any) -> None:
    """A method that asks for a network of one kind has one, be it a copy."""
    made = _origin(recipe, "student")
    for key, part in _parts(recipe):
        name = getattr(part, "name", None)
        if name == "contiguous" and made.name != "pruned":
            raise ValueError(
                f"{key}: contiguous trains blocks that stand for runs of blocks; the student, {made.name}, has none: "
                "give student: {name: pruned, of: teacher, intervals: [[FIRST, LAST]]} (`fewstep probe` proposes them)"
            )
        # Code of the user's may have iterates of its own.
        theirs = any(getattr(made, own, None) for own in code.KEYS)
        if name == "kd" and part.correct is not None and made.name != "get" and not theirs:
            raise ValueError(
                f"{key}.correct: is for a student with iterates, and {made.name} has none; give student: {{name: get}}, "
                "or leave it out"
            )


def _origin(recipe: Any, role: str) -> Any:
    """The spec that a role's network comes from, through copies and adapters."""
    spec = recipe.spec(role)
    while spec.name in ("controlnet", "copy", "lora", "network"):
        spec = spec.of if spec.name == "network" else recipe.spec(spec.of)
    return spec


def _parts(recipe: Any) -> Iterator[tuple[str, Any]]:
    """(key, part) of every stage's method and of all parts inside it, those of a joint method too."""
    for i, stage in enumerate(recipe.stages()):
        yield from _within(f"before.{i}.method" if i < len(recipe.before) else "method", stage.method)


def _within(key: str, part: Any) -> Iterator[tuple[str, Any]]:
    yield key, part
    for f in fields(part):
        value = getattr(part, f.name)
        inner: Iterable[tuple[int | None, Any]] = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        for i, one in inner:
            if is_dataclass(one):
                yield from _within(f"{key}.{f.name}" + ("" if i is None else f".{i}"), one)


def _reference(recipe: Any) -> None:
    """A method that compares the student with one that stands still has one."""
    for key, part in _parts(recipe):
        if getattr(part, "reference", "") is None and getattr(recipe.student, "name", None) != "lora":
            raise ValueError(
                f"{key}.reference: the student is no adapter, whose base stands still; name a role, such as a copy that "
                "`copy: {reference: student}` fills when the stage begins"
            )


def _lean(recipe: Any) -> None:
    """A method whose real score leans on the critic's adapter has one on the teacher's weights."""
    critic = recipe.critic
    made = (getattr(critic, "name", ""), getattr(critic, "of", ""))
    for key, part in _parts(recipe):
        if getattr(part, "lean", None) and made != ("lora", "teacher"):
            raise ValueError(
                f"{key}.lean: takes the teacher with a share of the critic's adapter, so the critic must be one: "
                "critic: {name: lora, of: teacher}"
            )


def _fading(recipe: Any) -> None:
    """A law of noise levels that changes with the step stands where the step is known."""
    for key, part in _parts(recipe):
        for f in fields(part) if type(part).__module__.startswith("fewstep.") else ():
            if isinstance(getattr(part, f.name), FadingBeta) and STAGED.get(type(part).__name__) != f.name:
                raise ValueError(
                    f"{key}.{f.name}: fading_beta changes with the step, which these levels are drawn without; it is for "
                    "re-noising levels (method.times of dmd2 and its like), critic.times, gan.times and denoise; take "
                    "another law, such as {name: beta}"
                )


def _reward(recipe: Any) -> None:
    """A reward whose gradient is followed has one, where its spec tells."""
    spec = recipe.roles.get("reward")
    for stage in recipe.stages() if spec is not None else ():
        if stage.method.needs().reward == "gradient" and not getattr(spec, "differentiable", True):
            raise ValueError(
                f"roles.reward: {spec.name} has no gradient with these settings, and method {stage.method.name} follows "
                "it; take a reward that has one, or method pso, which only compares rewards"
            )


def _sources(recipe: Any) -> None:
    """What a role copies or adapts is built before it."""
    names = recipe.role_names()
    for number, role in enumerate(names):
        key, spec = f"roles.{role}" if role in recipe.roles else role, recipe.spec(role)
        while getattr(spec, "name", None) in ("experts", "by_class"):
            key, spec = f"{key}.of", spec.of
        for other in getattr(spec, "beside", ()):
            if other not in names[:number]:
                told = ", ".join(names[:number]) or "none"
                raise ValueError(f"{key}.beside: role {other!r} is not built before {role}; those before it: {told}")
        if getattr(spec, "name", None) not in ("controlnet", "copy", "lora", "pruned") or spec.of in names[:number]:
            continue
        why = "is built after it" if spec.of in names else "is not in this recipe"
        if spec.of == role:
            why = "is this role itself"
        before = ", ".join(names[:number]) or "none"
        raise ValueError(f"{key}.of: role {spec.of!r} {why}; built before {role}: {before}")


def _compiled(recipe: Any) -> None:
    names = recipe.role_names()
    for role in recipe.train.compile:
        if role not in names:
            raise ValueError(f"train.compile: role {role!r} is not in this recipe; it has {', '.join(names)}")


def _controlled(recipe: Any) -> None:
    """The UNet of a ControlNet stays where its role's calls find it, and is told text."""
    train = recipe.train
    beside = [role for role in recipe.role_names() if getattr(recipe.spec(role), "name", None) == "controlnet"]
    for key, wrong in (("offload: true", train.offload), ("parallel: fsdp", train.parallel == "fsdp")):
        if beside and wrong:
            raise ValueError(
                f"train.{key}: the {beside[0]} calls another role's UNet, which has to stay whole in its place"
            )
    if beside and recipe.data.name == "degraded" and recipe.data.encoder is None:
        held = "keep: false drops it" if not recipe.data.keep else f"data.of is {recipe.data.of.name} without an encoder"
        raise ValueError(
            f"data: the {beside[0]} is a ControlNet beside a UNet that is told text, and these conditions hold none "
            f"({held}); give data.of an encoder of the teacher's folder, {{name: pipeline, path: FOLDER}}"
        )


def _rings(recipe: Any) -> None:
    """The ring's exact teacher is of the ring that the data draws."""
    data, teacher = recipe.data, recipe.teacher
    if data.name != "ring" or teacher is None or teacher.name != "ring":
        return
    for key in ("modes", "radius", "std"):
        ours, theirs = getattr(data, key), getattr(teacher, key)
        if ours != theirs:
            raise ValueError(f"teacher.{key}: {theirs} is not the data's, {ours}; a ring's teacher answers for one ring")


def _grid(recipe: Any) -> None:
    own = recipe.evaluate is not None and recipe.evaluate.teacher_grid == "own"
    if own and getattr(recipe.teacher, "name", None) != "diffusers":
        raise ValueError("evaluate.teacher_grid: own is the grid of a diffusers folder; this recipe's teacher is none")


def _guidance(recipe: Any) -> None:
    data = recipe.data
    # A picture is never taken away: guidance is of what stands beside it. Nor is which points are there.
    kinds = ("none" if not data.keep else data.of.conditions) if data.name == "degraded" else data.conditions
    if kinds not in ("none", "points"):
        return
    for key, part in _parts(recipe):
        for name in GUIDANCE:
            scale = getattr(part, name, None)
            if isinstance(scale, int | float | tuple | Scales | PowerLaw) and ends(scale) != (1, 1):
                told = scale if isinstance(scale, int | float) else "{:g} to {:g}".format(*ends(scale))
                raise ValueError(
                    f"{key}.{name}: a guidance scale of {told} needs conditions to move away from, and the data has "
                    "none; leave it at 1, or train on data with conditions"
                )
    if recipe.evaluate is not None and recipe.teacher is not None and recipe.evaluate.guidance != 1:
        raise ValueError(
            f"evaluate.guidance: a guidance scale of {recipe.evaluate.guidance} needs conditions, and the data has none"
        )
