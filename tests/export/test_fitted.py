"""A fit leaves as its teacher's stock pipeline where that takes its levels, and as a loop on its card everywhere."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from snippets import check_call
from tiny_pipelines import FAMILIES, make_pipeline
from tiny_teacher import tiny_unet
from torch import Tensor

from fewstep.algebra.fitted import multistep
from fewstep.algebra.guidance import Guided
from fewstep.algebra.process import EDM, DiscreteVP, Flow
from fewstep.algebra.sampling import Sampler, sample
from fewstep.export.base import ExportRefused
from fewstep.export.choose import export
from fewstep.export.fitted import fit_card, loop_of
from fewstep.networks.analytic import gaussian
from fewstep.networks.diffusers import load_denoiser
from fewstep.train.fitted import Fitted
from fewstep.train.note import read_note
from fewstep.train.product import Product, open_product

LEVELS = (1.0, 0.688, 0.344, 0.125)
PLAIN = Sampler(kind="map", steps=LEVELS)
TABLES = ("sd15", "sdxl", "pixart")


def fit_of(folder: Path, net: Any, shape: tuple[int, ...], sampler: Sampler, **more: Any) -> Product:
    told = {"digest": "", "guidance": 1.0, "solver": "ddim", "points": 32, "noises": 60, "seed": 7}
    fitted = Fitted(of="folder", source=str(folder), samplers=(sampler,), **told | more)  # type: ignore[arg-type]
    return Product(net, sampler, shape, 0, "fitted", fitted.counts, fitted=fitted)


def pipeline_fit(folder: Path, name: str, sampler: Sampler, **more: Any) -> Product:
    make_pipeline(folder, name)
    shape = FAMILIES[name].shape
    return fit_of(folder, load_denoiser(str(folder), size=shape[1:], guidance=2.5), shape, sampler, **more)


def two_m(process: Any) -> Sampler:
    return Sampler(kind="map", steps=LEVELS, history=multistep(process, LEVELS))


@pytest.mark.parametrize("name", [*TABLES, "sd3", "flux"])
def test_searched_levels_are_drawn_alike_by_the_stock_pipeline(tmp_path: Path, name: str):
    product = pipeline_fit(tmp_path / "teacher", name, PLAIN)
    done = export(product, tmp_path / "out")
    assert 0 < done.parity < 1e-5
    check_call(done.usage)
    assert read_note(tmp_path / "out").sampler is not None
    assert "fitted to a frozen teacher without training" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", TABLES)
def test_dpm_solver_on_them_too(tmp_path: Path, name: str):
    product = pipeline_fit(tmp_path / "teacher", name, Sampler(), solver="2m", guidance=3.0)
    product = replace(product, sampler=two_m(product.net.process))
    # The scale is the pipeline's own; the network inside is compared without it.
    product = replace(product, net=Guided(product.net, 3.0, lambda cond: cond))
    done = export(product, tmp_path / "out")
    assert 0 < done.parity < 1e-5
    assert read_note(tmp_path / "out").settings["guidance_scale"] == 3.0
    assert "guidance_scale=3.0" in done.usage
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "DPMSolverMultistepScheduler"
    with torch.no_grad():
        plain, own = (sample(s, product.net.denoiser, *start_of(product)) for s in (PLAIN, product.sampler))
    assert float((plain - own).abs().max()) > 1e-3


def start_of(product: Product) -> tuple[Tensor, Any]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *product.shape, generator=generator)
    return noise, product.net.denoiser.net.example(2, generator)  # type: ignore[union-attr,operator]


def test_an_exported_history_opens_as_it_was(tmp_path: Path):
    import diffusers as d

    d.DDPMPipeline(unet=tiny_unet(0, 3), scheduler=d.DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    sampler = two_m(DiscreteVP())
    net = open_product(tmp_path / "teacher").net
    product = fit_of(tmp_path / "teacher", net, (1, 8, 8), sampler, solver="2m")
    assert 0 < export(product, tmp_path / "out").parity < 2e-5  # float32: 1.03e-5 on one kind of CPU
    assert open_product(tmp_path / "out").sampler == sampler
    with pytest.raises(ExportRefused, match=r"no stock pipeline guides a UNet2DModel.*README\.md"):
        export(replace(product, fitted=replace(product.fitted, guidance=2.0)), tmp_path / "other")  # type: ignore[type-var]


def test_what_no_pipeline_takes_is_refused_with_what_remains(tmp_path: Path):
    free = Sampler(kind="map", steps=LEVELS, history=(0.0, 0.4, 0.3, 0.2))
    with pytest.raises(
        ExportRefused, match=r"free weight of history.*README\.md\. Fit it again with --solver 2m or --no-h"
    ):
        export(pipeline_fit(tmp_path / "sd15", "sd15", free), tmp_path / "out")
    with pytest.raises(ExportRefused, match=r"on a DDPM table, and this is ShiftedFlow; fit it again with --no-history"):
        export(pipeline_fit(tmp_path / "sd3", "sd3", free), tmp_path / "out")
    with pytest.raises(ExportRefused, match=r"DiTPipeline takes no levels of its own; the loop"):
        export(pipeline_fit(tmp_path / "dit", "dit", PLAIN), tmp_path / "out")
    flux = pipeline_fit(tmp_path / "flux", "flux", PLAIN, guidance=2.0)
    with pytest.raises(ExportRefused, match="takes its scale as an input and does not guide beside it"):
        export(flux, tmp_path / "out")
    digits = replace(open_product(Path("assets/digits-teacher")), sampler=PLAIN)
    digits = replace(digits, fitted=flux.fitted and replace(flux.fitted, guidance=1.0))
    with pytest.raises(ExportRefused, match=r"parametrisation 'cm' of its teacher; the loop"):
        export(digits, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("process", [EDM(), Flow(), DiscreteVP()])
def test_the_loop_of_the_card_is_the_sampler(process: Any):
    net = gaussian(process, 0.7, 0.4)
    sampler = Sampler(kind="map", steps=(1.0, 0.5, 0.25), history=(0.0, 0.3, 0.6))
    noise = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    told: dict[str, Any] = {}
    exec(loop_of(process, sampler), told)
    times = process.grid(torch.tensor(sampler.steps, dtype=torch.float64))
    drawn = told["draw"](lambda x, i: net(x, times[i].expand(len(x))).x0, noise)
    torch.testing.assert_close(drawn, sample(sampler, net, noise), rtol=1e-12, atol=1e-12)


def test_the_card_names_teacher_guidance_and_table(tmp_path: Path):
    rows = ({"calls": 4, "name": "even DDIM", "metric": "fd", "value": 10.85, "error": 0.41, "samples": 1797},)
    product = fit_of(tmp_path, gaussian(Flow(), 0, 1), (1,), PLAIN, guidance=2.5, rows=rows)
    assert product.fitted is not None
    card = fit_card(product, product.fitted, "runs/mine")
    assert "| guidance scale of the fit; it holds there only | 2.5 |" in card
    assert "| 4 | even DDIM | 10.8 ± 0.41 |" in card
    assert re.search(r"fewstep sample runs/mine --steps 4\n", card)
