"""Students that go on from a picture, noised to a trained level: their family's stock image-to-image pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.condition import checked
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import Flow
from fewstep.algebra.sampling import Sampler, sample
from fewstep.export.base import ExportRefused, Stock
from fewstep.export.card import as_code, opening
from fewstep.export.routes import begun_stock, plain_kind
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.wrappers import Wrapper
from fewstep.train.product import Product

PIPELINES: Mapping[str, str] = {
    "FluxPipeline": "FluxImg2ImgPipeline",
    "IFPipeline": "IFImg2ImgPipeline",
    "StableDiffusion3Pipeline": "StableDiffusion3Img2ImgPipeline",
    "StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLImg2ImgPipeline",
    "ZImagePipeline": "ZImageImg2ImgPipeline",
}
"""Of a pipeline of text the one that starts from a picture; AutoPipelineForImage2Image opens its folder too."""

LOOP = """draw with the loop, image (b, c, h, w) being pictures in [-1, 1], or their latents:
    product = fewstep.open_product(RUN)
    noise, fresh = fewstep.seeded(0, torch.arange(len(image)), product.shape)
    sampler = dataclasses.replace(product.sampler, steps={steps})
    t = product.net.process.grid(torch.full((len(image),), {level:g}, dtype=torch.float64))
    start, _ = fewstep.add_noise(product.net.process, image, noise, t)
    x = fewstep.sample(sampler, product.net, noise, cond, fresh, start=start)"""


def begun(product: Product, level: float) -> Product:
    """The product whose steps are those from a trained level on. UserError for another level than a trained one."""
    steps = product.sampler.steps
    within = [u for u in steps if u < 1]
    first = next((i for i, u in enumerate(steps) if abs(u - level) < 1e-9), None)
    if not within or first is None or steps[first] not in within:
        allowed = f"one of {', '.join(f'{u:g}' for u in within)}" if within else "a student with a step below 1"
        raise ExportRefused(
            f"image_to_image {level:g}: a student answers well at its trained levels alone, and at 1 nothing is left of "
            f"a picture; expected {allowed}"
        )
    kept, history = steps[first:], product.sampler.history
    return replace(product, sampler=replace(product.sampler, steps=kept, counts=None, lists=(), history=history[first:]))


def refused(why: str, sampler: Sampler) -> ExportRefused:
    """A refusal that says how to draw without a stock pipeline."""
    steps = tuple(float(f"{u:.9g}") for u in sampler.steps)
    return ExportRefused(f"{why}; {LOOP.format(steps=steps, level=steps[0])}")


def image_to_image_stock(net: Denoiser, sampler: Sampler, name: str) -> Stock:
    """The scheduler that takes a student's steps in the image-to-image pipeline of a pipeline of text.

    sampler: as `begun` leaves it. Raises ExportRefused, with the loop that draws, where there is none.
    """
    wrapper: Any = net.net
    if wrapper.image_channels:
        raise refused("this student is made from a picture already, and no stock pipeline takes a second one", sampler)
    if name not in PIPELINES:
        raise refused(f"diffusers has no image-to-image pipeline of {name} that visits levels of ours", sampler)
    side = getattr(wrapper.config, "sample_size", None)
    if name == "StableDiffusionPipeline" and not isinstance(side, int):
        raise refused(f"StableDiffusionImg2ImgPipeline opens no UNet whose sample_size is {side}, two numbers", sampler)
    try:
        stock = _flow(net, sampler) if isinstance(net.process, Flow) else begun_stock(net, sampler)
    except ExportRefused as refusal:
        raise refused(str(refusal), sampler) from None
    # A strength below 1 would leave out the first of the levels that are given.
    return replace(stock, call={**stock.call, "strength": 1.0}, levels=stock.visits)


def _flow(net: Denoiser, sampler: Sampler) -> Stock:
    process: Any = net.process
    kind, n = plain_kind(sampler, process), len(sampler.steps)
    if net.prediction not in ("velocity", "psi") or net.time_input != "1000t":
        raise ExportRefused(f"prediction {net.prediction!r} with time input {net.time_input!r} is in no stock scheduler")
    times = process.grid(torch.tensor(sampler.steps, dtype=torch.float64)).tolist()
    config = {"shift": 1.0, "stochastic_sampling": kind == "renoise" and n > 1}
    written = Sampler(kind="renoise" if kind == "renoise" else "map", steps=tuple(times))
    return Stock("FlowMatchEulerDiscreteScheduler", config, {"sigmas": [float(f"{t:.9g}") for t in times]}, written)


def taken(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of a call that a pipeline takes: some have height and width from the picture."""
    import diffusers

    known = inspect.signature(getattr(diffusers, name).__call__).parameters
    return {k: v for k, v in settings.items() if k in known}


def image_usage(name: str, call: Mapping[str, Any], shape: tuple[int, ...], folder: str, **named: str) -> str:
    """Lines of plain diffusers code that go on from a picture of a shape (c, h, w) in pixels, a file's or a tensor."""
    colours, high, wide = shape
    if colours == 3 and name != "IFImg2ImgPipeline":
        more, given = ", utils", f'utils.load_image("yours.png").resize(({wide}, {high}))'
    else:  # the pipeline makes colours of every file, IF's also sides that are multiples of 8
        more, given = "", f"torch.zeros(1, {colours}, {high}, {wide})  # yours, in [-1, 1]"
    lines = opening(name, folder, **named).replace(f"import {name}", f"import {name}{more}")
    start = "" if more else "import torch\n"
    return f'{start}{lines}image = {given}\npipe(image=image, {as_code(call)}).images[0].save("sample.png")'


@torch.no_grad()
def run_from(pipe: Any, net: Wrapper, picture: Tensor, cond: Any, levels: Mapping[str, Any], seed: int = 0) -> Tensor:
    """`run_stock` from a picture (b, c, h, w), or its latents, that the pipeline noises itself."""
    size = tuple(picture.shape[2:])
    given = checked(cond, net.wanted, net.takes, type(net.model).__name__)
    pixels = not any(key.startswith("vae_scale_factor") for key in vars(pipe))
    scale = net.pixels if net.pixels > 1 or pixels else pipe.vae_scale_factor
    sides = {"height": size[0] * scale, "width": size[1] * scale}
    call = {**net.plain, **net.arguments(given, size), **net.of_size(size), **sides, **levels}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = pipe(image=picture, output_type="pt" if pixels else "latent", **taken(type(pipe).__name__, call))
    return out.images if pixels else net.drawn(out.images, size, pipe)


@torch.no_grad()
def draw_from(net: Any, sampler: Sampler, wrapper: Wrapper, picture: Tensor, cond: Any, seed: int = 0) -> Tensor:
    """What fewstep's own sampler makes of it with the same noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(picture.shape, generator=generator)
    first = torch.full((len(picture),), sampler.steps[0], dtype=torch.float64)
    start, _ = add_noise(net.process, picture, noise, net.process.grid(first))
    size, shape = tuple(picture.shape[2:]), wrapper.stepped(picture).shape

    def fresh(_: int) -> Tensor:
        return wrapper.unstepped(torch.randn(shape, generator=generator), size)

    return sample(sampler, net, noise, cond, fresh, start=start)
