if __name__ != "fewstep.kernels":
    # transformers imports whatever is called kernels to read its version, so from the root of this checkout
    # only a use of the module may fail, not its import.
    __version__ = "0"
    __path__ = []  # kernels.api and the others are not to be found, so no module exists under two names

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError("import fewstep.kernels, not kernels: this folder is mapped into the fewstep package")

else:
    from .api import Choice, attention, attention_jvp, attention_tangent, check_device, explain
    from .arguments import IMPLEMENTATIONS
    from .context import (
        attention_contexts,
        attention_in_force,
        register_diffusers_backend,
        use_fewstep_attention,
    )
    from .ema import ema_update
    from .merge import merge
    from .ranges import KeyRange, Ranges, Segment, block_causal, teacher_forcing

    __all__ = [
        "IMPLEMENTATIONS",
        "Choice",
        "KeyRange",
        "Ranges",
        "Segment",
        "attention",
        "attention_contexts",
        "attention_in_force",
        "attention_jvp",
        "attention_tangent",
        "block_causal",
        "check_device",
        "ema_update",
        "explain",
        "merge",
        "register_diffusers_backend",
        "teacher_forcing",
        "use_fewstep_attention",
    ]
