"""The share of captions found again: exact cases by construction, a model that must learn, files, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fewstep.eval.features.retrieval import (
    Contrastive,
    Retrieval,
    augmented,
    contrastive_loss,
    retrieval_accuracy,
    train,
)


def test_own_caption_first_is_one_last_is_zero_and_a_tie_is_a_miss():
    scores = 2 * torch.eye(5) + torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    own = torch.arange(5)
    assert retrieval_accuracy(scores, own, 5).value == 1
    assert retrieval_accuracy(-scores, own, 2).value == 0
    assert retrieval_accuracy(torch.ones(5, 5), own, 2).value == 0
    found = retrieval_accuracy(scores[[0, 1, 2, 3]], torch.tensor([0, 1, 2, 4]), 5)
    assert found.value == 0.75
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_a_caption_outranked_by_r_of_m_is_found_as_often_as_none_of_them_is_drawn():
    m, r, among, n = 21, 4, 6, 20_000
    scores = torch.zeros(1, m)
    scores[0, 7] = 1.0
    scores[0, [0, 6, 8, 20]] = 2.0
    found = retrieval_accuracy(scores.expand(n, m), torch.full((n,), 7), among, seed=3)
    exact = math.comb(m - 1 - r, among - 1) / math.comb(m - 1, among - 1)
    assert abs(found.value - exact) < 4 * math.sqrt(exact * (1 - exact) / n)
    assert retrieval_accuracy(scores, torch.tensor([7]), m).value == 0


def test_what_makes_no_sense_is_refused():
    scores, own = torch.rand(3, 4), torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match=r"shapes \(3, 4\) and \(2,\) do not match"):
        retrieval_accuracy(scores, own[:2], 2)
    with pytest.raises(ValueError, match=r"among must lie in 2\.\.4, the number of captions, not 5"):
        retrieval_accuracy(scores, own, 5)
    with pytest.raises(ValueError, match=r"own: expected 0\.\.3, got 0\.\.4"):
        retrieval_accuracy(scores, own + torch.tensor([0, 0, 1]), 3)
    with pytest.raises(ValueError, match="not finite"):
        retrieval_accuracy(scores / 0.0, own, 3)
    with pytest.raises(ValueError, match="multiple of 8, not 12"):
        Contrastive(12, 4)
    with pytest.raises(ValueError, match="2 and 3 rows"):
        train(torch.zeros(2, 3, 8, 8), torch.zeros(3, 5))


def test_the_loss_of_orthogonal_pairs_has_its_closed_form():
    unit, scale = torch.eye(3, 6), torch.tensor(2.0)
    exact = math.log(math.exp(2.0) + 2) - 2.0
    assert contrastive_loss(unit, unit, scale).item() == pytest.approx(exact, rel=1e-6)


def test_augmentation_is_the_seed_s_and_stays_in_range():
    images = 255 * torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    first, again, other = (augmented(images, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert first.shape == images.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= first.min() < first.max() <= 255


def test_a_model_of_plain_colours_learns_them_and_is_read_back(tmp_path: Path):
    g = torch.Generator().manual_seed(0)
    colours = torch.tensor([[255.0, 0, 0], [0, 160, 0], [0, 0, 255], [250, 250, 0], [40, 40, 40]])
    images = colours[:, :, None, None].expand(5, 3, 8, 8)
    features = torch.randn(5, 6, generator=g)
    network = train(images, features, steps=60, batch=5, width=8)
    made = Retrieval(network, ("red", "green", "blue", "yellow", "black"), features)
    own = torch.tensor([4, 0, 0, 2, 1, 3, 2])
    assert made.accuracy(images[own], own, 5).value == 1
    assert made.accuracy(images[own], (own + 1) % 5, 5).value == 0
    made.save(tmp_path)
    again = Retrieval.load(tmp_path)
    assert again.captions == made.captions
    assert torch.equal(again.network.images(images), network.images(images))
    assert torch.equal(again.network.texts(again.features), network.texts(features))
    with pytest.raises(FileNotFoundError, match=r"no retrieval model; train it with"):
        Retrieval.load(tmp_path / "none")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="not a retrieval model"):
        Retrieval.load(tmp_path)
