"""`fewstep train-retrieval`: the judge that finds the caption of a sample among 100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewstep.config import UserError
from fewstep.data.encoders import SentenceEncoder
from fewstep.data.pictures import Captions
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
        raise UserError(f"{data}: the caption {twice!r} is several pictures'; retrieval needs distinct captions")
    every = torch.arange(len(captions))
    images, features = to_pixels(opened.pictures(every)), opened.text.take(every)["pooled"]
    made = Retrieval(train(images, features, steps, seed=seed), captions, features)
    made.save(out)
    views = augmented(images.float(), torch.Generator().manual_seed(seed + 2))
    return made, made.accuracy(views, every, min(100, len(captions)))
