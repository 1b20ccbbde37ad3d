"""`fewstep eval` by a preset that measures nothing: the folder that another package's evaluator reads."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.commands.judge import check_fit, refusals
from fewstep.commands.processes import world
from fewstep.commands.report import console
from fewstep.commands.request import Request
from fewstep.commands.sources import PIPELINE_BATCH, of_pipeline
from fewstep.config import UserError
from fewstep.eval.protocol.preset import Preset, require_files
from fewstep.eval.protocol.prompts import export_images, places, prompts_of


def write_images(preset: Preset, request: Request, steps: Sequence[int]) -> None:
    """Write the preset's images of a diffusers folder to --out; goes on where it was stopped."""
    path, out = request.path, request.out
    if path is None or not (path / "model_index.json").is_file():
        raise UserError(f"preset {preset.name}: writes images of a diffusers folder; give the path of one")
    if out is None:
        raise UserError(f"preset {preset.name}: only writes images; say where with --out FOLDER")
    unused = {"--report": request.report, "--omit": request.omit, "--clip-path": request.clip_path}
    unused |= {"--extractor-path": request.extractor_path, "--allow-skips": request.allow_skips}
    unused |= {"--teacher": request.teacher, "--assist": request.assist}
    unused |= {"--adapter": request.adapter, "--attribute": request.attribute}
    for option, value in unused.items():
        if value:
            raise UserError(f"{option}: preset {preset.name} measures nothing, it writes images for another package")
    if len(steps) > 1:
        raise UserError(f"--steps: preset {preset.name} writes one set of images; give one number")
    with refusals():
        file = require_files(preset)["prompts"]
        prompts = prompts_of(preset, file)
        places(preset, out)
        with world() as (place, barrier):
            model = of_pipeline(
                preset,
                path,
                steps=steps,
                call=request.call or (),
                prompts=prompts,
                device=place.device,
                check=lambda shape: check_fit(preset, shape, None, str(path)),
                any_steps=request.any_steps,
            )[0]
            made = export_images(
                preset,
                file,
                out,
                model.generate(0),
                batch_size=request.batch or PIPELINE_BATCH,
                rank=place.rank,
                world_size=place.size,
            )
            barrier()
            if place.main:
                console.print(f"{out}: {preset.number} images there, {made} made now by this process")
