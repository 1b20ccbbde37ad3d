"""Which runs of blocks one block could do: affine stand-ins for blocks, and what the last hidden state loses by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.blocks import Call, blocks_of, check_intervals, streams, watched

Forward = Callable[[], Any]
"""Calls the denoiser on the probed samples."""
Loss = Callable[[int, int], float]
"""1 - CKA of the last hidden state with blocks u..u + k - 1 replaced by stand-ins, of (u, k)."""


def entering(args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> list[Tensor]:
    """The hidden states that a block is called with, in the order in which it answers them.

    Blocks of two streams answer (text, image) and take them by name (SD3, Flux, Qwen-Image), others take theirs first.
    """
    image = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if not isinstance(output, tuple):
        return [image]
    text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    return [h for h, out in zip((text, image), output, strict=True) if isinstance(out, Tensor)]


def _rows(h: Tensor) -> Tensor:
    return h.detach().double().flatten(0, -2)


def stand_in(before: Tensor, after: Tensor) -> Tensor:
    """The least-squares affine map of the residual, (width + 1, width) float64, of hidden states (b, ..., width).

    after - before = [before, 1] M as well as can be (PPCL, arXiv 2511.16156, sec. 3.2).
    """
    x = _rows(before)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    return torch.linalg.lstsq(x, _rows(after) - x[:, :-1], driver="gelsd" if x.device.type == "cpu" else None).solution


def applied(h: Tensor, m: Tensor) -> Tensor:
    """h (b, ..., width) after a stand-in."""
    return h + (h.double() @ m[:-1] + m[-1]).to(h.dtype)


def cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of hidden states (b, ..., width), over their tokens: 1 for affine images.

    It does not see a rotation, a common factor or a shift.
    """
    x, y = _rows(a), _rows(b)
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


@contextmanager
def standing_in(blocks: Sequence[nn.Module], maps: Sequence[list[Tensor]]) -> Iterator[None]:
    """Blocks answer what their stand-ins do, a map for each stream."""
    handles = []

    def hook(m: list[Tensor]) -> Any:
        def answer(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            out = iter([applied(h, a) for h, a in zip(entering(args, kwargs, output), m, strict=True)])
            if not isinstance(output, tuple):
                return next(out)
            return tuple(next(out) if isinstance(part, Tensor) else part for part in output)

        return answer

    try:
        for block, m in zip(blocks, maps, strict=True):
            handles.append(block.register_forward_hook(hook(m), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Probe:
    """Stand-ins of all blocks of a denoiser, fitted on what `forward` calls it with.

    residuals: |stand-in - block| / |block - input| of each block, the image's stream.
    """

    @torch.no_grad()
    def __init__(self, denoiser: nn.Module, forward: Forward) -> None:
        self.denoiser, self.forward, self.blocks = denoiser, forward, blocks_of(denoiser)
        with watched(denoiser, [(i, i) for i in range(len(self.blocks))]) as calls:
            forward()
        self.maps, self.residuals = [], []
        for call in calls:
            before, after = entering(call.args, call.kwargs, call.output), streams(call.output)
            maps = [stand_in(b, a) for b, a in zip(before, after, strict=True)]
            self.maps.append(maps)
            gap = _rows(applied(before[-1], maps[-1])) - _rows(after[-1])
            self.residuals.append(float(gap.norm() / (_rows(after[-1]) - _rows(before[-1])).norm()))
        self.last = streams(calls[-1].output)[-1]
        self._losses: dict[tuple[int, int], float] = {}

    @torch.no_grad()
    def loss(self, u: int, k: int) -> float:
        """1 - CKA of the last hidden state with blocks u..u + k - 1 replaced by their stand-ins; 0 for k = 0."""
        if k == 0:
            return 0.0
        if (u, k) not in self._losses:
            end = len(self.blocks) - 1
            with standing_in(self.blocks[u : u + k], self.maps[u : u + k]), watched(self.denoiser, [(end, end)]) as seen:
                self.forward()
            (call,) = seen
            self._losses[u, k] = 1 - cka(_last(call), self.last)
        return self._losses[u, k]

    def allowed(self, u: int, v: int) -> bool:
        """Whether one block could stand for u..v."""
        try:
            check_intervals([(u, v)], self.denoiser)
        except ValueError:
            return False
        return True


def _last(call: Call) -> Tensor:
    return streams(call.output)[-1]


def proposed(count: int, loss: Loss, allowed: Callable[[int, int], bool], accept: float = 0.05) -> list[tuple[int, int]]:
    """PPCL's rule (sec. 3.2): a run goes on while every further block costs no more than the one before it.

    accept: the most that a run may cost; of one that costs more the first block is left out and the next one begun
    (the paper does not give its threshold).
    """
    found, u = [], 0
    while u < count:
        k = 1
        while u + k < count and allowed(u, u + k):
            further = loss(u, k + 1) - loss(u, k)
            if further > loss(u, k) - loss(u, k - 1) + 1e-9:
                break
            k += 1
        if k > 1 and loss(u, k) <= accept:
            found.append((u, u + k - 1))
            u += k
        else:
            u += 1
    return found


def cheapest(count: int, loss: Loss, allowed: Callable[[int, int], bool], remove: int) -> list[tuple[int, int]]:
    """Runs without overlap that take `remove` blocks away at the least sum of losses, each judged alone.

    Raises ValueError where no runs take so many away.
    """
    best: dict[tuple[int, int], tuple[float, list[tuple[int, int]]]] = {(0, 0): (0.0, [])}
    for u in range(count):
        for gone in range(remove + 1):
            if (u, gone) not in best:
                continue
            cost, runs = best[u, gone]
            for v in range(u, min(count, u + remove - gone + 1)):
                if v > u and not allowed(u, v):
                    break
                told = (cost + (loss(u, v - u + 1) if v > u else 0.0), runs + ([(u, v)] if v > u else []))
                at = (v + 1, gone + v - u)
                if at not in best or told[0] < best[at][0]:
                    best[at] = told
    if (count, remove) not in best:
        raise ValueError(f"no runs of the {count} blocks take {remove} away")
    return best[count, remove][1]
