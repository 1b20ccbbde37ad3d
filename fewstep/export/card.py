"""The model card of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fewstep import __version__

TEMPLATE = """---
library_name: diffusers
tags: [fewstep, {method}, few-step]
---
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

```yaml
{recipe}
```
</details>
"""


def model_card(facts: Mapping[str, Any], recipe: str, results: Sequence[tuple[str, str]] = ()) -> str:
    """Fill the template; `results` are further (name, value) rows, as measured."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in results)
    yaml.safe_load(recipe)  # a card never carries a recipe that does not parse
    return TEMPLATE.format(**facts, rows=rows, recipe=recipe.strip())


TEACHER = """---
library_name: diffusers
tags: [fewstep, teacher]
---
# {title}

{about}. Trained for {done} steps with [fewstep](https://github.com/fewstep/fewstep); weights in fp16
safetensors. A recipe uses it with `teacher: {{name: diffusers, path: FOLDER}}`; process and prediction are
those of `scheduler/scheduler_config.json`. The last class embedding is the null class.

| | |
|---|---|
| made by | `fewstep run` with the recipe below, fewstep {version} |
| samples drawn with | Heun (arXiv 2206.00364, alg. 1), labels in turn |
{rows}
<details><summary>recipe</summary>

```yaml
{recipe}
```
</details>
"""


def teacher_card(title: str, about: str, recipe: str, results: Sequence[tuple[str, str]], done: int) -> str:
    """The card of a teacher trained here."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in results)
    return TEACHER.format(
        version=__version__, title=title, about=about, done=done, rows=rows, recipe=recipe.strip()
    )


def usage(pipeline: str, folder: str, call: str) -> str:
    """Three lines of plain diffusers code."""
    return (
        f"from diffusers import {pipeline}\n"
        f'pipe = {pipeline}.from_pretrained("{folder}")\n'
        f'pipe({call}).images[0].save("sample.png")'
    )
