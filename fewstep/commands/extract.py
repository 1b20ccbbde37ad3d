"""`fewstep extract`: a student that was trained whole as a LoRA set on its teacher, and what that loses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.commands.product import Product, open_product
from fewstep.config import UserError
from fewstep.export.base import ExportRefused
from fewstep.export.lora import export_lora
from fewstep.networks.adapters import Adapted, network_of
from fewstep.networks.low_rank import Kept, extracted
from fewstep.networks.parts import Site
from fewstep.networks.routed import Routed


def extract(
    run: Path,
    rank: int,
    out: Path | None = None,
    layout: str = "diffusers",
    *,
    measure: bool = False,
    force: bool = False,
) -> Iterator[str]:
    """Lines of what was kept and, with `out`, written; then, with `measure`, the distances of the run's own metric.

    force: overwrite an export that `out` holds.

    UserError for a run whose student is no whole network of its teacher's kind, for one into which diffusers loads no
    LoRA file, and for a folder that is not empty.
    """
    if out is not None and out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists; overwrite it with --force")
    product = open_product(run)
    adapted, kept = adapter_of(product, run, rank)
    keeps = (
        f"keeps {100 * kept.layers:.1f} % of the squared difference of {len(adapted.own) // 2} layers, "
        f"{100 * kept.whole:.1f} % of that of all weights"
    )
    yield f"rank {rank}: {keeps}"
    found = replace(product, net=adapted)
    if out is not None:
        row = ("extracted from a student that was trained whole", f"rank {rank} {keeps}")
        noted = {"extracted": {"rank": rank, "kept_of_layers": kept.layers, "kept_of_all": kept.whole}}
        try:
            done = export_lora(found, out, layout, told=[row], noted=noted)
        except ExportRefused as refusal:
            raise UserError(f"{run}: no file: {refusal}") from None
        yield f"adapter in {done.folder}; load it with"
        yield from (f"    {line}" for line in done.usage.splitlines())
    if measure:
        yield _measured(product, found)


def _measured(product: Product, found: Product) -> str:
    """The distances of a student and of its LoRA set, or why there are none."""
    try:
        one, other = product.evaluate(), found.evaluate()
    except UserError as error:
        return f"not measured: {error}"
    values = f"{one.distance.value:.4g} the student, {other.distance.value:.4g} its LoRA set on the teacher"
    return f"{one.preset}, {one.number} samples: {values}"


def adapter_of(product: Product, run: Path, rank: int) -> tuple[Adapted, Kept]:
    """The student of a run as an adapter on its teacher; errors as `extract`."""
    recipe, net = product.recipe, product.net
    spec: Any = recipe.teacher if recipe else None
    if rank < 1:
        raise UserError(f"--rank {rank}: must be at least 1")
    if spec is None or recipe is None:
        raise UserError(f"{run}: has no teacher whose weights an adapter could sit on")
    if isinstance(net, Adapted):
        raise UserError(f"{run}: its student is an adapter already; write it with `fewstep export {run} --lora`")
    if isinstance(net, Routed) or getattr(net, "inputs", ()):
        kind = "several networks" if isinstance(net, Routed) else f"told {', '.join(net.inputs)} beside the time"  # type: ignore[arg-type]
        raise UserError(f"{run}: its student is {kind}, which an adapter on the teacher cannot be; export it whole")
    teacher = spec.build(Site(product.shape, product.classes, {}, 0))
    try:
        network_of(teacher)
    except ValueError as error:
        raise UserError(f"{run}: {error}") from None
    return extracted(teacher.float(), net, rank)
