"""`fewstep report RUN`: one HTML page of a run, while it trains or after, with nothing outside the file."""

from __future__ import annotations

import html
import io
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from fewstep.commands.health import MARKS, bands_of, findings
from fewstep.commands.health_plots import figure_of, points
from fewstep.commands.progress import NO_LOSS
from fewstep.commands.report import read_results
from fewstep.config import RecipeError, UserError
from fewstep.eval.page import as_png, document, picture, plot, table
from fewstep.eval.protocol.evaluation import comparison_rows, format_entry
from fewstep.files import atomic_path, lock_taken
from fewstep.recipe.diff import differences
from fewstep.recipe.store import dump, load, load_run
from fewstep.train.bands import beginning
from fewstep.train.claim import read_origin, refuse_links
from fewstep.train.log import read_log
from fewstep.train.peak import peak
from fewstep.train.verdicts import FEWEST, alarms, last_stage

FILE = "report/run.html"
"""Where the page lies in a run directory."""
GRIDS = 12
"""Pictures of samples that are shown at most, evenly spaced from the first to the last."""
SIDE = 900
"""Pixels of such a picture's longer side at most; a larger one is shown smaller."""

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Written:
    """A page, and what its run does."""

    path: Path
    trains: bool
    """A process trains in it now."""
    whole: bool
    """Its last step is done."""


def write_page(run: Path, refresh: int | None = None) -> Written:
    """Write RUN/report/run.html.

    refresh: seconds after which a browser reads it again, as long as the run trains.

    Raises:
        UserError: not a run directory, or one that leads elsewhere through a link.
    """
    refuse_links(run, ("report",))
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: has no recipe.yaml; give the directory of a run, RUN of `fewstep run ... --out RUN`")
    recipe, origin, trains = load_run(run), read_origin(run), lock_taken(run)
    log = [r for r in read_log(run / "log.jsonl") if "done" in r]
    records = [r for r in log if "stage" in r]
    total = sum(stage.steps for stage in recipe.stages())
    whole = bool(records) and records[-1]["done"] >= total
    parts = [
        f"<h1>{html.escape(run.name)}</h1>",
        f"<p>{html.escape(recipe.about)}</p>",
        f"<p><b>{html.escape(_state(run, records, total, trains))}</b></p>",
        *_verdicts(run, log),
        *_samples(run),
        *_results(run),
        *_on_the_way(log),
        *_curves(run, records),
        *_recipe(recipe, origin),
        *_environment(origin),
        *_notes(log),
        *_commands(run, recipe, origin, trains, whole),
    ]
    path = run / FILE
    with atomic_path(path) as aside:
        aside.write_text(document(f"{run.name}, fewstep", parts, refresh if trains else None), encoding="utf-8")
    return Written(path, trains, whole)


def follow(run: Path, every: int, say: Callable[[str], None]) -> Path:
    """Write the page every so many seconds until the run is finished or stopped, or Ctrl-C; waits for one to begin."""
    told, seen = False, ""
    try:
        while True:
            if not (run / "recipe.yaml").is_file():
                if not told:
                    say(f"waiting for {run} to begin; Ctrl-C ends that")
                told = True
            else:
                made = write_page(run, every)
                if not seen:
                    say(f"page {made.path}, written again every {every} s while it trains; Ctrl-C ends that")
                # Roles are built, and some file systems know no locks, before a training is seen.
                if not made.trains and (made.whole or seen == "trains"):
                    return made.path
                seen = "trains" if made.trains else seen or "there"
            time.sleep(every)
    except KeyboardInterrupt:
        return write_page(run).path if (run / "recipe.yaml").is_file() else run / FILE


def _state(run: Path, records: Records, total: int, trains: bool) -> str:
    done = int(records[-1]["done"]) if records else 0
    where = f"step {done:,} of {total:,}"
    if records:
        last = datetime.fromtimestamp(os.stat(run / "log.jsonl").st_mtime).astimezone()
        where += f", log written {last:%Y-%m-%d %H:%M:%S %Z}"
    return f"{'training' if trains else 'trained' if done >= total else 'stopped'}: {where}"


def _verdicts(run: Path, log: Records) -> list[str]:
    records = last_stage(log)
    found = findings(run, log) if records else []
    parts = ["<h2>Is it healthy?</h2>"]
    if not found:
        few = f"judged from {FEWEST} records of a stage on, this one has {len(records)}"
        return [*parts, f'<p class="note">Nothing is judged yet: {few}.</p>' if records else "<p>No record yet.</p>"]
    since = alarms(records)
    rows = []
    for v in found:
        began = f"since step {since[v.name]:,}" if v.level == "alarm" and v.name in since else ""
        rows.append([MARKS[v.level], v.name, v.sentence, began, v.remedy])
    note = "The method's own readings over the last fifth of the last stage, samples by the last two readings; as"
    best = peak(log)
    told = f"; {html.escape(str(best))}" if best else ""
    note = f'<p class="note">{note} <code>fewstep health</code> says{told}.</p>'
    return [*parts, table(["", "", "reading", "", "what to turn"], rows, words=True), note]


