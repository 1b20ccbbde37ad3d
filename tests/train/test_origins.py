"""What a run stands on outside its folder has a digest: another teacher, encoder or data is said or refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import same
from tiny_teacher import make_run, make_teacher

from fewstep.commands.report import opened
from fewstep.commands.run import run_recipe
from fewstep.config import UserError
from fewstep.data.encoders import SentenceEncoder
from fewstep.data.latents import Latents
from fewstep.data.pictures import Captions, Prompts, WebDataset
from fewstep.files import BLOCK, digest_of
from fewstep.networks.teachers import DiffusersTeacher
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load, load_run
from fewstep.train import resume
from fewstep.train.claim import read_origin
from fewstep.train.origins import changes, check_product, check_resumed, origins_of, stands_on_teacher
from fewstep.train.product import open_product
from fewstep.train.state import checkpoints, read_origins
from fewstep.train.trainer import Trainer


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def files(root: Path, **more: bytes) -> list[Path]:
    """Small and large files of several kinds below a folder."""
    big = bytes(range(256)) * 1024
    held = {"a/1.png": b"one", "a/2.png": big, "w.safetensors": big, "t.txt": big, **more}
    return [write(root / name, data) for name, data in held.items()]


def test_a_digest_is_of_names_sizes_and_samples(tmp_path: Path):
    """Order and place of the folder do not count; each of the things that it samples does."""
    first = digest_of(files(tmp_path / "x"))
    assert first.startswith("4 files, 786435 bytes, sha256 ")
    assert digest_of(reversed(files(tmp_path / "moved" / "y"))) == first
    assert digest_of([]) == digest_of(iter(())) != first
    inner = BLOCK + round((262144 - BLOCK) / 13)  # a block that .safetensors has and .png has not
    changed: dict[str, Callable[[list[Path]], Any]] = {
        "renamed": lambda p: p[0].rename(p[0].with_name("3.png")),
        "grown": lambda p: p[1].write_bytes(p[1].read_bytes() + b"x"),
        "first byte": lambda p: flip(p[1], 0),
        "last byte": lambda p: flip(p[1], -1),
        "within weights": lambda p: flip(p[2], inner - 1),
        "within text": lambda p: flip(p[3], 100_000),
    }
    for name, change in changed.items():
        folder = tmp_path / name
        paths = files(folder)
        change(paths)
        assert digest_of(p for p in folder.rglob("*") if p.is_file()) != first, name
    with pytest.raises(UserError, match=r"gone.png: cannot be read: No such file"):
        digest_of([tmp_path / "gone.png"])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_the_blocks_within_weights_are_spread_evenly(tmp_path: Path):
    """14 blocks of 4 KiB: 1 GiB of weights costs as many bytes as a small file."""
    path = tmp_path / "w.safetensors"
    size = 1 << 20
    whole = digest_of([write(path, bytes(size))])
    seen = 0
    for at in range(0, size, BLOCK):
        flip(path, at)
        seen += digest_of([path]) != whole
        flip(path, at)
    assert 12 <= seen <= 14


def test_an_edit_that_keeps_the_size_is_seen_in_words_within_a_tar_and_in_plain_pixels(tmp_path: Path):
    path, labels = tmp_path / "s.tar", []
    with tarfile.open(path, "w") as tar:
        for i in range(60):
            for name, data in ((f"{i}.png", bytes(3000)), (f"{i}.cls", b"%d" % (i % 10)), (f"{i}.txt", b"words")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with tarfile.open(path) as tar:
        labels = [m.offset_data for m in tar if not m.name.endswith(".png")]
    assert len(labels) == 120
    whole = digest_of([path])
    for at in labels:
        flip(path, at)
        assert digest_of([path]) != whole, at
        flip(path, at)
    assert digest_of([path]) == whole
    path.write_bytes(path.read_bytes()[:30000])
    assert digest_of([path]) != whole  # cut: what is left is read
    picture = write(tmp_path / "x.bmp", bytes(1 << 15))
    whole = digest_of([picture])
    picture.write_bytes(bytes(9000) + b"\1" * 9000 + bytes((1 << 15) - 18000))
    assert digest_of([picture]) != whole


def test_parts_name_the_files_that_they_stand_on(tmp_path: Path):
    names = {"a.png": b"p", "a.txt": b"words", "b.png": b"q", "b.txt": b"more", "notes.md": b"-"}
    for name, data in names.items():
        write(tmp_path / name, data)
    encoder: Any = SentenceEncoder(path=str(tmp_path))

    def told(part: Any) -> list[str]:
        return sorted(p.name for p in part.files())

    assert told(Captions(path=str(tmp_path), size=8)) == ["a.png", "a.txt", "b.png", "b.txt"]
    write(tmp_path / "captions.jsonl", b'{"file": "b.png", "text": "more"}')
    assert told(Captions(path=str(tmp_path), size=8)) == ["b.png", "captions.jsonl"]
    assert told(Prompts(path=str(tmp_path / "p.txt"), shape=(1, 8, 8), encoder=encoder)) == ["p.txt"]
    assert told(Latents(path=str(tmp_path), vae="vae")) == ["index.json"]
    for n in range(2):
        write(tmp_path / f"s-{n}.tar", b"x")
    assert told(WebDataset(shards=str(tmp_path / "s-{0..1}.tar"), size=8)) == ["s-0.tar", "s-1.tar"]


def test_captions_have_the_digest_of_what_is_read(tmp_path: Path):
    """Hidden files and the copies that notebooks make are no part of the set; a linked folder is."""
    root, apart = tmp_path / "data", tmp_path / "apart"
    for name in ("a.png", "a.txt", "sub/b.png", "sub/b.txt"):
        write(root / name, name.encode())
    for name in ("c.png", "c.txt"):
        write(apart / name, name.encode())
    (root / "linked").symlink_to(apart)
    part = Captions(path=str(root), size=8)
    names = sorted(p.relative_to(root).as_posix() for p in part.files())
    assert names == ["a.png", "a.txt", "linked/c.png", "linked/c.txt", "sub/b.png", "sub/b.txt"]
    before = digest_of(part.files())
    for name in (".ipynb_checkpoints/a.png", ".hidden.png", "sub/.DS_Store", "__MACOSX/a.png", "notes.txt"):
        write(root / name, b"of no account")
    assert digest_of(part.files()) == before
    write(apart / "c.txt", b"other")
    assert digest_of(part.files()) != before


def stands(root: Path) -> tuple[Recipe, Callable[[str], Path]]:
    """A recipe that stands on files of every kind, and where each of them is."""
    places = {
        "teacher": make_teacher(root / "teacher") / "scheduler" / "scheduler_config.json",
        "perceptual": write(root / "vgg.pth", b"vgg"),
        "data": write(root / "prompts.txt", b"a fox"),
        "encoder": write(root / "encoder" / "config.json", b"{}"),
        "vae": write(root / "vae" / "config.json", b"{}"),
        "teacher.wrapper": write(root / "mine.py", b"class Mine: pass"),
    }
    write(root / "lin.pth", b"lin")
    write(root / "vae" / "x.safetensors", b"vae")
    told = f"data={{name: prompts, path: {places['data']}, shape: [1, 8, 8], vae: {root / 'vae'}, encoder: {{name: "
    recipe = load("digits-dmd2", [
        f"{told}sentence, path: {root / 'encoder'}}}}}",
        f"roles={{perceptual: {{name: lpips, features: {places['perceptual']}, linear: {root / 'lin.pth'}}}}}",
        f"teacher={{name: diffusers, path: {root / 'teacher'}, wrapper: '{root / 'mine.py'}:Mine'}}",
        "student={name: lora}", "method.gan=null", "discriminator=null", "optim={default: {lr: 1e-4}}",
        "method.guidance=1.0", "evaluate=null",
    ])  # fmt: skip
    return recipe, places.__getitem__


def test_each_part_that_a_run_stands_on_has_a_digest_of_its_own(tmp_path: Path):
    recipe, place = stands(tmp_path)
    then = origins_of(recipe)
    assert sorted(then) == ["data", "encoder", "perceptual", "teacher", "teacher.wrapper", "vae"]
    for name in then:
        place(name).write_bytes(place(name).read_bytes() + b" ")
        now = origins_of(recipe)
        assert list(changes(recipe, then, now)) == [name]
        goes_on = name in ("data", "vae", "teacher.wrapper")
        if goes_on:
            (line,) = check_resumed(recipe, then, now, Path("run"))
            assert line.startswith(f"{name} ")
            assert line.endswith("; training goes on with what is there now")
        else:
            with pytest.raises(UserError, match=f"run: cannot be resumed: {name} "):
                check_resumed(recipe, then, now, Path("run"))
        then = now


@pytest.mark.parametrize("gone", ["data", "encoder", "perceptual", "vae", "teacher.wrapper"])
def test_what_is_gone_does_not_hide_what_has_changed(tmp_path: Path, gone: str):
    recipe, place = stands(tmp_path)
    then = origins_of(recipe)
    place(gone).unlink()
    assert check_product(recipe, then, Path("run")) == []
    place("teacher").write_bytes(b"{} ")
    with pytest.raises(UserError, match=r"run: is an adapter on the teacher, and teacher .* has changed"):
        check_product(recipe, then, Path("run"))


def test_a_function_that_makes_a_teacher_has_a_digest(tmp_path: Path):
    file = write(tmp_path / "mine.py", b"def build(): ...")
    settings = f"teacher={{name: module, factory: '{file}:build', arguments: {{x: x, time: t}}, prediction: velocity, "
    recipe = load("toy/cd", [settings + "time_input: t, process: {name: flow}}"])
    then = origins_of(recipe)
    assert list(then) == ["teacher.factory"]
    file.write_bytes(b"def build(): return 0")
    (line,) = check_product(recipe, then, Path("run"))
    assert line.startswith(f"teacher.factory {file}:build has changed: 1 files, 16 bytes then, 1 files, 21 bytes now")


def test_a_variant_beside_plain_weights_is_not_the_teachers(tmp_path: Path):
    run_teacher = make_teacher(tmp_path / "teacher")
    part = DiffusersTeacher(path=str(run_teacher))
    before = digest_of(part.files())
    assert sorted(p.name for p in part.files()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "scheduler_config.json",
    ]
    write(run_teacher / "unet" / "diffusion_pytorch_model.fp16.safetensors", b"half")
    assert digest_of(part.files()) == before


def other_weights(teacher: Path) -> None:
    """The weights of a training that went on: the same header, other numbers."""
    (file,) = (teacher / "unet").glob("*.safetensors")
    save_file({k: v * 1.05 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a plain student and an adapter on it, each after two steps of three."""
    root = tmp_path_factory.mktemp("origins")
    teacher = make_teacher(root / "teacher")
    make_run(root / "plain", teacher)
    make_run(root / "lora", teacher, "student={name: lora, rank: 2}")
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """Copies whose teacher may change."""
    root = tmp_path / "copy"
    shutil.copytree(made, root)
    for name in ("plain", "lora"):
        recipe = root / name / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(str(made), str(root)))
    return root


