"""A thing to sample from: the product of a run, an exported folder or a teacher, with its sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.algebra.condition import moved, nulled, rows
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.guidance import Guided
from fewstep.algebra.sampling import Sampler, knot_levels, many_step, sample, seeded
from fewstep.config import UserError
from fewstep.data.base import image_shape
from fewstep.eval.metrics.paired import Paired
from fewstep.networks import code
from fewstep.networks.assisted import Assist
from fewstep.networks.controlnet import CONTROLNET_PIPELINES
from fewstep.networks.folder import resolve
from fewstep.recipe.schema import MOST_STEPS, Recipe
from fewstep.recipe.store import load_run
from fewstep.train.build import build_product, build_roles
from fewstep.train.fitted import AGAIN, Fitted, digest, is_fit, read_fit
from fewstep.train.note import read_note
from fewstep.train.origins import check_product
from fewstep.train.state import checkpoints, load_into, load_tensors, read_origins, read_state


def check_step_count(steps: int, option: str) -> None:
    """UserError, naming the option, for a number of steps that no sampler has."""
    if steps < 1:
        raise UserError(f"{option} must be at least 1, not {steps}")
    if steps > MOST_STEPS:
        raise UserError(f"{option} must be at most {MOST_STEPS}, not {steps}")


class Assisting(Protocol):
    """A teacher that helps a product (`fewstep.train.assisted`)."""

    @property
    def part(self) -> Assist: ...
    @property
    def teacher(self) -> nn.Module: ...
    @property
    def threshold(self) -> float: ...
    def images(
        self, net: nn.Module, sampler: Sampler, shape: tuple[int, ...], index: Tensor, cond: Any, seed: int
    ) -> Tensor: ...
    def network_calls(self, sampler: Sampler) -> float: ...


def check_count(name: str, value: Any) -> None:
    """UserError, naming the argument, for what is no count."""
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")


@dataclass(frozen=True)
class Product:
    """A denoiser, how it is sampled, and what it samples.

    `trained` holds the step counts it may be sampled with; None means any (a teacher).
    """

    net: nn.Module
    sampler: Sampler
    shape: tuple[int, ...]
    classes: int
    title: str
    trained: tuple[int, ...] | None
    recipe: Recipe | None = None
    done: int = 0
    prompted: Callable[[int], Any] | None = None
    """The conditions of the first so many samples, for data whose conditions are not classes."""
    drawn: Callable[[Draws], Any] | None = None
    """The conditions of training samples, for data whose first samples evaluation is about."""
    paired: Callable[[int], Paired] | None = None
    """What the first so many samples are compared with, for data that degrades pictures."""
    held: int = 0
    """How many pictures these data hold out; further samples are made from the first ones again."""
    image: tuple[int, ...] | None = None
    """(c', h', w') of the picture in its conditions."""
    vae: str | None = None
    """Folder of the VAE that turns latents into pictures."""
    example: int = 0
    """A class that it draws, for lines of code."""
    changed: tuple[str, ...] = ()
    """Lines about files outside that are others than when it was trained."""
    fitted: Fitted | None = None
    """Of a teacher with fitted samplers: all of them, and what they hold for."""
    assist: Assisting | None = None
    """The teacher's help at sampling."""
    checkpoint: Path | None = None
    """Folder that the weights are from, of a run."""

    @torch.no_grad()
    def images(self, index: Tensor, labels: Any, seed: int = 0) -> Tensor:
        """Samples of global indices (b,) with conditions or None: the same for any split into batches."""
        if self.assist is not None:
            return self.assist.images(self.net, self.sampler, self.shape, index, labels, seed)
        start, fresh = seeded(seed, index, self.shape)
        return sample(self.sampler, self.net, start, labels, fresh)

    def network_calls(self) -> float:
        """Network calls per sample, those of a helping teacher too; else guidance is not counted."""
        if self.assist is None:
            return self.sampler.network_calls(getattr(self.net, "process", None))
        return self.assist.network_calls(self.sampler)

    def draw(self, count: int, seed: int = 0, labels: Any = None, batch: int = 256) -> Tensor:
        """`count` samples on the CPU, decoded where there is a VAE; labels default to index mod classes.

        UserError for a count below 1, and for labels that are not `count` of the classes.
        """
        check_count("count", count)
        check_count("batch", batch)
        if not isinstance(seed, int):
            raise UserError(f"seed must be a whole number, not {seed!r}")
        device = self.device()
        index = torch.arange(count, device=device)
        labels = self.labels(count) if labels is None else self._checked(labels, count)
        decode = self.decoder()
        out = []
        for i in range(0, count, batch):
            part = moved(rows(labels, slice(i, i + batch)), device)
            out.append(decode(self.images(index[i : i + batch], part, seed)).cpu())
        return torch.cat(out)

    def picture_shape(self) -> tuple[int, ...]:
        """Shape of what `draw` gives: of one sample, decoded where there is a VAE."""
        if self.vae is None:
            return self.shape
        latents, *size = self.shape
        small = self.decoder(torch.device("cpu"))(torch.zeros(1, latents, 4, 4))
        return (small.shape[1], *(n * small.shape[-1] // 4 for n in size))

    def device(self) -> torch.device:
        """Where the net is."""
        return next((p.device for p in self.net.parameters()), torch.device("cpu"))

    def decoder(self, device: torch.device | None = None) -> Callable[[Tensor], Tensor]:
        """From what `images` gives to pictures: the VAE, on the net's device by default; nothing without one."""
        if self.vae is None:
            return lambda x: x
        from fewstep.data.latents import decoder

        net = decoder(self.vae, device or self.device())
        return lambda z: torch.cat([net(part) for part in z.split(8)])

    def labels(self, count: int) -> Any:
        """Classes in turn, so that every count is as balanced as it can be; or the data's first conditions."""
        if self.prompted is not None:
            return self.prompted(count)
        return torch.arange(count) % self.classes if self.classes else None

    def calibrating(self, draws: Draws) -> Any:
        """Conditions of samples that something is fitted to: of training samples, never of those that are measured."""
        return self.labels(len(draws)) if self.drawn is None else self.drawn(draws)

    def _checked(self, labels: Any, count: int) -> Any:
        """One class for all, or one for each sample, as int64 (count,); conditions of other kinds as they are."""
        if isinstance(labels, Mapping) and self.prompted is not None:
            return labels
        if self.paired is not None:
            raise UserError(f"labels: {self.title} makes samples from the data's pictures; leave them out")
        if not self.classes:
            raise UserError(f"labels: {self.title} is of no classes; leave them out")
        try:
            given = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"labels: expected a class or {count} of them, one for each sample, not {labels!r}") from None
        if given.is_floating_point() or given.shape not in ((), (count,)):
            raise UserError(f"labels: expected a class or {count} of them, one for each sample, not {labels!r}")
        wrong = given[(given < 0) | (given >= self.classes)]
        if len(wrong):
            raise UserError(f"labels: the classes are 0..{self.classes - 1}, not {int(wrong[0])}")
        return given.long().expand(count)

    def with_steps(self, steps: int | None, any_steps: bool = False) -> Product:
        """The same net at another number of steps; UserError when it was not trained for it."""
        if steps is None:
            return self
        check_step_count(steps, "--steps")
        if self.fitted is not None:
            return replace(self, sampler=self.fitted.at(steps))
        if self.trained is not None and steps not in self.trained and not any_steps:
            allowed = ", ".join(map(str, self.trained))
            raise UserError(f"--steps {steps}: this student was trained for {allowed}; add --any to try it anyway")
        if steps == len(self.sampler.steps):
            return self
        knots = self.sampler.knots
        # From where it was trained to start, which need not be u = 1 (IMM's .994).
        even = tuple(self.sampler.steps[0] * u for u in many_step(steps).steps)
        levels = knot_levels(steps, knots) if knots and steps <= knots else even
        levels = next((own for own in self.sampler.lists if len(own) == steps), levels)
        return replace(self, sampler=replace(self.sampler, steps=levels))


def open_product(path: Path) -> Product:
    """Open a run directory, a diffusers folder (an export or a teacher) or a fit. UserError when it is none of them.

    What has changed around a run since is in `changed`; UserError for an adapter whose base is another now.
    """
    if is_fit(path):
        return _open_fit(path)
    if (path / "recipe.yaml").is_file():
        return _open_run(path)
    if (path / "model_index.json").is_file():
        return _open_folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such run or folder")
    raise UserError(f"{path}: neither a run directory (recipe.yaml) nor a diffusers folder (model_index.json)")


def _open_run(path: Path) -> Product:
    recipe = load_run(path)
    code.allow_made_here(path, recipe)
    found = checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"{path}: has no checkpoint yet; train it with `fewstep run` first")
    progress, _ = read_state(found[-1])
    changed = check_product(recipe, read_origins(found[-1]), path)
    data: Any = recipe.data.open()
    net = build_product(recipe, data)
    use_ema = recipe.train.product == "ema" and recipe.train.ema
    name = f"ema_{recipe.train.ema[0]}" if use_ema else "student"
    file = found[-1] / f"{name}.safetensors"
    load_into(net, load_tensors(file), file)
    product = product_of(recipe, net.eval(), data, path.name, progress.done)
    return replace(product, changed=tuple(changed), checkpoint=found[-1])


def product_of(recipe: Recipe, net: nn.Module, data: Any, title: str, done: int = 0) -> Product:
    """The product of a recipe around a trained net."""
    sampler = recipe.sampler()
    trained = sampler.counts or (None if sampler.kind == "ode" else (len(sampler.steps),))
    prompted = drawn = pairs = None
    held = 0
    if getattr(data, "text", None) is not None:

        def prompted(count: int) -> Any:
            return data.condition(torch.arange(count) % len(data.text))

    elif getattr(data, "masked", False):
        drawn = data.conditions

        def prompted(count: int) -> Any:
            return data.conditions(Draws(fold("evaluation"), torch.arange(count)))

    elif hasattr(data, "examples"):
        held = len(data.held)

        def prompted(count: int) -> Any:
            return data.examples(torch.arange(count)).cond

        drawn = data.conditions

        def pairs(count: int) -> Paired:
            e = data.examples(torch.arange(count))
            return Paired(truth=e.truth, given=e.cond["image"], operator=data.operator, labels=e.labels)

    vae = getattr(recipe.data, "vae", None)
    return Product(
        net=net,
        sampler=sampler,
        shape=data.shape,
        classes=data.classes,
        title=title,
        trained=trained,
        recipe=recipe,
        done=done,
        prompted=prompted,
        drawn=drawn,
        paired=pairs,
        held=held,
        image=image_shape(data),
        vae=vae,
    )


def _open_folder(path: Path) -> Product:
    from fewstep.networks.diffusers import load_denoiser
    from fewstep.networks.folder import read_folder

    note, folder = read_note(path), read_folder(str(path))
    kind = folder.index.get("_class_name")
    if kind in CONTROLNET_PIPELINES:  # whose UNet by itself would open as another pipeline's
        raise UserError(
            f"{path}: makes samples from a picture; draw from it with diffusers' {kind}, as its card shows, or open the "
            "run that it was exported from"
        )
    net = load_denoiser(str(path), classes=note.classes, size=note.size)
    folder.require_agreement()
    wrapper: Any = net.net
    if wrapper.image_channels:
        raise UserError(
            f"{path}: makes samples from a picture; draw from it with diffusers' {wrapper.pipeline}, as its card shows, "
            "or open the run that it was exported from"
        )
    if "text" in wrapper.needs:
        raise UserError(f"{path}: takes text; draw from it with diffusers' {wrapper.pipeline}, as its card shows")
    shape = (wrapper.channels(), *(note.size or wrapper.sample_size()))
    classes = int(wrapper.classes)
    if note.sampler is None:
        return Product(net, many_step(18), shape, classes, path.name, None)
    return Product(net, note.sampler, shape, classes, path.name, (len(note.sampler.steps),))


def _open_fit(path: Path) -> Product:
    fitted = read_fit(path)
    if fitted.of == "recipe":
        recipe = load_run(path)
        code.allow_made_here(path, recipe)
        product = teacher_of(recipe, path.name)
    else:
        product = open_product(resolve(fitted.source))
    now = digest(fitted.of, fitted.source, product.recipe)
    changed = [] if now == fitted.digest else [f"the teacher of {path} has changed since the fit; {AGAIN}"]
    product = guided_product(product, fitted.guidance)
    first = max(fitted.samplers, key=lambda s: len(s.steps))
    product = replace(product, sampler=first, trained=fitted.counts, fitted=fitted)
    return replace(product, title=path.name, changed=(*product.changed, *changed))


def teacher_beside(recipe: Recipe, data: Any, title: str, checkpoint: Path | None = None) -> Any:
    """The teacher of a recipe, in evaluation; one that a stage before fills has the weights of a checkpoint.

    UserError where such a one has no checkpoint, or it was saved before the stage that fills the teacher had begun.
    """
    net: Any = build_roles(recipe, data).teacher
    if recipe.fills_teacher():
        if checkpoint is None:
            raise UserError(f"{title}: its teacher is trained by a run of it and has no weights before; name the run")
        progress, _ = read_state(checkpoint)
        filling = next(i for i, stage in enumerate(recipe.stages()) if "teacher" in stage.copy)
        if (progress.stage, progress.step) <= (filling, 0):
            raise UserError(f"{title}: its teacher is not trained yet at {checkpoint.name}; let the run go on")
        file = checkpoint / "teacher.safetensors"
        load_into(net, load_tensors(file), file)
    return net.eval()


def teacher_of(recipe: Recipe, title: str) -> Product:
    """The teacher that a recipe names, as a product on its data."""
    data: Any = recipe.data.open()
    net = teacher_beside(recipe, data, title)
    return replace(product_of(recipe, net.eval(), data, title), sampler=many_step(18), trained=None)


def guided_product(product: Product, scale: float) -> Product:
    """The product with a guidance scale inside its net; 1 is none. UserError where it has no null condition."""
    return product if scale == 1 else replace(product, net=Guided(product.net, scale, null_of(product)))


def null_of(product: Product) -> Callable[[Any], Any]:
    """From conditions to null conditions, of a product whose data knows them or whose network has a null class.

    Raises:
        UserError: it has neither.
    """
    network: Any = getattr(product.net, "net", None)
    embedded = getattr(getattr(network, "config", None), "num_class_embeds", None)
    data: Any = None if product.recipe is None else product.recipe.data.open()
    text = product.prompted is not None and (image_shape(data) is None or "text" in product.prompted(1))
    known = text or (product.classes and not (embedded is not None and embedded <= product.classes))
    if not known:
        raise UserError(f"{product.title}: has no null class, so there is no guidance of it; leave --guidance at 1")
    return data.null if data is not None else partial(nulled, empty=product.classes)
