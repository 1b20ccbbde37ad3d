"""One paper, one file. Importing this package registers them all."""

from fewstep.algebra.batch import Batch as Batch
from fewstep.methods import (
    boot as boot,
    class_ratio as class_ratio,
    consistency as consistency,
    contiguous as contiguous,
    ctm as ctm,
    decoupled_dmd as decoupled_dmd,
    denoise as denoise,
    dmd as dmd,
    dmd2 as dmd2,
    emd as emd,
    f_distill as f_distill,
    factorised as factorised,
    freeflow as freeflow,
    gdd as gdd,
    icd as icd,
    imagine_flash as imagine_flash,
    imm as imm,
    kd as kd,
    ladd as ladd,
    mdt as mdt,
    meanflow as meanflow,
    phased_dmd as phased_dmd,
    progressive as progressive,
    reflow as reflow,
    scfm as scfm,
    scm as scm,
    segments as segments,
    self_e as self_e,
    sfd as sfd,
    shortcut as shortcut,
    sid as sid,
    std as std,
    tcm as tcm,
    tdd as tdd,
    track as track,
    twinflow as twinflow,
    uni_instruct as uni_instruct,
    vsd as vsd,
)
from fewstep.methods.method import Losses as Losses, Method as Method, Needs as Needs, Turn as Turn

# Last, because it takes any method that is registered by then.
from fewstep.methods import joint as joint  # isort: skip
