"""The command line: declarations only, a file for each group of the help. Heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import io
import sys
from typing import Any

import typer

from fewstep.cli.app import app as app

# Each declares its commands; the help has their groups in this order.
from fewstep.cli import train as train  # isort: skip
from fewstep.cli import look as look  # isort: skip
from fewstep.cli import measure as measure  # isort: skip
from fewstep.cli import ship as ship  # isort: skip
from fewstep.cli import data as data  # isort: skip


def main(argv: list[str] | None = None) -> Any:
    """Entry point: a mistake of the user is one clear message on stderr and exit code 2."""
    from fewstep.cli.quiet import quiet
    from fewstep.config import RecipeError, UserError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that is no UTF-8, or a terminal that is not: what it cannot show is escaped.
            stream.reconfigure(errors="backslashreplace")
    try:
        with quiet():
            return app(argv, standalone_mode=True)
    except (RecipeError, UserError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a missing right, a folder where a file should be
        if error.errno is None:
            raise
        full = error.errno == errno.ENOSPC
        reason = "the disk is full; free some space and --resume" if full else error.strerror
        typer.echo(f"error: {error.filename or 'output'}: {reason}", err=True)
        sys.exit(2)
