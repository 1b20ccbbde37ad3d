"""A scheduler config is read as the class that it names reads it, defaults and all, or refused."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from fewstep.algebra.process import DiscreteVP, Flow
from fewstep.config import UserError
from fewstep.networks.folder import Folder, read_folder
from fewstep.networks.scheduler import DDPM_FAMILY, EDM_FAMILY, FLOW_SOLVERS, read_scheduler


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
    assert read_scheduler(told, "s.json")[0] == DiscreteVP(schedule=default, beta_start=0.002, beta_end=0.01)


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
