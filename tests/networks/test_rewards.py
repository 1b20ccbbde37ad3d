"""Reward networks: what they say, that gradients reach the samples, and what is refused before a training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.config import REGISTRY, Absent, RecipeError, UserError
from fewstep.eval.features.house import house_digits
from fewstep.networks import code
from fewstep.networks.parts import Site
from fewstep.networks.rewards import (
    ClipSpec,
    HouseClassifierSpec,
    InkSpec,
    Likeness,
    ModuleSpec,
    away,
    check_reward,
    straight,
)
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer

F64 = torch.float64
DIGITS = Site((1, 8, 8), 10, {}, 0)


def slope(reward: Any, x: Tensor, cond: Any = None) -> Tensor:
    x = x.requires_grad_()
    return torch.autograd.grad(reward(x, cond).sum(), x)[0]


def test_ink_is_the_mean_of_grey_levels_and_above_a_level_a_share():
    x = torch.tensor([[[[-1.0, 1.0, 0.0], [0.5, -0.5, 1.0]]], torch.full((1, 2, 3), -1.0).tolist()])
    assert InkSpec().build(DIGITS)(x).tolist() == pytest.approx([(0 + 1 + 0.5 + 0.75 + 0.25 + 1) / 6, 0.0])
    assert InkSpec(above=0.2).build(DIGITS)(x).tolist() == pytest.approx([3 / 6, 0.0])
    assert (slope(InkSpec().build(DIGITS), x) == 1 / 12).all()
    assert (InkSpec().differentiable, InkSpec(above=0.2).differentiable) == (True, False)


def test_the_house_classifier_gives_the_log_probability_of_the_label():
    reward = HouseClassifierSpec().build(DIGITS)
    assert list(reward.parameters()) == []  # so that no checkpoint holds it
    x, label = torch.rand(5, 1, 8, 8) * 2 - 1, torch.tensor([3, 1, 4, 1, 5])
    wanted = house_digits().logits((x + 1) * 127.5).log_softmax(1)[torch.arange(5), label]
    torch.testing.assert_close(reward(x, label), wanted)
    torch.testing.assert_close(reward(x, {"label": label}), wanted)
    # Beyond white a clamp would have no gradient at all.
    assert slope(reward, x + 3, label).abs().amax((1, 2, 3)).min() > 0
    with pytest.raises(RecipeError, match=r"house-classifier\.of fashion-mnist: is for grey pictures of 28 x 28"):
        HouseClassifierSpec(of="fashion-mnist").build(DIGITS)


def test_a_straight_clamp_holds_the_value_and_passes_the_gradient():
    x = torch.tensor([-3.0, 0.25, 2.0], requires_grad=True)
    assert straight(x).tolist() == [-1.0, 0.25, 1.0]
    assert torch.autograd.grad(straight(x).sum(), x)[0].tolist() == [1.0, 1.0, 1.0]


class Encoder(nn.Module):
    """A picture's embedding: the means of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.seen.append(pixels)
        return pixels.mean((2, 3))


