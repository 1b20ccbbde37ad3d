"""Emoji art from a package to a text-to-image student in diffusers' IFPipeline, and what each step refuses."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_emoji import FOOD, make_package, make_text, packed
from torchvision.transforms.functional import to_tensor
from typer.testing import CliRunner

from fewstep.algebra.condition import replaced
from fewstep.algebra.sampling import sample
from fewstep.cli import app, main
from fewstep.commands.cache_text import cache_text
from fewstep.commands.check_teacher import check_teacher
from fewstep.commands.gallery import LEFT, TOP, captioned, rows_of
from fewstep.commands.judge import captions_of, judge_of
from fewstep.commands.measure import measure
from fewstep.commands.prepare_emoji import prepare_emoji
from fewstep.commands.sample import draw
from fewstep.commands.sample_text import draw_prompts, of_run
from fewstep.commands.train_retrieval import train_retrieval
from fewstep.config import UserError
from fewstep.data.encoders import PipelineEncoder
from fewstep.export.base import PARITY
from fewstep.export.choose import export
from fewstep.export.lora import export_lora
from fewstep.networks.diffusers import load_denoiser
from fewstep.recipe.schema import Evaluate
from fewstep.recipe.store import load
from fewstep.train.product import Product, open_product
from fewstep.train.trainer import Trainer

KEPT = [name.lower() for name in reversed(FOOD) if name != "BREAD"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with an encoder, and a teacher that has seen one update."""
    root = tmp_path_factory.mktemp("emoji")
    package = packed(make_package(root / "package"), root / "emoji.tgz")
    prepare_emoji(package, root / "data", size=16, text=make_text(root / "text"))
    run = root / "teacher"
    recipe = load("emoji-teacher", [*common(root), "student.text=8", "student.channels=[8,16]"])
    train(recipe, run)
    export(open_product(run), run / "export")
    return root


def common(root: Path) -> list[str]:
    return [
        f"data.path={root / 'data'}",
        f"data.encoder={{name: sentence, path: {root / 'data' / 'encoder'}, length: 77, keys: [text]}}",
        f"data.text_cache={root / 'cache'}",
        "data.size=16",
        "train.steps=1",
        "train.batch=3",
        "train.sample_every=0",
        "evaluate=null",
    ]


def train(recipe: Any, run: Path) -> Trainer:
    trainer = Trainer(recipe, run, cpu=True)
    trainer.fit()
    return trainer


