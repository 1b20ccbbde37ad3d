"""Method cards: what each method is, where it is, how it differs from its paper. Data beside the methods."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from fewstep.config import FAST_LOADER, REGISTRY, RecipeError, _close, config
from fewstep.recipe.source import read, shipped

ENERGY = "energy distance x1000"


@config
class Claim:
    """A published number."""

    setting: str
    metric: str
    value: Annotated[str, BeforeValidator(str)]
    source: str = "paper"
    """paper, or "paper, from memory" where the number was not looked up again."""


@config
class Ours:
    """A number of a run of this code."""

    setting: str
    """Recipe and what was changed."""
    metric: str
    value: float
    seeds: int = 1
    updates: int
    """Of all stages."""
    commit: str
    note: str = ""


@config
class Compared:
    """A comparison of this code with public code on the same tensors."""

    reference: str
    """Repository @ commit, and what it is where that is not the official code."""
    how: Literal["executed", "transcribed"]
    """Whether the reference itself ran, or a transcription of the named file."""
    what: str
    difference: str
    """The largest one, of gradients relative to the reference's largest, after documented conversions."""


@config
class Card:
    """A method card; `name` is the method's registered name, or a recipe pattern of its own (multi_student)."""

    name: str
    title: str
    cites: tuple[str, ...]
    equation: str
    roles: tuple[str, ...]
    needs: str
    code: str
    """Where the equation is: `fewstep/FILE.py:NAME`, NAME a function or Class.method, with recipes after it."""
    deviations: tuple[str, ...]
    paper_results: tuple[Claim, ...] = ()
    our_results: tuple[Ours, ...] = ()
    """Filled from assets/conformance.jsonl and assets/results.jsonl, which commands write; never by hand."""
    compared: tuple[Compared, ...] = ()
    not_compared: str = ""
    """Why there is no comparison; exactly one of `compared` and this is given."""
    memory: str
    failures: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    """Names of papers and settings that this card covers."""
    networks: tuple[int, int] | None = None
    """(held, trained) networks of the teacher's size, by the roles; heads and EMA copies are not among them."""

    def __post_init__(self) -> None:
        if bool(self.compared) == bool(self.not_compared):
            raise ValueError("give compared or not_compared, and not both")


def _folder() -> Path:
    return Path(str(files("fewstep"))) / "methods"  # files("fewstep.methods") would import them


@lru_cache(maxsize=1)
def cards() -> dict[str, Card]:
    """Every card by name. Raises RecipeError naming the file of a card that does not fit."""
    out = {}
    for path in sorted((_folder() / "cards").glob("*.yaml")):
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), FAST_LOADER)
            card = TypeAdapter(Card).validate_python(data, strict=False)
        except (ValidationError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"{path.name}: {error}") from None
        out[card.name] = card
    for name, result in measured(out):
        out[name] = replace(out[name], our_results=(*out[name].our_results, result))
    return out


def measured(known: Mapping[str, Card]) -> list[tuple[str, Ours]]:
    """(card, number) of every line that `make conformance` and `fewstep methods record` have written.

    A recipe belongs to the card of its own name (toy/multi-student) or alias (digits-disback), else to its method's.
    """
    found = []
    for r in _lines("conformance.jsonl"):
        result = Ours(
            setting=r["recipe"] + " (guided or rewarded, so not at the ring)" * r["guided"],
            metric=ENERGY,
            value=round(r["energy"], 2),
            updates=r["updates"],
            commit=r["commit"],
            note=f"{_steps(r['calls'])}; {r['initial']:.3g} at the start{_stale(r)}",
        )
        found.append((_owner(r["recipe"], r["method"], known), result))
    for r in _lines("results.jsonl"):
        values = r["values"]
        error = "" if r["error"] is None else f" ± {r['error']:.2f}"
        result = Ours(
            setting=" ".join((r["recipe"], *r["settings"])),
            metric=r["metric"],
            value=round(sum(values) / len(values), 2),
            seeds=len(values),
            updates=r["updates"],
            commit=r["commit"],
            note=f"{_steps(r['steps'])}, {r['samples']} samples{error}{_stale(r)}",
        )
        found.append((_owner(r["recipe"], r["method"], known), result))
    return found


