"""A fit's card with the loop that draws from it, and its export: the teacher's pipeline at the fitted levels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fewstep.algebra.guidance import Guided
from fewstep.algebra.sampling import Sampler
from fewstep.export.base import ExportRefused, Parts, Rows
from fewstep.export.card import plain
from fewstep.export.latent import latent_parts, wrapped
from fewstep.export.unet import unet_parts
from fewstep.train.fitted import Fitted
from fewstep.train.product import Product

LOOP = """import torch

# One call a level. D(x, i) is the network's x0 for states x (b, ...) at noise level i, guidance inside; a diffusers
# network that predicts eps has x0 = (x - sigma[i] * eps) / alpha[i], one of a flow's velocity x - sigma[i] * v.
alpha = {alpha}
sigma = {sigma}
history = {history}

@torch.no_grad()
def draw(D, noise):
    x, before = {start} * noise, None
    for i in range({calls}):
        x0 = D(x, i)
        used = x0 if before is None else x0 + history[i] * (x0 - before)
        if i + 1 == {calls}:
            return used
        eps = (x - alpha[i] * used) / sigma[i]
        x, before = alpha[i + 1] * used + sigma[i + 1] * eps, x0"""

CARD = """# {title}

Samplers of {calls} network calls, fitted to a frozen teacher without training by
[fewstep](https://github.com/fewstep/fewstep): levels by optimal stepsizes
(arXiv 2503.21774){by}.

| | |
|---|---|
| teacher | {teacher} |
| guidance scale of the fit; it holds there only | {guidance:g} |
| calibration | {noises} noises of seed {seed}, {points} points |
| what it took | {spent:,} network calls of one sample, {seconds:.1f} s of processor time |

{table}
```sh
fewstep sample {folder} --steps {most}
fewstep eval {folder} --steps {all}
```

The same without fewstep, {most} calls:

```python
{loop}
```
"""
BY = {"ddim": " and a weight of history a step (D-ODE, arXiv 2309.16421)", "2m": ", with DPM-Solver++(2M) on them"}


def loop_of(process: Any, sampler: Sampler) -> str:
    """The loop of the card in plain torch."""
    calls = len(sampler.steps)
    t = process.grid(torch.tensor(sampler.steps, dtype=torch.float64))
    return LOOP.format(
        alpha=process.alpha(t).tolist(),
        sigma=process.sigma(t).tolist(),
        history=list(sampler.history or (0.0,) * calls),
        start=float(process.prior(torch.ones(1, dtype=torch.float64), t[:1])),
        calls=calls,
    )


def fit_card(product: Product, fitted: Fitted, folder: str) -> str:
    """README.md of a fit's folder; `folder` is how it is named there."""
    most = max(fitted.counts)
    return CARD.format(
        title=plain(product.title),
        calls=", ".join(map(str, fitted.counts)),
        by=BY[fitted.solver] if any(s.history for s in fitted.samplers) else "",
        teacher=plain(fitted.source or "that of recipe.yaml"),
        guidance=fitted.guidance,
        noises=fitted.noises,
        seed=fitted.seed,
        points=fitted.points,
        spent=fitted.calls,
        seconds=fitted.seconds,
        table=_table(fitted),
        folder=folder,
        most=most,
        all=",".join(map(str, fitted.counts)),
        loop=loop_of(product.net.process, fitted.at(most)),
    )


def _table(fitted: Fitted) -> str:
    if not fitted.rows:
        return ""
    lines = ["| calls | sampler | " + plain(fitted.rows[0]["metric"]) + " |", "|---|---|---|"]
    for r in fitted.rows:
        error = "" if r["error"] is None else f" ± {r['error']:.2g}"
        lines.append(f"| {r['calls']} | {plain(r['name'])} | {r['value']:.3g}{error} |")
    return "\n".join([*lines, f"\n{fitted.rows[0]['samples']} samples each; ± one standard error.\n"])


EXPORTED = """---
library_name: diffusers
tags: [fewstep, few-step]
---
# {title}

A sampler of {calls} network calls, fitted to a frozen teacher without training by
[fewstep](https://github.com/fewstep/fewstep). It is the teacher's weights in a stock `{pipeline}` with
other levels; fewstep is not needed to run it.

```python
{usage}
```

| | |
|---|---|
| guidance scale of the fit; it holds there only | {guidance:g} |
| history | {history} |
| largest difference from fewstep's own sampler, same noise, without guidance | {parity:.2e} |
{rows}"""


def fitted_parts(product: Product) -> Parts:
    """The teacher's pipeline at the levels of a fit's sampler; ExportRefused where it takes none.

    What is compared is unguided: guidance is the pipeline's own, and an affine combination of answers before a step.
    """
    assert product.fitted is not None
    scale, net = product.fitted.guidance, product.net
    bare = replace(product, net=net.denoiser if isinstance(net, Guided) else net)
    loop = "the loop that draws it is in the fit's README.md"
    if not wrapped(bare.net):
        if scale != 1:
            raise ExportRefused(f"no stock pipeline guides a UNet2DModel, and this fit is of guidance {scale:g}; {loop}")
        if getattr(bare.net, "prediction", "") == "cm" and len(product.sampler.steps) > 1:
            raise ExportRefused(f"no stock scheduler takes DDIM steps in the parametrisation 'cm' of its teacher; {loop}")
        return unet_parts(bare, fitted_card)
    wrapper: Any = getattr(bare.net, "net", None)
    if getattr(wrapper, "levels", None) == "" and len(product.sampler.steps) > 1:
        raise ExportRefused(f"{wrapper.pipeline} takes no levels of its own; {loop}")
    if scale != 1 and wrapper.takes_scale:
        raise ExportRefused(f"{wrapper.pipeline} takes its scale as an input and does not guide beside it; {loop}")
    return latent_parts(bare, card=fitted_card, settings={} if scale == 1 else {"guidance_scale": scale})


def fitted_card(product: Product, pipeline: str, usage: str, parity: float, results: Rows) -> str:
    """The card of an exported fit."""
    assert product.fitted is not None
    return EXPORTED.format(
        title=plain(product.title),
        calls=len(product.sampler.steps),
        pipeline=pipeline,
        usage=usage,
        guidance=product.fitted.guidance,
        history="DPM-Solver++(2M)" if product.sampler.history else "none",
        parity=parity,
        rows="".join(f"| {plain(name)} | {plain(value)} |\n" for name, value in results),
    )
