"""Adapters as roles of a run: the teacher stays, each role saves only what is its own, exports are merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_condition import condition_unet
from tiny_runs import contents, same
from tiny_teacher import make_run, make_teacher, student_settings
from tiny_text import pickle_weights, run_command

from fewstep.config import RecipeError, UserError
from fewstep.networks.adapters import (
    Adapted,
    apart,
    enable_checkpointing,
    lora_layers,
    own_parameters,
    own_state,
    placed,
    plain_copy,
)
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.lora_file import lora_tensors, read_lora
from fewstep.recipe.store import load
from fewstep.train.product import open_product
from fewstep.train.trainer import Trainer

ROLES = {
    "two sets": ("student={name: lora, rank: 2, alpha: 3.0}", "critic={name: lora, rank: 3}"),
    "student full": ("student={name: copy}", "critic={name: lora, rank: 3}"),
    "critic full": ("student={name: lora, rank: 2}", "critic={name: copy, of: student}"),
    "critic on student": ("student={name: copy}", "critic={name: lora, of: student, rank: 2}"),
}
LONG = {"fp32": "float32", "bf16": "bfloat16"}
SLOW = ("optim={default: {lr: 1e-3}}",)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "t")


@pytest.fixture(scope="module", params=ROLES, ids=str)
def run(request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("run") / "r"
    return request.param, make_run(folder, teacher, *ROLES[request.param], *SLOW, "train.checkpoint_every=1")


def trainer_of(teacher: Path, *settings: str) -> Trainer:
    return Trainer(load("digits-dmd2", [*student_settings(teacher), *SLOW, *settings]), cpu=True)


@pytest.mark.parametrize("kind", ["student full", "two sets"])
def test_updates_do_not_round_away_on_a_teacher_of_half_precision(kind: str, teacher: Path):
    slow = ("optim={default: {lr: 5e-7, warmup: 0}}",)
    changed = {}
    for dtype in ("fp32", "bf16"):
        settings = [*student_settings(teacher), *ROLES[kind], *slow, f"teacher.dtype={dtype}"]
        trainer = Trainer(load("digits-dmd2", settings), cpu=True)
        assert {p.dtype for p in own_parameters(trainer.roles.teacher)} == {getattr(torch, LONG[dtype])}
        mine = own_parameters(trainer.roles.student) + own_parameters(trainer.roles.critic)
        assert {p.dtype for p in mine} == {torch.float32}
        before = [p.detach().clone() for p in mine]
        trainer.fit()
        assert all(bool(p.isfinite().all()) for p in mine)
        changed[dtype] = sum(int((p != q).sum()) for p, q in zip(mine, before, strict=True))
    assert changed["bf16"] > 0.9 * changed["fp32"] > 0


def test_a_checkpoint_holds_only_what_each_role_owns(run: tuple[str, Path], teacher: Path):
    kind, folder = run
    plain = set(own_state(load_denoiser(str(teacher), 10)))
    found = contents(folder / "checkpoints" / "step-00000002")
    for name in ("student", "critic", "ema_0.98"):
        keys = set(found[name])
        lora = "lora_" in next(iter(keys))
        assert lora == (kind == "two sets" or (name == "critic") != (kind == "critic full"))
        if lora:
            assert all(k.startswith("own.") and ("lora_A" in k or "lora_B" in k) for k in keys)
        else:
            assert keys == plain


def test_the_product_samples_merges_and_exports(run: tuple[str, Path], tmp_path: Path):
    from fewstep.export.choose import export

    _, folder = run
    product = open_product(folder)
    index, labels = torch.arange(5), torch.tensor([3, 1, 4, 1, 5])
    mine = product.images(index, labels)
    assert float((mine - mine[0]).abs().max()) > 0
    merged = plain_copy(product.net)
    assert not lora_layers(merged)
    from dataclasses import replace

    assert torch.allclose(replace(product, net=merged).images(index, labels), mine, atol=2e-5)
    done = export(product, tmp_path / "out")
    assert done.parity <= 1e-4
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert not any("lora" in k or "base_layer" in k for k in weights)


@pytest.mark.parametrize("run", ["two sets", "critic on student"], indirect=True)
def test_resumed_is_the_same_run(run: tuple[str, Path], teacher: Path, tmp_path: Path):
    import shutil

    kind, folder = run
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000002")
    recipe = load("digits-dmd2", [*student_settings(teacher), *ROLES[kind], *SLOW, "train.checkpoint_every=1"])
    trainer = Trainer(recipe, tmp_path / "again", cpu=True)
    assert trainer.resume()
    trainer.fit()
    left, right = (contents(f / "checkpoints" / "step-00000002") for f in (folder, tmp_path / "again"))
    assert same({k: v for k, v in left.items() if k != "progress"}, {k: right[k] for k in left if k != "progress"}) == []


def test_training_leaves_the_teacher_as_it_was(teacher: Path):
    trainer = trainer_of(teacher, *ROLES["two sets"])
    alone = load_denoiser(str(teacher), 10)
    before = {k: v.clone() for k, v in own_state(trainer.roles.teacher).items()}
    assert same(before, own_state(alone)) == []
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 1, 8, 8, generator=g), torch.tensor([0.3, 2.0, 40.0], dtype=torch.float64)
    labels = torch.tensor([0, 7, 10])
    start = own_state(trainer.roles.student)
    start = {k: v.clone() for k, v in start.items()}
    trainer.fit()
    assert same(before, own_state(trainer.roles.teacher)) == []
    moved = [k for k, v in own_state(trainer.roles.student).items() if not torch.equal(v, start[k])]
    assert any("lora_B" in k for k in moved)
    with torch.no_grad():
        off = trainer.roles.teacher(x, t, labels).x0
        assert torch.equal(off, alone(x, t, labels).x0)
        assert torch.equal(Adapted(trainer.roles.teacher, None)(x, t, labels).x0, off)
        assert not torch.equal(trainer.roles.student(x, t, labels).x0, off)


def test_an_average_of_an_adapter_has_no_base_of_its_own(teacher: Path):
    trainer = trainer_of(teacher, *ROLES["two sets"], "train.ema=[0.9, 0.99]")
    base = trainer.roles.teacher
    assert all(isinstance(e.module, Adapted) and e.module.base is base for e in trainer.session.ema)
    assert trainer.roles.student.base is base
    assert trainer.roles.critic.base is base
    count = sum(p.numel() for p in trainer.roles.student.parameters())
    assert sum(p.numel() for p in trainer.session.ema[0].module.parameters()) == count
    weights = [p.clone() for p in trainer.roles.student.parameters()]
    with torch.no_grad():
        for p in trainer.roles.student.parameters():
            p += 1
    trainer.session.ema[0].update(trainer.roles.student)  # warm-up: the first decay is 1/10
    for old, p in zip(weights, trainer.session.ema[0].module.parameters(), strict=True):
        torch.testing.assert_close(p, old + 0.9)


def test_stages_copy_between_adapters_and_between_full_networks(teacher: Path):
    stage = "before=[{method: {name: denoise}, steps: 1}]"
    sets = ("student={name: lora, rank: 2}", "critic={name: lora, rank: 2}")
    trainer = trainer_of(teacher, *sets, stage, "copy={critic: student}", "train.steps=1")
    trainer.fit()
    trainer.progress.stage, trainer.progress.step = 1, 0
    trainer.loop.begin(trainer.recipe.stages()[1])
    assert same(own_state(trainer.roles.critic), own_state(trainer.roles.student)) == []
    mixed = trainer_of(teacher, *ROLES["student full"], stage, "copy={student: teacher}", "train.steps=1")
    mixed.loop.begin(mixed.recipe.stages()[1])
    assert same(own_state(mixed.roles.student), own_state(mixed.roles.teacher)) == []


def test_an_adapter_is_placed_with_its_base(teacher: Path):
    base: Any = load_denoiser(str(teacher), 10)
    adapted = Adapted(base, "one", rank=2)
    placed(adapted, "meta")
    assert {p.device.type for p in base.parameters()} == {"meta"}
    inside = {id(p) for p in base.parameters()}
    assert adapted.own
    assert all(id(p) in inside for p in adapted.own.values())


def test_checkpointing_reaches_the_base_of_an_adapter(teacher: Path):
    base = load_denoiser(str(teacher), 10)
    adapted = Adapted(base, "one", rank=2)
    assert enable_checkpointing(adapted) == 1
    assert base.net.model.is_gradient_checkpointing


def test_copies_answer_alike_and_stand_apart(teacher: Path):
    base = load_denoiser(str(teacher), 10)
    one = Adapted(base, "one", rank=2)
    with torch.no_grad():
        for p in one.parameters():
            p += 0.1
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 1, 8, 8, generator=g), torch.tensor([0.3, 2.0], dtype=torch.float64)
    labels = torch.tensor([0, 7])
    with torch.no_grad():
        mine = one(x, t, labels).x0
        far, near = apart(one), copy.deepcopy(one)
        assert torch.equal(far(x, t, labels).x0, mine)
        assert torch.equal(near(x, t, labels).x0, mine)
        assert near.base is base
        assert far.base is not base
        for p in one.parameters():
            p.zero_()
        assert torch.equal(far(x, t, labels).x0, mine)
        assert torch.equal(near(x, t, labels).x0, mine)
        assert not torch.equal(one(x, t, labels).x0, mine)


class Bare(torch.nn.Module):
    """Just enough of a denoiser around a diffusers model for an adapter to find its network."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.net = torch.nn.ModuleDict({"model": model})

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        return self.net["model"](x, t, encoder_hidden_states=cond).sample


