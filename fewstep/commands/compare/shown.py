"""A finished comparison on a terminal: what ranks, one line a recipe; everything else is in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fewstep.commands.compare.ranking import by_class
from fewstep.commands.report import with_error
from fewstep.eval.metrics.estimate import Estimate
from fewstep.eval.protocol.evaluation import Evaluation, distance_of

WIDE = 110
"""Columns of a terminal that has room for what a run had cost."""


def show(
    console: Console,
    title: str,
    ranked: Sequence[tuple[Evaluation, Estimate | None]],
    teachers: Sequence[Evaluation],
    failed: Sequence[Mapping[str, Any]],
) -> None:
    """Print rank, recipe, network calls, distance, paired difference and, where classes are known, accuracy."""
    every = [*(e for e, _ in ranked), *teachers]
    classes = any(e.value("class accuracy") is not None for e in every)
    wide = console.width >= WIDE or not console.is_terminal
    metric = str(distance_of(every[0])).partition(" (")[0] if every else ""
    heads = ["", "recipe", "calls", f"{metric} ±", "from the best"] + ["accuracy"] * classes
    out = Table(title=title, box=None, pad_edge=False, header_style="bold")
    for i, head in enumerate([*heads, *(("updates", "seconds", "MiB") if wide else ())]):
        out.add_column(head, justify="left" if i == 1 else "right", no_wrap=True, overflow="ellipsis")
    for number, (e, apart) in enumerate(ranked, 1):
        cells = [str(number), e.name, str(e.calls), with_error(e.distance)]
        cells += ["" if apart is None else with_error(apart, "+"), *([by_class(e)[0]] if classes else [])]
        t = e.training
        cells += [f"{t['updates']:,}", f"{t['seconds']:.0f}", f"{t['peak_memory_mib']:.0f}"] if wide else []
        out.add_row(*map(Text, cells))
    for e in teachers:
        cells = ["", e.name, str(e.calls), with_error(e.distance), "", *([by_class(e)[0]] if classes else [])]
        out.add_row(*map(Text, cells))
    console.print(out)
    for f in failed:
        line = f"failed: {f['recipe']}, seed {f['seed']}: {f['message'].splitlines()[0]}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
