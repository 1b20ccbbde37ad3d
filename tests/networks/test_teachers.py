"""A pipeline folder of each class is read right, trains, and says in words what is wrong with a bad one."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import FAMILIES, make_pipeline
from tiny_teacher import edit_json, make_teacher

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.algebra.process import DiscreteVP, Flow, ShiftedFlow
from fewstep.cli import main
from fewstep.commands.check_teacher import check_teacher, null_of, parse_size
from fewstep.config import UserError
from fewstep.methods.consistency import Consistency
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.scm import SCM
from fewstep.networks.adapters import frozen
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.folder import read_folder, read_latents
from fewstep.networks.heads import Discriminator
from fewstep.networks.parts import Site
from fewstep.networks.roles import Roles
from fewstep.networks.scheduler import read_scheduler
from fewstep.networks.specs import example_condition
from fewstep.networks.teachers import DiffusersTeacher, ModuleTeacher
from fewstep.networks.wrappers import Declared
from fewstep.networks.wrappers.base import Wrapper
from fewstep.networks.wrappers.packing import pack, unpack

SD = DiscreteVP(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
FLUX_SHIFT = math.exp(0.5 + (1.15 - 0.5) * (12 - 256) / (4096 - 256))
PROCESS = {
    "sd15": SD, "sd21": SD, "sdxl": SD, "dit": DiscreteVP(), "pixart": DiscreteVP(),
    "sd3": ShiftedFlow(shift=3.0), "sana": ShiftedFlow(shift=3.0), "flux": ShiftedFlow(shift=FLUX_SHIFT),
}  # fmt: skip
FACTORS = {
    "sd15": (0.18215, 0.0), "sdxl": (0.13025, 0.0), "dit": (0.18215, 0.0), "sd3": (1.5305, 0.0609),
    "flux": (0.3611, 0.1159), "pixart": (0.13025, 0.0),
}  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: make_pipeline(root / name, name) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_of_each_class_is_read_right(folders: dict[str, Path], name: str):
    family, folder = FAMILIES[name], folders[name]
    report = check_teacher(str(folder), size=family.shape[1:])
    said = {f.name: f for f in report.findings}
    assert report.ok, report.text()
    assert report.verdict().startswith(
        f"{folder} can be distilled: every convention was read from its own files and holds."
    )
    # Measured against the stock pipeline, from its own noise, at its own levels.
    for key in ("samples, 1 step", "samples, 4 steps"):
        assert family.pipeline in said[key].said
        assert float(said[key].said.split()[0]) < 2e-5
    net = load_denoiser(str(folder), size=family.shape[1:])
    assert net.process == PROCESS[name]
    assert net.prediction == family.kind
    found = read_folder(str(folder)).latents
    if name in FACTORS:
        assert found is not None
        assert (found.scale, found.shift, found.pixels, found.channels) == (
            *FACTORS[name],
            2,
            family.shape[0],
        )
        z = torch.tensor([1.7, -0.3])
        torch.testing.assert_close(found.encode(z), (z - FACTORS[name][1]) * FACTORS[name][0])
        torch.testing.assert_close(found.decode(found.encode(z)), z)
    else:
        assert found is None


def roles_of(folder: Path, name: str) -> tuple[Roles, Batch]:
    family = FAMILIES[name]
    teacher = frozen(load_denoiser(str(folder), size=family.shape[1:]))
    student, critic = copy.deepcopy(teacher), copy.deepcopy(teacher)
    half = teacher.process.grid(torch.tensor([0.5]).double())
    example = (torch.zeros(1, *family.shape), half, example_condition(critic))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        heads = Discriminator(critic, (family.tap,), example, 4)
    b, g = 3, torch.Generator().manual_seed(8)
    wrapper: Any = teacher.net
    cond = wrapper.example(b, g)
    batch = Batch(
        Draws(17, torch.arange(b)),
        family.shape,
        torch.randn(b, *family.shape, generator=g),
        cond,
        null_of(wrapper, cond),
    )
    return Roles(teacher=teacher, student=student, critic=critic, discriminator=heads), batch


METHODS = {
    "dmd2": DMD2(guidance=2.0, critic=Critic(steps=1)),
    "cd": Consistency(guidance=(3.0, 3.0), solver="ddim"),
    "scm": SCM(guidance=2.0, weighting="one"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_of_three_methods_moves_exactly_the_trained_role(folders: dict[str, Path], name: str):
    for method in METHODS.values():
        roles, batch = roles_of(folders[name], name)
        for turn in method.turns(roles, 5):
            roles.train_only(*turn.updates)
            for losses in turn.losses(batch):
                losses.total().backward()
            for role, module in roles.items():
                gradients = [p.grad for p in module.parameters() if p.grad is not None]
                if role not in turn.updates:
                    assert gradients == [], f"{method.name}: {role} was given gradients"
                    continue
                assert all(bool(torch.isfinite(g).all()) for g in gradients)
                moved = sum(bool(g.any()) for g in gradients) / len(list(module.parameters()))
                assert moved > 0.5, f"{method.name}: {role} has gradients for {moved:.0%} of its tensors"
            for module in roles.values():
                module.zero_grad(set_to_none=True)


def test_taps_stop_early_and_unknown_ones_are_named(folders: dict[str, Path]):
    for name, family in FAMILIES.items():
        net: Any = load_denoiser(str(folders[name]), size=family.shape[1:])
        cond, x = net.net.example(3), torch.randn(3, *family.shape)
        t = net.process.grid(torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64))
        first, last = next(iter(net.net.blocks())), list(net.net.blocks())[-1]
        seen: list[str] = []
        handle = net.net.blocks()[last].register_forward_hook(lambda *_, seen=seen: seen.append("ran"))
        with torch.no_grad():
            alone = net.features(x, t, cond, (first,))
        handle.remove()
        assert set(alone) == {first}
        assert seen == []
        with pytest.raises(ValueError, match=r"^tap 'nose' is unknown to this \w+; allowed: \w+, \w+"):
            net.features(x, t, cond, ("nose",))


def test_added_inputs_start_without_effect_and_then_have_one(folders: dict[str, Path]):
    for name, family in FAMILIES.items():
        net: Any = load_denoiser(str(folders[name]), size=family.shape[1:])
        cond, x = net.net.example(2), torch.randn(2, *family.shape)
        t, s = (net.process.grid(torch.tensor(u, dtype=torch.float64)) for u in ([0.6, 0.9], [0.2, 0.4]))
        with torch.no_grad():
            before = net(x, t, cond).x0
            net.add_inputs(("s",))
            assert torch.equal(net(x, t, cond, s=s).x0, before)
            net.net.extras["s"].linear.weight.normal_()
            assert not torch.allclose(net(x, t, cond, s=s).x0, net(x, t, cond, s=t).x0, atol=1e-3)


def test_labels_are_not_dropped_in_training_mode(folders: dict[str, Path]):
    net = load_denoiser(str(folders["dit"])).train()
    x, t, labels = torch.randn(64, 4, 8, 8), torch.full((64,), 500.0).double(), torch.arange(64)
    with torch.no_grad():
        assert torch.equal(net(x, t, labels).x0, net.eval()(x, t, labels).x0)


def test_flux_packs_as_its_pipeline_does():
    from diffusers import FluxPipeline

    x = torch.randn(3, 4, 6, 8)
    packed = FluxPipeline._pack_latents(x, 3, 4, 6, 8)
    assert torch.equal(pack(x), packed)
    assert torch.equal(unpack(packed, (6, 8)), x)
    with pytest.raises(ValueError, match="must be even, not 5 x 8"):
        pack(torch.zeros(1, 4, 5, 8))


def test_embedded_guidance_comes_from_the_condition_or_the_recipe(folders: dict[str, Path]):
    path = str(folders["flux"])
    net, given = load_denoiser(path), load_denoiser(path, guidance=2.0)
    x, t = torch.randn(2, 4, 6, 8), torch.tensor([0.4, 0.8]).double()
    cond: Any = net.net.example(2)  # type: ignore[union-attr,operator]
    bare = {k: v for k, v in cond.items() if k != "guidance"}
    with torch.no_grad():
        with pytest.raises(ValueError, match="takes its guidance scale as an input; give"):
            net(x, t, bare)
        two = net(x, t, bare | {"guidance": torch.full((2,), 2.0)}).x0
        assert torch.equal(given(x, t, bare).x0, two)
        assert not torch.equal(net(x, t, cond).x0, two)


MINE = """
from torch import nn

