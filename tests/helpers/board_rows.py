"""Rows and comparisons as `fewstep compare --budget own` writes them, for a board to take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.bench.boards import BOARDS, digest_of, ranked
from fewstep.commands.judge import preset_of
from fewstep.recipe.store import load

MACHINE = {"torch": "2", "device": "CPU", "threads": "1", "machine": "m"}
HASH = preset_of(replace(load("digits-dmd2").evaluate, metric="digits", samples=5000)).hash  # type: ignore[type-var]
TEACHER = {"path": "assets:digits-teacher", "sha256": "t"}


def row(name: str, value: float, steps: int = 1, **more: Any) -> dict[str, Any]:
    metrics = {
        "FD (x)": {
            "value": value,
            "standard_error": 0.25,
            "values": [value, value],
            "spread": 0.1,
            "sampling_error": 0.2,
        },
        "recall (x, k=5)": {"value": 0.5},
        "class accuracy (x)": {"value": 0.75},
        "within-class diversity (x)": {"value": 1.0},
    }
    training = {
        "method": "kd",
        "updates": 1400,
        "seconds": 9.0,
        "cpu_seconds": 8.0,
        "network_calls": 7,
        "peak_memory_mib": 512.0,
        "settled_cpu_seconds": 4.0,
    }
    return {
        "name": name,
        "group": name,
        "preset": "digits",
        "preset_hash": HASH,
        "extractor": "x",
        "number": 5000,
        "metrics": metrics,
        "calls": steps,
        "steps": steps,
        "latency": [],
        "seconds": 2.0,
        "training": training,
    } | more


def comparison(path: Path, *rows: dict[str, Any], run: Mapping[str, Any] | None = None, **more: Any) -> Path:
    """A file as `fewstep compare --budget own` writes it; run: what is otherwise in its runs."""
    teacher = row("teacher, 8 steps", 0.5, 8, training={}, group="")
    points = [{"updates": u, "cpu_seconds": u, "value": 9.0 / u} for u in (1, 2)]
    runs = [
        {
            "recipe": r["group"],
            "curve": points,
            "commit": "0123456789",
            "identity": digest_of(r["group"]) if r["group"] in ranked(BOARDS["digits"]) else "",
            "resumes": 0,
            "teacher": TEACHER,
        }
        | (run or {})
        for r in rows
    ]
    content: dict[str, Any] = {
        "budget": "the recipe's own updates",
        "seeds": [0, 1],
        "settings": ["evaluate.metric=digits"],
        "environment": MACHINE | {"commit": "of today"},
        "rows": [r | {"rank": 1, "difference": None} for r in rows],
        "teachers": [teacher],
        "failed": [],
        "runs": runs,
    }
    path.write_text(json.dumps(content | more))
    return path
