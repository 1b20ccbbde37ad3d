"""`fewstep fit`: levels and history for a few calls of a frozen teacher, written as a folder that opens like a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.algebra.bridge import Bridge
from fewstep.algebra.fitted import nodes
from fewstep.commands.evaluate import preset_for, spec_of
from fewstep.commands.fit_request import FitRequest
from fewstep.commands.fit_table import measured, show
from fewstep.commands.fitting import Wish, fit
from fewstep.commands.judge import Judge, check_fit, judge_of, open_judge, paired_of, refusals
from fewstep.commands.options import parse_steps
from fewstep.commands.report import opened, say
from fewstep.commands.request import Request
from fewstep.commands.trust import allow_own_code
from fewstep.config import UserError
from fewstep.eval.protocol.preset import require_files
from fewstep.export.fitted import fit_card
from fewstep.files import commit, whole_folder
from fewstep.networks import code, hub
from fewstep.networks.diffusers import wrapper_of
from fewstep.networks.folder import read_folder, resolve
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import shipped
from fewstep.recipe.store import dump, load, load_run
from fewstep.train.fitted import KIND, NAME, Fitted, Source, digest, is_fit, read_fit
from fewstep.train.product import Product, guided_product, teacher_of


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen teacher and where it is found again; `recipe` is written beside a fit that needs it for that."""

    product: Product
    of: Source
    source: str
    recipe: Recipe | None = None


def run(request: FitRequest) -> Path:
    """`fewstep fit`; returns the folder. UserError for what cannot be fitted, before a network is called."""
    calls = parse_steps(request.calls, "--calls")
    teacher = teacher_at(request)
    check_calls(request, calls, teacher.product)
    recipe = teacher.product.recipe
    own = recipe.evaluate.guidance if recipe is not None and recipe.evaluate is not None else 1.0
    guidance = own if request.guidance is None else request.guidance
    product = guided_product(teacher.product, guidance)
    judge = judge_for(request, teacher.product)
    sizes: dict[str, int] = {"points": request.points, "noises": request.noises, "seed": request.seed}
    wish = Wish(calls=calls, solver=request.solver, history=not request.no_history, **sizes)  # type: ignore[arg-type]
    with whole_folder(request.out, KIND, "fit") as aside:
        if not request.force and request.out.exists() and any(request.out.iterdir()):
            raise UserError(f"{request.out}: holds a fit; overwrite it with --force, or choose another --out")
        done = fit(product, wish)
        fitted = Fitted(
            of=teacher.of,
            source=teacher.source,
            digest=digest(teacher.of, teacher.source, recipe),
            guidance=guidance,
            solver=wish.solver,
            samplers=done.samplers,
            calls=done.calls,
            seconds=round(done.seconds, 3),
            commit=commit()[:7],
            **sizes,
        )
        say(f"fitted with {done.calls:,} network calls in {done.seconds:.1f} s of processor time")
        if not request.no_table:
            fitted = replace(fitted, rows=measured(product, fitted, wish, judge))
            show(fitted.rows)
        (aside / NAME).write_text(fitted.text())
        (aside / "README.md").write_text(fit_card(product, fitted, str(request.out)))
        if teacher.recipe is not None:
            (aside / "recipe.yaml").write_text(dump(teacher.recipe))
            code.remember(request.out, teacher.recipe)
    most = max(calls)
    say(f"{request.out}: draw from it with `fewstep sample {request.out} --steps {most}`; its README.md has the loop")
    return request.out


def teacher_at(request: FitRequest) -> Teacher:
    """What is to be fitted. UserError where it is no teacher, or one that cannot be found again."""
    path = resolve(request.source)
    if is_fit(path):
        raise UserError(f"{path}: is a fit already, of {read_fit(path).source or 'its recipe'}; name the teacher")
    if (path / "recipe.yaml").is_file():
        return _of_run(path, request.teacher)
    if request.teacher:
        raise UserError(f"--teacher: is for a run of a student; {request.source} is no run directory")
    if path.is_dir():
        return _of_folder(path, request.source)
    if request.source not in shipped() and path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{request.source}: no such folder, run directory or recipe{hub.hint(request.source)}")
    recipe = load(request.source)
    allow_own_code(request.source, (), recipe)
    return _of_recipe(recipe, Path(request.source).stem)


