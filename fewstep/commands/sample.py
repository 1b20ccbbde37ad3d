"""`fewstep sample`: a grid of samples as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.commands.assisting import parse_assist, with_assist
from fewstep.commands.options import check_sheet, parse_classes
from fewstep.commands.path import draw_path
from fewstep.commands.pictures import beside, require_finite, save_grid
from fewstep.commands.report import console, opened
from fewstep.config import UserError
from fewstep.train.fitted import is_fit


def draw(
    path: Path,
    steps: int | None,
    classes: str | None,
    count: int,
    seed: int,
    out: Path,
    any_steps: bool,
    prompts: Sequence[str] = (),
    teacher: int | None = None,
    guidance: float | None = None,
    assist: str | None = None,
    steps_shown: bool = False,
    negative: str | None = None,
    nasa: float | None = None,
    encoder: Path | None = None,
) -> Path:
    """`fewstep sample`: a PNG grid; with prompts a sheet of them, see `sample_text`; or one of x0 at every step."""
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: must end in .png")
    if (negative is None) != (nasa is None) or (negative is not None and not prompts):
        raise UserError("--negative TEXT and --nasa WEIGHT: belong together, with --prompt; weights are .1 to .5")
    if nasa is not None and not 0 <= nasa <= 2:
        raise UserError(f"--nasa {nasa:g}: expected a weight in [0, 2]; published are .1 to .5")
    if prompts:
        from fewstep.commands.sample_text import draw_prompts

        if classes is not None:
            raise UserError("--classes: samples are of classes or of prompts; leave one out")
        if assist is not None or steps_shown:
            raise UserError("--assist and --path: are for samples of a run's own conditions; leave out the prompts")
        away = None if negative is None or nasa is None else (negative, nasa)
        return draw_prompts(path, prompts, out, steps, any_steps, seed, teacher, guidance, away, encoder)
    if encoder is not None:
        raise UserError("--encoder: reads prompts, which --prompt or --prompts give")
    fitted = is_fit(path)
    if (teacher is not None and not steps_shown) or (guidance is not None and not fitted):
        raise UserError("--teacher and --guidance: are for samples of prompts (--prompt, --prompts) or --path")
    product = opened(path).with_steps(steps, any_steps)
    if product.fitted is not None:
        product.fitted.check_guidance(guidance, "--guidance")
    check_sheet(count, product.picture_shape())
    labels, per_row = None, 10
    if product.paired is not None and classes is not None:
        raise UserError("--classes: these samples are made from the data's pictures; leave it out")
    if product.classes and product.paired is None:
        wanted = parse_classes(classes or f"0-{product.classes - 1}", product.classes)
        labels = torch.tensor([wanted[i % len(wanted)] for i in range(count)])
        per_row = min(len(wanted), 10)
    elif classes is not None:
        parse_classes(classes, 0)
    if steps_shown:
        if assist is not None:
            raise UserError("--path: shows a student's own steps; leave out --assist")
        return draw_path(product, product.labels(count) if labels is None else labels, count, seed, out, teacher)
    if assist is not None:
        product = with_assist(product, parse_assist(assist))
    x = product.draw(count, seed, labels)
    require_finite(x, str(path))
    sheet = beside(product, x)
    save_grid(sheet, out, min(per_row, count) if sheet is x else min(12, 3 * count))
    taken = len(product.sampler.steps)
    helped = "" if product.assist is None else f" with {product.assist.part.name}, {product.network_calls():g} calls each"
    console.print(f"{count} sample{'s' * (count > 1)} in {taken} step{'s' * (taken > 1)}{helped}: {out}", soft_wrap=True)
    return out


def read_prompts_of(prompt: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the options --prompt and --prompts, in this order."""
    from fewstep.data.text import read_prompts

    for text in prompt:
        if any("\ud800" <= c <= "\udfff" for c in text):  # how Python shows bytes that are no UTF-8
            raise UserError(f"--prompt {text!r}: holds a byte that is no UTF-8")
    return [*prompt, *(read_prompts(file) if file is not None else [])]
