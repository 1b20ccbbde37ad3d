"""A recipe's repositories of the Hugging Face hub: which it names, fetched where that is asked for, kept to commits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewstep.config import Absent
from fewstep.networks import hub
from fewstep.recipe.schema import Recipe


def named(recipe: Recipe) -> dict[str, str]:
    """What a recipe names that may be a repository, by key: org/name or org/name@revision, or the path of a folder."""
    data: Any = recipe.data
    found = {
        "teacher.path": getattr(recipe.teacher, "folder", None),
        "data.encoder.path": getattr(getattr(data, "encoder", None), "path", None),
        "data.vae": getattr(data, "vae", None),
    }
    return {key: path for key, path in found.items() if path is not None}


def fetched(recipe: Recipe, *, configs: bool = False) -> None:
    """Fetch the repositories that a recipe names into the hub's cache; errors as `hub.fetch`."""
    for repo in repositories(recipe):
        hub.fetch(repo, configs=configs)


def as_begun(recipe: Recipe, begun: Recipe) -> Recipe:
    """A recipe that names a repository and no revision, with the commits at which a run of it was begun."""
    theirs = {key: hub.parsed(path) for key, path in named(begun).items()}
    found = {}
    for key, path in named(recipe).items():
        repo, then = hub.repository(path), theirs.get(key)
        if repo and then and repo.revision is None and repo.name == then.name:
            found[key] = then
    return _with(recipe, found)


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with the commits that its repositories stand for in the hub's cache, as a run writes it down.

    Absent names the key and the command that fetches one that is not there.
    """
    found = {}
    for key, path in named(recipe).items():
        repo = hub.repository(path)
        if repo and (at := hub.cached(repo)):
            found[key] = hub.Repository(repo.name, at.name)
        elif told := hub.hint(path):
            raise Absent(f"{key} {path}: no such folder{told}")
    return _with(recipe, found)


def repositories(recipe: Recipe) -> list[hub.Repository]:
    """Those that a recipe names and that are no folders here, each once."""
    found = (hub.repository(path) for path in named(recipe).values())
    return list(dict.fromkeys(repo for repo in found if repo is not None))


def _with(recipe: Recipe, found: dict[str, hub.Repository]) -> Recipe:
    """The recipe with repositories at revisions in place of what it names, by key."""
    if not found:
        return recipe
    data: Any = recipe.data
    teacher: Any = recipe.teacher
    if repo := found.get("teacher.path"):
        teacher = replace(teacher, path=repo.name, revision=repo.revision)
    if repo := found.get("data.encoder.path"):
        data = replace(data, encoder=replace(data.encoder, path=repo.path))
    if repo := found.get("data.vae"):
        data = replace(data, vae=repo.path)
    return replace(recipe, teacher=teacher, data=data)
