"""`fewstep new`: recipes that check and train, for pictures and for a tiny pipeline of every wrapped family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tiny_new import make_pictures, stand_in_for_text
from tiny_pipelines import FAMILIES, built, dit, make_pipeline
from tiny_runs import names
from tiny_teacher import make_teacher

from fewstep.cli import main
from fewstep.commands.check_recipe import check
from fewstep.commands.new import Wish, new
from fewstep.commands.new_lines import levels, power_below, rendered
from fewstep.commands.new_pipeline import look
from fewstep.commands.write_recipe import LINE, SCHEMA
from fewstep.config import UserError, load_yaml
from fewstep.recipe.json_schema import json_schema
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer

SMALL = ("train.steps=1", "train.batch=2", "train.accumulate=1", "train.precision=fp32", "train.sample_every=0")
TEXT = [name for name in FAMILIES if name != "dit"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: make_pipeline(root / name, name) for name in FAMILIES}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def written(file: str | Path) -> dict[str, Any]:
    """The data of a recipe, whose every line says where it comes from."""
    text = Path(file).read_text()
    assert text.startswith(LINE)
    assert [line for line in text.splitlines() if "  # " not in line[1:] and not line.startswith("#")] == []
    return load_yaml(Path(file)).data


def trained(file: str, *settings: str) -> Trainer:
    """A few updates; weights that it trains have moved, and the teacher's own have not.

    Without guidance teacher and critic agree until the critic has moved: the first update leaves the student alone.
    """
    recipe = load(file, [*SMALL, *settings])
    trainer = Trainer(recipe, None, cpu=True)
    before = {role: [p.detach().clone() for p in net.parameters()] for role, net in trainer.roles.items()}
    trainer.fit()
    for role, net in trainer.roles.items():
        moved = any(not torch.equal(a, b) for a, b in zip(before[role], net.parameters(), strict=True))
        assert moved == (role != "teacher" or any(s.name == "lora" for s in (recipe.student, recipe.critic) if s)), role
    return trainer


def test_pixels_from_scratch(here: Path):
    """A teacher of the pictures is trained and exported, and the student's recipe trains from it."""
    make_pictures(here / "shapes", 12, (16, 16), classes=3)
    told = list(new(Wish(Path("mine.yaml"), 2, data=Path("shapes"))))
    assert told[1:] == ["fewstep run mine-teacher.yaml", "fewstep run mine.yaml"]
    assert names(here) == ["mine-teacher.yaml", "mine.yaml", SCHEMA, "shapes"]
    first, second = written("mine-teacher.yaml"), written("mine.yaml")
    jsonschema.Draft202012Validator(json_schema()).validate(first)
    assert first["student"]["channels"] == [32, 64, 96]
    assert first["train"]["batch"] == second["train"]["batch"] == 8
    assert ("discriminator" in second, second["method"]["gan"]) == (False, None)
    assert check("mine-teacher.yaml", [])[0][0] == "mine-teacher.yaml: denoise, 3000 steps"
    assert "no such folder" in "\n".join(check("mine.yaml", [])[1])
    main_run("run", "mine-teacher.yaml", "student.channels=[8,16]", *SMALL)
    assert Path(second["teacher"]["path"]).is_dir()
    told, missing = check("mine.yaml", [])
    assert missing == []
    assert "agree" in told[1]
    assert "will not export" not in "\n".join(told)
    trained("mine.yaml", "train.steps=2")


def test_folders_whose_numbers_are_no_labels_are_taken_by_their_order(here: Path):
    """Both recipes say so: the teacher is trained on that order, and the student is refused otherwise."""
    make_pictures(here / "shapes", 4, (16, 16), classes=2)
    for c in (0, 1):
        (here / "shapes" / f"class{c}").rename(here / "shapes" / str(c + 1))
    list(new(Wish(Path("mine.yaml"), 2, data=Path("shapes"))))
    assert [written(file)["data"].get("renumber") for file in ("mine-teacher.yaml", "mine.yaml")] == [True, True]


def main_run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert not caught.value.code


def test_many_pictures_have_a_discriminator_on_a_frozen_trunk(here: Path):
    make_pictures(here / "grey: #1", 500, (8, 8), grey=True)
    list(new(Wish(Path("mine.yaml"), 1, data=Path("grey: #1"))))
    data = written("mine.yaml")
    assert data["data"] == {"name": "images", "path": "grey: #1", "grey": True, "held_out": 0.1}
    assert data["evaluate"]["samples"] == 100  # 50 are held out
    assert data["about"] == "1-step dmd2 student of a teacher of grey: #1"
    assert data["discriminator"]["trunk"] == "teacher"
    assert data["method"]["gan"]["weight"] == 0.3
    assert written("mine-teacher.yaml")["method"]["drop_cond"] == 0.0