from fewstep.networks.wrappers import Wrapper


class Mine(Wrapper):
    component = "transformer"
    needs = ("text",)

    @classmethod
    def load(cls, folder):
        from diffusers import SanaTransformer2DModel

        return SanaTransformer2DModel.from_pretrained(folder.root / "transformer").eval()

    def call(self, x, time, cond):
        return SIGN * self.model(x, cond["text"], time / SCALE, return_dict=False)[0]

    def blocks(self):
        return {f"block{i}": m for i, m in enumerate(self.model.transformer_blocks)}

    def example(self, b, generator=None):
        import torch

        return {"text": torch.randn(b, 7, 12, generator=generator)}
"""


def own(tmp_path: Path, sign: str = "1", scale: str = "1", pipeline: bool = False) -> str:
    text = MINE.replace("SIGN", sign).replace("SCALE", scale)
    if pipeline:
        needs = '    needs = ("text",)\n'
        text = text.replace(needs, f'{needs}    pipeline, levels = "SanaPipeline", "sigmas"\n')
        text += (
            '\n    def arguments(self, cond, size):\n        text = cond["text"]\n'
            '        return {"prompt_embeds": text, "prompt_attention_mask": text[..., 0] * 0 + 1,\n'
            '                "use_resolution_binning": False}\n'
        )
    file = tmp_path / f"mine{len(list(tmp_path.iterdir()))}.py"
    file.write_text(text)
    return f"{file}:Mine"


def test_a_model_of_ones_own_in_less_than_thirty_lines(folders: dict[str, Path], tmp_path: Path):
    assert len(MINE.strip().splitlines()) < 30
    report = check_teacher(str(folders["sana"]), size=(8, 12), wrapper=own(tmp_path))
    assert report.ok, report.text()
    spec = DiffusersTeacher(path=str(folders["sana"]), wrapper=own(tmp_path))
    net: Any = spec.build(Site((5, 8, 12), 0, {}, 0))
    stock: Any = load_denoiser(str(folders["sana"]))
    x, t = torch.randn(2, 5, 8, 12), torch.tensor([0.3, 0.7]).double()
    cond = net.net.example(2)
    with torch.no_grad():
        assert torch.equal(net(x, t, cond).x0, stock(x, t, cond).x0)
    with pytest.raises(UserError, match=r"the data has shape \[3, 8, 12\]"):
        spec.build(Site((3, 8, 12), 0, {}, 0))


def test_a_time_that_is_one_percent_off_is_found_out(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    forward = Wrapper.forward

    def late(self: Wrapper, x: Any, time: Any, *more: Any, **named: Any) -> Any:
        return forward(self, x, 1.01 * time, *more, **named)

    monkeypatch.setattr(Wrapper, "forward", late)
    report = check_teacher(str(folders["dit"]), size=(8, 8))
    assert {f.name: f.ok for f in report.findings}["time scaling"] is False
    assert "time scaling" in report.verdict()


@pytest.mark.parametrize(("sign", "scale"), [("-1", "1"), ("1", "1000")], ids=["sign", "time"])
def test_a_wrapper_that_is_wrong_is_found_out(
    folders: dict[str, Path], tmp_path: Path, sign: str, scale: str, capsys: pytest.CaptureFixture[str]
):
    wrong = own(tmp_path, sign, scale, pipeline=True)
    with pytest.raises(SystemExit) as left:
        main(["check-teacher", str(folders["sana"]), "--size", "8x12", "--wrapper", wrong])
    assert left.value.code == 1
    said = capsys.readouterr().out
    assert "WRONG samples, 4 steps" in said
    assert said.strip().splitlines()[-1].startswith(f"{folders['sana']} is not read right: ")
    with pytest.raises(SystemExit) as left:
        main(
            [
                "check-teacher",
                str(folders["sana"]),
                "--size",
                "8x12",
                "--wrapper",
                own(tmp_path, pipeline=True),
            ]
        )
    assert left.value.code == 0
    assert "can be distilled" in capsys.readouterr().out


def test_a_network_by_the_names_of_its_arguments(folders: dict[str, Path]):
    stock: Any = load_denoiser(str(folders["sd3"]))
    names = {
        "x": "hidden_states",
        "time": "timestep",
        "text": "encoder_hidden_states",
        "pooled": "pooled_projections",
    }
    net = Declared.by_names(stock.net.model, names, {"last": "transformer_blocks.1"})
    net.pick = 1  # of two streams of tokens
    x, time, cond = torch.randn(2, 6, 8, 12), torch.tensor([300.0, 700.0]), stock.net.example(2)
    with torch.no_grad():
        raw, features = net(x, time, cond, taps=("last",))
        wanted, theirs = stock.net(x, time, cond, taps=("block1",))
    assert torch.equal(raw, wanted)
    assert torch.equal(features["last"], theirs["block1"])
    with pytest.raises(ValueError, match="names: 'texts' is not one of x, time, text"):
        Declared.by_names(stock.net.model, {"texts": "a"})
    with pytest.raises(ValueError, match="taps: mid: SD3Transformer2DModel has no sub-module 'middle'"):
        Declared.by_names(stock.net.model, names, {"mid": "middle"})


def config_of(scheduler: Any) -> dict[str, Any]:
    """As it stands in scheduler_config.json."""
    return json.loads(scheduler.to_json_string())


def test_a_function_of_ones_own_as_a_teacher(tmp_path: Path):
    (tmp_path / "net.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.block = torch.nn.Linear(4, 4)\n\n    def forward(self, z, y, seconds):\n"
        "        return (self.block(z) + y[:, None, None, None] * seconds[:, None, None, None],)\n\n\n"
        "def build():\n    torch.manual_seed(0)\n    return Net()\n\n\ndef nothing():\n    return 3\n"
    )
    spec: dict[str, Any] = {
        "arguments": {"x": "z", "time": "seconds", "label": "y"}, "prediction": "velocity", "time_input": "t",
        "process": Flow(), "taps": {"mid": "block"},
    }  # fmt: skip
    site = Site((3, 5, 4), 10, {}, 0)
    net: Any = ModuleTeacher(factory=f"{tmp_path}/net.py:build", **spec).build(site)
    x, t, y = torch.randn(2, 3, 5, 4), torch.tensor([0.25, 0.5]).double(), torch.tensor([7, 2])
    raw = net.net.model.block(x) + torch.tensor([7 * 0.25, 2 * 0.5])[:, None, None, None]
    torch.testing.assert_close(net(x, t, y).x0, x - t.float()[:, None, None, None] * raw)
    assert net.features(x, t, y, ("mid",))["mid"].shape == (2, 3, 5, 4)
    assert not any(p.requires_grad for p in net.parameters())
    with pytest.raises(UserError, match="returned a int, not a torch module"):
        ModuleTeacher(factory=f"{tmp_path}/net.py:nothing", **spec).build(site)
    with pytest.raises(ValueError, match="prediction 'edm' needs the process edm"):
        ModuleTeacher(factory="a:b", **(spec | {"prediction": "edm"}))


def test_flow_shifts_are_those_of_the_scheduler():
    for shift in (1.0, 3.0, 6.5):
        process = read_scheduler(config_of(FlowMatchEulerDiscreteScheduler(shift=shift)), "f")[0]
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        u = [1.0, 0.8, 0.35]
        scheduler.set_timesteps(sigmas=u)
        assert process == (Flow() if shift == 1 else ShiftedFlow(shift=shift))
        ours = process.grid(torch.tensor(u, dtype=torch.float64))
        torch.testing.assert_close(ours, scheduler.sigmas[:3].double(), rtol=1e-6, atol=0)
    config = config_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"))
    assert read_scheduler(config, "f", tokens=1024)[0] == ShiftedFlow(shift=0.5 + 0.65 * 768 / 3840)
    with pytest.raises(UserError, match=r"^f: use_dynamic_shifting is set, so the shift depends on the image size"):
        read_scheduler(config, "f")
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert read_scheduler(config_of(solver), "f") == (ShiftedFlow(shift=3.0), "velocity", "1000t")


AMBIGUOUS = [
    ({"prediction_type": None}, "prediction_type is missing; add one of 'epsilon', 'v_prediction', 'sample' as trained"),
    ({"use_flow_sigmas": True}, "prediction_type 'epsilon' with use_flow_sigmas True is ambiguous"),
    ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction' with use_flow_sigmas False is ambiguous"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr with prediction_type 'epsilon': at the "),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas is set"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500}, "num_train_timesteps 500 of a flow"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), AMBIGUOUS)
def test_an_ambiguous_scheduler_is_refused(folders: dict[str, Path], tmp_path: Path, change: Any, message: str):
    folder = Path(shutil.copytree(folders["pixart"], tmp_path / "T"))
    edit_json(folder / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(UserError) as caught:
        check_teacher(str(folder))
    assert str(caught.value).startswith(f"{folder}/scheduler/scheduler_config.json: {message}")


def test_a_missing_prediction_can_be_given(folders: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(folders["sd15"], tmp_path / "T"))
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type=None)
    assert load_denoiser(str(folder), prediction="epsilon").prediction == "eps"
    with pytest.raises(UserError, match=r"prediction 'v_prediction': .*scheduler_config.json says 'epsilon'"):
        load_denoiser(str(folders["sd15"]), prediction="v_prediction")


def test_an_unknown_class_names_those_that_are_known(folders: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(folders["sd3"], tmp_path / "T"))
    edit_json(folder / "transformer" / "config.json", _class_name="LuminaNextDiT2DModel")
    with pytest.raises(UserError) as caught:
        check_teacher(str(folder))
    assert str(caught.value) == (
        f"{folder}/transformer/config.json: class 'LuminaNextDiT2DModel' is not supported: no entry has been written for "
        "it; supported: "
        "AnyFlowTransformer3DModel, AuraFlowTransformer2DModel, ChromaTransformer2DModel, DiTTransformer2DModel, "
        "Flux2Transformer2DModel, "
        "FluxTransformer2DModel, HunyuanVideoTransformer3DModel, Krea2Transformer2DModel, Lumina2Transformer2DModel, "
        "OvisImageTransformer2DModel, "
        "PixArtTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel, SanaTransformer2DModel, "
        "SanaVideoTransformer3DModel, UNet2DConditionModel, UNet2DModel, WanTransformer3DModel, "
        "ZImageTransformer2DModel. Give a wrapper of your own with `wrapper: file.py:Class`"
    )


def test_a_missing_text_encoder_is_named_with_two_remedies(folders: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(folders["sd15"], tmp_path / "T"))
    edit_json(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    with pytest.raises(UserError) as caught:
        check_teacher(str(folder))
    assert str(caught.value) == (
        f"teacher {folder}: text_encoder/ is missing, and model_index.json names it (CLIPTextModel); copy it from the "
        "original pipeline; or set it to [null, null] there and name a folder that has it in data.encoder.path"
    )


def test_a_pickle_is_refused_with_a_command_that_converts_it(folders: dict[str, Path], tmp_path: Path):
    from safetensors.torch import load_file

    folder = Path(shutil.copytree(folders["sana"], tmp_path / "T"))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(UserError) as caught:
        load_denoiser(str(folder))
    said, _, command = str(caught.value).partition("\n")
    assert said == (
        f"teacher {folder}: transformer/ has no .safetensors file; diffusion_pytorch_model.bin is a pickle: convert it "
        "with safetensors first:"
    )
    code = command.strip().removeprefix('python -c "').removesuffix('"')
    exec(code)
    assert load_denoiser(str(folder)).prediction == "velocity"


def test_latents_of_a_vae(tmp_path: Path):
    file = tmp_path / "config.json"

    def write(**config: Any) -> Path:
        file.write_text(json.dumps({"block_out_channels": [1, 2, 3, 4], "latent_channels": 5} | config))
        return file

    old = read_latents(write(_class_name="AutoencoderKL"))
    assert old is not None
    assert (old.scale, old.shift, old.pixels, old.channels) == (0.18215, 0.0, 8, 5)
    with pytest.raises(UserError, match=r"config.json: scaling_factor is missing and AutoencoderX has no default"):
        read_latents(write(_class_name="AutoencoderX"))
    with pytest.raises(UserError, match="scaling_factor is None"):
        read_latents(write(_class_name="AutoencoderKL", scaling_factor=None))
    with pytest.raises(UserError, match="latents_std is missing; give both"):
        read_latents(write(_class_name="AutoencoderKL", latents_mean=[0.0] * 5))
    with pytest.raises(UserError, match="need a value for each of the 5 latent_channels"):
        read_latents(write(_class_name="AutoencoderKL", latents_mean=[0.0], latents_std=[1.0]))


def test_a_unet_without_a_stock_pipeline_is_checked_against_its_own_scheduler(tmp_path: Path):
    folder = make_teacher(tmp_path / "T")
    report = check_teacher(str(folder), classes=10)
    assert report.ok, report.text()
    assert "CMStochasticIterativeScheduler around the bare model" in report.text()


def test_sizes_and_wrappers_that_are_not_given_right(folders: dict[str, Path], tmp_path: Path):
    assert parse_size("64X48") == (64, 48)
    for text in ("64", "64x", "0x3", "ax3"):
        with pytest.raises(UserError, match="expected HEIGHTxWIDTH such as 64x64"):
            parse_size(text)
    (tmp_path / "empty.py").write_text("X = 3\n")
    path = str(folders["sana"])
    for name, message in (
        ("empty.py", "expected module:Name or file.py:Name"),
        (f"{tmp_path}/empty.py:Mine", "cannot be imported: module .* has no attribute 'Mine'"),
        (f"{tmp_path}/empty.py:X", "is not a subclass of fewstep.networks.wrappers.Wrapper"),
        (f"{tmp_path}/none.py:X", "cannot be imported: .*none.py: no such file"),
        ("no.such.module:X", "cannot be imported: No module named 'no'"),
    ):
        with pytest.raises(UserError, match=message):
            load_denoiser(path, wrapper=name)
