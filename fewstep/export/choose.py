"""What a product is written as: one network of pixels, a latent pipeline, several networks, a teacher."""

from __future__ import annotations

from pathlib import Path

from fewstep.config import UserError
from fewstep.export.base import Exported, ExportRefused, Parts, Rows, write_checked
from fewstep.export.experts import routed_parts
from fewstep.export.fitted import fitted_parts
from fewstep.export.image_to_image import begun, refused
from fewstep.export.latent import latent_parts, wrapped
from fewstep.export.routes import check_drawn
from fewstep.export.teacher import teacher_parts
from fewstep.export.unet import unet_parts
from fewstep.networks.diffusers import DTYPES
from fewstep.networks.lora_formats import FORMATS
from fewstep.networks.routed import Routed
from fewstep.networks.unet2d import UNet2D
from fewstep.train.product import Product


def export(
    product: Product,
    folder: Path,
    *,
    results: Rows = (),
    shown: str | None = None,
    dtype: str = "fp32",
    variant: bool = False,
    image_to_image: float | None = None,
) -> Exported:
    """Write a folder that `DiffusionPipeline.from_pretrained` opens, or nothing at all.

    Students that are several networks are written as `fewstep.export.experts` says, teachers as
    `fewstep.export.teacher` does. Errors as `parts_of`, arguments and further errors as `write_checked`.
    """
    return write_checked(parts_of(product, dtype, variant, image_to_image), folder, results=results, shown=shown)


def check_options(
    lora: bool, dtype: str, layout: str, variant: bool, image_to_image: float | None = None, *, python: bool = False
) -> None:
    """UserError for options of an export that are none, or do not go together; python: named as arguments."""
    dash, form = ("", "format") if python else ("--", "--format")
    if layout != "diffusers" and not lora:
        raise UserError(f"{form}: is the layout of an adapter's file; add {dash}lora")
    if layout not in FORMATS:
        raise UserError(f"{form} {layout!r}: is not one of {', '.join(FORMATS)}")
    if dtype not in DTYPES or (lora and dtype != "fp32"):
        raise UserError(f"{dash}dtype {dtype!r}: is not one of {', '.join(DTYPES)}; an adapter's file is float32")
    if image_to_image is not None and lora:
        told = "image_to_image" if python else "--image-to-image"
        raise UserError(f"{told}: an adapter is loaded into any pipeline of its base; leave out one of the two")
    if variant and (lora or dtype == "fp32"):
        raise UserError(f"{dash}variant: names files after a dtype of half precision; add {dash}dtype fp16 or bf16")


def parts_of(product: Product, dtype: str = "fp32", variant: bool = False, image_to_image: float | None = None) -> Parts:
    """What an opened run is written as.

    Args:
        dtype: of its weights, for a student of a text or latent pipeline.
        variant: their files are named after it.
        image_to_image: trained level from which it goes on, with a picture noised to it; left out: from noise.

    Raises ExportRefused, with everything known beforehand, when no stock pipeline can run it, and UserError for a
    teacher's folder that misses something and for a scheduler at other levels than the sampler's. Weights are not
    read, and nothing is refused later but what `write_checked` names.
    """
    if product.recipe is None and product.fitted is None:
        raise ExportRefused(f"{product.title} is not a run of fewstep")
    latent = product.fitted is None and wrapped(product.net) and product.sampler.kind != "ode"
    if dtype != "fp32" and not latent:
        raise ExportRefused(f"--dtype {dtype}: is for students of a text or latent pipeline; leave it out")
    if image_to_image is not None and (not latent or isinstance(product.net, Routed)):
        raise _from_no_picture(product, image_to_image)
    if product.fitted is not None:
        return fitted_parts(product)
    if product.sampler.kind == "ode":
        return teacher_parts(product)
    check_drawn(product.sampler)
    if len(product.shape) == 2:
        raise ExportRefused(
            f"samples of {list(product.shape)} are points, which no stock pipeline draws; fewstep.open_product(RUN).draw "
            "gives them as a tensor"
        )
    if isinstance(product.net, Routed):
        return routed_parts(product, parts_of)
    if latent:
        return latent_parts(product, dtype, variant=variant, level=image_to_image)
    return unet_parts(product)


def _from_no_picture(product: Product, level: float) -> ExportRefused:
    if product.fitted is not None or product.sampler.kind == "ode":
        return ExportRefused(
            "image_to_image is for a student; a teacher's own pipeline goes on from pictures at any level"
        )
    if isinstance(product.net, Routed):
        raise refused(
            "a student of several networks is written as a pipeline for each group of classes or as a loader, and none "
            "of these goes on from a picture",
            begun(product, level).sampler,
        )
    why = f"no stock pipeline noises a picture for a {type(getattr(product.net, 'net', product.net)).__name__} student"
    if isinstance(getattr(product.net, "net", None), UNet2D) and product.shape[0] == 3:
        why += (
            "; export it from a recipe whose steps begin there, and hand ConsistencyModelPipeline the picture noised, "
            "latents=image / sigma + torch.randn_like(image), sigma the scheduler's sigma_max"
        )
    return refused(why, begun(product, level).sampler)
