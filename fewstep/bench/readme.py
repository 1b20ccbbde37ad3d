"""Writes the tables of the READMEs from data: python -m fewstep.bench.readme"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from fewstep.bench import emoji, reached
from fewstep.bench.alarms import table as table_of_alarms
from fewstep.bench.board import assets
from fewstep.bench.board_table import NOTES, filled, lines as curves_of, table as table_of_board
from fewstep.bench.boards import BOARDS, ranked
from fewstep.commands.compare.kept import evaluation_of
from fewstep.commands.compare.ranking import by_class, cells_line
from fewstep.commands.record import commits_of, resumed_of
from fewstep.commands.report import read_results, with_error
from fewstep.eval.protocol.evaluation import distance_of
from fewstep.files import parse_json, read_json
from fewstep.networks.refused import table as refused
from fewstep.recipe.cards import table
from fewstep.recipe.source import find, read, shipped
from fewstep.recipe.store import load


def demo_table() -> str:
    """The main job's table, from assets/digits-dmd2.json, a copy of a run's report/results.json."""
    lines = [
        "| | FD ± standard error | samples | network calls | class accuracy | diversity |",
        "|---|---|---|---|---|---|",
    ]
    for e in read_results(assets() / "digits-dmd2.json"):
        distance = f"{e.distance.value:.2f} ± {e.distance.standard_error:.2f}"
        lines.append(f"| {e.name} | {distance} | {e.number} | {e.calls} | {' | '.join(by_class(e))} |")
    return "\n".join(lines)


def comparison_table(path: Path) -> str:
    """The rows of a results.json of `fewstep compare` (its copy is assets/compare-NAME.json), best first."""
    told = read_json(path)
    about = told["environment"]
    head = ["recipe", "method", "calls", "FD ±", "seeds", "accuracy", "diversity", "CPU s", "peak MiB"]
    resumed, rows = resumed_of(told), []
    for r in told["rows"]:
        e = evaluation_of(r)
        seeds = f"{len(e.metrics[str(distance_of(e))]['values'])}" + " (interrupted)" * (r["group"] in resumed)
        spent = [f"{e.training['cpu_seconds']:.0f}", f"{e.training['peak_memory_mib']:.0f}"]
        cells = [f"`{e.name}`", e.training["method"], str(e.calls), with_error(e.distance), seeds]
        rows.append([*cells, *by_class(e), *spent])
    for e in map(evaluation_of, told["teachers"]):
        rows.append([e.name, "", str(e.calls), with_error(e.distance), "", *by_class(e), "", ""])
    lines = filled(head, rows)
    settings = "".join(f", {s}" for s in told["settings"])
    found = sum(commits_of(told).values(), Counter()).most_common()
    several = "commits, and runs of each: " + ", ".join(f"{c} ({n})" for c, n in found)
    commits = several if len(found) > 1 else f"commit {found[0][0] if found else about['commit'][:7]}"
    failed = "".join(f" Failed: `{f['recipe']}` ({f['message'].splitlines()[0]})." for f in told["failed"])
    lines += [
        "",
        f"{told['budget']} each{settings}, {told['evaluation']['samples']} samples, {told['evaluation']['metric']}; "
        f"CPU s{' and accuracy' * any(r[5] for r in rows)} are means over seeds; "
        f"{about['device']}, torch {about['torch']}; {commits}.{failed}",
    ]
    return "\n".join(lines)


def recipes_table() -> str:
    """Shipped recipes that have results, and how many there are in all."""
    lines = ["| recipe | method | what | result |", "|---|---|---|---|"]
    for name in shipped():
        data = read(name).data
        if not data.get("results"):
            continue
        found = [f"{r['metric']} {r['value']} (N={r['samples']}, {r['source']})" for r in data.get("results", [])]
        lines.append(f"| `{name}` | {data['method']['name']} | {data['about']} | {'; '.join(found)} |")
    return "\n".join([*lines, "", f"`fewstep recipes ls` lists all {len(shipped())}."])


def recipe_text(name: str) -> str:
    """A shipped recipe up to its results."""
    return f"```yaml\n{find(name).read_text().partition('results:')[0].rstrip()}\n```"


def boards() -> dict[str, str]:
    """The leaderboards by their blocks' names."""
    return {f"board-{name}": board(name) for name in BOARDS} | {"board-notes": NOTES}


def board(name: str) -> str:
    """One leaderboard and its curves."""
    file, picture = (assets() / f"board-{name}.{ending}" for ending in ("json", "png"))
    if not file.exists():
        names = ", ".join(f"`{n}`" for n in ranked(BOARDS[name]))
        return f'No row has been made yet; `make board BOARD={name} RECIPES="..."` makes one. Not run: {names}.'
    content = read_json(file)
    shown = picture.exists() and curves_of(BOARDS[name], content)
    drawn = f"\n\n![FD over processor seconds, a line a recipe]({picture.name})" if shown else ""
    return table_of_board(BOARDS[name], content) + drawn


