"""What judges samples where a teacher draws the poor ones again: the house classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.config import UserError, part
from fewstep.eval.features.extractors import build_extractor
from fewstep.eval.protocol.images import to_pixels


class Score(Protocol):
    """What judges samples."""

    @property
    def name(self) -> str: ...
    def open(self, shape: tuple[int, ...]) -> Callable[[Tensor, Any], Tensor]:
        """Of pictures (b, c, h, w) in [-1, 1] with their conditions: (b,), more is better. UserError for others."""
        ...


HOUSE = {8: "house-digits", 28: "house-fashion-mnist"}
"""House classifiers by the side of their grey pictures."""


@part("score", "class")
class ClassScore:
    """log p(class asked for) by the house classifier of grey 8 x 8 or 28 x 28 pictures.

    The house distances are on features of the same network, so what it keeps they like: an FD after it is biased.
    """

    def open(self, shape: tuple[int, ...]) -> Callable[[Tensor, Any], Tensor]:
        if len(shape) != 3 or shape[0] != 1 or shape[-1] not in HOUSE:
            raise UserError(f"score class: judges grey pictures of 8 x 8 or 28 x 28; these samples are {list(shape)}")
        network: Any = build_extractor(HOUSE[shape[-1]])

        @torch.no_grad()
        def score(pictures: Tensor, cond: Any) -> Tensor:
            if not isinstance(cond, Tensor):
                raise UserError("score class: judges samples of classes; these have none")
            logits = network.from_features(network(to_pixels(pictures.float().cpu())))
            told = torch.log_softmax(logits.double(), 1).gather(1, cond.cpu()[:, None])[:, 0]
            return told.to(pictures.device)

        return score
