"""Train the judge of captions.

python -m fewstep.commands.train_retrieval --data runs/emoji --encoder runs/emoji/encoder --out runs/emoji-retrieval

"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fewstep.config import UserError
from fewstep.data.pictures import Captions
from fewstep.data.text import SentenceEncoder
from fewstep.eval.features.retrieval import Retrieval, augmented, train
from fewstep.eval.metrics.estimate import Estimate
from fewstep.eval.protocol.images import to_pixels


def train_retrieval(
    data: str, encoder: str, out: Path, *, size: int = 32, steps: int = 600, seed: int = 0
) -> tuple[Retrieval, Estimate]:
    """Train on a folder with captions and write `out`; returns the model and its accuracy on fresh views.

    Every caption is one picture's, so the accuracy is on the training pictures under views not seen in training:
    an upper bound for samples, no sign of generalisation. UserError for captions that are not distinct.
    """
    text = SentenceEncoder(path=encoder, keys=("pooled",))
    opened: Any = Captions(path=data, size=size, encoder=text).open()
    captions = tuple(item.caption for item in opened.items)
    if len(set(captions)) < len(captions):
        twice = next(c for c in captions if captions.count(c) > 1)
        raise UserError(
            f"{data}: the caption {twice!r} is several pictures'; retrieval needs distinct captions"
        )
    every = torch.arange(len(captions))
    images, features = to_pixels(opened.pictures(every)), opened.text.take(every)["pooled"]
    made = Retrieval(train(images, features, steps, seed=seed), captions, features)
    made.save(out)
    views = augmented(images.float(), torch.Generator().manual_seed(seed + 2))
    return made, made.accuracy(views, every, min(100, len(captions)))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.commands.train_retrieval", description=__doc__)
    parser.add_argument("--data", required=True, help="folder of pictures with captions")
    parser.add_argument("--encoder", required=True, help="folder of a text model of transformers")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures in pixels")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(arguments)
    started = time.process_time()
    try:
        made, found = train_retrieval(o.data, o.encoder, o.out, size=o.size, steps=o.steps, seed=o.seed)
    except UserError as error:
        sys.exit(f"error: {error}")
    count = min(100, len(made.captions))
    print(
        f"{o.out}: {100 * found.value:.1f} % of {len(made.captions)} captions found among {count} (fresh views)"
    )
    print(f"{time.process_time() - started:.0f} s of processor time")


if __name__ == "__main__":
    main()
