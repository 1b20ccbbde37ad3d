if __name__ != "fewstep.kernels":
    raise ImportError("import fewstep.kernels, not kernels: this folder is mapped into the fewstep package")

from .api import Choice, attention, attention_jvp, attention_tangent, explain
from .arguments import IMPLEMENTATIONS
from .context import register_diffusers_backend, use_fewstep_attention
from .merge import merge
from .ranges import KeyRange, Ranges, Segment, block_causal, teacher_forcing

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "KeyRange",
    "Ranges",
    "Segment",
    "attention",
    "attention_jvp",
    "attention_tangent",
    "block_causal",
    "explain",
    "merge",
    "register_diffusers_backend",
    "teacher_forcing",
    "use_fewstep_attention",
]