def _samples(run: Path) -> list[str]:
    every = sorted((run / "samples").glob("step-*.png"))
    if not every:
        return []
    last = len(every) - 1
    chosen = sorted({round(i * last / (GRIDS - 1)) for i in range(GRIDS)}) if last >= GRIDS else range(last + 1)
    parts = ["<h2>Samples</h2>", '<p class="note">From the same noise at every step.</p>', '<div class="grids">']
    for path in (every[i] for i in chosen):
        number, _, rest = path.stem.removeprefix("step-").partition("-")
        shown = f"{int(number):,}" if number.isdigit() else number
        parts.append(_inline(path, f"step {shown} {rest}".rstrip()))
    beside = run / "report" / "side-by-side.png"
    if beside.is_file():
        parts += [
            "</div>",
            '<div class="plots">',
            _inline(beside, "the teacher beside the student, from the same noise", 2 * SIDE),
        ]
    return [*parts, "</div>"]


def _inline(path: Path, caption: str, side: int = SIDE) -> str:
    """The picture in a file; a large one smaller, as JPEG; what cannot be read as a line that says so."""
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if max(image.size) <= side:
                return picture(data, caption)
            small = image.convert("RGB")
            small.thumbnail((side, side))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f'<p class="note">{html.escape(f"{path.name}: cannot be shown: {error}")}</p>'
    buffer = io.BytesIO()
    small.save(buffer, "jpeg", quality=88)
    return picture(buffer.getvalue(), caption, kind="jpeg")


def _results(run: Path) -> list[str]:
    path = run / "report" / "results.json"
    if not path.is_file():
        return []
    try:
        rows = read_results(path)
        cells = table(*comparison_rows(rows)) if rows else ""
    except (UserError, ValueError) as error:
        return ["<h2>Measured</h2>", f'<p class="note">{html.escape(str(error))}</p>']
    if not rows:
        return []
    against = f'<p class="note">Against {html.escape(rows[0].reference)}.</p>' if rows[0].reference else ""
    return ["<h2>Measured</h2>", cells, '<p class="note">± is one standard error.</p>', against]


def _on_the_way(log: Records) -> list[str]:
    """What was measured while it trained, as a table and, from two moments on, as plots."""
    found = [r for r in log if isinstance(r.get("evaluation"), dict)]
    if not found:
        return []
    names = list(dict.fromkeys(name for r in found for name in r["evaluation"]))
    rows = [[f"{r['done']:,}", *(_entry(r["evaluation"].get(name)) for name in names)] for r in found]
    parts = ["<h2>Measured on the way</h2>", table(["step", *names], rows)]
    if len(found) < 2:
        return parts
    parts.append('<div class="plots">')
    for name in names:
        held = [(r["done"], e) for r in found if _is_value(e := r["evaluation"].get(name))]
        canvas, axes = plot()
        axes.errorbar(
            [d for d, _ in held],
            [e["value"] for _, e in held],
            yerr=[e.get("standard_error") or 0.0 for _, e in held],
            marker="o",
            capsize=3,
        )
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        parts.append(picture(as_png(canvas), f"{name} while it trained"))
    return [*parts, "</div>"]


def _is_value(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("value"), int | float)


def _entry(entry: Any) -> str:
    return format_entry(entry) if _is_value(entry) else "-"


def _curves(run: Path, records: Records) -> list[str]:
    """Losses, health readings with their lines, rates and gradient norms."""
    if not records:
        return []
    keys = list(dict.fromkeys(k for r in records for k in r))
    losses = [k for k in keys if not k.startswith(NO_LOSS) and points(records, k)[0]]
    parts = ["<h2>Curves</h2>", '<div class="plots">']
    for key in losses:
        parts.append(_curve(records, [key], key))
    parts.append("</div>")
    expected = bands_of(run)[0]
    shaded = "; shaded: where reference runs were" if expected else ""
    readings = figure_of(last_stage(records), expected, beginning(records))
    if readings is not None:
        parts += [
            '<div class="plots">',
            picture(as_png(readings), "readings of the last stage; dashed: the lines of alarms" + shaded),
        ]
        parts.append("</div>")
    parts.append('<div class="plots">')
    for prefix, caption in (("lr/", "learning rates"), ("grad_norm/", "gradient norms before clipping")):
        if own := [k for k in keys if k.startswith(prefix) and points(records, k)[0]]:
            parts.append(_curve(records, own, caption))
    return [*parts, "</div>"]


