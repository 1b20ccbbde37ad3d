"""diffusers' DiTTransformer2DModel: class-conditional latents with a learned variance (arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.wrappers.base import Wrapper, doubled, first_half, numbered, wraps


@wraps("DiTTransformer2DModel")
class DiT(Wrapper):
    """Wraps a DiTTransformer2DModel; taps "block0".. (tokens). Square inputs of its own size only.

    The class after the last one is the null class. Label dropout is switched off: in training mode diffusers
    would replace a tenth of the labels at random, in teacher, student and critic alike.
    """

    needs = ("label",)
    pipeline = "DiTPipeline"
    levels = ""

    def __init__(self, model: nn.Module, classes: int = 0, **options: Any) -> None:
        super().__init__(model, int(model.config.num_embeds_ada_norm), **options)  # type: ignore[union-attr,arg-type]
        for block in self.model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    @property
    def width(self) -> int:
        return int(self.model.inner_dim)

    def embedders(self) -> list[nn.Module]:
        # Each block embeds time and label by itself; the last layer borrows the first block's.
        return [block.norm1.emb for block in self.model.transformer_blocks]

    def blocks(self) -> dict[str, nn.Module]:
        return numbered("block", self.model.transformer_blocks)

    def call(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        raw = self.model(x, time, cond["label"], return_dict=False)[0]
        return first_half(raw, x.shape[1])

    def own(self, raw: Tensor) -> Tensor:
        return doubled(raw, self.model)

    def example(self, b: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randint(self.classes, (b,), generator=generator)

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        return {"class_labels": cond["label"].tolist()}
