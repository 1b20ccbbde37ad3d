"""Networks and denoisers. `specs` and `teachers` register the ones a recipe can name."""

from fewstep.networks.analytic import Mixture as Mixture
from fewstep.networks.denoiser import Denoiser as Denoiser, Rescheduled as Rescheduled
from fewstep.networks.heads import Discriminator as Discriminator
