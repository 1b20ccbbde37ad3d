"""Notes of libraries to their developers do not reach a terminal, ours do, and nobody who asks for them misses any."""

from __future__ import annotations

import sys
import warnings

import pytest

from fewstep.cli.quiet import quiet


def said(module: str, category: type[Warning]) -> bool:
    with warnings.catch_warnings(record=True) as seen, quiet():
        warnings.warn_explicit("old", category, f"{module}.py", 1, module=module)
    return bool(seen)


@pytest.mark.parametrize("module", ["diffusers.pipelines.x", "transformers.utils", "torch.jit._script"])
@pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning])
def test_what_is_not_the_users_to_mend_is_not_shown(
    module: str, category: type[Warning], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "warnoptions", [])
    warnings.simplefilter("always")
    assert not said(module, category)
    assert said("fewstep.export.stock", category)
    assert said(module, UserWarning)
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    assert said(module, category)
