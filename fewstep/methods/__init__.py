"""One paper, one file. Importing this package registers them all."""

from fewstep.methods import denoise as denoise
from fewstep.methods import dmd2 as dmd2
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
