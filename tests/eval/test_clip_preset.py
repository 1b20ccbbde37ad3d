"""The CLIP score of a preset: taken from the samples that the other metrics see, beside their prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import yaml

from fewstep.cli import main
from fewstep.eval.features.base import random_conv
from fewstep.eval.features.clip import RECIPES, clip_images, clip_score
from fewstep.eval.features.extractors import build_extractor
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.eval.protocol.evaluate import evaluate, preset_clip
from fewstep.eval.protocol.images import save_image
from fewstep.eval.protocol.preset import (
    ClipScore,
    File,
    MissingFiles,
    ResizeStep,
    load_preset,
    require_files,
)
from fewstep.eval.protocol.reference import Reference
from fewstep.eval.protocol.resize import Step, apply_chain
from fewstep.eval.protocol.runner import Job, collect, extract_images, run_shards

N = 24
EXTRACTOR = random_conv(0, dim=6)
PROMPTS = [f"a picture of {i} things" for i in range(N)]
CHAIN = [Step("pil-bicubic", 224)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "random.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(open_clip.create_model("ViT-S-32").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def expected(checkpoint: Path, pixels: torch.Tensor) -> float:
    clip = clip_images("ViT-S-32", checkpoint)
    features = clip(apply_chain(pixels, CHAIN))
    return clip_score(clip.network, RECIPES["torchmetrics"].__class__("ViT-S-32"), features, PROMPTS).value


def section(checkpoint: Path, prefix: str = "") -> ClipScore:
    file = File(checkpoint.name, "none", "this test")
    return ClipScore("ViT-S-32", file, [ResizeStep("pil-bicubic", 224)], prefix=prefix)


def test_shipped_presets_follow_the_named_conventions():
    for name in ("coco30k", "coco10k-sdxl"):
        clip = load_preset(name).clip
        assert clip is not None
        wanted = RECIPES["dmd2"]
        for key in ("architecture", "prefix", "scale", "clip_negative", "on_long_prompt"):
            assert getattr(clip, key) == getattr(wanted, key)
        assert [(s.op, s.size) for s in clip.chain] == [
            ("centre-square", None),
            ("pil-lanczos", 256),
            ("pil-bicubic-8bit", 224),
        ]
    clip, wanted = load_preset("mjhq30k").clip, RECIPES["torchmetrics"]
    assert clip is not None
    assert (clip.architecture, clip.scale, clip.clip_negative) == (wanted.architecture, 100.0, True)


def test_the_section_enters_the_hash_and_its_absence_does_not():
    with_clip, without = load_preset("coco30k"), load_preset("digits")
    assert with_clip.clip is not None
    other = replace(with_clip, clip=replace(with_clip.clip, scale=2.5))
    assert other.hash != with_clip.hash
    assert without.clip is None
    assert without.hash == "7d4ad5fecf933b81"


def test_a_checkpoint_is_asked_for_unless_the_score_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    preset = load_preset("coco30k")
    with pytest.raises(MissingFiles, match=r"CLIP-ViT-g-14-laion2B-s12B-b42K.bin: missing; licence: MIT"):
        require_files(preset)
    with pytest.raises(MissingFiles) as caught:
        require_files(preset, omit=["clip-score"])
    assert "CLIP" not in str(caught.value)


def test_shards_carry_clip_features_and_know_the_network(
    tmp_path: Path,
    checkpoint: Path,
    pixels: torch.Tensor,
    expected: float,
    monkeypatch: pytest.MonkeyPatch,
):
    clip = preset_clip(section(checkpoint), checkpoint)
    job = Job(N, {"model": "a"}, shard_size=10, batch_size=7, clip_chain=CHAIN)

    def generate(index: list[int]) -> torch.Tensor:
        return pixels[index].float() / 127.5 - 1

    assert run_shards(job, tmp_path, generate, EXTRACTOR, clip=clip.images) == N
    samples = collect(job, tmp_path, EXTRACTOR, clip.images)
    assert samples.clip is not None
    assert clip.score(samples.clip, PROMPTS).value == pytest.approx(expected, rel=1e-5)
    assert job.key(EXTRACTOR) != job.key(EXTRACTOR, clip.images)
    with pytest.raises(ValueError, match="holds shards of another job"):
        collect(job, tmp_path, EXTRACTOR)
    monkeypatch.setattr(clip.images, "encode", lambda x: torch.full((len(x), clip.images.dim), torch.nan))
    with pytest.raises(ValueError, match=r"clip:ViT-S-32: NaN features for samples 0\.\.6"):
        run_shards(job, tmp_path / "nan", generate, EXTRACTOR, clip=clip.images)


def test_evaluate_names_the_score_and_refuses_to_do_without(checkpoint: Path, pixels: torch.Tensor, expected: float):
    clip = preset_clip(section(checkpoint), checkpoint)
    preset = replace(
        load_preset("coco30k"),
        number=N,
        metrics=["fd", "clip-score"],
        clip=section(checkpoint),
        repetitions=1,
    )
    statistics = FeatureStatistics(EXTRACTOR.dim)
    statistics.update(EXTRACTOR(pixels))
    reference = Reference("pixels", statistics)
    samples = extract_images(iter(pixels.split(9)), EXTRACTOR, (), clip.images, CHAIN)
    found = evaluate("x", preset, EXTRACTOR, samples, reference, clip=clip, prompts=PROMPTS)
    assert found.metrics[clip.recipe.name]["value"] == pytest.approx(expected, rel=1e-5)
    assert found.metrics[clip.recipe.name]["standard_error"] > 0
    with pytest.raises(ValueError, match="clip-score: needs CLIP, the prompts"):
        evaluate("x", preset, EXTRACTOR, samples, reference)
    left_out = evaluate("x", preset, EXTRACTOR, samples, reference, omit={"clip-score": "asked"})
    assert left_out.omitted == {"clip-score": "asked"}


@pytest.fixture
def protocol(tmp_path: Path, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A preset of N prompts with its files in $FEWSTEP_WEIGHTS and a folder of images."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "weights"
    weights.mkdir()
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(weights))
    (weights / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    extractor = build_extractor("random-conv-0")
    statistics = FeatureStatistics(extractor.dim, {"extractor": extractor.name})
    statistics.update(extractor(pixels))
    statistics.save(weights / "reference.npz")
    for i, image in enumerate(pixels):
        save_image(image, tmp_path / "pictures" / f"{i:02d}.png")
    content = {
        "name": "tiny",
        "title": "tiny",
        "number": N,
        "size": 16,
        "channels": 3,
        "conditions": {
            "kind": "prompts",
            "file": {"name": "prompts.txt", "licence": "none", "source": "here"},
        },
        "quantiser": "round",
        "chain": [],
        "extractor": "random-conv-0",
        "reference": {
            "kind": "file",
            "name": "reference.npz",
            "file": {"name": "reference.npz", "licence": "none", "source": "here"},
        },
        "clip": {
            "architecture": "ViT-S-32",
            "chain": [{"op": "pil-bicubic", "size": 224}],
            "file": {"name": "clip.pt", "licence": "none", "source": "here"},
        },
        "metrics": ["fd", "clip-score"],
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def told(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """What the command prints, on stdout where it ends well, on stderr otherwise."""
    with pytest.raises(SystemExit) as caught:
        main(["eval", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert caught.value.code == code, out + err
    return " ".join((err if code else out).split())


def test_command_scores_a_folder(protocol: Path, checkpoint: Path, expected: float, capsys: pytest.CaptureFixture[str]):
    images = ("--images", protocol.parent / "pictures", "--preset", protocol)
    out = told(capsys, 0, *images, "--clip-path", checkpoint)
    assert "CLIP score (ViT-S-32, cos, x1, prefix '', long prompts: error)" in out
    assert f"{expected:.2g} ±" in out  # as many digits as its error allows


def test_prompts_belong_to_images_by_number(protocol: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    pictures = protocol.parent / "pictures"
    for path in pictures.iterdir():
        path.rename(pictures / f"{int(path.stem)}.png")
    images = ("--images", pictures, "--preset", protocol)
    out = told(capsys, 2, *images, "--clip-path", checkpoint)
    assert "19.png comes before 2.png by name and after it by number" in out
    assert "FD (random-conv-0-32)" in told(capsys, 0, *images, "--omit", "clip-score")


def test_command_says_what_is_missing_or_wrong(protocol: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    pictures = protocol.parent / "pictures"
    images = ("--images", pictures, "--preset", protocol)
    assert "clip.pt: missing" in told(capsys, 2, *images)
    assert "left out by --omit" in told(capsys, 0, *images, "--omit", "clip-score")
    assert "--omit inception-score: preset tiny measures fd, clip-score" in told(
        capsys, 2, *images, "--omit", "inception-score"
    )
    found = told(capsys, 2, *images, "--omit", "clip-score", "--clip-path", checkpoint)
    assert "--clip-path: preset tiny takes no CLIP score here" in found
    prompts = protocol.parent / "weights" / "prompts.txt"
    prompts.write_text("\n".join(["a very long prompt " * 40, *PROMPTS[1:]]))
    assert "prompt 0:" in told(capsys, 2, *images, "--clip-path", checkpoint)
    content = yaml.safe_load(protocol.read_text())
    del content["clip"]
    protocol.write_text(yaml.safe_dump(content))
    assert "clip-score needs the section clip" in told(capsys, 2, *images)
