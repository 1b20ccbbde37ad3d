"""`fewstep new`: recipes for one's own pictures or one's own pipeline, each line with where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fewstep.commands import new_pipeline, new_pixels
from fewstep.commands.new_lines import Lines, rendered
from fewstep.commands.new_memory import Fit, fitted
from fewstep.commands.write_recipe import write_recipes
from fewstep.config import UserError

MOST = 64
"""Steps of a student; its teacher takes as many."""


@dataclass(frozen=True)
class Wish:
    """What a new recipe is for."""

    out: Path
    steps: int
    data: Path | None = None
    teacher: str | None = None
    method: str = "dmd2"
    lora: bool = False
    prompts: Path | None = None
    force: bool = False
    memory: str | None = None
    """Of one device, such as 24G: the recipe's plan fits into it."""


def new(wish: Wish) -> Iterator[str]:
    """Write the recipes of a wish; what was written and the commands to go on with, a line each.

    UserError names the option that will not do, and what will.
    """
    if wish.steps < 1:
        raise UserError(f"--steps {wish.steps}: a student takes at least 1")
    if wish.steps > MOST:
        raise UserError(f"--steps {wish.steps}: a student of few steps takes at most {MOST}")
    if wish.teacher is None and wish.data is None:
        raise UserError("new: name --data FOLDER with your pictures, --teacher FOLDER with your pipeline, or both")
    if wish.out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {wish.out}: a recipe's name ends in .yaml")
    files, told = _from_scratch(wish) if wish.teacher is None else _distilled(wish)
    write_recipes({path: rendered(lines) for path, lines in files.items()}, wish.force)
    yield f"wrote {' and '.join(map(str, files))}: each line says where it comes from, `fewstep explain KEY` what it is"
    yield from told


def _beside(out: Path, word: str) -> Path:
    return out.with_name(f"{out.stem}-{word}{out.suffix}")


def _from_scratch(wish: Wish) -> tuple[dict[Path, Lines], list[str]]:
    """A teacher of the pictures, and its student."""
    assert wish.data is not None
    for option, given in (("--lora", wish.lora), ("--prompts", wish.prompts), ("--memory", wish.memory)):
        if given:
            raise UserError(f"{option} is for a pipeline; add --teacher FOLDER, or leave it out")
    found = new_pixels.look(wish.data)
    first = _beside(wish.out, "teacher")
    folder = f"runs/{first.stem}/export"
    lines = new_pixels.student(found, folder, f"what `fewstep run {first}` writes", wish.method, wish.steps)
    told = [f"fewstep run {first}", f"fewstep run {wish.out}"]
    if (wish.data / "captions.jsonl").is_file():
        told.append(f"note: {wish.data / 'captions.jsonl'} is not read: a teacher of text comes by --teacher FOLDER")
    return {first: new_pixels.teacher(found), wish.out: lines}, told


def _distilled(wish: Wish) -> tuple[dict[Path, Lines], list[str]]:
    """A student of a pipeline folder; with pictures, beside it the recipe by which they become latents."""
    assert wish.teacher is not None
    family = new_pipeline.look(wish.teacher)
    if not family.text and family.latents is None:
        return _of_pixels(wish, family)
    told = [f"fewstep check-teacher {wish.teacher}", f"fewstep plan {wish.out}", f"fewstep run {wish.out}"]
    if wish.data is None:
        return {wish.out: _student(wish, family, wish.prompts, None)}, told
    if wish.prompts is not None:
        raise UserError("--prompts and --data: the captions of the data are its prompts; leave one of the two out")
    files: dict[Path, Lines] = {}
    latents = wish.data
    if not new_pipeline.is_cache(wish.data):
        first, latents = _beside(wish.out, "pictures"), wish.out.with_name(f"{wish.out.stem}-latents")
        files[first] = new_pipeline.pictures(family, wish.data, wish.out)
        told.insert(1, f"fewstep cache-latents {first} --vae {wish.teacher} --out {latents}")
    return {**files, wish.out: _student(wish, family, None, latents)}, told


def _student(wish: Wish, family: new_pipeline.Family, prompts: Path | None, latents: Path | None) -> Lines:
    """The recipe of a wish, by the memory of a device where one is given."""

    def lines(fit: Fit) -> Lines:
        return new_pipeline.student(family, wish.method, wish.steps, fit=fit, prompts=prompts, latents=latents)

    if wish.memory is None:
        return lines(Fit(wish.lora))
    return fitted(wish.memory, wish.lora, family.wrapper.model, lines)


def _of_pixels(wish: Wish, family: new_pipeline.Family) -> tuple[dict[Path, Lines], list[str]]:
    """A student of a pipeline without latents and without text."""
    if wish.data is None:
        raise UserError(f"--teacher {wish.teacher}: works on pixels; add --data FOLDER with pictures of its kind")
    for option, given in (("--lora", wish.lora), ("--prompts", wish.prompts), ("--memory", wish.memory)):
        if given:
            raise UserError(f"{option} is for a pipeline of text or latents, which {wish.teacher} is not; leave it out")
    found = new_pixels.look(wish.data, as_they_are=True)
    if found.shape != family.shape:
        raise UserError(
            f"--data {wish.data}: pictures of shape {list(found.shape)}, but {wish.teacher} takes {list(family.shape)}; "
            "resize them, or train a teacher of their own by leaving --teacher out"
        )
    where = f"--teacher: {family.pipeline or 'a UNet2DModel'}"
    lines = new_pixels.student(found, str(wish.teacher), where, wish.method, wish.steps, family.table)
    return {wish.out: lines}, [f"fewstep check-teacher {wish.teacher}", f"fewstep run {wish.out}"]