def _of_run(path: Path, teacher: bool) -> Teacher:
    if teacher:
        return _of_recipe(load_run(path), path.name)
    product = opened(path)
    if product.sampler.kind != "ode":
        levels = ", ".join(f"{u:.3g}" for u in product.sampler.steps)
        raise UserError(
            f"{path}: is a student that was trained for the levels {levels} and answers well there only, so none are "
            "fitted to it; add --teacher to fit the teacher of its recipe"
        )
    return Teacher(product=product, of="run", source=str(path.resolve()))


def _of_folder(path: Path, shown: str) -> Teacher:
    if not (path / "model_index.json").is_file():
        raise UserError(f"{shown}: neither a run directory (recipe.yaml) nor a diffusers folder (model_index.json)")
    if "text" in wrapper_of(read_folder(str(path))).needs:
        raise UserError(
            f"{shown}: takes prompts, and a folder names none; write a recipe with some, `fewstep new --teacher {shown} "
            "--prompts FILE --steps 4 --out mine.yaml`, and fit that: `fewstep fit mine.yaml`"
        )
    product = opened(path)
    if product.trained is not None:
        raise UserError(
            f"{shown}: is an exported student of {len(product.sampler.steps)} steps, which answers well at its trained "
            "levels only; name the teacher that it was distilled from"
        )
    by_name = shown.startswith("assets:") or hub.repository(shown)
    return Teacher(product=product, of="folder", source=hub.pinned(shown) if by_name else str(path.resolve()))


def _of_recipe(recipe: Recipe, name: str) -> Teacher:
    if recipe.teacher is None:
        raise UserError(f"{name}: its recipe has no teacher; name a teacher's folder, or a run that trained one")
    if recipe.teacher.name == "ring":
        raise UserError(
            f"{name}: its teacher is analytic and has no folder that a fit could name; nothing is fitted to it"
        )
    if recipe.fills_teacher():
        refuse_bridge(name, getattr(recipe.teacher.of, "process", None))
    return Teacher(product=teacher_of(recipe, name), of="recipe", source="", recipe=recipe)


def refuse_bridge(source: str, process: Any) -> None:
    """UserError for a process that no sampler is fitted on."""
    if isinstance(process, Bridge):
        raise UserError(
            f"{source}: its process, {process.name}, is a bridge: at level 1 it is its source alone, where a step of "
            "DDIM is 0/0, so no sampler is fitted to it"
        )


def check_calls(request: FitRequest, calls: Sequence[int], product: Product) -> None:
    """UserError for a process that no sampler is fitted on, and for calls that cannot be fitted on so many points."""
    process: Any = product.net.process
    refuse_bridge(str(request.source), process)
    try:
        nodes(process, request.points)
    except ValueError as error:
        raise UserError(f"--points {request.points}: {error}") from None
    if not calls:
        raise UserError("--calls: names no number of calls, such as 3,4,5")
    if max(calls) > request.points:
        raise UserError(f"--calls {max(calls)}: more than the {request.points} points that are searched; raise --points")
    if 1 in calls and not request.no_history:
        raise UserError("--calls 1: one call has no history and no level to choose; leave it out, or add --no-history")


def judge_for(request: FitRequest, product: Product) -> Judge | None:
    """What the table is measured with; None where nothing names a metric."""
    spec = product.recipe.evaluate if product.recipe is not None else None
    if request.no_table or (request.preset is None and request.against is None and (spec is None or not spec.metric)):
        return None
    like = Request(path=request.out, preset=request.preset, against=request.against, samples=request.samples)
    wanted = spec_of(like, product)
    if wanted is not None:
        judge = judge_of(product, wanted)
    else:
        shape = product.picture_shape()
        preset = preset_for(like, None, shape)
        check_fit(preset, shape, product.classes, request.source)
        with refusals():
            files = require_files(preset)
        preset, pairs = paired_of(preset, product, request.samples)
        judge = open_judge(preset, files, paired=pairs)
    if not {"fd", "kid", "cmmd", "energy"} & set(judge.preset.metrics):
        raise UserError(f"--preset: {judge.preset.name} measures no distance, which is what the table compares")
    return judge
