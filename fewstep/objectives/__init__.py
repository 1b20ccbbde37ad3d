"""Pure functions from which methods are composed: score differences, adversarial losses, regressions."""

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
from fewstep.objectives.frechet import (
    gaussian_frechet as gaussian_frechet,
)
from fewstep.objectives.inverse import (
    inverse_matching as inverse_matching,
)
from fewstep.objectives.regression import (
    dsm as dsm,
    moment_divergence as moment_divergence,
    mse as mse,
    per_sample as per_sample,
    pseudo_huber_element as pseudo_huber_element,
    pseudo_huber_sample as pseudo_huber_sample,
)
from fewstep.objectives.score import (
    dmd_normalizer as dmd_normalizer,
    score_difference as score_difference,
    score_weight as score_weight,
    surrogate_loss as surrogate_loss,
)
