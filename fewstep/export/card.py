"""Model cards of exports and the lines of code on them."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from fewstep import __version__
from fewstep.export.base import Rows
from fewstep.networks import hub
from fewstep.networks.folder import Folder
from fewstep.recipe.store import dump
from fewstep.train.product import Product

Card = Callable[[Product, str, str, float, Rows], str]
"""A card from the product, the pipeline's class, the lines that run it, the parity and measured rows."""

TEMPLATE = """---
library_name: diffusers
tags: [fewstep, {method}, few-step]
{front}---
# {title}

{about}

A {calls}-call generator made by [fewstep](https://github.com/fewstep/fewstep) with the method `{method}`
({cites}). It is a stock `{pipeline}`; fewstep is not needed to run it.

```python
{usage}
```

| | |
|---|---|
| noise levels (sigma / alpha), first to last | {sigmas} |
| largest difference from fewstep's own sampler, same noise | {parity:.2e} |
| steps trained | {done} |
{rows}
<details><summary>recipe</summary>

{fence}yaml
{recipe}
{fence}
</details>
"""


def student_card(
    product: Product,
    pipeline: str,
    usage: str,
    parity: float,
    results: Rows,
    front: Mapping[str, str] | None = None,
    told: Rows = (),
) -> str:
    """The card of a student; `pipeline` is what its stock class is called, `results` are rows as measured.

    front: further keys of what the hub reads above the text. told: rows above the measured ones.
    """
    assert product.recipe is not None
    recipe = dump(replace(product.recipe, expected=None))
    yaml.safe_load(recipe)  # a card never carries a recipe that does not parse
    method: Any = product.recipe.method
    process: Any = product.net.process
    t = process.grid(torch.tensor(product.sampler.steps, dtype=torch.float64))
    return TEMPLATE.format(
        title=plain(product.title),
        about=plain(product.recipe.about),
        method=method.name,
        front="".join(f"{key}: {json.dumps(value)}\n" for key, value in (front or {}).items()),
        cites=", ".join(f"arXiv {c}" for c in method.cites),
        calls=len(product.sampler.steps),
        sigmas=", ".join(f"{s:.6g}" for s in (process.sigma(t) / process.alpha(t)).tolist()),
        done=product.done,
        pipeline=pipeline,
        usage=usage,
        parity=parity,
        rows=table([*told, *results]),
        recipe=recipe.strip(),
        fence=fenced(recipe),
    )


TEACHER = """---
library_name: diffusers
tags: [fewstep, teacher]
---
# {title}

{about}. Trained for {done} steps with [fewstep](https://github.com/fewstep/fewstep); weights in fp16
safetensors. A recipe uses it with `teacher: {{name: diffusers, path: FOLDER}}`; process and prediction are
those of `scheduler/scheduler_config.json`.{null}

| | |
|---|---|
| made by | `fewstep run` with the recipe below, fewstep {version} |
| samples drawn with | Heun (arXiv 2206.00364, alg. 1), labels in turn |
| largest difference of its x0 from that of the float32 network | {parity:.1e} |
{rows}
<details><summary>recipe</summary>

{fence}yaml
{recipe}
{fence}
</details>
"""


def teacher_card(product: Product, usage: str, parity: float, results: Rows) -> str:
    """The card of a teacher trained here, which says how a recipe names it whatever `usage` is."""
    assert product.recipe is not None
    recipe = dump(replace(product.recipe, expected=None))
    return TEACHER.format(
        version=__version__,
        null=" The last class embedding is the null class." if product.classes else "",
        title=plain(product.title),
        about=plain(product.recipe.about),
        done=product.done,
        parity=parity,
        rows=table(results),
        recipe=recipe.strip(),
        fence=fenced(recipe),
    )


_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def front_of(source: Folder, video: bool, text: bool, picture: bool = False) -> dict[str, str]:
    """What the hub reads of a student of this teacher: its task, and licence and base where the teacher's folder says.

    picture: its pipeline is handed one, with or without text. The licence is that of the teacher's README; the base is
    the hub's name that the teacher goes by, or that its index or the network's config was saved under.
    """
    task = "image-to-image" if picture else f"text-to-{'video' if video else 'image'}"
    out = {"pipeline_tag": task} if text or picture else {}
    repo = hub.repository(source.shown)
    ids = [repo.name if repo else "", *(str(told.get("_name_or_path", "")) for told in (source.index, source.config))]
    base = next((name for name in ids if re.fullmatch(_HUB_ID, name) and not Path(name).exists()), None)
    if base:
        out["base_model"] = base
    readme = source.root / "README.md"
    text_of_it = readme.read_text(errors="replace")[:20_000] if readme.is_file() else ""
    for key in ("license", "license_name", "license_link"):
        found = re.search(rf"^{key}: *['\"]?([\w./:-]+)['\"]? *$", text_of_it.partition("\n---")[0], re.M)
        if found and text_of_it.startswith("---"):
            out[key] = found[1]
    return out


def table(results: Rows) -> str:
    """Rows of Markdown."""
    return "".join(f"| {plain(name)} | {plain(value)} |\n" for name, value in results)


def plain(text: object) -> str:
    """Text for one line of Markdown, in a cell too, that opens no tag, link, picture, code or table cell."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`\[\]|])", r"\\\1", line)


def fenced(text: str, least: int = 3) -> str:
    """The backticks around code that nothing in the text closes; `least` is 3 for a block and 1 within a line."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def usage(pipeline: str, call: Mapping[str, Any], folder: str, variant: str = "", also: str = "", then: str = "") -> str:
    """Three lines of plain diffusers code; of a video they save the first frame.

    also: another class to import. then: lines between opening and drawing.
    """
    start = "import torch\n" if any(isinstance(v, Code) for v in call.values()) else ""
    return f"{start}{opening(pipeline, folder, variant, also, then)}{drawing(call)}"


def opening(pipeline: str, folder: str, variant: str = "", also: str = "", then: str = "") -> str:
    """The lines that make `pipe` of a folder, each with its end."""
    named = f', variant="{variant}"' if variant else ""
    classes = f"{pipeline}, {also}" if also else pipeline
    load = f'from diffusers import {classes}\npipe = {pipeline}.from_pretrained("{folder}"{named})\n'
    return load + (f"{then}\n" if then else "")


def drawing(call: Mapping[str, Any]) -> str:
    """The line that draws a picture from `pipe` and saves it."""
    video = bool({"num_frames", "frames"} & {*call})
    more, drawn = (', output_type="pil"', "frames[0][0]") if video else ("", "images[0]")
    return f'pipe({as_code(call)}{more}).{drawn}.save("sample.png")'


class Code(str):
    """An argument that stands in code as it is; it may use torch."""


def as_code(call: Mapping[str, Any]) -> str:
    """The arguments of a call as they stand in code."""
    return ", ".join(f"{k}={_literal(v)}" for k, v in call.items())


def _literal(value: Any) -> str:
    if isinstance(value, Code):
        return value
    return json.dumps(value) if isinstance(value, str) else repr(value)
