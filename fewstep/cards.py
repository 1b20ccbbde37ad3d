"""Method cards: what each method is, where it is, how it differs from its paper. Data beside the methods."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from fewstep.config import REGISTRY, RecipeError, _close, config
from fewstep.recipe import load


@config
class Claim:
    """A published number."""

    setting: str
    metric: str
    value: str
    source: str = "paper"


@config
class Ours:
    """A number of a run of this code."""

    setting: str
    """Recipe and what was changed."""
    metric: str
    value: float
    seeds: int = 1
    updates: int
    """Student updates of the last stage."""
    commit: str
    note: str = ""


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
    deviations: tuple[str, ...]
    paper_results: tuple[Claim, ...] = ()
    our_results: tuple[Ours, ...] = ()
    memory: str
    failures: tuple[str, ...] = ()


def _folder() -> Path:
    return Path(str(files("fewstep.methods")))


@lru_cache(maxsize=1)
def cards() -> dict[str, Card]:
    """Every card by name. Raises RecipeError naming the file of a card that does not fit."""
    out = {}
    for path in sorted((_folder() / "cards").glob("*.yaml")):
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        for claim in data.get("paper_results") or ():
            claim["value"] = str(claim["value"])
        try:
            card = TypeAdapter(Card).validate_python(data, strict=False)
        except ValidationError as error:
            raise RecipeError(f"{path.name}: {error}") from None
        out[card.name] = card
    for name, result in conformance(frozenset(out)):
        out[name] = replace(out[name], our_results=(*out[name].our_results, result))
    return out


def conformance(names: frozenset[str]) -> list[tuple[str, Ours]]:
    """(card, number) of every line of assets/conformance.jsonl, which `make conformance` writes.

    A recipe belongs to the card of its own name (toy/multi-student), else to that of its method.
    """
    path = Path(str(files("fewstep.assets"))) / "conformance.jsonl"
    found = []
    for line in path.read_text().splitlines():
        r = json.loads(line)
        own = r["recipe"].split("/")[-1].replace("-", "_")
        steps = f"{r['calls']} step{'s' * (r['calls'] > 1)}"
        result = Ours(
            setting=r["recipe"] + " (guided, so not at the ring)" * r["guided"],
            metric="energy distance x1000",
            value=round(r["energy"], 2),
            updates=r["updates"],
            commit=r["commit"],
            note=f"{steps}; {r['initial']:.3g} at the start",
        )
        found.append((own if own in names else r["method"], result))
    return found


def card(name: str) -> Card:
    """One card; RecipeError suggests the nearest name."""
    if name not in cards():
        hint = _close(name, cards()) or "; see `fewstep methods ls`"
        raise RecipeError(f"method {name!r} has no card{hint}")
    return cards()[name]


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
    lines += [f"  code       {c.code}", f"  memory     {c.memory}"]
    lines += [f"  papers     {', '.join(f'arXiv {i}' for i in c.cites)}"]
    for title, rows in (
        ("differs from paper or official code", c.deviations),
        ("known failures", c.failures),
    ):
        if rows:
            lines += ["", f"  {title}", *(f"    - {row}" for row in rows)]
    lines += ["", "  paper's numbers" if c.paper_results else "  paper's numbers: none recorded"]
    lines += [f"    {r.setting}: {r.metric} {r.value} ({r.source})" for r in c.paper_results]
    lines += ["", "  our numbers" if c.our_results else "  our numbers: none measured yet"]
    lines += [f"    {_ours(r)}" for r in c.our_results]
    return "\n".join(lines)


def _ours(r: Ours) -> str:
    seeds = f"{r.seeds} seed{'s' * (r.seeds > 1)}"
    note = f"; {r.note}" if r.note else ""
    return f"{r.setting}: {r.metric} {r.value:g} (measured, {seeds}, {r.updates} updates, commit {r.commit}{note})"


def listing() -> list[tuple[str, str, str]]:
    """(name, title, needs) of every card, and of methods that have none."""
    rows = [(c.name, c.title, c.needs) for c in cards().values()]
    rows += [(n, "(no card yet)", "") for n in REGISTRY["method"] if n not in cards()]
    return sorted(rows)


BUDGET = 1500
"""Student updates of a conformance run that names no other number."""


def _budget(updates: int) -> str:
    return "" if updates == BUDGET else f" at {updates:,} updates"


def table() -> str:
    """The methods as a Markdown table for README."""
    lines = ["| method | what | needs | paper | measured: energy distance x1000 |", "|---|---|---|---|---|"]
    for c in cards().values():
        papers = ", ".join(f"[{i}](https://arxiv.org/abs/{i})" for i in c.cites)
        best = "; ".join(f"{r.setting} {r.value:g}{_budget(r.updates)}" for r in c.our_results)
        lines.append(f"| `{c.name}` | {c.title} | {c.needs} | {papers} | {best} |")
    return "\n".join(lines)


def _cited(method: Any) -> list[str]:
    inner = [i for share in getattr(method, "methods", ()) for i in _cited(share.method)]
    return [*method.cites, *inner]


def cite(recipe: str, settings: tuple[str, ...] = ()) -> str:
    """BibTeX of the papers behind every stage of a recipe, the last stage's first."""
    stages = load(recipe, settings).stages()
    ids = list(dict.fromkeys(i for stage in reversed(stages) for i in _cited(stage.method)))
    known = yaml.safe_load((_folder() / "bibliography.yaml").read_text(encoding="utf-8"))
    return "\n\n".join(_entry(i, known.get(i)) for i in ids)


def _entry(arxiv: str, known: list[str] | None) -> str:
    year = f"20{arxiv[:2]}"
    key, author, title = known or (f"arxiv{arxiv.replace('.', '_')}", None, None)
    fields = {"author": author, "title": f"{{{title}}}" if title else None, "year": year, "eprint": arxiv}
    fields |= {"archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{arxiv}"}
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@misc{{{key},\n{body}\n}}"
