"""`fewstep new --data`: a teacher of pixels from scratch, and its student, sized by the pictures and their number."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewstep.commands.new_lines import Lines, levels, one_of, power_below, quoted
from fewstep.config import UserError
from fewstep.data.reader import split
from fewstep.pictures import SUFFIXES, PictureError, class_names, facts, list_pictures, renumbered

METHODS = ("dmd2", "sid", "consistency")
LARGEST = 128
"""Side in pixels up to which pictures of one size are trained as they are."""
HELD_OUT = 0.1
"""Share of the pictures that is measured against, where there are enough."""
GREY = ("grey", "12-bit grey", "16-bit grey", "16-bit grey, white at 0", "black and white")
"""Kinds of pictures with one channel."""


@dataclass(frozen=True)
class Pictures:
    """What a folder holds: how many pictures, of what shape (c, h, w) as they are trained, in how many classes (0: none).

    size: the side to which they are resized, with the reason why; None where they stay as they are.
    renumber: which class folder has another label than its number, with a teacher that is trained on that order.
    """

    path: Path
    count: int
    shape: tuple[int, int, int]
    classes: int
    size: tuple[int, str] | None = None
    renumber: str = ""

    @property
    def few(self) -> bool:
        """So few that a discriminator learns them by heart."""
        return self.count < 500

    @property
    def held_out(self) -> int:
        """How many are kept from training, to be measured against; 0 where all are needed."""
        return 0 if self.few else len(split(self.count, HELD_OUT, str(self.path))[1])

    def lines(self) -> Lines:
        """The recipe's data."""
        kinds = f"{self.classes} sub-folders, its classes" if self.classes else "no classes"
        grey = [("  grey: true", "all that were looked at have one channel")] if self.shape[0] == 1 else []
        kept = "spread evenly, never trained on: what the run is measured against"
        return [
            ("data:", f"--data: {self.count} pictures, trained at {self.shape[1]} x {self.shape[2]}, {kinds}"),
            ("  name: images", "a folder of pictures; `fewstep explain data.images`"),
            (f"  path: {quoted(self.path)}", "--data"),
            *([(f"  size: {self.size[0]}", self.size[1])] if self.size else []),
            *([("  renumber: true", self.renumber)] if self.renumber else []),
            *grey,
            *([(f"  held_out: {HELD_OUT}", f"{self.held_out} pictures, {kept}")] if self.held_out else []),
        ]

    def evaluation(self) -> Lines:
        """What is measured at the end of the run."""
        real = self.held_out or self.count
        told = "held out" if self.held_out else "that it was trained on, as there are few"
        few = ", too few for a small error: read KID" if real < 2000 else ""
        return [
            ("evaluate:", "at the end, student beside teacher; `fewstep eval` measures the run again later"),
            ("  metric: fd", "Frechet distance, KID, precision and recall on EfficientNet-lite0's features"),
            ("  against: data", f"the {real} pictures {told}{few}"),
            (f"  samples: {max(100, min(2000, real))}", "as many as there are real ones, from 100 to 2000, ours"),
            ("  teacher_steps: [1, 8]", "Heun steps at which the teacher is measured, ours"),
        ]