def _curve(records: Records, keys: Sequence[str], caption: str) -> str:
    canvas, axes = plot()
    canvas.set_size_inches(5.2, 2.8)
    values = []
    for key in keys:
        x, y = points(records, key)
        axes.plot(x, y, linewidth=0.7, alpha=0.45 if len(x) >= SMOOTH else 1, label=key.partition("/")[2] or key)
        if len(x) >= SMOOTH:
            axes.plot(x, list(_averaged(y)), linewidth=1.5, color=axes.lines[-1].get_color())
        values += y
    for step in _borders(records):
        axes.axvline(step, color="grey", linewidth=0.8, linestyle=":")
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    if len(keys) > 1:
        axes.legend(frameon=False, fontsize=8)
    return picture(as_png(canvas), caption)


SMOOTH = 40
"""Records from which on a running average is drawn over a curve."""


def _averaged(values: Sequence[float]) -> Iterator[float]:
    """Exponential average over a twentieth of the records, started without bias."""
    keep = 1 - 20 / max(len(values), SMOOTH)
    total = weight = 0.0
    for v in values:
        total, weight = keep * total + (1 - keep) * v, keep * weight + (1 - keep)
        yield total / weight


def _borders(records: Records) -> list[float]:
    return [b["done"] for a, b in pairwise(records) if a["stage"] != b["stage"]]


def _recipe(recipe: Any, origin: Mapping[str, Any]) -> list[str]:
    """What the recipe changes of its source, and all of it folded away."""
    parts = ["<h2>Recipe</h2>"]
    name = origin.get("recipe")
    if name is None:
        parts.append('<p class="note">Which recipe it was made from is not recorded.</p>')
    else:
        try:
            changed = differences(load(name), recipe, all_keys=True)
            said = "differs from it in nothing" if not changed else f"differs from it in {len(changed)} keys"
            parts.append(f"<p>From <code>{html.escape(name)}</code>, as that is now; the run {said}.</p>")
            parts += [_listed(changed)] if changed else []
        except (RecipeError, UserError) as error:
            why = str(error).splitlines()[0]
            parts.append(f"<p>From <code>{html.escape(name)}</code>, which cannot be read now: {html.escape(why)}</p>")
    if "from" in origin:
        parts.append(f"<p>It began with the weights of <code>{html.escape(str(origin['from']))}</code>; changed:</p>")
        parts.append(_listed([str(line) for line in origin.get("changed", ())] or ["nothing"]))
    text = html.escape(dump(recipe))
    return [*parts, f"<details><summary>all of it, every default filled in</summary><pre>{text}</pre></details>"]


def _listed(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li><code>{html.escape(line)}</code></li>" for line in lines) + "</ul>"


def _environment(origin: Mapping[str, Any]) -> list[str]:
    told = origin.get("environment")
    parts = ["<h2>Environment</h2>"]
    if not isinstance(told, Mapping):
        return [*parts, '<p class="note">Not recorded.</p>']
    return [*parts, table(["when it last started", ""], [[str(k), str(v)] for k, v in told.items()], words=True)]


def _notes(log: Records) -> list[str]:
    notes = [f"step {r.get('done', 0):,}: {told}" for r in log if (told := _note(r))]
    return ["<h2>Notes</h2>", _listed(notes)] if notes else []


def _note(record: Mapping[str, Any]) -> str:
    """What a record says that is no reading: of changed files, an alarm, a return to an earlier checkpoint."""
    act = record.get("guard")
    if isinstance(act, Mapping):
        return f"back here from step {act.get('at')}: {act.get('alarm')}; {act.get('knob')}"
    return f"ALARM {record['alarm']}" if "alarm" in record else str(record.get("note", ""))


def _commands(run: Path, recipe: Any, origin: Mapping[str, Any], trains: bool, whole: bool) -> list[str]:
    at = shlex.quote(str(run))
    # What was trained in Python has no name; its own recipe is one.
    again = [origin.get("recipe", str(run / "recipe.yaml")), *map(str, origin.get("settings", ()))]
    lines = [shlex.join(["fewstep", "run", *again, "--out", str(run), "--resume"])] if not trains and not whole else []
    lines += [f"fewstep {what} {at}" for what in ("health", "sample", *(["eval"] if recipe.evaluate else []))]
    parts = ["<h2>Going on</h2>", "<pre>" + html.escape("\n".join(lines)) + "</pre>"]
    if (run / "export").is_dir():
        parts.append(f"<p>The student as a diffusers pipeline: <code>{html.escape(str(run / 'export'))}</code></p>")
    return parts
