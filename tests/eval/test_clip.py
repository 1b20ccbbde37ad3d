"""CLIP by open-clip from a local file: the score's conventions, and prompts that do not fit."""

import math

import open_clip
import pytest
import torch

from fewstep.eval.features.base import state_sha256
from fewstep.eval.features.clip import RECIPES, ClipRecipe, clip_images, clip_score, load_clip, tokenise

LONG = "a very long prompt " * 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip") / "random.pt"
    torch.save(open_clip.create_model("ViT-S-32").state_dict(), path)
    return path


def test_local_checkpoint_gives_features_and_wrong_files_are_refused(checkpoint, tmp_path):
    extractor = clip_images("ViT-S-32", checkpoint)
    features = extractor(torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8))
    assert features.shape == (2, extractor.dim)
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent\.pt"):
        load_clip("ViT-S-32", tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="unknown architecture 'ViT-S-33'"):
        load_clip("ViT-S-33", checkpoint)
    with pytest.raises(ValueError, match="expected 00"):
        load_clip("ViT-S-32", checkpoint, sha256="00")
    with pytest.raises(ValueError, match="not weights of ViT-M-32"):
        load_clip("ViT-M-32", checkpoint)


def test_a_tag_is_handed_to_open_clip(monkeypatch):
    asked = []

    def create_model(architecture, pretrained, weights_only):
        asked.append((architecture, pretrained, weights_only))
        return torch.nn.Linear(2, 3)

    monkeypatch.setattr(open_clip, "create_model", create_model)
    model, digest = load_clip("ViT-B-32", "laion2b_s34b_b79k")
    assert asked == [("ViT-B-32", "laion2b_s34b_b79k", True)]
    assert digest == state_sha256(model)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="names a file by its sha256 00"):
        load_clip("ViT-B-32", "laion2b_s34b_b79k", sha256="00")
    with pytest.raises(FileNotFoundError, match="or one of its tags"):
        load_clip("ViT-B-32", "laion2b_s12b_b42k")  # ViT-g-14's


def test_long_prompts_are_errors_or_keep_their_end_token():
    strict, lenient = ClipRecipe("ViT-S-32"), ClipRecipe("ViT-S-32", on_long_prompt="keep-eot")
    with pytest.raises(ValueError, match=r"prompt 1: .* tokens, ViT-S-32 reads 77"):
        tokenise(strict, ["short", LONG])
    tokens = tokenise(lenient, ["short", LONG])
    assert tokens.shape == (2, 77)
    assert tokens[1, -1] == tokens[0].max() == tokens.max()
    with pytest.raises(ValueError, match="expected 'error' or 'keep-eot'"):
        tokenise(ClipRecipe("ViT-S-32", on_long_prompt="cut"), ["a"])


class Text(torch.nn.Module):
    """Encodes prompt i as a fixed direction, so that cosines are known."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def encode_text(self, tokens):
        return self.rows[: len(tokens)]


def test_scores_follow_their_recipe():
    text = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    images = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-2.0, 0.0]])
    cosines = [1.0, math.sqrt(0.5), -1.0]
    plain = clip_score(Text(text), ClipRecipe("ViT-S-32"), images, ["a", "b", "c"])
    assert plain.value == pytest.approx(sum(cosines) / 3, rel=1e-6)
    assert plain.standard_error == pytest.approx(torch.tensor(cosines).std().item() / math.sqrt(3), rel=1e-6)
    floored = ClipRecipe("ViT-S-32", scale=2.5, clip_negative=True)
    assert clip_score(Text(text), floored, images, ["a", "b", "c"]).value == pytest.approx(
        2.5 * (1 + math.sqrt(0.5)) / 3, rel=1e-6
    )
    with pytest.raises(ValueError, match="prompts: 2 for 3 images"):
        clip_score(Text(text), floored, images, ["a", "b"])


def test_the_name_states_every_convention():
    names = {recipe.name for recipe in RECIPES.values()}
    assert len(names) == len(RECIPES)
    assert RECIPES["clip-s"].name == (
        "CLIP score (ViT-B-32-quickgelu, max(cos, 0), x2.5, prefix 'A photo depicts ', long prompts: error)"
    )


def test_each_recipe_has_the_activation_its_weights_were_trained_with():
    for name, tag in (("clip-s", "openai"), ("torchmetrics", "openai"), ("dmd2", "laion2b_s12b_b42k")):
        architecture = RECIPES[name].architecture
        built = open_clip.get_model_config(architecture).get("quick_gelu", False)
        trained = open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False)
        assert built is trained


def test_dmd2_puts_its_prefix_behind_the_start_token():
    for prompt in ("two cats", LONG):
        (whole,) = tokenise(RECIPES["dmd2"], [prompt])
        (words,) = tokenise(ClipRecipe("ViT-g-14", on_long_prompt="keep-eot"), [prompt])
        (prefix,) = tokenise(ClipRecipe("ViT-g-14"), ["A photo depicts "])
        expected = torch.cat([words[:1], prefix[1:4], words[1:]])[:77]
        if expected[-1] > 0:
            expected[-1] = words.max()  # the end token, the largest of all
        assert torch.equal(whole, expected)


def test_damaged_checkpoints_and_features_are_refused(tmp_path):
    for name in ("a.bin", "a.safetensors"):
        (tmp_path / name).write_bytes(b"no network at all")
        with pytest.raises(ValueError, match=rf"{name}: not weights of ViT-S-32 \("):
            load_clip("ViT-S-32", tmp_path / name)
    text, images = torch.eye(3), torch.eye(3)
    images[1, 2] = torch.nan
    with pytest.raises(ValueError, match="ViT-S-32: features of image 1 are not finite"):
        clip_score(Text(text), ClipRecipe("ViT-S-32"), images, ["a", "b", "c"])
