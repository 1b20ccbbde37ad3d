"""The mark of a base: the same in half precision and with adapters inside, another for other weights."""

from __future__ import annotations

import json

import torch
from torch import nn

from fewstep.networks.base_mark import COUNT, differs, mark_of, written


def net(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(40)))


def test_a_mark_is_that_of_its_weights_whatever_they_are_saved_as():
    told = json.loads(written(net()))
    assert len(told) == COUNT
    assert differs(net(), told) == ""
    for dtype in (torch.bfloat16, torch.float16):
        assert differs(net().to(dtype), told) == ""
        assert differs(net(), mark_of(net().to(dtype))) == ""
    assert differs(net(), None) == differs(net(), {}) == differs(net(), {"0.weight": "a"}) == ""


def test_other_weights_and_other_layers_are_named():
    told = mark_of(net())
    assert "of 64 weights that were looked at are others, such as " in differs(net(1), told)
    assert differs(net()[:20], told).startswith("it was made on a network with ")  # type: ignore[index]
    changed = net()
    with torch.no_grad():
        changed[3].weight += 1.0  # type: ignore[index,union-attr,operator]
    assert differs(changed, told) == ""  # one layer of forty is no other base
