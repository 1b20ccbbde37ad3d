"""PNG pictures: grids of images, scatter plots of vectors. Written aside and renamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.config import UserError
from fewstep.eval.protocol.images import to_pixels
from fewstep.files import atomic_path

CELL = 64
"""Pixels of a cell's side at least, by a whole factor."""


def tile(x: Tensor, per_row: int) -> Tensor:
    """Images (n, c, h, w) as one (c, rows h, per_row w), empty places white."""
    n, c, h, w = x.shape
    rows = -(-n // per_row)
    canvas = torch.full((rows * per_row, c, h, w), 1.0, dtype=x.dtype)
    canvas[:n] = x
    return canvas.reshape(rows, per_row, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, per_row * w)


def in_colour(x: Tensor) -> Tensor:
    """Images (n, c, h, w) in three channels: grey in all, of latents without a VAE at hand the first."""
    return x[:, :3] if x.shape[1] > 3 else x[:, :1].expand(-1, 3, -1, -1) if x.shape[1] < 3 else x


def require_finite(x: Tensor, what: str) -> None:
    """UserError for samples (n, ...) that hold NaN or infinity, which a picture would show as black; `what` drew them."""
    bad = int((~torch.isfinite(x).flatten(1).all(1)).sum())
    if bad:
        raise UserError(
            f"{what}: {bad} of {len(x)} samples are not finite; nothing was written. Its training diverged: train again "
            "with a lower learning rate"
        )


def save_picture(picture: Any, path: Path) -> None:
    """A Pillow picture as a file, whole or not at all."""
    with atomic_path(path) as temporary:
        picture.save(temporary)


def _image(x: Tensor, per_row: int, scale: int) -> Any:
    from PIL import Image

    if x.shape[1] not in (1, 3):  # latents without a VAE at hand: their first channels
        x = x[:, : 3 if x.shape[1] > 3 else 1]
    framed = F.pad(x.cpu(), (1, 0, 1, 0), value=-0.4)  # a thin line between neighbours
    pixels = to_pixels(tile(framed, per_row)).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def save_grid(x: Tensor, path: Path, per_row: int = 10) -> None:
    """Samples as one PNG: images (n, c, h, w) in [-1, 1] as a grid, vectors (n, 2) as a scatter plot, chains (n, m, d).

    Of latents, with neither 1 nor 3 channels, the first channels are shown as they are.
    """
    if x.ndim in (2, 3):
        (save_scatter if x.ndim == 2 else save_chains)([("samples", x)], path)
        return
    save_picture(_image(x, per_row, max(1, CELL // x.shape[-1])), path)


def beside(product: Any, x: Tensor) -> Tensor:
    """Samples of a product (n, c, h, w), each between what it was made from and the truth, (3n, c, h, w).

    Samples that are made from no picture stay as they are.
    """
    if product.paired is None or x.ndim != 4:
        return x
    pairs = product.paired(len(x))
    given = F.interpolate(pairs.given, x.shape[-2:], mode="nearest")
    given = given[:, : x.shape[1]] if given.shape[1] >= x.shape[1] else given[:, :1].expand(-1, x.shape[1], -1, -1)
    return torch.stack((given, x, pairs.truth), 1).flatten(0, 1)


def save_side_by_side(sets: Sequence[tuple[str, Tensor]], path: Path, per_row: int = 10) -> None:
    """Several sets of samples from the same noise, one titled panel each."""
    if sets[0][1].ndim in (2, 3):
        (save_scatter if sets[0][1].ndim == 2 else save_chains)(sets, path)
        return
    from PIL import Image, ImageDraw, ImageFont

    panels = [_image(x, per_row, max(1, CELL // x.shape[-1])) for _, x in sets]
    gap, top = 12, 22
    width = sum(p.width for p in panels) + gap * (len(panels) + 1)
    sheet = Image.new("RGB", (width, panels[0].height + top + gap), "white")
    draw, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(13), gap
    for (title, _), panel in zip(sets, panels, strict=True):
        draw.text((left, 4), title, fill="black", font=font)
        sheet.paste(panel, (left, top))
        left += panel.width + gap
    save_picture(sheet, path)


def save_scatter(sets: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """Vectors (n, 2), one panel a set, common axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(sets), figsize=(4 * len(sets), 4), squeeze=False)
    for axis, (title, x) in zip(axes[0], sets, strict=True):
        axis.scatter(x[:, 0].cpu(), x[:, 1].cpu(), s=2, alpha=0.5)
        axis.set(title=title, xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    _save_figure(figure, path)


CHAINS = 8
"""Chains that a panel shows."""


def save_chains(sets: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """Chains of points (n, m, d), the first CHAINS of each set seen along their last axes, one row a set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(sets), CHAINS, figsize=(2 * CHAINS, 2.2 * len(sets)), squeeze=False)
    for row, (title, x) in zip(axes, sets, strict=True):
        for axis, chain in zip(row, [*x[:CHAINS].cpu(), *[None] * CHAINS], strict=False):
            axis.axis("off")
            if chain is not None:
                there = chain[: int((chain != 0).any(-1).nonzero().amax()) + 1] if chain.any() else chain[:1]
                axis.plot(there[:, 0], there[:, 1], "-o", ms=2, lw=1)
                axis.set_aspect("equal", adjustable="datalim")
        row[0].set_title(title, loc="left")
    _save_figure(figure, path)


def _save_figure(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    try:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=80, bbox_inches="tight")
    finally:
        plt.close(figure)
