"""`fewstep export`: a run as a folder that plain diffusers opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.commands.report import card_peak, card_results, console, opened, read_results
from fewstep.config import UserError
from fewstep.export.base import Exported, ExportRefused
from fewstep.export.choose import check_options, export
from fewstep.export.levels import check_product
from fewstep.train.log import read_log
from fewstep.train.peak import peak
from fewstep.train.product import Product


def show_export(done: Exported) -> None:
    checked = f", within {done.parity:.1e} of fewstep's sampler" if done.parity else ""
    console.print(f"exported to {done.folder}{checked}; load it with", soft_wrap=True, highlight=False)
    for line in done.usage.splitlines():
        console.print(f"    {line}", highlight=False, soft_wrap=True)


def export_run(
    run: Path,
    out: Path | None,
    force: bool,
    lora: bool = False,
    layout: str = "diffusers",
    dtype: str = "fp32",
    steps: int | None = None,
    variant: bool = False,
    image_to_image: float | None = None,
) -> Exported:
    """`fewstep export`; with `lora` the adapter alone, in a layout of `lora_formats.FORMATS`; steps: of a fit.

    dtype, variant, image_to_image: see `fewstep.export.choose.parts_of`.
    """
    check_options(lora, dtype, layout, variant, image_to_image)
    product = opened(run)
    if product.fitted is None and product.recipe is None:
        raise UserError(f"{run}: is a diffusers folder already; export takes a run directory")
    if steps is not None and product.fitted is None and not product.sampler.lists:
        raise UserError(
            f"--steps: is for a folder by `fewstep fit` and for students of several lists of steps; {run} is exported at "
            "its trained levels"
        )
    if lora and product.fitted is not None:
        raise UserError(f"--lora: {run} is a fit of a frozen teacher; it has no adapter")
    product = product.with_steps(steps)
    many = f"-{steps}" if steps is not None and product.sampler.lists else ""
    kind = "lora" if lora else "export" if image_to_image is None else "image-to-image"
    folder = out or run / f"{kind}{many}"
    if folder.exists() and any(folder.iterdir()) and not force and out is not None:
        raise UserError(f"{folder}: exists; overwrite it with --force")
    form = {"dtype": dtype, "variant": variant, "image_to_image": image_to_image}
    try:
        return _export_lora(product, folder, layout) if lora else _export(product, run, folder, form)
    except ExportRefused as refusal:
        raise UserError(f"{run}: not exported: {refusal}") from None


def _export_lora(product: Product, folder: Path, layout: str) -> Exported:
    from fewstep.export.lora import export_lora

    done = export_lora(product, folder, layout)
    lines = done.usage.replace("\n", "\n    ")
    console.print(f"adapter in {done.folder}; load it with\n    {lines}", highlight=False, soft_wrap=True)
    return done


def _export(product: Product, run: Path, folder: Path, form: dict[str, Any]) -> Exported:
    rows: list[tuple[str, str]] = []
    results = run / "report" / "results.json"
    # What was measured there draws from noise by all steps; a pipeline that goes on from a picture is another sampler.
    if results.is_file() and form["image_to_image"] is None:
        rows = card_results(read_results(results))
    rows += card_peak(peak(read_log(run / "log.jsonl")))
    check_product(product)
    done = export(product, folder, results=rows, **form)
    show_export(done)
    return done
