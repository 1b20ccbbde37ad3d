"""A step that ran out of memory: known as such, undone where nothing had changed yet, so that a checkpoint is whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fewstep.config import UserError
from fewstep.train.loop import Loop


class OutOfMemory(UserError):
    """A step that did not fit into memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for an accelerator's, Python's and torch's own on a CPU, which is a bare RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def guarded(loop: Loop, work: Callable[[], None]) -> bool:
    """Do a part of the training; False where it ran out of memory, with its gradients and readings dropped."""
    mark = loop.meter.mark()
    try:
        work()
        return True
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Not within the handler: until that is left, the error holds all that the failed step had computed.
    for optimizer in loop.optim.values():
        optimizer.zero()
    loop.meter.back(mark)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False