@pytest.mark.parametrize("targets", [None, ("to_q", "to_v", "conv1")])
def test_diffusers_loads_the_lora_file(tmp_path: Path, targets: tuple[str, ...] | None):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from fewstep.networks.lora_file import NAME, save_lora

    model = condition_unet()
    stock = copy.deepcopy(model)
    one = Adapted(Bare(model), "one", rank=3, alpha=5.0, targets=targets)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in one.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    x, t = torch.randn(2, 4, 8, 6, generator=g), torch.tensor([10, 700])
    text = torch.randn(2, 5, 12, generator=g)
    save_lora(one, tmp_path / NAME)
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=stock, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with torch.no_grad():
        bare = pipe.unet(x, t, text).sample
        pipe.load_lora_weights(tmp_path)
        mine, theirs = one(x, t, text), pipe.unet(x, t, text).sample
        assert float((mine - bare).abs().max()) > 1e-3
        torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5)
        pipe.fuse_lora()
        torch.testing.assert_close(pipe.unet(x, t, text).sample, mine, rtol=0, atol=2e-5)
    other = Adapted(Bare(copy.deepcopy(plain_copy(one.base).net["model"])), "two", rank=3, alpha=5.0, targets=targets)
    read_lora(other, tmp_path)
    assert same(own_state(other), own_state(one)) == []