def continued(run: Path) -> Trainer:
    trainer = Trainer(load_run(run), run, cpu=True)
    trainer.resume()
    return trainer


def test_a_moved_teacher_is_the_same(place: Path):
    assert continued(place / "plain").changed == []
    assert open_product(place / "lora").changed == ()
    recipe = load_run(place / "lora")
    assert stands_on_teacher(recipe)
    assert not stands_on_teacher(load_run(place / "plain"))
    assert read_origins(checkpoints(place / "lora" / "checkpoints")[-1]) == origins_of(recipe)


def test_another_teacher_is_refused_where_it_would_mean_nothing(place: Path, capsys: pytest.CaptureFixture[str]):
    other_weights(place / "teacher")
    with pytest.raises(UserError, match=r"plain: cannot be resumed: teacher .*teacher has changed: .* --from .*plain"):
        continued(place / "plain")
    with pytest.raises(UserError, match=r"lora: is an adapter on the teacher, and teacher .* has changed: .* --from"):
        opened(place / "lora")
    assert opened(place / "plain").net is not None  # its weights are all its own
    out = " ".join(capsys.readouterr().out.split())
    assert "note: teacher" in out
    assert "has changed: 3 files" in out
    trainer = Trainer(load(str(place / "lora" / "recipe.yaml"), ["train.steps=9"]), None, cpu=True)
    trainer.go_on_from(resume.newest_of(place / "lora"))  # asked for
    assert [line.split(" has ")[0] for line in trainer.changed] == [f"teacher {place / 'teacher'}"]


