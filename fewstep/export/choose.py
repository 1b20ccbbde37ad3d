"""What a product is written as: one network of pixels, a latent pipeline, several networks, a teacher."""

from __future__ import annotations

from pathlib import Path

from fewstep.config import UserError
from fewstep.export.base import Exported, ExportRefused, Parts, Rows, write_checked
from fewstep.export.experts import routed_parts
from fewstep.export.fitted import fitted_parts
from fewstep.export.latent import latent_parts, wrapped
from fewstep.export.teacher import teacher_parts
from fewstep.export.unet import unet_parts
from fewstep.networks.diffusers import DTYPES
from fewstep.networks.lora_formats import FORMATS
from fewstep.networks.routed import Routed
from fewstep.train.product import Product


def export(
    product: Product,
    folder: Path,
    *,
    results: Rows = (),
    shown: str | None = None,
    dtype: str = "fp32",
    variant: bool = False,
) -> Exported:
    """Write a folder that `DiffusionPipeline.from_pretrained` opens, or nothing at all.

    Students that are several networks are written as `fewstep.export.experts` says, teachers as
    `fewstep.export.teacher` does. Errors as `parts_of`, arguments and further errors as `write_checked`.
    """
    return write_checked(parts_of(product, dtype, variant), folder, results=results, shown=shown)


def check_options(lora: bool, dtype: str, layout: str, variant: bool, *, python: bool = False) -> None:
    """UserError for options of an export that are none, or do not go together; python: named as arguments."""
    dash, form = ("", "format") if python else ("--", "--format")
    if layout != "diffusers" and not lora:
        raise UserError(f"{form}: is the layout of an adapter's file; add {dash}lora")
    if layout not in FORMATS:
        raise UserError(f"{form} {layout!r}: is not one of {', '.join(FORMATS)}")
    if dtype not in DTYPES or (lora and dtype != "fp32"):
        raise UserError(f"{dash}dtype {dtype!r}: is not one of {', '.join(DTYPES)}; an adapter's file is float32")
    if variant and (lora or dtype == "fp32"):
        raise UserError(f"{dash}variant: names files after a dtype of half precision; add {dash}dtype fp16 or bf16")


def parts_of(product: Product, dtype: str = "fp32", variant: bool = False) -> Parts:
    """What an opened run is written as.

    Args:
        dtype: of its weights, for a student of a text or latent pipeline.
        variant: their files are named after it.

    Raises ExportRefused, with everything known beforehand, when no stock pipeline can run it, and UserError for a
    teacher's folder that misses something and for a scheduler at other levels than the sampler's. Weights are not
    read, and nothing is refused later but what `write_checked` names.
    """
    if product.recipe is None and product.fitted is None:
        raise ExportRefused(f"{product.title} is not a run of fewstep")
    latent = product.fitted is None and wrapped(product.net) and product.sampler.kind != "ode"
    if dtype != "fp32" and not latent:
        raise ExportRefused(f"--dtype {dtype}: is for students of a text or latent pipeline; leave it out")
    if product.fitted is not None:
        return fitted_parts(product)
    if product.sampler.kind == "ode":
        return teacher_parts(product)
    if product.sampler.dynamic is not None and len(product.sampler.steps) > 1:
        raise ExportRefused(
            "dynamic guidance hands the student another scale at each step, which no stock pipeline does; "
            "set method.dynamic=null for one scale"
        )
    if product.sampler.noise_scale != 1:
        raise ExportRefused(
            f"noise_scale {product.sampler.noise_scale:g}: scales the noise of every step, which no stock scheduler "
            "does; set method.noise_scale=1"
        )
    if len(product.shape) == 2:
        raise ExportRefused(
            f"samples of {list(product.shape)} are points, which no stock pipeline draws; fewstep.open_product(RUN).draw "
            "gives them as a tensor"
        )
    if isinstance(product.net, Routed):
        return routed_parts(product, parts_of)
    return latent_parts(product, dtype, variant=variant) if latent else unet_parts(product)
