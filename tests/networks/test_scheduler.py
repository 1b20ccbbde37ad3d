"""A scheduler config is read as the class that it names reads it, defaults and all, or refused."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from fewstep.algebra.process import DiscreteVP, Flow
from fewstep.config import UserError
from fewstep.networks.folder import Folder, read_folder
from fewstep.networks.scheduler import DDPM_FAMILY, EDM_FAMILY, FLOW_SOLVERS, RESCALED, SHIFTED, read_scheduler


@pytest.mark.parametrize("name", DDPM_FAMILY)
def test_what_a_config_leaves_out_is_its_classes_own_default(name: str):
    process = read_scheduler({"_class_name": name, "prediction_type": "epsilon"}, "s.json")[0]
    theirs = getattr(diffusers, name)().alphas_cumprod.double()
    index = torch.tensor([0, 1, 250, 499, 998, 999])
    ours = process.alpha(index.double() + 1) ** 2
    torch.testing.assert_close(ours, theirs[index], rtol=2e-5, atol=1e-9)
    # One key alone that is left out, beside two that are given.
    told = {"_class_name": name, "prediction_type": "epsilon", "beta_start": 0.002, "beta_end": 0.01}
    default = inspect.signature(getattr(diffusers, name)).parameters["beta_schedule"].default
    shift = 3.0 if name in SHIFTED else 1.0
    assert read_scheduler(told, "s.json")[0] == DiscreteVP(
        schedule=default, beta_start=0.002, beta_end=0.01, snr_shift=shift
    )


TABLES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"rescale_betas_zero_snr": True}) for name in RESCALED),
    ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}),
    ("DDIMScheduler", {"trained_betas": torch.linspace(0.01, 0.3, 60).tolist(), "num_train_timesteps": 60}),
    ("CogVideoXDDIMScheduler", {"snr_shift_scale": 1.5, "rescale_betas_zero_snr": True}),
]


@pytest.mark.parametrize(("name", "told"), TABLES)
def test_every_table_is_that_of_the_class(name: str, told: dict[str, Any]):
    """alpha and sigma at every index; solvers put alpha = 2^-12 where zero terminal SNR has 0."""
    kind = {"prediction_type": "v_prediction"}
    process = read_scheduler({"_class_name": name, **kind, **told}, "s.json")[0]
    theirs = getattr(diffusers, name)(**kind, **told).alphas_cumprod.double()
    index = torch.arange(len(theirs))
    t = index.double() + 1
    torch.testing.assert_close(process.alpha(t), theirs.sqrt(), rtol=2e-4, atol=3e-4)
    # Their tables are products of a thousand numbers in float32.
    torch.testing.assert_close(process.alpha(t) ** 2, theirs, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(process.sigma(t) ** 2, 1 - theirs, rtol=2e-5, atol=1e-6)
    zero = bool(told.get("rescale_betas_zero_snr"))
    assert (float(process.alpha(t)[-1]) < 2e-7) == zero
    for dtype in (torch.float32, torch.float64):
        times = torch.tensor([0.4, 1.0, 17.5, len(theirs) - 1.0, len(theirs) - 0.5, len(theirs)], dtype=dtype)
        angle = torch.atan2(process.sigma(times), process.alpha(times))
        assert bool(torch.isfinite(process.dalpha(times)).all() & torch.isfinite(process.dsigma(times)).all())
        torch.testing.assert_close(process.t_of_angle(angle), times, rtol=1e-3, atol=0.02)
    assert float(process.t_of_angle(torch.tensor(math.pi / 2))) == pytest.approx(len(theirs), abs=1e-3)


def test_tables_that_make_no_teacher_are_refused():
    def said(**told: Any) -> str:
        with pytest.raises(UserError) as caught:
            read_scheduler({"_class_name": "DDIMScheduler", "prediction_type": "epsilon"} | told, "s.json")
        return str(caught.value)

    assert "s.json: rescale_betas_zero_snr with prediction_type 'epsilon'" in said(rescale_betas_zero_snr=True)
    reads = [n for n in DDPM_FAMILY if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, n)).parameters]
    assert sorted(reads) == sorted(RESCALED)
    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert "which PNDMScheduler does not read" in said(_class_name="PNDMScheduler", **told)
    assert "trained_betas is 7; it must be a list" in said(trained_betas=7)
    assert "needs a number above 0 and up to 1 for each of the 1000 steps" in said(trained_betas=[0.1, 0.2])
    assert "pure noise is reached before the last" in said(trained_betas=[0.5, 1.0, 0.5], num_train_timesteps=3)
    assert "beta_schedule 'sigmoid' is not one of 'linear', 'scaled_linear', 'squaredcos_cap_v2'" in said(
        beta_schedule="sigmoid"
    )
    assert "SCMScheduler with prediction_type 'epsilon'; only 'trigflow'" in said(_class_name="SCMScheduler")


@pytest.mark.parametrize("name", [*EDM_FAMILY, "CMStochasticIterativeScheduler"])
def test_edm_schedulers_have_the_defaults_of_the_process(name: str):
    process: Any = read_scheduler({"_class_name": name}, "s.json")[0]
    takes = inspect.signature(getattr(diffusers, name)).parameters
    for key in ("sigma_min", "sigma_max", "sigma_data", "rho"):
        assert getattr(process, key) == takes[key].default


def test_exactly_the_solvers_named_read_flow_sigmas():
    reads = [n for n in DDPM_FAMILY if "use_flow_sigmas" in inspect.signature(getattr(diffusers, n)).parameters]
    assert sorted(reads) == sorted(FLOW_SOLVERS)
    told = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    assert read_scheduler({"_class_name": FLOW_SOLVERS[0], **told}, "s.json")[0] == Flow()
    with pytest.raises(UserError, match=r"s.json: use_flow_sigmas is set, which DDIMScheduler does not read; flows have"):
        read_scheduler({"_class_name": "DDIMScheduler", **told}, "s.json")
    heun = {"_class_name": "FlowMatchHeunDiscreteScheduler", "use_dynamic_shifting": True}
    assert "use_dynamic_shifting" not in inspect.signature(diffusers.FlowMatchHeunDiscreteScheduler).parameters
    with pytest.raises(UserError, match="which FlowMatchHeunDiscreteScheduler does not read"):
        read_scheduler(heun, "s.json", tokens=64)


def test_continuous_timesteps_are_refused_where_diffusers_acts_on_them():
    told = {
        "_class_name": "EulerDiscreteScheduler",
        "timestep_type": "continuous",
        "sigma_min": 0.002,
        "sigma_max": 700.0,
    }
    theirs = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0
    )
    theirs.set_timesteps(2)
    assert float(theirs.timesteps[0]) < 2  # ln(700) / 4, where an index would be 999
    with pytest.raises(
        UserError, match=r"^s.json: timestep_type is 'continuous', under which the network is called with ln"
    ):
        read_scheduler(told | {"prediction_type": "v_prediction"}, "s.json")
    plain = diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="epsilon")
    plain.set_timesteps(2)
    assert plain.timesteps.tolist() == [999.0, 0.0]
    assert read_scheduler(told | {"prediction_type": "epsilon"}, "s.json")[2] == "index"


def folder_of(root: Path, index: dict[str, Any], **configs: dict[str, Any]) -> Folder:
    for name, config in configs.items():
        file = root / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config))
    (root / "model_index.json").write_text(json.dumps(index))
    return read_folder(str(root))


UNET, DDIM = {"_class_name": "UNet2DModel"}, {"_class_name": "DDIMScheduler"}
DISAGREE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, {}, "FlowMatchEulerDiscreteScheduler as its scheduler, and sched"),
    ({"scheduler": "EDMEulerScheduler"}, {}, "EDMEulerScheduler as its scheduler, and scheduler/scheduler_config.json"),
    ({"unet": "UNet2DConditionModel"}, {}, "UNet2DConditionModel as its unet, and unet/config.json is of UNet2DModel"),
    ({"vae": "AutoencoderKL"}, {"vae": {"_class_name": "AutoencoderDC", "block_out_channels": [1, 2]}}, "its vae"),
]  # fmt: skip


@pytest.mark.parametrize(("named", "more", "said"), DISAGREE)
def test_an_index_and_a_config_of_two_classes_are_refused(named: Any, more: Any, said: str, tmp_path: Path):
    index = {k: ["diffusers", v] for k, v in ({"scheduler": "DDIMScheduler", "unet": "UNet2DModel"} | named).items()}
    folder = folder_of(tmp_path, index, **({"unet": UNET, "scheduler": DDIM} | more))
    with pytest.raises(UserError) as caught:
        folder.require_agreement()
    assert str(caught.value).startswith(f"teacher {tmp_path}: model_index.json names ")
    assert said in str(caught.value)


def test_an_index_that_agrees_or_says_less_is_not_refused(tmp_path: Path):
    index: dict[str, Any] = {
        "_class_name": "P", "scheduler": ["diffusers", "DDIMScheduler"], "vae": [None, None],
        "transformer": ["diffusers", "Transformer2DModel"], "text_encoder": ["transformers", "CLIPTextModel"],
    }  # fmt: skip
    text = {"architectures": ["CLIPModel"]}
    folder = folder_of(
        tmp_path, index, transformer={"_class_name": "DiTTransformer2DModel"}, scheduler={}, text_encoder=text
    )
    folder.require_agreement()
    assert folder.scheduler["_class_name"] == "DDIMScheduler"