def test_other_data_is_said_and_noted_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import numpy as np
    from PIL import Image

    teacher = make_teacher(tmp_path / "teacher", classes=0)
    for i in range(8):
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(write(tmp_path / "data" / f"{i}.png", b""))
    quick = [f"teacher.path={teacher}", "discriminator.width=8", "method.critic.steps=1", "train.batch=6"]
    quick += ["train.ema=[]", "train.product=student", "train.sample_every=0", "evaluate=null", "method.guidance=1.0"]
    settings = [*quick, f"data={{name: images, path: {tmp_path / 'data'}, grey: true}}"]
    run = tmp_path / "run"
    run_recipe("digits-dmd2", [*settings, "train.steps=1"], run, False, False)
    assert read_origin(run)["settings"] == [*settings, "train.steps=1"]
    capsys.readouterr()
    run_recipe("digits-dmd2", [*settings, "train.steps=2"], run, True, False)
    assert "note: data" not in capsys.readouterr().out
    assert (read_origin(run)["recipe"], read_origin(run)["settings"][-1]) == ("digits-dmd2", "train.steps=2")
    (tmp_path / "data" / "0.png").unlink()
    assert opened(run).changed[0].startswith(f"data {tmp_path / 'data'} has changed: 8 files, ")
    assert "7 files" in capsys.readouterr().out.replace("\n", " ")
    run_recipe("digits-dmd2", [*settings, "train.steps=3"], run, True, False)
    out = " ".join(capsys.readouterr().out.split())
    assert "has changed: 8 files" in out
    assert "training goes on with what is there now" in out
    notes = [r for line in (run / "log.jsonl").read_text().splitlines() if "note" in (r := json.loads(line))]
    assert [r["done"] for r in notes] == [2]
    assert opened(run).changed == ()  # from now on that is its data
    capsys.readouterr()