def test_likeness_is_the_cosine_with_the_text_of_the_class_on_clips_own_pixels():
    texts = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]]), dim=1)
    net = Encoder()
    reward = Likeness(net, 14, texts)
    x = torch.rand(3, 1, 6, 9) * 2 - 1
    label = torch.tensor([1, 0, 1])
    value = reward(x, label)
    assert net.seen[0].shape == (3, 3, 14, 14)
    for i in range(3):
        seen = net.seen[0][i].mean((1, 2))
        assert float(value[i]) == pytest.approx(float(seen / seen.norm() @ texts[label[i]]), rel=1e-5)
    grey = (x[0].mean() + 1) / 2
    wanted = (grey - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(net.seen[0][0].mean((1, 2)), wanted, atol=2e-2, rtol=0)
    assert slope(reward, x, label).abs().min() > 0


def test_a_negative_text_is_taken_away_and_what_both_share_counts_k_times():
    """SRPO: h . ((1 + k) h_pos - h_neg)."""
    pos, neg = (F.normalize(torch.tensor([row]), dim=1) for row in ([1.0, 0.0, 1.0], [0.0, 2.0, 1.0]))
    net, x = Encoder(), torch.rand(3, 1, 6, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    value = Likeness(net, 14, away(pos, neg, 0.1))(x)
    for i in range(3):
        seen = F.normalize(net.seen[0][i].mean((1, 2)), dim=0)
        assert float(value[i]) == pytest.approx(float(1.1 * seen @ pos[0] - seen @ neg[0]), rel=1e-5, abs=1e-6)
    same = Likeness(net, 14, away(pos, pos, 0.1))(x)
    torch.testing.assert_close(same, 0.1 * Likeness(net, 14, pos)(x))
    told = {"architecture": "ViT-S-32", "path": "lost.pt", "prompts": ("a digit",)}
    with pytest.raises(ValueError, match="k 0: is beside a negative text, and there is none"):
        ClipSpec(**told, k=0.0)
    with pytest.raises(RecipeError, match=r"clip\.negative: 2 texts for 10 classes"):
        ClipSpec(**told, negative=("a", "b")).build(DIGITS)


def test_clip_is_a_local_file_and_has_as_many_texts_as_classes(tmp_path: Path):
    lost = str(tmp_path / "lost.pt")
    with pytest.raises(Absent, match=r"lost\.pt: no such file; CLIP weights are never downloaded"):
        ClipSpec(architecture="ViT-S-32", path=lost, prompts=("a digit",)).build(DIGITS)
    with pytest.raises(RecipeError, match=r"clip\.prompts: 2 texts for 10 classes"):
        ClipSpec(architecture="ViT-S-32", path=lost, prompts=("a", "b")).build(DIGITS)
    with pytest.raises(RecipeError, match="grey or RGB pictures"):
        ClipSpec(architecture="ViT-S-32", path=lost, prompts=("a",)).build(Site((2,), 0, {}, 0))
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"^clip: .*bad\.pt"):
        ClipSpec(architecture="ViT-S-32", path=str(tmp_path / "bad.pt"), prompts=("a",)).build(DIGITS)


def constant(x: Tensor, cond: Any) -> Tensor:
    return torch.zeros(len(x))


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (lambda x, cond: x.mean(), r"gave shape \[\] for 3 samples; it must give one number for each, shape \[3\]"),
        (lambda x, cond: x.mean(1, keepdim=True), r"gave shape \[3, 1\] for 3 samples"),
        (lambda x, cond: 0.5, "gave a float for 3 samples"),
        (lambda x, cond: x.log().sum(1), "is not finite on samples of noise"),
        (lambda x, cond: cond["label"], r"cannot judge samples of \[3, 2\]: TypeError"),
        (constant, "its gradient with respect to the samples is nothing.*method pso only compares rewards"),
        (lambda x, cond: x.round().sum(1), "its gradient with respect to the samples is nothing"),
        (lambda x, cond: x.detach().sum(1), "its gradient with respect to the samples is nothing"),
    ],
)
def test_a_bad_reward_is_told_before_training(reward: Any, told: str):
    x = torch.tensor([[0.3, -0.2], [1.4, 0.1], [-0.6, 0.8]])
    with pytest.raises(UserError, match=f"^roles.reward: {told}"):
        check_reward(reward, x, None, gradient=True)


def test_a_reward_that_is_only_compared_needs_no_gradient():
    x = torch.randn(3, 2)
    check_reward(constant, x, None, gradient=False)
    with torch.no_grad():
        check_reward(lambda x, cond: x.sum(1), x, None, gradient=True)


OWN = """
from pathlib import Path
import torch
Path(__file__).with_name("ran").touch()
class Scalar(torch.nn.Module):
    def forward(self, x, cond):
        return x.mean()
class Up:
    def __call__(self, x, cond):
        return x[:, 1]
"""


def test_a_reward_of_ones_own_runs_where_it_was_asked_for_and_is_tried_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(code, "_allowed", set())
    monkeypatch.setattr(code, "_everything", [False])
    (tmp_path / "mine.py").write_text(OWN)
    short = {"train": {"steps": 1, "batch": 8, "sample_every": 0}, "before": [], "evaluate": None, "copy": {}}

    def recipe(name: str) -> Any:
        return load(
            "toy/dmd2-ink", ["roles.reward.name=module", f"roles.reward.factory={tmp_path / 'mine.py'}:{name}"], {}, short
        )

    assert code.named(recipe("Up")) == {"roles.reward.factory": f"{tmp_path / 'mine.py'}:Up"}
    with pytest.raises(UserError, match=r"roles\.reward\.factory: .* is code that would be run"):
        Trainer(recipe("Up"), None, cpu=True)
    with pytest.raises(Absent, match="code that nobody has allowed to run"):
        ModuleSpec(factory=f"{tmp_path / 'mine.py'}:Up").build(DIGITS)
    assert not (tmp_path / "ran").exists()
    code.allow(recipe("Up"))
    trainer = Trainer(recipe("Up"), None, cpu=True)
    trainer.fit()
    assert (tmp_path / "ran").exists()
    code.allow(recipe("Scalar"))
    with pytest.raises(UserError, match=r"roles\.reward: gave shape \[\] for 3 samples"):
        Trainer(recipe("Scalar"), None, cpu=True)


def test_the_page_of_rewards_lists_every_one():
    page = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text()
    listed = set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE))
    # A network that says whether it has a gradient is one for the role `reward`.
    assert (
        listed >= {name for name, kind in REGISTRY["network"].items() if hasattr(kind, "differentiable")} >= {"control"}
    )
