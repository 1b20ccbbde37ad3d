"""What `fewstep eval` can be asked for: the fields are its options, with their help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from typer import Argument, Option

from fewstep.config import UserError


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of `fewstep eval`; None and False stand for what was not asked for."""

    path: Annotated[Path | None, Argument(help="A run directory, an export or a diffusers folder.")] = None
    preset: Annotated[
        str | None, Option(help="A protocol, shipped or a YAML file; left out: the run's own `evaluate`.")
    ] = None
    against: Annotated[
        str | None,
        Option(help="Compare with a folder of real pictures, a statistics file (.npz) or `data`, the run's own."),
    ] = None
    features: Annotated[
        str | None, Option(help="With --against: effnet-lite0 (default), inception, dinov2, clip[:ARCHITECTURE], house.")
    ] = None
    images: Annotated[Path | None, Option(help="Measure the images of this folder instead of sampling.")] = None
    steps: Annotated[str | None, Option(help="Network calls (a teacher: Heun steps), such as 1,2,4.")] = None
    any_steps: Annotated[bool, Option("--any", help="Allow a number of steps the student was not trained for.")] = False
    assist: Annotated[
        str | None, Option(help="Measure a run also with its teacher's help, such as diversity:substeps=5.")
    ] = None
    adapter: Annotated[
        Path | None,
        Option(help="Measure a run, and its teacher with --teacher, also with the adapter of this LoRA file or run."),
    ] = None
    adapter_scale: Annotated[float, Option(help="Factor on its update.")] = 1.0
    attribute: Annotated[
        str | None,
        Option(help="Read ink or house-classifier of every sample; with --adapter and --teacher the transfer ratio."),
    ] = None
    teacher: Annotated[str | None, Option(help="Measure a run's teacher too, at these Heun steps, such as 1,12.")] = None
    samples: Annotated[
        int | None, Option(min=2, max=10_000_000, help="Number of samples; another one is another protocol.")
    ] = None
    seed: Annotated[int | None, Option(help="Seed of the noise; a named preset has its own.")] = None
    batch: Annotated[int | None, Option(min=1, help="Images of one call [default: 256 of a run, 64 of a pipeline].")] = (
        None
    )
    call: Annotated[list[str] | None, Option(help="An argument of the pipeline's call.", metavar="KEY=VALUE")] = None
    omit: Annotated[list[str] | None, Option(help="A metric of the preset to leave out.", metavar="METRIC")] = None
    allow_skips: Annotated[bool, Option("--allow-skips", help="Leave out images that do not fit, and list them.")] = False
    extractor_path: Annotated[Path | None, Option(help="Weights of the preset's feature network.")] = None
    clip_path: Annotated[Path | None, Option(help="open-clip checkpoint of the preset's CLIP score.")] = None
    report: Annotated[Path | None, Option(help="Folder for report.html and report.json.")] = None
    out: Annotated[Path | None, Option(help="Folder of the images that geneval and hpsv2 write.")] = None
    list_presets: Annotated[bool, Option("--list-presets", help="Name the presets that ship, and what each needs.")] = (
        False
    )
    selftest: Annotated[bool, Option("--selftest", help="Check the harness itself on this machine.")] = False

    PANELS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("preset", "images", "teacher", "samples", "seed", "omit", "allow_skips"), "What is measured"),
        "attribute": "What is measured",
        **dict.fromkeys(("steps", "any_steps", "assist", "batch", "call"), "How samples are drawn"),
        **dict.fromkeys(("adapter", "adapter_scale"), "How samples are drawn"),
        **dict.fromkeys(("extractor_path", "clip_path"), "Networks"),
        **dict.fromkeys(("report", "out"), "What is written"),
    }
    """The options by the panels of the help."""

    def __post_init__(self) -> None:
        # Here, before the command imports torch, which takes seconds.
        if self.selftest or self.list_presets:
            return
        if (self.path is None) == (self.images is None):
            raise UserError(
                "eval: give a run, an export or a diffusers folder, or --images FOLDER with --against or --preset"
            )
        if self.images is not None and self.preset is None and self.against is None and self.features is None:
            raise UserError(
                "--images: nothing says how to measure this; give --against FOLDER with real pictures, or --preset NAME, "
                "of those that --list-presets names"
            )
        if not math.isfinite(self.adapter_scale) or (self.adapter is None and self.adapter_scale != 1):
            raise UserError(f"--adapter-scale {self.adapter_scale:g}: is a number, of the adapter that --adapter names")
        if self.seed is not None and self.preset is not None:
            raise UserError("--seed: a preset has seeds of its own; another seed is another protocol")
