"""Which runs of blocks one block could do: affine stand-ins for blocks, and what the last hidden state loses by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.adapters import network_of
from fewstep.networks.blocks import blocks_of, check_intervals, streams, watched
from fewstep.networks.wrappers.base import Wrapper

Forward = Callable[[], Any]
"""Calls the denoiser on the probed samples."""
Loss = Callable[[int, int], float]
"""1 - CKA of the last hidden state with blocks u..u + k - 1 replaced by stand-ins, of (u, k)."""


LEAST = 2
"""Rows that a stand-in is fitted to, for each row of its map: with one the fit would be exact whatever the block does."""


def picked(denoiser: nn.Module) -> int | None:
    """Which of several hidden states that a block answers is the image's, as its wrapper says; None without one."""
    net = network_of(denoiser)
    return net.pick if isinstance(net, Wrapper) else None


def entering(args: Sequence[Any], kwargs: dict[str, Any], output: Any, pick: int | None) -> list[Tensor]:
    """The hidden states that a block is called with, in the order in which it answers them.

    Blocks of two streams answer (image, text) where `pick`, of `picked`, is 0 (HunyuanVideo), else (text, image) (SD3,
    Flux, Qwen-Image); they take them by name, or the image's first. ValueError for several of unknown order.
    """
    image = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if not isinstance(output, tuple):
        return [image]
    if pick is None or len(output) != 2:
        raise ValueError("a block answers several hidden states, and which is the image's is not known of its class")
    text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    pair = (text, image) if pick else (image, text)
    return [h for h, out in zip(pair, output, strict=True) if isinstance(out, Tensor)]


def _image_of(output: Any, pick: int | None) -> Tensor:
    return output if isinstance(output, Tensor) else output[pick or 0]


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
def standing_in(blocks: Sequence[nn.Module], maps: Sequence[list[Tensor]], pick: int | None = None) -> Iterator[None]:
    """Blocks answer what their stand-ins do, a map for each stream; pick: of `picked`."""
    handles = []

    def hook(m: list[Tensor]) -> Any:
        def answer(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            out = iter([applied(h, a) for h, a in zip(entering(args, kwargs, output, pick), m, strict=True)])
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
    """Stand-ins of all blocks of a denoiser, fitted on every other sample that `forward` calls it with.

    residuals: |stand-in - block| / |block - input| of each block, the image's stream, on the samples between; 0 for a
    block that changes nothing. ValueError for two streams of unknown order, and for too few rows (samples x tokens).
    """

    @torch.no_grad()
    def __init__(self, denoiser: nn.Module, forward: Forward) -> None:
        self.denoiser, self.forward, self.blocks = denoiser, forward, blocks_of(denoiser)
        with watched(denoiser, [(i, i) for i in range(len(self.blocks))]) as calls:
            forward()
        self.pick = picked(denoiser)
        self.maps, self.residuals = [], []
        for call in calls:
            before, after = entering(call.args, call.kwargs, call.output, self.pick), streams(call.output)
            maps = []
            for b, a in zip(before, after, strict=True):
                rows, width = b[::2].numel() // b.shape[-1], b.shape[-1]
                if rows < LEAST * (width + 1):
                    raise ValueError(
                        f"an affine map of {width} channels would be fitted to {rows} rows, half of the samples' tokens, "
                        f"and needs {LEAST * (width + 1)}; take more samples"
                    )
                maps.append(stand_in(b[::2], a[::2]))
            self.maps.append(maps)
            image = -1 if self.pick else 0
            told, truth = before[image][1::2], after[image][1::2]
            gap, change = _rows(applied(told, maps[image])) - _rows(truth), _rows(truth) - _rows(told)
            self.residuals.append(float(gap.norm() / change.norm()) if change.any() else 0.0)
        self.last = _image_of(calls[-1].output, self.pick)
        self._losses: dict[tuple[int, int], float] = {}

    @torch.no_grad()
    def loss(self, u: int, k: int) -> float:
        """As `Loss`, on the samples that no stand-in was fitted to; 0 for k = 0."""
        if k == 0:
            return 0.0
        if (u, k) not in self._losses:
            end = len(self.blocks) - 1
            standing = standing_in(self.blocks[u : u + k], self.maps[u : u + k], self.pick)
            with standing, watched(self.denoiser, [(end, end)]) as seen:
                self.forward()
            last = _image_of(seen[0].output, self.pick)
            self._losses[u, k] = 1 - cka(last[1::2], self.last[1::2])
        return self._losses[u, k]

    def allowed(self, u: int, v: int) -> bool:
        """Whether one block could stand for u..v."""
        try:
            check_intervals([(u, v)], self.denoiser)
        except ValueError:
            return False
        return True


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
