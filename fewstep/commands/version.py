"""`fewstep --version`: what runs here, from the packages' own notes; none is imported."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from fewstep import __version__
from fewstep.files import commit

BESIDE = ("torch", "diffusers")


def told() -> str:
    """A line each for fewstep with its commit, the packages that its numbers depend on, and Python."""
    lines = [f"fewstep {__version__} (commit {commit()[:12]})"]
    for name in BESIDE:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join([*lines, f"python {platform.python_version()}"])
