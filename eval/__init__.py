if __name__ != "fewstep.eval":
    raise ImportError("import fewstep.eval, not eval: this folder is mapped into the fewstep package")

from importlib import import_module
from typing import Any

# Resolved on first use, so that `import fewstep.eval` costs neither torch nor scikit-learn.
_HOMES = {
    "FeatureStatistics": "statistics",
    "FrechetResult": "frechet",
    "frechet_distance": "frechet",
    "paired_difference": "frechet",
    "FeatureExtractor": "features",
    "extract": "features",
    "random_conv": "features",
    "HouseDigits": "house",
    "HouseFashion": "house",
    "house_digits": "house",
    "house_fashion": "house",
    "digits_reference": "reference",
    "fashion_reference": "reference",
    "Reference": "reference",
    "energy_distance": "toy",
    "class_accuracy": "metrics",
    "within_class_diversity": "metrics",
    "kernel_distance": "metrics",
    "manifold": "metrics",
    "cmmd": "metrics",
    "classifier_score": "metrics",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep.eval' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
