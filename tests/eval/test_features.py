"""Extractors: the protocol, the pinned house networks, clean-fid in both directions, cached references."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fewstep.eval.features.base import (
    FeatureExtractor,
    as_pixels,
    extract,
    random_conv,
    rows_at_once,
    wrap,
)
from fewstep.eval.features.house import HouseDigits, HouseFashion, accuracy, house_digits, parameter_count
from fewstep.eval.protocol.datasets import digits, fashion_mnist
from fewstep.eval.protocol.reference import digits_reference, reference_of
from fewstep.eval.tools.train_house import PLANS, augment, split_digits, train
from fewstep.files import cache_dir


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_random_conv_depends_on_its_seed_alone():
    images = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8)
    torch.manual_seed(1)
    first = random_conv(4, dim=6)
    torch.manual_seed(2)
    second = random_conv(4, dim=6)
    assert isinstance(first, FeatureExtractor)
    assert first.sha256 == second.sha256 != random_conv(5, dim=6).sha256
    assert first(images).shape == (3, 6)
    assert first(images).dtype == torch.float32
    torch.testing.assert_close(first(images), second(images.double()), rtol=0, atol=0)


def test_the_shipped_digits_network_is_pinned_small_and_right():
    network = house_digits()
    assert isinstance(network, FeatureExtractor)
    assert parameter_count(network) <= 60_000
    assert (network.dim, network.input_size, network.sha256) == (64, 8, HouseDigits.pinned)
    _, _, images, labels = split_digits(0)
    assert len(labels) == 359
    assert accuracy(network, images, labels) >= 0.98
    features = network(images[:5])
    assert features.shape == (5, 64)
    torch.testing.assert_close(network.from_features(features), network.logits(images[:5]))


def test_grey_and_colour_copies_of_a_digit_have_the_same_features():
    network, (images, _) = house_digits(), digits()
    grey = images[:4]
    torch.testing.assert_close(network(grey.expand(-1, 3, -1, -1)), network(grey), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(network(grey.round().to(torch.uint8)), network(grey.round()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 28, 28), "expected 8x8 pixels, got 28x28"),
        (torch.zeros(2, 1, 8, 9), "expected 8x8 pixels, got 8x9"),
        (torch.zeros(2, 2, 8, 8), "expected 1 or 3 channels, got 2"),
        (torch.zeros(1, 8, 8), r"expected shape \(N, C, H, W\), got \(1, 8, 8\)"),
        (torch.full((2, 1, 8, 8), -0.5), r"values in \[0, 255\], got -0.5 to -0.5"),
        (torch.full((2, 1, 8, 8), 256.0), r"values in \[0, 255\]"),
        (torch.full((2, 1, 8, 8), float("nan")), r"values in \[0, 255\], got nan"),
    ],
)
def test_images_that_are_not_digits_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        house_digits()(images)


def test_wrong_weights_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no weights of house-digits.*train_house --data digits"):
        HouseDigits.load(tmp_path)
    save_file(HouseFashion().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not weights of house-digits; names or shapes differ"):
        HouseDigits.load(tmp_path)
    monkeypatch.setattr(HouseDigits, "pinned", "f" * 64)
    with pytest.raises(ValueError, match="is not the pinned ffff"):
        HouseDigits.load()


def test_training_repeats_itself_and_learns():
    first, held_out = train("digits", seed=3, epochs=8)
    second, _ = train("digits", seed=3, epochs=8)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], rtol=0, atol=0)
    assert held_out > 0.9


def test_augmentation_keeps_the_range_and_moves_by_less_than_the_shift():
    images = torch.zeros(64, 1, 8, 8)
    images[:, :, 3, 4] = 255.0
    plan = PLANS["digits"]
    moved = augment(images, plan, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert 0 <= moved.min() <= moved.max() <= 255
    assert not torch.equal(moved[0], moved[1])
    quiet = augment(images, type(plan)(HouseDigits, 1, 1, shift=0.75, noise=0.0), torch.Generator())
    rows, columns = torch.arange(8.0), torch.arange(8.0)
    mass = quiet.sum(dim=(1, 2, 3))
    row = (quiet.sum(dim=(1, 3)) * rows).sum(1) / mass
    column = (quiet.sum(dim=(1, 2)) * columns).sum(1) / mass
    assert (row - 3).abs().max() <= 0.75 + 1e-4
    assert (column - 4).abs().max() <= 0.75 + 1e-4


def test_extract_does_not_depend_on_the_batch_size_and_names_bad_rows():
    extractor = random_conv(0, dim=5)
    images = torch.randint(0, 256, (11, 1, 6, 4), dtype=torch.uint8)
    torch.testing.assert_close(extract(extractor, images, 4), extract(extractor, iter(images.split(7))))
    broken = wrap(
        lambda x: torch.where(x[:, 0, :1, 0] > 100, torch.nan, x[:, 0, :1, 0]),
        name="broken",
        dim=1,
        input_size=None,
        sha256="0" * 64,
    )
    pixels = torch.zeros(6, 3, 2, 2)
    pixels[4] = 200
    with pytest.raises(ValueError, match="broken: features of image 4 are not finite"):
        extract(broken, pixels, 3)
    with pytest.raises(ValueError, match="none were given"):
        extract(extractor, [])


def test_wrap_refuses_unidentified_weights_and_wrong_shapes():
    with pytest.raises(ValueError, match="64 hex digits"):
        wrap(lambda x: x, name="x", dim=3, input_size=None, sha256="")
    flat = wrap(lambda x: x.flatten(1), name="flat", dim=3, input_size=None, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"flat: features of shape \(2, 12\), expected \(2, 3\)"):
        flat(torch.zeros(2, 3, 2, 2))


def test_as_pixels_averages_and_repeats():
    colour = torch.stack([torch.full((4, 5), v) for v in (30.0, 60.0, 90.0)]).unsqueeze(0)
    torch.testing.assert_close(as_pixels(colour, channels=1), torch.full((1, 1, 4, 5), 60.0))
    assert as_pixels(colour[:, :1], channels=3).shape == (1, 3, 4, 5)


def test_reference_is_cached_by_content_and_repaired_when_damaged(cache):
    images, labels = torch.randint(0, 256, (20, 1, 6, 6), dtype=torch.uint8), torch.arange(20) % 4
    calls = []

    class Counting(torch.nn.Module):
        name, dim, input_size, sha256 = "counting", 3, None, "a" * 64

        def forward(self, x):
            calls.append(len(x))
            return as_pixels(x, channels=3).mean(dim=(2, 3)) + torch.rand(3)

    first = reference_of("toy", images, labels, Counting())
    second = reference_of("toy", images, labels, Counting())
    assert calls == [20]
    torch.testing.assert_close(first.features, second.features, rtol=0, atol=0)
    torch.testing.assert_close(second.labels, labels)
    np.testing.assert_array_equal(first.statistics.covariance, second.statistics.covariance)
    assert second.statistics.provenance["extractor_sha256"] == "a" * 64
    (path,) = (cache / "reference").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    reference_of("toy", images, labels, Counting())
    assert calls == [20, 20]
    changed = images.clone()
    changed[3, 0, 2, 2] ^= 1
    reference_of("toy", changed, labels, Counting())
    assert calls == [20, 20, 20]
    other = Counting()
    other.sha256 = "b" * 64
    reference_of("toy", images, labels, other)
    assert calls == [20, 20, 20, 20]


def test_digits_reference_is_the_whole_set(cache):
    found = digits_reference(house_digits())
    assert found.statistics.n == 1797
    assert found.features.shape == (1797, 64)
    np.testing.assert_allclose(found.statistics.covariance, np.cov(found.features.double().numpy().T), rtol=1e-9)
    assert list(cache.rglob("*.safetensors"))


def test_world_writable_cache_is_refused(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("FEWSTEP_CACHE", str(shared))
    with pytest.raises(PermissionError, match="world-writable"):
        cache_dir("reference")


def test_cache_follows_the_platform_when_not_chosen(tmp_path, monkeypatch):
    monkeypatch.delenv("FEWSTEP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_dir("a", "b") == tmp_path / "xdg" / "fewstep" / "a" / "b"


def test_digits_fill_the_range():
    images, labels = digits()
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    assert labels.bincount().min() >= 170


def idx(array):
    header = bytes((0, 0, 8, array.ndim)) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def test_idx_files_are_read_and_damage_is_named(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4), dtype=np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(5, dtype=np.uint8)))
    pixels, labels = fashion_mnist("test", tmp_path)
    np.testing.assert_array_equal(pixels[:, 0], images)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(5, dtype=np.uint8))[:-1])
    with pytest.raises(ValueError, match="4 bytes of data"):
        fashion_mnist("test", tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(4, dtype=np.uint8)))
    with pytest.raises(ValueError, match="5 images but 4 labels"):
        fashion_mnist("test", tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(ValueError, match="damaged"):
        fashion_mnist("test", tmp_path)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist("train", tmp_path)
    with pytest.raises(ValueError, match="expected 'train' or 'test'"):
        fashion_mnist("val", tmp_path)


def test_calls_on_a_cpu_are_cut_to_its_caches_and_features_stay_the_same():
    extractor = random_conv(0, dim=6)
    images = torch.rand(50, 3, 40, 33, generator=torch.Generator().manual_seed(1)) * 255
    assert rows_at_once(extractor, images) == 12
    assert rows_at_once(extractor, images[..., :8, :8]) == 256
    assert rows_at_once(extractor, torch.zeros(2, 3, 299, 299)) == 4
    torch.testing.assert_close(extract(extractor, images), extractor(images))
