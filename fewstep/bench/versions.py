"""Versions of packages for pip: those of a tested environment, the lowest allowed, those to carry where no network is.

`python -m fewstep.bench.versions tested --out constraints.txt`, `python -m fewstep.bench.versions lowest`,
`python -m fewstep.bench.versions carried --have numpy scipy`
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fewstep.files import atomic_path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = re.compile(r"nvidia-.*|cuda-.*|triton|fewstep|pip|setuptools|wheel")
"""What torch pins itself for the machine at hand, and what installs."""
TORCH = ("torch", "torchvision")
"""What a machine with a GPU has of its own, in the build for its driver."""
HEAD = "# Tested on Python {python}; for `pip install -e . -c constraints.txt`, should a newer version break something.\n"


def requirements(extras: Iterable[str] = ()) -> list[Requirement]:
    """What pyproject.toml asks for, with the packages of `extras`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(line for e in extras for line in project["optional-dependencies"][e])]
    return [Requirement(line) for line in named]


def lowest(extras: Iterable[str] = ()) -> list[str]:
    """`name==version` of every lower bound; a package without one is left to the others."""
    pins = {}
    for r in requirements(extras):
        bounds = [s.version for s in r.specifier if s.operator == ">="]
        if bounds:
            pins[canonicalize_name(r.name)] = bounds[0]
    return [f"{name}=={at}" for name, at in sorted(pins.items())]


def tested() -> list[str]:
    """`name==version` of every package in this environment, without those that are LEFT_OUT."""
    named = {canonicalize_name(d.metadata["Name"]) for d in distributions() if d.metadata["Name"]}
    return [f"{name}=={version(name).partition('+')[0]}" for name in sorted(named) if not LEFT_OUT.fullmatch(name)]


def carried(have: Iterable[str] = ()) -> list[str]:
    """`name==version` of what fewstep and its tests for a GPU need, and what that needs, and of what builds fewstep.

    have: packages that the machine has, besides those of TORCH and LEFT_OUT; what only they need is left out with them.
    """
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    waiting = [*requirements(), *(r for r in requirements(("test",)) if r.name == "pytest")]
    known = {canonicalize_name(name) for name in (*have, *TORCH)}
    found = {}
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name not in known and not LEFT_OUT.fullmatch(name):
            known.add(name)
            found[name] = version(name).partition("+")[0]
            needed = map(Requirement, requires(name) or ())
            waiting += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    found |= {canonicalize_name(r.name): version(r.name) for r in map(Requirement, build)}
    return [f"{name}=={at}" for name, at in sorted(found.items())]


def main(argv: Sequence[str] | None = None) -> None:
    """Print or write constraints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("tested", "lowest", "carried"))
    parser.add_argument("--have", nargs="*", default=[], help="for carried: packages that the machine has")
    parser.add_argument("--out", type=Path, help="file to write; printed when left out")
    args = parser.parse_args(argv)
    lines = {"tested": tested, "lowest": lowest, "carried": lambda: carried(args.have)}[args.which]()
    text = "\n".join(lines) + "\n"
    if args.which == "tested":
        import platform

        text = HEAD.format(python=platform.python_version()) + text
    if args.out is None:
        print(text, end="")
    else:
        with atomic_path(args.out) as aside:
            aside.write_text(text)


if __name__ == "__main__":
    main()