def test_numbers_are_told_where_they_differ_and_hashes_where_only_they_do(place: Path):
    recipe = load_run(place / "plain")
    now = origins_of(recipe)["teacher"]
    count = now.rpartition(", ")[0]
    fewer, other = "2 files, 9 bytes, sha256 0", f"{count}, sha256 0"
    assert changes(recipe, {"teacher": fewer}, {"teacher": now})["teacher"].endswith(
        f"has changed: 2 files, 9 bytes then, {count} now"
    )
    assert changes(recipe, {"teacher": other}, {"teacher": now})["teacher"].endswith(f"{other} then, {now} now")
    assert changes(recipe, {}, {"teacher": now}) == changes(recipe, {"teacher": now}, {}) == {}


def test_resume_is_bit_equal_with_digests(made: Path, tmp_path: Path):
    """A run with a stop is the run without one, its digests too."""
    ends: list[dict[str, Any]] = []
    teacher = made / "teacher"
    steps: list[Callable[[Path], Any]] = [
        lambda run: make_run(run, teacher, "train.steps=3", "train.checkpoint_every=2"),
        lambda run: make_run(run, teacher, "train.steps=2"),
    ]
    for number, begin in enumerate(steps):
        run = tmp_path / str(number)
        begin(run)
        if number:
            settings = (run / "recipe.yaml").read_text().replace("steps: 2\n", "steps: 3\n")
            (run / "recipe.yaml").write_text(settings)
            trainer = continued(run)
            assert trainer.progress.done == 2
            trainer.fit()
        newest = checkpoints(run / "checkpoints")[-1]
        ends.append({p.name: load_file(p) for p in newest.glob("*.safetensors")} | {"o": read_origins(newest)})
    assert ends[0]["o"] == ends[1]["o"]
    assert same(ends[0], ends[1]) == []
    assert all(torch.isfinite(v).all() for v in ends[0]["student.safetensors"].values())


def test_the_networks_of_a_methods_representations_are_among_them(tmp_path: Path):
    """The moments in a checkpoint are of their features: other weights mean another distance."""
    file = write(tmp_path / "net.pth", b"one")
    recipe = load("toy/fd-loss", [f"method.beside={{of: dinov2, path: {file}}}"])
    then = origins_of(recipe)
    flip(file, 0)
    with pytest.raises(UserError, match=r"representation dinov2 .*net\.pth has changed: 1 files, 3 bytes, sha256"):
        check_resumed(recipe, then, origins_of(recipe), tmp_path)
    assert "representation waves-0" not in then
