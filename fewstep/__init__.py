"""fewstep: few-step distillation of diffusion and flow models.

Conventions, everywhere: time grows with noise, x_t = alpha(t) x0 + sigma(t) eps; guidance scale 1 means none and
acts on the denoiser; losses are per-sample means over non-batch axes, then the batch mean; images lie in [-1, 1];
times and schedules are float32 or float64 whatever the network's dtype.

Every public name has an example in its docstring, such as `help(fewstep.load)`; they assume `import fewstep, torch`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors; they are resolved on first use, so that `import fewstep` costs no torch
    from fewstep.algebra.batch import Batch as Batch
    from fewstep.algebra.draws import Draws as Draws, fold as fold
    from fewstep.algebra.guidance import Guided as Guided, guided as guided
    from fewstep.algebra.jump import jump as jump, solve as solve
    from fewstep.algebra.noising import add_noise as add_noise
    from fewstep.algebra.prediction import Prediction as Prediction, from_raw as from_raw
    from fewstep.algebra.process import (
        EDM as EDM,
        VP as VP,
        Cosine as Cosine,
        DiscreteVP as DiscreteVP,
        Flow as Flow,
        ShiftedFlow as ShiftedFlow,
        Trig as Trig,
    )
    from fewstep.algebra.rollout import rollout as rollout
    from fewstep.algebra.sampling import Sampler as Sampler, many_step as many_step, sample as sample, seeded as seeded
    from fewstep.commands.load import load as load
    from fewstep.commands.product import Product as Product, open_product as open_product
    from fewstep.config.parts import RecipeError as RecipeError, UserError as UserError, part as part
    from fewstep.methods.method import Losses as Losses, Needs as Needs, Turn as Turn
    from fewstep.networks.denoiser import Denoiser as Denoiser, Rescheduled as Rescheduled
    from fewstep.networks.diffusers import load_denoiser as load_denoiser
    from fewstep.networks.roles import Roles as Roles
    from fewstep.objectives.adversarial import (
        hinge_discriminator as hinge_discriminator,
        hinge_generator as hinge_generator,
        logistic_discriminator as logistic_discriminator,
        logistic_generator as logistic_generator,
        r1_exact as r1_exact,
        r1_finite as r1_finite,
    )
    from fewstep.objectives.divergence import (
        divergence_weight as divergence_weight,
        expanded_divergence as expanded_divergence,
    )
    from fewstep.objectives.frechet import gaussian_frechet as gaussian_frechet
    from fewstep.objectives.inverse import inverse_matching as inverse_matching
    from fewstep.objectives.regression import (
        dsm as dsm,
        moment_divergence as moment_divergence,
        mse as mse,
        per_sample as per_sample,
        pseudo_huber_element as pseudo_huber_element,
        pseudo_huber_sample as pseudo_huber_sample,
        x0_weight as x0_weight,
    )
    from fewstep.objectives.score import (
        dmd_normalizer as dmd_normalizer,
        score_difference as score_difference,
        score_weight as score_weight,
        surrogate_loss as surrogate_loss,
    )
    from fewstep.objectives.trajectory import chord_x0 as chord_x0, tangent as tangent, two_leg as two_leg
    from fewstep.recipe.schema import Recipe as Recipe
    from fewstep.train.trainer import Hooks as Hooks, Trainer as Trainer

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
    "objectives.frechet": "gaussian_frechet",
    "objectives.inverse": "inverse_matching",
    "objectives.regression": "dsm moment_divergence mse per_sample pseudo_huber_element pseudo_huber_sample x0_weight",
    "objectives.score": "dmd_normalizer score_difference score_weight surrogate_loss",
    "objectives.trajectory": "chord_x0 tangent two_leg",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(import_module(f"fewstep.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
