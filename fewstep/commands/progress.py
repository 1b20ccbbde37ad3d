"""How far a training or a measurement is: a bar on a terminal, lines with the time left elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from fewstep.train.verdicts import Record, verdicts

NO_LOSS = ("grad_norm", "health/", "samples/", "leap/", "lr/", "done", "stage", "skip", "seconds")
"""How keys of a log record begin that are no loss."""
LINES = 10
"""Lines of a whole training where there is no terminal."""
PAUSE = 20.0
"""Seconds at least between two lines of a measurement, so that a short one has none."""


class TrainingBar(Progress):
    """Bar, steps, time and time left on one line of any terminal of 60 columns; the losses below may be cut."""

    def __init__(self, console: Console, total: int, done: int = 0) -> None:
        self.losses = ""

        def whole() -> Column:
            return Column(no_wrap=True)  # only the bar gives way

        super().__init__(
            TextColumn("train"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=whole()),
            TimeElapsedColumn(table_column=whole()),
            TextColumn("ETA", table_column=whole()),
            TimeRemainingColumn(table_column=whole()),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self.task = self.add_task("train", total=total, completed=done)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.losses:
            yield Text(self.losses, style="dim", no_wrap=True, overflow="ellipsis")

    def show(self, done: int, losses: str) -> None:
        """Steps done by now, and what stands below the bar."""
        self.losses = losses
        self.update(self.task, completed=done)


class Watch:
    """Seconds since a training began or was continued, and those that are left at its mean speed."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.first, self.started = total, done, time.perf_counter()

    def due(self, done: int) -> bool:
        """True where a line is to be printed: LINES times in all, and at the end."""
        return done % max(1, self.total // LINES) == 0 or done == self.total

    def line(self, done: int, losses: str) -> str:
        """`step 30/300  0:00:12, about 0:01:48 left  loss 0.1`."""
        spent = time.perf_counter() - self.started
        left = spent / max(1, done - self.first) * (self.total - done)
        ahead = f", about {clock(left)} left" if done < self.total else ""
        return "  ".join(p for p in (f"step {done}/{self.total}", f"{clock(spent)}{ahead}", losses) if p)


def silent(text: str) -> None:
    """Tell nobody."""


@contextmanager
def drawing(
    title: str, total: int, say: Callable[[str], None], console: Console | None = None
) -> Iterator[Callable[..., None]]:
    """What is to be called with the number of samples, each time that some of `total` are drawn; `kept`: from before.

    Where `console` is a terminal it moves a bar that goes when all are there; else `say` has a line a tenth, and none
    of what is over in PAUSE seconds.
    """
    if console is not None and console.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, expand=True, transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda count, kept=False: bar.advance(task, count)
        return
    started = said = time.perf_counter()
    done = made = tenth = 0

    def told(count: int, kept: bool = False) -> None:
        nonlocal done, made, tenth, said
        done += count
        made += 0 if kept else count
        now = time.perf_counter()
        if LINES * done // total > tenth and now - said >= PAUSE and made and done < total:
            tenth, said = LINES * done // total, now
            left = (now - started) / made * (total - done)
            say(f"{title}: {done:,} of {total:,} samples drawn  {clock(now - started)}, about {clock(left)} left")

    yield told


def embedding_lines(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """What `fewstep.data.placed.encoding` tells: a line when it begins, after each tenth and at the end."""
    began: list[tuple[int, float]] = []
    tenths = [-1]

    def told(done: int, count: int) -> None:
        if not began:
            began.append((done, time.perf_counter()))
        if LINES * done // count == tenths[0]:
            return
        tenths[0] = LINES * done // count
        first, started = began[0]
        spent = time.perf_counter() - started
        left = f", about {clock(spent / (done - first) * (count - done))} left" if first < done < count else ""
        say(f"embedded {done}/{count} prompts  {clock(spent)}{left}")

    return told


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def readings(record: Mapping[str, Any]) -> str:
    """The losses of a log record, short; the discriminator's after those that the student follows."""
    kept = sorted((k.startswith("discriminator"), k) for k in record if not k.startswith(NO_LOSS))
    return "  ".join(f"{k} {record[k]:.3g}" for _, k in kept)


def alarmed(records: Sequence[Record]) -> str:
    """The alarms of a log's last stage in one line, as `fewstep health` names them; "" where there are none."""
    names = [v.name for v in verdicts(records) if v.level == "alarm"]
    return f"ALARM {', '.join(names)}" if names else ""
