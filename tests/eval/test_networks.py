"""Networks from local files: digests, refusals, clean-fid with ours and ours with clean-fid; pipelines by index."""

import hashlib

import numpy as np
import pytest
import torch
from cleanfid import fid
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from fewstep.eval.features import networks
from fewstep.eval.features.base import random_conv
from fewstep.eval.features.extractors import build_extractor
from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.protocol.images import ImageFolder, save_image
from fewstep.eval.protocol.pipelines import count_calls, pipeline_generate
from fewstep.eval.protocol.resize import Step
from fewstep.eval.protocol.runner import extract_images
from fewstep.eval.tools.selftest import selftest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    return tmp_path / "cache"


def test_missing_inception_says_where_it_looked_and_never_downloads(cache, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("a download was tried"))
    with pytest.raises(FileNotFoundError, match=rf"no weights at {cache}/weights/inception-2015-12-05\.pt"):
        networks.inception()
    (cache / "weights" / "inception-2015-12-05.pt").write_bytes(b"truncated")
    with pytest.raises(ValueError, match=r"expected f58cb9b6.*truncated or another network"):
        networks.inception()


def test_weights_in_a_folder_for_everybody_are_refused(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "inception-2015-12-05.pt").write_bytes(b"x")
    shared.chmod(0o777)
    with pytest.raises(PermissionError, match="world-writable"):
        networks.inception(shared / "inception-2015-12-05.pt")


class Toy(torch.nn.Module):
    """Stands for the Inception file: the same TorchScript interface, 2048 outputs."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x):
        return self.layers(x)


class Layers(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x.mean(dim=(2, 3)), x.flatten(1)[:, :2045]], dim=1)


def test_inception_goes_through_clean_fids_own_wrapper(tmp_path, monkeypatch):
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Toy()).save(str(path))
    monkeypatch.setattr(networks, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    extractor = networks.inception(path)
    images = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    found = extractor(images)
    assert found.shape == (2, 2048)
    expected = (images.float() - 128).div(128).mean(dim=(2, 3))
    torch.testing.assert_close(found[:, :3], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="expected 299x299 pixels, got 32x32"):
        extractor(images[..., :32, :32])


def test_effnet_names_what_sklearns_photographs_show():
    from sklearn.datasets import load_sample_image

    from fewstep.eval.protocol.resize import apply_chain

    extractor = build_extractor("effnet-lite0-224")
    # ImageNet classes: 698 palace, 442 bell cote, 663 monastery; 985 daisy.
    for photograph, classes in (("china.jpg", {698, 442, 663}), ("flower.jpg", {985})):
        image = torch.from_numpy(load_sample_image(photograph).copy()).permute(2, 0, 1).unsqueeze(0)
        pixels = apply_chain(image, [Step("centre-square"), Step("clean-bicubic", 224)])
        features = extractor(pixels)
        logits = extractor.network._fc(features)
        assert set(logits[0].topk(len(classes)).indices.tolist()) == classes
    assert extractor.dim == features.shape[1] == 1280


def test_wrong_effnet_file_is_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"effnet-lite0: .*a.pth has sha256"):
        networks.effnet_lite0(64, tmp_path / "a.pth")


def test_dinov2_folder_loads_and_missing_tensors_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=224)
    Dinov2Model(config).save_pretrained(tmp_path)
    extractor = build_extractor("dinov2", tmp_path)
    assert extractor(torch.full((2, 3, 224, 224), 90.0)).shape == (2, 24)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \['layernorm.weight'\]"):
        networks.dinov2(tmp_path)
    with pytest.raises(ValueError, match="expected 00"):
        networks.dinov2(tmp_path, sha256="00")
    with pytest.raises(FileNotFoundError, match="transformers Dinov2Model"):
        networks.dinov2(tmp_path / "none")


def test_unknown_extractors_are_refused():
    with pytest.raises(ValueError, match="unknown 'inception', expected one of"):
        build_extractor("inception")
    with pytest.raises(ValueError, match="dinov2: needs the path"):
        build_extractor("dinov2")
    assert build_extractor("random-conv-3").sha256 == random_conv(3).sha256


def test_our_extractor_works_inside_clean_fid_and_folders_agree(tmp_path):
    extractor = random_conv(2, dim=5)
    generator = torch.Generator().manual_seed(0)
    for part in ("a", "b"):
        base = torch.rand(12, 3, 3, 3, generator=generator) * 200
        images = torch.nn.functional.interpolate(base, size=(18, 18), mode="bilinear").round().to(torch.uint8)
        for index, image in enumerate(images):
            save_image(image, tmp_path / part / f"{index:02d}.png")
    theirs = fid.compute_fid(
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        num_workers=0,
        device=torch.device("cpu"),
        use_dataparallel=False,
        verbose=False,
        custom_feat_extractor=extractor,
    )
    ours = {}
    for step in ("pil-bicubic", "clean-bicubic"):
        a, b = (extract_images(ImageFolder(tmp_path / part).batches(16), extractor, [Step(step, 299)]) for part in "ab")
        ours[step] = frechet_distance(a.features, b.statistics).value
    assert ours["pil-bicubic"] == pytest.approx(theirs, rel=1e-6)
    assert ours["clean-bicubic"] == pytest.approx(theirs, rel=1e-4)


def test_a_pipelines_samples_belong_to_their_index():
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
    )
    pipeline = DDPMPipeline(network, DDIMScheduler(num_train_timesteps=20))
    pipeline.set_progress_bar_config(disable=True)
    generate = pipeline_generate(pipeline, seed=5, num_inference_steps=3)
    together = generate([0, 1, 2, 3])
    assert together.shape == (4, 3, 8, 8)
    assert -1 <= together.min() < together.max() <= 1
    apart = torch.cat([generate([3]), generate([1, 0])])
    torch.testing.assert_close(apart, together[[3, 1, 0]], atol=2e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.05
    assert count_calls(network, generate, [0, 1]) == 3


def test_selftest_passes(cache):
    checks, rows = selftest()
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == 6
    table = {row.step: row.change for row in rows}
    assert table["none (8-bit pixels)"] == 0
    assert table["JPEG quality 75"] > table["JPEG quality 95"] > 0
    assert np.isfinite(list(table.values())).all()
