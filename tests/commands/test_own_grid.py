"""A teacher's many steps on its own grid are its plain pipeline's; a recipe asks for them by one key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from tiny_families import TODAY, make_today
from tiny_pipelines import SD_BETAS, make_pipeline
from tiny_students import make_product

from fewstep.algebra.process import EDM, DiscreteVP
from fewstep.algebra.sampling import Sampler, sample
from fewstep.commands.measure import teacher_product
from fewstep.commands.own_grid import own_levels, teacher_levels
from fewstep.config import RecipeError, UserError
from fewstep.export.stock import difference, open_stock, run_stock
from fewstep.networks.denoiser import Rescheduled
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.folder import read_folder
from fewstep.recipe.store import load


def with_scheduler(folder: Path, scheduler: Any) -> Path:
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@torch.no_grad()
def test_qwen_image_as_it_is_shipped_is_drawn_as_its_pipeline_draws_it(tmp_path: Path):
    """Its grid ends at shift_terminal; even levels draw other pictures."""
    folder = make_today(tmp_path / "T", "qwen_image")
    shape = TODAY["qwen_image"].shape
    net: Any = load_denoiser(str(folder), size=shape[1:])
    generator = torch.Generator().manual_seed(3)
    x, cond = torch.randn(2, *shape, generator=generator), net.net.example(2, generator)
    theirs = run_stock(open_stock(folder), net.net, x, cond, {"num_inference_steps": 6})
    recipe = SimpleNamespace(teacher=SimpleNamespace(name="diffusers", path=str(folder), folder=str(folder)))
    levels = teacher_levels(recipe, net, shape[1:], 6)
    ours = Sampler(kind="ode", steps=levels, solver="ddim")
    assert difference(sample(ours, net, x, cond), theirs) < 2e-5
    even = replace(ours, steps=tuple(1 - i / 6 for i in range(6)))
    assert difference(sample(even, net, x, cond), theirs) > 0.01


def test_levels_are_the_schedulers_own(tmp_path: Path):
    karras = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True)
    flow = with_scheduler(make_pipeline(tmp_path / "sd3", "sd3"), karras)
    euler = diffusers.EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1)
    table = with_scheduler(make_pipeline(tmp_path / "sdxl", "sdxl"), euler)
    for folder, scheduler in ((flow, karras), (table, euler)):
        net = load_denoiser(str(folder), size=(8, 12))
        scheduler.set_timesteps(5)
        found = net.process.grid(own_levels(read_folder(str(folder)), net, (8, 12), 5))
        indices = isinstance(net.process, DiscreteVP)
        theirs = scheduler.timesteps.double() + 1 if indices else scheduler.sigmas[:5].double()
        torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-7)
        # Re-expressed in another process the same noise stands at other times.
        other = Rescheduled(net, EDM(sigma_max=1e4))
        recipe = SimpleNamespace(teacher=SimpleNamespace(name="diffusers", path=str(folder), folder=str(folder)))
        moved = EDM(sigma_max=1e4).grid(torch.tensor(teacher_levels(recipe, other, (8, 12), 5), dtype=torch.float64))
        ratio = (net.process.sigma(found) / net.process.alpha(found)).clamp(max=1e4)
        torch.testing.assert_close(moved, ratio, rtol=1e-6, atol=1e-6)


def test_a_recipe_asks_for_it_by_one_key(tmp_path: Path):
    folder = with_scheduler(
        make_pipeline(tmp_path / "sd3", "sd3"),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True),
    )
    student = make_product(folder, "sd3", Sampler(steps=(1.0,)))
    even = teacher_product(student, student.net, 4)
    assert (even.title, even.sampler.steps) == ("teacher, 4 steps", (1.0, 0.75, 0.5, 0.25))
    asked = make_product(folder, "sd3", Sampler(steps=(1.0,)), "evaluate.teacher_grid=own")
    own = teacher_product(asked, asked.net, 4)
    assert own.title == "teacher, 4 steps of its own grid"
    assert own.sampler.steps == teacher_levels(asked.recipe, asked.net, (8, 12), 4) != even.sampler.steps
    assert (own.sampler.kind, own.sampler.solver) == ("ode", "heun")


def test_a_teacher_without_a_scheduler_has_none(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"teacher_grid: own is the grid of a diffusers folder"):
        load("toy/dmd2", ["evaluate.teacher_grid=own"])
    folder = with_scheduler(
        make_pipeline(tmp_path / "sdxl", "sdxl"), diffusers.LCMScheduler(**SD_BETAS, original_inference_steps=2)
    )
    net = load_denoiser(str(folder), size=(8, 12))
    recipe = SimpleNamespace(teacher=SimpleNamespace(name="diffusers", path=str(folder), folder=str(folder)))
    with pytest.raises(UserError, match=r"evaluate.teacher_grid: the scheduler of .* takes no 4 steps: "):
        teacher_levels(recipe, net, (8, 12), 4)
