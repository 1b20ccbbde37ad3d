"""NASA, negative prompts for one-step text-to-image students, without training (SNOOPI, arXiv 2412.02687)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.config import UserError
from fewstep.networks.wrappers.base import Wrapper


class NegativeAway:
    """A diffusers attention processor: cross-attention gives Z+ - a Z-, Z- with the negative prompt's keys and values.

    The difference is taken in front of the output projection; as that is affine, out+ - a (out- - bias) is the same.
    """

    def __init__(self, inner: Any, negative: Tensor, weight: float) -> None:
        self.inner, self.negative, self.weight = inner, negative, weight

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **call: Any,
    ) -> Tensor:
        out = self.inner(attn, hidden_states, encoder_hidden_states, *args, **call)
        if encoder_hidden_states is None or self.weight == 0:
            return out
        if attn.residual_connection or attn.rescale_output_factor != 1:
            raise UserError(
                "a negative prompt (NASA) needs attention whose output is the projection alone, as SD and PixArt have it"
            )
        rows = encoder_hidden_states.shape[0]
        negative = self.negative.to(encoder_hidden_states).expand(rows, -1, -1)
        other = self.inner(attn, hidden_states, negative)
        bias = attn.to_out[0].bias
        return out - self.weight * (other if bias is None else other - bias)


def steerable(net: Any) -> Any:
    """The diffusers model in a denoiser whose attention takes a negative prompt. UserError where there is none."""
    while not isinstance(net, Wrapper) and net is not None:  # an adapter's base is none of its modules
        net = next((getattr(net, k) for k in ("base", "denoiser", "net") if hasattr(net, k)), None)
    model = getattr(net, "model", None)
    if not hasattr(model, "set_attn_processor"):
        raise UserError("a negative prompt (NASA): the student's network has no attention processors that take one")
    return model


def as_attended(model: Any, cond: dict[str, Tensor]) -> Tensor:
    """Of one embedded prompt {text (1, n, width), mask (1, n) or none} what cross-attention gets, (1, tokens, width)."""
    text = cond["text"][:, cond["mask"][0] > 0] if "mask" in cond else cond["text"]
    # It is projected first in some classes.
    project = getattr(model, "caption_projection", None) or getattr(model, "encoder_hid_proj", None)
    with torch.no_grad():
        return text if project is None else project(text)


@contextmanager
def negative_away(model: nn.Module, negative: Tensor, weight: float) -> Iterator[None]:
    """Run a diffusers model's cross-attention with a negative prompt inside.

    Args:
        model: with `attn_processors` and `set_attn_processor` (UNet2DConditionModel, PixArtTransformer2DModel).
        negative: embedding of the negative prompt (1, tokens, width) or (b, tokens, width), as the model takes it.
        weight: a; .1 for SD1.5, .2 for SD2.1, .5 for PixArt-alpha in the paper. 0 changes nothing.
    """
    before: dict[str, Any] = dict(model.attn_processors)  # type: ignore[arg-type]
    model.set_attn_processor({k: NegativeAway(p, negative, weight) for k, p in before.items()})  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_processor(before)  # type: ignore[operator]
