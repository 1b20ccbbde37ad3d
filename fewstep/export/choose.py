"""What a product is written as: one network of pixels, a latent pipeline, several networks, a teacher."""

from __future__ import annotations

from pathlib import Path

from fewstep.export.base import Exported, ExportRefused, Parts, Rows, write_checked
from fewstep.export.experts import routed_parts
from fewstep.export.fitted import fitted_parts
from fewstep.export.latent import latent_parts, wrapped
from fewstep.export.teacher import teacher_parts
from fewstep.export.unet import unet_parts
from fewstep.networks.routed import Routed
from fewstep.train.product import Product


def export(
    product: Product, folder: Path, *, results: Rows = (), shown: str | None = None, dtype: str = "fp32"
) -> Exported:
    """Write a folder that `DiffusionPipeline.from_pretrained` opens, or nothing at all.

    Students that are several networks are written as `fewstep.export.experts` says, teachers as
    `fewstep.export.teacher` does. Errors as `parts_of`, arguments and further errors as `write_checked`.
    """
    return write_checked(parts_of(product, dtype), folder, results=results, shown=shown)


def parts_of(product: Product, dtype: str = "fp32") -> Parts:
    """What an opened run is written as; dtype: of its weights, for a student of a text or latent pipeline.

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
    if isinstance(product.net, Routed):
        return routed_parts(product, parts_of)
    return latent_parts(product, dtype) if latent else unet_parts(product)