def text_to_image() -> str:
    """The emoji teacher and its students."""
    return emoji.table(read_json(assets() / "emoji.json"), emoji.shipped_teacher())


PROVOKED = {
    "rate": "the student's rate times 20",
    "critic": "no critic updates any more",
    "darkening": "a bias that darkens it, .1 an update",
    "copied_noise": "every row has the noise of the first",
}


def collapses() -> str:
    """What `fewstep.bench.collapses` measured: a row a collapse, restored by readings and by the metric."""
    file = assets() / "collapses.jsonl"
    found = [parse_json(line, file) for line in file.read_text().splitlines()]
    head = [
        "provoked",
        "alarm",
        "updates later",
        "FD there",
        "FD at the end, unguarded",
        "restored by readings",
        "metric",
    ]
    lines = [cells_line(head), "|" + "---|" * len(head)]
    for name, told in PROVOKED.items():
        by = {r["by"]: r for r in found if r["name"] == name}
        r = by["readings"]
        ends = [f"{by[kind]['restored']:.2f}" if kind in by else "not run" for kind in ("readings", "metric")]
        there = "" if r["at_alarm"] is None else f"{r['at_alarm']:.3g}"
        cells = [told, r["alarm"], str(r["after"]), there, f"{r['unguarded']:.3g}", *ends]
        lines.append(cells_line(cells))
    plain = [r for r in found if r["by"] == "readings"]
    early = sum(r["at_alarm"] is not None and r["at_alarm"] < 2 * r["before"] for r in plain)
    within = [r["by"] for r in found if r["restored"] <= r["before"] + r["error"]]
    first = found[0]
    lines += [
        "",
        f"FD is {first['before']:.2f} ± {first['error']:.2f} when they begin, {first['healthy']:.2f} at the end without "
        f"one. Told before FD has doubled: {early} of {len(PROVOKED)}. Restored to within one standard error: "
        f"{within.count('readings')} by readings, {within.count('metric')} by the metric.",
    ]
    return "\n".join(lines)


TOLD = (
    "match",
    "dsm",
    "scm",
    "health/critic_slope",
    "discriminator_accuracy",
    "health/diversity",
    "samples/contrast",
    "samples/spread",
)
"""Readings of `expected:` that the page of health prints, where a recipe has them."""


BANDED = ("digits-dmd2", "digits-sid", "digits-scd", "fashion-dmd2", "emoji-dmd2")
"""Recipes that are to have `expected:`."""


def bands() -> str:
    """Of each shipped recipe with bands: some readings at its beginning, in its middle and at its end."""
    lines = [cells_line(["recipe", "runs", "reading", "at first", "half way", "at the end"]), "|" + "---|" * 6]
    for name in shipped():
        expected = load(name).expected
        if expected is None:
            continue
        parts = (0, len(expected.ends) // 2, -1)
        for key in (k for k in TOLD if k in expected.bands):
            band = expected.bands[key]
            cells = [f"{band.low[i]:.3g} to {band.high[i]:.3g}" for i in parts]
            lines.append(cells_line([f"`{name}`", str(expected.runs), f"`{key}`", *cells]))
    told = "\n".join(lines) if len(lines) > 2 else "No shipped recipe has bands yet."
    none = ", ".join(f"`{name}`" for name in BANDED if load(name).expected is None)
    return told + (f"\n\nNot run, so without bands: {none}." if none else "")


NETS = "compare-fashion-nets"
"""Of the two Fashion-MNIST teachers under one budget; its command stands in assets/README.md."""


def tables() -> dict[str, dict[str, str]]:
    """README, by its path in the checkout: its blocks by name."""
    compared = assets().glob("compare-*.json")
    return {
        "README.md": {"demo": demo_table(), "recipe": recipe_text("digits-dmd2")},
        "recipes/README.md": {"recipes": recipes_table()},
        "fewstep/methods/README.md": {"methods": table()},
        "docs/healthy.md": {
            "collapses": collapses(),
            "alarms": table_of_alarms(assets() / "alarms.jsonl"),
            "bands": bands(),
        },
        "fewstep/networks/README.md": {"refused": refused()},
        "assets/README.md": dict.fromkeys((Path(reached.HELD_OUT).stem, NETS), "Not run.")
        | {path.stem: comparison_table(path) for path in sorted(compared)}
        | boards()
        | {
            "reached": reached.table(assets()),
            "emoji": text_to_image(),
        },
    }


def fill(text: str, name: str, table: str) -> str:
    """Replace what stands between <!-- name:begin --> and <!-- name:end -->."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"no block {name}")
    return pattern.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text)


def main(root: Path = Path()) -> None:
    for name, blocks in tables().items():
        text = (root / name).read_text()
        for block, made in blocks.items():
            text = fill(text, block, made)
        (root / name).write_text(text)


if __name__ == "__main__":
    main()
