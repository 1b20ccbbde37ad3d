"""Shared by the export tests: the lines of code that an export prints, run as its reader runs them."""

from __future__ import annotations

import ast
import inspect
import os
from pathlib import Path
from typing import Any

import torch


def run_snippet(code: str, folder: Path) -> dict[str, Any]:
    """Run printed lines in a folder of their own; a picture that they say they save is there. Gives their names."""
    here = os.getcwd()
    found: dict[str, Any] = {}
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            exec(code, found)
        assert ("sample.png" in code) == Path("sample.png").is_file()
    finally:
        os.chdir(here)
    return found


def check_call(code: str) -> None:
    """The pipeline that a snippet loads takes every argument that it is called with."""
    import diffusers

    tree = ast.parse(code)
    (name,) = [a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names if a.name.endswith("Pipeline")]
    (call,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "pipe"]
    inspect.signature(getattr(diffusers, name).__call__).bind(None, **{str(k.arg): None for k in call.keywords})
