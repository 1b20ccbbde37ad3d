"""No student is drawn with a number of steps it was not trained for, unless --any says so: every shipped recipe."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from fewstep.config import UserError
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load
from fewstep.train.product import product_of

KINDS = {"renoise", "map", "gamma"}


def test_every_shipped_student_refuses_other_numbers_of_steps() -> None:
    seen = set()
    for name in shipped():
        recipe = load(name)
        product = product_of(recipe, nn.Identity(), SimpleNamespace(shape=(2,), classes=0), name)
        if product.sampler.kind == "ode":
            assert product.trained is None, name
            assert len(product.with_steps(23).sampler.steps) == 23
            continue
        seen.add(product.sampler.kind)
        assert product.trained, name
        for n in product.trained:
            allowed = product.with_steps(n)
            assert len(allowed.sampler.steps) == n
            assert allowed.sampler.kind == product.sampler.kind
        with pytest.raises(UserError) as caught:
            product.with_steps(23)
        wanted = ", ".join(map(str, product.trained))
        assert str(caught.value).startswith(f"--steps 23: this student was trained for {wanted}; add --any"), name
        other = product.with_steps(23, any_steps=True).sampler
        assert len(other.steps) == 23
        assert (other.kind, other.eta, other.guidance) == (
            product.sampler.kind,
            product.sampler.eta,
            product.sampler.guidance,
        )
    assert seen == KINDS
