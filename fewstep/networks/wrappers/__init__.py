"""diffusers classes as fewstep networks, a table of entries and the few that are none; importing this registers them."""

from fewstep.networks.wrappers.base import WRAPPERS as WRAPPERS, Wrapper as Wrapper, wraps as wraps
from fewstep.networks.wrappers.declared import Declared as Declared
from fewstep.networks.wrappers.dit import DiT as DiT
from fewstep.networks.wrappers.families import (
    AuraFlow as AuraFlow,
    Chroma as Chroma,
    Flux2 as Flux2,
    HunyuanVideo as HunyuanVideo,
    Krea2 as Krea2,
    Lumina2 as Lumina2,
    OvisImage as OvisImage,
    QwenImage as QwenImage,
    Wan as Wan,
    ZImage as ZImage,
)
from fewstep.networks.wrappers.older import (
    SD3 as SD3,
    Flux as Flux,
    PixArt as PixArt,
    Sana as Sana,
    SanaVideo as SanaVideo,
)
from fewstep.networks.wrappers.unet_condition import UNetCondition as UNetCondition