def _lines(name: str) -> list[dict[str, Any]]:
    path = Path(str(files("fewstep.assets"))) / name
    return [json.loads(line) for line in path.read_text().splitlines()]


def _stale(row: Mapping[str, Any]) -> str:
    """What to add to a number that is older than its loss or recipe."""
    return f"; before {row['before']}, which changed its loss or settings" if row.get("before") else ""


def _steps(steps: int) -> str:
    return f"{steps} step{'s' * (steps > 1)}"


def _owner(recipe: str, method: str, known: Mapping[str, Card]) -> str:
    """The card of a recipe: that of its own name or alias if there is one, else its method's."""
    own = re.sub(r"^(toy/|digits-|fashion-|emoji-)", "", recipe)
    if own.replace("-", "_") in known:
        return own.replace("-", "_")
    return next((name for name, c in known.items() if own in c.aliases), method)


@lru_cache(maxsize=1)
def other_names() -> dict[str, str]:
    """Card of every other name that `card` takes: aliases, and toy recipes by the method they end with."""
    toys = {n.removeprefix("toy/"): n for n in shipped() if n.startswith("toy/")}
    out = {n: _owner(n, read(recipe).data["method"]["name"], cards()) for n, recipe in toys.items()}
    return out | {alias: c.name for c in cards().values() for alias in c.aliases}


def card(name: str) -> Card:
    """One card, by its name, an alias or a toy recipe's name; RecipeError suggests the nearest name."""
    if name in cards():
        return cards()[name]
    if name not in other_names():
        hint = _close(name, [*cards(), *other_names()]) or "; see `fewstep methods ls`"
        raise RecipeError(f"method {name!r} has no card{hint}")
    return cards()[other_names()[name]]


_PLACE = re.compile(r"(fewstep/[\w/]+\.py)(?::([A-Za-z_][\w.]*))?")


@lru_cache
def definitions(file: str) -> dict[str, int]:
    """Line of each class, function and method of fewstep/FILE.py, by its dotted name."""
    found = {}

    def walk(body: list[ast.stmt], outer: str) -> None:
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found[outer + node.name] = node.lineno
                walk(node.body, f"{outer}{node.name}.")

    walk(ast.parse((_folder().parents[1] / file).read_text(encoding="utf-8")).body, "")
    return found


def places(c: Card) -> list[tuple[str, str, int | None]]:
    """(file, name, line) of what `code` points at; a file alone stands for the card's method if that is in it.

    Raises RecipeError for a name that the file does not define.
    """
    import fewstep.methods  # noqa: F401  registers them

    out = []
    method = REGISTRY["method"].get(c.name)
    for file, name in _PLACE.findall(c.code):
        lines = definitions(file)
        if name and name not in lines:
            raise RecipeError(f"{c.name}.yaml: code: {file} defines no {name!r}{_close(name, lines)}")
        if not name and method is not None and method.__name__ in lines:
            name = method.__name__
        out.append((file, name, lines.get(name)))
    return out


def _code(c: Card) -> str:
    found = iter(places(c))

    def told(_: re.Match[str]) -> str:
        file, name, line = next(found)
        return file if line is None else f"{file}:{line} {name}"

    return _PLACE.sub(told, c.code)


def _memory(c: Card) -> str:
    if c.networks is None:
        return c.memory
    held, trained = c.networks
    nets = f"{held} network{'s' * (held > 1)}, {trained} trained"
    return f"{nets}: {held}x weights, {trained}x gradients and moments; {c.memory}"


