"""Configs that say how to sample are no fault of a teacher; those that say what its network is are compared."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
from calling import called
from tiny_pipelines import SD_BETAS, make_pipeline, text_parts, unet_condition
from tiny_teacher import edit_json, make_teacher

from fewstep.algebra.process import DiscreteVP
from fewstep.commands import check_teacher as module
from fewstep.commands.check_teacher import Report, check_teacher
from fewstep.commands.own_grid import OFFERED
from fewstep.config import UserError
from fewstep.networks.parts import Site
from fewstep.networks.teachers import DiffusersTeacher


@pytest.fixture(autouse=True)
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights take noise off under no reading; ten are not tried each time. Tangents are no scheduler's."""
    monkeypatch.setattr(module, "denoising", lambda net, x: ("not tried", None))
    monkeypatch.setattr(module, "_tangent", lambda case: ())


@pytest.fixture(scope="module")
def bases(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {"sd15": base} | {name: make_pipeline(root / name, name) for name in ("sdxl", "sd3")}


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
EULER = "FlowMatchEulerDiscreteScheduler"
KARRAS, SPACING, EDMS, TERMINAL = (
    f", by its {key}; a student" for key in ("use_karras_sigmas", "timestep_spacing", "sigma_schedule", "shift_terminal")
)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
HOLDS = "can be distilled: every convention was read from its own files and holds."
VARIANTS: list[tuple[str, str, tuple[str, ...], dict[str, Any], str]] = [
    # base, scheduler, keys left out of its config, its config; by which keys its grid is its own, or why it is refused
    ("sdxl", "DPMSolverMultistepScheduler", (), SD_BETAS | {"use_karras_sigmas": True}, KARRAS),
    ("sdxl", "EulerDiscreteScheduler", (), SD_BETAS | {"use_karras_sigmas": True}, KARRAS),
    ("sdxl", "EulerDiscreteScheduler", (), SD_BETAS | {"num_train_timesteps": 1100}, SPACING),
    ("sdxl", "HeunDiscreteScheduler", (), SD_BETAS, SPACING),
    ("sdxl", "HeunDiscreteScheduler", BETAS, {"use_karras_sigmas": True}, KARRAS),
    ("sdxl", "KDPM2DiscreteScheduler", (), SD_BETAS, "refused: scheduler 'KDPM2DiscreteScheduler' is not supported"),
    ("sdxl", "LCMScheduler", (), SD_BETAS, SPACING),
    ("sdxl", "LCMScheduler", BETAS, {"original_inference_steps": 2}, "no 4"),
    ("sdxl", "TCDScheduler", (), SD_BETAS, SPACING),
    ("sdxl", "TCDScheduler", BETAS, {}, SPACING),
    ("sdxl", "DDPMScheduler", (), SD_BETAS, SPACING),
    ("sdxl", "UniPCMultistepScheduler", (), SD_BETAS, SPACING),
    ("sdxl", "EDMEulerScheduler", (), {"prediction_type": "v_prediction", "sigma_max": 120.0}, "refused: only 'epsilon'"),
    ("sdxl", "EDMDPMSolverMultistepScheduler", (), {}, EDMS),
    ("sdxl", "EDMEulerScheduler", (), {"final_sigmas_type": "sigma_min"}, EDMS),
    ("sdxl", "EDMEulerScheduler", (), {"sigma_schedule": "exponential"}, EDMS),
    ("sd15", "DDIMScheduler", (), {"beta_schedule": "squaredcos_cap_v2"}, SPACING),
    ("sd15", "DDIMScheduler", (), SD_BETAS | {"clip_sample": True, "thresholding": True}, SPACING),
    ("sd15", "EulerDiscreteScheduler", (), SD_BETAS | {"prediction_type": "sample"}, SPACING),
    ("sd15", "PNDMScheduler", (), SD_BETAS | {"set_alpha_to_one": True, "steps_offset": 1}, SPACING),
    ("sd3", EULER, (), {"shift": 3.0, "shift_terminal": 0.02}, TERMINAL),
    ("sd3", EULER, (), {"use_dynamic_shifting": True, "shift_terminal": 0.02}, TERMINAL),
    ("sd3", EULER, (), {"use_beta_sigmas": True}, ", by its use_beta_sigmas; a student"),
    ("sd3", EULER, (), {"shift": 3.0, "use_karras_sigmas": True}, KARRAS),
    ("sd3", EULER, (), {"use_exponential_sigmas": True}, ", by its use_exponential_sigmas; a student"),
    ("sd3", EULER, (), {"shift": 3.0, "stochastic_sampling": True},
     ", by its stochastic_sampling; it re-noises between them; a student"),
    ("sd3", EULER, (), {"invert_sigmas": True}, "refused: invert_sigmas is set"),
    ("sd3", EULER, (), {"use_dynamic_shifting": True, "time_shift_type": "linear"}, "; a student"),
    ("sd3", "UniPCMultistepScheduler", (), FLOW | {"flow_shift": 3.0}, "; a student's there too"),
    ("sd3", "UniPCMultistepScheduler", (), FLOW | {"use_dynamic_shifting": True}, "; a student's there too"),
    ("sd3", "FlowMatchLCMScheduler", (), {"shift": 3.0}, "; a student"),
    ("sd3", "FlowMatchHeunDiscreteScheduler", (), {"shift": 3.0}, "; a student"),
]  # fmt: skip
"""The 26 variants of a survey of folders, six more, and the verdict that is right for each."""


@pytest.mark.parametrize(("on", "name", "drop", "config", "right"), VARIANTS)
def test_the_verdict_on_every_scheduler_is_right(
    bases: dict[str, Path], tmp_path: Path, on: str, name: str, drop: Any, config: Any, right: str
):
    """How a folder samples is no fault of it, is said, and is offered for the teacher's many steps."""
    folder = with_scheduler(bases[on], tmp_path / "T", name, drop, **config)
    if right.startswith("refused: "):
        with pytest.raises(UserError, match=re.escape(right.removeprefix("refused: "))):
            check_teacher(str(folder))
        return
    report = check_teacher(str(folder))
    assert HOLDS in report.verdict(), report.text()
    (grid,) = [f.said for f in report.findings if f.name == "own grid"]
    theirs = getattr(diffusers, name).from_pretrained(folder / "scheduler")
    if right == "no 4":
        assert grid.startswith("its scheduler sets no 4 timesteps: ")
        return
    theirs.set_timesteps(4, **({"mu": 0.5 + (16 - 256) * 0.65 / 3840} if config.get("use_dynamic_shifting") else {}))
    flow = on == "sd3" or name.startswith("EDM")
    times = theirs.sigmas[: len(theirs.timesteps)] if flow else theirs.timesteps + 1
    times = times[times > 0.0021] if name.startswith("EDM") else times  # whose smallest counts as clean
    shown = ", ".join(f"{t:.4g}" for t in times.double().unique().flip(0).tolist())
    assert grid.startswith(f"its own 4 steps stand at t = {shown}{right}")
    assert (OFFERED in grid) == report.verdict().endswith("samples on another grid than a student's.")
    assert (OFFERED in grid) == ("there too" not in right)


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


def test_nothing_stands_around_the_verdict(
    base: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """diffusers has remarks about this folder's steps_offset, and about schedulers that are made up here."""
    monkeypatch.setattr(diffusers.utils.logging, "_tqdm_active", False)  # the command line has bars off before the import
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        code, out, err = called(capfd, "check-teacher", base)
    assert (code, err, [str(r.message) for r in remarks]) == (0, "", [])
    assert out.startswith("ok    network")
    assert out.splitlines()[-1].startswith(f"{base} can be distilled")


def test_the_verdict_names_what_is_wrong():
    report = Report("T", [module.Finding("denoising", "it was trained so", False)])
    assert report.verdict().startswith("T is not read right: denoising. Do not train on it")
