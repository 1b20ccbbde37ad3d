"""One paper, one file. Importing this package registers them all."""

from fewstep.algebra.batch import Batch as Batch
from fewstep.methods import boot as boot
from fewstep.methods import class_ratio as class_ratio
from fewstep.methods import consistency as consistency
from fewstep.methods import ctm as ctm
from fewstep.methods import decoupled_dmd as decoupled_dmd
from fewstep.methods import denoise as denoise
from fewstep.methods import dmd as dmd
from fewstep.methods import dmd2 as dmd2
from fewstep.methods import emd as emd
from fewstep.methods import f_distill as f_distill
from fewstep.methods import freeflow as freeflow
from fewstep.methods import gdd as gdd
from fewstep.methods import icd as icd
from fewstep.methods import imagine_flash as imagine_flash
from fewstep.methods import imm as imm
from fewstep.methods import kd as kd
from fewstep.methods import ladd as ladd
from fewstep.methods import mdt as mdt
from fewstep.methods import meanflow as meanflow
from fewstep.methods import phased_dmd as phased_dmd
from fewstep.methods import progressive as progressive
from fewstep.methods import reflow as reflow
from fewstep.methods import scfm as scfm
from fewstep.methods import scm as scm
from fewstep.methods import segments as segments
from fewstep.methods import self_e as self_e
from fewstep.methods import sfd as sfd
from fewstep.methods import shortcut as shortcut
from fewstep.methods import sid as sid
from fewstep.methods import std as std
from fewstep.methods import tcm as tcm
from fewstep.methods import tdd as tdd
from fewstep.methods import track as track
from fewstep.methods import twinflow as twinflow
from fewstep.methods import uni_instruct as uni_instruct
from fewstep.methods import vsd as vsd
from fewstep.methods.method import Losses as Losses
from fewstep.methods.method import Method as Method
from fewstep.methods.method import Needs as Needs
from fewstep.methods.method import Turn as Turn

# Last, because it takes any method that is registered by then.
from fewstep.methods import joint as joint  # isort: skip
