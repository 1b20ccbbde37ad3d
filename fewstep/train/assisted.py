"""A product that is helped at sampling: the part, the teacher, the threshold of its calibration, a negative prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.assist import percentile
from fewstep.algebra.condition import moved, rows
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.guidance import guided_teacher
from fewstep.algebra.sampling import Sampler, sample, seeded
from fewstep.config import UserError
from fewstep.data.text import embed
from fewstep.networks.assisted import Adaptive, Assist, Case, Diversity, Nasa
from fewstep.networks.nasa import as_attended, steerable
from fewstep.networks.scores import Judge
from fewstep.train.product import Product

BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Assisted:
    """What `Product.images` draws with in place of its sampler alone."""

    part: Assist
    teacher: nn.Module
    score: Judge | None = None
    threshold: float = float("-inf")
    negative: Tensor | None = None

    def images(
        self, net: nn.Module, sampler: Sampler, shape: tuple[int, ...], index: Tensor, cond: Any, seed: int
    ) -> Tensor:
        """Samples (b, *shape) of global indices (b,): the same for any split into batches."""
        noise, fresh = seeded(seed, index, shape)
        judge = self.score
        return self.part.draw(
            Case(
                sampler=sampler,
                student=net,
                teacher=self.teacher,
                noise=noise,
                cond=cond,
                fresh=fresh,
                other=lambda name, i: Draws(fold(seed, "assist", name, i), index).normal(*shape),
                score=None if judge is None else lambda x, cond: judge(x, cond, index),
                threshold=self.threshold,
                negative=self.negative,
            )
        )

    def network_calls(self, sampler: Sampler) -> float:
        """Expected calls of student and teacher per sample."""
        return self.part.network_calls(sampler)


def assisted(product: Product, part: Assist, teacher: nn.Module, null: Callable[[Any], Any]) -> Product:
    """The product with its teacher's help; calibrates a threshold where the part scores samples.

    teacher: of the product's process. null: conditions to null conditions.

    Raises:
        UserError: a product without steps of its own, or samples that the score does not judge.
    """
    if product.sampler.kind == "ode" or product.fitted is not None:
        raise UserError(f"assist {part.name}: helps a student; {product.title} is a teacher")
    n = len(product.sampler.steps)
    if isinstance(part, Diversity) and part.steps >= n:
        raise UserError(f"assist.steps {part.steps}: the student takes {n} in all, and one at least must be left to it")
    helped = Assisted(part=part, teacher=guided_teacher(teacher, part.guidance, null))
    if isinstance(part, Adaptive):
        judge, decode = part.score.open(product.picture_shape(), captions_of(product)), product.decoder()
        helped = replace(helped, score=lambda x, cond, index: judge(decode(x), cond, index))
        helped = replace(helped, threshold=percentile(scores_of(product, part.calibration, helped), part.k))
    if isinstance(part, Nasa):
        steerable(product.net)
        recipe: Any = product.recipe
        helped = replace(helped, negative=attended(product, recipe.data, part.negative))
    return replace(product, assist=helped, title=f"{product.title} + {part.name}")


def captions_of(product: Product) -> Sequence[str] | None:
    """The captions that the data gives its samples in turn; None where it has none."""
    data = None if product.recipe is None or product.prompted is None else product.recipe.data.open()
    text: Any = getattr(data, "text", None)
    return None if text is None else text.prompts


def attended(product: Product, data: Any, words: str) -> Tensor:
    """A prompt (1, tokens, width) as the student's cross-attention gets it; `data` knows the encoder.

    Raises:
        UserError: data without a text encoder, or a network whose attention takes no second prompt.
    """
    if getattr(data, "encoder", None) is None:
        raise UserError(f"{product.title}: was not trained on text (its data has no encoder), so it takes no prompt")
    told = embed(data.encoder, [words], negative=data.negative, zeros=data.zeros, cache=data.text_cache)
    return as_attended(steerable(product.net), told.take(torch.zeros(1, dtype=torch.long, device=product.device())))


@torch.no_grad()
def scores_of(product: Product, count: int, helped: Assisted) -> Tensor:
    """Scores (count,) of the student's own samples, from noise that no measurement draws."""
    device, key, out = product.device(), fold("calibration of", helped.part.name), []
    labels = product.calibrating(Draws(fold(key, "conditions"), torch.arange(count)))
    assert helped.score is not None
    for part in torch.arange(count, device=device).split(BATCH):
        cond = moved(rows(labels, part.cpu()), device)
        noise, fresh = seeded(key, part, product.shape)
        out.append(helped.score(sample(product.sampler, product.net, noise, cond, fresh), cond, part))
    return torch.cat(out)
