"""Pure functions from which methods are composed: score differences, adversarial losses, regressions."""

from fewstep.objectives.adversarial import (
    hinge_discriminator as hinge_discriminator,
)
from fewstep.objectives.adversarial import (
    hinge_generator as hinge_generator,
)
from fewstep.objectives.adversarial import (
    logistic_discriminator as logistic_discriminator,
)
from fewstep.objectives.adversarial import (
    logistic_generator as logistic_generator,
)
from fewstep.objectives.adversarial import (
    r1_exact as r1_exact,
)
from fewstep.objectives.adversarial import (
    r1_finite as r1_finite,
)
from fewstep.objectives.divergence import (
    divergence_weight as divergence_weight,
)
from fewstep.objectives.divergence import (
    expanded_divergence as expanded_divergence,
)
from fewstep.objectives.inverse import (
    inverse_matching as inverse_matching,
)
from fewstep.objectives.regression import (
    dsm as dsm,
)
from fewstep.objectives.regression import (
    moment_divergence as moment_divergence,
)
from fewstep.objectives.regression import (
    mse as mse,
)
from fewstep.objectives.regression import (
    per_sample as per_sample,
)
from fewstep.objectives.regression import (
    pseudo_huber_element as pseudo_huber_element,
)
from fewstep.objectives.regression import (
    pseudo_huber_sample as pseudo_huber_sample,
)
from fewstep.objectives.score import (
    dmd_normalizer as dmd_normalizer,
)
from fewstep.objectives.score import (
    score_difference as score_difference,
)
from fewstep.objectives.score import (
    score_weight as score_weight,
)
from fewstep.objectives.score import (
    toward as toward,
)
