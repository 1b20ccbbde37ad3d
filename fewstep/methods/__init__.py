"""One paper, one file. Importing this package registers them all."""

from fewstep.methods import class_ratio as class_ratio
from fewstep.methods import decoupled_dmd as decoupled_dmd
from fewstep.methods import denoise as denoise
from fewstep.methods import dmd as dmd
from fewstep.methods import dmd2 as dmd2
from fewstep.methods import emd as emd
from fewstep.methods import f_distill as f_distill
from fewstep.methods import gdd as gdd
from fewstep.methods import ladd as ladd
from fewstep.methods import phased_dmd as phased_dmd
from fewstep.methods import sid as sid
from fewstep.methods import track as track
from fewstep.methods import uni_instruct as uni_instruct
from fewstep.methods import vsd as vsd
from fewstep.methods.base import (
    Batch as Batch,
)
from fewstep.methods.base import (
    Losses as Losses,
)
from fewstep.methods.base import (
    Method as Method,
)
from fewstep.methods.base import (
    Needs as Needs,
)
from fewstep.methods.base import (
    Turn as Turn,
)

# Last, because it takes any method that is registered by then.
from fewstep.methods import joint as joint  # isort: skip
