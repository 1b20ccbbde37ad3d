"""Rows of conditions: which are replaced and which stay."""

from __future__ import annotations

import torch

from fewstep.algebra.condition import differs, replaced, seen


def test_replaced_takes_the_other_condition_where_the_mask_is_true():
    where = torch.tensor([True, False])
    assert replaced(torch.tensor([1, 2]), where, torch.tensor([9, 9])).tolist() == [9, 2]
    text, other = torch.arange(12.0).reshape(2, 3, 2), -torch.ones(2, 3, 2)
    found = replaced({"text": text, "label": torch.tensor([1, 2])}, where, {"text": other, "label": torch.tensor([7, 8])})
    assert torch.equal(found["text"], torch.stack((other[0], text[1])))
    assert found["label"].tolist() == [7, 2]
    assert differs(found, {"text": text, "label": torch.tensor([1, 2])}).tolist() == [True, False]


def test_a_label_tensor_is_shown_or_ignored_whole():
    labels = torch.tensor([3, 1])
    assert seen(labels, ("image",)) is labels
    assert seen(labels, ("label",)) is None
    assert seen({"label": labels}, ("label",)) is None
    assert seen(None, ("label",)) is None
