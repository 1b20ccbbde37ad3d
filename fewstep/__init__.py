"""fewstep: few-step distillation of diffusion and flow models.

Conventions, everywhere: time grows with noise, x_t = alpha(t) x0 + sigma(t) eps; guidance scale 1 means none and
acts on the denoiser; losses are per-sample means over non-batch axes, then the batch mean; images lie in [-1, 1];
times and schedules are float32 or float64 whatever the network's dtype.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Resolved on first use, so that `import fewstep` costs no torch.
_HOMES = {
    "Prediction": "algebra.prediction",
    "add_noise": "algebra.noising",
    "jump": "algebra.jump",
    "guided": "algebra.guidance",
    "rollout": "algebra.rollout",
    "sample": "algebra.sampling",
    "Sampler": "algebra.sampling",
    "Draws": "algebra.draws",
    "Roles": "networks.roles",
    "Recipe": "recipe.schema",
    "Trainer": "train.trainer",
    "Denoiser": "networks.denoiser",
    "Rescheduled": "networks.denoiser",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(import_module(f"fewstep.{_HOMES[name]}"), name)