def look(path: Path, as_they_are: bool = False) -> Pictures:
    """Read the headers of a folder of pictures; UserError names what cannot be used.

    as_they_are: for a teacher that there is already; pictures of another size than its own are then resized by hand.
    """
    if path.is_file():
        raise UserError(f"--data {path}: is a file; name the folder of the pictures")
    try:
        listing = list_pictures(path)
        classes = class_names(listing)
        seen = [facts(file, file) for file in listing.files]
    except PictureError as error:
        raise UserError(f"--data {error}") from None
    if not seen:
        raise UserError(f"--data {path}: no pictures ({', '.join(SUFFIXES)}) in it")
    renumber = "" if as_they_are else renumbered(classes, listing.folders)
    channels = 1 if all(kind in GREY for _, _, kind in seen) else 3
    sizes = {(h, w) for h, w, _ in seen}
    h, w = next(iter(sizes))
    halved = not (h % 2 or w % 2) and min(h, w) >= 8
    if len(sizes) == 1 and (as_they_are or (max(h, w) <= LARGEST and halved)):
        return Pictures(path, len(seen), (channels, h, w), len(classes), renumber=renumber)
    least = min(min(size) for size in sizes)
    side = next((s for s in (64, 32, 16, 8) if s <= least), None)
    if side is None:
        raise UserError(f"--data {path}: the smallest picture has {least} pixels, a UNet needs 8; leave such ones out")
    kinds = f"{len(sizes)} sizes, the smallest side {least}" if len(sizes) > 1 else f"all {h} x {w}"
    why = f"{kinds}; the middle square, a side that a network of pixels learns on one machine, ours"
    return Pictures(path, len(seen), (channels, side, side), len(classes), (side, why), renumber)


def teacher(found: Pictures) -> Lines:
    """The recipe of the teacher."""
    side = min(found.shape[1:])
    depth = _depth(found)
    base = 32 if found.count < 5_000 else 64 if found.count < 50_000 else 96
    width = [base * (i + 1) for i in range(depth)]
    steps = 3000 if side <= 16 else 8000 if side <= 32 else 20_000
    batch = power_below(min(128 if side <= 32 else 64, found.count))
    tried = "digits-teacher's" if side <= 16 else "fashion-teacher's" if side <= 32 else "ours, not measured at this size"
    return [
        (f"about: {quoted(f'teacher of {found.path.name}, pixels from scratch, EDM')}", "written by `fewstep new`"),
        *found.lines(),
        ("student:", "what is trained, here the teacher itself"),
        ("  name: unet2d", "its export opens in plain diffusers and is what the student's recipe reads"),
        (f"  channels: {width}", f"{depth} levels: {side} pixels are halved to {side >> (depth - 1)}; "
         f"{base} wide for {found.count} pictures, ours"),
        (f"  layers: {1 if side <= 32 else 2}", "as the shipped teachers of up to 32 pixels; 2 above, ours"),
        (f"  attention: {str(side >= 32).lower()}", "ours: from 32 pixels on, where distant parts must agree"),
        ("method:", "denoising score matching"),
        ("  name: denoise", "EDM, arXiv 2206.00364, eq. 2"),
        ("  times: {name: lognormal, mean: -1.0, std: 1.3}", "fashion-teacher's; EDM's own is -1.2, 1.2 (table 1)"),
        ("  weight: edm", "EDM, table 1"),
        (f"  drop_cond: {0.1 if found.classes else 0.0}", "share without class, which guidance needs (arXiv 2207.12598)"
         if found.classes else "there are no classes to drop"),
        ("  sample_steps: 18", "fashion-teacher's: Heun steps of its sample grids"),
        ("optim:", "of the one network"),
        ("  student: {lr: 1e-3, warmup: 200, decay: cosine}", "fashion-teacher's"),
        ("train:", "length and batch"),
        (f"  steps: {steps}", tried),
        (f"  batch: {batch}", f"at most {found.count}, the number of pictures"),
        ("  ema: [0.999]", "fashion-teacher's"),
        (f"  checkpoint_every: {steps // 10}", "a tenth of the run"),
        (f"  sample_every: {steps // 5}", "a fifth of the run"),
        *found.evaluation(),
    ]  # fmt: skip


def _depth(found: Pictures) -> int:
    """Levels of the UNet: sides are halved while they stay whole and at least 4, three times at most."""
    depth, (h, w) = 1, found.shape[1:]
    while depth < 4 and not (h % 2 or w % 2) and min(h, w) >= 8:
        depth, h, w = depth + 1, h // 2, w // 2
    if depth == 1:
        raise UserError(
            f"--data {found.path}: pictures of {found.shape[1]} x {found.shape[2]} cannot be halved; a UNet needs even "
            "sides of 8 or more"
        )
    return depth


