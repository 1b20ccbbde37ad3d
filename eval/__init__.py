if __name__ != "fewstep.eval":
    raise ImportError("import fewstep.eval, not eval: this folder is mapped into the fewstep package")

from importlib import import_module
from typing import Any

# Resolved on first use, so that `import fewstep.eval` costs neither torch nor scikit-learn.
_HOMES = {
    "FeatureStatistics": "metrics.statistics",
    "Estimate": "metrics.estimate",
    "frechet_distance": "metrics.frechet",
    "paired_difference": "metrics.frechet",
    "FeatureExtractor": "features.base",
    "extract": "features.base",
    "random_conv": "features.base",
    "HouseDigits": "features.house",
    "HouseFashion": "features.house",
    "house_digits": "features.house",
    "house_fashion": "features.house",
    "digits_reference": "protocol.reference",
    "fashion_reference": "protocol.reference",
    "Reference": "protocol.reference",
    "energy_distance": "metrics.energy",
    "class_accuracy": "metrics.measures",
    "within_class_diversity": "metrics.measures",
    "kernel_distance": "metrics.measures",
    "manifold": "metrics.measures",
    "cmmd": "metrics.measures",
    "classifier_score": "metrics.measures",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep.eval' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
