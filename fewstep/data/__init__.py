"""Real samples and conditions. Importing this package registers every data set."""

from fewstep.data import helices as helices, images as images, toy as toy, voxels as voxels

from fewstep.data import cached as cached, encoders as encoders  # isort: skip  pictures and latents choose among them
from fewstep.data import decoded as decoded, degraded as degraded, latents as latents, pictures as pictures
from fewstep.data.base import Data as Data
