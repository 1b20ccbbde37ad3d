"""Degraded data: pictures beside what is left of them, the same rows however a batch is split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_pictures import noise
from tiny_pipelines import vae

from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.operators import Box, Grey, Pool
from fewstep.config import UserError
from fewstep.data.base import conditions_of, image_shape
from fewstep.data.degraded import Degraded
from fewstep.data.encoders import SentenceEncoder
from fewstep.data.images import Digits, ImageFolder
from fewstep.data.latents import Encoder
from fewstep.data.pictures import Captions
from fewstep.data.toy import Ring

HELD = 0.2226
"""400 of the 1,797 digits."""


def draws(first: int = 0, last: int = 6) -> Draws:
    return Draws(fold("degraded"), torch.arange(first, last))


def opened(**changes):
    given = {"of": Digits(held_out=HELD), "by": Pool(factor=2), "noise": 0.2} | changes
    return Degraded(**given).open()


def test_a_condition_is_the_operator_of_its_own_sample():
    data = opened(noise=0.0)
    x0, cond = data.batch(draws())
    assert torch.equal(cond["image"], Pool(factor=2)(x0))
    assert set(cond) == {"image", "label"}
    assert (image_shape(data), conditions_of(data), data.classes) == ((1, 4, 4), "image", 10)
    assert Degraded(of=Digits(), by=Pool(factor=4)).image_outline() == (1, 2, 2)


def test_text_of_the_data_is_its_own_and_dropped_with_it():
    text = Captions(
        path="photos", size=16, encoder=SentenceEncoder(path="encoder"), negative="blurry", zeros=True, text_cache="cache"
    )
    told = Degraded(of=text, by=Pool(factor=2))
    assert (told.encoder, told.negative, told.zeros, told.text_cache) == (text.encoder, "blurry", True, "cache")
    plain = Degraded(of=Digits(), by=Pool(factor=2))
    assert (plain.encoder, plain.negative, plain.zeros, plain.text_cache) == (None, "", None, None)


def test_noise_and_conditions_belong_to_rows_not_to_batches():
    data = opened()
    whole, part = data.conditions(draws()), data.conditions(draws(2, 5))
    for key in whole:
        assert torch.equal(whole[key][2:5], part[key])
    clean = Pool(factor=2)(data.batch(draws())[0])
    noise = whole["image"] - clean
    assert 0.1 < float(noise.std()) < 0.3


def test_the_null_condition_keeps_the_picture():
    data = opened()
    cond = data.conditions(draws())
    null = data.null(cond)
    assert torch.equal(null["image"], cond["image"])
    assert null["label"].tolist() == [10] * 6
    alone = opened(keep=False)
    assert alone.classes == 0
    assert set(alone.conditions(draws())) == {"image"}
    assert alone.null(alone.conditions(draws())) is None


def test_an_easy_picture_stands_beside_the_other():
    cond = opened(by=Pool(factor=4), easy=Pool(factor=2), noise=0.0).conditions(draws())
    assert (cond["image"].shape, cond["easy"].shape) == ((6, 1, 2, 2), (6, 1, 4, 4))
    assert torch.allclose(Pool(factor=2)(cond["easy"]), cond["image"])


def test_evaluation_has_the_held_out_pictures_in_order_and_training_has_none_of_them():
    data = opened()
    examples = data.examples(torch.arange(402))
    held = data.inner.held
    assert len(held) == 400
    assert torch.equal(examples.truth[:400], data.inner.images[held])
    assert torch.equal(examples.truth[400:], examples.truth[:2])
    assert torch.equal(examples.labels[:400], data.inner.labels[held])
    again = data.examples(torch.arange(5, 9))
    assert torch.equal(again.cond["image"], examples.cond["image"][5:9])
    seen = {x.numpy().tobytes() for x in data.batch(draws(0, 3000))[0]}
    twice = {x.numpy().tobytes() for x in data.inner.images[data.inner.rows]}
    assert not {x.numpy().tobytes() for x in examples.truth} & seen - twice


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Degraded(of=Digits(), by=Pool(factor=3)), "data.by: pool.factor: 3 does not divide"),
        (Degraded(of=Digits(), by=Box(size=8)), "data.by: box.size: 8 leaves nothing"),
        (Degraded(of=Digits(), by=Pool(), easy=Grey()), "data.by: grey: is for pictures of 3 channels"),
        (Degraded(of=Ring(), by=Pool()), r"data.by: pool: is for pictures \(c, h, w\); these samples are \[2\]"),
    ],
)
def test_data_that_the_operator_does_not_take_are_refused_before_they_are_drawn(spec, message):
    for look in (spec.outline, spec.open):
        with pytest.raises(UserError, match=message):
            look()


def test_samples_may_be_latents_and_conditions_pictures(tmp_path: Path):
    """What a ControlNet trains on; the VAE halves a side."""
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.fromarray(noise(16, 24, 3, seed=i)).save(tmp_path / "pictures" / f"{i}.png")
    vae(4, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    folder = ImageFolder(path=str(tmp_path / "pictures"))
    spec = Degraded(of=folder, by=Pool(factor=2), vae=str(tmp_path / "vae"))
    assert (spec.outline(), spec.image_outline()) == (((4, 8, 12), 0), (3, 8, 12))
    data = spec.open()
    z, cond = data.batch(draws())
    plain = Degraded(of=folder, by=Pool(factor=2)).open()
    x0, same = plain.batch(draws())
    assert (data.shape, z.shape) == ((4, 8, 12), (6, 4, 8, 12))
    assert torch.equal(cond["image"], same["image"])
    assert torch.equal(data.conditions(draws())["image"], same["image"])
    mean, std = Encoder(str(tmp_path / "vae"))(x0)
    assert 0.5 < float(((z - mean) / std).square().mean()) < 2
    assert torch.allclose(data.batch(draws(2, 5))[0], z[2:5], atol=1e-5)
    assert data.examples(torch.arange(2)).truth.shape == (2, 3, 16, 24)
    with pytest.raises(UserError, match=r"data.vae .*: takes RGB pictures whose sides are multiples of 2"):
        Degraded(of=Digits(), by=Pool(factor=2), vae=str(tmp_path / "vae")).outline()
