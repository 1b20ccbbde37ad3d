"""fewstep: few-step distillation of diffusion and flow models.

Conventions, everywhere: time grows with noise, x_t = alpha(t) x0 + sigma(t) eps; guidance scale 1 means none and
acts on the denoiser; losses are per-sample means over non-batch axes, then the batch mean; images lie in [-1, 1];
times and schedules are float32 or float64 whatever the network's dtype.

Every public name has an example in its docstring, such as `help(fewstep.load)`; they assume `import fewstep, torch`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Resolved on first use, so that `import fewstep` costs no torch.
_NAMES = {
    "commands.load": "load",
    "commands.product": "Product open_product",
    "config.parts": "RecipeError UserError part",
    "recipe.schema": "Recipe",
    "train.trainer": "Hooks Trainer",
    "networks.diffusers": "load_denoiser",
    "networks.denoiser": "Denoiser Rescheduled",
    "networks.roles": "Roles",
    "methods.method": "Losses Needs Turn",
    "algebra.batch": "Batch",
    "algebra.draws": "Draws fold",
    "algebra.guidance": "Guided guided",
    "algebra.jump": "jump solve",
    "algebra.noising": "add_noise",
    "algebra.prediction": "Prediction from_raw",
    "algebra.process": "EDM VP Cosine DiscreteVP Flow ShiftedFlow Trig",
    "algebra.rollout": "rollout",
    "algebra.sampling": "Sampler many_step sample seeded",
    "objectives.adversarial": "hinge_discriminator hinge_generator logistic_discriminator logistic_generator "
    "r1_exact r1_finite",
    "objectives.divergence": "divergence_weight expanded_divergence",
    "objectives.inverse": "inverse_matching",
    "objectives.regression": "dsm moment_divergence mse per_sample pseudo_huber_element pseudo_huber_sample x0_weight",
    "objectives.score": "dmd_normalizer score_difference score_weight toward",
    "objectives.trajectory": "chord_x0 tangent two_leg",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(import_module(f"fewstep.{_HOMES[name]}"), name)
