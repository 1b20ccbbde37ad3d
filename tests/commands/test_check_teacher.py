"""Configs that say how to sample are no fault of a teacher; those that say what its network is are compared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
from tiny_pipelines import SD_BETAS, make_pipeline, text_parts, unet_condition
from tiny_teacher import edit_json, make_teacher

from fewstep.algebra.process import DiscreteVP
from fewstep.commands import check_teacher as module
from fewstep.commands.check_teacher import Report, check_teacher
from fewstep.config import UserError
from fewstep.networks.parts import Site
from fewstep.networks.teachers import DiffusersTeacher


@pytest.fixture(autouse=True)
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights take noise off under no reading; ten are not tried each time."""
    monkeypatch.setattr(module, "denoising", lambda net, x: ("not tried", None))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text pipeline without VAE, so that a check is a matter of a second."""
    folder = tmp_path_factory.mktemp("check") / "T"
    scheduler = diffusers.DDIMScheduler(**SD_BETAS)
    unet = unet_condition()
    diffusers.StableDiffusionPipeline(**text_parts(unet=unet, vae=None, scheduler=scheduler)).save_pretrained(folder)
    return folder


def with_scheduler(base: Path, to: Path, name: str, drop: tuple[str, ...] = (), **config: Any) -> Path:
    """The folder with another scheduler, some keys of its config left out."""
    folder = Path(shutil.copytree(base, to))
    getattr(diffusers, name)(**config).save_pretrained(folder / "scheduler")
    edit_json(folder / "scheduler" / "scheduler_config.json", **dict.fromkeys(drop))
    edit_json(folder / "model_index.json", scheduler=["diffusers", name])
    return folder


BETAS = ("beta_start", "beta_end", "beta_schedule")
SAMPLING: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("EDMEulerScheduler", (), {"final_sigmas_type": "sigma_min"}),
    ("EDMEulerScheduler", (), {"sigma_schedule": "exponential"}),
    ("EDMDPMSolverMultistepScheduler", (), {"final_sigmas_type": "sigma_min", "sigma_schedule": "exponential"}),
    ("EulerDiscreteScheduler", (), {**SD_BETAS, "use_karras_sigmas": True, "timestep_spacing": "trailing"}),
    ("LCMScheduler", BETAS, {"original_inference_steps": 2}),
    ("TCDScheduler", BETAS, {}),
    ("HeunDiscreteScheduler", BETAS, {"use_karras_sigmas": True}),
    ("PNDMScheduler", (), {**SD_BETAS, "set_alpha_to_one": True, "steps_offset": 1}),
    ("UniPCMultistepScheduler", (), {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "drop", "config"), SAMPLING)
def test_how_it_samples_is_no_fault(base: Path, tmp_path: Path, name: str, drop: Any, config: Any):
    report = check_teacher(str(with_scheduler(base, tmp_path / "T", name, drop, **config)))
    assert report.ok, report.text()


def test_nor_is_a_flows_spacing(tmp_path: Path):
    folder = make_pipeline(tmp_path / "T", "sd3")
    config = {"shift": 3.0, "use_karras_sigmas": True, "shift_terminal": 0.1}
    diffusers.FlowMatchEulerDiscreteScheduler(**config).save_pretrained(folder / "scheduler")
    report = check_teacher(str(folder))
    assert report.ok, report.text()
    (said,) = [f.said for f in report.findings if f.name == "own grid"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(4)
    levels = scheduler.sigmas[:4].tolist()
    shown = ", ".join(f"{level:.4g}" for level in levels)
    assert said.startswith(f"its own 4 steps stand at {shown}, by its shift_terminal, use_karras_sigmas; a student's")
    assert report.verdict().endswith("Its own scheduler samples on another grid than a student's.")
    apart = max(abs(a - b) for a, b in zip(levels, (1, 0.9, 0.75, 0.5), strict=True))
    assert f"a student's even ones up to {apart:.2g} apart" in said


@pytest.mark.parametrize("config", [{"num_train_timesteps": 2}, {"s_noise": 1.4}, {"clip_denoised": True}])
def test_nor_is_a_consistency_models_own_table(tmp_path: Path, config: Any):
    folder = make_teacher(tmp_path / "T")
    diffusers.CMStochasticIterativeScheduler(**config).save_pretrained(folder / "scheduler")
    report = check_teacher(str(folder), classes=10)
    assert report.ok, report.text()


def test_betas_that_are_read_otherwise_are_found(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = with_scheduler(base, tmp_path / "T", "LCMScheduler", BETAS)

    def misread(*args: Any, **options: Any) -> Any:
        net = load(*args, **options)
        net.process = DiscreteVP()  # DDPM's betas, which are not the class's
        return net

    load = module.load_denoiser
    monkeypatch.setattr(module, "load_denoiser", misread)
    report = check_teacher(str(folder))
    wrong = [f.name for f in report.findings if f.ok is False]
    assert "time scaling" in wrong
    assert "samples, 4 steps" in wrong


def test_a_scheduler_of_two_classes_is_refused_by_check_and_run(base: Path, tmp_path: Path):
    folder = Path(shutil.copytree(base, tmp_path / "T"))
    edit_json(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    said = (
        f"teacher {folder}: model_index.json names FlowMatchEulerDiscreteScheduler as its scheduler, and "
        "scheduler/scheduler_config.json is of DDIMScheduler; diffusers opens the first. Write the class that the "
        "network was trained with into both"
    )
    for refuse in (
        lambda: check_teacher(str(folder)),
        lambda: DiffusersTeacher(path=str(folder)).build(Site((4, 8, 12), 0, {}, 0)),
    ):
        with pytest.raises(UserError) as caught:
            refuse()
        assert str(caught.value) == said


def test_the_verdict_names_what_is_wrong():
    report = Report("T", [module.Finding("denoising", "it was trained so", False)])
    assert report.verdict().startswith("T is not read right: denoising. Do not train on it")
