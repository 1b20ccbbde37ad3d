"""What a recipe alone shows will not train: roles made of what is not there, guidance without conditions, two rings."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

GUIDANCE = ("guidance", "correction_guidance", "distill_guidance", "sample_guidance")
"""Fields of methods that hold a guidance scale."""


def refuse(recipe: Any) -> None:
    """ValueError beginning with the key for the first fault of a recipe whose fields are each right."""
    _sources(recipe)
    _compiled(recipe)
    _rings(recipe)
    _guidance(recipe)
    _grid(recipe)


def _sources(recipe: Any) -> None:
    """What a role copies or adapts is built before it."""
    names = recipe.role_names()
    for number, role in enumerate(names):
        key, spec = f"roles.{role}" if role in recipe.roles else role, recipe.spec(role)
        while getattr(spec, "name", None) in ("experts", "by_class"):
            key, spec = f"{key}.of", spec.of
        if getattr(spec, "name", None) not in ("copy", "lora") or spec.of in names[:number]:
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
    if recipe.data.conditions != "none":
        return
    stages = [(f"before.{i}.method", s.method) for i, s in enumerate(recipe.before)]
    for key, method in (*stages, ("method", recipe.method)):
        for name, scale in _scales(key, method):
            if isinstance(scale, int | float) and scale != 1:
                raise ValueError(
                    f"{name}: a guidance scale of {scale} needs conditions to move away from, and the data has none; "
                    "leave it at 1, or train on data with conditions"
                )
    if recipe.evaluate is not None and recipe.teacher is not None and recipe.evaluate.guidance != 1:
        raise ValueError(
            f"evaluate.guidance: a guidance scale of {recipe.evaluate.guidance} needs conditions, and the data has none"
        )


def _scales(key: str, part: Any) -> list[tuple[str, Any]]:
    """(key, value) of the guidance scales of a method and of methods inside it."""
    found: list[tuple[str, Any]] = []
    for f in fields(part):
        value, here = getattr(part, f.name), f"{key}.{f.name}"
        if f.name in GUIDANCE:
            found.append((here, value))
        for inner in value if isinstance(value, tuple) else (value,):
            found += _scales(here, inner) if is_dataclass(inner) else []
    return found
