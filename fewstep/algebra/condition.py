"""Conditions: what a network is told beside x and its time.

A condition is None, a tensor of class labels (b,), or a mapping of the keys below to tensors that all lead with
the batch. The same functions batch, cut, move and null both forms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

KEYS: dict[str, str] = {
    "text": "(b, n, d) token embeddings of the text encoder",
    "mask": "(b, n) 1 for a token, 0 for padding",
    "text2": "(b, n2, d2) token embeddings of a second text encoder with a mask of its own (HunyuanImage, HunyuanDiT)",
    "mask2": "(b, n2) its mask",
    "pooled": "(b, d) pooled text embedding (SDXL, SD3, Flux)",
    "time_ids": "(b, 6) original height, width, crop top, left, target height, width in pixels (SDXL)",
    "resolution": "(b, 2) height, width in pixels (PixArt-alpha at 1024)",
    "aspect": "(b, 1) height / width (PixArt-alpha at 1024)",
    "label": "(b,) int64 class number",
    "guidance": "(b,) guidance scale that the network takes as an input (Flux-dev, SANA-Sprint)",
    "image": "(b, c, h, w) picture that conditions, in [-1, 1]: low resolution, edges, mask, the source of a bridge",
    "points": "(b, n) 1 for a point of a sample of points (b, n, d), 0 for padding",
    "easy": "(b, c, h, w) a picture of the same sample that tells more, for networks that `see: {image: easy}`",
}
"""Keys of a condition and what their tensors are."""

_MASKS = {"text": "mask", "mask": "mask", "text2": "mask2", "mask2": "mask2"}
"""The mask that says how many of a key's tokens are padding."""


def check_keys(names: Iterable[str], told: str) -> None:
    """ValueError, beginning with `told`, for a name that is no key of a condition."""
    unknown = [k for k in names if k not in KEYS]
    if unknown:
        raise ValueError(f"{told}: {unknown[0]!r} is no key of a condition; those are {', '.join(KEYS)}")


def checked(cond: Any, needs: Iterable[str], takes: Iterable[str], who: str) -> Mapping[str, Tensor]:
    """The condition as a mapping; a label tensor becomes {"label": tensor}, None an empty mapping.

    Raises ValueError naming `who` for a key of `needs` that is missing and for one in neither list.
    """
    needs, takes = tuple(needs), tuple(takes)
    given: Mapping[str, Tensor] = {} if cond is None else {"label": cond} if isinstance(cond, Tensor) else cond
    missing = [k for k in needs if k not in given]
    if missing:
        told = f"cond[{missing[0]!r}] {KEYS.get(missing[0], '')}".strip()
        raise ValueError(f"{who}: the condition lacks {told}; it has {', '.join(given) or 'nothing'}")
    unknown = [k for k in given if k not in needs and k not in takes]
    if unknown:
        raise ValueError(f"{who}: does not take cond[{unknown[0]!r}]; it takes {', '.join(needs + takes) or 'none'}")
    return given


def label_of(cond: Any) -> Tensor | None:
    """The class numbers (b,) of a condition in either form; None where it has none."""
    return cond.get("label") if isinstance(cond, Mapping) else cond


def seen(cond: Any, ignore: Iterable[str] = (), see: Mapping[str, str] | None = None) -> Any:
    """What one network is shown of a condition: key k is cond[see[k]], the keys `ignore` are left out.

    "easy" is shown under the key that sees it and under no other. A label tensor stays as it is, or is left out whole
    where `ignore` has "label". Raises ValueError for a key of `see` whose picture the condition lacks.
    """
    if not isinstance(cond, Mapping):
        return None if "label" in ignore else cond
    out = {k: v for k, v in cond.items() if k != "easy" and k not in ignore}
    for key, source in (see or {}).items():
        if source not in cond:
            raise ValueError(
                f"see: the condition lacks cond[{source!r}] to be shown as {key!r}; it has {', '.join(cond)}"
            )
        out[key] = cond[source]
    return out or None


