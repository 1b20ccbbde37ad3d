"""Text to image on one core: what runs of the emoji recipes reached, kept for the table of assets/README.md.

    python -m fewstep.bench.emoji RUN... [--interrupted RUN...] [--out assets/emoji.json]

Distance and captions found are those of each run's own report and, for the teacher, of its relay.json; saturation and how
far pictures are from their mirror images are measured here, over every caption of the data and from one noise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.commands.compare.kept import write_json
from fewstep.commands.compare.ranking import cells_line
from fewstep.commands.expect import identity_of
from fewstep.commands.gallery import rows_of
from fewstep.commands.record import named
from fewstep.commands.report import read_results
from fewstep.config import UserError
from fewstep.eval.features.retrieval import Retrieval
from fewstep.eval.protocol.evaluation import distance_of
from fewstep.eval.protocol.images import to_pixels
from fewstep.files import expanded, read_json
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load, load_run
from fewstep.train.bands import identity
from fewstep.train.origins import origins_of
from fewstep.train.samples import saturation

PREFIX, TEACHER = "emoji-dmd2", "emoji-teacher"
FOUND = "caption found among 100"


def today(name: str) -> dict[str, Any]:
    """What a run of a shipped recipe stands on now: the recipe, its teacher's files and its data's."""
    recipe = load(name)
    return identity(recipe, origins_of(recipe))


def row_of(run: Path, interrupted: bool) -> dict[str, Any]:
    """What a finished run of a shipped emoji recipe says of itself.

    Raises:
        UserError: it is a run of another recipe, or of an earlier one or teacher, or has no report with captions found.
    """
    name, _ = named(load_run(run), run)
    if not name.startswith(PREFIX):
        raise UserError(f"{run}: is a run of {name}; this table has recipes {PREFIX}*")
    own = identity_of(run)
    if own != today(name):
        raise UserError(f"{run}: was trained with another recipe or teacher than {name} has today; train it again")
    path = run / "report" / "results.json"
    e = next(reversed(read_results(path)), None) if path.is_file() else None
    if e is None or FOUND not in e.metrics or not math.isfinite(e.distance.value):
        raise UserError(f"{path}: tells no distance and no {FOUND!r}; let the run finish, with evaluate.retrieval")
    about = {"updates": load_run(run).train.steps, "interrupted": interrupted, "identity": own}
    distance = {"metric": str(distance_of(e)), "value": e.distance.value, "found": e.metrics[FOUND]["value"]}
    return {"recipe": name, "calls": e.calls, "samples": e.number} | distance | about


def measured(runs: Sequence[Path], interrupted: Sequence[Path], teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of runs, and looks of the data, of the teacher as it was measured for relay.json, and of each run."""
    rows = [row_of(run, run in interrupted) for run in runs]
    recipe: Any = load_run(runs[0])
    captions = [item.caption for item in recipe.data.open().items]
    shown: dict[str, dict[str, float]] = {}
    pictures = torch.empty(0)
    also = few_steps(runs, teacher)
    for how in [*teacher["measured"], *also]:
        beside = runs if not shown else runs[:1]
        drawn = rows_of(beside, captions, steps=[how["heun_steps"]], guidance=how["guidance"], seed=0)
        found = [looks(x.clamp(-1, 1)) for _, x in drawn]
        shown[_key(how)] = found[1]
        if beside is runs:
            shown["data"] = found[0]
            pictures = drawn[0][1]
            rows = [r | told for r, told in zip(rows, found[2:], strict=True)]
    judge = Retrieval.load(str(expanded(recipe.evaluate.retrieval)))
    count = len(captions)
    known = judge.accuracy(to_pixels(pictures).float(), torch.arange(count), min(100, count))
    return {"rows": rows, "shown": shown, "found": known.value, "teacher": teacher["updates"], "also": also}


def looks(x: Tensor) -> dict[str, float]:
    """Of pictures (n, 3, h, w) in [-1, 1]: their saturation, and sides, the mean difference from their mirror images.

    A caption has a picture and its mirror image; the mean of the two, of no side, is what one call of a teacher draws.
    """
    return {"saturation": float(saturation(x)), "sides": float((x - x.flip(-1)).abs().mean())}


