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


def export(product: Product, folder: Path, *, results: Rows = (), shown: str | None = None) -> Exported:
    """Write a folder that `DiffusionPipeline.from_pretrained` opens, or nothing at all.

    Students that are several networks are written as `fewstep.export.experts` says, teachers as
    `fewstep.export.teacher` does. Errors as `parts_of`, arguments and further errors as `write_checked`.
    """
    return write_checked(parts_of(product), folder, results=results, shown=shown)


def parts_of(product: Product) -> Parts:
    """What an opened run is written as.

    Raises ExportRefused, with everything known beforehand, when no stock pipeline can run it, and UserError for a
    teacher's folder that misses something and for a scheduler at other levels than the sampler's. Weights are not
    read, and nothing is refused later but what `write_checked` names.
    """
    if product.recipe is None and product.fitted is None:
        raise ExportRefused(f"{product.title} is not a run of fewstep")
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
    return latent_parts(product) if wrapped(product.net) else unet_parts(product)
