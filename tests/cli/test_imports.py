"""What a command may import: help and listings are quick, a check reads no library that its recipe does not name."""

from __future__ import annotations

import json

import pytest
from tiny_runs import python

HEAVY = {
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "numpy",
    "sklearn",
    "matplotlib",
    "peft",
    "PIL",
}
LIGHT = (
    "import fewstep",
    "--help",
    "run --help",
    "recipes --help",
    "recipes ls",
    "methods ls",
    "eval",  # says what it lacks
)
"""Steps of one interpreter, so that each has imported what those before it have."""
WITH_TORCH = ("add_noise Sampler Denoiser Recipe", "recipes check toy/dmd2", "recipes check digits-dmd2")
WATCH = """
import contextlib, io, json, runpy, sys
for step in json.loads(sys.argv[1]):
    sys.argv = ["fewstep", *step.split()]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            if step == "import fewstep":
                import fewstep
            elif step.startswith("add_noise"):
                print(*[getattr(fewstep, name) for name in step.split()])
            else:
                runpy.run_module("fewstep", run_name="__main__")
        except SystemExit as left:
            assert (left.code or 0) == (2 if step == "eval" else 0), (step, left.code, out.getvalue())
    modules = sorted({m.partition(".")[0] for m in sys.modules})
    print(json.dumps([step, out.getvalue(), modules]))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, tuple[str, set[str]]]:
    """What each step printed, and the packages that were loaded after it."""
    lines = python(WATCH, json.dumps([*LIGHT, *WITH_TORCH])).stdout.splitlines()
    return {step: (text, set(modules)) for step, text, modules in map(json.loads, lines)}


@pytest.mark.parametrize("step", LIGHT)
def test_help_and_listings_import_nothing_heavy(seen: dict[str, tuple[str, set[str]]], step: str):
    text, modules = seen[step]
    assert "fewstep" in modules
    assert modules.isdisjoint(HEAVY)
    assert ("Usage" in text) == ("--help" in step)


@pytest.mark.parametrize("step", WITH_TORCH)
def test_no_diffusers_where_its_facts_are_known(seen: dict[str, tuple[str, set[str]]], step: str):
    text, modules = seen[step]
    assert text
    assert "torch" in modules
    assert modules.isdisjoint({"diffusers", "torchvision", "transformers", "accelerate", "peft"})


def test_recipes_and_methods_are_listed(seen: dict[str, tuple[str, set[str]]]):
    for name in ("digits-dmd2", "digits-dmd2-4step", "digits-teacher", "toy/dmd2"):
        assert name in seen["recipes ls"][0]
    for name in ("dmd2", "meanflow", "multi_student"):
        assert name in seen["methods ls"][0]
    assert "schedule: training and evaluation agree" in seen["recipes check toy/dmd2"][0]
    assert "and CMStochasticIterativeScheduler agree" in seen["recipes check digits-dmd2"][0]


def test_the_package_names_what_it_lacks():
    import fewstep

    with pytest.raises(AttributeError, match=r"^module 'fewstep' has no attribute 'nothing'$"):
        _ = fewstep.nothing
