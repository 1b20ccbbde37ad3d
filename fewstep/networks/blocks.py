"""Depth pruning: one block in the place of a run of blocks, in networks that keep them in lists (arXiv 2511.16156)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fewstep.networks.adapters import network_of, plain_copy

Intervals = Sequence[tuple[int, int]]
"""First and last of runs of blocks, counted from 0 over all lists of a network in their order."""
LISTS = {
    "transformer_blocks": "num_layers",
    "joint_transformer_blocks": "num_mmdit_layers",
    "single_transformer_blocks": "num_single_layers",
    "blocks": "num_layers",
    "layers": "n_layers",
}
"""Where networks keep their blocks, in the order in which they run, and their config's key for the number."""
OWN_KEYS = {
    "AuraFlowTransformer2DModel": {"single_transformer_blocks": "num_single_dit_layers"},
    "Lumina2Transformer2DModel": {"layers": "num_layers"},
}
"""Keys of classes that have others."""


def holder(denoiser: nn.Module) -> Any:
    """The module that has the lists of blocks: a diffusers model, or a network of fewstep's."""
    net: Any = network_of(denoiser)
    return getattr(net, "model", net)


def lists_of(denoiser: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of blocks by name, in order. ValueError for a network that has none."""
    net = holder(denoiser)
    found = {name: m for name in LISTS if isinstance(m := getattr(net, name, None), nn.ModuleList) and len(m)}
    # A plain MLP's layers are no blocks: they need what stands beside them.
    if not found or any(isinstance(m, nn.Linear) for ms in found.values() for m in ms):
        raise ValueError(f"a {type(net).__name__} has no list of blocks, which are {', '.join(LISTS)}")
    return found


def keys_of(denoiser: nn.Module) -> dict[str, str]:
    """The config's key for the number of blocks by list; none for networks that are no diffusers models.

    Raises:
        ValueError: a key is not in the config, or counts something else.
    """
    net = holder(denoiser)
    if not hasattr(net, "register_to_config"):
        return {}
    kind = type(net).__name__
    lists = lists_of(denoiser)
    keys = {name: OWN_KEYS.get(kind, {}).get(name, LISTS[name]) for name in lists}
    for name, key in keys.items():
        if net.config.get(key) != len(lists[name]):
            raise ValueError(
                f"a {kind} has {len(lists[name])} {name}, and {key} in its config is {net.config.get(key)}: under which "
                "key their number is kept is not known, so what is pruned could not be opened again"
            )
    return keys


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """All blocks in the order in which they run."""
    return [block for blocks in lists_of(denoiser).values() for block in blocks]


def intervals_of(denoiser: nn.Module) -> tuple[tuple[int, int], ...]:
    """The intervals that a pruned network has one block for; none for others."""
    try:
        return getattr(holder(denoiser), "intervals", ())
    except ValueError:
        return ()


def check_intervals(intervals: Intervals, denoiser: nn.Module) -> None:
    """ValueError for intervals that overlap, reach beyond the blocks, or hold blocks of different shapes."""
    lists = lists_of(denoiser)
    blocks, ends, n = blocks_of(denoiser), [], 0
    for each in lists.values():
        n += len(each)
        ends.append(n)
    free = 0
    for u, v in intervals:
        told = f"intervals: [{u}, {v}]"
        if v < u:
            raise ValueError(f"{told} ends before it begins")
        if u < free:
            raise ValueError(f"{told} begins before block {free}; give them in order, without overlap")
        if v >= len(blocks):
            raise ValueError(f"{told}: the blocks are 0..{len(blocks) - 1}")
        if any(u < end <= v for end in ends):
            raise ValueError(
                f"{told} reaches over two lists of blocks, which end at {', '.join(str(e - 1) for e in ends)}"
            )
        shapes = [{k: p.shape for k, p in blocks[i].state_dict().items()} for i in range(u, v + 1)]
        if odd := [u + i for i, s in enumerate(shapes) if s != shapes[(v - u) // 2]]:
            raise ValueError(
                f"{told}: block {odd[0]} has other weights than block {(u + v) // 2}, which would replace it"
            )
        free = v + 1


def prune(denoiser: nn.Module, intervals: Intervals) -> None:
    """Put a copy of block (u + v) // 2 in the place of blocks u..v, for every interval [u, v], in place.

    A diffusers model's config then says how many blocks there are, so that its own class opens what it saves.

    Raises:
        ValueError: as `check_intervals` and `keys_of`.
    """
    check_intervals(intervals, denoiser)
    keys = keys_of(denoiser)
    net, first = holder(denoiser), 0
    middle = {i: (u + v) // 2 for u, v in intervals for i in range(u, v + 1)}
    starts = {u for u, _ in intervals}
    kept: list[int] = []
    for name, blocks in lists_of(denoiser).items():
        here = [i for i in range(first, first + len(blocks)) if i not in middle or i in starts]
        chosen = [blocks[middle.get(i, i) - first] for i in here]
        setattr(net, name, nn.ModuleList(chosen))
        if keys:
            net.register_to_config(**{keys[name]: len(chosen)})
        kept, first = kept + here, first + len(blocks)
    # SD3.5's config names some of its blocks by their numbers.
    numbered = getattr(getattr(net, "config", None), "dual_attention_layers", None)
    if numbered:
        net.register_to_config(dual_attention_layers=tuple(n for n, i in enumerate(kept) if middle.get(i, i) in numbered))
    net.intervals = tuple((int(u), int(v)) for u, v in intervals)


def replaced(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks that stand for the intervals of a pruned network, in their order."""
    blocks, gone, found = blocks_of(denoiser), 0, []
    for u, v in intervals_of(denoiser):
        found.append(blocks[u - gone])
        gone += v - u
    return found


def fill(pruned: nn.Module, whole: nn.Module) -> None:
    """Give a pruned network the weights of a whole one, those of an interval's middle block to the one that replaces it.

    Raises:
        RuntimeError: the whole one is another network.
    """
    twin = plain_copy(whole)
    try:
        prune(twin, intervals_of(pruned))
    except ValueError as error:
        raise RuntimeError(str(error)) from None
    pruned.load_state_dict(twin.state_dict())


@dataclass
class Call:
    """What a block is called with, and what the last of its interval answers."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None


def streams(output: Any) -> list[Tensor]:
    """The hidden states (b, ..., width) in a block's answer: the image's, and the text's where it has them."""
    parts = output if isinstance(output, tuple) else (output,)
    return [part for part in parts if isinstance(part, Tensor)]


@contextmanager
def watched(denoiser: nn.Module, intervals: Intervals) -> Iterator[list[Call]]:
    """A `Call` for each interval, which a call of the denoiser within the context fills."""
    blocks, calls, handles = blocks_of(denoiser), [Call() for _ in intervals], []

    def enters(call: Call) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call.args, call.kwargs = args, kwargs

        return hook

    def leaves(call: Call) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            call.output = output

        return hook

    try:
        for (u, v), call in zip(intervals, calls, strict=True):
            handles.append(blocks[u].register_forward_pre_hook(enters(call), with_kwargs=True))
            handles.append(blocks[v].register_forward_hook(leaves(call)))
        yield calls
    finally:
        for handle in handles:
            handle.remove()
