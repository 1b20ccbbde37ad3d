"""Image folders, quantisers and resize chains: known pixels, Pillow, and every kind of file that must be refused."""

import struct
import zlib

import numpy as np
import pytest
import torch
from cleanfid.resize import make_resizer
from PIL import Image

from fewstep.eval.protocol.images import ImageFolder, save_image
from fewstep.eval.protocol.resize import (
    QUANTISERS,
    Step,
    apply_chain,
    centre_crop,
    centre_square,
    quantise,
    resize_pil,
    resize_tensor,
)


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def folder_of(path, count=4, channels=3, height=5, width=7):
    for index, image in enumerate(noise(count, channels, height, width)):
        save_image(image, path / f"{index:02d}.png")
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_come_back_in_the_order_of_names(tmp_path, channels):
    folder_of(tmp_path, channels=channels)
    batches = list(ImageFolder(tmp_path, channels=channels).batches(3))
    assert [len(batch) for batch in batches] == [3, 1]
    assert torch.equal(torch.cat(batches), noise(4, channels, 5, 7))
    assert torch.equal(torch.cat(list(ImageFolder(tmp_path, channels, number=2).batches(9))), torch.cat(batches)[:2])


def test_arrays_stand_beside_pictures(tmp_path):
    np.save(tmp_path / "a.npy", noise(3, 5, 7).numpy())
    assert torch.equal(next(ImageFolder(tmp_path).images()), noise(3, 5, 7))
    np.save(tmp_path / "b.npy", np.zeros((3, 5, 7), np.float32))
    with pytest.raises(ValueError, match=r"b\.npy: is float32 of shape \(3, 5, 7\), expected uint8"):
        list(ImageFolder(tmp_path).images())


