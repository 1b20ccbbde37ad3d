"""What a run stands on outside its folder, networks, code, encoders and data: digests, and what has changed since."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.config import UserError
from fewstep.data.latents import vae_files
from fewstep.files import digest_of
from fewstep.networks import code
from fewstep.networks.routed import innermost
from fewstep.recipe.schema import Recipe

Files = Callable[[], list[Path]]


def _parts(recipe: Recipe) -> dict[str, tuple[str, Files]]:
    """(what it is called, its files) of every part that stands on files, by name; others, such as the ring, have none."""
    data: Any = recipe.data
    named = {role: recipe.spec(role) for role in recipe.role_names()}
    named |= {"encoder": getattr(data, "encoder", None), "data": data}
    found = {name: (_shown(part), part.files) for name, part in named.items() if hasattr(part, "files")}
    if vae := getattr(data, "vae", None):
        found["vae"] = (vae, partial(vae_files, vae))
    for opened in dict.fromkeys(part for stage in recipe.stages() for part in stage.method.needs().parts):
        if opened.files():
            found[f"representation {opened.of}"] = (", ".join(map(str, opened.files())), opened.files)
    for key, value in code.named(recipe).items():
        if file := code.file_of(value):
            found[key] = (value, lambda file=file: [file])
    return found


def origins_of(recipe: Recipe) -> dict[str, str]:
    """The digest of the files of each part, as they are now. UserError names one that cannot be read."""
    return {name: digest_of(files()) for name, (_, files) in _parts(recipe).items()}


def _there(recipe: Recipe) -> dict[str, str]:
    """`origins_of` without the parts whose files cannot be read."""
    found = {}
    for name, (_, files) in _parts(recipe).items():
        with suppress(UserError):
            found[name] = digest_of(files())
    return found


def changes(recipe: Recipe, then: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """A line for every part whose digest differs, by name; parts that either lacks are left out."""
    parts = _parts(recipe)
    return {
        name: f"{name} {parts[name][0]} has changed: {_both(then[name], digest)}"
        for name, digest in now.items()
        if name in then and then[name] != digest
    }


def _shown(part: Any) -> str:
    return str(next((v for k in ("path", "shards", "features") if (v := getattr(part, k, None))), part.name))


def _both(then: str, now: str) -> str:
    """Numbers and sizes where these tell, the hashes where only they do."""
    counts = [text.rpartition(", ")[0] for text in (then, now)]
    return f"{counts[0]} then, {counts[1]} now" if counts[0] != counts[1] else f"{then} then, {now} now"


def stands_on_teacher(recipe: Recipe, role: str = "student") -> bool:
    """True where a role's weights are an adapter's, which mean nothing without the very weights of the teacher."""
    if role == "teacher":
        return True
    spec = innermost(recipe.spec(role))
    return spec.name in ("controlnet", "lora") and spec.of != role and stands_on_teacher(recipe, spec.of)


def check_resumed(recipe: Recipe, then: Mapping[str, str], now: Mapping[str, str], run: Path) -> list[str]:
    """Lines about what has changed since a checkpoint; UserError where its run would not go on as the same one."""
    found = changes(recipe, then, now)
    for name, line in found.items():
        # Other data trains on; a VAE only shows; code may have changed in a comment.
        if name not in ("data", "vae") and name not in code.named(recipe):
            raise UserError(
                f"{run}: cannot be resumed: {line}; put the old files back, or go on from its weights on purpose: "
                f"--from {run} and another --out"
            )
    return [f"{line}; training goes on with what is there now" for line in found.values()]


def check_product(recipe: Recipe, then: Mapping[str, str], run: Path) -> list[str]:
    """Lines about what has changed since a run's newest checkpoint; UserError for an adapter on another base.

    Of files that are gone nothing is said here: whoever needs them says so.
    """
    found = changes(recipe, then, _there(recipe))
    if "teacher" in found and not recipe.overwrites_teacher() and stands_on_teacher(recipe):
        raise UserError(
            f"{run}: is an adapter on the teacher, and {found['teacher']}; put the old files back, or train on the new "
            f"ones: fewstep run with --from {run} and another --out"
        )
    return [f"{line} since {run} was trained" for line in found.values()]