def show(name: str) -> str:
    """A card as text."""
    c = card(name)
    lines = [
        c.title,
        "",
        f"  equation   {c.equation}",
        f"  roles      {', '.join(c.roles)}",
        f"  needs      {c.needs}",
    ]
    lines += [f"  code       {_code(c)}", f"  memory     {_memory(c)}"]
    lines += [f"  covers     {', '.join(c.aliases)}"] if c.aliases else []
    lines += [f"  papers     {', '.join(f'arXiv {i}' for i in c.cites)}"]
    for title, rows in (
        ("differs from paper or official code", c.deviations),
        ("known failures", c.failures),
    ):
        if rows:
            lines += ["", f"  {title}", *(f"    - {row}" for row in rows)]
    if c.not_compared:
        lines += ["", f"  not compared: {c.not_compared}"]
    for i, r in enumerate(c.compared):
        lines += ["", "  compared with"] if i == 0 else []
        lines += [f"    - {r.reference}, {r.how}: {r.what}; largest difference {r.difference}"]
    lines += ["", "  paper's numbers" if c.paper_results else "  paper's numbers: none recorded"]
    lines += [f"    {r.setting}: {r.metric} {r.value} ({r.source})" for r in c.paper_results]
    lines += ["", "  our numbers" if c.our_results else "  our numbers: none measured yet"]
    lines += [f"    {_ours(r)}" for r in c.our_results]
    return "\n".join(lines)


def _ours(r: Ours) -> str:
    seeds = f"{r.seeds} seed{'s' * (r.seeds > 1)}"
    note = f"; {r.note}" if r.note else ""
    return f"{r.setting}: {r.metric} {r.value:g} (measured, {seeds}, {r.updates} updates, commit {r.commit}{note})"


def listing() -> list[dict[str, Any]]:
    """name, title, needs, aliases and cites of every card, and of methods registered so far that have none."""
    keys = ("name", "title", "needs", "aliases", "cites")
    rows: list[dict[str, Any]] = [{k: getattr(c, k) for k in keys} for c in cards().values()]
    bare = [n for n in REGISTRY.get("method", {}) if n not in cards()]
    rows += [{"name": n, "title": "(no card yet)", "needs": "", "aliases": (), "cites": ()} for n in bare]
    return sorted(rows, key=lambda row: str(row["name"]))


BUDGET = 1500
"""Student updates of a conformance run that names no other number."""


def _budget(updates: int) -> str:
    return "" if updates == BUDGET else f" at {updates:,} updates"


def table() -> str:
    """The methods as a Markdown table for README."""
    lines = ["| method | what | needs | paper | measured: energy distance x1000 |", "|---|---|---|---|---|"]
    for c in cards().values():
        papers = ", ".join(f"[{i}](https://arxiv.org/abs/{i})" for i in c.cites)
        toys = [r for r in c.our_results if r.metric == ENERGY]
        best = "; ".join(f"{r.setting} {r.value:g}{_budget(r.updates)}" for r in toys)
        lines.append(f"| `{c.name}` | {c.title} | {c.needs} | {papers} | {best} |")
    return "\n".join(lines)


def _cited(method: Any) -> list[str]:
    inner = [i for share in getattr(method, "methods", ()) for i in _cited(share.method)]
    parts = [i for part in vars(method).values() for i in getattr(part, "cites", ())]
    return [*method.cites, *parts, *inner]


def cite(recipe: str, settings: tuple[str, ...] = ()) -> str:
    """BibTeX of the papers behind every stage of a recipe, the last stage's first."""
    from fewstep.recipe.store import load

    stages = load(recipe, settings).stages()
    ids = list(dict.fromkeys(i for stage in reversed(stages) for i in _cited(stage.method)))
    known = yaml.load((_folder() / "bibliography.yaml").read_text(encoding="utf-8"), FAST_LOADER)
    return "\n\n".join(_entry(i, known.get(i)) for i in ids)


def _entry(arxiv: str, known: list[str] | None) -> str:
    year = f"20{arxiv[:2]}"
    key, author, title = known or (f"arxiv{arxiv.replace('.', '_')}", None, None)
    fields = {"author": author, "title": f"{{{title}}}" if title else None, "year": year, "eprint": arxiv}
    fields |= {"archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{arxiv}"}
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@misc{{{key},\n{body}\n}}"
