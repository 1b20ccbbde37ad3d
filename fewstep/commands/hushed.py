"""Nothing of the libraries' own on the terminal while a folder is tried out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hushed() -> Iterator[None]:
    """No warnings and no lines of diffusers and transformers below an error.

    Folders of others are opened with schedulers and settings that are made up here: remarks about those are about nothing
    that a user wrote, and stand around a verdict as if they were part of it.
    """
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "accelerate")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
