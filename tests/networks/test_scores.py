"""What judges samples: CLIP of a tiny random checkpoint gives open-clip's own cosines, or says what it cannot judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fewstep.config import UserError
from fewstep.eval.features.pixel_network import CLIP_MEAN, CLIP_STD
from fewstep.networks.scores import ClassScore, ClipTextScore

CAPTIONS = ["a red square", "two green dots", "nothing at all"]
NAME = "fewstep-tiny"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of a CLIP of 32 pixels, whose architecture open-clip is told."""
    root = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (root / f"{NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(root / f"{NAME}.json")
    torch.manual_seed(3)
    torch.save(open_clip.create_model(NAME).state_dict(), root / "tiny.pt")
    return root / "tiny.pt"


@torch.no_grad()
def by_hand(weights: Path, pixels: Tensor, texts: list[str]) -> Tensor:
    """Cosines by open-clip alone, of pixels (b, 3, 32, 32) in [0, 1]."""
    model: Any = open_clip.create_model(NAME, pretrained=str(weights)).eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    images = model.encode_image((pixels - mean) / std)
    return functional.cosine_similarity(images.double(), model.encode_text(open_clip.get_tokenizer(NAME)(texts)).double())


def test_captions_go_with_the_number_of_a_sample(weights: Path):
    judge = ClipTextScore(architecture=NAME, path=str(weights)).open((3, 32, 32), CAPTIONS)
    levels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    index = torch.tensor([1, 0, 5, 4])
    scores = judge(2 * levels - 1, {}, index)
    want = by_hand(weights, levels, [CAPTIONS[i % 3] for i in index.tolist()])
    torch.testing.assert_close(scores, want, rtol=0, atol=1e-6)
    assert float(scores.std()) > 1e-3
    torch.testing.assert_close(judge(2 * levels[2:] - 1, {}, index[2:]), scores[2:], rtol=0, atol=1e-6)
    prefixed = ClipTextScore(architecture=NAME, path=str(weights), prefix="a photo of ").open((3, 32, 32), CAPTIONS)
    texts = [f"a photo of {CAPTIONS[i % 3]}" for i in index.tolist()]
    torch.testing.assert_close(prefixed(2 * levels - 1, {}, index), by_hand(weights, levels, texts), rtol=0, atol=1e-6)


def test_classes_have_captions_of_their_own(weights: Path):
    """Grey pictures are enlarged; class 1's caption it is, whatever the sample's number."""
    part = ClipTextScore(architecture=NAME, path=str(weights), labels=("nought", "one"))
    judge = part.open((1, 8, 8), None)
    grey = torch.full((2, 1, 8, 8), 0.2)
    scores = judge(grey, torch.tensor([1, 0]), torch.tensor([7, 8]))
    pixels = torch.full((2, 3, 32, 32), round(0.6 * 255) / 255)
    torch.testing.assert_close(scores, by_hand(weights, pixels, ["one", "nought"]), rtol=0, atol=1e-5)
    beside = {"label": torch.tensor([1, 0]), "image": grey}
    assert torch.equal(judge(grey, beside, torch.tensor([7, 8])), scores)
    with pytest.raises(UserError, match=r"score\.labels: are 2 captions of classes, and there is class 2"):
        judge(grey, torch.tensor([2, 0]), torch.tensor([0, 1]))
    for none in (None, {"image": grey}):
        with pytest.raises(UserError, match="these have no classes"):
            judge(grey, none, torch.tensor([0, 1]))


def test_the_class_may_stand_beside_a_picture():
    judge = ClassScore().open((1, 8, 8), None)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    label, index = torch.tensor([3, 0, 9]), torch.arange(3)
    assert torch.equal(judge(x, {"label": label, "image": x}, index), judge(x, label, index))
    with pytest.raises(UserError, match="score class: judges samples of classes; these have none"):
        judge(x, {"image": x}, index)


def test_what_cannot_be_judged_is_refused(weights: Path, tmp_path: Path):
    def refused(shape: tuple[int, ...], captions: list[str] | None = CAPTIONS, **changes: Any) -> str:
        part = ClipTextScore(**{"architecture": NAME, "path": str(weights)} | changes)
        with pytest.raises(UserError) as caught:
            part.open(shape, captions)
        return str(caught.value)

    assert "judges pictures, grey or in colour; these samples are [2]" in refused((2,))
    assert "for samples of classes give score.labels" in refused((1, 8, 8), None)
    assert "unknown architecture 'ViT-S-33'" in refused((3, 8, 8), architecture="ViT-S-33")
    assert "no weights at" in refused((3, 8, 8), path=str(tmp_path / "absent.pt"))
    assert "expected 00" in refused((3, 8, 8), sha256="00")
    with pytest.raises(UserError, match=r"judges grey pictures of 8 x 8 or 28 x 28; these samples are \[3, 8, 8\]"):
        ClassScore().open((3, 8, 8), None)
