"""What judges samples where a teacher draws the poor ones again: the house classifiers, CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.algebra.condition import label_of
from fewstep.config import UserError, part
from fewstep.eval.features.clip import ClipRecipe, clip_images, tokenise
from fewstep.eval.features.extractors import build_extractor
from fewstep.eval.protocol.images import to_pixels
from fewstep.eval.protocol.resize import resize_tensor
from fewstep.files import expanded

Judge = Callable[[Tensor, Any, Tensor], Tensor]
"""Of pictures (b, c, h, w) in [-1, 1], their conditions and numbers (b,) int64: (b,), more is better."""


class Score(Protocol):
    """What judges samples."""

    @property
    def name(self) -> str: ...
    def open(self, shape: tuple[int, ...], captions: Sequence[str] | None) -> Judge:
        """captions: of sample i, in turn, where the data has any. UserError for samples that it cannot judge."""
        ...


HOUSE = {8: "house-digits", 28: "house-fashion-mnist"}
"""House classifiers by the side of their grey pictures."""


@part("score", "class")
class ClassScore:
    """log p(class asked for) by the house classifier of grey 8 x 8 or 28 x 28 pictures.

    The house distances are on features of the same network, so what it keeps they like: an FD after it is biased.
    """

    def open(self, shape: tuple[int, ...], captions: Sequence[str] | None) -> Judge:
        if len(shape) != 3 or shape[0] != 1 or shape[-1] not in HOUSE:
            raise UserError(f"score class: judges grey pictures of 8 x 8 or 28 x 28; these samples are {list(shape)}")
        network: Any = build_extractor(HOUSE[shape[-1]])

        @torch.no_grad()
        def score(pictures: Tensor, cond: Any, index: Tensor) -> Tensor:
            label = label_of(cond)
            if label is None:
                raise UserError("score class: judges samples of classes; these have none")
            logits = network.from_features(network(to_pixels(pictures.float().cpu())))
            told = torch.log_softmax(logits.double(), 1).gather(1, label.cpu()[:, None])[:, 0]
            return told.to(pictures.device)

        return score


@part("score", "clip")
class ClipTextScore:
    """Cosine between a picture and its caption by CLIP (open-clip), from a file on this machine.

    The paper of adaptive collaboration (arXiv 2312.10835) judges by ImageReward in its place.
    """

    architecture: str
    """open-clip's name; OpenAI's own weights want -quickgelu behind it, such as ViT-B-32-quickgelu."""
    path: str
    """A checkpoint file of this architecture."""
    sha256: str | None = None
    """Of that file; another is refused."""
    prefix: str = ""
    """Text put before every caption."""
    labels: tuple[str, ...] = ()
    """The captions of classes, in order, for samples of classes."""

    def open(self, shape: tuple[int, ...], captions: Sequence[str] | None) -> Judge:
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise UserError(f"score clip: judges pictures, grey or in colour; these samples are {list(shape)}")
        if not self.labels and not captions:
            raise UserError("score clip: judges samples by their captions; for samples of classes give score.labels")
        try:
            images: Any = clip_images(self.architecture, expanded(self.path), self.sha256)
            recipe = ClipRecipe(self.architecture, prefix=self.prefix, on_long_prompt="keep-eot")
            texts = list(self.labels or captions or ())
            with torch.no_grad():
                parts = [tokenise(recipe, texts[i : i + 256]) for i in range(0, len(texts), 256)]
                text = torch.cat([images.network.encode_text(tokens).double() for tokens in parts])
        except (ModuleNotFoundError, FileNotFoundError, ValueError) as error:
            raise UserError(f"score clip: {error}") from None

        @torch.no_grad()
        def score(pictures: Tensor, cond: Any, index: Tensor) -> Tensor:
            which = index.cpu() % len(text)
            if self.labels:
                label = label_of(cond)
                if label is None or int(label.max()) >= len(self.labels):
                    told = "these have no classes" if label is None else f"there is class {int(label.max())}"
                    raise UserError(f"score.labels: are {len(self.labels)} captions of classes, and {told}")
                which = label.cpu()
            rows = images(resize_tensor(to_pixels(pictures.float().cpu()), images.input_size, "bicubic"))
            return functional.cosine_similarity(rows.double(), text[which], dim=1).to(pictures.device)

        return score
