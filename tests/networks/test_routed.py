"""Networks that are several: a row goes to the member of its class, in either form of a condition."""

from __future__ import annotations

import pytest
import torch

from fewstep.networks.parts import Site
from fewstep.networks.routed import ByClass, ByClassSpec
from fewstep.networks.specs import DiTSpec


def test_a_class_beside_a_picture_finds_its_member():
    labels = torch.tensor([4, 0, 6, 3, 1, 6])
    route, t = ByClass(6, 2), torch.ones(6)
    assert route(t, labels).tolist() == [1, 0, 1, 1, 0, 1]
    assert torch.equal(route(t, {"label": labels}), route(t, labels))
    with pytest.raises(ValueError, match="by_class: routes by class, and the condition has no label"):
        route(t, {"image": torch.zeros(6, 1, 4, 4)})
    spec = ByClassSpec(of=DiTSpec(width=8, depth=1, heads=2, image=1), members=2)
    both = spec.build(Site((1, 8, 8), 6, {}, 0, (1, 4, 4)))
    torch.manual_seed(0)
    for p in both.parameters():
        p.data.normal_(0, 0.2)
    x, cond = torch.randn(6, 1, 8, 8), {"label": labels, "image": torch.randn(6, 1, 4, 4)}
    found = both(x, 0.5 * t, cond).x0
    for i, member in enumerate(route(t, labels).tolist()):
        row = {k: v[i : i + 1] for k, v in cond.items()}
        alone = both.members[member](x[i : i + 1], 0.5 * t[:1], row).x0  # type: ignore[operator,index]
        torch.testing.assert_close(found[i : i + 1], alone)
