"""Prompts on a run, on its export and on a teacher's folder: the same noise beside each other, and a pipeline's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from snippets import run_snippet
from tiny_condition import condition_unet
from tiny_pipelines import vae
from tiny_text import text_pipeline

from fewstep.algebra.guidance import Guided
from fewstep.algebra.sampling import Sampler, many_step, sample, seeded
from fewstep.commands import sample_text
from fewstep.commands.product import Product
from fewstep.commands.sample import draw
from fewstep.commands.sample_text import draw_prompts, of_export, of_pipeline, of_run
from fewstep.config import UserError
from fewstep.export.choose import export
from fewstep.export.lora import export_lora
from fewstep.networks.assisted import Nasa
from fewstep.recipe.store import load
from fewstep.train.assisted import assisted
from fewstep.train.build import build_roles
from fewstep.train.product import open_product
from fewstep.train.trainer import Trainer

PROMPTS = ["two green dots", "a blue square"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sd/ of random weights, run/ of two steps on it, run/export/ and lora/."""
    root = tmp_path_factory.mktemp("sample-text")
    text_pipeline(root / "sd", PROMPTS, unet=condition_unet(), vae=vae(4, scaling_factor=0.18215))
    (root / "prompts.txt").write_text("a square\ntwo dots\nblue")
    (root / "mine.yaml").write_text(
        f"""about: text
data:
  name: prompts
  path: {root}/prompts.txt
  shape: [4, 8, 8]
  encoder: {{name: pipeline, path: {root}/sd}}
  vae: {root}/sd
  text_cache: {root}/cache
teacher: {{name: diffusers, path: {root}/sd}}
student: {{name: lora, of: teacher, rank: 2, targets: [to_q, to_v, conv1]}}
critic: {{name: lora, of: teacher, rank: 3}}
method: {{name: dmd2, gan: null, critic: {{weight: eps, steps: 1}}, guidance: 3.0, steps: [1.0, 0.5]}}
optim: {{default: {{lr: 1e-3}}}}
train: {{steps: 1, batch: 2, product: student, ema: [], sample_every: 0}}
evaluate: null
"""
    )
    recipe = load(str(root / "mine.yaml"))
    Trainer(recipe, root / "run", cpu=True).fit()
    return root


@pytest.fixture(scope="module")
def exported(root: Path) -> Any:
    return export(open_product(root / "run"), root / "run" / "export")


def test_teacher_and_student_begin_at_the_same_noise(root: Path):
    (teacher, ours), (student, theirs) = of_run(root / "run", PROMPTS, None, False, 5, 3, 2.0)
    assert (teacher, student) == ("teacher, 3 steps", "student, 2 steps")
    product = open_product(root / "run")
    recipe: Any = product.recipe
    data = recipe.data.open()
    encode = recipe.data.encoder.open()
    cond, null = encode(PROMPTS), encode(["", ""])
    index = torch.arange(2)
    torch.testing.assert_close(theirs, product.decoder()(product.images(index, cond, 5)), rtol=0, atol=1e-4)
    net: Any = build_roles(recipe, data).teacher
    start, fresh = seeded(5, index, product.shape)
    by_hand = sample(many_step(3), Guided(net, 2.0, lambda c: null), start, cond, fresh)
    torch.testing.assert_close(ours, product.decoder()(by_hand), rtol=0, atol=1e-3)


def test_an_export_draws_its_own_picture_of_a_seed(root: Path, exported: Any):
    name, pictures = of_pipeline(root / "run" / "export", PROMPTS, None, False, 7, None)
    assert name == "export"
    pipe = StableDiffusionPipeline.from_pretrained(root / "run" / "export")
    for i, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(7 + i)
        own = pipe(prompt=prompt, num_inference_steps=2, guidance_scale=1.0, generator=generator, output_type="pt").images
        assert torch.equal(2 * own - 1, pictures[i : i + 1])
    assert "num_inference_steps=2, guidance_scale=1.0" in exported.usage


