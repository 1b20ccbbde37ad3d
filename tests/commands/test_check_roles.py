"""What a recipe shows, `check` tells: by file and line what cannot be built, by name what is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_pictures import encoded, noise
from tiny_teacher import make_teacher

from fewstep.cli import main
from fewstep.commands.check_recipe import check
from fewstep.config import RecipeError, UserError
from fewstep.networks.adapters import own_state
from fewstep.networks.outline import outline, whole
from fewstep.recipe.store import load
from fewstep.train.session import Session

DIGITS, TOY = "digits-dmd2", "toy/dmd2"
GAN = "method.gan={weight: 0.01}"
PLAIN = "{name: images, path: data, grey: true}"
REFUSED: list[tuple[str, tuple[str, ...], str, str]] = [
    # Names of layers that the network lacks.
    (DIGITS, ("discriminator.taps=[mid, ghost]",), "discriminator.taps=[mid, ghost]",
     "discriminator.taps: the teacher has no 'ghost'; it has mid, down0, down1, up0, up1"),
    (DIGITS, ("discriminator={trunk: critic, taps: [down2]}",), "discriminator", "discriminator.taps: the critic has no"),
    (TOY, ("discriminator.taps=[block0]", GAN), "discriminator.taps", "discriminator.taps: the critic has no 'block0';"),
    (TOY, ("discriminator.trunk=teacher", GAN), "discriminator", "the teacher has no 'mid'; it has none: it is analytic"),
    (DIGITS, ("student={name: lora, targets: [ghost]}",), "student", "student.targets: 'ghost' ends the name of no laye"),
    # Networks that cannot be built.
    (DIGITS, ("student={name: mlp}",), "student", "student: network mlp is for vectors; the data has shape [1, 8, 8]"),
    (DIGITS, ("student={name: dit, patch: 3}",), "student", "student.patch: 3: does not divide height and width of the"),
    ("digits-teacher", ("student.channels=[8, 16, 24, 32, 40]",), "student.channels", "multiples of 16, not 8 x 8"),
    (TOY, ("critic={name: lora, of: teacher}", "copy={}"), "critic", "critic.of: the teacher is analytic and has no wei"),
    (TOY, ("student={name: copy, of: teacher}",), "student", "student.of: the teacher is analytic and has no weights to"),
    (DIGITS, ("student={name: lora}", "critic={name: lora, of: student}"), "critic", "critic.of: the student is an adap"),
    (DIGITS, ("student={name: by_class, members: 20, of: {name: copy}}",), "student", "student.members: 20 students for"),
    (DIGITS, ("roles.perceptual={name: lpips, features: a, linear: b}",), "roles.perceptual", "need a side of 16, not 8"),
    (TOY, ("teacher.process={name: edm}",), "teacher.process", "differs from the student's"),
    # Data that is not the teacher's.
    (DIGITS, ("teacher.classes=3",), "", "teacher: teacher assets:digits-teacher: has 11 class embeddings, which fits 1"),
    (DIGITS, ("data={name: ring}", "method.guidance=1.0", "evaluate.guidance=1.0"), "", "11 class embeddings, which fit"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "argument", "words"), REFUSED)
def test_what_cannot_be_built_is_refused_at_its_line(name: str, settings: tuple[str, ...], argument: str, words: str):
    """And building it in earnest is refused too: nothing good is turned away."""
    with pytest.raises(RecipeError) as told:
        check(name, settings)
    assert words in str(told.value)
    given = next((s for s in settings if argument and s.startswith(argument)), None)
    place = f"argument {given!r}: " if given else f"{name.rpartition('/')[2]}.yaml:"
    assert str(told.value).startswith(place)
    with pytest.raises((RecipeError, UserError, ValueError)):
        Session(load(name, settings), cpu=True)


COPIES: list[tuple[str, tuple[str, ...], str]] = [
    (TOY, ("critic={name: mlp, width: 32}",), "net.first.bias: critic has [32], student has [192]"),
    (TOY, ("critic={name: mlp, depth: 4}",), "net.layers.3.bias: critic has no such weight, student has [192]"),
    (DIGITS, ("critic={name: unet2d}", "copy={critic: student}"), "net.model.class_embedding.weight: critic has [11, 12"),
    (DIGITS, ("critic={name: lora}", "copy={critic: student}"), "critic is an adapter, the other has whole weights"),
    (DIGITS, ("student={name: lora}", "critic={name: lora, rank: 3}", "copy={critic: student}"), "their ranks are 3 and"),
    (TOY, ("roles.twin={name: mlp, width: 8}", "before.0.copy={twin: student}"), "net.first.bias: twin has [8]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "words"), COPIES)
def test_copies_of_other_networks_are_refused_before_a_stage_is_trained(name: str, settings: tuple[str, ...], words: str):
    with pytest.raises(RecipeError) as told:
        check(name, settings)
    stage = "before.0." if "before" in settings[-1] else ""
    assert f"{stage}copy." in str(told.value)
    assert f"are different networks, so the weights cannot be copied: {words}" in str(told.value)
    from fewstep.train.loop import Loop

    recipe = load(name, settings)
    loop = Loop(Session(recipe, cpu=True))
    with pytest.raises(UserError, match="different networks"):
        loop.begin(recipe.stages()[0 if stage else -1])


@pytest.mark.parametrize("settings", [
    ("critic={name: mlp}",), ("critic={name: copy, of: student}",), ("student={name: mlp, width: 48}",),
    ("roles.twin={name: mlp, prediction: eps}", "before.0.copy={twin: student}"),
])  # fmt: skip
def test_copies_of_equal_networks_pass(settings: tuple[str, ...]):
    assert check(TOY, settings)[1] == []


def test_a_unet_differs_in_layers_that_its_outline_has_not():
    """The outline has the first layer, time and classes; depth and attention show in the config alone."""
    base = ("data={name: digits}", "evaluate=null", "roles.twin={name: unet2d, %s}", "copy={twin: student}")
    student = "student={name: unet2d, channels: [32, 64], layers: 1}"
    for change, words in (
        ("layers: 2", "layers_per_block: twin has 2, student has 1"),
        ("channels: [32, 96]", "block_out_channels: twin has (32, 96), student has (32, 64)"),
        ("attention: true", "down_block_types: twin has "),
    ):
        with pytest.raises(RecipeError) as told:
            check("digits-teacher", [student, *(s.replace("%s", change) for s in base)])
        assert words in str(told.value)
    assert check("digits-teacher", [student, *(s.replace("%s", "groups: 4") for s in base)])[1] == []


def test_an_outline_made_whole_is_the_network(tmp_path: Path):
    from fewstep.networks.diffusers import load_denoiser
    from fewstep.networks.folder import read_folder

    folder = str(make_teacher(tmp_path / "teacher"))
    made = outline(read_folder(folder).config)
    assert made is not None
    net: Any = load_denoiser(folder).net
    ours, theirs = ({k: v.shape for k, v in own_state(m).items()} for m in (whole(made), net.model))
    assert ours == theirs


def test_pictures_that_a_network_cannot_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{i}.png").write_bytes(encoded(Image.fromarray(noise(7, 7))))
    make_teacher(tmp_path / "teacher", classes=0)
    own = [f"data={PLAIN}", "evaluate=null"]
    for settings, words in (
        (own, "student.channels: 2 levels halve a side 1 times"),
        ([*own, "student={name: dit, patch: 2}"], "student.patch: 2: does not divide"),
    ):
        with pytest.raises(RecipeError, match=words):
            check("digits-teacher", settings)
    taught = [*own, "teacher.path=teacher", "method.guidance=1.0"]
    with pytest.raises(RecipeError, match="teacher: it halves sides, so they must be multiples of 2, and the data has 7"):
        check(DIGITS, taught)
    with pytest.raises(UserError, match="it halves sides, so they must be multiples of 2, and the data has 7 x 7"):
        Session(load(DIGITS, taught), cpu=True)
    with pytest.raises(RecipeError, match=r"teacher: takes 1 channels, but the data has shape \[3, 8, 8\]"):
        check(DIGITS, [*taught, "data={name: images, path: data, size: 8}"])
    assert check(DIGITS, [*taught, "data.size=8"])[1] == []
    (tmp_path / "data" / "0.png").write_bytes(b"no picture")
    with pytest.raises(RecipeError, match=r"data: .*0\.png: cannot be read"):
        check(DIGITS, taught)


ABSENT = [
    (DIGITS, "teacher.path=nowhere", "teacher nowhere: no such folder"),
    (DIGITS, "teacher.wrapper='mine.py:Mine'", "teacher.wrapper: mine.py:Mine is code, which is run by `fewstep run` al"),
    (DIGITS, "teacher={name: module, factory: 'a:b', arguments: {x: x}, prediction: v, time_input: t, "
     "process: {name: flow}}",
     "teacher.factory: a:b is code"),
    (DIGITS, f"data={PLAIN}", "data folder data: no such folder"),
    (DIGITS, "data={name: captions, path: data, size: 8}", "data folder data: no such folder"),
    (DIGITS, "data={name: webdataset, shards: 'x-{00..01}.tar', size: 8}", "shards x-{00..01}.tar: x-00.tar is missing"),
    (DIGITS, "data={name: latents, path: data, vae: v}", "latents data: no such folder"),
    (DIGITS, "data={name: latents, path: data, vae: v}", "vae v: no such folder"),
    (DIGITS, "data={name: prompts, path: p.txt, shape: [1, 8, 8], encoder: {name: sentence, path: e}}", "prompts p.txt:"),
    (DIGITS, "data={name: captions, path: data, size: 8, encoder: {name: sentence, path: e}}", "encoder e: no such fold"),
    (DIGITS, "roles.perceptual={name: lpips, features: a, linear: b, size: 32}", "lpips: a: no such file"),
    (DIGITS, "student={name: lora, file: x.safetensors}", "lora.file x.safetensors: no such file"),
    (DIGITS, "evaluate={metric: fd, against: real}", "evaluate.against real: no such file or folder"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "setting", "words"), ABSENT)
def test_what_is_not_here_is_named_and_no_mistake(
    name: str,
    setting: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemExit('this code was run')")
    more = [] if "evaluate" in setting else ["evaluate=null"]
    with pytest.raises(SystemExit) as left:
        main(["recipes", "check", name, setting, "method.guidance=1.0", *more])
    out, err = capsys.readouterr()
    assert (left.value.code, err) == (3, "")
    assert f"\n{name}: not checked: {words}" in out
    assert "--trust-code" not in out


def test_a_mistake_beside_what_is_not_here_is_still_told():
    with pytest.raises(RecipeError, match=r"copy\.critic: critic and student are different networks"):
        check(TOY, ["critic={name: mlp, width: 32}", "roles.far={name: lora, of: student, file: nowhere}"])


NO_GOOD = [
    "before.0.method.times={name: lognormal, std: 0.0}", "before.0.method.times={name: logit_normal, std: -1.0}",
    "before.0.method.times={name: sid, t_max: 0}", "student.process={name: edm, sigma_data: 0.0}",
    "student.process={name: edm, sigma_min: 2.0, sigma_max: 1.0}", "student.process={name: edm, rho: 1e30}",
    "student.process={name: discrete_vp, beta_end: 1.5}", "student.process={name: discrete_vp, beta_start: 0.0}",
    "student.process={name: cosine, logsnr_min: 3.0, logsnr_max: -3.0}", "student.process={name: vp, beta_delta: 0.0}",
    "student.process={name: shifted_flow, shift: 0.0}", "method={name: ctm, target_decay: 1.5}",
    "method={name: scfm, target_decay: -0.1}",
]  # fmt: skip


@pytest.mark.parametrize("setting", NO_GOOD)
def test_values_that_cannot_train_are_refused(setting: str):
    with pytest.raises(RecipeError, match=r"argument '"):
        load(TOY, [setting])


def test_labels_that_are_not_their_folders_numbers_are_refused_with_a_teacher_of_classes(tmp_path: Path):
    def ready(first: int, *settings: str) -> str:
        root = tmp_path / str(first)
        for c in range(first, first + 10):
            (root / str(c)).mkdir(parents=True, exist_ok=True)
            (root / str(c) / "x.png").write_bytes(encoded(Image.fromarray(noise(8, 8, seed=c))))
        data = f"data={{name: images, path: {root}, grey: true}}"
        try:
            check(DIGITS, [data, *settings, "evaluate=null"])
            Session(load(DIGITS, [data, *settings, "evaluate=null"]), cpu=True)
        except RecipeError as error:
            with pytest.raises(RecipeError, match="knows classes by their numbers"):
                Session(load(DIGITS, [data, *settings, "evaluate=null"]), cpu=True)
            return str(error)
        return ""

    assert ready(0) == ""
    assert ready(1, "data.renumber=true") == ""
    told = ready(1)
    assert (
        "knows classes by their numbers, and in the data class folder 1 has label 0, as there is no folder 0; re" in told
    )
    # A network that learns these very labels has no others.
    check("digits-teacher", [f"data={{name: images, path: {tmp_path / '1'}, grey: true}}", "evaluate=null"])
