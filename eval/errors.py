"""The error for what a user gave, a file, a preset or images; any other is the code's own and keeps its traceback."""

from __future__ import annotations


class InputError(ValueError):
    """What was given cannot be measured or measured with; the message names it and says what is expected."""
