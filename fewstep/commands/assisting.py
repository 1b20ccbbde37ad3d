"""--assist: a run's teacher that helps its student at sampling."""

from __future__ import annotations

from typing import Any

import yaml

from fewstep.config import REGISTRY, Source, UserError, validate
from fewstep.networks.assisted import Assist
from fewstep.train.assisted import assisted
from fewstep.train.product import Product, teacher_beside

HINT = "such as diversity, diversity:substeps=5,guidance=2, adaptive:k=30,mode=regenerate or {name: ..., ...}"


def parse_assist(text: str) -> Assist:
    """`NAME`, `NAME:key=value,...` or a YAML mapping as a part; RecipeError or UserError says what is wrong."""
    try:
        if text.lstrip().startswith("{"):
            told: Any = yaml.safe_load(text)
        else:
            name, _, rest = text.partition(":")
            pieces = [p.partition("=") for p in rest.split(",") if p]
            if any(not equals for _, equals, _ in pieces):
                raise UserError(f"--assist {text!r}: expected key=value after the name, {HINT}")
            told = {"name": name, **{key: yaml.safe_load(value) for key, _, value in pieces}}
    except yaml.YAMLError:
        raise UserError(f"--assist {text!r}: cannot be read; give a name, {HINT}") from None
    known = REGISTRY["assist"]
    name = told.get("name") if isinstance(told, dict) else None
    if name not in known:
        raise UserError(f"--assist {text!r}: {name!r} is not one of {', '.join(known)}; give a name, {HINT}")
    if name == "adaptive":
        score = told.setdefault("score", "class")
        told["score"] = {"name": score} if isinstance(score, str) else score
    return validate(known[name], Source(told, {}))  # type: ignore[return-value]


def with_assist(product: Product, part: Assist) -> Product:
    """The product of a run with its teacher's help. UserError where it has no teacher."""
    recipe: Any = product.recipe
    if recipe is None or recipe.teacher is None:
        raise UserError(f"--assist: {product.title} has no teacher that could help; only a run of a student has")
    data = recipe.data.open()
    teacher = teacher_beside(recipe, data, product.title, product.checkpoint).to(product.device())
    return assisted(product, part, teacher, data.null)