@pytest.mark.parametrize("method", ["dmd2", "sid", "consistency"])
def test_a_pixel_teacher_of_ones_own(here: Path, method: str):
    make_pictures(here / "grey", 20, (8, 8), classes=10, grey=True)
    make_teacher(here / "unet")
    list(new(Wish(Path("mine.yaml"), 4, data=Path("grey"), teacher="unet", method=method)))
    top = 0.5 if method == "sid" else 1.0
    assert written("mine.yaml")["method"]["steps"] == [top, 0.75 * top, 0.5 * top, 0.25 * top]
    assert "agree" in check("mine.yaml", [])[0][1]
    trained("mine.yaml", "train.steps=2")


@pytest.mark.parametrize(("name", "lora"), [*((name, name in ("sana", "sdxl")) for name in TEXT), ("flux", True)])
def test_prompts_alone(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, here: Path, name: str, lora: bool):
    """The settings are the folder's own; the recipe checks, exports and makes an update pass."""
    folder = folders[name]
    family = look(str(folder))
    stand_in_for_text(monkeypatch, family.wrapper)
    Path("prompts.txt").write_text("a red square\ntwo green dots\n")
    list(new(Wish(Path("mine.yaml"), 4, teacher=str(folder), lora=lora, prompts=Path("prompts.txt"))))
    data = written("mine.yaml")
    assert data["teacher"]["path"] == str(folder)
    assert data["student"]["name"] == ("lora" if lora else "copy")
    assert data["method"]["critic"]["weight"] == FAMILIES[name].kind
    assert (data["method"]["steps"], data["method"]["gan"]) == ([1.0, 0.75, 0.5, 0.25], None)
    assert data["method"]["guidance"] == GUIDANCE[name]
    assert data["method"]["critic"]["steps"] == (10 if name in ("sd15", "sd21") else 5)
    assert data["data"].get("zeros", False) == (name == "sdxl")
    small = list(FAMILIES[name].shape)
    told, missing = check("mine.yaml", [f"data.shape={small}"])
    assert missing == []
    assert "agree" in told[1]
    assert "will not export" not in "\n".join(told)
    trained("mine.yaml", f"data.shape={small}", f"train.steps={1 + (GUIDANCE[name] == 1)}")


GUIDANCE = {"sd15": 1.75, "sd21": 1.75, "sdxl": 8.0, "sd3": 7.0, "flux": 1.0, "pixart": 4.5, "sana": 4.5}


def test_shifts_and_embedded_guidance_are_told(folders: dict[str, Path], here: Path):
    Path("prompts.txt").write_text("a red square\n")
    for name, said in (("sd3", "the time shift 3 of its scheduler"), ("flux", "the time shift 3.16 of its scheduler")):
        list(new(Wish(Path(f"{name}.yaml"), 4, teacher=str(folders[name]), prompts=Path("prompts.txt"))))
        (line,) = (row for row in Path(f"{name}.yaml").read_text().splitlines() if row.startswith("  steps: [1.0"))
        assert said in line
    assert written("flux.yaml")["teacher"]["guidance"] == 3.5
    assert written("sd3.yaml")["method"]["times"] == {"name": "uniform", "low": 0.02, "high": 0.98}


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_pictures_become_latents_and_a_discriminator_taps_the_depths(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, here: Path, name: str
):
    folder, family = folders[name], look(str(folders[name]))
    stand_in_for_text(monkeypatch, family.wrapper)
    for i in range(4):
        (make_pictures(here / "photos", 4, (30, 20)) / f"{i}.txt").write_text(f"picture {i}")
    told = list(new(Wish(Path("mine.yaml"), 1, data=Path("photos"), teacher=str(folder))))
    assert told[2] == f"fewstep cache-latents mine-pictures.yaml --vae {folder} --out mine-latents"
    assert written("mine-pictures.yaml")["data"]["size"] == 16
    main_run(*told[2].split()[1:])
    data = written("mine.yaml")
    assert data["discriminator"]["taps"] == {"sd15": ["mid"], "sd3": ["block1"]}[name]
    assert data["method"]["gan"]["weight"] == 5e-3
    trained("mine.yaml", "discriminator.width=4")
    list(new(Wish(Path("again.yaml"), 1, data=Path("mine-latents"), teacher=str(folder))))
    assert written("again.yaml")["data"]["path"] == "mine-latents"


def test_a_class_conditional_transformer_needs_its_pictures(here: Path):
    folder = here / "dit"
    built(lambda: dit(classes=3)).save_pretrained(folder)
    with pytest.raises(UserError, match="a DiTPipeline takes 3 classes, so prompts will not do; add --data"):
        list(new(Wish(Path("mine.yaml"), 4, teacher=str(folder), prompts=Path("p.txt"))))
    make_pictures(here / "photos", 6, (16, 16), classes=3)
    told = list(new(Wish(Path("mine.yaml"), 4, data=Path("photos"), teacher=str(folder))))
    main_run(*told[2].split()[1:])
    data = written("mine.yaml")
    assert (data["discriminator"]["taps"], data["method"]["guidance"]) == (["block1"], 4.0)
    assert "agree" in check("mine.yaml", [])[0][1]
    trained("mine.yaml", "discriminator.width=4")