def few_steps(runs: Sequence[Path], teacher: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The teacher without guidance at numbers of steps that relay.json has not, as the runs' reports measured it."""
    like = next(how for how in teacher["measured"] if how["guidance"] == 1)
    known = {how["heun_steps"] for how in teacher["measured"] if how["guidance"] == 1}
    found = {}
    for run in runs:
        for e in read_results(run / "report" / "results.json"):
            alike = (distance_of(e), e.number) == (like["metric"], like["samples"])
            if e.name.startswith("teacher, ") and FOUND in e.metrics and alike and e.steps not in known:
                told = {"value": e.distance.value, "retrieval": e.metrics[FOUND]["value"]}
                found[e.steps] = {"heun_steps": e.steps, "guidance": 1.0} | told
    return [found[n] for n in sorted(found)]


def table(content: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    """Data, teacher and students, and the recipes that have no row; looks are shares of the teacher's or data's."""
    head = [
        "",
        "calls",
        "FD (EfficientNet-lite0)",
        FOUND,
        "saturation, of the teacher's",
        "sides, of the data's",
        "updates",
    ]
    lines = [cells_line(head), cells_line(["---"] * len(head))]
    # Of another teacher its looks say nothing.
    shown = content["shown"] if content["teacher"] == teacher["updates"] else {}
    base = base_of(content, teacher)

    def shares(own: Mapping[str, float] | None) -> list[str]:
        if own is None or base is None:
            return ["not run"] * 2
        return [f"{own['saturation'] / base['saturation']:.2f}", f"{own['sides'] / shown['data']['sides']:.2f}"]

    if base:
        lines.append(cells_line(["the data", "", "", _share(content["found"]), *shares(shown["data"]), ""]))
    known = {how["heun_steps"] for how in teacher["measured"] if how["guidance"] == 1}
    also = [how for how in content.get("also", ()) if shown and how["heun_steps"] not in known]
    for how in sorted([*teacher["measured"], *also], key=lambda how: (-how["heun_steps"], how["guidance"])):
        steps, scale = how["heun_steps"], how["guidance"]
        name = f"teacher, {steps} Heun step{'s' * (steps > 1)}" + (f", guidance {scale:g}" if scale != 1 else "")
        calls = (2 * steps - 1) * (1 if scale == 1 else 2)
        cells = [f"{how['value']:.1f}", _share(how.get("retrieval")), *shares(shown.get(_key(how)))]
        lines.append(cells_line([name, str(calls), *cells, f"{teacher['updates']:,}"]))
    rows = current(content) if base else []
    for r in sorted(rows, key=lambda r: r["value"]):
        cells = [f"{r['value']:.1f}", _share(r["found"]), *shares(r)]
        told = f"{r['updates']}" + " (interrupted)" * r["interrupted"]
        lines.append(cells_line([f"`{r['recipe']}`", str(r["calls"]), *cells, told]))
    have, old = {r["recipe"] for r in rows}, {r["recipe"] for r in content["rows"]}
    for name in (n for n in shipped() if n.startswith(PREFIX) and n not in have):
        told = "of an earlier recipe or teacher" if name in old else "not run"
        lines.append(cells_line([f"`{name}`", "", *[told] * 4, ""]))
    return "\n".join(lines)


def base_of(content: Mapping[str, Any], teacher: Mapping[str, Any]) -> Mapping[str, float] | None:
    """Looks of the teacher in its most steps without guidance; None where they are of another one than `teacher`."""
    most = max((how for how in teacher["measured"] if how["guidance"] == 1), key=lambda how: how["heun_steps"])
    return content["shown"].get(_key(most)) if content["teacher"] == teacher["updates"] else None


def current(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of recipes and of the teacher as they ship today."""
    return [r for r in content["rows"] if r["recipe"] in shipped() and r["identity"] == today(r["recipe"])]


def _key(how: Mapping[str, Any]) -> str:
    """What the looks of a row of the teacher are kept under."""
    return f"{how['heun_steps']} steps, guidance {how['guidance']:g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def shipped_teacher() -> Any:
    """The relay.json of the teacher that ships."""
    return read_json(expanded(f"assets:{TEACHER}/relay.json"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fewstep.bench.emoji", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--interrupted", nargs="*", type=Path, default=[], help="those that went on from a checkpoint")
    parser.add_argument("--out", type=Path, default=None, help="emoji.json of the assets when left out")
    given = parser.parse_args(argv)
    unknown = [run for run in given.interrupted if run not in given.runs]
    if unknown:
        raise UserError(f"--interrupted {unknown[0]}: is not among the runs")
    teacher = shipped_teacher()
    content = measured(given.runs, given.interrupted, teacher)
    write_json(given.out or expanded("assets:emoji.json"), content)
    print(table(content, teacher))


if __name__ == "__main__":
    main()
