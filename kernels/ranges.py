"""Block-sparse attention described by ranges: runs of query rows and the key ranges each run may see.

A range list is static (it depends on the sequence layout, not on data), so every implementation can skip
what it excludes without a host synchronisation. Parts whose tangent is known to be zero (clean context,
cached keys) are called still: their tangent products are never formed.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, order=True)
class KeyRange:
    """Keys start <= j < stop; still means the tangents of k and v are zero there."""

    start: int
    stop: int
    still: bool = False


@dataclass(frozen=True)
class Segment:
    """Query rows start <= i < stop and the keys they see; still means the tangent of q is zero there."""

    start: int
    stop: int
    keys: tuple[KeyRange, ...]
    still: bool = False


@dataclass(frozen=True)
class Ranges:
    """Allowed (query, key) pairs of an attention call with `queries` rows and `keys` columns.

    Segments must tile [0, queries) in order; key ranges of one segment must be sorted and disjoint; a key is
    still in every range that holds it or in none. A segment without keys is allowed: its output and tangent
    are zero. Raises ValueError otherwise.

    A tangent handed to the attention at a still position is a contradiction: the CPU path raises
    ValueError for it, the Triton path never reads it, that is, takes it as zero.
    """

    queries: int
    keys: int
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        row = 0
        for segment in self.segments:
            if segment.start != row or segment.stop <= segment.start:
                raise ValueError(
                    f"ranges: query segments must tile [0, {self.queries}) in order without gaps; "
                    f"expected one starting at {row}, got [{segment.start}, {segment.stop})"
                )
            row, column = segment.stop, 0
            for keys in segment.keys:
                if keys.start < column or keys.stop <= keys.start or keys.stop > self.keys:
                    raise ValueError(
                        f"ranges: key ranges of one segment must be sorted, disjoint and inside "
                        f"[0, {self.keys}); got [{keys.start}, {keys.stop}) after {column}"
                    )
                column = keys.stop
        if row != self.queries:
            raise ValueError(f"ranges: query segments end at {row}, but queries is {self.queries}")
        seen = sorted({keys for segment in self.segments for keys in segment.keys})
        reach = {False: 0, True: 0}
        for keys in seen:
            if keys.start < reach[not keys.still]:
                stop = min(keys.stop, reach[not keys.still])
                raise ValueError(
                    f"ranges: keys [{keys.start}, {stop}) are still for some queries and moving for others; "
                    "the tangent of a key is zero for all queries or for none"
                )
            reach[keys.still] = max(reach[keys.still], keys.stop)

    def encode(self) -> list[int]:
        """Flat integer list, the form in which ranges pass through a torch operator."""
        flat = [self.queries, self.keys]
        for segment in self.segments:
            flat += [segment.start, segment.stop, int(segment.still), len(segment.keys)]
            for keys in segment.keys:
                flat += [keys.start, keys.stop, int(keys.still)]
        return flat

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """Dense boolean mask (queries, keys), True where attention is allowed."""
        allowed = torch.zeros(self.queries, self.keys, dtype=torch.bool)
        for segment in self.segments:
            for keys in segment.keys:
                allowed[segment.start : segment.stop, keys.start : keys.stop] = True
        return allowed.to(device)

    def transposed(self) -> tuple[Segment, ...]:
        """Key segments with the query ranges that see them, for backward passes that loop over queries.

        In the result `Segment.keys` holds query ranges; its `still` is that of the keys, and `still` of
        each inner range is that of the queries. Key segments that no query sees have an empty list.
        """
        cuts = {0, self.keys}
        for segment in self.segments:
            for keys in segment.keys:
                cuts |= {keys.start, keys.stop}
        result = []
        for start, stop in itertools.pairwise(sorted(cuts)):
            seen: dict[bool, list[KeyRange]] = {False: [], True: []}
            for segment in self.segments:
                for keys in segment.keys:
                    if keys.start <= start and stop <= keys.stop:
                        seen[keys.still].append(KeyRange(segment.start, segment.stop, segment.still))
            still = bool(seen[True])
            result.append(Segment(start, stop, tuple(seen[still]), still))
        return tuple(result)

    def jvp_work(self, *, skip: bool = True) -> int:
        """Score entries times matmuls of a forward + JVP pass.

        2 matmuls where neither side moves, 4 where only the query moves, 5 where only key and value move,
        6 where all do. With skip=False every allowed entry costs 6.
        """
        total = 0
        for segment in self.segments:
            for keys in segment.keys:
                moving = (not segment.still, not keys.still)
                cost = {(False, False): 2, (True, False): 4, (False, True): 5, (True, True): 6}[moving]
                total += (segment.stop - segment.start) * (keys.stop - keys.start) * (cost if skip else 6)
        return total


@lru_cache(maxsize=256)
def _decode(flat: tuple[int, ...]) -> Ranges:
    segments, at = [], 2
    while at < len(flat):
        start, stop, still, count = flat[at : at + 4]
        at += 4
        keys = [KeyRange(*flat[at + 3 * i : at + 3 * i + 2], bool(flat[at + 3 * i + 2])) for i in range(count)]
        at += 3 * count
        segments.append(Segment(start, stop, tuple(keys), bool(still)))
    return Ranges(flat[0], flat[1], tuple(segments))


def decode(flat: Sequence[int]) -> Ranges | None:
    """Inverse of Ranges.encode; an empty list means no ranges."""
    return _decode(tuple(flat)) if len(flat) else None


def _merge(keys: list[KeyRange]) -> tuple[KeyRange, ...]:
    merged: list[KeyRange] = []
    for item in keys:
        if merged and merged[-1].stop == item.start and merged[-1].still == item.still:
            merged[-1] = KeyRange(merged[-1].start, item.stop, item.still)
        else:
            merged.append(item)
    return tuple(merged)


def _bounds(chunks: Sequence[int], name: str) -> list[tuple[int, int]]:
    if not chunks or any(not isinstance(c, int) or c < 1 for c in chunks):
        raise ValueError(f"{name}: chunk lengths must be positive integers, got {list(chunks)}")
    edges = list(itertools.accumulate(chunks, initial=0))
    return list(itertools.pairwise(edges))


def block_causal(chunks: Sequence[int], *, context: int = 0, window: int | None = None) -> Ranges:
    """Every chunk sees itself and earlier chunks (CausVid, arXiv 2412.07772; Self-Forcing, arXiv 2506.08009).

    chunks: token counts of the chunks, in order. context: tokens of a cached clean prefix that comes before
    the chunks on the key side only; its tangent is zero. window: how many chunks a query may see including
    its own (the prefix is always seen); None means all. Raises ValueError for empty or non-positive sizes.
    """
    bounds = _bounds(chunks, "block_causal: chunks")
    if context < 0:
        raise ValueError(f"block_causal: context must be 0 or more, got {context}")
    if window is not None and window < 1:
        raise ValueError(f"block_causal: window must be at least 1 chunk or None, got {window}")
    segments = []
    for index, (start, stop) in enumerate(bounds):
        first = 0 if window is None else max(0, index + 1 - window)
        keys = [KeyRange(0, context, True)] if context else []
        keys.append(KeyRange(context + bounds[first][0], context + stop))
        segments.append(Segment(start, stop, _merge(keys)))
    total = bounds[-1][1]
    return Ranges(total, context + total, tuple(segments))


def teacher_forcing(chunks: Sequence[int]) -> Ranges:
    """The [clean | noisy] training layout of causal video models (Causal-rCM, arXiv 2606.25473).

    The sequence holds all clean chunks, then all noisy chunks. A clean chunk sees clean chunks up to itself;
    a noisy chunk sees the clean chunks before it and itself. Clean tokens have zero tangent.
    """
    bounds = _bounds(chunks, "teacher_forcing: chunks")
    half = bounds[-1][1]
    segments = [Segment(a, b, (KeyRange(0, b, True),), still=True) for a, b in bounds]
    for a, b in bounds:
        keys = [KeyRange(0, a, True)] if a else []
        segments.append(Segment(half + a, half + b, (*keys, KeyRange(half + a, half + b))))
    return Ranges(2 * half, 2 * half, tuple(segments))
