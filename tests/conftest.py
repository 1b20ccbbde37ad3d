"""What several modules of tests share."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Read when torch and numpy are first imported, here and in every process of a test. One thread: sums have one order,
# workers do not spin against each other for the cores, and a fork copies a whole process.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")


@cache
def _shares(file: Path) -> bool:
    return 'scope="module"' in file.read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadscope`: files with a fixture of their own stay on one worker, largest first; then other tests singly.

    xdist's loadgroup would say it, but sets a field that pytest has no more (9.2).
    """
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if _shares(config.rootpath / file) else nodeid

    return ByFixture(config, log)