def test_sheets_of_prompts_and_of_a_file(root: Path, exported: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = draw(root / "sd", 2, None, 100, 3, tmp_path / "a.png", False, ["blue"], None, 1.5)
    assert "sd; its pipeline's own pictures, seeds 3..3" in capfd.readouterr().out
    one = Image.open(out).size
    draw_prompts(root / "run", ["blue", "dots"], tmp_path / "b.png", teacher=0)
    two = Image.open(tmp_path / "b.png").size
    assert two[0] > one[0]
    assert two[1] > one[1]  # the exported pipeline's row


def test_a_sheet_of_a_run_shows_its_exported_pipeline(root: Path, exported: Any, tmp_path: Path, capfd: Any):
    draw_prompts(root / "run", ["blue", "dots"], tmp_path / "with.png", teacher=0, seed=7)
    assert "student, 2 steps, exported, seeds 7..8; noise 0..1 of seed 7" in capfd.readouterr().out
    _, own = of_pipeline(root / "run" / "export", ["blue", "dots"], None, False, 7, None)
    ((name, row),) = of_export(root / "run" / "export", ["blue", "dots"], None, False, 7, own.shape)
    assert name == "exported, seeds 7..8"
    assert torch.equal(row, own)
    assert of_export(root / "run" / "export", ["blue"], 3, False, 7, own.shape) == []
    assert of_export(root / "run" / "export", ["blue"], None, False, 7, (1, 4, 8, 8)) == []
    said = capfd.readouterr().out
    assert "left out" in said
    assert "trained for 2" in said
    assert "it draws [3, " in said


def test_what_takes_no_prompt_says_so(root: Path, exported: Any, tmp_path: Path):
    def refused(*arguments: Any, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            draw_prompts(*arguments, **options)
        return str(caught.value)

    out = tmp_path / "x.png"
    assert "no run directory; only a run knows its teacher" in refused(root / "sd", ["a"], out, teacher=3)
    assert "neither a run directory" in refused(tmp_path, ["a"], out)
    assert "was trained for 2; add --any" in refused(root / "run" / "export", ["a"], out, 3)
    assert "trained for 2" in refused(root / "run", ["a"], out, 3)
    with pytest.raises(UserError, match="--classes: samples are of classes or of prompts"):
        draw(root / "run", None, "0", 1, 0, out, False, ["a"])
    with pytest.raises(UserError, match="are for samples of prompts"):
        draw(root / "run", None, None, 1, 0, out, False, [], 3)
    assert not out.exists()


def test_a_run_on_pictures_takes_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each of its samples is made from a picture with its own text, so a prompt by itself has nothing to draw from."""
    recipe: Any = SimpleNamespace(data=SimpleNamespace(encoder=object()), evaluate=None, teacher=None)
    once = Sampler(steps=(1.0,))
    product = Product(torch.nn.Identity(), once, (4, 8, 8), 0, "student", (1,), recipe=recipe, image=(3, 16, 16))
    with pytest.raises(UserError, match="prompts: student makes samples from the data's pictures; leave out prompts"):
        product.draw(1, prompts=PROMPTS[:1])
    monkeypatch.setattr(sample_text, "opened", lambda path: product)
    with pytest.raises(UserError, match="makes samples from the data's pictures, each with its own text; leave out"):
        of_run(tmp_path, PROMPTS, None, False, 0, None, None)


def test_printed_code_of_a_text_pipeline_and_of_an_adapter_runs(root: Path, exported: Any, tmp_path: Path):
    run_snippet(exported.usage, tmp_path / "whole")
    run_snippet(export_lora(open_product(root / "run"), root / "lora").usage, tmp_path / "adapter")


def test_a_negative_prompt_steers_the_student_alone(root: Path, tmp_path: Path):
    plain = of_run(root / "run", PROMPTS, None, False, 5, 3, 2.0)
    rows = of_run(root / "run", PROMPTS, None, False, 5, 3, 2.0, ("a blue square", 0.4))
    assert [name for name, _ in rows] == [*(name for name, _ in plain), "student, away from a blue square"]
    for (_, a), (_, b) in zip(rows, plain, strict=False):
        assert torch.equal(a, b)
    assert float((rows[2][1] - rows[1][1]).abs().max()) > 1e-4
    product = open_product(root / "run")
    recipe: Any = product.recipe
    index = torch.arange(2)
    cond = recipe.data.encoder.open()(PROMPTS)
    part = Nasa(negative="a blue square", weight=0.4)
    helped = assisted(product, part, product.net, lambda c: c)
    torch.testing.assert_close(product.decoder()(helped.images(index, cond, 5)), rows[2][1], rtol=0, atol=1e-4)
    assert helped.network_calls() == 2
    none = of_run(root / "run", PROMPTS, None, False, 5, 0, None, ("a blue square", 0.0))
    assert torch.equal(none[0][1], none[1][1])
    for told, words in (
        ((["x"], "dots", None), "belong together"),
        ((["x"], None, 0.2), "belong together"),
        (([], "dots", 0.2), "belong together"),
        ((["x"], "dots", 3.0), r"--nasa 3: expected a weight in \[0, 2\]"),
    ):
        prompts, negative, weight = told
        with pytest.raises(UserError, match=words):
            draw(root / "run", None, None, 3, 0, tmp_path / "n.png", False, prompts, negative=negative, nasa=weight)
    with pytest.raises(UserError, match="is no run directory, whose student's attention"):
        draw_prompts(root / "sd", ["x"], tmp_path / "n.png", 2, away=("dots", 0.2))
