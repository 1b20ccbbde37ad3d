"""What the libraries below say on a terminal, kept to what a user of a command can act on."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = r"(diffusers|transformers|peft|accelerate|torch\.jit)\b"


@contextmanager
def quiet() -> Iterator[None]:
    """No notes to developers by these libraries and no bars of theirs; `python -W` or PYTHONWARNINGS shows the notes.

    A folder with an old scheduler config, or a name that diffusers will drop one day, is not the user's of a command
    to mend. The suite runs without this and sees them.
    """
    # tqdm reads it when it is imported, which no command has done by now.
    os.environ.setdefault("TQDM_DISABLE", "1")
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=LIBRARIES)
        yield