def refused(package: Path, out: Path, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepare_emoji(package, out, **more)
    return str(caught.value)


def test_pictures_lie_on_white_with_their_names_in_the_order_of_display(made: Path):
    lines = [json.loads(line) for line in (made / "data" / "captions.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == KEPT
    assert [line["file"] for line in lines] == ["1f5.png", "1f3.png", "1f2.png", "1f1.png", "1f0.png"]
    assert sorted(p.name for p in (made / "data").glob("*.png")) == sorted(line["file"] for line in lines)
    with Image.open(made / "data" / "1f3.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (16, 16))
        # The upper third of 12 rows is transparent; four of 16 rows are out of the filter's reach.
        assert picture.crop((0, 0, 16, 2)).getextrema() == ((255, 255),) * 3
    told = (made / "data" / "ATTRIBUTION").read_text()
    assert told.startswith("Pictures: Noto Emoji by Google, Apache License 2.0, from emoji-datasource-google 1.2.3")
    assert (made / "data" / "LICENSE").read_text() == "terms\n"
    assert sorted(p.name for p in (made / "data" / "encoder").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_stopped_preparation_goes_on_and_ends_with_the_same_bytes(tmp_path: Path):
    package, out = make_package(tmp_path / "p"), tmp_path / "out"
    picture = package / "img" / "google" / "64" / "1f1.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:40])
    assert refused(package, out) == f"{package}: 1f1.png: not a readable picture; fetch the package again"
    assert not (out / "captions.jsonl").exists()
    kept = (out / "1f2.png").stat().st_mtime_ns
    picture.write_bytes(whole)
    assert prepare_emoji(package, out) == 5
    assert (out / "1f2.png").stat().st_mtime_ns == kept
    prepare_emoji(package, tmp_path / "again")
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert f"{out}: was made from " in refused(package, out, size=24)
    assert refused(package, tmp_path).endswith(
        "is not empty and no folder of emoji that fewstep made; choose another folder"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LICENSE": None}, "has no LICENSE file; pictures of unknown terms are not used"),
        ({"emoji.json": None}, "emoji.json is missing; the package is not whole"),
        ({"emoji.json": b"[{"}, "emoji.json: cannot be read as JSON"),
        (
            {"emoji.json": b'[{"sort_order": 1, "category": "Food & Drink"}]'},
            "an entry lacks 'has_img_google'",
        ),
        ({"package.json": b"[]"}, "package.json has no name and version"),
        ({"img__google__64__1f0.png": None}, "img/google/64/1f0.png is missing; the package is not whole"),
    ],
)
def test_a_package_that_is_not_whole_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str):
    package = make_package(tmp_path / "p", **changes)
    told = refused(package, tmp_path / "out")
    assert told.startswith(f"{package}: ")
    assert message in told
    assert not (tmp_path / "out" / "captions.jsonl").exists()


def test_what_is_no_package_is_refused(tmp_path: Path):
    package = make_package(tmp_path / "p")
    assert "the package has Food & Drink, Smileys & Emotion" in refused(package, tmp_path / "o", categories=("Fod",))
    assert "no such package; fetch it with `npm pack NAME`" in refused(tmp_path / "none.tgz", tmp_path / "o")
    archive = packed(package, tmp_path / "cut.tgz")
    archive.write_bytes(archive.read_bytes()[:900])
    assert "cut.tgz: not a readable archive" in refused(archive, tmp_path / "o")
    (package / "img" / "google").rename(package / "img" / "apple")
    assert "holds the image sets apple; expected one of google, twitter" in refused(package, tmp_path / "o")
    other = make_package(tmp_path / "q")
    assert "holds 0 folders with config.json" in refused(other, tmp_path / "o", text=package)
    run = CliRunner().invoke(app, ["prepare-emoji", str(other), str(tmp_path / "cli"), "--size", "16"])
    assert run.exit_code == 0
    assert "5 pictures with captions" in run.output


def test_rows_of_a_mapping_are_replaced_where_the_mask_says_so():
    where = torch.tensor([True, False, True])
    cond = {"text": torch.arange(6.0).reshape(3, 2), "pooled": torch.ones(3)}
    null = {"text": torch.full((3, 2), -1.0), "pooled": torch.zeros(3)}
    got = replaced(cond, where, null)
    assert got["text"].tolist() == [[-1, -1], [2, 3], [-1, -1]]
    assert got["pooled"].tolist() == [0, 1, 0]
    assert replaced(torch.tensor([4, 5, 6]), where, torch.full((3,), 9)).tolist() == [9, 5, 9]


def test_the_teacher_s_folder_answers_as_the_teacher_does(made: Path):
    product = open_product(made / "teacher")
    again = load_denoiser(str(made / "teacher" / "export"))
    assert (again.process, again.prediction, again.time_input) == (product.net.process, "v", "index")
    assert again.net.pipeline == "IFPipeline"
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 3, 16, 16, generator=g), torch.tensor([3.0, 700.5])
    cond = product.labels(2)
    assert set(cond) == {"text"}
    assert cond["text"].shape == (2, 77, 8)
    for p in product.net.parameters():
        p.data = p.data.half().float()  # as teachers are written
    with torch.no_grad():
        torch.testing.assert_close(again(x, t, cond).x0, product.net(x, t, cond).x0, rtol=0, atol=0)
        other = {"text": cond["text"].flip(0)}
        assert (again(x, t, other).x0 - again(x, t, cond).x0).abs().max() > 1e-4


def test_check_teacher_runs_the_folder_in_its_own_pipeline(made: Path):
    report = check_teacher(str(made / "teacher" / "export"))
    assert report.ok, report.text()
    assert "from IFPipeline with DDIMScheduler" in report.text()


def test_the_folder_s_own_encoder_gives_the_conditions_of_the_data(made: Path):
    encode = PipelineEncoder(path=str(made / "teacher" / "export")).open()
    live = encode(KEPT[1:3])
    assert set(live) == {"text"}
    torch.testing.assert_close(live["text"], open_product(made / "teacher").labels(3)["text"][1:], rtol=0, atol=1e-6)


class Real(Product):
    """Samples that are the data themselves, each under its own caption."""

    def images(self, index: Any, labels: Any, seed: int = 0) -> Any:
        data = self.recipe.data.open()  # type: ignore[union-attr,attr-defined]
        return data.pictures(index % len(data))


def test_the_data_have_distance_zero_from_themselves_and_their_captions_are_found(made: Path, tmp_path: Path):
    found, fresh = train_retrieval(
        str(made / "data"), str(made / "data" / "encoder"), tmp_path / "judge", size=16, steps=80
    )
    assert found.captions == tuple(KEPT)
    assert fresh.value > 0.5
    opened = open_product(made / "teacher")
    real = Real(**{f.name: getattr(opened, f.name) for f in dataclasses.fields(Product)})
    spec = Evaluate(metric="fd-effnet-lite0", samples=5, retrieval=str(tmp_path / "judge"))
    row, _ = measure(real, judge_of(real, spec))
    assert abs(row.metrics["FD (effnet-lite0-224)"]["value"]) < 1e-6
    assert row.value("caption found among 5") == 1
    moved = replace(real, shape=(3, 24, 24))
    with pytest.raises(UserError, match=r"judge takes pictures of 16 x 16, these are \[3, 24, 24\]"):
        judge_of(moved, spec)
    (tmp_path / "other").mkdir()
    replace(found, captions=found.captions[::-1]).save(tmp_path / "other")
    with pytest.raises(UserError, match="was trained on 5 captions, which are not the 5 of this run's data"):
        judge_of(real, replace(spec, retrieval=str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"no retrieval model; train it with `fewstep train-retrieval`"):
        judge_of(real, replace(spec, retrieval=str(tmp_path / "none")))


def test_a_gallery_has_a_row_for_each_source_and_refuses_other_captions(made: Path):
    rows = rows_of([made / "teacher"], ["banana", "red apple"], [2], 1.0, 0)
    assert [name for name, _ in rows] == ["data", "teacher"]
    sheet = captioned(rows, ["banana", "red apple"], scale=2)
    assert sheet.size == (LEFT + 2 * 36, TOP + 2 * 36)
    corner = sheet.crop((LEFT + 2, TOP + 2, LEFT + 34, TOP + 34)).resize((16, 16), Image.Resampling.NEAREST)
    with Image.open(made / "data" / "1f2.png") as banana:
        assert corner.tobytes() == banana.tobytes()
    with pytest.raises(UserError, match="caption 'kiwi': is not one of the 5"):
        rows_of([made / "teacher"], ["kiwi"], [2], 1.0, 0)


def test_a_gallery_tells_how_strong_colours_are(made: Path, tmp_path: Path):
    """Those of the data are its picture's, whose channels are within [0, 1] there and [-1, 1] here."""
    asked = ["gallery", str(made / "teacher"), "--captions", "banana", "--out", str(tmp_path / "g.png")]
    told = CliRunner().invoke(app, asked).output
    with Image.open(made / "data" / "1f2.png") as banana:
        pixels = to_tensor(banana.convert("RGB")).double()
    strength = 2 * float((pixels.amax(0) - pixels.amin(0)).mean())
    assert f"mean): data {strength:.3f}; teacher " in told.replace("\n", " ")


def test_a_student_trains_on_cached_words_as_with_their_encoder(made: Path, tmp_path: Path):
    """Weights and losses are the same bits; in float16 losses are within 1e-3, but for the gap of two equal networks."""
    teacher = f"teacher.path={made / 'teacher' / 'export'}"
    first = load("emoji-dmd2-gan", [*common(made), teacher])
    for store in ("fp32", "fp16"):
        changes = [*common(made), teacher, f"data.encoder.store={store}"]
        cache_text("emoji-dmd2-gan", changes, out=tmp_path / store)
    theirs = train(first, tmp_path / "run")
    for store in ("fp32", "fp16"):
        cached = f"data.encoder={{name: cached, path: {tmp_path / store}}}"
        ours = train(load("emoji-dmd2-gan", [*common(made), teacher, cached]), tmp_path / f"run-{store}")
        for key in ("dsm", "gan", "discriminator"):
            tolerance = 0 if store == "fp32" else 1e-3
            assert ours.last_record[key] == pytest.approx(theirs.last_record[key], rel=tolerance, abs=0), key
        if store == "fp32":
            assert ours.last_record["match"] == theirs.last_record["match"]
            own, other = (t.product.state_dict() for t in (ours, theirs))
            assert all(torch.equal(own[k], v) for k, v in other.items())
    words, encoder = ["banana", "blue banana"], made / "data" / "encoder"
    ((_, plain),) = of_run(tmp_path / "run", words, None, False, 0, 0, None)
    ((_, drawn),) = of_run(tmp_path / "run-fp32", words, None, False, 0, 0, None, None, encoder)
    torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-5)
    rows = dict(rows_of([tmp_path / "run"], ["banana", "red apple"], [1, 3], 1.0, 0))
    assert list(rows) == ["data", "teacher, 3 steps", "teacher, 1 step", "run"]
    assert not torch.equal(rows["teacher, 3 steps"], rows["teacher, 1 step"])
    sheet = tmp_path / "x.png"
    with pytest.raises(UserError, match="these data have an encoder of their own, sentence; leave it out"):
        draw_prompts(tmp_path / "run", words, sheet, encoder=encoder)
    with pytest.raises(UserError, match="is no run directory; a pipeline reads prompts by its own text encoder"):
        draw_prompts(made / "teacher" / "export", words, sheet, encoder=encoder)
    with pytest.raises(UserError, match="--encoder: reads prompts, which --prompt or --prompts give"):
        draw(tmp_path / "run", None, None, 4, 0, sheet, False, encoder=encoder)


def test_the_shipped_student_trains_draws_and_exports_with_nothing_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    run, sheet = tmp_path / "run", tmp_path / "sheet.png"

    def said(*arguments: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        told = capsys.readouterr()
        return left.value.code, told.out + told.err

    tiny = ["train.steps=2", "train.batch=2", "train.sample_every=0", "evaluate=null"]
    code, told = said("run", "emoji-dmd2", *tiny, "--out", str(run))
    assert not code, told
    asked: Any = load("emoji-dmd2").evaluate
    assert len(captions_of(open_product(run), asked.retrieval).captions) == 131
    card = (run / "export" / "README.md").read_text()
    assert "import torch\nfrom diffusers import IFPipeline" in card
    assert "# This folder has no text encoder: yours go there.\npipe(prompt_embeds=torch.zeros(1, 77, 384), " in card
    code, told = said("sample", str(run), "--prompt", "red apple", "--teacher", "0", "--out", str(sheet))
    assert not code, told
    assert Image.open(sheet).size[0] >= 128
    code, told = said("sample", str(run), "--prompt", "blue apple", "--teacher", "0", "--out", str(sheet))
    assert code == 2
    assert "has no embedding of 'blue apple', only those of its 131 prompts" in " ".join(told.split())
    assert "all-MiniLM-L6-v2 (sentence, length 77" in " ".join(told.split())


@pytest.mark.parametrize("name", ["emoji-dmd2", "emoji-dmd2-4step", "emoji-dmd2-lora"])
def test_a_student_trains_and_its_pipeline_draws_from_a_prompt_what_fewstep_draws(made: Path, tmp_path: Path, name: str):
    from diffusers import IFPipeline

    teacher = made / "teacher" / "export"
    # Without guidance critic and teacher begin equal, and the student's first gradient is zero.
    changes = [f"teacher.path={teacher}", "method.critic.steps=1", "method.guidance=1.5"]
    trainer = train(load(name, [*common(made), *changes]), tmp_path / "run")
    assert trainer.progress.skipped == 0
    gradients = {k: v for k, v in trainer.last_record.items() if k.startswith("grad_norm/")}
    assert len(gradients) == 2
    assert min(gradients.values()) > 0
    product = open_product(tmp_path / "run")
    done = export(product, tmp_path / "out")
    assert done.parity <= PARITY
    pipe: Any = IFPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    steps = len(product.sampler.steps)
    start = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    pipe.prepare_intermediate_images = lambda *_: start * pipe.scheduler.init_noise_sigma
    torch.manual_seed(7)
    told = json.loads((tmp_path / "out" / "fewstep.json").read_text())["call"]
    theirs = pipe(prompt=KEPT[1], guidance_scale=1.0, output_type="pt", **told).images
    torch.manual_seed(7)
    ours = sample(
        product.sampler,
        product.net,
        start,
        {"text": product.labels(2)["text"][1:]},
        lambda _: torch.randn(1, 3, 16, 16),
    )
    assert len(pipe.scheduler.timesteps) == steps
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    if name == "emoji-dmd2-lora":
        done = export_lora(product, tmp_path / "lora")
        assert done.parity <= 1e-5
        other: Any = IFPipeline.from_pretrained(teacher)
        call = (start, torch.tensor(700), torch.randn(1, 77, 8, generator=torch.Generator().manual_seed(1)))
        with torch.no_grad():
            plain = other.unet(*call).sample
            other.load_lora_weights(str(tmp_path / "lora"))
            assert (other.unet(*call).sample - plain).abs().max() > 1e-5
            torch.testing.assert_close(other.unet(*call).sample, pipe.unet(*call).sample, rtol=0, atol=1e-5)
        card = (tmp_path / "lora" / "README.md").read_text()
        assert done.usage in card
        told = json.loads((tmp_path / "lora" / "fewstep.json").read_text())["call"]
        code = done.usage.splitlines()
        exec("\n".join(code[:-1]), names := {})  # as a user pastes it
        names["pipe"].set_progress_bar_config(disable=True)
        images = [
            p(
                prompt=KEPT[1],
                guidance_scale=1.0,
                output_type="pt",
                generator=torch.Generator().manual_seed(5),
                **told,
            )
            for p in (names["pipe"], IFPipeline.from_pretrained(tmp_path / "out"))
        ]
        torch.testing.assert_close(images[0].images, images[1].images, rtol=0, atol=1e-4)
        assert type(names["pipe"].scheduler) is type(pipe.scheduler)
        assert names["pipe"].scheduler.config == pipe.scheduler.config
