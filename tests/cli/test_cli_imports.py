"""What a command may import: help is quick, and the package itself costs nothing."""

from __future__ import annotations

import pytest
from tiny_runs import python

HEAVY = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "numpy",
    "sklearn",
    "matplotlib",
    "PIL",
)

WATCH = """
import runpy, sys, io, contextlib
sys.argv = ["fewstep", *sys.argv[1:]]
try:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_module("fewstep", run_name="__main__")
except SystemExit as left:
    assert not left.code, left.code
print(out.getvalue())
print("LOADED", *sorted({m.partition(".")[0] for m in sys.modules}))
"""


def loaded(code: str, *arguments: str) -> tuple[str, set[str]]:
    text, _, modules = python(code, *arguments).stdout.rpartition("LOADED")
    return text, set(modules.split())


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["recipes", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]):
    text, modules = loaded(WATCH, *arguments)
    assert "Usage" in text
    assert "fewstep" in modules
    assert modules.isdisjoint(HEAVY)


def test_the_package_imports_neither_diffusers_nor_torchvision():
    code = (
        "import sys, fewstep\n"
        "first = set(sys.modules)\n"
        "fewstep.add_noise, fewstep.Sampler, fewstep.Denoiser, fewstep.Recipe\n"
        "assert 'torch' not in first and 'torch' in sys.modules\n"
        "print('LOADED', *{m.partition('.')[0] for m in sys.modules})"
    )
    _, modules = loaded(code)
    assert modules.isdisjoint({"diffusers", "torchvision", "transformers", "peft"})
    unknown = python(
        "import fewstep\ntry:\n    fewstep.nothing\nexcept AttributeError as e:\n    print(e)"
    ).stdout
    assert unknown.strip() == "module 'fewstep' has no attribute 'nothing'"


def test_recipes_are_listed_and_shown():
    text = python(WATCH, "recipes", "ls").stdout
    for name in ("digits-dmd2", "digits-dmd2-4step", "digits-teacher", "toy/dmd2"):
        assert name in text