def test_taps_stand_at_50_75_and_99_percent_of_the_depth(folders: dict[str, Path]):
    family = look(str(folders["sd3"]))

    class Deep:
        def __init__(self, count: int) -> None:
            self.count = count

        def blocks(self) -> dict[str, None]:
            return {f"block{i}": None for i in range(self.count)}

    for count, taps in ((24, "[block12, block18, block23]"), (57, "[block28, block42, block56]"), (1, "[block0]")):
        net: Any = type("Net", (), {"net": Deep(count)})()
        assert replace(family, net=net).taps()[0] == taps


def test_levels_and_batches():
    assert (levels(4), levels(3, 1000), levels(1), levels(2, top=0.5)) == (
        "[1.0, 0.75, 0.5, 0.25]", "[1.0, 0.667, 0.333]", "[1.0]", "[0.5, 0.25]",
    )  # fmt: skip
    assert [power_below(n) for n in (1, 2, 63, 64, 300)] == [1, 2, 32, 64, 256]
    with pytest.raises(ValueError, match="does not say where it comes from"):
        rendered([("train:", "")])


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, "new: name --data FOLDER with your pictures, --teacher FOLDER"),
        ({"data": "none"}, "--data none: no such folder"),
        ({"data": "empty"}, "--data empty: no pictures"),
        ({"data": "file.txt"}, "--data file.txt: is a file; name the folder"),
        ({"data": "broken"}, "--data broken/0.png: cannot be read"),
        ({"data": "pictures", "steps": 0}, "--steps 0: a student takes at least 1"),
        ({"data": "pictures", "steps": 65}, "--steps 65: a student of few steps takes at most 64"),
        ({"data": "pictures", "method": "dmd3"}, "writes dmd2, sid, consistency from pixels; did you mean 'dmd2'?"),
        ({"data": "pictures", "method": "emd-x"}, "--method emd-x: `fewstep new` writes dmd2"),
        ({"data": "pictures", "lora": True}, "--lora is for a pipeline; add --teacher FOLDER"),
        ({"data": "pictures", "prompts": "file.txt"}, "--prompts is for a pipeline"),
        ({"data": "small"}, "--data small: the smallest picture has 7 pixels, a UNet needs 8"),
        ({"data": "pictures", "out": "mine.txt"}, "mine.txt: a recipe's name ends in .yaml"),
        ({"data": "pictures", "out": "no/mine.yaml"}, "no: no such folder"),
        ({"data": "pictures", "out": "there.yaml"}, "there.yaml: exists; overwrite it with --force"),
        ({"teacher": "none"}, "teacher none: no such folder"),
        ({"teacher": "empty"}, "teacher empty: unet/config.json is missing"),
        ({"teacher": "SD"}, "takes text; add --prompts FILE (one a line), or --data FOLDER"),
        ({"teacher": "SD", "prompts": "none.txt"}, "prompts none.txt: cannot be read"),
        ({"teacher": "SD", "prompts": "file.txt", "data": "pictures"}, "--prompts and --data: the captions"),
        ({"teacher": "SD", "prompts": "file.txt", "method": "kd"}, "--method kd: `fewstep new` writes dmd2 for a"),
        ({"teacher": "SD", "data": "none"}, "--data none: no such folder"),
        ({"teacher": "unet"}, "--teacher unet: works on pixels; add --data FOLDER"),
        ({"teacher": "unet", "data": "pictures"}, "pictures of shape [3, 8, 8], but unet takes [1, 8, 8]"),
    ],
)  # fmt: skip
def test_refusals_name_the_option_and_the_remedy(
    folders: dict[str, Path], here: Path, wish: dict[str, Any], message: str
):
    (here / "empty").mkdir()
    (here / "file.txt").write_text("a prompt\n")
    (here / "there.yaml").write_text("")
    make_pictures(here / "pictures", 2, (8, 8))
    make_pictures(here / "small", 1, (130, 7))
    (make_pictures(here / "broken", 1) / "0.png").write_bytes(b"no picture")
    if wish.get("teacher") == "unet":
        make_teacher(here / "unet")
    given = {k: Path(v) if k in ("data", "prompts", "out") else v for k, v in wish.items()}
    given["teacher"] = str(folders["sd15"]) if wish.get("teacher") == "SD" else wish.get("teacher")
    before = names(here)
    with pytest.raises(UserError) as caught:
        list(new(Wish(**{"out": Path("mine.yaml"), "steps": 1, **given})))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert names(here) == before


def test_the_command_and_force(here: Path, capsys: pytest.CaptureFixture[str]):
    make_pictures(here / "pictures", 2, (8, 8))
    arguments = ["new", "--data", "pictures", "--steps", "1", "--out", "mine.yaml"]
    main_run(*arguments)
    assert capsys.readouterr().out.startswith("wrote mine-teacher.yaml and mine.yaml: each line says")
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    main_run(*arguments, "--force", "--method", "sid")
    assert written("mine.yaml")["method"]["name"] == "sid"
    assert json.loads(Path(SCHEMA).read_text())["title"] == "fewstep recipe"
