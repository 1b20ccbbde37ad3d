"""Conditions batch, cut, move and null alike, whether they are labels or a mapping; a mistake names the key."""

from __future__ import annotations

import pytest
import torch

from fewstep.algebra.condition import checked, joined, moved, nulled, rows, zeros_like

B, N, D = 3, 5, 4


def text(b: int = B, n: int = N, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "text": torch.randn(b, n, D, generator=g),
        "mask": (torch.arange(n) < n - torch.arange(b)[:, None]).float(),
        "pooled": torch.randn(b, 7, generator=g),
        "time_ids": torch.arange(6.0).expand(b, 6),
    }


def test_joined_and_cut_is_the_same_again():
    a, b = text(), text(2, seed=1)
    both = joined(a, b)
    for key in a:
        assert torch.equal(rows(both, slice(None, B))[key], a[key])
        assert torch.equal(rows(both, slice(B, None))[key], b[key])
    labels = torch.tensor([4, 0, 9])
    assert joined(labels, labels + 1).tolist() == [4, 0, 9, 5, 1, 10]
    assert rows(labels, labels > 3).tolist() == [4, 9]
    assert rows(None, slice(2)) is None


def test_different_numbers_of_tokens_are_padded_only_with_a_mask():
    a, b = text(), text(2, N + 2, seed=1)
    both = joined(a, b)
    assert both["text"].shape == (B + 2, N + 2, D)
    assert torch.equal(both["text"][:B, :N], a["text"])
    assert not both["text"][:B, N:].any()
    assert not both["mask"][:B, N:].any()
    assert torch.equal(both["mask"][B:], b["mask"])
    del a["mask"], b["mask"]
    with pytest.raises(ValueError, match=r"^cond\['text'\]: rows of \[5, 4\] and \[7, 4\] differ; give both a mask"):
        joined(a, b)


def test_conditions_of_different_kinds_do_not_mix():
    with pytest.raises(ValueError, match="conditions with labels and with the keys text, mask, pooled, time_ids do not"):
        joined(torch.tensor([1]), text())
    with pytest.raises(ValueError, match="do not go into one batch"):
        joined(text(), {"text": text()["text"]})


def test_null_takes_away_text_and_keeps_sizes():
    cond, empty = text(), text(1, N + 3, seed=4)
    null = nulled(cond, {k: empty[k] for k in ("text", "mask", "pooled")})
    for i in range(B):
        assert torch.equal(null["text"][i], empty["text"][0, :N])
        assert torch.equal(null["mask"][i], empty["mask"][0, :N])
        assert torch.equal(null["pooled"][i], empty["pooled"][0])
    assert torch.equal(null["time_ids"], cond["time_ids"])
    short = text(1, N - 2, seed=5)
    assert not nulled(cond, {"text": short["text"], "mask": short["mask"]})["mask"][:, N - 2 :].any()
    assert nulled(torch.tensor([1, 2]), 10).tolist() == [10, 10]
    zero = nulled(cond, zeros_like(cond))
    assert not zero["text"].any()
    assert not zero["pooled"].any()
    assert torch.equal(zero["mask"], cond["mask"])
    with pytest.raises(ValueError, match="the null condition has 'label', which the condition with the keys"):
        nulled(cond, {"label": torch.tensor([1])})
    with pytest.raises(ValueError, match=r"null condition 'pooled': a row of \[3\] for \[7\]"):
        nulled(cond, {"pooled": torch.zeros(1, 3)})


def test_moving_changes_the_dtype_of_floats_alone():
    cond = moved(text() | {"label": torch.tensor([1, 2, 3])}, dtype=torch.float64)
    assert {k: v.dtype for k, v in cond.items()} == {
        "text": torch.float64, "mask": torch.float64, "pooled": torch.float64, "time_ids": torch.float64,
        "label": torch.int64,
    }  # fmt: skip
    assert moved(torch.tensor([3]), dtype=torch.bfloat16).dtype == torch.int64
    assert moved(None, "cpu") is None


def test_a_network_says_what_it_lacks():
    with pytest.raises(ValueError, match=r"^Net: the condition lacks cond\['pooled'\] \(b, d\) pooled .*; it has text"):
        checked({"text": torch.zeros(1, 2, 3)}, ("text", "pooled"), (), "Net")
    with pytest.raises(ValueError, match=r"^Net: does not take cond\['label'\]; it takes text"):
        checked({"text": torch.zeros(1), "label": torch.zeros(1)}, ("text",), (), "Net")
    with pytest.raises(ValueError, match="it has nothing"):
        checked(None, ("text",), (), "Net")
    assert list(checked(torch.tensor([1]), ("label",), (), "Net")) == ["label"]


def test_two_texts_are_padded_each_by_its_own_mask():
    def texts(b: int, n: int, m: int) -> dict[str, torch.Tensor]:
        return {
            "text": torch.randn(b, n, 4), "mask": torch.ones(b, n),
            "text2": torch.randn(b, m, 3), "mask2": torch.ones(b, m),
        }  # fmt: skip

    a, b = texts(2, 5, 2), texts(3, 4, 6)
    both = joined(a, b)
    assert {k: tuple(v.shape[:2]) for k, v in both.items()} == {
        "text": (5, 5),
        "mask": (5, 5),
        "text2": (5, 6),
        "mask2": (5, 6),
    }
    assert both["mask"].sum(1).tolist() == [5, 5, 4, 4, 4]
    assert both["mask2"].sum(1).tolist() == [2, 2, 6, 6, 6]
    assert torch.equal(both["text2"][:2, :2], a["text2"])
    assert not both["text2"][:2, 2:].any()
    null = nulled(a, {k: v[:1] for k, v in texts(1, 3, 1).items()})
    assert null["mask"].sum(1).tolist() == [3, 3]
    assert null["mask2"].sum(1).tolist() == [1, 1]