def test_lora_files_that_do_not_fit_are_refused(tmp_path: Path):
    from fewstep.networks.lora_file import NAME, save_lora

    one = Adapted(Bare(condition_unet()), "one", rank=3, targets=("to_q",))
    path = save_lora(one, tmp_path / NAME)

    def refused(path: Path, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            read_lora(Adapted(Bare(condition_unet()), "x", **options), path)
        return str(caught.value)

    told = refused(path, rank=3, targets=("to_q", "to_k"))
    assert told.startswith(f"{path}: does not fit: it lacks unet.")
    assert "set lora.targets to the layers of the file (to_q)" in told
    assert "the file's rank seems to be 3: set lora.rank to it" in refused(path, rank=2, targets=("to_q",))
    told = refused(path, rank=3, alpha=6.0, targets=("to_q",))
    assert told == f"{path}: was trained with alpha 3.0, not 6.0; set lora.alpha to 3.0"
    told = refused(tmp_path / "x.onnx", targets=("to_q",))
    assert told == f"{tmp_path}/x.onnx: a LoRA file must be safetensors, such as {NAME}"
    (tmp_path / "half.safetensors").write_bytes(path.read_bytes()[:99])
    assert "half.safetensors: cannot be read as a LoRA file" in refused(tmp_path / "half.safetensors", targets=("to_q",))
    outside = Adapted(Bare(condition_unet()), "x", targets=("to_q",))
    outside.own["elsewhere/lora_A/weight"] = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match="also holds elsewhere"):
        lora_tensors(outside)


def test_a_pickled_lora_is_refused_and_its_command_works(tmp_path: Path):
    from fewstep.networks.lora_file import NAME, save_lora

    one = Adapted(Bare(condition_unet()), "one", rank=3, targets=("to_q",))
    with torch.no_grad():
        for p in one.parameters():
            p += 0.1
    pickled = pickle_weights(save_lora(one, tmp_path / NAME), "pytorch_lora_weights.bin")
    other = Adapted(Bare(condition_unet()), "two", rank=3, targets=("to_q",))
    for given in (tmp_path, pickled):
        with pytest.raises(UserError) as caught:
            read_lora(other, given)
        said, _, _ = str(caught.value).partition("\n")
        assert said == (
            f"{pickled}: a LoRA file must be safetensors; a pickle is not opened. Convert it first, then give "
            f"{tmp_path / NAME}:"
        )
    assert same(own_state(other), own_state(one)) != []
    run_command(str(caught.value))
    read_lora(other, tmp_path)
    assert same(own_state(other), own_state(one)) == []


def test_recipes_whose_adapter_fits_nothing_are_refused(teacher: Path):
    with pytest.raises(RecipeError, match=r"lora: targets \['to_z'\] match no Linear or Conv2d layer.*conv1"):
        trainer_of(teacher, "student={name: lora, targets: [to_z]}", "critic={name: copy}")
    with pytest.raises(RecipeError, match=r"lora\.of: the student is an adapter itself"):
        trainer_of(teacher, "student={name: lora}", "critic={name: lora, of: student}")
    with pytest.raises(RecipeError, match=r"lora\.of: the teacher is analytic and has no weights to adapt"):
        Trainer(load("toy/dmd2", ["student={name: lora}"]), cpu=True)


def test_a_student_that_diffusers_loads_no_lora_into_says_so(run: tuple[str, Path], tmp_path: Path):
    from fewstep.export.lora import export_lora

    _, folder = run
    product = open_product(folder)
    message = "UNet2DModel; export fused" if isinstance(product.net, Adapted) else "needs a student that is an adapter"
    with pytest.raises(UserError, match=message):
        export_lora(product, tmp_path / "out")
    assert not (tmp_path / "out").exists()