def rows(cond: Any, part: slice | Tensor) -> Any:
    """Some rows of a condition: a slice, an index tensor or a mask (b,)."""
    if cond is None or isinstance(cond, Tensor):
        return None if cond is None else cond[part]
    return {k: v[part] for k, v in cond.items()}


def joined(a: Any, b: Any) -> Any:
    """Two conditions of the same keys as one batch, the rows of a first.

    Token sequences of different lengths are padded with zeros where both have a mask. Raises ValueError for
    different keys or shapes.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.cat((a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor) or set(a) != set(b):
        raise ValueError(f"conditions with {_shown(a)} and with {_shown(b)} do not go into one batch")
    out = {}
    for key, value in a.items():
        pair = [value, b[key]]
        if _MASKS.get(key) in a:
            pair = [_padded(v, max(v.shape[1] for v in pair)) for v in pair]
        if pair[0].shape[1:] != pair[1].shape[1:]:
            hint = "; give both a mask, or the same number of tokens" if key in _MASKS else ""
            raise ValueError(f"cond[{key!r}]: rows of {list(value.shape[1:])} and {list(b[key].shape[1:])} differ{hint}")
        out[key] = torch.cat(pair)
    return out


def _shown(cond: Any) -> str:
    return "labels" if isinstance(cond, Tensor) else f"the keys {', '.join(cond)}" if cond else "nothing"


def _padded(tokens: Tensor, length: int) -> Tensor:
    missing = length - tokens.shape[1]
    if missing == 0:
        return tokens
    return torch.cat((tokens, tokens.new_zeros(tokens.shape[0], missing, *tokens.shape[2:])), 1)


def replaced(cond: Any, where: Tensor, by: Any) -> Any:
    """The condition with the rows of `by`, of the same structure, where the mask (b,) is true."""
    if isinstance(cond, Tensor):
        return torch.where(where.reshape(-1, *(1,) * (cond.ndim - 1)), by, cond)
    return {k: replaced(v, where, by[k]) for k, v in cond.items()}


def differs(a: Any, b: Any) -> Tensor:
    """Mask (b,) of the rows in which two conditions of the same structure differ."""
    if isinstance(a, Tensor):
        return (a != b).reshape(len(a), -1).any(1)
    return torch.stack([differs(v, b[k]) for k, v in a.items()]).any(0)


def moved(cond: Any, device: Any = None, dtype: torch.dtype | None = None) -> Any:
    """The condition on a device; floating-point tensors also in a dtype, integers as they are."""
    if cond is None:
        return None
    if isinstance(cond, Tensor):
        return cond.to(device=device, dtype=dtype if cond.is_floating_point() else None)
    return {k: moved(v, device, dtype) for k, v in cond.items()}


def nulled(cond: Any, empty: Any) -> Any:
    """The null (or negative) condition of `cond`'s batch and structure, for guidance.

    Args:
        empty: one row (1, ...) per key that guidance takes away: text, mask, pooled or label. Keys that it does
            not have (time_ids, guidance) are kept. For a label tensor: the null class, a number or a tensor.
    """
    if isinstance(cond, Tensor):
        return torch.full_like(cond, int(empty))
    strange = [k for k in empty if k not in cond]
    if strange:
        raise ValueError(f"the null condition has {strange[0]!r}, which the condition with {_shown(cond)} has not")
    out = {}
    for key, value in cond.items():
        row = empty.get(key)
        if row is None:
            out[key] = value
            continue
        if _MASKS.get(key) in cond:
            row = _padded(row[:, : value.shape[1]], value.shape[1])
        if row.shape[1:] != value.shape[1:]:
            raise ValueError(f"null condition {key!r}: a row of {list(row.shape[1:])} for {list(value.shape[1:])}")
        out[key] = row.to(value).expand_as(value)
    return out


def zeros_like(cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A null row of zeros for text and pooled, as SDXL's `force_zeros_for_empty_prompt` has it; the mask is kept."""
    return {k: torch.zeros_like(v[:1]) for k, v in cond.items() if k in ("text", "text2", "pooled")}
