"""Published pickled statistics to npz, without running what a pickle may carry.

``python -m fewstep.eval.tools.convert img512.pkl img512-dinov2.npz --entry fd_dinov2``
"""

from __future__ import annotations

import argparse
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.files import file_sha256

# All that numpy needs to rebuild a plain array, under the module names of numpy 1 and 2.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        if name in ("_reconstruct", "scalar"):
            return getattr(np._core.multiarray, name)
        return getattr(np, name)


def read_pickled_statistics(path: str | Path, entry: str | None = None) -> FeatureStatistics:
    """Moments from a pickle of dicts and arrays: ``{mu, sigma}``, or EDM2's ``{fid: {mu, sigma},
    fd_dinov2: ...}``.

    Nothing but dicts, numbers, strings and numpy arrays is rebuilt.

    Raises:
        ValueError: anything else inside, a truncated file, or another structure (its keys are named).
    """
    source = Path(path)
    try:
        content = _ArraysOnly(io.BytesIO(source.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError) as error:
        raise ValueError(f"{source}: refused, {error or 'truncated'}") from None
    if isinstance(content, dict) and "mu" not in content:
        if entry is None and len(content) == 1:
            entry = next(iter(content))
        if entry not in content:
            raise ValueError(f"{source}: choose an entry of {sorted(map(str, content))}, got {entry!r}")
        content = content[entry]
    if not isinstance(content, dict) or not {"mu", "sigma"} <= set(content):
        raise ValueError(f"{source}: expected mu and sigma inside, found {type(content).__name__}")
    provenance = {"converted_from": source.name, "source_sha256": file_sha256(source), "entry": entry}
    try:
        return FeatureStatistics.from_moments(content["mu"], content["sigma"], provenance=provenance)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from None


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.eval.tools.convert", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--entry", help="which metric's moments, for files that hold several")
    options = parser.parse_args(arguments)
    print(read_pickled_statistics(options.source, options.entry).save(options.target))


if __name__ == "__main__":
    main()