def student(found: Pictures, folder: str, where: str, method: str, steps: int, table: int | None = None) -> Lines:
    """The recipe of the student.

    Args:
        folder: the teacher's.
        where: where that folder comes from, for the comment.
        table: length of the teacher's table of noise levels; None: it has a Karras grid.
    """
    spaced = f"levels evenly spaced on {f'its table of {table}' if table else 'the Karras grid'}"
    one_of("from pixels", method, METHODS, "for another copy a recipe that has it, see `fewstep recipes ls`")
    like = f"fashion-{'cd' if method == 'consistency' else method}'s"
    batch = power_below(min(64, found.count))
    critic = ("  critic: {lr: 5e-4, betas: [0.0, 0.99], decay: cosine}", f"{like}: it must keep up with the student")
    rows: Lines = [
        (
            f"about: {quoted(f'{steps}-step {method} student of a teacher of {found.path.name}')}",
            "written by `fewstep new`",
        ),
        *found.lines(),
        (f"teacher: {{name: diffusers, path: {quoted(folder)}}}", where),
        ("student: {name: copy, of: teacher}", "starts as the teacher"),
    ]
    optim: Lines = [("optim:", "per role")]
    if method == "consistency":
        rows += [
            ("method:", "consistency distillation, arXiv 2303.01469"),
            ("  name: consistency", "--method"),
            ("  pairing: {name: grid, points: 18}", "the paper's for CIFAR-10"),
            (f"  steps: {levels(steps, table)}", f"--steps {steps}, {spaced}"),
        ]
        optim += [("  default: {lr: 5e-4, warmup: 20, decay: cosine}", "digits-cd's")]
    else:
        rows += [("critic: {name: copy, of: teacher}", "starts as the teacher, and tracks the student")]
        optim += [("  student: {lr: 1e-4, betas: [0.0, 0.99], decay: cosine, warmup: 20}", like), critic]
    if method == "sid":
        rows += [
            ("method:", "score identity distillation, arXiv 2404.04057"),
            ("  name: sid", "--method"),
            ("  alpha: 1.2", like),
            (
                f"  steps: {levels(steps, table, top=0.5)}",
                f"--steps {steps}, {spaced} from 0.5 down, {like}",
            ),
            ("  times: {name: uniform, low: 0.0, high: 0.8}", like),
            ("  critic: {times: {name: lognormal, mean: -1.0, std: 1.4}, weight: edm, steps: 2}", like),
        ]
    if method == "dmd2":
        rows += [] if found.few else [
            ("discriminator: {trunk: teacher, taps: [mid], width: 64}", f"{like}: a frozen trunk, for {found.count} "
             "pictures are few"),
        ]  # fmt: skip
        rows += [
            ("method:", "distribution matching, arXiv 2405.14867"),
            ("  name: dmd2", "--method"),
            (f"  steps: {levels(steps, table)}", f"--steps {steps}, {spaced}"),
            ("  times: {name: uniform, low: 0.15, high: 0.65}", f"{like}; the paper's are 0.02 to 0.98"),
            ("  critic: {times: {name: lognormal, mean: -1.0, std: 1.4}, weight: edm, steps: 2}", like),
            ("  gan: null", f"{found.count} pictures are learned by heart by a discriminator") if found.few else
            ("  gan: {weight: 0.3, times: {name: lognormal, mean: -1.6, std: 1.0}}", like),
        ]  # fmt: skip
        optim += [] if found.few else [("  discriminator: {lr: 5e-4, betas: [0.0, 0.99], decay: cosine}", like)]
    return [
        *rows,
        *optim,
        ("train:", "length and batch"),
        ("  steps: 2000", "a first guess; `fewstep compare --curve` shows where a run settles"),
        (f"  batch: {batch}", f"at most {found.count}, the number of pictures"),
        ("  ema: [0.99]", "fashion-dmd2's"),
        ("  checkpoint_every: 200", "a tenth of the run"),
        ("  sample_every: 500", "a quarter of the run"),
        *found.evaluation(),
    ]
