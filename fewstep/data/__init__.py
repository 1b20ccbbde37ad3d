"""Real samples and conditions. Importing this package registers every data set."""

from fewstep.data import images as images
from fewstep.data import toy as toy
from fewstep.data.base import Data as Data
