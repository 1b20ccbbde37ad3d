"""One paper, one file. Importing this package registers them all."""

from fewstep.methods import denoise as denoise
from fewstep.methods import dmd2 as dmd2
from fewstep.methods.base import (
    Batch as Batch,
    Losses as Losses,
    Method as Method,
    Needs as Needs,
    Turn as Turn,
)
