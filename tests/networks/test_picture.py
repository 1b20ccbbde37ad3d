"""A picture as further input channels: copies stay as they are, wrong pictures are named, some are not shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fewstep.algebra.condition import seen
from fewstep.config import RecipeError, UserError
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.parts import Site
from fewstep.networks.picture import joined, parted
from fewstep.networks.specs import Copy, DiscriminatorSpec, DiTSpec, Lora, UNet2DSpec, UNetTextSpec
from fewstep.networks.teachers import DiffusersTeacher

SHAPE, IMAGE = (2, 8, 12), (3, 4, 6)
PLAIN = Site(SHAPE, 0, {}, 0)
PICTURED = Site(SHAPE, 0, {}, 0, IMAGE)
SPECS = {
    "dit": lambda image: DiTSpec(width=8, depth=1, heads=2, image=image),
    "unet2d": lambda image: UNet2DSpec(channels=(8, 8), groups=4, image=image),
    "unet-text": lambda image: UNetTextSpec(text=4, channels=(8, 8), groups=4, image=image),
}


def lively(net: Any) -> Any:
    """Weights that are zero at first, such as those of last layers, drawn."""
    generator = torch.Generator().manual_seed(5)
    for p in net.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return net.eval()


def inputs(net: Any, b: int = 3) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    t = net.process.grid(torch.full((b,), 0.4, dtype=torch.float64))
    return torch.randn(b, *SHAPE, generator=generator), t


def image(b: int = 3, channels: int = IMAGE[0]) -> torch.Tensor:
    return torch.randn(b, channels, *IMAGE[1:], generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", SPECS)
def test_a_copy_with_a_picture_is_the_teacher_bit_for_bit(name):
    teacher = lively(SPECS[name](0).build(PLAIN))
    copy: Any = Copy(image=IMAGE[0]).build(Site(SHAPE, 0, {"teacher": teacher}, 0, IMAGE))
    x, t = inputs(teacher)
    text = {"text": torch.randn(3, 5, 4)} if name == "unet-text" else {}
    assert torch.equal(teacher(x, t, text or None).x0, copy(x, t, text | {"image": image()}).x0)
    assert (copy.image_channels, teacher.image_channels) == (IMAGE[0], 0)
    copy.net.picture.weight.data.normal_(0, 0.3)
    assert not torch.equal(teacher(x, t, text or None).x0, copy(x, t, text | {"image": image()}).x0)
    with pytest.raises(RecipeError, match=r"copy.image: the teacher cannot take a picture: .* takes a picture of 3"):
        Copy(image=1).build(Site(SHAPE, 0, {"teacher": copy}, 0, IMAGE))


def test_the_shipped_teacher_copied_with_a_picture_is_unchanged_bit_for_bit():
    teacher = load_denoiser("assets:digits-teacher")
    copy: Any = Copy(image=1).build(Site((1, 8, 8), 10, {"teacher": teacher}, 0, (1, 4, 4)))
    x, label = torch.randn(5, 1, 8, 8), torch.tensor([0, 3, 9, 10, 1])
    t = teacher.process.grid(torch.linspace(0.1, 1.0, 5, dtype=torch.float64))
    assert torch.equal(teacher(x, t, label).x0, copy(x, t, {"label": label, "image": torch.randn(5, 1, 4, 4)}).x0)


@pytest.mark.parametrize("name", SPECS)
def test_a_picture_is_resized_as_the_stock_pipeline_does_and_changes_the_answer(name):
    net = lively(SPECS[name](IMAGE[0]).build(PICTURED))
    x, t = inputs(net)
    small = net(x, t, {"image": image()}).x0
    large = F.interpolate(image(), SHAPE[1:], mode="bilinear", align_corners=True)
    assert torch.equal(small, net(x, t, {"image": large}).x0)
    assert not torch.allclose(small, net(x, t, {"image": -image()}).x0)


def test_a_first_layer_parted_and_joined_is_the_same_layer():
    first = torch.nn.Conv2d(5, 4, 3, padding=1)
    own, rest = parted(first, 2)
    x = torch.randn(2, 5, 6, 7)
    assert torch.allclose(own(x[:, :2]) + rest(x[:, 2:]), first(x), atol=1e-6)
    again = joined(own, rest)
    assert torch.equal(again.weight, first.weight)
    assert torch.equal(again(x), first(x))


def test_a_network_of_words_may_do_without_them_where_it_has_a_picture():
    net = lively(SPECS["unet-text"](IMAGE[0]).build(PICTURED))
    x, t = inputs(net)
    given = {"image": image(), "text": torch.zeros(3, 1, 4)}
    assert torch.equal(net(x, t, {"image": image()}).x0, net(x, t, given).x0)
    assert net.net.pipeline == "IFSuperResolutionPipeline"
    with pytest.raises(ValueError, match=r"lacks cond\['text'\]"):
        SPECS["unet-text"](0).build(PLAIN)(x, t, None)


@pytest.mark.parametrize("name", SPECS)
def test_a_picture_of_other_channels_or_none_at_all_is_named(name):
    net = SPECS[name](IMAGE[0]).build(PICTURED)
    x, t = inputs(net)
    with pytest.raises(ValueError, match=r"takes cond\['image'\] of \(b, 3, h, w\), not \(3, 2, 4, 6\)"):
        net(x, t, {"image": image(channels=2)})
    with pytest.raises(ValueError, match=r"cond\['image'\] has 2 pictures for 3 samples"):
        net(x, t, {"image": image(2)})
    with pytest.raises(ValueError, match=r"lacks cond\['image'\]"):
        net(x, t, None)


@pytest.mark.parametrize("name", SPECS)
def test_networks_that_do_not_fit_the_data_are_refused_when_they_are_built(name):
    with pytest.raises(RecipeError, match=rf"{name}.image: takes no picture, .* \[3, 4, 6\]; give image: 3"):
        SPECS[name](0).build(PICTURED)
    with pytest.raises(RecipeError, match=rf"{name}.image: takes a picture of 1 channels"):
        SPECS[name](1).build(PICTURED)
    with pytest.raises(RecipeError, match=rf"{name}.image: 3, and the data's conditions hold no picture"):
        SPECS[name](3).build(PLAIN)


def test_a_copy_that_would_be_shown_a_picture_without_taking_one_is_refused():
    teacher = SPECS["dit"](0).build(PLAIN)
    site = Site(SHAPE, 0, {"teacher": teacher}, 0, IMAGE)
    with pytest.raises(RecipeError, match=r"copy.image: takes no picture"):
        Copy().build(site)
    blind: Any = Copy(ignore=("image",)).build(site)
    x, t = inputs(blind)
    assert torch.equal(blind(x, t, {"image": image()}).x0, teacher(x, t).x0)


def test_what_is_ignored_and_what_is_seen():
    cond = {"label": torch.tensor([1]), "image": torch.zeros(1, 1, 2, 2), "easy": torch.ones(1, 1, 4, 4)}
    assert set(seen(cond)) == {"label", "image"}
    assert set(seen(cond, ("image",))) == {"label"}
    assert seen({"image": cond["image"]}, ("image",)) is None
    assert seen(cond, (), {"image": "easy"})["image"] is cond["easy"]
    labels = torch.tensor([3])
    assert seen(labels, ("image",)) is labels
    with pytest.raises(ValueError, match=r"see: the condition lacks cond\['easy'\]"):
        seen({"image": cond["image"]}, (), {"image": "easy"})


def test_a_teacher_ignores_the_picture_and_its_copy_does_not():
    site = Site((1, 8, 8), 10, {}, 0, (1, 4, 4))
    with pytest.raises(UserError, match=r"takes no picture, .* hold one of \[1, 4, 4\]; with ignore"):
        DiffusersTeacher(path="assets:digits-teacher").build(site)
    teacher: Any = DiffusersTeacher(path="assets:digits-teacher", ignore=("image",)).build(site)
    copy: Any = Copy(image=1).build(Site((1, 8, 8), 10, {"teacher": teacher}, 0, (1, 4, 4)))
    assert (teacher.ignore, copy.ignore) == (("image",), ())
    cond = {"label": torch.tensor([2, 5]), "image": torch.randn(2, 1, 4, 4)}
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert torch.equal(teacher(x, t, cond).x0, teacher(x, t, cond["label"]).x0)
    assert torch.equal(copy(x, t, cond).x0, teacher(x, t, cond).x0)
    with pytest.raises(RecipeError, match=r"lora.of: the teacher is not shown image as the data have it"):
        Lora().build(Site((1, 8, 8), 10, {"teacher": teacher}, 0, (1, 4, 4)))
    with pytest.raises(ValueError, match="ignore, see: 'picture' is no key of a condition"):
        DiffusersTeacher(path="x", ignore=("picture",))


def test_a_discriminator_is_built_on_features_of_a_pictured_trunk():
    trunk = SPECS["dit"](IMAGE[0]).build(PICTURED)
    heads: Any = DiscriminatorSpec(trunk="critic", taps=("block0",)).build(Site(SHAPE, 0, {"critic": trunk}, 0, IMAGE))
    x, t = inputs(trunk)
    assert heads(x, t, {"image": image()}).shape == (3, 1)
