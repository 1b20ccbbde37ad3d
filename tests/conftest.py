"""What several modules of tests share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch: sums in one order, and workers that do not fight over cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CHEAP = {"one_thread"}
"""Fixtures of a module that any worker may make again."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` tests that share a module's fixture stay on one worker; all others go where one is free."""
    for item in items:
        made = getattr(item, "_fixtureinfo", None)
        named = made.name2fixturedefs if made is not None else {}
        if any(defs[-1].scope == "module" for name, defs in named.items() if name not in CHEAP):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
