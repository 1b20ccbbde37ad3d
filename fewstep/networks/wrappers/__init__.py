"""diffusers classes as fewstep networks, one short file each; importing this registers them."""

from fewstep.networks.wrappers.base import WRAPPERS as WRAPPERS, Wrapper as Wrapper, wraps as wraps
from fewstep.networks.wrappers.declared import Declared as Declared
from fewstep.networks.wrappers.dit import DiT as DiT
from fewstep.networks.wrappers.families import (
    Chroma as Chroma,
    Flux2 as Flux2,
    QwenImage as QwenImage,
    Wan as Wan,
    ZImage as ZImage,
)
from fewstep.networks.wrappers.flux import Flux as Flux
from fewstep.networks.wrappers.generic import Generic as Generic
from fewstep.networks.wrappers.pixart import PixArt as PixArt
from fewstep.networks.wrappers.sana import Sana as Sana
from fewstep.networks.wrappers.sd3 import SD3 as SD3
from fewstep.networks.wrappers.unet_condition import UNetCondition as UNetCondition
