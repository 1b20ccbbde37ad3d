"""Reference statistics from a folder: the preset's own chain and network, any sizes, nothing else let through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fewstep.eval.features.extractors import build_extractor
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.eval.protocol.images import save_image
from fewstep.eval.protocol.resize import Step, apply_chain
from fewstep.eval.tools.make_reference import main, make

SIZES = [(20, 30), (24, 24), (31, 22), (40, 20), (21, 23)]


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    content = {
        "name": "tiny",
        "title": "tiny",
        "number": 5,
        "size": 16,
        "channels": 3,
        "conditions": {"kind": "none"},
        "quantiser": "round",
        "chain": [{"op": "centre-square"}, {"op": "pil-lanczos", "size": 16}],
        "extractor": "random-conv-3",
        "reference": {
            "kind": "file",
            "name": "tiny-real.npz",
            "images": 5,
            "file": {"name": "tiny-real.npz", "licence": "none", "source": "this test"},
        },
        "metrics": ["fd"],
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def images(tmp_path: Path) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    made = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in SIZES]
    for i, image in enumerate(made):
        save_image(image, tmp_path / "real" / f"{i}.png")
    return made


def test_statistics_are_those_of_the_chain(tmp_path: Path, preset: Path, images: list[torch.Tensor]):
    path = make([str(tmp_path / "real"), "--preset", str(preset), "--batch", "2"])
    assert path == tmp_path / "cache" / "reference" / "tiny-real.npz"
    found = FeatureStatistics.load(path)
    extractor = build_extractor("random-conv-3")
    chain = [Step("centre-square"), Step("pil-lanczos", 16)]
    features = torch.cat([extractor(apply_chain(image[None], chain)) for image in images]).double().numpy()
    assert found.n == 5
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.covariance, np.cov(features.T), rtol=1e-5, atol=1e-6)
    assert found.provenance["extractor_sha256"] == extractor.sha256


def test_what_does_not_fit_is_refused(
    tmp_path: Path, preset: Path, images: list[torch.Tensor], capsys: pytest.CaptureFixture[str]
):
    real = tmp_path / "real"
    arguments = [str(real), "--preset", str(preset), "--out", str(tmp_path / "made.npz")]
    grey = Image.new("L", (25, 25), 90)
    grey.save(real / "4.png")
    with pytest.raises(ValueError, match=r"4.png: is grey, expected 8-bit colour"):
        make(arguments)
    assert not (tmp_path / "made.npz").exists()
    assert make([*arguments, "--grey-to-colour"]) == tmp_path / "made.npz"
    colour = FeatureStatistics.load(tmp_path / "made.npz").mean
    grey.convert("RGB").save(real / "4.png")
    np.testing.assert_allclose(FeatureStatistics.load(make(arguments)).mean, colour, rtol=1e-6)
    (real / "4.png").unlink()
    with pytest.raises(ValueError, match="4 images, the reference of preset tiny is of 5"):
        make(arguments)
    with pytest.raises(ValueError, match="preset digits: its reference is 'builtin', there is no file to make"):
        make([str(real), "--preset", "digits"])
    content = yaml.safe_load(preset.read_text())
    content["chain"] = []
    content["reference"]["images"] = None
    preset.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"leaves images of different sizes, \[3, 20, 30\] and \[3, 24, 24\]"):
        make(arguments)


def test_the_command_ends_in_one_line(tmp_path: Path, preset: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.argv", ["make_reference", str(tmp_path / "empty"), "--preset", str(preset)])
    with pytest.raises(SystemExit, match=r"^error: .*empty: no images"):
        main()