def deep_png(pixels):
    """A colour PNG of 16 bits a channel, which Pillow reads but does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def write_bad(path, kind):
    grey = noise(5, 7).numpy()
    colour = noise(5, 7, 3).numpy()
    if kind == "grey":
        Image.fromarray(grey).save(path)
    elif kind == "alpha":
        Image.fromarray(np.dstack([colour, grey])).save(path)
    elif kind == "sixteen":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif kind == "deep":
        path.write_bytes(deep_png(noise(5, 7, 3).numpy().astype(np.uint16) * 257))
    elif kind == "palette":
        Image.fromarray(colour).convert("P").save(path)
    elif kind == "size":
        Image.fromarray(noise(7, 5, 3).numpy()).save(path)
    elif kind == "cut":
        Image.fromarray(noise(50, 70, 3).numpy()).save(path)
        path.write_bytes(path.read_bytes()[:300])
    else:
        path.write_bytes(b"not a picture")


BAD = {
    "grey": "is grey, expected 8-bit colour",
    "alpha": "is colour with alpha, expected 8-bit colour",
    "sixteen": "is 16-bit grey, expected 8-bit colour",
    "deep": "is 16-bit colour, expected 8-bit colour",
    "palette": "is palette, expected 8-bit colour",
    "size": "7x5 pixels, the first image has 5x7",
    "cut": "cannot be read",
    "text": "cannot be read",
}


@pytest.mark.parametrize("kind", BAD)
def test_files_that_do_not_fit_are_errors_or_counted(tmp_path, kind):
    folder_of(tmp_path)
    write_bad(tmp_path / "02b.png", kind)
    with pytest.raises(ValueError, match=rf"02b\.png: {BAD[kind]}"):
        list(ImageFolder(tmp_path).images())
    lenient = ImageFolder(tmp_path, allow_skips=True)
    assert torch.equal(torch.stack(list(lenient.images())), noise(4, 3, 5, 7))
    assert list(lenient.skipped) == ["02b.png"]
    assert BAD[kind] in lenient.skipped["02b.png"]
    with pytest.raises(ValueError, match="only 4 usable images, 5 asked for, 1 skipped"):
        list(ImageFolder(tmp_path, number=5, allow_skips=True).images())


def test_empty_short_and_absent_folders(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        ImageFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ImageFolder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="4 images, but 5 are asked for"):
        ImageFolder(folder_of(tmp_path), number=5)
    with pytest.raises(ValueError, match="channels: expected 1 or 3, got 4"):
        ImageFolder(tmp_path, channels=4)
    only_bad = tmp_path / "bad"
    only_bad.mkdir()
    write_bad(only_bad / "a.png", "grey")
    with pytest.raises(ValueError, match="none of 1 images is usable"):
        list(ImageFolder(only_bad, allow_skips=True).images())


def test_lossy_and_unquantised_saving_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lossy formats"):
        save_image(noise(3, 4, 5), tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="quantise first"):
        save_image(noise(3, 4, 5).float(), tmp_path / "a.png")


def test_quantisers_follow_their_formulas():
    x = torch.tensor([-1.2, -1.0, -0.998, 0.0, 0.5, 0.9961, 1.0, 1.3]).view(1, 1, 2, 4)
    expected = {
        "edm": [0, 0, 0, 128, 191, 255, 255, 255],
        "adm": [0, 0, 0, 127, 191, 254, 255, 255],
        "truncate": [0, 0, 0, 127, 191, 254, 255, 255],
        "round": [0, 0, 0, 128, 191, 255, 255, 255],
    }
    for rule, values in expected.items():
        assert quantise(x, rule).flatten().tolist() == values, rule
        assert quantise(x, rule).dtype == torch.uint8
    torch.testing.assert_close(
        quantise(x, "none").flatten(),
        torch.tensor([0, 0, 0.255, 127.5, 191.25, 254.5028, 255, 255]),
        atol=1e-3,
        rtol=0,
    )


@pytest.mark.parametrize("rule", sorted(QUANTISERS))
def test_every_quantiser_restores_8_bit_pixels_or_says_how_not(rule):
    levels = torch.arange(256.0).view(1, 1, 16, 16)
    back = quantise(levels / 127.5 - 1, rule).float()
    # The truncating rules may lose one level to fp32 rounding; that is the trap the presets keep.
    assert (back - levels).abs().max() <= (1 if rule in ("adm", "truncate") else 1e-4)


def test_nan_images_and_unknown_rules_are_refused():
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="1 hold NaN or infinity, first 1"):
        quantise(x, "edm")
    with pytest.raises(ValueError, match="unknown 'floor', expected one of"):
        quantise(torch.zeros(1, 1, 2, 2), "floor")


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (48, 80), (512, 400)])
def test_tensor_resize_equals_clean_fids_float_bicubic(height, width):
    images = noise(2, 3, height, width)
    theirs = make_resizer("PIL", False, "bicubic", (299, 299))
    expected = np.stack([theirs(image.permute(1, 2, 0).numpy()) for image in images]).transpose(0, 3, 1, 2)
    assert (resize_tensor(images, 299, "bicubic") - torch.from_numpy(expected)).abs().max() <= 0.01
    np.testing.assert_array_equal(resize_pil(images, 299, "bicubic").numpy(), expected)


def test_8_bit_pil_resize_equals_a_whole_rgb_picture():
    image = noise(1, 3, 40, 56)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((24, 24), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(
        apply_chain(image, [Step("pil-lanczos", 24)])[0].permute(1, 2, 0).numpy(), np.asarray(picture)
    )
    with pytest.raises(ValueError, match="needs uint8 pixels"):
        apply_chain(image.float(), [Step("pil-lanczos", 24)])


def test_crops_are_centred():
    image = torch.arange(35.0).view(1, 1, 5, 7)
    assert centre_square(image).flatten()[:5].tolist() == [1, 2, 3, 4, 5]
    assert centre_crop(image, 3).flatten().tolist() == [9, 10, 11, 16, 17, 18, 23, 24, 25]
    with pytest.raises(ValueError, match="5x7 pixels are too small for a crop of 6"):
        centre_crop(image, 6)


def test_chains_run_in_order_and_refuse_unknown_steps():
    image = noise(2, 3, 20, 30)
    chain = [Step("centre-square"), Step("pil-bilinear", 12), Step("clean-bicubic", 9)]
    expected = resize_tensor(resize_pil(image[..., 5:25], 12, "bilinear", rounded=True), 9, "bicubic")
    assert torch.equal(apply_chain(image, chain), expected)
    with pytest.raises(ValueError, match="unknown step 'nearest'"):
        apply_chain(image, [Step("nearest", 3)])
    with pytest.raises(ValueError, match="'bilinear' needs a size"):
        apply_chain(image, [Step("bilinear")])


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_a_resize_to_the_same_size_changes_nothing_as_in_pillow(mode):
    images = noise(2, 3, 9, 9)
    assert torch.equal(resize_tensor(images, 9, mode), images.float())
    assert torch.equal(resize_pil(images, 9, mode), images.float())
    assert torch.equal(resize_tensor(images.float() * 2, 9, mode), (images.float() * 2).clamp(0, 255))
